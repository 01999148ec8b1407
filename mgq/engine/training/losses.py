"""Losses of training: cross entropy with label smoothing, distillation."""

from __future__ import annotations

import megengine.functional as F
from megengine import Tensor

TEMPERATURE = 2.0


def cross_entropy(logits: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    """Mean cross entropy with smoothed labels (arXiv:1512.00567): float32 (N, C), int32 (N,) -> float32 ()."""
    return F.nn.cross_entropy(logits, labels, label_smooth=smoothing)


def distillation(logits: Tensor, teacher: Tensor) -> Tensor:
    """How far ``logits`` are from those of the ``teacher``, both float32 (N, C) -> float32 ().

    Mean Kullback-Leibler divergence at temperature 2, times its square, so that gradients keep their size
    (arXiv:1503.02531, section 2.1).
    """
    wanted = F.logsoftmax(teacher / TEMPERATURE, axis=1)  # MegEngine's softmax is NaN where all logits are below -88
    difference = wanted - F.logsoftmax(logits / TEMPERATURE, axis=1)
    return (F.exp(wanted) * difference).sum(axis=1).mean() * TEMPERATURE**2

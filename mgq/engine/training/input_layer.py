"""Finds the first convolution and the factor of its learning rate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

COLOURS = 3
HE_LENGTH = 2.0
"""Squared length of the weights of one output as He initialization draws them (arXiv:1502.01852)."""

FOLDED = 0.03
"""Below this share of it, pixels' spread is folded in: training alone does not make weights so small."""


def find_input_layer(parameters: Mapping[str, Any]) -> str | None:
    """The name of the weights (O, 3, H, W) that see pixels; None where there are none of that shape."""
    for name, value in parameters.items():
        shape = tuple(int(axis) for axis in value.shape)
        if len(shape) == 4 and shape[1] == COLOURS:
            return name
    return None


def input_layer_lr_scale(state: Mapping[str, npt.NDArray[Any]]) -> float:
    """The factor for the learning rate of the stem in ``state``: at most 1.

    Weights that were trained on normalized pixels, and take pixels as they are, are divided by the pixels' spread, some
    58. That makes their gradient as many times larger, and a step of one rate 58 x 58 times larger against the weights.
    Seen from the weights alone: their squared length is so many times smaller than He's. Others go at the full rate.
    """
    name = find_input_layer(state)
    if name is None:
        return 1.0
    weight = np.asarray(state[name], np.float64)
    length = float((weight**2).sum() / len(weight))
    rate = float(f"{length / HE_LENGTH:.3g}")
    return rate if 0 < rate < FOLDED else 1.0

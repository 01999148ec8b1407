"""Solves for a new classifier on the features of trained weights, before training starts.

A random classifier sends large, aimless gradients through the weights below it before it has learnt anything, and so
spoils what they know. Solving it first and training everything afterwards keeps that (Kumar et al. 2022,
arXiv:2202.10054).
"""

from __future__ import annotations

import megengine.module as M
import numpy as np
import numpy.typing as npt
from megengine import Tensor

from mgq.data.loader import Loader
from mgq.events import OnProgress, Progress, log_progress
from mgq.machine import one_blas_thread
from mgq.ptq.range_measurement import as_input

DECAY = 0.03  # at features of root mean square 1
MOST_STEPS = 200

Array = npt.NDArray[np.float32]


def fit_linear_probe(
    network: M.Module, head: str, loader: Loader, smoothing: float, on_progress: OnProgress = log_progress
) -> None:
    """Give the linear layer called ``head`` of ``network`` the weights that answer best on the pictures of ``loader``.

    The rest of the float ``network``, in evaluation state afterwards, is taken as it is. What is minimised is the
    cross entropy with labels smoothed by ``smoothing``, and a little weight decay.
    """
    layer: M.Linear = dict(network.named_modules())[head]
    features, labels = compute_features(network, layer, loader, on_progress)
    weight, bias = solve_softmax_regression(
        features, labels, layer.out_features, smoothing, with_bias=layer.bias is not None
    )
    layer.weight[...] = Tensor(weight)
    if layer.bias is not None:
        layer.bias[...] = Tensor(bias.reshape(layer.bias.numpy().shape))


def compute_features(
    network: M.Module, layer: M.Linear, loader: Loader, on_progress: OnProgress
) -> tuple[Array, npt.NDArray[np.int64]]:
    """What ``layer`` sees of each picture, float32 (N, features), and the labels."""
    seen: list[Array] = []
    labels: list[npt.NDArray[np.int64]] = []
    network.eval()
    hook = layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].numpy()))
    try:
        for number, batch in enumerate(loader.batches(0), 1):
            network(Tensor(as_input(batch.images))).numpy()
            labels.append(batch.labels)
            on_progress(Progress("look at the pictures for a first classifier", number, len(loader), "batches"))
    finally:
        hook.remove()
    return np.concatenate(seen), np.concatenate(labels)


def solve_softmax_regression(
    features: Array, labels: npt.NDArray[np.int64], classes: int, smoothing: float, with_bias: bool = True
) -> tuple[Array, Array]:
    """Softmax regression: features (N, F) and labels (N,) -> weight (classes, F) and bias (classes,), float32.

    Without ``with_bias`` the bias is 0.
    """
    scale = float(np.sqrt(np.mean(features.astype(np.float64) ** 2))) or 1.0
    scaled = (features / scale).astype(np.float64)
    number, width = scaled.shape
    wanted = np.full((number, classes), smoothing / classes)
    wanted[np.arange(number), labels] += 1 - smoothing

    def loss_and_gradient(values: npt.NDArray[np.float64]) -> tuple[float, npt.NDArray[np.float64]]:
        weight, bias = values[:-classes].reshape(classes, width), values[-classes:]
        logits = scaled @ weight.T + bias
        logits -= logits.max(axis=1, keepdims=True)
        logs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        loss = -float((wanted * logs).sum()) / number + DECAY / 2 * float((weight**2).sum())
        slope = (np.exp(logs) - wanted) / number
        d_bias = slope.sum(axis=0) if with_bias else np.zeros(classes)
        return loss, np.concatenate([(slope.T @ scaled + DECAY * weight).ravel(), d_bias])

    from scipy.optimize import minimize

    start = np.zeros((width + 1) * classes)
    with one_blas_thread():
        found = minimize(loss_and_gradient, start, jac=True, method="L-BFGS-B", options={"maxiter": MOST_STEPS}).x
    weight = found[:-classes].reshape(classes, width) / scale
    return weight.astype(np.float32), found[-classes:].astype(np.float32)

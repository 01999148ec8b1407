"""Rounding that makes up for itself, after GPTQ (Frantar et al. 2022, arXiv:2210.17323).

Weights are rounded one input at a time, and what the output loses by it is given to the inputs not rounded yet, as far
as these vary together on real pictures. So many weights that are rounded the wrong way, seen alone, add up to an output
that is nearer to float's than that of the nearest integers. Means are left out of account: the bias makes up for them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from megengine import Tensor
from megengine.module.qat import QATModule

from mgq.quant.estimators import Range
from mgq.quant.layerwise import Layer
from mgq.quant.patches import is_convolution, patches, sampled_positions
from mgq.quant.ranges import folded_weight

Array = npt.NDArray[np.float32]

VALUES = 1 << 25
"""Numbers at most in what a layer sees of the pictures."""
FEWEST, MOST = 512, 8192
"""Positions of a layer's output, at which its input is looked at."""
DAMPING = 0.01
"""Of the mean variance, added to each: the paper's."""
BLOCK = 128
LEVELS = 127


@dataclass
class CompensatedRounding:
    """Shown the layers of a network in turn, rounds their weights to the grid that their ranges give.

    ``weights``: the ranges of these grids by name; no others fit the weights from now on.
    """

    positions: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))
    weights: dict[str, Range] = field(default_factory=dict)

    def __call__(self, layer: Layer) -> None:
        module = layer.module
        if not is_convolution(module):
            return
        weight = folded_weight(module).numpy()
        step = float(module.weight_observer.get_qparams().scale.numpy())
        conv = module.conv if hasattr(module, "conv") else module
        seen = self.seen(layer, conv)
        groups = weight.reshape(conv.groups, -1, int(np.prod(weight.shape[-3:])))
        steps = groups / np.float32(step)
        rounded = compensated(steps, covariances(seen))
        # The largest weight gives the grid its range: it stays, or an observer would find another grid.
        largest = np.abs(steps).argmax()
        rounded.flat[largest] = np.clip(np.rint(steps.flat[largest]), -LEVELS, LEVELS)
        set_folded_weight(module, weight, (rounded * np.float32(step)).reshape(weight.shape))
        self.weights[layer.name] = -step * LEVELS, step * LEVELS

    def seen(self, layer: Layer, conv: Any) -> Array:
        """float32 (groups, positions, inputs): what each output is made of, at some positions on the pictures."""
        source = layer.fake_inputs[0].numpy()
        size = source.shape[1] * int(np.prod(conv.kernel_size))
        number = int(np.clip(VALUES // size, FEWEST, MOST))
        at = sampled_positions(tuple(layer.output._tuple_shape), self.positions, number)
        found = patches(source, conv.kernel_size, conv.stride, conv.padding, at)
        return found.reshape(found.shape[0], conv.groups, -1).transpose(1, 0, 2)


def covariances(seen: Array) -> npt.NDArray[np.float64]:
    """(groups, positions, inputs) -> (groups, inputs, inputs), damped so that they can be inverted."""
    centred = seen - seen.mean(axis=1, keepdims=True)
    found: npt.NDArray[np.float64] = (centred.transpose(0, 2, 1) @ centred / seen.shape[1]).astype(np.float64)
    diagonal = np.einsum("gii->gi", found)
    diagonal += DAMPING * diagonal.mean(axis=1, keepdims=True) + 1e-12
    return found


def compensated(weights: Array, covariance: npt.NDArray[np.float64]) -> Array:
    """``weights`` (groups, outputs, inputs), in steps, rounded to -127 to 127; the most varied input first."""
    groups, _, inputs = weights.shape
    order = np.argsort(-np.einsum("gii->gi", covariance), axis=1, kind="stable")
    result = np.empty_like(weights)
    for group in range(groups):
        chosen = order[group]
        inverse = np.linalg.inv(covariance[group][np.ix_(chosen, chosen)])
        upper = np.linalg.cholesky(inverse).T.astype(np.float32)
        left = weights[group][:, chosen]
        for start in range(0, inputs, BLOCK):
            end = min(start + BLOCK, inputs)
            errors = np.empty((len(left), end - start), np.float32)
            for i in range(start, end):
                value = np.clip(np.rint(left[:, i]), -LEVELS, LEVELS)
                errors[:, i - start] = (left[:, i] - value) / upper[i, i]
                left[:, i + 1 : end] -= np.outer(errors[:, i - start], upper[i, i + 1 : end])
                left[:, i] = value
            left[:, end:] -= errors @ upper[start:end, end:]
        result[group][:, chosen] = left
    return result


def set_folded_weight(module: QATModule, old: Array, new: Array) -> None:
    """Change the weights of ``module`` so that, with its batch norm folded in, they are ``new`` instead of ``old``."""
    parameter = module.conv.weight if hasattr(module, "conv") else module.weight
    own = parameter.numpy()
    # Where a weight is 0 the factor of its batch norm is told by another weight of the same output.
    rows = old.reshape(-1, int(np.prod(old.shape[-3:])))
    own_rows = own.reshape(rows.shape)
    largest = np.abs(own_rows).argmax(axis=1)[:, None]
    below = np.take_along_axis(own_rows, largest, 1)
    factor = np.divide(np.take_along_axis(rows, largest, 1), below, out=np.zeros_like(below), where=below != 0)
    changed = np.divide(new.reshape(rows.shape), factor, out=own_rows.copy(), where=factor != 0)
    parameter[...] = Tensor(changed.reshape(own.shape))

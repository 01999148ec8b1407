"""Checks that a network computes with finite numbers: the next ReLU may hide an overflow."""

from __future__ import annotations

import math

import megengine.module as M
import numpy as np
from megengine import Tensor

from mgq.zoo.layers import forward_hooks

_SIDE = 64
"""Pixels on a side of the noise image: the last layer sees two positions of it."""


def find_overflowing_layer(network: M.Module) -> str | None:
    """The first layer of ``network`` whose outputs are not finite for a picture of noise; None where all are."""
    found: list[str] = []
    names = {id(module): name for name, module in network.named_modules()}

    def look(module: M.Module, _: object, output: object) -> None:
        if not found and isinstance(output, Tensor) and not is_finite(output):
            found.append(names[id(module)])

    noise = np.random.default_rng(0).integers(-128, 128, (1, 3, _SIDE, _SIDE))
    with forward_hooks((module, look) for module in network.modules()):
        network(Tensor(noise.astype(np.float32)))
    return found[0] if found else None


def describe_not_finite(layer: str) -> str:
    return f"the layer {layer} gives numbers that are not finite for these pictures: take other weights"


def is_finite(values: Tensor) -> bool:
    array = values.numpy()
    return math.isfinite(float(array.min())) and math.isfinite(float(array.max()))

"""A network of three convolutions, always with the same weights."""

from __future__ import annotations

import megengine.functional as F
import megengine.module as M
import numpy as np
from megengine import Tensor

from mgq.zoo.layers import ConvBnRelu6
from tests.conftest import (
    smooth_images,
)


class Net(M.Module):  # type: ignore[misc]
    """Convolutions with ReLU, in groups with ReLU6, and without batch norm; a shortcut; a sum that never runs."""

    def __init__(self) -> None:
        super().__init__()
        self.quant = M.QuantStub()
        self.first = M.ConvBnRelu2d(3, 8, 3, 2, 1, bias=False)
        self.second = ConvBnRelu6(8, 8, 5, 2, 2, groups=4, bias=False)
        self.third = M.Conv2d(8, 8, 1)
        self.add = M.Elemwise("ADD")
        self.unused = M.Elemwise("ADD")
        self.dequant = M.DequantStub()
        self.fc = M.Linear(8, 3)
        self.fc.disable_quantize()

    def forward(self, x: Tensor) -> Tensor:
        second = self.second(self.first(self.quant(x)))
        return self.fc(F.mean(self.dequant(self.add(second, self.third(second))), (2, 3)))


def net() -> M.Module:
    """Always the same one, in evaluation state; a few of its weights are far from all others."""
    network = Net()
    rng = np.random.default_rng(0)
    for name, value in network.named_tensors():
        if not name.endswith("running_var"):
            value[...] = rng.normal(0, 0.3, value.shape).astype(np.float32)
    for layer in (network.first, network.second):
        layer.bn.weight[...] = rng.uniform(0.2, 2, layer.bn.weight.shape).astype(np.float32)
    network.first.bn.running_var[...] = np.full((1, 8, 1, 1), 900, np.float32)
    network.third.weight[0, 0] = np.full((1, 1), 1.5, np.float32)
    network.eval()
    return network


IMAGES = smooth_images(6, 32, 32)

"""A small network in each mode, as runtimes get it."""

from __future__ import annotations

from functools import cache

import megengine.module as M
from megengine import Tensor

from mgq.export.megengine.writer import fuse
from mgq.quantization.activation_ranges import apply_ranges
from mgq.quantization.modes import Mode, to_mode
from mgq.zoo.layers import ConvBnRelu6, global_average
from tests.conftest import filled, smooth_images
from tests.fakes.measured_ranges import measure_ranges

SIZE = 32


class Small(M.Module):  # type: ignore[misc]
    """The zoo's kinds of convolution: dense, depthwise, grouped, with ReLU, ReLU6 and none; and a residual sum."""

    def __init__(self) -> None:
        super().__init__()
        self.quant, self.dequant = M.QuantStub(), M.DequantStub()
        self.stem = M.ConvBnRelu2d(3, 12, 3, 2, 1, bias=False)
        self.depthwise = ConvBnRelu6(12, 12, 3, 1, 1, groups=12, bias=False)
        self.grouped = M.ConvBn2d(12, 12, 1, groups=3, bias=False)
        self.biased = M.ConvRelu2d(12, 12, 3, 1, 1)
        self.add = M.Elemwise("ADD")
        self.head = M.Linear(12, 7)
        self.head.disable_quantize()

    def forward(self, inp: Tensor) -> Tensor:
        x = self.stem(self.quant(inp))
        x = self.biased(self.add(x, self.grouped(self.depthwise(x))))
        return self.head(self.dequant(global_average(x)))


@cache
def small(mode: Mode) -> M.Module:
    network = Small()
    network.eval()
    filled(network)
    if mode is Mode.QUANTIZED:
        ranges = measure_ranges(network, [smooth_images(4, SIZE, SIZE)], "small", "none", {})
        network = to_mode(network, Mode.QAT)
        apply_ranges(network, ranges)
        network = to_mode(network, Mode.QUANTIZED)
    return network


def in_memory(mode: Mode) -> M.Module:
    """The network that a file of ``small(mode)`` has to equal."""
    return fuse(small(mode)) if mode is Mode.NORMAL else small(mode)

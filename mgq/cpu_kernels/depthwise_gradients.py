"""The gradient of depthwise convolutions on a CPU as a convolution of its own, several times as fast as MegEngine's.

MegEngine has fast kernels for depthwise convolutions, and none for what goes back through them. That is a depthwise
convolution, too: of the gradient, with the kernel turned round. Where outputs are more than one pixel apart, zeros
stand between them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import megengine.functional as F
import megengine.module.conv
import numpy as np
from megengine import Tensor
from megengine.autodiff import Function

from mgq.cpu_kernels.feature_maps import needs_gradient
from mgq.cpu_kernels.switch import Replacement, Stock, are_on_cpu, pair_of, replaced


class Places(NamedTuple):
    """Where a depthwise convolution looks: how far outputs are apart, and the zeros around its input, (height, width)
    each."""

    stride: tuple[int, int]
    padding: tuple[int, int]


@contextlib.contextmanager
def fast_depthwise_gradients() -> Iterator[None]:
    """Inside, gradients of what depthwise convolutions read are found faster, equal but for rounding.

    It serves float32 without dilation on CPUs, where no gradient of the weights is wanted.
    """
    with replaced(Replacement(megengine.module.conv, "conv2d", fast_conv2d)):
        yield


def fast_conv2d(stock: Stock) -> Stock:
    def conv2d(inp: Tensor, weight: Tensor, bias: Tensor | None, *options: Any) -> Tensor:
        stride, padding, dilation, _, mode, *_ = options  # as layers give them
        places = Places(pair_of(stride), pair_of(padding))
        if pair_of(dilation) != (1, 1) or mode != "cross_correlation" or not is_served(inp, weight, places):
            return stock(inp, weight, bias, *options)
        output = DepthwiseConvolution(stock, places)(inp, weight)
        return output if bias is None else output + bias

    return conv2d


def is_served(source: Tensor, weight: Tensor, places: Places) -> bool:
    """Whether a convolution of ``source`` by ``weight`` is depthwise, and its gradient wanted here."""
    shape = weight._tuple_shape
    is_depthwise = (
        len(shape) == 5
        and shape[1:3] == (1, 1)
        and all(around < size for around, size in zip(places.padding, shape[3:], strict=True))
    )
    return is_depthwise and needs_gradient(source) and not needs_gradient(weight) and are_on_cpu(source, weight)


class DepthwiseConvolution(Function):  # type: ignore[misc]
    """(source, weights) -> output of one depthwise convolution without bias, by ``convolve``, which has the signature
    of MegEngine's ``conv2d``."""

    def __init__(self, convolve: Stock, places: Places) -> None:
        super().__init__()
        self.convolve, self.places = convolve, places

    def forward(self, source: Tensor, weights: Tensor) -> Tensor:
        self.weights, self.size = weights, source._tuple_shape[2:]
        return self.convolve(source, weights, None, *self.places, 1, weights._tuple_shape[0])

    def backward(self, d_output: Tensor) -> tuple[Tensor, None]:
        weights = self.weights
        kernel = weights._tuple_shape[3:]
        spread = spread_out(d_output, self.places, self.size, kernel)
        padding = [size - 1 - around for size, around in zip(kernel, self.places.padding, strict=True)]
        turned = Tensor(np.ascontiguousarray(weights.numpy()[..., ::-1, ::-1]), device=weights.device)
        return self.convolve(spread, turned, None, 1, padding, 1, weights._tuple_shape[0]), None


def spread_out(d_output: Tensor, places: Places, size: tuple[int, ...], kernel: tuple[int, ...]) -> Tensor:
    """``d_output`` (N, C, H, W), with zeros between its pixels and behind them, so that the convolution with the
    ``kernel`` turned round gives the ``size`` of the input."""
    if places.stride == (1, 1):
        return d_output
    down, right = places.stride
    height, width = (
        whole + 2 * around - length + 1 for whole, around, length in zip(size, places.padding, kernel, strict=True)
    )
    spread = F.zeros((*d_output._tuple_shape[:2], height, width), device=d_output.device)
    spread[:, :, ::down, ::right] = d_output
    return spread

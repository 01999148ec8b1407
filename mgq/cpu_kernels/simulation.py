"""The simulation of int8 on a CPU, several times as fast: the same integers, to the bit.

MegEngine passes over memory once for each of the ten operations behind a convolution: bias, scale, activation, grid,
limits, rounding. Here one loop on all cores does it all (:func:`mgq.cpu_kernels.elementwise.requantize`).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from megengine import Tensor
from megengine.quantization import FakeQuantize

from mgq.cpu_kernels import elementwise
from mgq.cpu_kernels.elementwise import Requantization
from mgq.cpu_kernels.feature_maps import needs_gradient
from mgq.cpu_kernels.switch import Replacement, Stock, are_on_cpu, replaced
from mgq.cpu_kernels.tensor_exchange import own_values
from mgq.quantization.batch_norm_folding import activation_of
from mgq.quantization.exact_fake_quant import ExactConvBn2d, ExactConvBnRelu2d, ExactSums, counts_of
from mgq.quantization.half_to_even import EvenFakeQuantize, ends_of
from mgq.quantization.relu6 import QatConvBnRelu6
from mgq.quantization.targets import ChannelFakeQuantize

LARGE = 1 << 17
"""The fewest elements of a layer's input or output for which one pass is worth its overhead."""


@contextlib.contextmanager
def fast_simulation() -> Iterator[None]:
    """Inside, networks in mode ``qat`` that simulate int8 run faster, with the same bits.

    It serves convolutions with batch norm and sums in evaluation state, observers off, where no gradient is recorded.
    """
    with replaced(
        Replacement(ExactConvBn2d, "forward", fast_convolution),
        Replacement(ExactConvBnRelu2d, "forward", fast_convolution),
        Replacement(QatConvBnRelu6, "forward", fast_convolution),
        Replacement(EvenFakeQuantize, "fake_quant_forward", fast_rounding),
    ):
        yield


def fast_convolution(stock: Stock) -> Stock:
    def forward(self: Any, inp: Tensor) -> Tensor:
        if not is_served(self, inp):
            return stock(self, inp)
        weight, bias = self.fold()
        bias = self.apply_quant_bias(bias, inp, weight)
        if bias is None or bias.qparams.scale is None:
            return stock(self, inp)
        return convolve(self, inp, weight, bias)

    return forward


def is_served(layer: ExactSums, inp: Tensor) -> bool:
    """Whether ``layer`` counts in integers here, as :class:`ExactSums` does, and no gradient is wanted."""
    weights, activations = layer.weight_fake_quant, layer.act_fake_quant  # type: ignore[attr-defined]
    return (
        layer.counts
        and inp.qparams.scale is not None
        and type(weights) in (FakeQuantize, ChannelFakeQuantize)
        and type(activations) in (FakeQuantize, EvenFakeQuantize)
        and bool(weights.enabled and activations.enabled)
        and is_large(inp)
        and are_on_cpu(inp)
        and not needs_gradient(inp, layer.conv.weight, layer.bn.weight, layer.bn.bias)  # type: ignore[attr-defined]
    )


def is_large(tensor: Tensor) -> bool:
    return bool(math.prod(tensor._tuple_shape) >= LARGE)


def convolve(layer: Any, inp: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """What ``layer`` gives, with ``steps`` of it: see :func:`mgq.quantization.exact_fake_quant.convolve_integers`."""
    conv, factors = layer.conv, inp.qparams.scale * weight.qparams.scale
    *counts, offset = counts_of(inp, weight, bias)
    sums = conv.calc_conv(*counts, None)
    outputs = sums._tuple_shape[1]
    before = after = np.zeros(outputs, np.float32)
    if conv.groups == conv.in_channels:
        before = channel_values(offset, outputs)
    else:
        after = channel_values(offset * factors, outputs)
    activation = activation_of(layer)
    limits = np.float32(activation.low), np.float32(activation.high)
    work = Requantization(before, channel_values(factors, outputs), after, *limits)
    return put_on_grid(work, sums, layer.act_fake_quant, layer.act_observer.get_qparams())


def channel_values(tensor: Tensor, channels: int) -> Any:
    """``tensor``, one number or one for each of the ``channels``, as float32 (channels,)."""
    return np.broadcast_to(np.ravel(tensor.numpy()), channels).astype(np.float32)


def fast_rounding(stock: Stock) -> Stock:
    def fake_quant_forward(self: EvenFakeQuantize, inp: Tensor, qparams: Any = None) -> Tensor:
        served = not self.training and qparams is not None and inp.ndim == 4 and is_large(inp) and are_on_cpu(inp)
        if not served or needs_gradient(inp):
            return stock(self, inp, qparams)
        return put_on_grid(Requantization.of_values(inp._tuple_shape[1]), inp + 0, self, qparams)

    return fake_quant_forward


def put_on_grid(work: Requantization, steps: Tensor, quantizer: Any, qparams: Any) -> Tensor:
    """What ``work`` makes of ``steps``, float32 (N, C, H, W), on the grid of ``qparams``. ``steps``, which nobody else
    holds, become how many of its scale that is: another array would have to be found and copied."""
    scale = np.float32(qparams.scale.numpy().item())
    qmin, qmax = ends_of(quantizer.dtype, float(scale))
    levels = np.float32(qmin), np.float32(qmax)
    elementwise.requantize(own_values(steps), work, scale, *levels, isinstance(quantizer, EvenFakeQuantize))
    result = steps * qparams.scale
    result.steps = steps
    result.qparams.update(qparams)
    return result

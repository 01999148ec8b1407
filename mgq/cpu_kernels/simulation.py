"""The simulation of int8 on a CPU, several times as fast: the same integers, to the bit.

MegEngine passes over memory once for each of the ten operations behind a convolution: bias, scale, activation, grid,
limits, rounding. Here one loop on all cores does it all (:func:`mgq.cpu_kernels.elementwise.requantize`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from megengine import Tensor
from megengine.quantization import FakeQuantize

from mgq.cpu_kernels import elementwise
from mgq.cpu_kernels.elementwise import Requantization
from mgq.cpu_kernels.feature_maps import needs_gradient
from mgq.cpu_kernels.numba_loops import ALMOST_HALF
from mgq.cpu_kernels.switch import Replacement, Stock, are_on_cpu, replaced
from mgq.cpu_kernels.tensor_exchange import Array, own_values
from mgq.quantization.batch_norm_folding import activation_of
from mgq.quantization.exact_fake_quant import ExactConvBn2d, ExactConvBnRelu2d, ExactSums, counts_of, integers
from mgq.quantization.half_to_even import EvenFakeQuantize, bias_steps, ends_of
from mgq.quantization.relu6 import QatConvBnRelu6
from mgq.quantization.targets import ChannelFakeQuantize


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
        folded = fold_with_fixed_scales(self, inp) if has_fixed_scales(self) else fold(self, inp)
        return stock(self, inp) if folded is None else convolve(self, inp, folded)

    return forward


class FoldedWeights(NamedTuple):
    """The integers of a convolution with its batch norm: ``weight`` as the convolution takes it, and ``offset``, of the
    bias, (C,). ``factors``, (C,), are the scales of its sums. All float32."""

    weight: Tensor
    offset: Array
    factors: Array


def has_fixed_scales(layer: Any) -> bool:
    quantizer = layer.weight_fake_quant
    return isinstance(quantizer, ChannelFakeQuantize) and quantizer.scales is not None


def fold_with_fixed_scales(layer: Any, inp: Tensor) -> FoldedWeights:
    """What :func:`fold` gives, to the bit, in numpy: the small operations that MegEngine begins for it take longer than
    the convolution of an image."""
    conv, bn, quantizer = layer.conv, layer.bn, layer.weight_fake_quant
    weight = conv.weight.numpy()
    gamma, beta, mean, variance = (
        each.numpy().ravel() for each in (bn.weight, bn.bias, bn.running_mean, bn.running_var)
    )
    inverse = np.float32(1) / np.sqrt(variance + np.float32(bn.eps))
    scales = np.ravel(quantizer.scales.numpy())
    rows = weight.reshape(scales.size, -1) * (gamma * inverse)[:, None] / scales[:, None]
    steps = np.clip(np.trunc(rows + np.copysign(ALMOST_HALF, rows)), quantizer.qmin, quantizer.qmax)
    own = np.float32(0) if conv.bias is None else conv.bias.numpy().ravel()
    bias, factors = beta + gamma * (own - mean) * inverse, np.float32(inp.qparams.scale.numpy().item()) * scales
    quotient = bias / factors
    offset = quotient + (bias_steps(bias, factors).astype(np.float32) - quotient)
    return FoldedWeights(Tensor(steps.astype(np.float32).reshape(weight.shape), device=inp.device), offset, factors)


def fold(layer: Any, inp: Tensor) -> FoldedWeights | None:
    """The integers of the convolution ``layer`` for an input like ``inp``; None where it has no bias on a grid."""
    weight, bias = layer.fold()
    bias = layer.apply_quant_bias(bias, inp, weight)
    if bias is None or bias.qparams.scale is None:
        return None
    _, steps, offset = counts_of(inp, weight, bias)
    outputs = layer.conv.out_channels
    factors = channel_values(inp.qparams.scale * weight.qparams.scale, outputs)
    return FoldedWeights(steps, channel_values(offset, outputs), factors)


def is_served(layer: ExactSums, inp: Tensor) -> bool:
    """Whether ``layer`` counts in integers here, as :class:`ExactSums` does, and no gradient is wanted."""
    weights, activations = layer.weight_fake_quant, layer.act_fake_quant  # type: ignore[attr-defined]
    return (
        layer.counts
        and inp.qparams.scale is not None
        and type(weights) in (FakeQuantize, ChannelFakeQuantize)
        and type(activations) in (FakeQuantize, EvenFakeQuantize)
        and bool(weights.enabled and activations.enabled)
        and are_on_cpu(inp)
        and not needs_gradient(inp, layer.conv.weight, layer.bn.weight, layer.bn.bias)  # type: ignore[attr-defined]
    )


def convolve(layer: Any, inp: Tensor, folded: FoldedWeights) -> Tensor:
    """What ``layer`` gives, with ``steps`` of it: see :func:`mgq.quantization.exact_fake_quant.convolve_integers`."""
    conv = layer.conv
    sums = conv.calc_conv(integers(inp, inp.qparams.scale), folded.weight, None)
    before = after = np.zeros_like(folded.offset)
    if conv.groups == conv.in_channels:
        before = folded.offset
    else:
        after = folded.offset * folded.factors
    activation = activation_of(layer)
    limits = np.float32(activation.low), np.float32(activation.high)
    work = Requantization(before, folded.factors, after, *limits)
    return put_on_grid(work, sums, layer.act_fake_quant, layer.act_observer.get_qparams())


def channel_values(tensor: Tensor, channels: int) -> Any:
    """``tensor``, one number or one for each of the ``channels``, as float32 (channels,)."""
    return np.broadcast_to(np.ravel(tensor.numpy()), channels).astype(np.float32)


def fast_rounding(stock: Stock) -> Stock:
    def fake_quant_forward(self: EvenFakeQuantize, inp: Tensor, qparams: Any = None) -> Tensor:
        served = not self.training and qparams is not None and inp.ndim == 4 and are_on_cpu(inp)
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

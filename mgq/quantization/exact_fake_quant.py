"""Exact fake quantization: the same answers as real int8, to the bit.

Fake-quantized values are integers times a scale, rounded to float32 each, and so are their products and sums: now and
then a sum falls on the other side of a rounding threshold than with integers. One such step becomes many in later
layers; 1 answer in 100 was then another. In evaluation state these convolutions sum the integers themselves, which
float32 represents exactly up to 2**24, and scale the sum as the int8 kernels do. Halves are rounded as by the target's
kernels: away from zero in MegEngine, to even in those of ONNX (:mod:`mgq.quantization.half_to_even`).
"""

from __future__ import annotations

import megengine.functional as F
import megengine.module as M
import megengine.module.qat as Q
import megengine.module.quantized as QD
from megengine import Tensor
from megengine.core._imperative_rt.core2 import apply
from megengine.core.ops.builtin import FakeQuant
from megengine.module.qat import QATModule
from megengine.quantization import FakeQuantize
from megengine.quantization.observer import MinMaxObserver
from megengine.quantization.utils import QuantMode, create_qparams

from mgq.quantization.floors import floor_of
from mgq.quantization.half_to_even import INT32, bias_in_steps
from mgq.quantization.targets import ChannelFakeQuantize


class FlooredOutput:
    """A mixin for fake-quantized layers: observers of grids that begin at a floor see the span above it
    (:mod:`mgq.quantization.floors`)."""

    def apply_quant_activation(self, target: Tensor) -> Tensor:
        observer = self.act_observer  # type: ignore[attr-defined]
        if isinstance(observer, MinMaxObserver) and observer.enabled and floor_of(observer.dtype) is not None:
            return observe_above_floor(self, target)
        return super().apply_quant_activation(target)  # type: ignore[misc]


class EvenBias:
    """A mixin for fake-quantized layers with weights: for ONNX targets, the bias is rounded as in the file."""

    def apply_quant_bias(self, target: Tensor | None, inp: Tensor, w_qat: Tensor) -> Tensor | None:
        quantizers = self.weight_fake_quant, self.act_fake_quant  # type: ignore[attr-defined]
        is_even = isinstance(quantizers[0], ChannelFakeQuantize) and not self.training  # type: ignore[attr-defined]
        at_work = all(quantizer is None or quantizer.enabled for quantizer in quantizers)
        if target is None or not is_even or not at_work or inp.qparams.scale is None:
            return super().apply_quant_bias(target, inp, w_qat)  # type: ignore[misc]
        scales = inp.qparams.scale * w_qat.qparams.scale
        steps = bias_in_steps(target, scales)
        even = steps * scales
        even.qparams.update(create_qparams(QuantMode.SYMMERTIC, "qint32", scale=scales))
        even.steps = steps
        return even


class ExactLinear(EvenBias, Q.Linear):  # type: ignore[misc]
    """Fake-quantized classifier that sums integers, as convolutions do."""

    def forward(self, inp: Tensor) -> Tensor:
        quantizer = self.weight_fake_quant
        if self.training or inp.qparams.scale is None or not isinstance(quantizer, ChannelFakeQuantize):
            return super().forward(inp)
        if not quantizer.enabled:
            return super().forward(inp)
        weight = self.apply_quant_weight(self.weight)
        bias = self.apply_quant_bias(self.bias, inp, weight)
        scales = weight.qparams.scale
        steps = integers(weight, scales.reshape(-1, 1))
        sums = F.linear(integers(inp, inp.qparams.scale), steps, None)
        return (sums if bias is None else sums + integers(bias, bias.qparams.scale)) * (inp.qparams.scale * scales)


class ExactSums(EvenBias, FlooredOutput):
    """A mixin for fake-quantized convolutions with batch norm; it stands before MegEngine's class among the bases."""

    def calc_conv_bn_qat(self, inp: Tensor, approx: bool = True) -> Tensor:
        """Float32 (N, C, H, W), before the activation; in training state, or with a grid unknown, as MegEngine's."""
        if self.counts and inp.qparams.scale is not None:
            weight, bias = self.fold()
            bias = self.apply_quant_bias(bias, inp, weight)
            if bias is not None and bias.qparams.scale is not None:
                return convolve_integers(self.conv, inp, weight, bias)  # type: ignore[attr-defined]
        return super().calc_conv_bn_qat(inp, approx)  # type: ignore[misc]

    def fold(self) -> tuple[Tensor, Tensor]:
        """Fake-quantized weight, which may know its ``steps``, and bias, with the batch norm folded in."""
        bn, quantizer = self.bn, self.weight_fake_quant  # type: ignore[attr-defined]
        if type(quantizer) not in (FakeQuantize, ChannelFakeQuantize) or not quantizer.enabled:
            return self.fold_weight_bias(bn.running_mean, bn.running_var)  # type: ignore[attr-defined,no-any-return]
        # The integers are used directly: converting them to values and back takes three times as long.
        quantizer.disable()
        weight, bias = self.fold_weight_bias(bn.running_mean, bn.running_var)  # type: ignore[attr-defined]
        quantizer.enable()
        scales = weight.qparams.scale
        if isinstance(quantizer, ChannelFakeQuantize):
            scales = quantizer.scales_of(weight)
            weight.qparams.update(quantizer.get_qparams())
        weight.steps = round_half_away(weight / scales, quantizer.qmin, quantizer.qmax)
        return weight, bias

    @property
    def counts(self) -> bool:
        """Whether the layer simulates int8: in evaluation state, with observers off."""
        return not self.training and not self.act_observer.enabled  # type: ignore[attr-defined]

    def apply_quant_activation(self, target: Tensor) -> Tensor:
        """``target`` on the output's grid, rounded as int8 kernels round it: times the inverse of its scale."""
        quantizer, observer = self.act_fake_quant, self.act_observer  # type: ignore[attr-defined]
        if not self.counts or type(quantizer) is not FakeQuantize or not quantizer.enabled:
            return super().apply_quant_activation(target)
        qparams = observer.get_qparams()
        steps = round_half_away(target * (1 / qparams.scale), quantizer.qmin, quantizer.qmax)
        result = steps * qparams.scale
        result.qparams.update(qparams)
        result.steps = steps
        return result


def observe_above_floor(layer: QATModule, target: Tensor) -> Tensor:
    """``target`` on the grid of ``layer``, whose observer sees the span above the floor of that grid."""
    observer, floor = layer.act_observer, floor_of(layer.act_observer.dtype)
    assert floor is not None
    seen = target.detach()
    limit = F.maximum(seen.max(), F.minimum(-seen.min(), -floor))
    observer(F.stack([limit - limit, limit + F.minimum(limit, -floor)]))
    observer.disable()
    result = layer.apply_quant_activation(target)
    observer.enable()
    return result


class ExactConvBn2d(ExactSums, Q.ConvBn2d):  # type: ignore[misc]
    """Fake-quantized convolution and batch norm."""


class ExactConvBnRelu2d(ExactSums, Q.ConvBnRelu2d):  # type: ignore[misc]
    """Fake-quantized convolution, batch norm and ReLU."""


FLOAT_TO_QAT = {M.ConvBn2d: ExactConvBn2d, M.ConvBnRelu2d: ExactConvBnRelu2d, M.Linear: ExactLinear}
QAT_TO_QUANTIZED = {ExactConvBn2d: QD.ConvBn2d, ExactConvBnRelu2d: QD.ConvBnRelu2d, ExactLinear: QD.Linear}


def convolve_integers(conv: M.Conv2d, source: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The convolution of three fake-quantized tensors whose ``qparams`` have scales, float32 (N, C, H, W)."""
    step = source.qparams.scale * weight.qparams.scale
    *counts, offset = counts_of(source, weight, bias)
    if conv.groups == conv.in_channels:  # MegEngine's depthwise kernels start from the bias
        return conv.calc_conv(*counts, offset) * step
    return conv.calc_conv(*counts, None) * step + offset * step  # others scale sum and bias one by one


def counts_of(source: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The integers of a convolution's three fake-quantized tensors, float32."""
    scales = weight.qparams.scale
    if scales.size > 1:  # one an output, in the shape of the bias
        scales = scales.reshape(*weight._tuple_shape[: weight.ndim - 3], 1, 1, 1)
    return integers(source, source.qparams.scale), integers(weight, scales), integers(bias, bias.qparams.scale)


def integers(values: Tensor, scales: Tensor) -> Tensor:
    """How many steps ``values`` are: float32, with the gradient of a division."""
    known: Tensor | None = getattr(values, "steps", None)
    return round_half_away(values / scales) if known is None else known


def round_half_away(values: Tensor, qmin: int = int(INT32.min), qmax: int = int(INT32.max)) -> Tensor:
    """``values`` rounded to integers, halves away from zero; with the gradient of fake quantization."""
    one, zero = Tensor([1.0], device=values.device), Tensor([0.0], device=values.device)
    return apply(FakeQuant(qmin=qmin, qmax=qmax), values, one, zero)[0]

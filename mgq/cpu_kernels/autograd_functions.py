"""MegEngine operators with fast CPU kernels: the stock ones' results and gradients, up to float32 rounding."""

from __future__ import annotations

from typing import Any

import megengine.module.qat as Q
import numpy as np
from megengine import Tensor
from megengine.autodiff import Function
from megengine.core._imperative_rt.core2 import apply
from megengine.core.ops.builtin import Elemwise
from megengine.quantization.utils import QParams, fake_quant_bias

from mgq.cpu_kernels import onednn_kernels
from mgq.cpu_kernels.batch_norm import Limits, NormalizedMap
from mgq.cpu_kernels.elementwise import apply_mask, clamp_below, extremes, extremes_of_rows, fold_factors, mask_rows
from mgq.cpu_kernels.fake_quantization import UNKNOWN, Quantizer, update_observer
from mgq.cpu_kernels.feature_maps import FeatureMap, MapFunction
from mgq.cpu_kernels.onednn_kernels import Geometry, Norm
from mgq.cpu_kernels.statistics_exchange import exchange_of_batch_norm
from mgq.cpu_kernels.tensor_exchange import Array, read, read_state, tensors, values

CHANNELS_OF_ONEDNN = 16
"""oneDNN's batch norm is fast where this divides the channels."""


class Convolution(Function):  # type: ignore[misc]
    """(source, weights) -> output of one convolution without bias."""

    def __init__(self, geometry: Geometry, wants_source: bool) -> None:
        super().__init__()
        self.geometry = geometry
        self.wants_source = wants_source

    def forward(self, source: Tensor, weights: Tensor) -> Tensor:
        self.saved = source, weights
        return Tensor(onednn_kernels.convolution(self.geometry, *values(source, weights)), device=source.device)

    def backward(self, d_output: Tensor) -> list[Tensor | None]:
        source, weights, gradient = values(*self.saved, d_output)
        del self.saved
        gradients = onednn_kernels.convolution_gradients(self.geometry, source, weights, gradient, self.wants_source)
        return tensors(gradients, d_output.device)


class NormalizedConvolution(MapFunction):
    """(source, weights, scale, shift) -> output of a convolution, batch norm and maybe ReLU.

    With a ``ceiling`` the output is held at or below it. ``mean`` and ``variance`` (biased) of each channel, float32
    (C,), are those to use where ``norm`` is fixed, else those found once it was called. Where ``geometry`` has channels
    last, source and output are feature maps, see :meth:`apply_to_maps`.
    """

    def __init__(
        self,
        geometry: Geometry,
        norm: Norm,
        ceiling: float | None,
        wants_source: bool,
        mean: Array,
        variance: Array,
    ) -> None:
        super().__init__()
        self.mean, self.variance = mean, variance
        self.geometry = geometry
        self.norm = norm
        self.ceiling = ceiling
        self.wants_source = wants_source
        self.exchange = None if norm.fixed else exchange_of_batch_norm()

    @property
    def elements(self) -> int:
        """Of a channel, in the batches of all processes that share their statistics."""
        return self.geometry.elements if self.exchange is None else self.normalized.elements

    def apply_to_maps(self, *inputs: Tensor | FeatureMap) -> FeatureMap:
        source, *_ = inputs
        assert isinstance(source, FeatureMap)
        self.source, self.to = source.array, source.gradient
        return super().apply_to_maps(*inputs)

    def forward(self, source: Tensor, weights: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        if self.geometry.channels_last:
            return self.forward_mapped(source.device, *read(weights, scale, shift))
        output = self.compute(*values(source, weights, scale, shift))
        self.saved = source, weights, scale
        return Tensor(output, device=source.device)

    def forward_mapped(self, device: Any, weights: Array, scale: Array, shift: Array) -> Tensor:
        output = self.compute(self.source, weights, scale, shift)
        self.read = self.source, weights, scale
        del self.source
        return self.emit(output, device)

    def backward_mapped(self, token: Tensor) -> list[Tensor | None]:
        d_source, *gradients = self.gradients(*self.read, self.gradient.take())
        del self.read
        self.to.add(d_source)
        return [token if self.wants_source else None, *tensors(gradients, token.device)]

    def compute(self, source: Array, weights: Array, scale: Array, shift: Array) -> Array:
        if self.has_own_norm:
            return self.normalize_map(source, weights, scale, shift, observed=False).output()
        return self.normalize(source, weights, scale, shift)

    @property
    def has_own_norm(self) -> bool:
        """Whether the batch norm is mgq's own: oneDNN's would turn the array into blocks of channels, or is slower, or
        cannot share its statistics."""
        fast = self.exchange is None and self.geometry.output[1] % CHANNELS_OF_ONEDNN == 0
        return self.geometry.channels_last and not fast

    def normalize_map(self, source: Array, weights: Array, scale: Array, shift: Array, observed: bool) -> NormalizedMap:
        convolved = onednn_kernels.convolution(self.geometry, source, weights)
        limits, fixed = Limits.of(self.norm.relu, self.ceiling), self.norm.fixed
        statistics = self.mean, self.variance
        self.normalized = NormalizedMap(
            *(convolved, scale, shift, self.norm.epsilon, limits, *statistics),
            fixed=fixed,
            observed=observed,
            exchange=self.exchange,
        )
        return self.normalized

    def normalize(self, source: Array, weights: Array, scale: Array, shift: Array) -> Array:
        output, self.statistics = onednn_kernels.convolve_normalized(
            self.geometry, self.norm, source, weights, scale, shift, self.mean, self.variance
        )
        self.passes = None if self.ceiling is None else clamp_below(output, self.ceiling)
        return output

    def backward(self, d_output: Tensor) -> list[Tensor | None]:
        if self.geometry.channels_last:
            return self.backward_mapped(d_output)
        arrays = values(*self.saved, d_output)
        del self.saved
        return tensors(self.gradients(*arrays), d_output.device)

    def gradients(
        self, source: Array, weights: Array, scale: Array, d_output: Array
    ) -> tuple[Array | None, Array, Array, Array]:
        return self.compute_gradients(source, weights, scale, d_output)

    def compute_gradients(
        self, source: Array, weights: Array, scale: Array, d_output: Array
    ) -> tuple[Array | None, Array, Array, Array]:
        if self.has_own_norm:
            return self.compute_map_gradients(source, weights, scale, d_output)
        if self.passes is not None:
            d_output = apply_mask(d_output, self.passes)
        statistics = self.statistics
        del self.statistics, self.passes
        return onednn_kernels.compute_normalized_gradients(
            self.geometry, self.norm, source, weights, scale, statistics, d_output, self.wants_source
        )

    def compute_map_gradients(
        self, source: Array, weights: Array, scale: Array, d_output: Array
    ) -> tuple[Array | None, Array, Array, Array]:
        d_convolved, d_scale, d_shift = self.normalized.gradients(d_output)
        del self.normalized
        d_source, d_weights = onednn_kernels.convolution_gradients(
            self.geometry, source, weights, d_convolved, self.wants_source
        )
        return d_source, d_weights, d_scale.reshape(scale.shape), d_shift.reshape(scale.shape)


class FakeQuantizedConvolution(NormalizedConvolution):
    """The same in quantization-aware training of ``module``: weights and output are fake-quantized, and its observers
    updated.

    MegEngine quantizes the weights with batch norm folded in, and divides the convolution by the factor again
    (arXiv:1806.08342, section 3.2.2). Dividing the weights gives the same and is less work. ``qparams`` of the output
    are there once it was called.
    """

    def __init__(self, module: Q.QATModule, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.module = module

    def compute(self, source: Array, weights: Array, scale: Array, shift: Array) -> Array:
        used = self.prepare(weights, scale, shift)
        if self.has_own_norm:
            normalized = self.normalize_map(source, *used, observed=bool(self.module.act_observer.enabled))
            self.qparams = update_observer(self.module.act_observer, normalized.extremes)
            return normalized.output(self.qparams.quantizer)
        output = self.normalize(source, *used)
        self.qparams = update_observer(self.module.act_observer, lambda: extremes(output))
        passes = self.qparams.quantizer.apply_in_place(output)
        if passes is not None:
            self.passes = passes if self.passes is None else self.passes & passes
        return output

    @property
    def has_own_norm(self) -> bool:
        """It rounds in the same pass."""
        return self.geometry.channels_last

    def prepare(self, weights: Array, scale: Array, shift: Array) -> tuple[Array, Array, Array]:
        """Weights, scale and shift to compute with."""
        bn = self.module.bn
        (variance,) = read_state(bn.running_var)
        self.inverse, self.factor = fold_factors(scale, variance, bn.eps)
        self.quantize_weights(weights, divide=True)
        return self.effective, scale, shift

    def quantize_weights(self, weights: Array, divide: bool) -> QParams:
        """Find the ``effective`` weights: those with batch norm folded in, quantized, and maybe unfolded again."""
        observer = self.module.weight_observer
        ends = extremes_of_rows(weights, self.factor) if observer.enabled else UNKNOWN
        qparams = update_observer(observer, lambda: ends)
        self.effective, self.weights_pass = qparams.quantizer.apply_to_rows(weights, self.factor, divide, ends)
        return qparams

    def gradients(
        self, source: Array, weights: Array, scale: Array, d_output: Array
    ) -> tuple[Array | None, Array, Array, Array]:
        d_source, d_effective, d_scale, d_shift = self.compute_gradients(source, self.effective, scale, d_output)
        # With q = d_effective / factor: d_factor is the sum of passed q times weights less q times effective weights.
        d_factor = mask_rows(d_effective, self.weights_pass, weights, effective=self.effective)
        d_factor /= self.factor
        d_scale += d_factor.reshape(d_scale.shape) * self.inverse
        del self.effective, self.weights_pass
        return d_source, d_effective, d_scale, d_shift


class FoldedConvolution(FakeQuantizedConvolution):
    """The same with the batch norm of ``module`` folded into weights and bias, as they are once it is in eval mode.

    The bias is rounded to multiples of the scales of input and weights (``source_qparams``), as int8 has it.
    """

    def __init__(self, module: Q.QATModule, source_qparams: QParams | None, *arguments: Any) -> None:
        super().__init__(module, *arguments)
        self.source_qparams = source_qparams
        channels = self.geometry.output[1]
        # What is left of batch norm: no mean, a factor of 1 / sqrt(variance + epsilon) = 1, and a bias.
        self.ones = np.ones(channels, np.float32)
        self.running_mean, self.mean = self.mean, np.zeros(channels, np.float32)
        self.running_variance, self.variance = self.variance, self.ones - np.float32(self.norm.epsilon)

    def prepare(self, weights: Array, scale: Array, shift: Array) -> tuple[Array, Array, Array]:
        self.inverse, self.factor = fold_factors(scale, self.running_variance, self.norm.epsilon)
        qparams = self.quantize_weights(weights, divide=False)
        self.centre = self.running_mean.reshape(scale.shape) * self.inverse
        bias = self.quantize_bias(shift - scale * self.centre, qparams)
        return self.effective, self.ones, bias

    def quantize_bias(self, bias: Array, weight_qparams: QParams) -> Array:
        device = self.module.conv.weight.device
        source, weights = Tensor(0.0, device=device), Tensor(0.0, device=device)
        if self.source_qparams is None:
            return bias
        source.qparams.update(self.source_qparams)
        weights.qparams.update(weight_qparams)
        rounded: Array = fake_quant_bias(Tensor(bias, device=device), source, weights).numpy()
        return rounded

    def gradients(
        self, source: Array, weights: Array, scale: Array, d_output: Array
    ) -> tuple[Array | None, Array, Array, Array]:
        d_source, d_quantized, _, d_bias = self.compute_gradients(source, self.effective, self.ones, d_output)
        d_bias = d_bias.reshape(scale.shape)
        d_factor = mask_rows(d_quantized, self.weights_pass, weights, factors=self.factor)
        d_scale = d_factor.reshape(scale.shape) * self.inverse - d_bias * self.centre
        del self.effective, self.weights_pass
        return d_source, d_quantized, d_scale, d_bias


class AddRelu(Function):  # type: ignore[misc]
    """max(a + b, 0). MegEngine's own gradient of ReLU branches on every element."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        (self.output,) = apply(Elemwise(mode="FUSE_ADD_RELU"), a, b)
        return self.output

    def backward(self, d_output: Tensor) -> tuple[Tensor, Tensor]:
        # RELU6_GRAD is vectorized: it passes the gradient where 0 < output < 6, so the output is first held below 1.
        (held,) = apply(Elemwise(mode="MIN"), self.output, Tensor(1.0, device=d_output.device))
        (gradient,) = apply(Elemwise(mode="RELU6_GRAD"), held, d_output)
        del self.output
        return gradient, gradient


class FakeQuantization(Function):  # type: ignore[misc]
    """(x,) -> x, fake-quantized by ``quantizer``. The gradient passes where nothing was clipped, and is 0 elsewhere."""

    def __init__(self, quantizer: Quantizer, array: Array) -> None:
        super().__init__()
        self.quantizer, self.array = quantizer, array

    def forward(self, x: Tensor) -> Tensor:
        output, self.passes = self.quantizer.apply(self.array)
        del self.array
        return Tensor(output, device=x.device)

    def backward(self, d_output: Tensor) -> Tensor:
        if self.passes is None:
            return d_output
        (gradient,) = values(d_output)
        return Tensor(apply_mask(gradient, self.passes), device=d_output.device)

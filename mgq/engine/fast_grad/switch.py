"""Which functions of MegEngine the fast ones stand for, and when."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import megengine.functional as F
import megengine.module as M
import megengine.module.conv
import megengine.module.elemwise
import megengine.module.qat as Q
import megengine.quantization.fake_quant
import numpy as np
from megengine import Tensor, amp
from megengine.core._imperative_rt.core2 import is_tracing_module
from megengine.jit.tracing import is_tracing
from megengine.quantization.observer import ExponentialMovingAverageObserver, MinMaxObserver
from megengine.quantization.utils import QParams, QuantMode, create_qparams

from mgq.engine.fast_grad import onednn
from mgq.engine.fast_grad.functions import (
    AddRelu,
    Convolution,
    FakeQuantization,
    NormalizedConvolution,
    needs_gradient,
    values,
)
from mgq.engine.fast_grad.kernels import Geometry, Norm, geometry
from mgq.quant.relu6 import QatConvBnRelu6
from mgq.zoo.layers import ConvBnRelu6

ONE = np.float32(1)

Stock = Callable[..., Any]


class Replacement(NamedTuple):
    """``owner.name``, and how its fast version is made of the stock one, which it calls where it cannot serve."""

    owner: Any
    name: str
    fast: Callable[[Stock], Stock]


# What is replaced now, with what stood there.
_replaced: list[tuple[Any, str, Stock]] = []


def enable_fast_gradients(stock_forward: bool = False) -> None:
    """Train fast on CPUs from here on; see :func:`fast_gradients`. Does nothing when that is so already."""
    if _replaced:
        return
    onednn.library()
    for owner, name, fast in replacements(stock_forward):
        stock = getattr(owner, name)
        _replaced.append((owner, name, stock))
        setattr(owner, name, fast(stock))


def disable_fast_gradients() -> None:
    """Train as MegEngine does by itself from here on."""
    while _replaced:
        setattr(*_replaced.pop())


def fast_gradients_enabled() -> bool:
    return bool(_replaced)


@contextlib.contextmanager
def fast_gradients(stock_forward: bool = False) -> Iterator[None]:
    """Within it, training steps on a CPU are fast: results and gradients are MegEngine's up to float32 rounding.

    It serves the modules Conv2d, ConvBn2d, ConvBnRelu2d and the zoo's ConvBnRelu6, in float and fake-quantized, and
    ``FUSE_ADD_RELU``, MinMaxObserver, ExponentialMovingAverageObserver and FakeQuantize. Left as they are: GPUs, traced
    and float16 code, convolutions whose gradient nobody wants, and those with dilation.

    With ``stock_forward`` what the network answers is MegEngine's to the bit, and only the gradients are fast: several
    times slower than without. Gradients cannot be differentiated again. Raises FailureError where oneDNN is missing.
    """
    before = fast_gradients_enabled()
    enable_fast_gradients(stock_forward)
    try:
        yield
    finally:
        if not before:
            disable_fast_gradients()


def replacements(stock_forward: bool) -> Iterator[Replacement]:
    yield Replacement(megengine.module.conv, "conv2d", lambda stock: fast_conv2d(stock, stock_forward))
    yield Replacement(megengine.module.elemwise, "_elwise", fast_elemwise)
    yield Replacement(megengine.quantization.fake_quant, "fake_quant_tensor", fast_fake_quant)
    yield Replacement(MinMaxObserver, "forward", fast_min_max)
    yield Replacement(ExponentialMovingAverageObserver, "forward", fast_moving_average)
    yield Replacement(MinMaxObserver, "_calculate_qparams", fast_qparams)
    if stock_forward:
        return
    for module, relu, activation in (
        (M.ConvBn2d, False, None),
        (M.ConvBnRelu2d, True, None),
        (ConvBnRelu6, False, F.relu6),
    ):
        yield Replacement(module, "forward", fast_conv_bn(relu, activation))
    for module, relu, activation in (
        (Q.ConvBn2d, False, None),
        (Q.ConvBnRelu2d, True, None),
        (QatConvBnRelu6, False, F.relu6),
    ):
        yield Replacement(module, "forward", fast_qat_conv_bn(relu, activation))


def on_cpu(*tensors: Tensor) -> bool:
    """Whether ``tensors`` are float32 in CPU memory and are being computed with, not traced."""
    if is_tracing() or is_tracing_module() or amp.enabled:
        return False
    return all(
        t.dtype == np.float32 and t.device.physical_locator[0] == "cpu" and t.format in ("default", "nchw")
        for t in tensors
    )


def geometry_of(source: Tensor, weights: Tensor, stride: Any, padding: Any) -> Geometry | None:
    """The convolution of these as oneDNN takes it; None for one that yields nothing."""
    if source.ndim != 4:
        return None
    found = geometry(source._tuple_shape, weights._tuple_shape, pair_of(stride), pair_of(padding))
    return found if min((*found.source, *found.output)) > 0 else None


def pair_of(value: Any) -> tuple[int, int]:
    height, width = value if isinstance(value, (tuple, list)) else (value, value)
    return int(height), int(width)


def fast_conv2d(stock: Stock, stock_forward: bool) -> Stock:
    def conv2d(
        inp: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
        conv_mode: Any = "cross_correlation",
        compute_mode: Any = "default",
    ) -> Tensor:
        options = (stride, padding, dilation, groups, conv_mode, compute_mode)
        found = None
        if (
            needs_gradient(inp, weight)
            and on_cpu(inp, weight)
            and pair_of(dilation) == (1, 1)
            and str(conv_mode).lower() == "cross_correlation"
            and compute_mode == "default"
        ):
            found = geometry_of(inp, weight, stride, padding)
        if found is None:
            return stock(inp, weight, bias, *options)
        forward = (lambda x, w: stock(x, w, None, *options)) if stock_forward else None
        output = Convolution(found, needs_gradient(inp), forward)(inp, weight)
        return output if bias is None else output + bias

    return conv2d


def fast_conv_bn(relu: bool, activation: Stock | None) -> Callable[[Stock], Stock]:
    def fast(stock: Stock) -> Stock:
        def forward(self: M.Module, inp: Tensor) -> Tensor:
            if not fusable(self, inp):
                return stock(self, inp)
            output = normalized_convolution(self, inp, self.conv.weight, relu)
            return output if activation is None else activation(output)

        return forward

    return fast


def fast_qat_conv_bn(relu: bool, activation: Stock | None) -> Callable[[Stock], Stock]:
    def fast(stock: Stock) -> Stock:
        def forward(self: Q.QATModule, inp: Tensor) -> Tensor:
            if not fusable(self, inp):
                return stock(self, inp)
            output = normalized_convolution(self, inp, fake_quantized_weight(self), relu)
            return self.apply_quant_activation(output if activation is None else activation(output))

        return forward

    return fast


def fusable(module: M.Module, source: Tensor) -> bool:
    """Whether ``module``, a convolution ``conv`` and a batch norm ``bn``, is training in the plain way."""
    conv, bn = module.conv, module.bn
    return bool(
        module.training
        and bn.training
        and bn.track_running_stats
        and not bn.freeze
        and bn.affine
        and conv.bias is None
        and conv.dilation == (1, 1)
        and conv.padding_mode == "zeros"
        and conv.compute_mode == "default"
        and not any(part._forward_hooks or part._forward_pre_hooks for part in (conv, bn))
        and needs_gradient(source, conv.weight, bn.weight, bn.bias)
        and on_cpu(source, conv.weight)
        and (found := geometry_of(source, conv.weight, conv.stride, conv.padding)) is not None
        # One value alone has no unbiased variance.
        and elements_a_channel(found) > 1
    )


def elements_a_channel(geometry: Geometry) -> int:
    batch, _, height, width = geometry.output
    return batch * height * width


def normalized_convolution(module: M.Module, source: Tensor, weights: Tensor, relu: bool) -> Tensor:
    """Convolution with ``weights``, batch norm by this batch's statistics and maybe ReLU; updates the running ones."""
    conv, bn = module.conv, module.bn
    found = geometry_of(source, weights, conv.stride, conv.padding)
    assert found is not None
    function = NormalizedConvolution(found, Norm(bn.eps, relu), needs_gradient(source))
    output = function(source, weights, bn.weight, bn.bias)
    elements = elements_a_channel(found)
    keep = np.float32(bn.momentum)
    for running, now in (
        (bn.running_mean, function.mean),
        (bn.running_var, function.variance * np.float32(elements / (elements - 1))),
    ):
        old = running.numpy()
        running._reset(Tensor(old * keep + now.reshape(old.shape) * (ONE - keep), device=running.device))
    return output


def fake_quantized_weight(module: Q.QATModule) -> Tensor:
    """The weights whose convolution is what MegEngine has before batch norm in quantization-aware training.

    It quantizes the weights as they are with batch norm folded in, and divides the convolution by the factor again
    (arXiv:1806.08342, section 3.2.2). Dividing the weights gives the same and is less work.
    """
    conv, bn = module.conv, module.bn
    factor = bn.weight * (1.0 / F.sqrt(bn.running_var + bn.eps))
    factor = factor.reshape(-1, 1, 1, 1) if conv.groups == 1 else factor.reshape(conv.groups, -1, 1, 1, 1)
    return module.apply_quant_weight(conv.weight * factor) / factor


def fast_elemwise(stock: Stock) -> Stock:
    def elemwise(*inputs: Tensor, mode: Any) -> Tensor:
        if (
            str(mode).upper() == "FUSE_ADD_RELU"
            and needs_gradient(*inputs)
            and on_cpu(*inputs)
            and inputs[0]._tuple_shape == inputs[1]._tuple_shape
        ):
            return AddRelu()(*inputs)
        return stock(*inputs, mode=mode)

    return elemwise


def fast_fake_quant(stock: Stock) -> Stock:
    def fake_quant_tensor(inp: Tensor, qparams: QParams) -> Tensor:
        if not on_cpu(inp, qparams.scale) or qparams.scale.size != 1:
            return stock(inp, qparams)
        asymmetric = qparams.mode == QuantMode.ASYMMERTIC
        zero_point = qparams.zero_point.numpy().reshape(())[()] if asymmetric else np.float32(0)
        scale = qparams.scale.numpy().reshape(())[()]
        return FakeQuantization(scale, np.float32(zero_point), qparams.dtype_meta.qmin, qparams.dtype_meta.qmax)(inp)

    return fake_quant_tensor


def fast_min_max(stock: Stock) -> Stock:
    def forward(self: MinMaxObserver, x_orig: Tensor) -> Tensor:
        if not self.enabled or not on_cpu(x_orig):
            return stock(self, x_orig)
        (x,) = values(x_orig)
        set_value(self.min_val, np.minimum(self.min_val.numpy(), x.min()))
        set_value(self.max_val, np.maximum(self.max_val.numpy(), x.max()))
        return x_orig

    return forward


def fast_moving_average(stock: Stock) -> Stock:
    def forward(self: ExponentialMovingAverageObserver, x_orig: Tensor) -> Tensor:
        if not self.enabled or not on_cpu(x_orig):
            return stock(self, x_orig)
        (x,) = values(x_orig)
        keep = self.runtime_momentum.numpy()
        for extreme, now in ((self.min_val, x.min()), (self.max_val, x.max())):
            set_value(extreme, extreme.numpy() * keep + (ONE - keep) * now)
        set_value(self.runtime_momentum, self.momentum.numpy())
        return x_orig

    return forward


def set_value(tensor: Tensor, value: Any) -> None:
    tensor._reset(Tensor(np.asarray(value, np.float32).reshape(tensor._tuple_shape), device=tensor.device))


def fast_qparams(stock: Stock) -> Stock:
    def calculate_qparams(self: MinMaxObserver, inp_min_val: Tensor, inp_max_val: Tensor) -> QParams:
        if self.mode != QuantMode.SYMMERTIC or not on_cpu(inp_min_val, inp_max_val):
            return stock(self, inp_min_val, inp_max_val)
        largest = np.maximum(-np.minimum(0, inp_min_val.numpy()), np.maximum(0, inp_max_val.numpy()))
        scale = np.maximum(largest / np.float32((self.qmax - self.qmin) / 2), np.float32(self.scale_limit))
        return create_qparams(self.mode, self.dtype, scale=Tensor(scale, device=inp_min_val.device))

    return calculate_qparams

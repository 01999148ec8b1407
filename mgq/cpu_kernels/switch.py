"""Replaces functions of MegEngine by fast ones, where these give the same results."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, NamedTuple

import megengine.functional
import megengine.module as M
import megengine.module.conv
import megengine.module.elemwise
import megengine.module.pooling
import megengine.module.qat as Q
import numpy as np
from megengine import Tensor, amp
from megengine.core._imperative_rt.core2 import is_tracing_module
from megengine.jit.tracing import is_tracing
from megengine.optimizer import SGD

from mgq.cpu_kernels import onednn
from mgq.cpu_kernels.autograd_functions import (
    AddRelu,
    Convolution,
    FakeQuantization,
    FakeQuantizedConvolution,
    FoldedConvolution,
    NormalizedConvolution,
)
from mgq.cpu_kernels.channels_last import Pool
from mgq.cpu_kernels.elementwise import extremes, move_statistics
from mgq.cpu_kernels.fake_quantization import (
    ONE,
    ObservedParams,
    Quantizer,
    is_known,
    is_plain,
    is_unit,
    quantizer_of,
    update_observer,
)
from mgq.cpu_kernels.feature_maps import (
    FeatureMap,
    GlobalAverage,
    MaxPool,
    QuantizedMap,
    QuantizedSum,
    Shuffle,
    Sum,
    needs_gradient,
    of_tensor,
    to_plain,
)
from mgq.cpu_kernels.gradient_descent import fast_updates, give_back_velocities
from mgq.cpu_kernels.onednn_kernels import Geometry, Norm, geometry
from mgq.cpu_kernels.shared_batch_norm import shared_batch_norm
from mgq.cpu_kernels.statistics_exchange import exchange_of_batch_norm
from mgq.cpu_kernels.tensor_exchange import Array, forget_state, gathering_state, read_state, values, write_state
from mgq.machine import calm_threads, keep_freed_memory, use_large_pages
from mgq.quantization.activations import RELU6
from mgq.quantization.relu6 import QatConvBnRelu6
from mgq.zoo import shufflenet_v1
from mgq.zoo.efficientnet_lite import EfficientNetLite
from mgq.zoo.layers import ConvBnRelu6
from mgq.zoo.mobilenet_v2 import MobileNetV2
from mgq.zoo.resnet import ResNet
from mgq.zoo.shufflenet_v1 import ShuffleNetV1

Stock = Callable[..., Any]

MAPPED_NETWORKS = (ResNet, MobileNetV2, ShuffleNetV1, EfficientNetLite)
"""Networks whose layers may pass feature maps to each other: all their operations up to the average support them."""


class Replacement(NamedTuple):
    """A function ``owner.name``, and how its fast version is made from the stock one, which that calls as a
    fallback."""

    owner: Any
    name: str
    fast: Callable[[Stock], Stock]


# What is replaced now, with what stood there.
_replaced: list[tuple[Any, str, Stock]] = []
# Whether convolutions multiply in bfloat16.
_bfloat16 = False


def enable_fast_gradients() -> None:
    """Train fast on CPUs from here on; see :func:`fast_gradients`. Does nothing when that is so already."""
    if _replaced:
        return
    onednn.library()
    keep_freed_memory()
    use_large_pages()
    Tensor(0.0).numpy()  # MegEngine starts its threads with its first tensor
    calm_threads()
    for owner, name, fast in replacements():
        stock = getattr(owner, name)
        _replaced.append((owner, name, stock))
        setattr(owner, name, fast(stock))


def disable_fast_gradients() -> None:
    """Train as MegEngine does by itself from here on."""
    while _replaced:
        setattr(*_replaced.pop())
    give_back_velocities()


@contextlib.contextmanager
def replaced(*replacements: Replacement) -> Iterator[None]:
    """Inside, the functions of ``replacements`` are replaced; they may be nested."""
    before = [(owner, name, vars(owner).get(name)) for owner, name, _ in replacements]
    try:
        for owner, name, fast in replacements:
            setattr(owner, name, fast(getattr(owner, name)))
        yield
    finally:
        for owner, name, own in reversed(before):
            if own is None:  # inherited: what stands for the base's must be found again
                delattr(owner, name)
            else:
                setattr(owner, name, own)


def fast_gradients_enabled() -> bool:
    return bool(_replaced)


@contextlib.contextmanager
def fast_gradients(bfloat16: bool = False) -> Iterator[None]:
    """Within it, training steps on a CPU are fast: results and gradients are MegEngine's up to float32 rounding.

    It serves the modules Conv2d, ConvBn2d, ConvBnRelu2d and the zoo's ConvBnRelu6, in float and fake-quantized, and
    ``FUSE_ADD_RELU``, MinMaxObserver, ExponentialMovingAverageObserver and FakeQuantize. Left as they are: GPUs, traced
    and float16 code, convolutions whose gradient nobody wants, and those with dilation.

    With ``bfloat16`` convolutions multiply numbers that are rounded to it: to 8 bits. Their sums, and all else, stay
    float32. Depthwise ones and those of pixels stay as they are.

    Gradients cannot be differentiated again. Raises FailureError where oneDNN is missing.
    """
    global _bfloat16
    before, precision = fast_gradients_enabled(), _bfloat16
    enable_fast_gradients()
    _bfloat16 = bfloat16
    try:
        yield
    finally:
        _bfloat16 = precision
        if not before:
            disable_fast_gradients()


def replacements() -> Iterator[Replacement]:
    yield Replacement(Tensor, "_reset", forget_state)
    yield Replacement(megengine.module.conv, "conv2d", fast_conv2d)
    yield Replacement(megengine.module.elemwise, "_elwise", fast_elemwise)
    yield Replacement(Q.Elemwise, "forward", fast_qat_sum)
    yield Replacement(M.BatchNorm2d, "forward", shared_batch_norm)
    yield Replacement(Q.QATModule, "_apply_fakequant_with_observer", fast_quantization)
    for module, qat_module, relu, ceiling in (
        (M.ConvBn2d, Q.ConvBn2d, False, None),
        (M.ConvBnRelu2d, Q.ConvBnRelu2d, True, None),
        (ConvBnRelu6, QatConvBnRelu6, True, RELU6.high),
    ):
        yield Replacement(module, "forward", fast_conv_bn(relu, ceiling))
        yield Replacement(qat_module, "forward", fast_qat_conv_bn(relu, ceiling))
    yield Replacement(megengine.module.pooling, "max_pool2d", fast_max_pool2d)
    yield Replacement(megengine.functional, "avg_pool2d", fast_avg_pool2d)
    yield Replacement(M.Identity, "forward", fast_identity)
    yield Replacement(shufflenet_v1, "channel_shuffle", fast_channel_shuffle)
    yield Replacement(SGD, "_updates", lambda stock: fast_updates(stock, are_on_cpu))
    for network in MAPPED_NETWORKS:
        yield Replacement(network, "forward", fast_network)


def are_on_cpu(*inputs: Tensor | FeatureMap) -> bool:
    """Whether ``inputs`` are float32 in CPU memory and are being computed with, not traced. Feature maps always are."""
    if is_tracing() or is_tracing_module() or amp.enabled:
        return False
    return all(
        t.dtype == np.float32 and t.device.physical_locator[0] == "cpu" and t.format in ("default", "nchw")
        for t in inputs
        if not isinstance(t, FeatureMap)
    )


def geometry_of(source: Tensor | FeatureMap, weights: Tensor, stride: Any, padding: Any) -> Geometry | None:
    """The convolution of these as oneDNN takes it; None for one that yields nothing."""
    if source.ndim != 4:
        return None
    is_map = isinstance(source, FeatureMap)
    found = geometry(source._tuple_shape, weights._tuple_shape, pair_of(stride), pair_of(padding), is_map, _bfloat16)
    return found if min((*found.source, *found.output)) > 0 else None


def pair_of(value: Any) -> tuple[int, int]:
    height, width = value if isinstance(value, (tuple, list)) else (value, value)
    return int(height), int(width)


def fast_conv2d(stock: Stock) -> Stock:
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
            and are_on_cpu(inp, weight)
            and pair_of(dilation) == (1, 1)
            and str(conv_mode).lower() == "cross_correlation"
            and compute_mode == "default"
        ):
            found = geometry_of(inp, weight, stride, padding)
        if found is None:
            return stock(inp, weight, bias, *options)
        output = Convolution(found, needs_gradient(inp))(inp, weight)
        return output if bias is None else output + bias

    return conv2d


def fast_conv_bn(relu: bool, ceiling: float | None) -> Callable[[Stock], Stock]:
    def fast(stock: Stock) -> Stock:
        def forward(self: M.Module, inp: Tensor | FeatureMap) -> Tensor | FeatureMap:
            found = fusable(self, inp)
            if found is None:
                return as_before(inp, stock(self, to_plain(inp)))
            return normalize(self, NormalizedConvolution(*arguments_of(self, found, relu, ceiling, inp)), inp)

        return forward

    return fast


def fast_qat_conv_bn(relu: bool, ceiling: float | None) -> Callable[[Stock], Stock]:
    def fast(stock: Stock) -> Stock:
        def forward(self: Q.QATModule, inp: Tensor | FeatureMap) -> Tensor | FeatureMap:
            known = (
                is_known(self.weight_observer)
                and is_known(self.act_observer)
                and is_plain(self.weight_fake_quant)
                and is_plain(self.act_fake_quant)
            )
            found = fusable(self, inp) if known else None
            if found is None:
                return as_before(inp, stock(self, to_plain(inp)))
            arguments = arguments_of(self, found, relu, ceiling, inp)
            function = (
                FakeQuantizedConvolution(self, *arguments)
                if self.training
                else FoldedConvolution(self, inp.qparams, *arguments)
            )
            output = normalize(self, function, inp)
            if isinstance(output, FeatureMap):
                output._qparams = function.qparams
            else:
                output.qparams.update(function.qparams)
            return output

        return forward

    return fast


def as_before(source: Tensor | FeatureMap, result: Tensor) -> Tensor | FeatureMap:
    """``result`` of MegEngine's own code, as a feature map where its ``source`` was one."""
    return of_tensor(result) if isinstance(source, FeatureMap) else result


def arguments_of(
    module: M.Module, geometry: Geometry, relu: bool, ceiling: float | None, source: Tensor | FeatureMap
) -> tuple[Geometry, Norm, float | None, bool, Array, Array]:
    """What a :class:`NormalizedConvolution` of ``module`` takes. Batch norm in eval mode has its statistics fixed."""
    bn = module.bn
    fixed = not bn.training
    if fixed:
        mean, variance = (np.ravel(running.numpy()) for running in (bn.running_mean, bn.running_var))
    else:
        mean, variance = np.empty((2, geometry.output[1]), np.float32)
    return geometry, Norm(bn.eps, relu, fixed), ceiling, needs_gradient(source), mean, variance


def fusable(module: M.Module, source: Tensor | FeatureMap) -> Geometry | None:
    """The geometry of ``module``, a convolution ``conv`` and a batch norm ``bn``, if it is trained and plain."""
    conv, bn = module.conv, module.bn
    plainly = (
        # In eval mode fake quantization folds the batch norm, float modules do as ever.
        (module.training or not (isinstance(module, Q.QATModule) and bn.training))
        and type(bn) is M.BatchNorm2d
        and bn.track_running_stats
        and not bn.freeze
        and bn.affine
        and conv.bias is None
        and conv.dilation == (1, 1)
        and conv.padding_mode == "zeros"
        and conv.compute_mode == "default"
        and not any(part._forward_hooks or part._forward_pre_hooks for part in (conv, bn))
        and needs_gradient(source, conv.weight, bn.weight, bn.bias)
        and are_on_cpu(source, conv.weight)
    )
    found = geometry_of(source, conv.weight, conv.stride, conv.padding) if plainly else None
    if found is None or not bn.training:
        return found
    if exchange_of_batch_norm() is not None:
        return found if found.channels_last else None
    # One value alone has no unbiased variance.
    return found if found.elements > 1 else None


def normalize(module: M.Module, function: NormalizedConvolution, source: Tensor | FeatureMap) -> Tensor | FeatureMap:
    """Apply ``function`` to ``source`` with the parameters of ``module``, and update its running statistics."""
    bn = module.bn
    run = function.apply_to_maps if isinstance(source, FeatureMap) else function
    output = run(source, module.conv.weight, bn.weight, bn.bias)
    if function.norm.fixed:
        return output
    elements = function.elements
    found = move_statistics(
        read_state(bn.running_mean, bn.running_var),
        function.mean,
        function.variance,
        np.float32(bn.momentum),
        np.float32(elements / (elements - 1)),
    )
    for running, value in zip((bn.running_mean, bn.running_var), found, strict=True):
        write_state(running, value)
    return output


def fast_elemwise(stock: Stock) -> Stock:
    def elemwise(*inputs: Tensor | FeatureMap, mode: Any) -> Tensor | FeatureMap:
        added = sum_of(*inputs, mode=str(mode).upper())
        if added is not None:
            return added
        inputs = tuple(map(to_plain, inputs))
        if (
            str(mode).upper() == "FUSE_ADD_RELU"
            and needs_gradient(*inputs)
            and are_on_cpu(*inputs)
            and inputs[0]._tuple_shape == inputs[1]._tuple_shape
        ):
            return AddRelu()(*inputs)
        return stock(*inputs, mode=mode)

    return elemwise


def sum_of(*inputs: Tensor | FeatureMap, mode: str) -> FeatureMap | None:
    """The sum of two feature maps of the same shape; None of others."""
    relu = relu_of_sum(*inputs, mode=mode)
    if relu is None:
        return None
    a, b = inputs
    return Sum(a, b, relu).apply_to_maps(a, b)


def relu_of_sum(*inputs: Tensor | FeatureMap, mode: str) -> bool | None:
    """Whether a sum of two feature maps of the same shape has a ReLU behind it; None of others."""
    if mode not in ("ADD", "FUSE_ADD_RELU") or len(inputs) != 2:
        return None
    a, b = inputs
    if not isinstance(a, FeatureMap) or not isinstance(b, FeatureMap) or a._tuple_shape != b._tuple_shape:
        return None
    return mode == "FUSE_ADD_RELU"


def fast_qat_sum(stock: Stock) -> Stock:
    def forward(self: Q.Elemwise, *inputs: Tensor | FeatureMap) -> Tensor | FeatureMap:
        known = is_plain(self.act_fake_quant) and is_known(self.act_observer)
        relu = relu_of_sum(*inputs, mode=str(self.method).upper()) if known else None
        if relu is None:
            return stock(self, *inputs)
        a, b = inputs
        function = QuantizedSum(a, b, relu, self.act_observer)
        output = function.apply_to_maps(a, b)
        output._qparams = function.qparams
        return output

    return forward


def fast_identity(stock: Stock) -> Stock:
    def forward(self: M.Identity, x: Tensor | FeatureMap) -> Tensor | FeatureMap:
        return x if isinstance(x, FeatureMap) else stock(self, x)

    return forward


def fast_max_pool2d(stock: Stock) -> Stock:
    def max_pool2d(inp: Tensor | FeatureMap, kernel_size: Any, stride: Any = None, padding: Any = 0) -> Any:
        if not isinstance(inp, FeatureMap):
            return stock(inp, kernel_size, stride, padding)
        pool = Pool(pair_of(kernel_size), pair_of(stride or kernel_size), pair_of(padding))
        return MaxPool(inp, pool).apply_to_maps(inp)

    return max_pool2d


def fast_avg_pool2d(stock: Stock) -> Stock:
    def avg_pool2d(inp: Tensor | FeatureMap, kernel_size: Any, *options: Any, **named: Any) -> Tensor:
        whole = isinstance(inp, FeatureMap) and pair_of(kernel_size) == inp._tuple_shape[2:]
        if whole and not options and not named:
            return GlobalAverage(inp)(inp.token)
        return stock(to_plain(inp), kernel_size, *options, **named)

    return avg_pool2d


def fast_channel_shuffle(stock: Stock) -> Stock:
    def channel_shuffle(x: Tensor | FeatureMap, groups: int) -> Tensor | FeatureMap:
        if not isinstance(x, FeatureMap):
            return stock(x, groups)
        shuffled = Shuffle(x, groups).apply_to_maps(x)
        shuffled._qparams = x._qparams  # a copy would make tensors of what is one number as yet
        return shuffled

    return channel_shuffle


def fast_network(stock: Stock) -> Stock:
    def forward(self: M.Module, x: Tensor) -> Tensor:
        if not hands_on_maps(self, x):
            return stock(self, x)
        with gathering_state():
            return stock(self, of_tensor(x))

    return forward


def hands_on_maps(network: M.Module, images: Tensor) -> bool:
    """Whether all convolutions of ``network`` are trained, on a CPU, and nobody looks in between the layers."""
    if images.ndim != 4 or not are_on_cpu(images) or needs_gradient(images):
        return False
    return all(
        not part._forward_hooks
        and not part._forward_pre_hooks
        and type(part).__module__.startswith(("megengine.", "mgq."))
        and (not isinstance(part, M.Conv2d) or needs_gradient(part.weight))
        for part in parts_of(network)
    )


def parts_of(module: M.Module) -> list[M.Module]:
    """``module`` and all within it; ``modules()`` sorts their names and takes milliseconds."""
    found = [module]
    for part in found:
        own = vars(part)
        if own["_modules"]:
            found += [own[name] for name in own["_modules"] if is_module(type(own[name]))]  # type: ignore[arg-type]
    return found


@cache
def is_module(kind: type) -> bool:
    """Asked of an abstract class the question goes through Python every time."""
    return issubclass(kind, M.Module)


def fast_quantization(stock: Stock) -> Stock:
    def apply_fakequant_with_observer(
        self: Q.QATModule, target: Tensor | FeatureMap, fake_quant: Any, observer: Any
    ) -> Tensor | FeatureMap:
        if isinstance(target, FeatureMap) and is_plain(fake_quant) and (is_known(observer) or is_unit(observer)):
            return quantize_map(target, observer)
        if isinstance(target, FeatureMap):
            return of_tensor(apply_fakequant_with_observer(self, to_plain(target), fake_quant, observer))
        if not is_plain(fake_quant) or observer is None or not are_on_cpu(target):
            return stock(self, target, fake_quant, observer)
        quantizer: Quantizer | None
        if is_known(observer):
            (array,) = values(target)
            qparams = update_observer(observer, lambda: extremes(array))
            quantizer = qparams.quantizer
        else:
            target = observer(target)
            qparams = observer.get_qparams()
            (array,) = values(target)
            quantizer = quantizer_of(qparams)
        output = fake_quant(target, qparams) if quantizer is None else FakeQuantization(quantizer, array)(target)
        output.qparams.update(qparams)
        return output

    return apply_fakequant_with_observer


def quantize_map(source: FeatureMap, observer: Any) -> FeatureMap:
    """``source`` fake-quantized by what its ``observer`` says once it has seen it."""
    if is_unit(observer):
        qparams = ObservedParams(observer, ONE)
    else:
        qparams = update_observer(observer, lambda: extremes(source.array))
    output = QuantizedMap(source, qparams.quantizer).apply_to_maps(source)
    output._qparams = qparams
    return output

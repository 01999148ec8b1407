"""Layers that several families share."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import megengine.functional as F
import megengine.module as M
from megengine import Tensor
from megengine.core.tensor.dtype import is_quantize
from megengine.module import module as walks
from megengine.module.conv import _ConvNd
from megengine.module.module import HookHandler


class ConvBnRelu6(M.ConvBnRelu2d):  # type: ignore[misc]
    """Convolution, batch norm and ReLU6 (``min(max(x, 0), 6)``) in one quantizable layer.

    Takes the arguments of :class:`megengine.module.ConvBnRelu2d`; float32 (N, C, H, W) in and out.
    """

    def forward(self, inp: Tensor) -> Tensor:
        return F.relu6(self.bn(self.conv(inp)))


@contextlib.contextmanager
def forward_hooks(hooks: Iterable[tuple[M.Module, Callable[..., Any]]]) -> Iterator[None]:
    """Inside, each hook is called with its module, inputs and output; it may return another output."""
    with removed([module.register_forward_hook(hook) for module, hook in hooks]):
        yield


@contextlib.contextmanager
def forward_pre_hooks(hooks: Iterable[tuple[M.Module, Callable[..., Any]]]) -> Iterator[None]:
    """Inside, each hook is called with its module and the inputs that this is about to read."""
    with removed([module.register_forward_pre_hook(hook) for module, hook in hooks]):
        yield


@contextlib.contextmanager
def removed(handles: Sequence[HookHandler]) -> Iterator[None]:
    """Remove the hooks behind ``handles`` on the way out."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def global_average(features: Tensor) -> Tensor:
    """Mean over each whole feature map: (N, C, H, W) -> float32 (N, C), whatever H and W are.

    The mean of integers is float32, as in fake quantization: rounded to their step, which is coarse for a mean, it
    changed 1 answer in 200 of EfficientNet-Lite0.
    """
    height, width = features._tuple_shape[2:]
    if is_quantize(features.dtype):
        features = features.astype("float32")
    return F.flatten(F.avg_pool2d(features, (height, width)), 1)


def keep_grid_of(source: Tensor, result: Tensor) -> Tensor:
    """Return ``result``, values of ``source`` that were only moved or left out, with the scale of ``source``."""
    if source._qparams is not None:
        result.qparams.update(source.qparams)
    return result


def scale_channels(channels: float, divisor: int = 8) -> int:
    """``channels`` rounded to a multiple of ``divisor``, never more than 10 % below it.

    The rule of MobileNetV2 (arXiv:1801.04381) and EfficientNet for scaled widths.
    """
    rounded = max(divisor, int(channels + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * channels else rounded


def initialize(network: M.Module) -> None:
    """He initialization (arXiv:1502.01852, fan out) for convolutions, small normal for the classifier.

    Does nothing within :func:`without_initialization`.
    """
    if _ConvNd.reset_parameters is leave_as_is:
        return
    for module in network.modules():
        if isinstance(module, M.Conv2d):
            M.init.msra_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, M.Linear):
            M.init.normal_(module.weight, 0, 0.01)
            if module.bias is not None:
                M.init.zeros_(module.bias)


@contextlib.contextmanager
def without_initialization() -> Iterator[None]:
    """Within it, new convolutions and classifiers draw no random weights: weights are loaded afterwards. Drawing random
    ones takes longer than reading a checkpoint.
    """
    kinds = (_ConvNd, M.Linear)
    drawn = [kind.reset_parameters for kind in kinds]
    for kind in kinds:
        kind.reset_parameters = leave_as_is
    try:
        yield
    finally:
        for kind, reset in zip(kinds, drawn, strict=True):
            kind.reset_parameters = reset


@contextlib.contextmanager
def quick_walks() -> Iterator[None]:
    """Within it MegEngine finds the modules and tensors in a network in a third of the time: it knows a class that it
    saw before. By itself it asks abstract base classes about each attribute of each module, on every walk."""
    stock, known = walks._expand_structure, dict[type, bool | None]()

    def expand(prefix: str, attribute: Any) -> Sequence[tuple[str, Any]]:
        kind = type(attribute)
        if kind not in known:
            known[kind] = None if issubclass(kind, list | tuple | dict) else issubclass(kind, Tensor | M.Module)
        is_part = known[kind]
        if is_part is None:
            return stock(prefix, attribute) if attribute else ()
        return ((prefix, attribute),) if is_part else ()

    walks._expand_structure = expand
    try:
        yield
    finally:
        walks._expand_structure = stock


def leave_as_is(_: M.Module) -> None:
    """Stands for an initialization that is not wanted."""

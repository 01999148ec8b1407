"""What calibrations read and set in the layers of a network in mode ``qat``: ranges, weights and biases."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple, TypeAlias

import megengine.module as M
import numpy as np
import numpy.typing as npt
from megengine import Tensor
from megengine.module.qat import QATModule
from megengine.quantization.observer import MinMaxObserver

from mgq.quantization.floors import floor_of, limit_of, span_up_to

GridRange: TypeAlias = tuple[float, float]
"""Smallest and largest value of a grid, as observers and files of ranges hold them."""


UNSEEN_SCALE = 1e-5
"""Of the grid of a layer that gave nothing but 0: biases of layers behind have to fit in int32 in terms of it."""


class Range(NamedTuple):
    """Smallest and largest value behind a layer that its grid has to cover.

    :func:`set_grid` widens it to the range of the grid, which is no ``Range``: what was widened once is not widened
    again."""

    low: float
    high: float


def find_quantized_layers(network: M.Module) -> dict[str, QATModule]:
    """Name -> layer, for the layers of a ``qat`` network whose output is quantized, in the network's order."""
    return {
        name: module
        for name, module in network.named_modules()
        if isinstance(module, QATModule) and module.act_observer is not None
    }


def set_range(observer: MinMaxObserver, low: float, high: float) -> None:
    """Give ``observer`` a range, as if it had seen just that."""
    observer.min_val[...], observer.max_val[...] = Tensor(low, dtype="float32"), Tensor(high, dtype="float32")


def set_grids(network: M.Module, outputs: Mapping[str, Range]) -> dict[str, GridRange]:
    """Fix the grids behind layers of a ``qat`` network for these ``outputs``; return the ranges of the grids."""
    layers = find_quantized_layers(network)
    return {name: set_grid(layers[name], wanted) for name, wanted in outputs.items()}


def set_grid(layer: QATModule, outputs: Range) -> GridRange:
    """Fix the grid behind ``layer`` for these ``outputs``; return its range."""
    found = extend_to_grid(layer, outputs)
    set_range(layer.act_observer, *found)
    return found


def extend_to_grid(layer: QATModule, outputs: Range) -> GridRange:
    """The range of the ``outputs`` of ``layer``, widened where its grid has fewer levels below 0 than above; for a grid
    that begins at a floor the span above that (:mod:`mgq.quantization.floors`)."""
    low, high = outputs
    quantizer, observer = layer.act_fake_quant, layer.act_observer
    if not low and not high and observer.scale_limit < UNSEEN_SCALE:
        return 0.0, UNSEEN_SCALE * quant_levels(layer)
    floor = floor_of(observer.dtype)
    if floor is not None:
        return 0.0, float(span_up_to(limit_of(low, high, floor), floor))
    if quantizer is None or quantizer.qmin == observer.qmin:
        return low, high
    return low, max(high, low / quantizer.qmin * observer.qmax)


def quant_levels(layer: QATModule) -> float:
    """Largest value / step of the grid behind ``layer``."""
    return float(layer.act_observer.qmax - layer.act_observer.qmin) / 2


def names_that_run(network: M.Module) -> list[str]:
    """The layers of a ``qat`` network that need a range: the input stub does not, nor sums of no shortcut."""
    modules = dict(network.named_modules())
    without = {f"{name}.add".lstrip(".") for name, each in modules.items() if not getattr(each, "has_shortcut", True)}
    return [name for name in find_quantized_layers(network) if name != "quant" and name not in without]


def observe_weights(network: M.Module) -> None:
    """Set each weight observer of a ``qat`` network to the range of the weights, batch norm folded in."""
    for module in network.modules():
        if not isinstance(module, QATModule) or module.weight_observer is None:
            continue
        observer = module.weight_observer
        low, high = observer.min_val, observer.max_val
        weight = fold_weight(module)
        low[...], high[...] = weight.min(), weight.max()


def is_float_layer(module: M.Module) -> bool:
    """Whether ``module`` is a layer of a ``qat`` network whose weights are not quantized
    (:mod:`mgq.quantization.float_layers`)."""
    return isinstance(module, QATModule) and module.with_weight and module.weight_fake_quant is None


@contextmanager
def weights_as_they_are(module: QATModule) -> Iterator[None]:
    """Within it the weights of ``module`` are neither observed nor quantized."""
    parts = [part for part in (module.weight_observer, module.weight_fake_quant) if part is not None]
    were = [part.enabled for part in parts]
    for part in parts:
        part.disable()
    try:
        yield
    finally:
        for part, was in zip(parts, were, strict=True):
            part.enabled = was


def fold_weight(module: QATModule) -> Tensor:
    """The weight of ``module`` before it is quantized: float32, its batch norm folded in where it has one."""
    if not hasattr(module, "bn"):
        return module.weight
    with weights_as_they_are(module):
        weight, _ = module.fold_weight_bias(module.bn.running_mean, module.bn.running_var)
    return weight


def fold_bias(module: QATModule) -> npt.NDArray[np.float32]:
    """(C,): what is added to the output of a convolution, batch norm folded in where it has one; else zeros."""
    if hasattr(module, "bn"):
        with weights_as_they_are(module):
            _, bias = module.fold_weight_bias(module.bn.running_mean, module.bn.running_var)
        return np.asarray(bias.numpy()).ravel()
    channels = module.out_channels
    return np.zeros(channels, np.float32) if module.bias is None else np.asarray(module.bias.numpy()).ravel()


def quantize_weight(module: QATModule) -> Tensor:
    """The fake-quantized weight of ``module``: float32, its batch norm folded in. Weights of a layer kept in float are
    unchanged.
    """
    if is_float_layer(module):
        return fold_weight(module)
    fake_quant = module.weight_fake_quant
    was = fake_quant.enabled
    fake_quant.enable()
    weight = fake_quant(fold_weight(module), module.weight_observer.get_qparams())
    fake_quant.enabled = was
    return weight


def bias_parameter(module: M.Module) -> Tensor | None:
    """The parameter that holds the bias of a convolution: that of its batch norm, where it has one; None without a
    bias."""
    bias: Tensor | None = module.bn.bias if hasattr(module, "bn") else getattr(module, "bias", None)
    return bias


def add_to_bias(module: M.Module, correction: Sequence[float]) -> None:
    bias = bias_parameter(module)
    assert bias is not None
    bias[...] = bias + Tensor(np.asarray(correction, np.float32).reshape(bias.numpy().shape))

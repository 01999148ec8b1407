"""Activation ranges, the result of a calibration, as a small text file with its provenance."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import megengine.module as M
import numpy as np
import numpy.typing as npt
from megengine import Tensor
from megengine.module.qat import QATModule
from megengine.quantization.observer import MinMaxObserver

from mgq.errors import InputError, printable
from mgq.io.limited_io import text_of
from mgq.io.records import record_of
from mgq.quantization.floors import floor_of, limit_of, span_up_to

FORMAT = "mgq activation ranges 1"
MOST_BYTES = 1 << 24
"""The most bytes of a file of ranges; that of EfficientNet-Lite0 has a hundredth of it."""

GridRange: TypeAlias = tuple[float, float]
"""Smallest and largest value of a grid, as observers and files of ranges hold them."""


class Range(NamedTuple):
    """Smallest and largest value behind a layer that its grid has to cover.

    :func:`set_grid` widens it to the range of the grid, which is no ``Range``: what was widened once is not widened
    again."""

    low: float
    high: float


@dataclass(frozen=True)
class ActivationRanges:
    """Name of a quantized layer -> smallest and largest value behind it that int8 covers, in the float network's units.

    ``weight_ranges``: the same for a layer's weights, batch norm folded in, where the method (``observer``) chose them;
    other weights have the range of their values. ``bias_corrections``: what is added to the bias of a layer, for each
    channel. All of it holds for ``target`` only. ``weights`` is the SHA-256 of the state they were measured with
    (:func:`mgq.zoo.weight_loading.fingerprint`): ranges fit no other weights. ``provenance``: the images seen, the
    command and the versions.
    """

    arch: str
    observer: str
    weights: str
    provenance: Mapping[str, Any]
    ranges: Mapping[str, tuple[float, float]]
    weight_ranges: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    bias_corrections: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    target: str = "megengine"

    def to_json(self) -> str:
        body = {"format": FORMAT, **asdict(self)}
        tables = {name: body.pop(name) for name in ("ranges", "weight_ranges", "bias_corrections")}
        text = json.dumps(body, indent=1)[:-2]
        for name, table in tables.items():
            if table or name == "ranges":
                lines = ",\n".join(f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in table.items())
                text += f',\n "{name}": {{\n{lines}\n }}'
        return text + "\n}\n"


def read_ranges(path: Path) -> ActivationRanges:
    """Raises InputError where ``path`` is missing or is not a file of ranges."""
    name = printable(path)
    try:
        body = json.loads(text_of(path, MOST_BYTES))
    except OSError as error:
        raise InputError(f"cannot read the ranges {name}: {error.strerror}; `mgq calibrate` makes one") from None
    except (ValueError, RecursionError):
        raise InputError(f"{name} is not a file of activation ranges; `mgq calibrate` makes one") from None
    if not isinstance(body, dict) or body.pop("format", None) != FORMAT:
        raise InputError(f"{name} is not a file of activation ranges; `mgq calibrate` makes one")
    try:
        result = record_of(ActivationRanges, body)
    except (ValueError, RecursionError):
        raise InputError(f"{name} has damaged activation ranges; make it again by `mgq calibrate`") from None
    found = [*result.ranges.values(), *result.weight_ranges.values()]
    if not all(math.isfinite(low) and math.isfinite(high) and low <= high for low, high in found):
        raise InputError(f"{name} holds a range that is not a range; make it again by `mgq calibrate`")
    if not all(math.isfinite(value) for values in result.bias_corrections.values() for value in values):
        raise InputError(f"{name} holds a bias that is not a number; make it again by `mgq calibrate`")
    return result


def find_quantized_layers(network: M.Module) -> dict[str, QATModule]:
    """Name -> layer, for the layers of a ``qat`` network whose output is quantized, in the network's order."""
    return {
        name: module
        for name, module in network.named_modules()
        if isinstance(module, QATModule) and module.act_observer is not None
    }


def apply_ranges(network: M.Module, found: ActivationRanges) -> None:
    """Set the observers of a float network now in mode ``qat`` from ``found``, those of other weights from the weights.

    Adds the bias corrections in ``found``, so call it once. Raises InputError where ``found`` has a layer that the
    network does not have.
    """
    layers, modules = find_quantized_layers(network), dict(network.named_modules())
    for name, (low, high) in found.ranges.items():
        if name not in layers:
            raise InputError(f"the ranges of {found.arch} name a layer '{name}' that the network does not have")
        set_range(layers[name].act_observer, low, high)
    observe_weights(network)
    for name, (low, high) in found.weight_ranges.items():
        if name not in layers or layers[name].weight_observer is None:
            raise InputError(f"the ranges of {found.arch} name weights '{name}' that the network does not have")
        set_range(layers[name].weight_observer, low, high)
    for name, correction in found.bias_corrections.items():
        bias = bias_parameter(modules[name]) if name in modules else None
        if bias is None or bias.numpy().size != len(correction):
            raise InputError(f"the ranges of {found.arch} correct biases of '{name}' that the network does not have")
        add_to_bias(modules[name], correction)


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
    floor = floor_of(observer.dtype)
    if floor is not None:
        return 0.0, float(span_up_to(limit_of(low, high, floor), floor))
    if quantizer is None or quantizer.qmin == observer.qmin:
        return low, high
    return low, max(high, low / quantizer.qmin * observer.qmax)


def quant_levels(layer: QATModule) -> float:
    """Largest value / step of the grid behind ``layer``."""
    return float(layer.act_observer.qmax - layer.act_observer.qmin) / 2


def refuse_incomplete(network: M.Module, found: ActivationRanges) -> None:
    """Raises InputError where a layer that runs in ``network``, a ``qat`` one of the zoo, has no range in ``found``."""
    for name in names_that_run(network):
        if name not in found.ranges:
            raise InputError(f"the ranges of {found.arch} lack layer '{name}'; make them again by `mgq calibrate`")


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


def read_packaged_ranges(arch: str, weights: str, target: str = "megengine") -> ActivationRanges | None:
    """mgq's own ranges for ``arch`` and ``target`` if they were measured with the state of fingerprint ``weights``."""
    name = f"{arch}.json" if target == "megengine" else f"{arch}.{target}.json"
    path = Path(__file__).parent / "default_ranges" / name
    found = read_ranges(path) if path.is_file() else None
    return found if found is not None and found.weights == weights else None

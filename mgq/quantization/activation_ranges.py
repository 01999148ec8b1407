"""Activation ranges, the result of a calibration, as a small text file with its provenance."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import megengine.module as M

from mgq.errors import InputError, printable
from mgq.io.limited_io import text_of
from mgq.io.records import record_of
from mgq.quantization.qat_layers import (
    add_to_bias,
    bias_parameter,
    find_quantized_layers,
    names_that_run,
    observe_weights,
    set_range,
)

FORMAT = "mgq activation ranges 1"
MOST_BYTES = 1 << 24
"""The most bytes of a file of ranges; that of EfficientNet-Lite0 has a hundredth of it."""


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


def refuse_incomplete(network: M.Module, found: ActivationRanges) -> None:
    """Raises InputError where a layer that runs in ``network``, a ``qat`` one of the zoo, has no range in ``found``."""
    for name in names_that_run(network):
        if name not in found.ranges:
            raise InputError(f"the ranges of {found.arch} lack layer '{name}'; make them again by `mgq calibrate`")


def read_packaged_ranges(arch: str, weights: str, target: str = "megengine") -> ActivationRanges | None:
    """mgq's own ranges for ``arch`` and ``target`` if they were measured with the state of fingerprint ``weights``."""
    name = f"{arch}.json" if target == "megengine" else f"{arch}.{target}.json"
    path = Path(__file__).parent / "default_ranges" / name
    found = read_ranges(path) if path.is_file() else None
    return found if found is not None and found.weights == weights else None

"""Describes networks as data: a list of layers, which is stored with the weights in a checkpoint.

Imported classifiers are stored so. Reading a blueprint imports no MegEngine.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from mgq.errors import InputError

INPUT = "pixels"
"""The name of a network's input: float32 (N, C, H, W)."""
MOST_LAYERS = 20_000
LARGEST = 3e38
"""From here on a number is as good as infinite."""
MOVES = frozenset({"reshape", "transpose", "slice", "pad", "border", "expand", "max_pool", "global_max"})
"""Kinds of layers that only move or choose values: integers stay integers, on the same grid."""
WEIGHTED = frozenset({"conv", "linear"})
CURVED = frozenset({"elu", "gelu", "tanh"})
"""Activations that are computed in float."""
ACTIVATIONS = CURVED | {"relu", "clip", "leaky_relu", "sigmoid", "hard_sigmoid", "hard_swish", "silu"}
INTEGER = WEIGHTED | {"add", "mul", "concat", "avg_pool", "global_avg"} | (ACTIVATIONS - CURVED)
"""Kinds of layers with int8 kernels: their inputs and outputs are quantized."""
# fmt: off
FLOAT = frozenset({
    "abs", "affine", "atan", "ceil", "choose", "cos", "div", "erf", "exp", "floor", "greater", "highest", "layer_norm",
    "log", "log_softmax", "lrn", "matmul", "maximum", "mean", "minimum", "neg", "pow", "powers", "prelu", "reciprocal",
    "resize", "round", "sign", "sin", "softmax", "softplus", "sqrt", "sub",
})
# fmt: on
"""Kinds of layers that stay in float32."""
KINDS = MOVES | INTEGER | ACTIVATIONS | FLOAT
LEAST_OF = {
    "relu": 0.0,
    "sigmoid": 0.0,
    "hard_sigmoid": 0.0,
    "hard_swish": -0.375,
    "silu": -0.2785,
    "gelu": -0.1701,
    "softplus": 0.0,
}
"""The lowest output of each activation."""
LIGHT = INTEGER - WEIGHTED
"""Those without weights: between layers in float they gain nothing by integers, and lose what rounding takes."""
IN_FLOAT = "in_float"
"""The option of a layer that stays in float, though its kind has int8 kernels."""
FLOORS = {"hard_swish": -3.0, "silu": -6.0, "gelu": -3.0}
"""Activations of which what is below makes no difference: exactly none, at most 0.015 and 0.004."""


@dataclass(frozen=True)
class LayerPlan:
    """One layer: its kind, its name, which is also the name of its output, its inputs and its options. ``options`` are
    plain data: numbers, text, and lists of them.
    """

    kind: str
    name: str
    inputs: tuple[str, ...]
    options: Mapping[str, Any] = field(default_factory=dict)

    def with_inputs(self, names: Iterable[str]) -> LayerPlan:
        return replace(self, inputs=tuple(names))

    def with_options(self, **options: Any) -> LayerPlan:
        return replace(self, options={**self.options, **options})


@dataclass(frozen=True)
class Blueprint:
    """Layers in the order in which they run, from ``INPUT`` to ``output``, (N, classes).

    ``shape``: channels, height and width of the input.
    """

    layers: tuple[LayerPlan, ...]
    output: str
    shape: tuple[int, int, int]
    classes: int

    def to_json(self) -> str:
        return json.dumps(asdict(self), sort_keys=True, separators=(",", ":"))

    def readers(self) -> dict[str, list[LayerPlan]]:
        """Name of a tensor -> the layers that read it."""
        found: dict[str, list[LayerPlan]] = {INPUT: [], **{layer.name: [] for layer in self.layers}}
        for layer in self.layers:
            for name in layer.inputs:
                found[name].append(layer)
        return found

    def on_grid(self) -> frozenset[str]:
        """The names of the tensors that are quantized with a scale of their own: inputs and outputs of layers with int8
        kernels, but not tensors from which only the answer is computed.
        """
        wanted, known = self._list_reader_kinds(), {layer.name: layer for layer in self.layers}
        made = {
            name
            for name, layer in known.items()
            if layer.kind not in MOVES and layer.kind != "linear" and wanted[name] and self._pays(layer, wanted[name])
        }
        return frozenset(made)

    def _pays(self, layer: LayerPlan, wanted_by: set[str]) -> bool:
        return is_integer(layer) or bool(wanted_by & INTEGER)

    def _list_reader_kinds(self) -> dict[str, set[str]]:
        """Name of a tensor -> the kinds of the layers that read it, moved or not; ``IN_FLOAT`` for those that stay in
        float."""
        readers, known = self._find_readers(), {layer.name: layer for layer in self.layers}
        return {
            name: {IN_FLOAT if known[reader].options.get(IN_FLOAT) else known[reader].kind for reader in reading}
            for name, reading in readers.items()
        }

    def _find_readers(self) -> dict[str, set[str]]:
        """Name of a tensor -> the names of the layers that read it, moved or not."""
        found: dict[str, set[str]] = {INPUT: set(), **{layer.name: set() for layer in self.layers}}
        for layer in reversed(self.layers):
            reading = found[layer.name] if layer.kind in MOVES else {layer.name}
            for name in layer.inputs:
                found[name] |= reading
        return found

    def _find_makers(self) -> dict[str, set[str]]:
        """Name of a tensor -> the names of the layers, or ``INPUT``, that made what was moved there."""
        found: dict[str, set[str]] = {INPUT: {INPUT}}
        for layer in self.layers:
            is_move = layer.kind in MOVES
            found[layer.name] = set().union(*(found[name] for name in layer.inputs)) if is_move else {layer.name}
        return found

    def with_float_islands(self) -> Blueprint:
        """The same, where layers without weights stay in float if those around them do: such as the length of a vector
        on its way to a division, which is small, and 0 on a grid that has to hold larger ones."""
        readers, makers = self._find_readers(), self._find_makers()
        in_float = {layer.name for layer in self.layers if not is_integer(layer)}
        inside = [layer for layer in self.layers if layer.kind in LIGHT]
        while True:
            free = in_float | {layer.name for layer in inside}
            kept = [
                layer
                for layer in inside
                if readers[layer.name] <= free
                and (is_square(layer) or all(makers[name] <= free for name in layer.inputs))
            ]
            if len(kept) == len(inside):
                break
            inside = kept
        names = {layer.name for layer in inside}
        layers = (layer.with_options(**{IN_FLOAT: True}) if layer.name in names else layer for layer in self.layers)
        return replace(self, layers=tuple(layers))

    def with_floors(self) -> Blueprint:
        """The same, whose layers on grids of their own know where these may begin (``floor``): convolutions where what
        reads them begins to tell values apart, others at their lowest value."""
        floors = {name: low for name, low in self.lowest().items() if -math.inf < low < 0}
        read = self._find_read_floors()
        floors |= {layer.name: read[layer.name] for layer in self.layers if layer.kind == "conv" and layer.name in read}
        sums = {layer.name for layer in self.layers if layer.kind == "add"}  # MegEngine's module: it knows no floors
        given = (floors.keys() & self.on_grid()) - sums
        layers = (
            layer.with_options(floor=floors[layer.name]) if layer.name in given else layer for layer in self.layers
        )
        return replace(self, layers=tuple(layers))

    def _find_read_floors(self) -> dict[str, float]:
        """Name of a tensor -> from where on its values make a difference to those that read it, moved or not; without
        those of which all do."""
        found = {self.output: -math.inf}
        for layer in reversed(self.layers):
            own = found.get(layer.name, -math.inf) if layer.kind in MOVES else floor_below(layer)
            for name in layer.inputs:
                found[name] = min(found.get(name, math.inf), own)
        return {name: floor for name, floor in found.items() if math.isfinite(floor)}

    def lowest(self) -> dict[str, float]:
        """Name of a tensor -> a lower bound of its values: minus infinity where none is known."""
        low: dict[str, float] = {INPUT: -math.inf}
        for layer in self.layers:
            low[layer.name] = bound_below(layer, [low[name] for name in layer.inputs])
        return low


def is_integer(layer: LayerPlan) -> bool:
    """Whether ``layer`` reads and gives integers in an int8 network."""
    return layer.kind in INTEGER and not layer.options.get(IN_FLOAT)


def is_square(layer: LayerPlan) -> bool:
    """Whether ``layer`` multiplies a tensor by itself: twice as many bits as there are."""
    return layer.kind == "mul" and len(set(layer.inputs)) == 1


def border_values(options: Mapping[str, Any]) -> tuple[float, ...]:
    """What a ``pad`` puts around a picture: one value, or one for each channel."""
    value = options["value"]
    return tuple(map(float, value)) if isinstance(value, list | tuple) else (float(value),)


def floor_below(layer: LayerPlan) -> float:
    """From where on the inputs of ``layer`` make a difference: minus infinity where they all do."""
    if layer.kind == "hard_sigmoid" and layer.options["alpha"] > 0:
        return min(-float(layer.options["beta"]) / float(layer.options["alpha"]), 0.0)
    return FLOORS.get(layer.kind, -math.inf)


def bound_below(layer: LayerPlan, inputs: Sequence[float]) -> float:
    """A lower bound of the outputs of ``layer``, given lower bounds of its ``inputs``."""
    kind, options = layer.kind, layer.options
    if kind == "elu":
        return -abs(float(options["alpha"]))
    if kind in LEAST_OF:
        return LEAST_OF[kind]
    if kind == "conv" or kind == "linear":
        return 0.0 if options.get("activation") else -math.inf
    if kind == "add":
        return 0.0 if options.get("relu") else sum(inputs)
    if kind == "clip":
        return float(options["low"])
    if kind == "mul":
        return 0.0 if min(inputs) >= 0 else -math.inf if options.get("gate") is None else min(inputs)
    if kind == "pad":
        return min(inputs[0], *border_values(options))
    if kind in MOVES or kind in ("concat", "avg_pool", "global_avg", "highest"):
        return min(inputs)
    if kind == "maximum":
        return max(inputs)
    return 0.0 if kind in ("abs", "exp", "greater", "softmax", "sqrt") else -math.inf


def blueprint_in(text: Any) -> Blueprint:
    """The blueprint that is written as JSON in ``text``. Raises InputError where it is damaged."""
    try:
        body = json.loads(text)
        layers = tuple(
            LayerPlan(str(part["kind"]), str(part["name"]), tuple(map(str, part["inputs"])), dict(part["options"]))
            for part in body["layers"]
        )
        channels, height, width = (int(size) for size in body["shape"])
        found = Blueprint(layers, str(body["output"]), (channels, height, width), int(body["classes"]))
        refuse_impossible(found)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise InputError("the description of the network is damaged: import the ONNX file again") from None
    return found


def refuse_impossible(blueprint: Blueprint) -> None:
    """Raises ValueError for a layer of no known kind, a name that is none or taken, and tensors that nobody made."""
    made = {INPUT}
    for layer in blueprint.layers:
        is_name = layer.name.replace("_", "").isalnum() and layer.name.isidentifier() and "_" in layer.name
        if layer.kind not in KINDS or not is_name or layer.name in made or not set(layer.inputs) <= made:
            raise ValueError(layer.name)
        made.add(layer.name)
    if blueprint.output not in made or len(made) > MOST_LAYERS or blueprint.classes < 2:
        raise ValueError(blueprint.output)
    if not all(1 <= size <= 4096 for size in blueprint.shape):
        raise ValueError("shape")

"""The float input of the file that a network was imported from, kept in the int8 file that is made of it.

The int8 file has a few nodes in front, which turn that input back into pixels: what follows is the file that takes
pixels, so that both answer the same to the same picture.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mgq.errors import printable
from mgq.io.records import record_of
from mgq.weights.preprocessing import GREY_OF_BGR

PIXELS = "uint8"
TYPES = ("float32", PIXELS)
PIXEL_ZERO = 128
"""What is taken from pixels before a network sees them."""

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class FloatInput:
    """What a file is fed: ``(pixel - mean) / std``, of 0..255, with the channels in the ``order`` rgb or bgr; where its
    ``type`` is uint8, pixels.

    ``name`` is the tensor's, ``shape`` has the axes (N, C, H, W), or (N, H, W, C) where ``channels_last``, and None
    where any number of pictures will do; C is 1 in networks for grey pictures. ``output`` is what the answer is called.
    """

    name: str
    shape: tuple[int | None, ...]
    channels_last: bool
    order: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    output: str
    type: str = "float32"

    @property
    def takes_pixels(self) -> bool:
        return self.type == PIXELS

    @property
    def image(self) -> tuple[int | None, int | None, int | None]:
        """Channels, height and width."""
        _, *axes = self.shape
        return (axes[2], axes[0], axes[1]) if self.channels_last else (axes[0], axes[1], axes[2])

    @property
    def is_sound(self) -> bool:
        """Whether a picture can be fed."""
        numbers = np.array([self.mean, self.std])
        fits = len(self.shape) == 4 and self.type in TYPES and self.image[0] in (1, 3) and self.order in ("rgb", "bgr")
        return fits and bool(np.isfinite(numbers).all()) and min(self.std) > 0

    def describe(self) -> str:
        """What is fed, in words."""
        shape = ", ".join("N" if axis is None else str(axis) for axis in self.shape)
        channels = "grey" if self.image[0] == 1 else self.order.upper()
        entry = f"{self.type} '{printable(self.name)[:80]}' ({shape}) {channels}"
        if self.takes_pixels:
            return entry
        means, stds = (", ".join(f"{value:.4g}" for value in values) for values in (self.mean, self.std))
        return f"{entry}, mean {means}, std {stds} of 255"

    def scales(self) -> tuple[Array, Array]:
        """Mean and deviation as (1, C, 1, 1), float64."""
        mean, std = (np.array(values)[None, :, None, None] for values in (self.mean, self.std))
        return (mean.mean(1, keepdims=True), std.mean(1, keepdims=True)) if self.image[0] == 1 else (mean, std)

    def to_input(self, batch: npt.NDArray[np.uint8]) -> Array:
        """What the file takes of ``batch``, pixels (N, 3, H, W) in BGR."""
        pixels = batch.astype(np.float64)
        if self.image[0] == 1:
            pixels = np.tensordot(pixels, np.array(GREY_OF_BGR), (1, 0))[:, None]
        elif self.order == "rgb":
            pixels = pixels[:, ::-1]
        mean, std = self.scales()
        values: Array = np.rint(pixels) if self.takes_pixels else (pixels - mean) / std
        values = values.astype(self.type)
        return np.ascontiguousarray(values.transpose(0, 2, 3, 1) if self.channels_last else values)

    def to_json(self) -> dict[str, Any]:
        """For the metadata of a file."""
        return asdict(self)


def float_input_in(about: Mapping[str, Any]) -> FloatInput | None:
    """What the metadata ``about`` of a file says of its float input; None where it takes pixels, or says nonsense."""
    said = about.get("input")
    if not isinstance(said, dict):
        return None
    try:
        found = record_of(FloatInput, said, others=True)
    except ValueError:
        return None
    return found if found.is_sound else None


def write_entry(model: Any, kept: FloatInput) -> None:
    """Let ``model``, an ``onnx.ModelProto`` that takes pixels, take what ``kept`` says, and name its answer so."""
    import onnx

    graph = model.graph
    pixels, answer = graph.input[0].name, graph.output[0].name
    rename(graph, {pixels: "mgq/pixels", answer: kept.output}, {kept.name, kept.output})
    nodes, constants = entry_nodes(onnx, kept, "mgq/pixels")
    body = list(graph.node)
    del graph.node[:]
    graph.node.extend([*nodes, *body])
    graph.initializer.extend(onnx.numpy_helper.from_array(value, name) for name, value in constants.items())
    shape = ["N" if axis is None else axis for axis in kept.shape]
    kind = onnx.TensorProto.UINT8 if kept.takes_pixels else onnx.TensorProto.FLOAT
    graph.input[0].CopyFrom(onnx.helper.make_tensor_value_info(kept.name, kind, shape))


def rename(graph: Any, names: Mapping[str, str], taken: set[str]) -> None:
    """Call tensors of ``graph`` as ``names`` says, and what else has one of the names ``taken`` otherwise."""

    def new(name: str) -> str:
        return names.get(name) or (f"mgq/{name}" if name in taken else name)

    for node in graph.node:
        for tensors in (node.input, node.output):
            tensors[:] = [new(name) for name in tensors]
    for value in (*graph.initializer, *graph.input, *graph.output):
        value.name = new(value.name)


def entry_nodes(onnx: Any, kept: FloatInput, pixels: str) -> tuple[list[Any], dict[str, Array]]:
    """The nodes that turn the file's own input into uint8 ``pixels`` in BGR, and their constants."""
    mean, std = kept.scales()
    steps: list[tuple[str, Mapping[str, Array], Mapping[str, Any]]] = []
    if kept.channels_last:
        steps.append(("Transpose", {}, {"perm": [0, 3, 1, 2]}))
    if not kept.takes_pixels and (std != 1).any():
        steps.append(("Mul", {"std": std.astype(np.float32)}, {}))
    if not kept.takes_pixels:
        steps.append(("Add", {"mean": (mean - PIXEL_ZERO).astype(np.float32)}, {}))
    places = [0, 0, 0] if kept.image[0] == 1 else [2, 1, 0] if kept.order == "rgb" else [0, 1, 2]
    if places != [0, 1, 2]:
        steps.append(("Gather", {"places": np.array(places, np.int64)}, {"axis": 1}))
    grid: dict[str, Array] = {"scale": np.array(1, np.float32), "zero_point": np.array(PIXEL_ZERO, np.uint8)}
    steps.append(("Identity", {}, {}) if kept.takes_pixels else ("QuantizeLinear", grid, {}))
    nodes, constants, source = [], {}, kept.name
    for number, (operator, own, attributes) in enumerate(steps):
        named = {f"mgq/input/{name}": value for name, value in own.items()}
        output = pixels if number == len(steps) - 1 else f"mgq/input/{operator.lower()}"
        nodes.append(onnx.helper.make_node(operator, [source, *named], [output], f"{output}/{operator}", **attributes))
        constants.update(named)
        source = output
    return nodes, constants

"""The intermediate representation: a network as a small graph of plain layers, with the quantization parameters of
every tensor. Equalization and exporters use it; :mod:`mgq.graph.network_reader` reads networks into it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from mgq.quantization.activations import Activation
from mgq.zoo.blueprint import LARGEST as LARGEST
from mgq.zoo.blueprint import MOVES, border_values

Array = npt.NDArray[np.float32]
Integers = npt.NDArray[Any]
PIXEL_ZERO, UINT8_MAX = 128, 255


@dataclass(frozen=True)
class QuantParams:
    """int8 or uint8 values ``qmin`` to ``qmax`` that stand for multiples of ``scale``; zero is 0.

    Values beyond are saturated, which also is the activation of a layer: nothing below 0 behind a ReLU.
    """

    scale: float
    qmin: int = -128
    qmax: int = 127

    @property
    def zero_point(self) -> int:
        """That of uint8: what lies below 0 lies below it."""
        if self.qmin >= 0:
            return 0
        return -self.qmin if self.qmax - self.qmin == UINT8_MAX else PIXEL_ZERO

    def refine(self) -> QuantParams:
        """The grid for means of values on this one: half the step, where uint8 has enough levels; else the same."""
        if (self.qmin, self.qmax) == (0, 127):
            return QuantParams(self.scale / 2, 0, 255)
        return self


@dataclass(frozen=True)
class Node:
    """One operation: names of the tensors that it reads and of the one that it makes."""

    inputs: tuple[str, ...]
    output: str


@dataclass(frozen=True)
class WeightedNode(Node):
    """A convolution or a linear layer: ``weight`` float32 (O, C / groups, H, W) or (O, I), ``bias`` float32 (O,).

    In an int8 network ``integers`` times ``scales``, one or one for each output, is what it computes with; a layer
    kept in float has neither.
    """

    weight: Array
    bias: Array | None
    integers: Integers | None
    scales: Array | None


@dataclass(frozen=True)
class Convolution(WeightedNode):
    stride: tuple[int, int]
    padding: tuple[int, int]
    groups: int
    activation: Activation
    padding_end: tuple[int, int] | None = None  # below and to the right, where it is not ``padding``
    dilation: tuple[int, int] = (1, 1)

    @property
    def is_of_single_positions(self) -> bool:
        """Whether each output is made of the channels at its own place alone."""
        is_plain = self.weight.shape[2:] == (1, 1) and self.stride == (1, 1)
        return is_plain and not any((*self.padding, *(self.padding_end or ())))


@dataclass(frozen=True)
class Linear(WeightedNode):
    pass


@dataclass(frozen=True)
class RowProduct(WeightedNode):
    """A linear layer over the last axis of rows, (N, ..., I) -> (N, ..., O).

    ``counts_from_zero``: it reads integers as if their zero point were 0, and its bias makes up for that.
    """

    counts_from_zero: bool = False


@dataclass(frozen=True)
class JoinedNorm(Node):
    """Integers, from 0 on, of all ``inputs`` joined along the channels, times a ``scale`` and with a ``shift``, float32
    (C,): a norm of what they stand for."""

    scale: Array
    shift: Array


@dataclass(frozen=True)
class Add(Node):
    relu: bool


@dataclass(frozen=True)
class MaxPool(Node):
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]


@dataclass(frozen=True)
class GlobalAverage(Node):
    pass


@dataclass(frozen=True)
class Reshape(Node):
    """To ``shape``, whose first axis is the batch."""

    shape: tuple[int, ...]


@dataclass(frozen=True)
class Transpose(Node):
    axes: tuple[int, ...]


@dataclass(frozen=True)
class Operation(Node):
    """A layer of an imported network, of a ``kind`` with ``options`` (see :mod:`mgq.zoo.blueprint`).

    ``constants`` are float32, by their names.
    """

    kind: str
    options: Mapping[str, Any]
    constants: Mapping[str, Array] = field(default_factory=dict)

    @property
    def border(self) -> tuple[float, ...]:
        """Of a ``pad``: what it puts around a picture, one value or one for each channel."""
        return border_values(self.options)

    @property
    def moves(self) -> bool:
        """Whether values are only moved or chosen: they are the same integers as before."""
        return self.kind in MOVES


@dataclass(frozen=True)
class Graph:
    """``nodes`` in the order in which they run, from ``input`` (N, 3, S, S) to ``output`` (N, classes).

    ``grids``: name of a tensor -> its grid; tensors without one are float32. ``shapes`` are those for a batch of 1.
    """

    nodes: tuple[Node, ...]
    input: str
    output: str
    grids: dict[str, QuantParams]
    shapes: dict[str, tuple[int, ...]]


def readers_in(graph: Graph) -> dict[str, list[Node]]:
    """Name of a tensor -> the nodes that read it."""
    found: dict[str, list[Node]] = {name: [] for name in (graph.input, *(node.output for node in graph.nodes))}
    for node in graph.nodes:
        for name in node.inputs:
            found[name].append(node)
    return found


def macs_of(graph: Graph) -> int:
    """How often the convolutions and linear layers of ``graph`` multiply and add for one picture."""
    return sum(macs_in(node, graph) for node in graph.nodes if isinstance(node, WeightedNode))


def macs_in(node: WeightedNode, graph: Graph) -> int:
    """The same of one layer."""
    return node.weight.size * int(np.prod(graph.shapes[node.output][2:]))


def products_per_number(node: WeightedNode, graph: Graph) -> float:
    """How often ``node`` multiplies for each number that it reads or writes, weights among them."""
    moved = sum(int(np.prod(graph.shapes[name])) for name in (*node.inputs, node.output)) + node.weight.size
    return macs_in(node, graph) / moved


def is_followed(graph: Graph, node: Node) -> bool:
    """Whether the channels behind ``node`` are those before it, pooled or in another order."""
    if isinstance(node, MaxPool | GlobalAverage):
        return True
    if not isinstance(node, Reshape | Transpose):
        return False
    before, behind = graph.shapes[node.inputs[0]], graph.shapes[node.output]
    if isinstance(node, Transpose):
        return len(before) > 4 and node.axes[0] == 0 and node.axes[-2:] == (len(before) - 2, len(before) - 1)
    if len(before) >= 4 and len(behind) >= 4:
        return before[-2:] == behind[-2:]
    return before[1] == behind[1] and before[1] == np.prod(before[1:]) == np.prod(behind[1:])


def channels_in(shape: tuple[int, ...]) -> int:
    """How many channels a tensor of ``shape`` has: of more than four axes all but the batch and the last two are."""
    return int(np.prod(shape[1:-2])) if len(shape) > 4 else shape[1]


def pair(value: Any) -> tuple[int, int]:
    height, width = value if isinstance(value, tuple | list) else (value, value)
    return int(height), int(width)

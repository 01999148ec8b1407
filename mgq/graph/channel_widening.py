"""Channels in whole vectors, with zeros that nothing reads: the same integers, sooner in ONNX Runtime.

Its int8 kernel for depthwise convolutions takes 16 channels at a time and the others one by one: 20 of them, 56x56,
take 214 µs, 32 take 57. Its products of matrices are as slow where channels are few or no multiple of 4.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import prod
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from mgq.graph.layer_graph import (
    Add,
    Convolution,
    GlobalAverage,
    Graph,
    Linear,
    MaxPool,
    Node,
    Operation,
    Reshape,
    WeightedNode,
)
from mgq.zoo.blueprint import ACTIVATIONS

Weighted = TypeVar("Weighted", bound=WeightedNode)

LANES = 16
"""Channels that are computed at once."""
EVEN = 4
"""Of so many channels products of matrices come in whole vectors."""
MOST_TIMES = 4
"""How many times wider a tensor becomes at most."""
CHANNELWISE = ACTIVATIONS | {"add", "mul", "global_avg", "avg_pool", "max_pool", "round", "limit"}
"""Kinds of layers that make each channel of the same one of what they read."""


def widen_channels(graph: Graph) -> Graph:
    """``graph`` with int8 convolutions of ``LANES`` channels, or a multiple, where that is sooner and all that reads
    or makes the tensor can have more of them: their weights are 0. The same object where there are none."""
    makers, widths = {node.output: node for node in graph.nodes}, dict[str, int]()
    for group in group_tensors(graph):
        widths |= find_widths(group, graph, makers)
    if not widths:
        return graph
    nodes = tuple(widen(node, graph, widths) for node in graph.nodes)
    shapes = {
        name: (shape[0], widths[name], *shape[2:]) if name in widths else shape for name, shape in graph.shapes.items()
    }
    return replace(graph, nodes=nodes, shapes=shapes)


def group_tensors(graph: Graph) -> list[set[str]]:
    """Tensors whose channels are the same ones, in groups: without those that have to stay as they are."""
    group_of: dict[str, set[str]] = {}
    fixed = {graph.input, graph.output}
    for node in graph.nodes:
        for name in (*node.inputs, node.output):
            group_of.setdefault(name, {name})
        if follows_channels(node, graph):
            group = set().union(*(group_of[name] for name in (*node.inputs, node.output)))
            group_of |= dict.fromkeys(group, group)
        elif not mixes_channels(node):
            fixed |= {*node.inputs, node.output}
        elif isinstance(node, Linear):
            fixed.add(node.output)
    groups = {id(group): group for group in group_of.values()}
    return [group for group in groups.values() if not group & fixed]


def mixes_channels(node: Node) -> bool:
    """Whether each channel that ``node`` makes is of all those that it reads, with weights."""
    return isinstance(node, Linear) or (isinstance(node, Convolution) and node.groups == 1)


def is_depthwise(node: Node) -> bool:
    return isinstance(node, Convolution) and node.groups == len(node.weight) > 1 and node.weight.shape[1] == 1


def follows_channels(node: Node, graph: Graph) -> bool:
    """Whether each channel that ``node`` makes is of the same one of all that it reads."""
    shapes = [graph.shapes[name] for name in (*node.inputs, node.output)]
    if len({shape[1:2] for shape in shapes}) != 1:
        return False
    if isinstance(node, Reshape):
        return all(prod(shape) == shape[1] for shape in shapes)
    if isinstance(node, Operation):
        is_plain_pad = node.kind == "pad" and len(node.border) == 1 and "channels" not in node.options
        return is_plain_pad or (node.kind in CHANNELWISE and not node.constants)
    return isinstance(node, Add | GlobalAverage | MaxPool) or is_depthwise(node)


def find_widths(group: set[str], graph: Graph, makers: Mapping[str, Node]) -> dict[str, int]:
    """Name -> how many channels the tensors of ``group`` get; nothing where they keep theirs."""
    channels = graph.shapes[next(iter(group))][1]
    wide = -(-channels // LANES) * LANES
    convolutions = [node for name in group if is_int8_convolution(node := makers[name], graph)]
    is_sooner = channels < LANES or channels % EVEN or any(map(is_depthwise, convolutions))
    if wide == channels or wide > MOST_TIMES * channels or not convolutions or not is_sooner:
        return {}
    return dict.fromkeys(group, wide)


def is_int8_convolution(node: Node, graph: Graph) -> bool:
    """Whether ``node`` is one of more than a single position, whose time is not all overhead."""
    return isinstance(node, Convolution) and node.integers is not None and prod(graph.shapes[node.output][2:]) > 1


def widen(node: Node, graph: Graph, widths: dict[str, int]) -> Node:
    """``node`` with as many channels as the tensors have that it reads and makes."""
    if isinstance(node, Reshape) and node.output in widths:
        return replace(node, shape=(node.shape[0], widths[node.output], *node.shape[2:]))
    if not isinstance(node, Convolution | Linear) or not {node.inputs[0], node.output} & widths.keys():
        return node
    outputs = widths.get(node.output, len(node.weight))
    if isinstance(node, Convolution) and is_depthwise(node):
        return replace(widen_weights(node, outputs, 1), groups=outputs)
    return widen_weights(node, outputs, widths.get(node.inputs[0], node.weight.shape[1]))


def widen_weights(node: Weighted, outputs: int, inputs: int) -> Weighted:
    """``node`` with weights of 0 for what it has not had yet."""

    def add_zeros(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        sizes = (outputs, inputs, *values.shape[2:])[: values.ndim]
        return np.pad(values, [(0, size - own) for own, size in zip(values.shape, sizes, strict=True)])

    return replace(
        node,
        weight=add_zeros(node.weight),
        bias=None if node.bias is None else add_zeros(node.bias),
        integers=None if node.integers is None else add_zeros(node.integers),
        scales=widen_scales(node.scales, outputs),
    )


def widen_scales(scales: npt.NDArray[Any] | None, outputs: int) -> npt.NDArray[Any] | None:
    """``scales``, one for all or one for each output, with 1 for the outputs that are new."""
    if scales is None or scales.size == 1:
        return scales
    return np.pad(scales, (0, outputs - scales.size), constant_values=1)

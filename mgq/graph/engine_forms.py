"""Adapts a graph to the int8 kernels of an engine: where values are rounded between layers, and by which operators.

Engines have different int8 kernels. OpenVINO computes an activation at the end of a convolution's kernel, in float, and
rounds once behind it. ONNX Runtime needs integers behind every convolution, and has kernels that read and give integers
for a sigmoid and for products. What suits one of them makes the other slower than float32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType

from mgq.graph.layer_graph import UINT8_MAX, Convolution, Graph, Node, Operation, QuantParams, Transpose
from mgq.quantization.option_names import ANY_ENGINE, FOR_ONNXRUNTIME, FOR_OPENVINO
from mgq.zoo.blueprint import ACTIVATIONS, FLOAT

SATURATED = 3.0
"""Beyond it a hard swish is 0 or the identity."""
GATE = QuantParams(1 / UINT8_MAX, 0, UINT8_MAX)
"""Of a sigmoid: 255 steps are exactly 1."""


def adapt_to_engine(graph: Graph, engine: str) -> Graph:
    """``graph`` in the form for ``engine``, a key of ``FORMS``; the same object where it needs no other."""
    return FORMS[engine](graph)


def as_it_is(graph: Graph) -> Graph:
    return graph


def move_activations_behind_convolutions(graph: Graph) -> Graph:
    """``graph`` without the rounding between a convolution and the activations that alone read it."""
    readers = readers_in(graph)
    left_out = {
        node.output
        for node in graph.nodes
        if isinstance(node, Convolution) and node.output in graph.grids and is_activated(readers[node.output])
    }
    if not left_out:
        return graph
    return replace(graph, grids={name: grid for name, grid in graph.grids.items() if name not in left_out})


def readers_in(graph: Graph) -> dict[str, list[Node]]:
    """Name of a tensor -> the nodes that read it."""
    found: dict[str, list[Node]] = {name: [] for name in (graph.input, *(node.output for node in graph.nodes))}
    for node in graph.nodes:
        for name in node.inputs:
            found[name].append(node)
    return found


def round_behind_transpositions(graph: Graph) -> Graph:
    """``graph`` with outputs of float layers rounded after their transposition instead of before it.

    OpenVINO runs a convolution in float that reads transposed integers with a zero point.
    """
    readers, grids = readers_in(graph), dict(graph.grids)
    for node in graph.nodes:
        reading = readers[node.output]
        is_float = isinstance(node, Operation) and node.kind in FLOAT
        if is_float and node.output in grids and reading and all(isinstance(other, Transpose) for other in reading):
            del grids[node.output]
    return replace(graph, grids=grids) if len(grids) < len(graph.grids) else graph


def for_openvino(graph: Graph) -> Graph:
    return round_behind_transpositions(move_activations_behind_convolutions(graph))


def is_activated(readers: list[Node]) -> bool:
    return bool(readers) and all(isinstance(node, Operation) and node.kind in ACTIVATIONS for node in readers)


def swishes_on_integers(graph: Graph) -> Graph:
    """``graph`` with each SiLU and hard swish as a product of integers, by a gate that is on a grid of its own.

    The gate of a SiLU is a sigmoid, for which there is a table. That of a hard swish is the integers themselves, within
    limits, on another grid: that needs a grid on which -3 is.
    """
    nodes: list[Node] = []
    grids, shapes = dict(graph.grids), dict(graph.shapes)
    for node in graph.nodes:
        gate = gate_of(node, graph)
        if gate is None:
            nodes.append(node)
            continue
        layer, grid = gate
        grids[layer.output], shapes[layer.output] = grid, shapes[node.output]
        nodes += [layer, Operation((node.inputs[0], layer.output), node.output, "mul", {})]
    return replace(graph, nodes=tuple(nodes), grids=grids, shapes=shapes) if len(nodes) > len(graph.nodes) else graph


def gate_of(node: Node, graph: Graph) -> tuple[Operation, QuantParams] | None:
    """The layer by which what ``node`` reads is multiplied, and its grid; None where ``node`` is no such product."""
    if not isinstance(node, Operation) or not {node.inputs[0], node.output} <= graph.grids.keys():
        return None
    output = f"{node.output}/gate"
    if node.kind == "silu":
        return Operation(node.inputs, output, "sigmoid", {}), GATE
    grid = graph.grids[node.inputs[0]]
    zero, reach = grid.zero_point, round(SATURATED / grid.scale)
    lowest = zero - reach
    if node.kind != "hard_swish" or lowest < 0 or reach < 1:
        return None
    limits = {"low": lowest, "high": min(zero + reach, UINT8_MAX)}
    return Operation(node.inputs, output, "limit", limits), QuantParams(0.5 / reach, -lowest, UINT8_MAX - lowest)


FORMS: Mapping[str, Callable[[Graph], Graph]] = MappingProxyType(
    {
        ANY_ENGINE: as_it_is,
        FOR_OPENVINO: for_openvino,
        FOR_ONNXRUNTIME: swishes_on_integers,
    }
)
"""Key of an engine -> what changes a graph for it; ``any`` is no slower than float32 in each."""

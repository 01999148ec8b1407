"""Adapts a graph to the int8 kernels of an engine: where values are rounded between layers, and by which operators.

Engines have different int8 kernels. OpenVINO computes an activation or a product at the end of a convolution's kernel,
in float, and rounds once behind it. ONNX Runtime needs integers behind every convolution, and has kernels that read and
give integers for a sigmoid and for products. What suits one of them makes the other slower than float32. In both, small
layers that multiply little for each number that they move may gain nothing from integers.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from operator import is_
from types import MappingProxyType

from mgq.graph.channel_widening import widen_channels
from mgq.graph.joined_axes import is_scale, join_leading_axes
from mgq.graph.layer_graph import (
    UINT8_MAX,
    Graph,
    MaxPool,
    Node,
    Operation,
    QuantParams,
    Reshape,
    Transpose,
    WeightedNode,
    products_per_number,
    readers_in,
)
from mgq.graph.norms_behind_joins import join_for_norms
from mgq.graph.row_products import count_from_zero, multiply_rows
from mgq.quantization.option_names import ANY_ENGINE, FOR_ONNXRUNTIME, FOR_OPENVINO
from mgq.zoo.blueprint import ACTIVATIONS, FLOAT

SATURATED = 3.0
"""Beyond it a hard swish is 0 or the identity."""
GATE = QuantParams(1 / UINT8_MAX, 0, UINT8_MAX)
"""Of a sigmoid: 255 steps are exactly 1."""
FLOAT_IN_OPENVINO = ACTIVATIONS | FLOAT | {"mul"}
"""Kinds of layers that OpenVINO computes in float, at the end of a convolution's kernel where it can."""
AVERAGES = frozenset({"global_avg", "avg_pool"})


def adapt_to_engine(graph: Graph, engine: str, float_share: float = 0.0) -> Graph:
    """``graph`` in the form for ``engine``, a key of ``FORMS``; the same object where it needs no other.

    ``float_share``, where it is not 0: see :func:`leave_small_layers_in_float`.
    """
    formed = FORMS[engine](leave_small_layers_in_float(graph, float_share) if float_share else graph)
    return join_leading_axes(round_before_rounded_joins(formed))


def has_own_form(graph: Graph, engine: str) -> bool:
    """Whether the form of ``graph`` for ``engine`` is another than that for any engine."""
    return outline(adapt_to_engine(graph, engine)) != outline(adapt_to_engine(graph, ANY_ENGINE))


def outline(graph: Graph) -> tuple[object, ...]:
    """What tells forms of one network apart: kinds of layers, what they read and make, and all grids and shapes."""
    layers = (
        (type(node), node.inputs, node.output, isinstance(node, WeightedNode) and node.integers is not None)
        for node in graph.nodes
    )
    return (*layers, graph.grids, graph.shapes)


def leave_small_layers_in_float(graph: Graph, share: float) -> Graph:
    """``graph`` with integers in convolutions and linear layers alone, without the ``share`` of them, below 1, that
    multiply least for each number that they move: all else is computed in float32.
    """
    weighted = [node for node in graph.nodes if isinstance(node, WeightedNode)]
    weighted.sort(key=lambda node: products_per_number(node, graph))
    kept = {node.output for node in weighted[int(share * len(weighted)) :]}
    return leave_in_float(graph, {node.output for node in graph.nodes} - kept)


def leave_in_float(graph: Graph, layers: Collection[str]) -> Graph:
    """``graph`` with the layers that make ``layers`` computed in float32: what only they read is not rounded for them.

    The same object where they read no integers.
    """
    rounded = find_rounded(graph, layers)
    nodes = tuple(
        replace(node, integers=None, scales=None)
        if isinstance(node, WeightedNode) and node.output in layers and node.integers is not None
        else node
        for node in graph.nodes
    )
    if all(map(is_, nodes, graph.nodes)) and rounded >= graph.grids.keys():
        return graph
    return replace(graph, nodes=nodes, grids={name: grid for name, grid in graph.grids.items() if name in rounded})


def find_rounded(graph: Graph, layers: Collection[str]) -> frozenset[str]:
    """The tensors with a grid that others than ``layers`` read as integers, moved or not, and the pictures."""
    readers, found = readers_in(graph), {graph.input, graph.output}

    def reads_integers(node: Node) -> bool:
        return node.output in found if moves(node) else node.output not in layers

    for node in reversed(graph.nodes):
        if any(map(reads_integers, readers[node.output])):
            found.add(node.output)
    for node in graph.nodes:
        if moves(node) and node.inputs[0] in graph.grids:
            (found.add if node.inputs[0] in found else found.discard)(node.output)
    return frozenset(found)


def moves(node: Node) -> bool:
    """Whether ``node`` only moves or chooses values, so that its output lies on the grid of its input."""
    return isinstance(node, MaxPool | Reshape | Transpose) or (isinstance(node, Operation) and node.moves)


def round_before_own_joins(graph: Graph) -> Graph:
    """``graph`` with what is only joined put on the grid of the whole beforehand: joining moves integers then.

    The numbers are the same. OpenVINO rounds a joined tensor outside of any kernel, in five times the time; what a
    convolution made it rounds in the convolution's. A part that several layers read stays: ONNX Runtime joins grids in
    one kernel, and would have more to do. Its own form rounds no part beforehand.
    """
    readers = readers_in(graph)
    return round_before_joins(graph, lambda name, _: name in graph.grids and len(readers[name]) == 1)


def round_before_all_joins(graph: Graph) -> Graph:
    """The same of all parts, whoever reads them besides."""
    return round_before_joins(graph, lambda name, _: name in graph.grids)


def round_before_rounded_joins(graph: Graph) -> Graph:
    """The same of all parts of a whole that is rounded to another grid next.

    OpenVINO 2025.4.1 ends in a segmentation fault where it rounds such a whole to a grid with a zero point.
    """
    readers = readers_in(graph)

    def is_taken(_: str, whole: str) -> bool:
        reading = readers[whole]
        return graph.grids[whole].zero_point != 0 and len(reading) == 1 and is_rounding(reading[0], graph)

    adapted = round_before_joins(graph, is_taken)
    return graph if adapted is graph else round_before_rounded_joins(adapted)


def is_rounding(node: Node, graph: Graph) -> bool:
    """Whether ``node`` does no more than to scale, cut off and round."""
    is_plain = isinstance(node, Operation) and (node.kind in ("relu", "round") or is_scale(node))
    return is_plain and node.output in graph.grids


def round_before_joins(graph: Graph, is_taken: Callable[[str, str], bool]) -> Graph:
    """``graph`` with what is joined on the grid of the whole, where all parts that are not are ``is_taken``, of which
    they and the whole are told."""
    nodes: list[Node] = []
    grids, shapes = dict(graph.grids), dict(graph.shapes)
    for node in graph.nodes:
        parts = list_parts_on_other_grids(node, graph)
        if all(is_taken(name, node.output) for name in parts):
            rounded = {name: Operation((name,), f"{name}/for/{node.output}", "round", {}) for name in parts}
            nodes += rounded.values()
            grids |= {layer.output: grids[node.output] for layer in rounded.values()}
            shapes |= {layer.output: shapes[name] for name, layer in rounded.items()}
            node = replace(
                node, inputs=tuple(rounded[name].output if name in rounded else name for name in node.inputs)
            )
        nodes.append(node)
    return replace(graph, nodes=tuple(nodes), grids=grids, shapes=shapes) if len(nodes) > len(graph.nodes) else graph


def list_parts_on_other_grids(node: Node, graph: Graph) -> tuple[str, ...]:
    """What ``node`` joins that does not lie on the grid of the whole; nothing where that has none."""
    if not isinstance(node, Operation) or node.kind != "concat" or node.output not in graph.grids:
        return ()
    whole = graph.grids[node.output]
    return tuple(dict.fromkeys(name for name in node.inputs if graph.grids.get(name) != whole))


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
    joined = round_before_all_joins(join_for_norms(multiply_rows(graph)))
    return count_from_zero(round_behind_transpositions(compute_gates_in_float(joined)))


def compute_gates_in_float(graph: Graph) -> Graph:
    """``graph`` with activations and products in float32, and so the averages from which gates are made.

    Rounding is left to the layers that read integers: convolutions, sums and joins.
    """
    readers = readers_in(graph)

    def is_float(node: Node) -> bool:
        if not isinstance(node, Operation):
            return False
        is_for_gate = node.kind in AVERAGES and len(readers[node.inputs[0]]) > 1
        return node.kind in FLOAT_IN_OPENVINO or is_for_gate

    return leave_in_float(graph, [node.output for node in graph.nodes if is_float(node)])


def for_any_engine(graph: Graph) -> Graph:
    return round_behind_transpositions(round_before_own_joins(multiply_rows(graph)))


def for_onnxruntime(graph: Graph) -> Graph:
    return widen_channels(swishes_on_integers(multiply_rows(graph, in_float=True)))


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
        ANY_ENGINE: for_any_engine,
        FOR_OPENVINO: for_openvino,
        FOR_ONNXRUNTIME: for_onnxruntime,
    }
)
"""Key of an engine -> what changes a graph for it; ``any`` is what serves all of them best."""

FIXED_BATCHES: Mapping[str, int] = MappingProxyType({FOR_OPENVINO: 1})
"""Key of an engine -> the pictures that its own file takes at a time, where it runs that sooner than one for any
number: OpenVINO joins more layers to a kernel, and moves less, where it knows all sizes."""

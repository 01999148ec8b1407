"""Reads what is joined for a norm from the grids of its parts, each of which is rounded once then.

DenseNet joins what a convolution makes with all that was made before, for each layer anew, and has a norm behind each
join. With a grid for each join its parts would be rounded for each of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from mgq.graph.layer_graph import Convolution, Graph, JoinedNorm, Node, Operation, readers_in


def join_for_norms(graph: Graph) -> Graph:
    """``graph`` with each join that a norm alone reads, and this norm, as one layer that reads the integers of the
    parts; the same object where it has none. Nothing is rounded to the grid of the whole."""
    readers, makers = readers_in(graph), {node.output: node for node in graph.nodes}
    written: dict[str, Node] = {}
    dropped: set[str] = set()
    for node in graph.nodes:
        join = makers.get(node.inputs[0])
        if is_norm(node, graph) and is_join_of_integers(join, graph, readers):
            assert isinstance(node, Convolution) and join is not None
            written[node.output] = join_norm(node, join, graph)
            dropped.add(join.output)
    if not written:
        return graph
    nodes = tuple(written.get(node.output, node) for node in graph.nodes if node.output not in dropped)
    return replace(graph, nodes=nodes, grids={name: grid for name, grid in graph.grids.items() if name not in dropped})


def is_join_of_integers(node: Node | None, graph: Graph, readers: Mapping[str, Sequence[Node]]) -> bool:
    if not isinstance(node, Operation) or node.kind != "concat" or len(readers[node.output]) > 1:
        return False
    channels = sum(graph.shapes[name][1] for name in node.inputs)
    return channels == graph.shapes[node.output][1] and {*node.inputs, node.output} <= graph.grids.keys()


def is_norm(node: Node, graph: Graph) -> bool:
    """Whether ``node`` multiplies each channel by an integer, and its activation is the saturation of its grid."""
    return (
        isinstance(node, Convolution)
        and node.integers is not None
        and node.groups == node.weight.shape[0] == graph.shapes[node.inputs[0]][1]
        and node.is_of_single_positions
        and node.output in graph.grids
    )


def join_norm(node: Convolution, join: Node, graph: Graph) -> JoinedNorm:
    """The norm ``node`` of the integers that ``join`` joins, by the weights that its own integers stand for."""
    assert node.integers is not None and node.scales is not None
    counts = [(graph.grids[name], graph.shapes[name][1]) for name in join.inputs]
    steps = np.concatenate([np.full(channels, grid.scale) for grid, channels in counts])
    zero_points = np.concatenate([np.full(channels, grid.zero_point) for grid, channels in counts])
    scale = node.integers[:, 0, 0, 0] * node.scales.astype(np.float64).reshape(-1) * steps
    shift = (0.0 if node.bias is None else node.bias.astype(np.float64)) - scale * zero_points
    return JoinedNorm(join.inputs, node.output, scale.astype(np.float32), shift.astype(np.float32))

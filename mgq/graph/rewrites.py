"""Exact rewrites of a graph at export: other operations with the same results that are faster on some processors.

Which of them pay depends on how a processor's speed of multiplying compares with that of moving memory: they are for
:mod:`mgq.bench.tune`, which measures.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from operator import is_
from types import MappingProxyType

import numpy as np

from mgq.graph.layer_graph import Convolution, Graph, Integers, Node, Reshape, Transpose

SHUFFLE = (Reshape, Transpose, Reshape)
LANES, MOST_MERGED = 16, 4
"""How many channels a group has at least where groups are merged, but for that no more than so many are."""


def without_shuffles(graph: Graph, most: float = math.inf) -> Graph:
    """``graph`` with channel shuffles folded into the convolutions before them, where that costs at most ``most``.

    It is done where a 1x1 convolution, a depthwise one, or none, and a shuffle follow each other. The 1x1 convolution
    becomes a dense one, zero outside of its groups, whose outputs come in the shuffled order, and the depthwise one
    takes them so: no memory is moved, and wide matrix products keep the processor busier than narrow ones. All sums
    are of the same products and zeros, so integers are the same; float sums may be added up in another order. The cost
    is what is multiplied with those zeros for each number that is no longer moved.
    """
    nodes: list[Node] = []
    grids, shapes = dict(graph.grids), dict(graph.shapes)
    left = list(graph.nodes)
    while left:
        found = shuffle_ahead(graph, left, most)
        if found is None:
            nodes.append(left.pop(0))
            continue
        sequence, order = found
        del left[: len(sequence)]
        convolutions = [reorder_outputs(node, order) for node in sequence if isinstance(node, Convolution)]
        convolutions[-1] = replace(convolutions[-1], output=sequence[-1].output)
        if len(convolutions) > 1:
            # In another order it is another tensor, and is not to be taken for the layer's own output.
            before = sequence[0].output
            between = f"{before}/shuffled"
            convolutions[0] = replace(convolutions[0], output=between)
            convolutions[1] = replace(convolutions[1], inputs=(between,))
            shapes[between] = shapes[before]
            if before in grids:
                grids[between] = grids[before]
        nodes += convolutions
    if len(nodes) == len(graph.nodes):
        return graph
    return replace(graph, nodes=tuple(nodes), grids=grids, shapes=shapes)


def shuffle_ahead(graph: Graph, left: list[Node], most: float) -> tuple[list[Node], list[int]] | None:
    """The sequence at the beginning of ``left`` that a shuffle ends, and the order that it makes.

    None where there is no such sequence, or folding costs more than ``most``.
    """
    for depthwise in (0, 1):
        sequence = left[: 1 + depthwise + len(SHUFFLE)]
        order = order_behind(graph, sequence, depthwise)
        if order is not None and cost_of(graph, sequence) <= most:
            return sequence, order
    return None


def order_behind(graph: Graph, nodes: list[Node], depthwise: int) -> list[int] | None:
    """The order that the shuffle at the end of ``nodes`` gives the channels; None where they are no such sequence.

    Nobody else may read what lies between.
    """
    first, middle, shuffle = nodes[0], nodes[1 : 1 + depthwise], nodes[1 + depthwise :]
    if tuple(type(node) for node in shuffle) != SHUFFLE:
        return None
    if not isinstance(first, Convolution) or first.weight.shape[2:] != (1, 1):
        return None
    if not all(isinstance(node, Convolution) and node.weight.shape[1] == 1 and node.groups > 1 for node in middle):
        return None
    made = [node.output for node in nodes[:-1]]
    if [node.inputs for node in graph.nodes if set(node.inputs) & set(made)] != [(name,) for name in made]:
        return None
    channels = first.weight.shape[0]
    numbers = np.arange(channels).reshape(1, channels, 1, 1)
    for node in shuffle:
        if isinstance(node, Reshape):
            numbers = numbers.reshape(1, *node.shape[1:-2], 1, 1)
        elif isinstance(node, Transpose):
            numbers = numbers.transpose(node.axes)
    return [int(number) for number in numbers.ravel()] if numbers.shape == (1, channels, 1, 1) else None


def cost_of(graph: Graph, nodes: list[Node]) -> float:
    """Products with zeros in the first of ``nodes``, made dense, for each number that the last one moves."""
    first = nodes[0]
    assert isinstance(first, Convolution)
    inputs = first.weight.shape[1]
    made, moved = (int(np.prod(graph.shapes[node.output][2:])) for node in (first, nodes[-1]))
    return inputs * (first.groups - 1) * made / moved


def reorder_outputs(node: Convolution, order: list[int]) -> Convolution:
    """``node`` with its outputs in ``order``: a dense one, or a depthwise one, whose inputs come in that order, too."""
    is_depthwise = node.weight.shape[1] == 1 and node.groups > 1
    groups = 1 if is_depthwise else node.groups
    scales = node.scales
    return replace(
        node,
        weight=to_dense(node.weight, groups)[order],
        bias=None if node.bias is None else node.bias[order],
        integers=None if node.integers is None else to_dense(node.integers, groups)[order],
        scales=scales[order] if scales is not None and len(scales) > 1 else scales,
        groups=node.groups if is_depthwise else 1,
    )


def to_dense(weight: Integers, groups: int) -> Integers:
    """Weights (O, C / groups, H, W) of a grouped convolution as those of a dense one, (O, C, H, W), zeros elsewhere."""
    outputs, inputs = weight.shape[0] // groups, weight.shape[1]
    whole = np.zeros((weight.shape[0], inputs * groups, *weight.shape[2:]), weight.dtype)
    for group in range(groups):
        rows = slice(group * outputs, (group + 1) * outputs)
        whole[rows, group * inputs : (group + 1) * inputs] = weight[rows]
    return whole


def merge_narrow_groups(graph: Graph) -> Graph:
    """``graph`` with int8 convolutions of groups that are narrower than ``LANES`` channels, but not depthwise ones, in
    fewer groups that are wider: the weights of one lie beside zeros for the others. The sums are of the same products
    and zeros, so integers are the same. ONNX Runtime runs a group after the other, a kernel of matrix products each.
    """
    nodes = tuple(merge_groups_of(node) if isinstance(node, Convolution) else node for node in graph.nodes)
    return graph if all(map(is_, nodes, graph.nodes)) else replace(graph, nodes=nodes)


def merge_groups_of(node: Convolution) -> Convolution:
    width = node.weight.shape[1]
    if node.integers is None or node.groups == 1 or not 1 < width < LANES:
        return node
    factors = [factor for factor in range(2, MOST_MERGED + 1) if node.groups % factor == 0]
    if not factors:
        return node
    factor = next((factor for factor in factors if factor * width >= LANES), factors[-1])
    groups = node.groups // factor

    def merge(weight: Integers) -> Integers:
        return np.concatenate([to_dense(part, factor) for part in np.split(weight, groups)])

    return replace(node, weight=merge(node.weight), integers=merge(node.integers), groups=groups)


def stem_on_half_the_grid(graph: Graph) -> Graph:
    """``graph`` with a first convolution of stride 2 as one of stride 1 on pictures of half the side.

    Each 2x2 pixels become one of four times the channels (space to depth), and the kernel's weights go where their
    pixels went, zeros in between. The products that are summed are the same.
    """
    stem = graph.nodes[0]
    if not isinstance(stem, Convolution) or stem.stride != (2, 2) or stem.groups != 1 or stem.padding_end is not None:
        return graph
    grid = graph.grids.get(graph.input)
    if grid is None or stem.padding[0] != stem.padding[1] or stem.weight.shape[2] != stem.weight.shape[3]:
        return graph
    _, channels, height, width = graph.shapes[graph.input]
    rows, halved, depth = (f"{graph.input}/{name}" for name in ("blocks", "apart", "depth"))
    shapes = {
        rows: (1, channels, height // 2, 2, width // 2, 2),
        halved: (1, 2, 2, channels, height // 2, width // 2),
        depth: (1, 4 * channels, height // 2, width // 2),
    }
    padding, size = stem.padding[0], stem.weight.shape[2]
    first, last = -padding // 2, (size - 1 - padding) // 2
    moved = replace(
        stem,
        inputs=(depth,),
        weight=to_blocks(stem.weight, padding, first, last),
        integers=None if stem.integers is None else to_blocks(stem.integers, padding, first, last),
        stride=(1, 1),
        padding=(-first, -first),
        padding_end=(last, last),
    )
    nodes = (
        Reshape((graph.input,), rows, shapes[rows]),
        Transpose((rows,), halved, (0, 3, 5, 1, 2, 4)),
        Reshape((halved,), depth, shapes[depth]),
        moved,
        *graph.nodes[1:],
    )
    grids = {**graph.grids, **dict.fromkeys(shapes, grid)}
    return replace(graph, nodes=nodes, grids=grids, shapes={**graph.shapes, **shapes})


def to_blocks(weight: Integers, padding: int, first: int, last: int) -> Integers:
    """Weights (O, C, K, K) at stride 2 as (O, 4 C, B, B) on blocks of 2x2, from block ``first`` to ``last``."""
    outputs, channels, size, _ = weight.shape
    blocks = np.zeros((outputs, 2, 2, channels, last - first + 1, last - first + 1), weight.dtype)
    for row in range(size):
        for column in range(size):
            (down, lower), (across, right) = divmod(row - padding, 2), divmod(column - padding, 2)
            blocks[:, lower, right, :, down - first, across - first] = weight[:, :, row, column]
    return blocks.reshape(outputs, 4 * channels, *blocks.shape[-2:])


REWRITES: Mapping[str, Callable[[Graph], Graph]] = MappingProxyType(
    {"shuffles": without_shuffles, "stem": stem_on_half_the_grid}
)

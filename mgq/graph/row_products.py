"""Writes linear layers over tokens as products of matrices, where they were convolutions of one position.

A network whose channels are its second axis has them as convolutions between two transpositions, with activations
between some of them. Without the transpositions they are products of rows by matrices.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from mgq.graph.layer_graph import Convolution, Graph, Node, Operation, Reshape, RowProduct, Transpose, readers_in
from mgq.quantization.activations import IDENTITY
from mgq.zoo.blueprint import ACTIVATIONS

CHANNELS_SECOND, CHANNELS_LAST = (0, 3, 1, 2), (0, 2, 3, 1)

Layer = Convolution | Operation


def multiply_rows(graph: Graph, in_float: bool = False) -> Graph:
    """``graph`` with linear layers over tokens as products of matrices, those alone that are computed in float where
    ``in_float``; the same object where it has none.

    Convolutions take OpenVINO up to 2.4 times as long. ONNX Runtime runs those of integers up to 1.3 times as fast as
    products. Pictures whose channels come last stay convolutions, between which nothing has to be moved.
    """
    rows = RowWriter(graph)
    for node in graph.nodes:
        layers = list_layers_over_tokens(node, rows.makers, rows.readers)
        if layers and not (in_float and any(map(has_integers, layers))):
            rows.write(layers)
    return rows.finish()


class RowWriter:
    """Writes the layers of ``graph`` between two transpositions in terms of rows, without these.

    ``written``: name of a tensor -> the layer that makes it now. ``dropped``: the tensors that are no more.
    """

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.makers, self.readers = {node.output: node for node in graph.nodes}, readers_in(graph)
        self.written: dict[str, Node] = {}
        self.dropped: set[str] = set()
        self.shapes = dict(graph.shapes)

    def write(self, layers: Sequence[Layer]) -> None:
        """Write ``layers``, which are one behind the other, where the first finds its integers in front of the
        transposition."""
        last = layers[-1].output
        path = [last, self.readers[last][0].output]
        source, result = skip_reshapes(self.makers[layers[0].inputs[0]].inputs[0], path, self)
        if has_integers(layers[0]) and source not in self.graph.grids:
            return
        for layer in layers:
            output = result if layer.output == last else layer.output
            self.written[output] = over_rows(layer, source, output)
            self.shapes[output] = (*self.graph.shapes[result][:-1], self.graph.shapes[layer.output][1])
            source = output
        self.dropped.update(path[:-1])

    def finish(self) -> Graph:
        if not self.written:
            return self.graph
        nodes = [self.written.get(node.output, node) for node in self.graph.nodes if node.output not in self.dropped]
        grids = {name: grid for name, grid in self.graph.grids.items() if name not in self.dropped}
        return drop_unread_moves(replace(self.graph, nodes=tuple(nodes), grids=grids, shapes=self.shapes))


def count_from_zero(graph: Graph) -> Graph:
    """``graph`` with products of rows that read integers without their zero point. The numbers are the same.

    OpenVINO takes a zero point off in a kernel in front of the product, 2 % of the time of a small transformer.
    """
    products = {
        node.output: replace(node, counts_from_zero=True)
        for node in graph.nodes
        if isinstance(node, RowProduct) and node.integers is not None and node.inputs[0] in graph.grids
    }
    nodes = tuple(products.get(node.output, node) for node in graph.nodes)
    return replace(graph, nodes=nodes) if products else graph


def list_layers_over_tokens(
    node: Node, makers: Mapping[str, Node], readers: Mapping[str, Sequence[Node]]
) -> list[Layer]:
    """What lies between the transposition behind which ``node`` is, which puts channels second, and the one that puts
    them last again: convolutions and activations that do the same to each token. Nothing where there is more, or where
    others read of it."""
    before, found = makers.get(node.inputs[0]), list[Layer]()
    if not isinstance(before, Transpose) or before.axes != CHANNELS_SECOND:
        return found
    while isinstance(node, Convolution | Operation) and is_of_each_token(node) and len(readers[node.output]) == 1:
        found.append(node)
        (node,) = readers[node.output]
    ends = isinstance(node, Transpose) and node.axes == CHANNELS_LAST
    return found if ends and any(isinstance(layer, Convolution) for layer in found) else []


def is_of_each_token(node: Layer) -> bool:
    if isinstance(node, Operation):
        return node.kind in ACTIVATIONS
    return node.is_of_single_positions and node.groups == 1 and node.activation is IDENTITY


def has_integers(node: Layer) -> bool:
    return isinstance(node, Convolution) and node.integers is not None


def over_rows(node: Layer, source: str, output: str) -> Node:
    """``node`` for tensors whose channels come last."""
    if isinstance(node, Operation):
        return replace(node, inputs=(source,), output=output)
    weight, integers = node.weight[:, :, 0, 0], None if node.integers is None else node.integers[:, :, 0, 0]
    return RowProduct((source,), output, weight, node.bias, integers, node.scales)


def skip_reshapes(source: str, path: list[str], rows: RowWriter) -> tuple[str, str]:
    """What layers over tokens read and make, without reshapes in front of them and behind where they may do without
    both; the one behind is added to the ``path`` then."""
    shapes, maker, following = rows.graph.shapes, rows.makers.get(source), rows.readers[path[-1]]
    if not isinstance(maker, Reshape) or len(following) != 1 or not isinstance(following[0], Reshape):
        return source, path[-1]
    read, made = maker.inputs[0], following[0].output
    if shapes[read] != (*shapes[made][:-1], shapes[source][-1]):
        return source, path[-1]
    path.append(made)
    return read, made


def drop_unread_moves(graph: Graph) -> Graph:
    """``graph`` without the transpositions and reshapes that nothing reads."""
    read = {graph.output}
    for node in reversed(graph.nodes):
        if node.output in read or not isinstance(node, Transpose | Reshape):
            read.update(node.inputs)
    dead = {node.output for node in graph.nodes if isinstance(node, Transpose | Reshape) and node.output not in read}
    grids = {name: grid for name, grid in graph.grids.items() if name not in dead}
    return replace(graph, nodes=tuple(node for node in graph.nodes if node.output not in dead), grids=grids)

"""Writes attention and norms over as few axes as engines have kernels for.

A product of matrices, a softmax, or a layer norm does the same at each place of its leading axes, so that these may be
one axis. OpenVINO computes an attention in one kernel where its tensors have four axes, and a layer norm in one where
its tensor has three; with more it takes a kernel for each step.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from mgq.graph.layer_graph import Graph, Node, Operation, Reshape

Shape = tuple[int, ...]


def join_leading_axes(graph: Graph) -> Graph:
    """``graph`` with products, softmaxes and layer norms over joined axes, between reshapes; the same object where
    none has axes to join. The numbers are the same."""
    joiner = AxisJoiner(graph)
    for node in graph.nodes:
        joiner.write(node)
    return joiner.finish()


def join_shape(shape: Shape, own: int) -> Shape:
    """``shape`` with the axes between the batch and the last ``own`` as one."""
    return (shape[0], math.prod(shape[1:-own]), *shape[-own:])


class AxisJoiner:
    """Writes the nodes of ``graph`` one after the other, those with axes to join in terms of joined tensors.

    ``joined``: name of a tensor and how many of its last axes stay -> its joined form. ``apart``: name of a tensor
    that only lies joined so far -> that form.
    """

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.nodes: list[Node] = []
        self.grids, self.shapes = dict(graph.grids), dict(graph.shapes)
        self.joined: dict[tuple[str, int], str] = {}
        self.apart: dict[str, str] = {}

    def write(self, node: Node) -> None:
        own = self.count_own_axes(node)
        if not own:
            for name in node.inputs:
                self.write_whole(name)
            self.nodes.append(node)
            return
        assert isinstance(node, Operation)
        sources = tuple(self.write_joined(name, own) for name in node.inputs)
        output = self.name_joined(node.output, own)
        self.nodes.append(replace(fit_axes(node, len(self.shapes[output])), inputs=sources, output=output))
        self.apart[node.output] = output

    def count_own_axes(self, node: Node) -> int:
        """How many of its last axes ``node`` computes along, where there are more than one before them behind the
        batch; else 0."""
        if not isinstance(node, Operation):
            return 0
        shape = self.shapes[node.output]
        if node.kind == "layer_norm":
            return 1 if len(shape) > 3 else 0
        if len(shape) <= 4:
            return 0
        is_product = node.kind == "matmul" and is_of_pairs([self.shapes[name] for name in node.inputs], shape)
        is_softmax = node.kind == "softmax" and node.options["axis"] % len(shape) == len(shape) - 1
        return 2 if is_product or is_softmax or self.scales_joined(node) else 0

    def scales_joined(self, node: Operation) -> bool:
        """Whether ``node`` multiplies a product by one number."""
        return is_scale(node) and (node.inputs[0], 2) in self.joined

    def write_whole(self, name: str) -> None:
        """Let ``name`` be there with all of its axes."""
        if name in self.apart:
            self.nodes.append(Reshape((self.apart.pop(name),), name, self.shapes[name]))

    def write_joined(self, name: str, own: int) -> str:
        """The joined form of ``name``."""
        if (name, own) not in self.joined:
            self.write_whole(name)
            joined = self.name_joined(name, own)
            self.nodes.append(Reshape((name,), joined, self.shapes[joined]))
        return self.joined[name, own]

    def name_joined(self, name: str, own: int) -> str:
        joined = self.joined[name, own] = f"{name}/joined{own}"
        self.shapes[joined] = join_shape(self.shapes[name], own)
        if name in self.grids:
            self.grids[joined] = self.grids[name]
        return joined

    def finish(self) -> Graph:
        self.write_whole(self.graph.output)
        if not self.joined:
            return self.graph
        made = {self.graph.input, *(node.output for node in self.nodes)}
        grids = {name: grid for name, grid in self.grids.items() if name in made}
        return replace(self.graph, nodes=tuple(self.nodes), grids=grids, shapes=self.shapes)


def is_of_pairs(sources: list[Shape], result: Shape) -> bool:
    """Whether ``result`` is of two tensors that have a matrix at each of the same places."""
    return len(sources) == 2 and all(shape[:-2] == result[:-2] for shape in sources)


def is_scale(node: Operation) -> bool:
    """Whether ``node`` multiplies by one number, and adds one."""
    return node.kind == "affine" and all(value.size == 1 for value in node.constants.values())


def fit_axes(node: Operation, rank: int) -> Operation:
    """``node`` for tensors of ``rank`` axes: its numbers without axes of their own, and a softmax along the last."""
    if node.kind == "softmax":
        return replace(node, options={**node.options, "axis": rank - 1})
    if node.kind == "affine":
        return replace(node, constants={name: np.reshape(value, ()) for name, value in node.constants.items()})
    return node

"""ONNX operators of lists of tensors, as the nodes that they stand for where the lists are known: Split and Concat."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from mgq.graph.onnx_import.constants import attributes_of
from mgq.graph.onnx_import.operators import Operator, Scope, UnknownFormError

AXES_READ = 13
"""The opset since which Split and Squeeze read what were attributes before."""


def spell_out(node: Any, scope: Scope) -> list[Any]:
    """The nodes of tensors alone that ``node``, one of ``SEQUENCES``, stands for. A list that it gives is kept in
    ``scope``, as the names of its tensors."""
    return SEQUENCES[node.op_type](Operator(node, scope, attributes_of(node)))


def list_in(op: Operator) -> list[str]:
    name = op.inputs[0]
    if name not in op.scope.sequences:
        raise UnknownFormError("reads a list of tensors that is not known")
    return list(op.scope.sequences[name])


def place_in(op: Operator, tensors: list[str], at: int) -> int:
    """The place that the input ``at`` says, which may be counted from the end of ``tensors``."""
    place = int(op.scope.constant(op.inputs[at]))
    return place + len(tensors) if place < 0 else place


def keep(op: Operator, tensors: list[str]) -> list[Any]:
    op.scope.sequences[op.node.output[0]] = tuple(tensors)
    return []


def insert(op: Operator) -> list[Any]:
    tensors = list_in(op)
    tensors.insert(place_in(op, tensors, 2) if op.has(2) else len(tensors), op.inputs[1])
    return keep(op, tensors)


def erase(op: Operator) -> list[Any]:
    tensors = list_in(op)
    del tensors[place_in(op, tensors, 1) if op.has(1) else -1]
    return keep(op, tensors)


def take(op: Operator) -> list[Any]:
    tensors = list_in(op)
    place = place_in(op, tensors, 1)
    if not 0 <= place < len(tensors):
        raise UnknownFormError("takes a tensor that its list does not have")
    return [make_node("Identity", [tensors[place]], [op.node.output[0]])]


def count(op: Operator) -> list[Any]:
    op.scope.constants[op.node.output[0]] = np.array(len(list_in(op)), np.int64)
    return []


def join(op: Operator) -> list[Any]:
    tensors, axis = list_in(op), int(op.read_attribute("axis", 0))
    if not op.read_attribute("new_axis", 0):
        return [make_node("Concat", tensors, [op.node.output[0]], axis=axis)]
    parts = [f"{op.node.output[0]}/{place}" for place in range(len(tensors))]
    wider = [over_axis(op, "Unsqueeze", name, part, axis) for name, part in zip(tensors, parts, strict=True)]
    return [*wider, make_node("Concat", parts, [op.node.output[0]], axis=axis)]


def split(op: Operator) -> list[Any]:
    """In parts of one, of so many, or of the sizes that are given; of one without their axis where that is wanted."""
    source, output = op.inputs[0], op.node.output[0]
    shape = op.scope.constants[source].shape if op.scope.is_constant(source) else op.scope.file_shape(source)
    axis = op.axis(int(op.read_attribute("axis", 0)), len(shape))
    given = op.scope.constant(op.inputs[1]) if op.has(1) else np.array(1)
    sizes = given.tolist() if given.ndim else even_sizes(shape[axis], int(given))
    parts = [f"{output}/{place}" for place in range(len(sizes))]
    keep(op, parts)
    if op.has(1) or op.read_attribute("keepdims", 1):
        return [split_node(op, source, parts, axis, sizes)]
    whole = [f"{part}/kept" for part in parts]
    narrower = [over_axis(op, "Squeeze", name, part, axis) for name, part in zip(whole, parts, strict=True)]
    return [split_node(op, source, whole, axis, sizes), *narrower]


def even_sizes(size: int, part: int) -> list[int]:
    return [min(part, size - start) for start in range(0, size, part)]


def split_node(op: Operator, source: str, parts: list[str], axis: int, sizes: list[int]) -> Any:
    if op.scope.opset < AXES_READ:
        return make_node("Split", [source], parts, axis=axis, split=sizes)
    return make_node("Split", [source, keep_numbers(op, "split", sizes)], parts, axis=axis)


def over_axis(op: Operator, kind: str, source: str, output: str, axis: int) -> Any:
    if op.scope.opset < AXES_READ:
        return make_node(kind, [source], [output], axes=[axis])
    return make_node(kind, [source, keep_numbers(op, "axes", [axis])], [output])


def keep_numbers(op: Operator, what: str, values: list[int]) -> str:
    """The name of a constant of ``values``."""
    name = f"{op.node.output[0]}/{what}"
    op.scope.constants[name] = np.array(values, np.int64)
    return name


def make_node(kind: str, inputs: list[str], outputs: list[str], **attributes: Any) -> Any:
    import onnx

    return onnx.helper.make_node(kind, inputs, outputs, **attributes)


SEQUENCES: dict[str, Callable[[Operator], list[Any]]] = {
    "ConcatFromSequence": join,
    "SequenceAt": take,
    "SequenceConstruct": lambda op: keep(op, op.inputs),
    "SequenceEmpty": lambda op: keep(op, []),
    "SequenceErase": erase,
    "SequenceInsert": insert,
    "SequenceLength": count,
    "SplitToSequence": split,
}

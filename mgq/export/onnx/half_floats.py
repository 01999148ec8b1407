"""ONNX files of half floats, float16 or bfloat16, as files of float32 with the same numbers."""

from __future__ import annotations

from typing import Any

HALVES = {10: "float16", 16: "bfloat16"}
"""ONNX's numbers of the types."""
FLOAT = 1
TYPE_NAMES = frozenset({"to", "dtype"})
"""Attributes that hold the number of a type."""


def widen_halves(model: Any) -> str | None:
    """Let ``model``, an ``onnx.ModelProto`` without functions, compute in float32 what it computes in half floats.

    Its weights keep their type until they are read: see ``widen``. Returns the type that it had, None without any.
    """
    del model.graph.value_info[:]
    found: set[int] = set()
    widen_graph(model.graph, found)
    return HALVES[min(found)] if found else None


def widen_graph(graph: Any, found: set[int]) -> None:
    found |= {tensor.data_type for tensor in graph.initializer if tensor.data_type in HALVES}
    for value in (*graph.input, *graph.output):
        kind = value.type.tensor_type
        if kind.elem_type in HALVES:
            found.add(kind.elem_type)
            kind.elem_type = FLOAT
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.name in TYPE_NAMES and attribute.i in HALVES:
                found.add(attribute.i)
                attribute.i = FLOAT
            if attribute.HasField("t") and attribute.t.data_type in HALVES:
                found.add(attribute.t.data_type)
                attribute.t.CopyFrom(widen(attribute.t))
            if attribute.HasField("g"):
                del attribute.g.value_info[:]
                widen_graph(attribute.g, found)
                widen_weights(attribute.g)


def widen_weights(graph: Any) -> None:
    """Those of a graph inside of another, which are read where they are."""
    for tensor in graph.initializer:
        tensor.CopyFrom(widen(tensor))


def widen(tensor: Any) -> Any:
    """``tensor`` in float32 where it holds half floats, and else itself."""
    import numpy as np
    import onnx

    if tensor.data_type not in HALVES:
        return tensor
    return onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor).astype(np.float32), tensor.name)

"""ONNX models from strangers: only what a classifier of pictures needs is passed on to an engine.

ONNX has loops, branches, functions, operators of anybody's own, tensors that lie in other files, and operators that
make gigabytes of nothing. Engines are large native libraries, which meet malformed models with anything up to a crash.
So a model has to consist of a closed list of standard operators, without graphs inside, whose numbers are in reason,
with tensors that have their bytes with them, and such that the size of all that is computed is known beforehand.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np

from mgq.errors import printable
from mgq.weights.finite_values import fault_of

MOST_BYTES = 1 << 28
"""Of any tensor that is computed for one picture (or one batch, where its size is fixed)."""
_MOST_NODES = 20_000
_MOST_AXES = 8
_MOST_STEP = 4096
_SMALL = 4096
"""So many numbers a constant may have that shapes are told from."""

# fmt: off
OPERATORS = frozenset({
    "Abs", "Add", "Atan", "AveragePool", "BatchNormalization", "Cast", "Ceil", "Clip", "Concat", "Constant", "Conv",
    "ConvInteger", "Cos", "DequantizeLinear", "Div", "Dropout", "Elu", "Erf", "Exp", "Expand", "Flatten", "Floor",
    "Gather", "Gemm", "GlobalAveragePool", "GlobalMaxPool", "Greater", "HardSigmoid", "HardSwish", "Identity", "LRN",
    "LayerNormalization", "LeakyRelu", "Log", "LogSoftmax", "MatMul", "MatMulInteger", "Max", "MaxPool", "Min", "Mul",
    "Neg", "PRelu", "Pad", "Pow", "QLinearConv", "QLinearMatMul", "QuantizeLinear", "Reciprocal", "ReduceMax",
    "ReduceMean", "ReduceSum", "Relu", "Reshape", "Round", "Shape", "Sigmoid", "Sign", "Sin", "Slice", "Softmax",
    "Softplus", "Split", "Sqrt", "Squeeze", "Sub", "Tanh", "Transpose", "Unsqueeze", "Where",
})
# fmt: on
_COUNTS_FROM_1 = {"strides", "dilations", "kernel_shape", "group"}
_COUNTS_FROM_0 = {"pads", "output_padding"}
# ONNX's numbers of the types, with the bytes of an element and the field that may hold them in place of raw bytes.
_TYPES = {
    1: (4, "float_data"),
    2: (1, "int32_data"),
    3: (1, "int32_data"),
    4: (2, "int32_data"),
    5: (2, "int32_data"),
    6: (4, "int32_data"),
    7: (8, "int64_data"),
    9: (1, "int32_data"),
    10: (2, "int32_data"),
    11: (8, "double_data"),
}
_PLAIN_ATTRIBUTES = {"FLOAT", "INT", "STRING", "FLOATS", "INTS"}


class StrangeModelError(Exception):
    """What in a model is not passed on: the rest of a sentence that begins with the file's name."""


def output_shapes(model: Any) -> dict[str, tuple[int, ...]]:
    """The shape of each answer of ``model``, an ``onnx.ModelProto``, for one picture where any number will do.

    Raises StrangeModelError where it holds anything that no classifier of pictures needs, and what ``onnx`` raises
    where operators do not fit each other.
    """
    import onnx

    graph = model.graph
    if len(model.functions) or len(model.training_info) or len(graph.sparse_initializer):
        raise StrangeModelError("has functions or parts that are no plain graph, which are not run")
    if len(graph.node) > _MOST_NODES:
        raise StrangeModelError(f"has more than {_MOST_NODES:,} operators, which no classifier has")
    variances = {node.input[4] for node in graph.node if node.op_type == "BatchNormalization" and len(node.input) > 4}
    for tensor in graph.initializer:
        _refuse_tensor(tensor)
        _refuse_numbers(tensor, tensor.name in variances)
    for node in graph.node:
        _refuse_node(node)
    names = Counter(tensor.name for tensor in graph.initializer)
    if max(names.values(), default=1) > 1:
        raise StrangeModelError("has two constants of one name")
    skeleton = _skeleton(model)
    onnx.checker.check_model(skeleton)
    inferred = onnx.shape_inference.infer_shapes(skeleton, check_type=True, strict_mode=True, data_prop=True)
    computed = inferred.graph
    shapes = {value.name: _known_shape(value) for value in (*computed.input, *computed.value_info, *computed.output)}
    for node in graph.node:
        for name in node.output:
            if name and name not in shapes:
                raise StrangeModelError(f"does not tell the size of {_shorten(name)} beforehand")
    return {value.name: shapes[value.name] for value in computed.output}


def _refuse_node(node: Any) -> None:
    if node.domain not in ("", "ai.onnx") or node.op_type not in OPERATORS:
        what = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
        raise StrangeModelError(f"has an operator {_shorten(what)}, which no classifier of pictures needs")
    for attribute in node.attribute:
        kind = attribute.AttributeType.Name(attribute.type)
        if attribute.ref_attr_name or not (kind in _PLAIN_ATTRIBUTES or (kind, node.op_type) == ("TENSOR", "Constant")):
            raise StrangeModelError(f"has a {_shorten(node.op_type)} with {_shorten(attribute.name)}, which is not run")
        if kind == "TENSOR":
            _refuse_tensor(attribute.t)
            _refuse_numbers(attribute.t, False)
        least = 1 if attribute.name in _COUNTS_FROM_1 else 0 if attribute.name in _COUNTS_FROM_0 else None
        numbers = (attribute.i,) if kind == "INT" else attribute.ints
        if least is not None and not all(least <= number <= _MOST_STEP for number in numbers):
            raise StrangeModelError(f"has a {node.op_type} with impossible {attribute.name}")


def _refuse_tensor(tensor: Any) -> None:
    name = _shorten(tensor.name)
    if tensor.data_location or len(tensor.external_data):
        raise StrangeModelError(f"keeps {name} in another file, which is not read: save it with all its data inside")
    if tensor.data_type not in _TYPES or tensor.HasField("segment"):
        raise StrangeModelError(f"has a constant {name} of a type that is not run")
    if len(tensor.dims) > _MOST_AXES or not all(1 <= size <= MOST_BYTES for size in tensor.dims):
        raise StrangeModelError(f"has a constant {name} of an impossible shape")
    width, place = _TYPES[tensor.data_type]
    elements = math.prod(tensor.dims)
    data = len(tensor.raw_data), len(getattr(tensor, place))
    if data not in ((elements * width, 0), (0, elements)):
        raise StrangeModelError(f"has a constant {name} of another size than it says")


def _refuse_numbers(tensor: Any, is_variance: bool) -> None:
    """Raises StrangeModelError where a constant cannot be weights. A single infinity may be the end of a range."""
    import onnx

    values = onnx.numpy_helper.to_array(tensor)
    fault = fault_of(values, is_variance)
    if fault and not (values.size == 1 and np.isinf(values).all()):
        raise StrangeModelError(f"has {fault} in {_shorten(tensor.name)}")


def _skeleton(model: Any) -> Any:
    """``model`` for one picture, with shapes in place of its large constants, and without what it says of the rest."""
    import onnx

    result = onnx.ModelProto(ir_version=model.ir_version)
    result.opset_import.extend(model.opset_import)
    graph = result.graph
    graph.name = "skeleton"
    graph.node.extend(model.graph.node)
    constants = {tensor.name for tensor in model.graph.initializer}
    for tensor in model.graph.initializer:
        if math.prod(tensor.dims) <= _SMALL:
            graph.initializer.append(tensor)
        else:
            graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    for value in model.graph.input:
        if value.name not in constants:
            kind = value.type.tensor_type
            shape = [axis.dim_value or (1 if place == 0 else None) for place, axis in enumerate(kind.shape.dim)]
            graph.input.append(onnx.helper.make_tensor_value_info(value.name, kind.elem_type, shape))
    for value in model.graph.output:
        kind = value.type.tensor_type
        graph.output.append(
            onnx.helper.make_tensor_value_info(value.name, kind.elem_type, [None] * len(kind.shape.dim))
        )
    return result


def _known_shape(value: Any) -> tuple[int, ...]:
    """The shape of a tensor that is computed. Raises StrangeModelError where it is not known, or too large."""
    kind = value.type.tensor_type
    axes: Iterable[Any] = kind.shape.dim
    if kind.elem_type not in _TYPES or not kind.HasField("shape") or not all(a.HasField("dim_value") for a in axes):
        raise StrangeModelError(f"does not tell the size of {_shorten(value.name)} beforehand")
    shape = tuple(int(axis.dim_value) for axis in axes)
    size = math.prod(shape) * _TYPES[kind.elem_type][0]
    if len(shape) > _MOST_AXES or min(shape, default=1) < 1 or size > MOST_BYTES:
        raise StrangeModelError(f"computes {_shorten(value.name)} of shape {str(list(shape))[:80]}, too much to be run")
    return shape


def _shorten(name: str) -> str:
    return f"'{printable(name[:60])}'"

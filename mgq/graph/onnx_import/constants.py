"""Values of an ONNX graph that are known beforehand: weights, and the arithmetic of shapes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

# fmt: off
FOLDED = frozenset({
    "Abs", "Add", "And", "ArgMax", "ArgMin", "Atan", "BatchNormalization", "Cast", "CastLike", "Ceil", "Clip",
    "Concat", "Constant", "ConstantOfShape", "Conv", "Cos", "CumSum", "DepthToSpace", "Div", "Einsum", "Elu", "Equal",
    "Erf", "Exp", "Expand", "EyeLike", "Flatten", "Floor", "Gather", "GatherElements", "GatherND", "Gelu", "Gemm",
    "Greater", "GreaterOrEqual", "HardSigmoid", "HardSwish", "Identity", "InstanceNormalization", "IsInf", "IsNaN",
    "LayerNormalization", "LeakyRelu", "Less", "LessOrEqual", "Log", "LogSoftmax", "MatMul", "Max", "Mean", "Min",
    "Mish", "Mod", "Mul", "Neg", "NonZero", "Not", "OneHot", "Or", "PRelu", "Pad", "Pow", "Range", "Reciprocal",
    "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd",
    "ReduceSum", "ReduceSumSquare", "Relu", "Reshape", "Round", "ScatterElements", "ScatterND", "Selu", "Shape",
    "Sigmoid", "Sign", "Sin", "Size", "Slice", "Softmax", "Softplus", "Softsign", "SpaceToDepth", "Split", "Sqrt",
    "Squeeze", "Sub", "Sum", "Tan", "Tanh", "Tile", "TopK", "Transpose", "Trilu", "Unsqueeze", "Where", "Xor",
})
# fmt: on
MOST_NUMBERS = 1 << 28
"""In one constant."""
TRAINING_NAMED = 14
"""The opset since which a batch norm says that it is in training state."""


class TooLargeError(ValueError):
    """A constant of more numbers than any classifier needs."""


def fold(node: Any, inputs: Mapping[str, Array], opset: int) -> list[Array]:
    """What ``node``, an ``onnx.NodeProto`` of an operator in ``FOLDED``, makes of the constants ``inputs``.

    Raises what ONNX's reference raises where they do not fit each other, TooLargeError before memory runs out.
    """
    import onnx
    from onnx.reference import ReferenceEvaluator

    if node.op_type == "BatchNormalization" and opset < TRAINING_NAMED and is_in_training(node):
        node, opset = name_training(node), TRAINING_NAMED
    if node.op_type in ("Expand", "ConstantOfShape", "Tile", "Range", "Pad", "OneHot"):
        refuse_too_large(node, [inputs[name] for name in node.input if name])
    graph = onnx.helper.make_graph(
        [node],
        "constant",
        [onnx.helper.make_tensor_value_info(n, type_of(inputs[n]), inputs[n].shape) for n in list_inputs(node)],
        [onnx.helper.make_empty_tensor_value_info(name) for name in node.output if name],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)])
    found: list[Array] = ReferenceEvaluator(model).run(None, {name: inputs[name] for name in list_inputs(node)})
    return [np.asarray(value) for value in found]


def is_in_training(node: Any) -> bool:
    """Whether ``node``, a batch norm, normalizes by the batch; before opset 14 its other outputs alone tell."""
    return bool(attributes_of(node).get("training_mode", 0)) or any(node.output[1:])


def name_training(node: Any) -> Any:
    """``node``, a batch norm in training state, as opset 14 has it."""
    import onnx

    epsilon = attributes_of(node).get("epsilon", 1e-5)
    return onnx.helper.make_node(node.op_type, node.input, node.output[:1], epsilon=epsilon, training_mode=1)


def list_inputs(node: Any) -> list[str]:
    return list(dict.fromkeys(name for name in node.input if name))


def type_of(value: Array) -> int:
    import onnx

    return int(onnx.helper.np_dtype_to_tensor_dtype(value.dtype))


def refuse_too_large(node: Any, inputs: list[Array]) -> None:
    if node.op_type == "Range":
        start, limit, step = (float(value) for value in inputs)
        size = abs((limit - start) / step) if step else np.inf
    elif node.op_type == "OneHot":
        size = float(inputs[0].size) * abs(float(inputs[1].ravel()[0]))
    elif node.op_type == "ConstantOfShape":
        size = float(np.prod(inputs[0].astype(np.float64)))
    elif node.op_type == "Expand":
        wanted = np.broadcast_shapes(inputs[0].shape, tuple(int(side) for side in inputs[1]))
        size = math.prod(float(side) for side in wanted)
    elif node.op_type == "Pad":
        size = float(np.prod([side + float(np.abs(inputs[1]).sum()) for side in inputs[0].shape])) if inputs[1:] else 0
    else:
        size = float(inputs[0].size) * float(np.prod(np.abs(inputs[1].astype(np.float64))))
    if not size <= MOST_NUMBERS:
        raise TooLargeError(f"a {node.op_type} of {size:.0f} numbers")


def attributes_of(node: Any) -> dict[str, Any]:
    """Name -> value: a number, text, an array or a list of numbers."""
    import onnx

    found: dict[str, Any] = {}
    for attribute in node.attribute:
        value = onnx.helper.get_attribute_value(attribute)
        if isinstance(value, bytes):
            value = value.decode(errors="replace")
        elif isinstance(value, onnx.TensorProto):
            value = onnx.numpy_helper.to_array(value)
        elif not isinstance(value, int | float | str):
            value = list(value)
        found[attribute.name] = value
    return found

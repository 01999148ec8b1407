"""Nodes that mix the axis of the batch with others, as attention and linear layers of exporters do.

A file says what becomes of one picture, so that each of its tensors may be taken as one of a picture whatever its axes
are. A layer gives it with one more axis in front, that of pictures. Where the first axis of a tensor is 1 already, that
stands for the pictures.
"""

from __future__ import annotations

import math
import string
from collections.abc import Mapping
from typing import Any

import numpy as np

from mgq.graph.onnx_import.comparisons import COMPARING
from mgq.graph.onnx_import.constants import attributes_of
from mgq.graph.onnx_import.einsum import split_equation
from mgq.graph.onnx_import.operators import LAST_CHANNELS, MOST_WEIGHTS, Scope, UnknownFormError
from mgq.graph.onnx_import.reductions import REDUCING_AXES

ALONG_ONE_AXIS = {
    "Concat": 1,
    "Gather": 0,
    "GatherElements": 0,
    "LayerNormalization": -1,
    "LogSoftmax": -1,
    "LpNormalization": -1,
    "Softmax": -1,
    "Split": 0,
}
"""Operator -> its axis where it names none."""
ALONG_AXES = {"ReduceMean": 1, "Slice": 3, "Squeeze": 1, "Unsqueeze": 1, **dict.fromkeys(REDUCING_AXES, 1)}
"""Operator -> the input that may name its axes."""
OF_ANY_AXES = frozenset(
    {
        *("Abs", "Add", "Atan", "Cast", "CastLike", "Ceil", "Celu", "Clip", "Cos", "Div", "Dropout", "Elu", "Erf"),
        *("Exp", "Floor", "Gelu", "Gemm", "HardSigmoid", "HardSwish", "Identity", "LeakyRelu", "Log", "MatMul"),
        *("Mish", "Mul", "Neg", "Pow", "Reciprocal", "Relu", "Round", "Selu", "Sigmoid", "Sign", "Sin", "Softplus"),
        *("Softsign", "Sqrt", "Sub", "Tanh"),
        *COMPARING,
    }
)
"""Operators that name no axes."""
OF_CHANNELS = frozenset(
    {
        "AveragePool",
        "BatchNormalization",
        "Conv",
        "GlobalAveragePool",
        "GlobalMaxPool",
        "InstanceNormalization",
        "MaxPool",
    }
)
"""Operators on the channels of pictures, whose first axis is that of pictures whatever these are."""
LIFTED = "one more axis: "
"""How names of tensors with the axis of pictures in front begin."""


def lift(node: Any, scope: Scope) -> Any:
    """``node`` for tensors with one more axis in front, which are among the layers of ``scope`` from then on."""
    import onnx

    new = onnx.NodeProto()
    new.CopyFrom(node)
    layers = [name for name in node.input if name in scope.layers]
    shape = scope.file_shape(layers[0])
    most = max(len(scope.file_shape(name)) for name in layers)
    kind, given = node.op_type, attributes_of(node)
    changed: dict[str, Any] = {}
    if kind == "Transpose":
        changed["perm"] = [0, *(axis + 1 for axis in given.get("perm", range(len(shape))[::-1]))]
    elif kind in ALONG_ONE_AXIS:
        default = 1 if kind.endswith("Softmax") and scope.opset < 13 else ALONG_ONE_AXIS[kind]
        changed["axis"] = behind_one_more(int(given.get("axis", default)))
    elif kind in ALONG_AXES:
        axes = given.get("axes") or numbers(node, ALONG_AXES[kind], scope) or usual_axes(node, shape, scope)
        changed["axes"] = [behind_one_more(int(axis)) for axis in axes]
    elif kind == "Einsum":
        changed["equation"] = with_one_more(str(given["equation"]), node, scope)
    elif kind == "GatherND":
        changed["batch_dims"] = given.get("batch_dims", 0) + 1
    elif kind == "BatchNormalization":
        changed[LAST_CHANNELS] = 1
    elif kind == "Pad":
        changed |= pads_with_one_more(node, given, len(shape), scope)
    elif kind == "Tile":
        changed["repeats"] = [1, *(numbers(node, 1, scope) or ())]
    elif kind == "Expand":
        changed["shape"] = [1, *expanded_shape(node, shape, scope)]
    elif kind in ("Reshape", "Flatten"):
        new.op_type = "Reshape"
        changed["shape"] = [1, *wanted_shape(node, given, shape, scope)]
    elif kind not in OF_ANY_AXES:
        raise UnknownFormError("mixes the batch with other axes")
    for name in node.input:
        if name in scope.layers:
            is_moved = new.op_type == "Reshape"  # it takes numbers in any shape, and MegEngine has seven axes at most
            lifted = scope.layers[name] if is_moved else lift_layer(name, most if kind in OF_ANY_AXES else 0, scope)
            scope.layers[LIFTED + name] = lifted
    new.input[:] = [LIFTED + name if name in scope.layers else name for name in node.input]
    if kind in ("GatherND", "GatherElements"):
        new.input[1] = LIFTED + node.input[1]
        scope.constants[new.input[1]] = scope.constant(node.input[1])[None]
    set_attributes(new, changed)
    return new


def set_attributes(node: Any, values: Mapping[str, Any]) -> None:
    """Give ``node`` the attributes ``values``, in place of those of the same names."""
    import onnx

    for attribute in [attribute for attribute in node.attribute if attribute.name in values]:
        node.attribute.remove(attribute)
    node.attribute.extend(onnx.helper.make_attribute(name, value) for name, value in values.items())


def lift_channels(node: Any, scope: Scope) -> Any:
    """``node``, one of ``OF_CHANNELS``, for windows of a picture, which lie along its first axis.

    All their channels are those of one picture, and weights are repeated for each."""
    import onnx

    name = node.input[0]
    windows, *shape = scope.file_shape(name)
    whole = [windows * shape[0], *shape[1:]]
    scope.layers[LIFTED + name] = scope.draft.add("reshape", [scope.layers[name]], "", {"shape": whole})
    new = onnx.NodeProto()
    new.CopyFrom(node)
    new.input[0] = LIFTED + name
    for place, constant in enumerate(node.input[1:], 1):
        if constant:
            value = scope.constant(constant)
            if value.size * windows > MOST_WEIGHTS:
                raise UnknownFormError("has too many weights to repeat them for each window of a picture")
            scope.constants[f"{LIFTED}{windows} times {constant}"] = np.concatenate([value] * windows)
            new.input[place] = f"{LIFTED}{windows} times {constant}"
    if node.op_type == "Conv":
        set_attributes(new, {"group": attributes_of(node).get("group", 1) * windows})
    return new


def settle_channels(node: Any, windows: int, scope: Scope) -> None:
    """Put the channels of what the lifted ``node`` gives apart again, so many ``windows``."""
    name = node.output[0]
    layer, source = scope.layers[name], scope.draft.sources[scope.layers[name]]
    channels, *sizes = scope.draft.shape(layer)[1:]
    shape = [windows, channels // windows, *sizes]
    scope.layers[name] = scope.draft.add("reshape", [layer], source, {"shape": shape})
    scope.without_batch.add(name)


def behind_one_more(axis: int) -> int:
    """Axes that are counted from behind stay."""
    return axis + 1 if axis >= 0 else axis


def with_one_more(equation: str, node: Any, scope: Scope) -> str:
    """The ``equation`` of an Einsum with one more axis in front of each layer and of the output."""
    ranks = [
        len(scope.constants[name].shape if name in scope.constants else scope.file_shape(name)) for name in node.input
    ]
    terms, output = split_equation(equation, ranks)
    new = next(letter for letter in string.ascii_letters if letter not in "".join(terms))
    told = [term if name in scope.constants else new + term for term, name in zip(terms, node.input, strict=True)]
    return f"{','.join(told)}->{new}{output}"


def numbers(node: Any, place: int, scope: Scope) -> list[int] | None:
    if len(node.input) <= place or not node.input[place]:
        return None
    return [int(value) for value in scope.constant(node.input[place]).ravel()]


def pads_with_one_more(node: Any, given: dict[str, Any], rank: int, scope: Scope) -> dict[str, list[int]]:
    """The attributes that say what a Pad adds to each axis."""
    axes = numbers(node, 3, scope) if scope.opset >= 18 else None
    if axes is not None:
        return {"axes": [behind_one_more(axis) for axis in axes]}
    pads = [int(size) for size in given.get("pads") or numbers(node, 1, scope) or ()]
    return {"pads": [0, *pads[:rank], 0, *pads[rank:]]}


def usual_axes(node: Any, shape: tuple[int, ...], scope: Scope) -> list[int]:
    """Those of ``node`` where it names none."""
    if node.op_type == "Squeeze":
        return [axis for axis, size in enumerate(shape) if size == 1]
    if node.op_type == "Slice":
        return list(range(len(attributes_of(node).get("starts") or numbers(node, 1, scope) or ())))
    return list(range(len(shape)))


def wanted_shape(node: Any, given: dict[str, Any], shape: tuple[int, ...], scope: Scope) -> list[int]:
    """What Reshape or Flatten makes of ``shape``."""
    if node.op_type == "Flatten":
        axis = int(given.get("axis", 1)) % (len(shape) + 1)
        return [math.prod(shape[:axis]), math.prod(shape[axis:])]
    wanted = [int(size) for size in given.get("shape") or numbers(node, 1, scope) or ()]
    if not given.get("allowzero", 0):
        wanted = [shape[place] if size == 0 else size for place, size in enumerate(wanted)]
    wanted = scope.shape_for_one(wanted, math.prod(shape))
    known = math.prod(size for size in wanted if size != -1)
    return [math.prod(shape) // max(known, 1) if size == -1 else size for size in wanted]


def reshape_to_picture(node: Any, scope: Scope) -> bool:
    """Whether ``node`` is a Reshape or Flatten that gives one picture again; it is made then."""
    if node.op_type not in ("Reshape", "Flatten"):
        return False
    (source, *_), (output,) = node.input, node.output
    wanted = wanted_shape(node, attributes_of(node), scope.file_shape(source), scope)
    if wanted[0] != 1 or len(wanted) < 2:
        return False
    scope.layers[output] = scope.draft.add("reshape", [scope.layer(source)], output, {"shape": wanted[1:]})
    return True


def expanded_shape(node: Any, shape: tuple[int, ...], scope: Scope) -> list[int]:
    """What Expand makes of ``shape``, with as many axes."""
    wanted = numbers(node, 1, scope) or []
    if len(wanted) > len(shape):
        raise UnknownFormError("adds axes, or pictures")
    wanted = [1] * (len(shape) - len(wanted)) + wanted
    return scope.shape_for_one(wanted, math.prod(wanted) // scope.pictures)


def lift_layer(name: str, axes: int, scope: Scope) -> str:
    """The layer that gives the tensor ``name`` with the axis of pictures in front of at least so many ``axes``."""
    shape = scope.file_shape(name)
    whole = (1,) * (axes - len(shape)) + shape
    layer = scope.layers[name]
    if scope.draft.shape(layer) == (1, *whole):
        return layer
    return scope.draft.add("reshape", [layer], "", {"shape": list(whole)})


def settle(node: Any, scope: Scope) -> None:
    """Take the first axis of what the lifted ``node`` gives for the pictures where it is 1."""
    for name in node.output:
        layer = scope.layers.get(name)
        if layer is None:
            continue
        shape = scope.draft.shape(layer)[1:]
        scope.without_batch.add(name)
        if len(shape) > 1 and shape[0] == 1:
            source = scope.draft.sources[layer]
            scope.layers[name] = scope.draft.add("reshape", [layer], source, {"shape": list(shape[1:])})
            scope.without_batch.discard(name)

"""Layers of imported networks as ONNX operators: what reads floats and gives floats."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from mgq.graph.layer_graph import LARGEST, Operation, QuantParams

ERF_OF_GELU = float(np.sqrt(0.5))
FLOAT = 1
"""ONNX's number of float32."""


class Parts(Protocol):
    """What operators are written with: each call adds one, or a constant, and gives its name."""

    def add(self, operator: str, inputs: list[str], output: str, **attributes: Any) -> str: ...

    def constant(self, name: str, value: npt.NDArray[Any]) -> str: ...


def write_operation(node: Operation, sources: list[str], parts: Parts) -> str:
    """The name of what ``node`` computes of ``sources``, in floats."""
    if node.kind in PLAIN:
        operator, names = PLAIN[node.kind]
        attributes = {theirs: value_of(node.options[ours]) for theirs, ours in names.items() if ours in node.options}
        constants = [parts.constant(f"{node.output}.{name}", value) for name, value in node.constants.items()]
        return parts.add(operator, [*sources, *constants], f"{node.output}/{operator}", **attributes)
    return COMPOSED[node.kind](node, sources, parts)


def value_of(value: Any) -> Any:
    return int(value) if isinstance(value, bool) else value


PLAIN: Mapping[str, tuple[str, Mapping[str, str]]] = {
    "add": ("Add", {}),
    "mul": ("Mul", {}),
    "sub": ("Sub", {}),
    "div": ("Div", {}),
    "matmul": ("MatMul", {}),
    "concat": ("Concat", {"axis": "axis"}),
    "relu": ("Relu", {}),
    "leaky_relu": ("LeakyRelu", {"alpha": "slope"}),
    "prelu": ("PRelu", {}),
    "sigmoid": ("Sigmoid", {}),
    "hard_sigmoid": ("HardSigmoid", {"alpha": "alpha", "beta": "beta"}),
    "hard_swish": ("HardSwish", {}),
    "tanh": ("Tanh", {}),
    "elu": ("Elu", {"alpha": "alpha"}),
    "global_avg": ("GlobalAveragePool", {}),
    "lrn": ("LRN", {"size": "size", "alpha": "alpha", "beta": "beta", "bias": "bias"}),
    "mean": ("ReduceMean", {"axes": "axes"}),
    "highest": ("ReduceMax", {"axes": "axes"}),
    "softplus": ("Softplus", {}),
    "softmax": ("Softmax", {"axis": "axis"}),
    "log_softmax": ("LogSoftmax", {"axis": "axis"}),
    "sqrt": ("Sqrt", {}),
    "erf": ("Erf", {}),
    "exp": ("Exp", {}),
    "sin": ("Sin", {}),
    "cos": ("Cos", {}),
    "atan": ("Atan", {}),
    "sign": ("Sign", {}),
    "floor": ("Floor", {}),
    "ceil": ("Ceil", {}),
    "round": ("Round", {}),
    "log": ("Log", {}),
    "maximum": ("Max", {}),
    "minimum": ("Min", {}),
    "powers": ("Pow", {}),
    "neg": ("Neg", {}),
    "abs": ("Abs", {}),
    "reciprocal": ("Reciprocal", {}),
    "avg_pool": (
        "AveragePool",
        {
            "kernel_shape": "kernel",
            "strides": "stride",
            "pads": "pads",
            "ceil_mode": "ceil",
            "count_include_pad": "include",
        },
    ),
}
"""Kind -> operator, and its attributes by the names of our options."""


def write_affine(node: Operation, sources: list[str], parts: Parts) -> str:
    name = node.output
    scale, shift = (parts.constant(f"{name}.{part}", node.constants[part]) for part in ("scale", "shift"))
    scaled = parts.add("Mul", [*sources, scale], f"{name}/scaled")
    return parts.add("Add", [scaled, shift], f"{name}/shifted")


def write_clip(node: Operation, sources: list[str], parts: Parts) -> str:
    limits = [
        parts.constant(f"{node.output}/{end}", np.array(node.options[end], np.float32)) if finite else ""
        for end, finite in ((end, abs(node.options[end]) < LARGEST) for end in ("low", "high"))
    ]
    return parts.add("Clip", [*sources, *limits], f"{node.output}/Clip")


def write_silu(node: Operation, sources: list[str], parts: Parts) -> str:
    gate = parts.add("Sigmoid", sources, f"{node.output}/gate")
    return parts.add("Mul", [*sources, gate], f"{node.output}/Mul")


def write_gelu(node: Operation, sources: list[str], parts: Parts) -> str:
    name = node.output

    def number(what: str, value: float) -> str:
        return parts.constant(f"{name}/{what}", np.array(value, np.float32))

    root = parts.add("Mul", [*sources, number("root", ERF_OF_GELU)], f"{name}/in_deviations")
    share = parts.add("Erf", [root], f"{name}/erf")
    gate = parts.add("Add", [share, number("one", 1.0)], f"{name}/gate")
    product = parts.add("Mul", [*sources, gate], f"{name}/product")
    return parts.add("Mul", [product, number("half", 0.5)], f"{name}/Mul")


def write_pow(node: Operation, sources: list[str], parts: Parts) -> str:
    power = parts.constant(f"{node.output}/power", np.array(node.options["power"], np.float32))
    return parts.add("Pow", [*sources, power], f"{node.output}/Pow")


def write_greater(node: Operation, sources: list[str], parts: Parts) -> str:
    constants = [parts.constant(f"{node.output}.{name}", value) for name, value in node.constants.items()]
    told = parts.add("Greater", [*sources, *constants], f"{node.output}/Greater")
    return parts.add("Cast", [told], f"{node.output}/number", to=FLOAT)


def write_choose(node: Operation, sources: list[str], parts: Parts) -> str:
    half = parts.constant(f"{node.output}/half", np.array(0.5, np.float32))
    mask = parts.add("Greater", [sources[0], half], f"{node.output}/mask")
    return parts.add("Where", [mask, *sources[1:]], f"{node.output}/Where")


def write_resize(node: Operation, sources: list[str], parts: Parts) -> str:
    columns, rows = (parts.constant(f"{node.output}.{name}", node.constants[name]) for name in ("columns", "rows"))
    wide = parts.add("MatMul", [*sources, columns], f"{node.output}/wide")
    return parts.add("MatMul", [rows, wide], f"{node.output}/MatMul")


def write_layer_norm(node: Operation, sources: list[str], parts: Parts) -> str:
    constants = [parts.constant(f"{node.output}.{name}", value) for name, value in node.constants.items()]
    epsilon = node.options["eps"]
    return parts.add("LayerNormalization", [*sources, *constants], f"{node.output}/norm", axis=-1, epsilon=epsilon)


COMPOSED: Mapping[str, Callable[[Operation, list[str], Parts], str]] = {
    "affine": write_affine,
    "choose": write_choose,
    "clip": write_clip,
    "silu": write_silu,
    "gelu": write_gelu,
    "greater": write_greater,
    "pow": write_pow,
    "layer_norm": write_layer_norm,
    "resize": write_resize,
}


def write_slice(node: Operation, source: str, parts: Parts) -> tuple[str, list[str], dict[str, Any]]:
    """Operator, what it reads, and attributes, of a layer that moves or chooses values."""
    options, name = node.options, node.output

    def integers(what: str, *values: int) -> str:
        return parts.constant(f"{name}/{what}", np.array(values, np.int64))

    if "indices" in options:
        return "Gather", [source, integers("indices", *options["indices"])], {"axis": options["axis"]}
    places = [integers(what, options[key]) for what, key in (("starts", "start"), ("ends", "stop"), ("axes", "axis"))]
    return "Slice", [source, *places, integers("steps", options["step"])], {}


def write_max_pool(node: Operation, source: str, _: Parts) -> tuple[str, list[str], dict[str, Any]]:
    options = node.options
    shape = {"kernel_shape": options["kernel"], "strides": options["stride"], "pads": options["pads"]}
    gaps = {"dilations": options["dilation"]} if "dilation" in options else {}
    return "MaxPool", [source], {**shape, **gaps, "ceil_mode": int(options["ceil"])}


def write_border(node: Operation, source: str, parts: Parts) -> tuple[str, list[str], dict[str, Any]]:
    pads = parts.constant(f"{node.output}/pads", np.array(pads_of(node), np.int64))
    return "Pad", [source, pads], {"mode": node.options["mode"]}


def write_expand(node: Operation, source: str, parts: Parts) -> tuple[str, list[str], dict[str, Any]]:
    shape = parts.constant(f"{node.output}/shape", np.array([1, *node.options["shape"]], np.int64))
    return "Expand", [source, shape], {}


def border_values_of(node: Operation, grid: QuantParams | None) -> npt.NDArray[Any]:
    """What ``node`` pads with, one value or one for each channel: float32 (C,), or uint8 on ``grid``."""
    values = np.array(node.border, np.float32)
    if grid is None:
        return values
    steps: npt.NDArray[Any] = np.clip(np.rint(values / grid.scale), grid.qmin, grid.qmax) + grid.zero_point
    return steps.astype(np.uint8)


def pads_of(node: Operation) -> list[int]:
    """ONNX's pads of the four axes: before each, then behind each."""
    top, left, bottom, right = node.options["pads"]
    front, back = node.options.get("channels", (0, 0))
    return [0, front, top, left, 0, back, bottom, right]


MOVES: Mapping[str, Callable[[Operation, str, Parts], tuple[str, list[str], dict[str, Any]]]] = {
    "slice": write_slice,
    "border": write_border,
    "expand": write_expand,
    "max_pool": write_max_pool,
}

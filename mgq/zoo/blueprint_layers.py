"""Float modules for the layers of a blueprint."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from typing import Any

import megengine.functional as F
import megengine.module as M
import numpy as np
from megengine import Parameter, Tensor
from megengine.core._imperative_rt.core2 import apply
from megengine.core.ops.builtin import Elemwise

from mgq.zoo.blueprint import LARGEST, MOVES, LayerPlan, border_values
from mgq.zoo.layers import ConvBnRelu6, keep_grid_of

Options = Mapping[str, Any]


class BlueprintLayer(M.Module):  # type: ignore[misc]
    """A layer of a ``kind``. ``lowest`` is a lower bound of its outputs."""

    def __init__(self, kind: str, options: Options, lowest: float) -> None:
        super().__init__()
        self.kind = kind
        self.options = dict(options)
        self.lowest = lowest

    def forward(self, *inputs: Tensor) -> Tensor:
        return FUNCTIONS[self.kind](self.options, *inputs)


class Operation(BlueprintLayer):
    """A layer without constants, whose result lies on a grid in an int8 network."""


class FloatOperation(BlueprintLayer):
    """A layer that stays in float. Its constants are parameters, so that they are part of the state."""

    def __init__(self, kind: str, options: Options, lowest: float, shapes: Mapping[str, Sequence[int]]) -> None:
        super().__init__(kind, options, lowest)
        self.constants = tuple(shapes)
        for name, shape in shapes.items():
            setattr(self, name, Parameter(np.zeros(tuple(shape), np.float32)))

    def forward(self, *inputs: Tensor) -> Tensor:
        return FUNCTIONS[self.kind](self.options, *inputs, *(getattr(self, name) for name in self.constants))


class Move(BlueprintLayer):
    """A layer that only moves or chooses values: they stay on the grid they are on."""

    def forward(self, *inputs: Tensor) -> Tensor:
        return keep_grid_of(inputs[0], super().forward(*inputs))


def layer_of(plan: LayerPlan, on_grid: bool, lowest: float) -> M.Module:
    """The module that ``plan`` describes, without weights. ``on_grid``: whether its output is int8 in an int8
    network."""
    if plan.kind == "conv":
        return convolution_of(plan)
    options = plan.options
    if plan.kind == "linear":
        return M.Linear(options["inputs"], options["outputs"])
    if plan.kind == "add" and on_grid:
        return M.Elemwise("FUSE_ADD_RELU" if options.get("relu") else "ADD")
    if plan.kind in MOVES:
        return Move(plan.kind, options, lowest)
    shapes = options.get("constants", {})
    if on_grid and not shapes:
        return Operation(plan.kind, options, lowest)
    if on_grid:
        return GriddedFloatOperation(plan.kind, options, lowest, shapes)
    return FloatOperation(plan.kind, options, lowest, shapes)


class GriddedFloatOperation(FloatOperation):
    """A layer that is computed in float, and whose result is put on a grid for those that read it."""


CONVOLUTIONS = {"": M.ConvBn2d, "relu": M.ConvBnRelu2d, "relu6": ConvBnRelu6}


def convolution_of(plan: LayerPlan) -> M.Module:
    """A convolution with its batch norm. Where the file had none, that is an identity, and stays one in training."""
    options = plan.options
    layer = CONVOLUTIONS[options["activation"]](
        options["inputs"],
        options["outputs"],
        tuple(options["kernel"]),
        tuple(options["stride"]),
        tuple(options["padding"]),
        tuple(options["dilation"]),
        options["groups"],
        bias=False,
        eps=options["eps"],
    )
    layer.bn.freeze = not options["normalized"]
    return layer


def reshape(options: Options, inp: Tensor) -> Tensor:
    """``shape`` is without the batch."""
    return F.reshape(inp, (inp._tuple_shape[0], *options["shape"]))


def take_slice(options: Options, inp: Tensor) -> Tensor:
    """Either every ``step``-th from ``start`` to ``stop``, or the ``indices``, along ``axis``."""
    before = (slice(None),) * options["axis"]

    def part(start: int, stop: int, step: int) -> Tensor:
        # Pooling takes no view of a part of a batch.
        return F.copy(inp[before + (slice(start, stop, step),)])  # noqa: RUF005 (a star is no index in Python 3.10)

    if "indices" in options:
        return F.concat([part(i, i + 1, 1) for i in options["indices"]], options["axis"])
    return part(options["start"], options["stop"], options["step"])


def pad(options: Options, inp: Tensor) -> Tensor:
    """``pads``: above, left, below, right; more before the axes of a picture are channels. ``value``: one, or one for
    each channel."""
    top, left, bottom, right = options["pads"]
    front, back = options.get("channels", (0, 0))
    around = ((0, 0), (front, back), (top, bottom), (left, right))
    values = border_values(options)
    if len(values) == 1:
        return F.nn.pad(inp, around, constant_value=values[0])
    parts = [F.nn.pad(inp[:, i : i + 1], around, constant_value=value) for i, value in enumerate(values)]
    return F.concat(parts, axis=1)


def pad_from_inside(options: Options, inp: Tensor) -> Tensor:
    """``pads``: above, left, below, right. ``mode``: ``reflect`` mirrors the image there, ``edge`` repeats it."""
    top, left, bottom, right = options["pads"]
    return F.nn.pad(inp, ((0, 0), (0, 0), (top, bottom), (left, right)), mode=options["mode"])


def expand(options: Options, inp: Tensor) -> Tensor:
    """``shape`` is without the batch, of as many axes as there are.

    The product makes numbers of its own of a view. Of such a view and another tensor that is repeated along the same
    axis MegEngine 1.13.0 makes numbers of memory that was never written.
    """
    return F.broadcast_to(inp, (inp._tuple_shape[0], *options["shape"])) * 1


def max_pool(options: Options, inp: Tensor) -> Tensor:
    if "dilation" in options:
        return max_pool_with_gaps(options, inp)
    top, left, bottom, right = end_pads(options, inp._tuple_shape[2:])
    kernel, stride = tuple(options["kernel"]), tuple(options["stride"])
    if (top, left) == (bottom, right):
        return F.max_pool2d(inp, kernel, stride, (top, left))
    wide = F.nn.pad(inp, ((0, 0), (0, 0), (top, bottom), (left, right)), constant_value=-LARGEST)
    return F.max_pool2d(wide, kernel, stride, 0)


def max_pool_with_gaps(options: Options, inp: Tensor) -> Tensor:
    """MegEngine has none: the largest of what lies ``dilation`` apart, along one axis and then along the other."""
    gaps, stride = options["dilation"], options["stride"]
    extents = [(size - 1) * gap + 1 for size, gap in zip(options["kernel"], gaps, strict=True)]
    top, left, bottom, right = end_pads({**options, "kernel": extents}, inp._tuple_shape[2:])
    result = F.nn.pad(inp, ((0, 0), (0, 0), (top, bottom), (left, right)), constant_value=-LARGEST)
    for axis, extent, gap, step in zip((2, 3), extents, gaps, stride, strict=True):
        last = (result._tuple_shape[axis] - extent) // step * step
        before = (slice(None),) * axis
        # No star in an index: Python 3.10 has none.
        parts = [result[before + (slice(at, at + last + 1, step),)] for at in range(0, extent, gap)]  # noqa: RUF005
        result = reduce(F.maximum, parts)
    return result


def avg_pool(options: Options, inp: Tensor) -> Tensor:
    sizes = inp._tuple_shape[2:]
    top, left, bottom, right = end_pads(options, sizes)
    kernel, stride = tuple(options["kernel"]), tuple(options["stride"])
    if (top, left) == (bottom, right) and tuple(options["pads"]) == (top, left, bottom, right):
        mode = "average" if options["include"] else "average_count_exclude_padding"
        return F.avg_pool2d(inp, kernel, stride, (top, left), mode=mode)
    wide = F.nn.pad(inp, ((0, 0), (0, 0), (top, bottom), (left, right)))
    return F.avg_pool2d(wide, kernel, stride, 0, mode="average") * Tensor(shares(options, sizes), device=inp.device)


def end_pads(options: Options, sizes: Sequence[int]) -> tuple[int, int, int, int]:
    """``pads`` of a pooling, as many more below and to the right as rounding up needs."""
    top, left, bottom, right = options["pads"]
    ends = []
    for size, kernel, stride, start, end in zip(
        sizes, options["kernel"], options["stride"], (top, left), (bottom, right), strict=True
    ):
        reach = size + start + end - kernel
        steps = -(-reach // stride) if options["ceil"] else reach // stride
        if options["ceil"] and steps * stride >= size + start:
            steps -= 1  # no window begins behind the picture
        ends.append(max(end, steps * stride + kernel - size - start) if options["ceil"] else end)
    return top, left, ends[0], ends[1]


def shares(options: Options, sizes: Sequence[int]) -> Any:
    """(1, 1, H, W): positions of a window / those of it that count, for means over windows that hang over."""
    counts = []
    for axis, size in enumerate(sizes):
        kernel, stride = options["kernel"][axis], options["stride"][axis]
        start, end = options["pads"][axis], options["pads"][axis + 2]
        last = end_pads(options, sizes)[axis + 2]
        line = np.zeros(start + size + last)
        line[: start + size + end] = 1
        if not options["include"]:
            line[:start] = line[start + size :] = 0
        number = (len(line) - kernel) // stride + 1
        counts.append(np.array([line[i * stride : i * stride + kernel].sum() for i in range(number)]))
    counted = np.maximum(counts[0][:, None] * counts[1][None, :], 1)
    return (math.prod(options["kernel"]) / counted)[None, None].astype(np.float32)


def global_average(_: Options, inp: Tensor) -> Tensor:
    return F.avg_pool2d(inp, inp._tuple_shape[2:])


def global_max(_: Options, inp: Tensor) -> Tensor:
    return F.max_pool2d(inp, inp._tuple_shape[2:])


def normalize_responses(options: Options, inp: Tensor) -> Tensor:
    """ONNX's LRN: divided by a power of the mean square of neighbouring channels."""
    size, channels = options["size"], inp._tuple_shape[1]
    before = (size - 1) // 2
    squares = F.nn.pad(inp * inp, ((0, 0), (before, size - 1 - before), (0, 0), (0, 0)))
    total = sum(squares[:, i : i + channels] for i in range(size))
    return inp / (options["bias"] + options["alpha"] / size * total) ** options["beta"]


def mean(options: Options, inp: Tensor) -> Tensor:
    return F.mean(inp, axis=list(options["axes"]), keepdims=True)


def take_highest(options: Options, inp: Tensor) -> Tensor:
    return F.max(inp, axis=list(options["axes"]), keepdims=True)


def softmax(options: Options, inp: Tensor) -> Tensor:
    """MegEngine's begins at 0 to look for the largest number, and divides 0 by 0 where all are far below (1.13)."""
    axis = options["axis"]
    return F.softmax(inp - F.max(inp, axis=axis, keepdims=True), axis)


def normalize_layer(options: Options, inp: Tensor, *constants: Tensor) -> Tensor:
    """Over the last axis."""
    centred = inp - F.mean(inp, axis=-1, keepdims=True)
    result = centred / F.sqrt(F.mean(centred * centred, axis=-1, keepdims=True) + options["eps"])
    result = result * constants[0]
    return result + constants[1] if len(constants) > 1 else result


def resize(_: Options, inp: Tensor, columns: Tensor, rows: Tensor) -> Tensor:
    """(N, C, H, W), ``columns`` (W, W2) and ``rows`` (H2, H): the shares of pixels in those of the result."""
    return F.matmul(rows, F.matmul(inp, columns))


def erf(_: Options, inp: Tensor) -> Tensor:
    return apply(Elemwise(mode="ERF"), inp)[0]


def round_to_even(_: Options, inp: Tensor) -> Tensor:
    """MegEngine's own rounds halves away from 0."""
    low = F.floor(inp)
    part, is_odd = inp - low, low - 2 * F.floor(low / 2)
    return low + F.where(part == 0.5, is_odd, (part > 0.5).astype(np.float32))


def compare(_: Options, one: Tensor, other: Tensor) -> Tensor:
    """1 where ``one`` is greater, else 0."""
    return (one > other).astype(np.float32)


def add(options: Options, one: Tensor, other: Tensor) -> Tensor:
    return F.relu(one + other) if options.get("relu") else one + other


FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "reshape": reshape,
    "transpose": lambda options, x: F.transpose(x, tuple(options["axes"])),
    "slice": take_slice,
    "pad": pad,
    "border": pad_from_inside,
    "expand": expand,
    "max_pool": max_pool,
    "global_max": global_max,
    "avg_pool": avg_pool,
    "global_avg": global_average,
    "add": add,
    "mul": lambda _, x, y: x * y,
    "sub": lambda _, x, y: x - y,
    "div": lambda _, x, y: x / y,
    "matmul": lambda _, x, y: F.matmul(x, y),
    "concat": lambda options, *parts: F.concat(list(parts), options["axis"]),
    "affine": lambda _, x, scale, shift: x * scale + shift,
    "relu": lambda _, x: F.relu(x),
    "clip": lambda options, x: F.clip(x, options["low"], options["high"]),
    "leaky_relu": lambda options, x: F.leaky_relu(x, options["slope"]),
    "prelu": lambda _, x, slope: F.maximum(x, 0) + slope * F.minimum(x, 0),
    "sigmoid": lambda _, x: F.sigmoid(x),
    "hard_sigmoid": lambda options, x: F.clip(x * options["alpha"] + options["beta"], 0.0, 1.0),
    "hard_swish": lambda _, x: x * F.clip(x * (1 / 6) + 0.5, 0.0, 1.0),
    "silu": lambda _, x: x * F.sigmoid(x),
    "gelu": lambda _, x: 0.5 * x * (1 + erf(_, x * math.sqrt(0.5))),
    "tanh": lambda _, x: F.tanh(x),
    "elu": lambda options, x: F.maximum(x, 0) + options["alpha"] * (F.exp(F.minimum(x, 0)) - 1),
    "lrn": normalize_responses,
    "resize": resize,
    "mean": mean,
    "highest": take_highest,
    "softplus": lambda _, x: F.softplus(x),
    "softmax": softmax,
    "log_softmax": lambda options, x: F.logsoftmax(x, options["axis"]),
    "layer_norm": normalize_layer,
    "sqrt": lambda _, x: F.sqrt(x),
    "erf": erf,
    "exp": lambda _, x: F.exp(x),
    "sin": lambda _, x: F.sin(x),
    "cos": lambda _, x: F.cos(x),
    "atan": lambda _, x: F.atan(x),
    "sign": lambda _, x: F.sign(x),
    "floor": lambda _, x: F.floor(x),
    "ceil": lambda _, x: F.ceil(x),
    "round": round_to_even,
    "log": lambda _, x: F.log(x),
    "maximum": lambda _, x, y: F.maximum(x, y),
    "minimum": lambda _, x, y: F.minimum(x, y),
    "greater": compare,
    "choose": lambda _, mask, x, y: F.where(mask > 0.5, x, y),
    "powers": lambda _, x, y: x**y,
    "neg": lambda _, x: -x,
    "abs": lambda _, x: F.abs(x),
    "reciprocal": lambda _, x: 1 / x,
    "pow": lambda options, x: x * x if options["power"] == 2 else x ** options["power"],
}
"""Kind of a layer without int8 weights -> what it does: its options, what it reads, its constants."""

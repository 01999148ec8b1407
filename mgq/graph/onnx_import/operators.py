"""ONNX operators, opset 7 to 22, as layers of a draft: one function for each."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from mgq.errors import printable
from mgq.graph.onnx_import.constants import is_in_training
from mgq.graph.onnx_import.draft import (
    NetworkDraft,
    convolution_options,
    convolution_tensors,
)
from mgq.graph.onnx_import.volumes import find_idle_axis, repeat_weights, run_without_axis, without_axis
from mgq.zoo.blueprint import INPUT, LARGEST, MOVES

Array = npt.NDArray[Any]

LAST_CHANNELS = "channels_last"
"""An attribute that no file has: the channels of a norm are the last axis."""
FLOATS = {1, 11}
BOOL = 9
WIDE_INTEGERS = {2, 4, 5, 6, 7, 12, 13}
"""ONNX's numbers of types that hold what a pixel may be, but for int8 and half floats."""
MASKED = 1e30
"""What masks take away is as good as infinite from here on."""
MOST_PLACES = 1 << 16
"""In what is looked up."""
MOST_WEIGHTS = 1 << 24
"""That are repeated for the windows of a picture."""


class UnknownFormError(Exception):
    """What an operator asks for that is not imported: the rest of a sentence that begins with the operator."""


class BatchMixedError(UnknownFormError):
    """The same where the first axis is not that of pictures for this operator."""

    def __init__(self) -> None:
        super().__init__("mixes the batch with other axes")


@dataclass
class Scope:
    """What is known while nodes are read: constants, and the layers that make the other tensors. The tensors
    ``without_batch`` have an axis less than what their layers give."""

    draft: NetworkDraft
    opset: int
    constants: dict[str, Array] = field(default_factory=dict)
    layers: dict[str, str] = field(default_factory=dict)
    without_batch: set[str] = field(default_factory=set)
    sequences: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """List of tensors -> their names."""
    pictures: int = 1
    """How many the file takes at once."""
    takes_pixels: bool = False
    """Whether the input is uint8."""
    read: frozenset[str] = frozenset()
    """The names of all tensors that nodes read, and of the answer."""

    def layer(self, name: str) -> str:
        """The layer that makes the tensor ``name``; one more where it is a constant."""
        if name in self.layers:
            return self.layers[name]
        if name not in self.constants:
            raise UnknownFormError(f"reads '{printable(name)[:40]}', which no node before it makes: write it again")
        raise UnknownFormError("reads a constant where a layer is expected")

    def constant(self, name: str) -> Array:
        if name not in self.constants:
            raise UnknownFormError("computes what has to be known beforehand")
        return self.constants[name]

    def is_constant(self, name: str) -> bool:
        return name in self.constants

    def shape(self, name: str) -> tuple[int, ...]:
        return self.draft.shape(self.layer(name))

    def holds_pixels(self, layer: str) -> bool:
        """Whether ``layer`` gives uint8 pixels as they are, moved or not."""
        plan = self.draft.plan(layer)
        while plan is not None and plan.kind in MOVES:
            layer = plan.inputs[0]
            plan = self.draft.plan(layer)
        return self.takes_pixels and layer == INPUT

    def shape_for_one(self, wanted: Sequence[int], numbers: int) -> list[int]:
        """The shape ``wanted`` in the file as one of ``numbers``, what there is of one picture."""
        whole, first = list(wanted), wanted[0] if len(wanted) else 0
        is_of_all = math.prod(whole) == self.pictures * numbers or min(whole, default=0) < 0
        if self.pictures > 1 and first > 0 and is_of_all and first % self.pictures == 0:
            whole[0] = first // self.pictures
        return whole

    def value_for_one(self, value: Array) -> Array:
        """A constant of the file without its repetition for each picture."""
        is_repeated = value.ndim > 1 and len(value) == self.pictures > 1 and bool((value == value[:1]).all())
        return value[:1] if is_repeated else value

    def file_shape(self, name: str) -> tuple[int, ...]:
        """The shape of the tensor ``name`` in the file, for one picture."""
        return self.shape(name)[1:] if name in self.without_batch else self.shape(name)


@dataclass(frozen=True)
class Operator:
    """A node, with its attributes."""

    node: Any
    scope: Scope
    attributes: dict[str, Any]

    @property
    def inputs(self) -> list[str]:
        return list(self.node.input)

    def has(self, place: int) -> bool:
        return len(self.node.input) > place and bool(self.node.input[place])

    def read_attribute(self, name: str, default: Any) -> Any:
        return self.attributes.get(name, default)

    def numbers(self, name: str, place: int, default: Any = None) -> Any:
        """Those of the attribute ``name``, of the constant input at ``place`` in later opsets, or ``default``."""
        if name in self.attributes:
            return self.attributes[name]
        if self.has(place):
            return self.scope.constant(self.node.input[place]).ravel().tolist()
        return default

    def layer(self, place: int = 0) -> str:
        return self.scope.layer(self.node.input[place])

    def constant(self, place: int) -> Array | None:
        return self.scope.constant(self.node.input[place]) if self.has(place) else None

    def shape(self, place: int = 0) -> tuple[int, ...]:
        return self.scope.shape(self.node.input[place])

    def axis(self, value: int, rank: int) -> int:
        return value + rank if value < 0 else value

    def make(self, kind: str, sources: Sequence[str], tensors: Any = None, output: int = 0, /, **options: Any) -> str:
        """One more layer, which makes the output at ``output``."""
        tensor = self.node.output[output]
        name = self.scope.draft.add(kind, sources, tensor, options, tensors)
        self.scope.layers[tensor] = name
        return name

    def add(self, kind: str, *sources: str, **options: Any) -> str:
        """One more layer, which makes none of the file's tensors."""
        return self.scope.draft.add(kind, sources, "", options)

    def pass_through(self, name: str) -> None:
        """The output is what the layer ``name`` gives."""
        self.scope.layers[self.node.output[0]] = name

    def give(self, name: str) -> None:
        """The output is what the layer ``name`` gives, the last that was made for it."""
        self.scope.draft.sources[name] = self.node.output[0]
        self.pass_through(name)

    def limit(self, source: str, low: float, high: float) -> str:
        """A layer that gives what ``source`` gives, limited; ``source`` itself where nothing limits it."""
        if low == 0 and high == math.inf:
            return self.add("relu", source)
        if math.isinf(low) and math.isinf(high):
            return source
        return self.add("clip", source, low=max(low, -LARGEST), high=min(high, LARGEST))

    def settle(self, name: str) -> None:
        """The output is what the layer ``name`` gives, which may be one that was there before."""
        if self.scope.draft.sources.get(name) or name in self.scope.layers.values():
            self.pass_through(name)
        else:
            self.give(name)


def add_affine(op: Operator, source: str, scale: float | Array = 1.0, shift: float | Array = 0.0) -> str:
    tensors = {"scale": np.asarray(scale), "shift": np.asarray(shift)}
    return op.scope.draft.add("affine", [source], "", {}, tensors)


@dataclass(frozen=True)
class Steps:
    """Windows: their size, how far apart they are, what is put around, before each axis and then behind, and how far
    apart their numbers are."""

    kernel: list[int]
    stride: list[int]
    pads: list[int]
    gaps: list[int]

    def of_row(self) -> Steps:
        """The same along the row of a picture, of windows along one axis."""
        start, end = self.pads
        return Steps([1, *self.kernel], [1, *self.stride], [0, start, 0, end], [1, *self.gaps])

    def find_idle_axis(self) -> int:
        """That of three along which windows leave each number alone."""
        axis = find_idle_axis(self.kernel, self.stride, self.pads)
        if axis is None:
            raise UnknownFormError("has windows along three axes")
        return axis

    def without_axis(self, axis: int) -> Steps:
        """The same along the other two of three."""
        return Steps(*(without_axis(values, axis) for values in (self.kernel, self.stride, self.pads, self.gaps)))


def read_convolution(op: Operator) -> None:
    weight = op.constant(1)
    assert weight is not None
    axes = weight.ndim - 2
    if axes not in (1, 2, 3) or len(op.shape()) != weight.ndim:
        raise UnknownFormError(f"convolves {axes} axes, more than pictures have")
    stride, dilation = list(op.read_attribute("strides", [1] * axes)), list(op.read_attribute("dilations", [1] * axes))
    steps = Steps(list(weight.shape[2:]), stride, pads_of(op, weight.shape[2:], stride, dilation), dilation)
    convolve = convolve_volumes if axes == 3 else convolve_rows if axes == 1 else add_convolution
    op.give(convolve(op, op.layer(), weight, op.constant(2), steps, int(op.read_attribute("group", 1))))


def add_convolution(op: Operator, source: str, weight: Array, bias: Array | None, steps: Steps, groups: int) -> str:
    pads = steps.pads
    if pads[:2] != pads[2:]:
        source = op.add("pad", source, pads=pads, value=0.0)
        pads = [0, 0, 0, 0]
    options = convolution_options(weight, groups, stride=steps.stride, padding=pads[:2], dilation=steps.gaps)
    return op.scope.draft.add("conv", [source], "", options, convolution_tensors(weight, bias, groups))


def convolve_rows(op: Operator, source: str, weight: Array, bias: Array | None, steps: Steps, groups: int) -> str:
    """Along one axis: as one row of a picture."""
    row = op.add("reshape", source, shape=[op.shape()[1], 1, op.shape()[2]])
    done = add_convolution(op, row, weight[:, :, None], bias, steps.of_row(), groups)
    return op.add("reshape", done, shape=[len(weight), op.scope.draft.shape(done)[-1]])


def convolve_volumes(op: Operator, source: str, weight: Array, bias: Array | None, steps: Steps, groups: int) -> str:
    """Along two of three axes: for each number along the third, with the same weights."""
    axis = steps.find_idle_axis()
    times = op.shape()[axis + 2]
    if weight.size * times > MOST_WEIGHTS:
        raise UnknownFormError("has too many weights to repeat them along its third axis")
    weight = repeat_weights(weight, axis, times)
    bias = None if bias is None else np.concatenate([bias] * times)
    plane = steps.without_axis(axis)
    return run_without_axis(
        op.scope.draft, source, axis, lambda flat: add_convolution(op, flat, weight, bias, plane, groups * times)
    )


def pads_of(op: Operator, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]) -> list[int]:
    """Before each axis, then behind each: as given, or by ``auto_pad``."""
    auto, none = op.read_attribute("auto_pad", "NOTSET"), [0] * (2 * len(kernel))
    if auto in ("NOTSET", ""):
        return [int(value) for value in op.read_attribute("pads", none)]
    if auto == "VALID":
        return none
    starts, ends = [], []
    for size, extent, step, gap in zip(op.shape()[2:], kernel, stride, dilation, strict=True):
        total = max((-(-size // step) - 1) * step + (extent - 1) * gap + 1 - size, 0)
        small, large = total // 2, total - total // 2
        starts.append(small if auto == "SAME_UPPER" else large)
        ends.append(large if auto == "SAME_UPPER" else small)
    return [*starts, *ends]


def read_batch_norm(op: Operator) -> None:
    scale, shift, mean, variance = (op.scope.constant(name).astype(np.float64) for name in op.inputs[1:5])
    if is_in_training(op.node):
        raise UnknownFormError("normalizes by the batch: export it in evaluation state")
    if variance.min(initial=0) < 0:
        raise UnknownFormError(f"has a negative variance ({variance.min():.3g}): take weights of before it diverged")
    factor = scale / np.sqrt(variance + op.read_attribute("epsilon", 1e-5))
    shape = (-1, *(1,) * (0 if op.read_attribute(LAST_CHANNELS, 0) else len(op.shape()) - 2))
    tensors = {"scale": factor.reshape(shape), "shift": (shift - mean * factor).reshape(shape)}
    name = op.make("affine", [op.layer()], tensors)
    parts = {"weight": scale, "bias": shift, "running_mean": mean, "running_var": variance}
    op.scope.draft.norms[name] = (parts, float(op.read_attribute("epsilon", 1e-5)))


def read_gemm(op: Operator) -> None:
    weight, bias = op.constant(1), op.constant(2)
    assert weight is not None
    if weight.ndim != 2:
        raise UnknownFormError("multiplies other matrices than features by weights")
    if op.read_attribute("transA", 0) or op.shape()[0] != 1:
        raise BatchMixedError
    weight = (weight if op.read_attribute("transB", 0) else weight.T) * op.read_attribute("alpha", 1.0)
    bias = None if bias is None else np.broadcast_to(bias.reshape(-1), (len(weight),)) * op.read_attribute("beta", 1.0)
    if len(op.shape()) == 2:
        add_linear(op, weight, bias)
    else:
        op.give(add_linear_over_last_axis(op, op.layer(), weight, bias))


def read_matmul(op: Operator) -> None:
    if op.scope.is_constant(op.inputs[0]):
        multiply_from_left(op)
        return
    if not op.scope.is_constant(op.inputs[1]):
        if len(op.shape(0)) != len(op.shape(1)):
            raise BatchMixedError
        op.make("matmul", [expand_for_matmul(op, place) for place in (0, 1)])
        return
    weight, shape = op.constant(1), op.shape()
    assert weight is not None
    if weight.ndim != 2:
        multiply_each(op, weight)
        return
    if len(shape) == 2:
        add_linear(op, weight.T, None)
        return
    op.give(add_linear_over_last_axis(op, op.layer(), weight.T))


def multiply_each(op: Operator, weight: Array) -> None:
    """By a vector, or by several matrices, in float."""
    shape, weight = op.shape(), op.scope.value_for_one(weight)
    if weight.ndim == 1:
        if len(shape) < 3:
            raise BatchMixedError
        whole = op.scope.draft.add("matmul", [op.layer()], "", {}, {"weight": weight[:, None]})
        op.give(op.add("reshape", whole, shape=list(shape[1:-1])))
        return
    if weight.ndim == len(shape) and len(weight) == 1:
        weight = weight[0]
    if weight.ndim >= len(shape):
        raise BatchMixedError
    if np.broadcast_shapes(shape[:-2], weight.shape[:-2]) != shape[:-2]:
        raise UnknownFormError("adds axes by weights")
    op.make("matmul", [op.layer()], {"weight": weight})


def multiply_from_left(op: Operator) -> None:
    """Weights times columns: the columns are rows for so long."""
    weight, shape = op.constant(0), op.shape(1)
    assert weight is not None
    if weight.ndim != 2:
        raise UnknownFormError("multiplies several matrices by columns")
    if len(shape) < 3:
        raise BatchMixedError
    turned = [*range(len(shape) - 2), len(shape) - 1, len(shape) - 2]
    rows = add_linear_over_last_axis(op, op.add("transpose", op.layer(1), axes=turned), weight)
    op.give(op.add("transpose", rows, axes=turned))


def expand_for_matmul(op: Operator, place: int) -> str:
    """The layer at ``place`` of two that are multiplied, with as many matrices as the other."""
    name, shape = op.layer(place), op.shape(place)
    many = np.broadcast_shapes(op.shape(0)[:-2], op.shape(1)[:-2])
    return name if many == shape[:-2] else op.add("expand", name, shape=[*many[1:], *shape[-2:]])


def add_linear(op: Operator, weight: Array, bias: Array | None) -> None:
    outputs, inputs = weight.shape
    bias = np.zeros(outputs) if bias is None else np.broadcast_to(bias.reshape(-1), (outputs,))
    op.make("linear", [op.layer()], {"weight": weight, "bias": bias}, inputs=inputs, outputs=outputs)


def add_linear_over_last_axis(op: Operator, source: str, weight: Array, bias: Array | None = None) -> str:
    """``source``, (N, ..., C), by (O, C): as a 1x1 convolution, of a picture whose channels come last as it is."""
    draft, flat = op.scope.draft, source
    shape = draft.shape(source)
    if len(shape) != 4:
        flat = op.add("reshape", flat, shape=[math.prod(shape[1:-1]), 1, shape[-1]])
    first = op.add("transpose", flat, axes=[0, 3, 1, 2])
    kernels = weight[:, :, None, None]
    done = draft.add("conv", [first], "", convolution_options(kernels, 1), convolution_tensors(kernels, bias, 1))
    last = op.add("transpose", done, axes=[0, 2, 3, 1])
    return last if len(shape) == 4 else op.add("reshape", last, shape=[*shape[1:-1], len(weight)])


def read_binary(kind: str) -> Callable[[Operator], None]:
    """Add, Sub, Mul or Div: of two layers, or of a layer and constants."""

    def read(op: Operator) -> None:
        first, second = op.inputs[0], op.inputs[1]
        constants = [op.scope.is_constant(name) for name in (first, second)]
        if not any(constants):
            add_binary(op, kind, op.layer(0), op.layer(1))
        else:
            name, value = (second, op.scope.constant(first)) if constants[0] else (first, op.scope.constant(second))
            add_constant(op, kind, op.scope.layer(name), value.astype(np.float64), constants[0])

    return read


def add_binary(op: Operator, kind: str, one: str, other: str) -> None:
    draft = op.scope.draft
    if len(draft.shape(one)) != len(draft.shape(other)):
        raise BatchMixedError
    if kind == "mul" and draft.shape(one) != draft.shape(other):
        # What is broadcast comes second.
        small = math.prod(draft.shape(one)) < math.prod(draft.shape(other))
        one, other = (other, one) if small else (one, other)
    op.make(kind, [one, other])


def add_constant(op: Operator, kind: str, layer: str, value: Array, value_first: bool) -> None:
    shape, value = op.scope.draft.shape(layer), op.scope.value_for_one(value)
    larger = np.broadcast_shapes(shape, value.shape)
    if larger != shape:
        if len(larger) != len(shape) or larger[0] != 1:
            raise UnknownFormError("adds axes, or pictures, by a constant")
        layer, shape = op.add("expand", layer, shape=list(larger[1:])), larger
    value = value.reshape(value.shape[1:]) if value.ndim == len(shape) and value.shape[0] == 1 else value
    if value.ndim >= len(shape):
        raise UnknownFormError("has a constant for each picture")
    one, zero = np.ones(()), np.zeros(())
    if kind in ("add", "sub"):
        value = limit(value)
    if kind == "div" and value_first:
        layer, kind, value_first = op.add("reciprocal", layer), "mul", False
    scale, shift = {
        "add": (one, value),
        "sub": (-one, value) if value_first else (one, -value),
        "mul": (value, zero),
        "div": ((1 / value if kind == "div" else one), zero),
    }[kind]
    op.make("affine", [layer], {"scale": scale, "shift": shift})


def limit(value: Array) -> Array:
    """``value`` without infinities, which masks add to leave places out, and far enough from them to be added up."""
    return np.clip(value.astype(np.float64), -MASKED, MASKED)


def read_clip(op: Operator) -> None:
    low, high = (op.numbers(name, place) for name, place in (("min", 1), ("max", 2)))
    op.settle(op.limit(op.layer(), read_first(low, -math.inf), read_first(high, math.inf)))


def read_first(value: Any, default: float) -> float:
    if value is None:
        return default
    found = float(value[0] if isinstance(value, list) else value)
    return found if abs(found) < LARGEST else math.copysign(math.inf, found)


def read_unary(kind: str, **defaults: float) -> Callable[[Operator], None]:
    """An activation; ``defaults`` are ONNX's attributes, under our names."""
    theirs = {"slope": "alpha"}

    def read(op: Operator) -> None:
        options = {name: float(op.read_attribute(theirs.get(name, name), value)) for name, value in defaults.items()}
        op.make(kind, [op.layer()], **options)

    return read


def read_prelu(op: Operator) -> None:
    slope = op.constant(1)
    assert slope is not None
    slope = slope[0] if slope.ndim == len(op.shape()) else slope
    op.make("prelu", [op.layer()], {"slope": slope})


def read_concat(op: Operator) -> None:
    first = next(op.scope.layer(name) for name in op.inputs if not op.scope.is_constant(name))
    axis = op.axis(int(op.read_attribute("axis", 1)), len(op.scope.draft.shape(first)))
    if axis == 0:
        raise BatchMixedError
    names = [
        add_constant_beside(op, first, axis, name) if op.scope.is_constant(name) else op.scope.layer(name)
        for name in op.inputs
    ]
    if len(names) == 1:
        op.pass_through(names[0])
    else:
        op.make("concat", names, axis=axis)


def add_constant_beside(op: Operator, layer: str, axis: int, name: str) -> str:
    """A layer that gives the constant ``name`` whatever ``layer`` gives, beside which it is put along ``axis``."""
    draft, value = op.scope.draft, op.scope.value_for_one(op.scope.constant(name))
    shape = draft.shape(layer)
    if value.ndim == len(shape) and len(value) == 1:
        value = value[0]
    if value.ndim != len(shape) - 1:
        raise UnknownFormError("joins a constant of other axes than what is beside it")
    size = value.shape[axis - 1]
    places = {"start": 0, "stop": size, "step": 1} if size <= shape[axis] else {"indices": [0] * size}
    part = op.add("slice", layer, axis=axis, **places)
    return draft.add("affine", [part], "", {}, {"scale": np.zeros(()), "shift": value})


def read_split(op: Operator) -> None:
    shape = op.shape()
    axis = op.axis(int(op.read_attribute("axis", 0)), len(shape))
    number = int(op.read_attribute("num_outputs", len(op.node.output)))
    chunk = -(-shape[axis] // number)
    even = [min(chunk, shape[axis] - i * chunk) for i in range(number)]
    sizes = [int(size) for size in op.numbers("split", 1, even)]
    start = 0
    for place, size in enumerate(sizes):
        add_slice(op, op.layer(), axis, start, start + size, 1, place)
        start += size


def add_slice(op: Operator, source: str, axis: int, start: int, stop: int, step: int, output: int = 0) -> None:
    if axis == 0:
        raise BatchMixedError
    op.make("slice", [source], None, output, axis=axis, start=start, stop=stop, step=step)


def read_slice(op: Operator) -> None:
    shape, source = op.shape(), op.layer()
    starts, stops = op.numbers("starts", 1), op.numbers("ends", 2)
    axes = op.numbers("axes", 3, list(range(len(starts))))
    steps = op.numbers("steps", 4, [1] * len(starts))
    parts = []
    for start, stop, axis, step in zip(starts, stops, axes, steps, strict=True):
        place = op.axis(int(axis), len(shape))
        if step < 1:
            source = reverse(op, source, place, slice(int(start), int(stop), int(step)))
            continue
        first, last, _ = slice(int(start), int(stop), int(step)).indices(shape[place])
        if (first, last, step) != (0, shape[place], 1):
            parts.append((place, first, last, int(step)))
    if not parts:
        op.give(source) if source != op.layer() else op.pass_through(source)
        return
    for place, first, last, step in parts[:-1]:
        options = {"axis": place, "start": first, "stop": last, "step": step}
        if place == 0:
            raise BatchMixedError
        source = op.add("slice", source, **options)
    add_slice(op, source, *parts[-1])


def reverse(op: Operator, source: str, axis: int, part: slice) -> str:
    """What lies in ``part`` of ``axis``, whose step is negative."""
    if axis == 0:
        raise BatchMixedError
    indices = list(range(*part.indices(op.shape()[axis])))
    return op.add("slice", source, axis=axis, indices=indices)


def read_gather(op: Operator) -> None:
    indices, shape = op.constant(1), op.shape()
    assert indices is not None
    axis = op.axis(int(op.read_attribute("axis", 0)), len(shape))
    if axis == 0:
        raise BatchMixedError
    wanted = [*shape[1:axis], *indices.shape, *shape[axis + 1 :]]
    look_up(op, op.layer(), axis, [int(i) % shape[axis] for i in indices.reshape(-1)], wanted)


def look_up(op: Operator, source: str, axis: int, places: list[int], wanted: Sequence[int]) -> None:
    """The output is what lies at ``places`` along ``axis`` of ``source``, in the shape ``wanted``."""
    if len(places) > MOST_PLACES:
        raise UnknownFormError("looks up more numbers than channels or positions")
    shape = op.scope.draft.shape
    if places != list(range(shape(source)[axis])):
        source = op.add("slice", source, axis=axis, indices=places)
    if shape(source)[1:] != tuple(wanted):
        source = op.add("reshape", source, shape=list(wanted))
    op.settle(source)


def read_pool(kind: str) -> Callable[[Operator], None]:
    def read(op: Operator) -> None:
        if any(name in op.scope.read for name in op.node.output[1:]):
            raise UnknownFormError("tells places, too")
        op.give(add_pool(op, kind, op.layer()))

    return read


def add_pool(op: Operator, kind: str, source: str) -> str:
    """A layer of ``kind`` over the windows of ``op``; over one axis, of one row of a picture."""
    shape, kernel = op.scope.draft.shape(source), [int(size) for size in op.read_attribute("kernel_shape", [])]
    axes = len(kernel)
    gaps = [int(gap) for gap in op.read_attribute("dilations", [1] * axes)]
    if axes not in (1, 2, 3) or len(shape) != axes + 2 or op.read_attribute("storage_order", 0):
        raise UnknownFormError("pools over other windows than those of pictures")
    if max(gaps) > 1 and kind != "max_pool":
        raise UnknownFormError("averages windows with gaps")
    stride = [int(size) for size in op.read_attribute("strides", [1] * axes)]
    steps = Steps(kernel, stride, pads_of(op, kernel, stride, gaps), gaps)
    if axes == 2:
        return add_window(op, kind, source, steps)
    if axes == 3:
        axis = steps.find_idle_axis()
        plane = steps.without_axis(axis)
        return run_without_axis(op.scope.draft, source, axis, lambda flat: add_window(op, kind, flat, plane))
    row = op.add("reshape", source, shape=[shape[1], 1, shape[2]])
    pooled = add_window(op, kind, row, steps.of_row())
    return op.add("reshape", pooled, shape=[shape[1], op.scope.draft.shape(pooled)[-1]])


def add_window(op: Operator, kind: str, source: str, steps: Steps) -> str:
    ceil, sizes = bool(op.read_attribute("ceil_mode", 0)), list(op.scope.draft.shape(source)[2:])
    is_bare, has_gaps, kernel = not any(steps.pads), max(steps.gaps) > 1, steps.kernel
    if ceil and is_bare and not has_gaps:  # what hangs over does not count
        kernel = [min(pair) for pair in zip(kernel, sizes, strict=True)]
    if kernel == sizes and is_bare and not has_gaps:
        return op.add({"max_pool": "global_max", "avg_pool": "global_avg"}[kind], source)
    more: dict[str, Any] = {"dilation": steps.gaps} if has_gaps else {}
    if kind == "avg_pool":
        # Nothing around makes both the same. ONNX Runtime 1.20 counts what hangs over where this is set, and joins a
        # Pad with the average behind it where it is not.
        more = {"include": not ceil if is_bare else bool(op.read_attribute("count_include_pad", 0))}
    return op.add(kind, source, kernel=kernel, stride=steps.stride, pads=steps.pads, ceil=ceil, **more)


def read_global_pool(kind: str) -> Callable[[Operator], None]:
    def read(op: Operator) -> None:
        op.give(add_global_pool(op, kind, op.layer()))

    return read


def add_global_pool(op: Operator, kind: str, source: str) -> str:
    """Over pictures, or over one axis: a row of a picture."""
    shape = op.scope.draft.shape(source)
    if len(shape) == 4:
        return op.add(kind, source)
    if len(shape) != 3:
        raise UnknownFormError("pools over other axes than those of pictures")
    row = op.add("reshape", source, shape=[shape[1], 1, shape[2]])
    return op.add("reshape", op.add(kind, row), shape=[shape[1], 1])


def read_mean(op: Operator) -> None:
    op.give(reduce(op, op.layer(), "mean", "global_avg"))


def axes_named(op: Operator, rank: int) -> list[int]:
    """The axes of ``rank`` along which ``op`` goes, which are not those of pictures."""
    axes = op.numbers("axes", 1)
    places = sorted(op.axis(int(axis), rank) for axis in axes) if axes else list(range(rank))
    if not axes and op.read_attribute("noop_with_empty_axes", 0):
        raise UnknownFormError("goes over no axes")
    if 0 in places:
        raise BatchMixedError
    return places


def reduce(op: Operator, source: str, kind: str, global_kind: str) -> str:
    """A layer of ``kind`` along the axes that ``op`` names; of ``global_kind`` where these are all of a picture."""
    shape = op.scope.draft.shape(source)
    places = axes_named(op, len(shape))
    is_global = len(shape) == 4 and places == [2, 3]
    name = op.add(global_kind, source) if is_global else op.add(kind, source, axes=places)
    if op.read_attribute("keepdims", 1):
        return name
    rest = [size for i, size in enumerate(shape) if i > 0 and i not in places]
    return op.add("reshape", name, shape=rest)


def read_softmax(kind: str) -> Callable[[Operator], None]:
    def read(op: Operator) -> None:
        shape = op.shape()
        default = -1 if op.scope.opset >= 13 else 1
        axis = op.axis(int(op.read_attribute("axis", default)), len(shape))
        if axis == 0:
            raise BatchMixedError
        if op.scope.opset >= 13 or math.prod(shape[axis + 1 :]) == 1:
            op.make(kind, [op.layer()], axis=axis)
            return
        # Before opset 13 it goes over all axes from this one on.
        flat = op.add("reshape", op.layer(), shape=[math.prod(shape[1:axis]), math.prod(shape[axis:])])
        op.give(op.add("reshape", op.add(kind, flat, axis=2), shape=list(shape[1:])))

    return read


def add_reshape(op: Operator, shape: Sequence[int]) -> None:
    """To ``shape``, whose first axis is the batch of one picture."""
    if not shape or shape[0] != 1:
        raise BatchMixedError
    if tuple(shape) == op.shape():
        op.pass_through(op.layer())
    else:
        op.make("reshape", [op.layer()], shape=[int(size) for size in shape[1:]])


def read_reshape(op: Operator) -> None:
    wanted = [int(size) for size in op.numbers("shape", 1)]
    source = op.shape()
    if not op.read_attribute("allowzero", 0):
        wanted = [source[i] if size == 0 else size for i, size in enumerate(wanted)]
    wanted = op.scope.shape_for_one(wanted, math.prod(source))
    known = math.prod(size for size in wanted if size != -1)
    add_reshape(op, [math.prod(source) // max(known, 1) if size == -1 else size for size in wanted])


def read_flatten(op: Operator) -> None:
    shape = op.shape()
    axis = op.axis(int(op.read_attribute("axis", 1)), len(shape))
    add_reshape(op, [math.prod(shape[:axis]), math.prod(shape[axis:])])


def read_squeeze(op: Operator) -> None:
    shape = op.shape()
    axes = op.numbers("axes", 1)
    places = [op.axis(int(axis), len(shape)) for axis in axes] if axes else range(1, len(shape))
    add_reshape(op, [size for i, size in enumerate(shape) if i not in places or (not axes and size != 1)])


def read_unsqueeze(op: Operator) -> None:
    axes, shape = op.numbers("axes", 1), list(op.shape())
    rank = len(shape) + len(axes)
    for axis in sorted(op.axis(int(axis), rank) for axis in axes):
        shape.insert(axis, 1)
    add_reshape(op, shape)


def read_transpose(op: Operator) -> None:
    rank = len(op.shape())
    axes = [int(axis) for axis in op.read_attribute("perm", range(rank)[::-1])]
    if axes[0] != 0:
        raise BatchMixedError
    if axes == list(range(rank)):
        op.pass_through(op.layer())
    else:
        op.make("transpose", [op.layer()], axes=axes)


def read_lrn(op: Operator) -> None:
    options = {"alpha": 1e-4, "beta": 0.75, "bias": 1.0}
    values = {name: float(op.read_attribute(name, default)) for name, default in options.items()}
    op.make("lrn", [op.layer()], size=int(op.read_attribute("size", 1)), **values)


def read_cast(op: Operator) -> None:
    """To floats; to truth, which is a mask; of uint8 pixels to wider integers, too."""
    wanted = int(op.read_attribute("to", 1))
    if wanted == BOOL:
        read_truth(op)
        return
    kinds = FLOATS | WIDE_INTEGERS if op.scope.holds_pixels(op.layer()) else FLOATS
    if wanted not in kinds:
        raise UnknownFormError("turns layers into integers or half floats")
    op.pass_through(op.layer())


def read_truth(op: Operator) -> None:
    """1 where a number is not 0."""
    source = op.layer()
    amount = op.add("abs", source)
    op.give(op.scope.draft.add("greater", [amount], "", {}, {"value": np.zeros(())}))


def read_dropout(op: Operator) -> None:
    ratio = op.read_attribute("ratio", op.numbers("ratio", 1, [0.5]))
    if any(op.numbers("training_mode", 2, [0])) and ratio not in (0, [0.0]):
        raise UnknownFormError("drops at random: export it in evaluation state")
    op.pass_through(op.layer())


def read_nothing(op: Operator) -> None:
    op.pass_through(op.layer())


READERS: dict[str, Callable[[Operator], None]] = {
    "Abs": read_unary("abs"),
    "Add": read_binary("add"),
    "Atan": read_unary("atan"),
    "AveragePool": read_pool("avg_pool"),
    "BatchNormalization": read_batch_norm,
    "Cast": read_cast,
    "Ceil": read_unary("ceil"),
    "Clip": read_clip,
    "Concat": read_concat,
    "Conv": read_convolution,
    "Cos": read_unary("cos"),
    "Div": read_binary("div"),
    "Dropout": read_dropout,
    "Elu": read_unary("elu", alpha=1.0),
    "Erf": read_unary("erf"),
    "Exp": read_unary("exp"),
    "Flatten": read_flatten,
    "Floor": read_unary("floor"),
    "Gather": read_gather,
    "Gemm": read_gemm,
    "GlobalAveragePool": read_global_pool("global_avg"),
    "GlobalMaxPool": read_global_pool("global_max"),
    "HardSigmoid": read_unary("hard_sigmoid", alpha=0.2, beta=0.5),
    "HardSwish": read_unary("hard_swish"),
    "Identity": read_nothing,
    "LRN": read_lrn,
    "LeakyRelu": read_unary("leaky_relu", slope=0.01),
    "Log": read_unary("log"),
    "LogSoftmax": read_softmax("log_softmax"),
    "MatMul": read_matmul,
    "MaxPool": read_pool("max_pool"),
    "Mul": read_binary("mul"),
    "Neg": read_unary("neg"),
    "PRelu": read_prelu,
    "Reciprocal": read_unary("reciprocal"),
    "ReduceMean": read_mean,
    "Relu": read_unary("relu"),
    "Reshape": read_reshape,
    "Round": read_unary("round"),
    "Sigmoid": read_unary("sigmoid"),
    "Sign": read_unary("sign"),
    "Sin": read_unary("sin"),
    "Slice": read_slice,
    "Softmax": read_softmax("softmax"),
    "Softplus": read_unary("softplus"),
    "Split": read_split,
    "Sqrt": read_unary("sqrt"),
    "Squeeze": read_squeeze,
    "Sub": read_binary("sub"),
    "Tanh": read_unary("tanh"),
    "Transpose": read_transpose,
    "Unsqueeze": read_unsqueeze,
}
"""ONNX's name of an operator -> what reads it."""

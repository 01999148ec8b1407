"""An int8 network as a list of integer layers, read from an ONNX file of mgq.

It holds what is computed, not how: weights int8, biases int32, multipliers float32, and for every tensor the range of
its uint8 values. ``docs/concepts/integer-arithmetic.md`` says what each layer does with them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from mgq.errors import InputError, printable
from mgq.export.onnx.float_input import PIXEL_ZERO

Array = npt.NDArray[Any]
Padding = tuple[int, int, int, int]
"""Top, left, bottom, right."""
Colour = tuple[int, ...]
"""A uint8 value for each channel."""


@dataclass(frozen=True)
class Tensor:
    """uint8 values ``low`` to ``high`` of shape (N, ``channels``, ``height``, ``width``); ``zero`` stands for 0.0."""

    name: str
    channels: int
    height: int
    width: int
    scale: float
    zero: int
    low: int = 0
    high: int = 255


@dataclass(frozen=True)
class Layer:
    """One operation: names of the tensors that it reads and of the one that it makes."""

    inputs: tuple[str, ...]
    output: str


@dataclass(frozen=True)
class Conv(Layer):
    """``weight`` int8 (O, C / groups, KH, KW), ``bias`` int32 (O,), ``multiplier`` float32 (O,).

    ``padding`` is top, left, bottom, right, filled with the zero of the input, or with the uint8 values ``colour``, one
    for each channel.
    """

    weight: Array
    bias: Array
    multiplier: Array
    stride: tuple[int, int]
    padding: tuple[int, int, int, int]
    groups: int
    colour: Colour | None = None

    @property
    def is_depthwise(self) -> bool:
        return self.groups > 1 and self.groups == len(self.weight) and self.weight.shape[1] == 1


@dataclass(frozen=True)
class Linear(Layer):
    """``weight`` int8 (O, I), ``bias`` int32 (O,), ``multiplier`` float32 (O,): logits are float32 (N, O)."""

    weight: Array
    bias: Array
    multiplier: Array


@dataclass(frozen=True)
class Sum(Layer):
    """The two inputs times ``multipliers``, float32."""

    multipliers: tuple[float, float]


@dataclass(frozen=True)
class MaxPool(Layer):
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int, int, int]


@dataclass(frozen=True)
class Mean(Layer):
    """The sum over all positions times ``multiplier``, float32."""

    multiplier: float


@dataclass(frozen=True)
class Shuffle(Layer):
    """Channel i of the output is channel ``order[i]`` of the input."""

    order: tuple[int, ...]


@dataclass(frozen=True)
class Program:
    """``layers`` in the order in which they run, from pixels ``input``, uint8 (N, 3, H, W) in BGR, to float logits."""

    layers: tuple[Layer, ...]
    tensors: Mapping[str, Tensor]
    input: str
    output: str
    classes: int

    @property
    def image_size(self) -> int:
        return self.tensors[self.input].height


def multiplier_of(numerator: Array | float, denominator: float) -> Array:
    """``numerator`` / ``denominator``, rounded to float32 once."""
    quotient: Array = (np.asarray(numerator, np.float64) / float(denominator)).astype(np.float32)
    return quotient


def read_program(model: Any) -> Program:
    """The program of an ONNX ``model`` that mgq has written in int8. Raises InputError for any other."""
    return Reader(model).program()


def make_refusal(what: str) -> InputError:
    return InputError(
        f"the native engine does not run {what}: pass --engine openvino, or dump an .onnx file for OpenVINO or "
        "ONNX Runtime"
    )


@dataclass(frozen=True)
class ScaleAndZero:
    scale: Array
    zero: int


class Border(NamedTuple):
    """What a Pad puts around the tensor ``source``; no ``colour``: what stands for 0.0."""

    source: str
    padding: Padding
    colour: Colour | None = None


class Reader:
    """Reads the nodes one by one. A float tensor is known by the integers that it was or will be."""

    def __init__(self, model: Any) -> None:
        from onnx import numpy_helper

        self.graph = model.graph
        self.constants: dict[str, Array] = {i.name: numpy_helper.to_array(i) for i in self.graph.initializer}
        self.values: dict[str, tuple[str, ScaleAndZero]] = {}  # float tensor -> its integers and their grid
        self.weights: dict[str, tuple[Array, Array]] = {}  # float constant -> integers and scales
        self.pending: dict[str, Callable[[str, ScaleAndZero], None]] = {}  # float result -> what makes integers of it
        self.tensors: dict[str, Tensor] = {}
        self.made: dict[str, tuple[Layer, ...]] = {}
        self.layers: list[Layer] = []
        self.same_as: dict[str, str] = {}
        self.moved: dict[str, tuple[str, Array]] = {}  # reshaped tensors -> source, and where its channels are now
        self.padded: dict[str, Border] = {}  # padded tensors
        self.channels: dict[str, tuple[int, Border]] = {}  # single channels of an image, padded
        self.classes = 0

    def program(self) -> Program:
        from onnx.helper import get_attribute_value

        source = self.graph.input[0]
        shape = [axis.dim_value for axis in source.type.tensor_type.shape.dim]
        if source.type.tensor_type.elem_type != 2 or len(shape) != 4:
            raise make_refusal("a file whose input is not uint8 (N, 3, S, S)")
        if min(shape[1:]) < 1:
            raise make_refusal("a file whose image size is open")
        self.tensors[source.name] = Tensor(source.name, shape[1], shape[2], shape[3], 1.0, PIXEL_ZERO)
        for node in self.graph.node:
            attributes = {a.name: get_attribute_value(a) for a in node.attribute}
            read = getattr(self, f"read_{node.op_type.lower()}", None)
            if read is None:
                raise make_refusal(f"the operator {printable(node.op_type)} of {printable(node.name)}")
            try:
                read(list(node.input), node.output[0], attributes)
            except (KeyError, IndexError, ValueError):  # in a place where mgq does not write it
                raise make_refusal(f"the {printable(node.op_type)} of {printable(node.name)} where it stands") from None
        output = self.graph.output[0].name
        if not self.layers or self.layers[-1].output != output or not isinstance(self.layers[-1], Linear):
            raise make_refusal("a network whose classifier is not int8")
        return Program(tuple(self.layers), self.tensors, source.name, output, self.classes)

    def tensor(self, name: str) -> Tensor:
        return self.tensors[self.name(name)]

    def name(self, name: str) -> str:
        return self.same_as.get(name, name)

    def read_cast(self, inputs: list[str], _: str, __: dict[str, Any]) -> None:
        """Integers as floats, for a layer that was kept in float."""
        raise make_refusal(f"what reads {printable(inputs[0])} in float")

    def float_input(self, name: str) -> tuple[Tensor, ScaleAndZero]:
        if name not in self.values:
            raise make_refusal(f"{printable(name)} in float")
        integers, grid = self.values[name]
        if integers in self.padded:
            raise make_refusal(f"the Pad {printable(integers)} in front of what is no window")
        return self.tensor(integers), grid

    def window_input(self, name: str, attributes: dict[str, Any]) -> tuple[Tensor, ScaleAndZero, Padding]:
        """What a convolution or an average reads, and its padding, with that of a Pad in front of it."""
        if name not in self.values:
            raise make_refusal(f"{printable(name)} in float")
        integers, grid = self.values[name]
        tensor, padding = self.read_behind_pad(integers, attributes)
        return tensor, grid, padding

    def read_behind_pad(self, name: str, attributes: dict[str, Any]) -> tuple[Tensor, Padding]:
        if attributes.get("ceil_mode") or attributes.get("auto_pad", b"NOTSET") != b"NOTSET":
            raise make_refusal(f"a window over {printable(name)} that hangs over its border")
        if any(step != 1 for step in attributes.get("dilations", ())):
            raise make_refusal("a window with dilation")
        own = attributes.get("pads", (0, 0, 0, 0))
        border = self.padded.get(self.name(name), Border(self.name(name), (0, 0, 0, 0)))
        if border.colour is not None and any(own):
            raise make_refusal(f"a window over {printable(name)} with two kinds of borders")
        top, left, bottom, right = (int(one) + other for one, other in zip(own, border.padding, strict=True))
        return self.tensors[border.source], (top, left, bottom, right)

    def colour_behind(self, name: str) -> Colour | None:
        """The colour around the image that ``name``, integers or floats, is; None for what stands for 0.0."""
        integers = self.values[name][0] if name in self.values else self.name(name)
        return self.padded[integers].colour if integers in self.padded else None

    def read_pad(self, inputs: list[str], output: str, _: dict[str, Any]) -> None:
        """The window behind it reads beyond the image instead."""
        source = self.tensor(inputs[0])
        pads = [int(side) for side in self.constants[inputs[1]]]
        filling = int(self.constants[inputs[2]])
        around = (pads[2], pads[3], pads[6], pads[7])
        if len(pads) != 8 or pads[0] or pads[4] or min(around) < 0 or max(pads[1], pads[5]) > 0:
            raise make_refusal(f"the Pad {printable(output)} of other axes than the image's")
        colour = None if filling == source.zero else (filling,) * source.channels
        if colour is not None and source.name != self.graph.input[0].name:
            raise make_refusal(f"the Pad {printable(output)} with other than zeros around the image")
        if not pads[1] and not pads[5]:
            self.padded[output] = Border(source.name, around, colour)
        elif source.channels + pads[1] + pads[5] == 1:
            self.channels[output] = -pads[1], Border(source.name, around, (filling,))
        else:
            raise make_refusal(f"the Pad {printable(output)}, which leaves channels out")

    def read_concat(self, inputs: list[str], output: str, attributes: dict[str, Any]) -> None:
        """All channels of the image, each with a border of its own value."""
        parts = [self.channels[name] for name in inputs]
        first = parts[0][1]
        whole = [channel for channel, _ in parts] == list(range(self.tensors[first.source].channels))
        alike = {(border.source, border.padding) for _, border in parts} == {(first.source, first.padding)}
        if not whole or not alike or attributes["axis"] != 1 or first.source != self.graph.input[0].name:
            raise make_refusal(f"the Concat {printable(output)}, which is no image in a border")
        self.padded[output] = Border(*first[:2], tuple(value for _, border in parts for value in border.colour or ()))

    def read_dequantizelinear(self, inputs: list[str], output: str, _: dict[str, Any]) -> None:
        source, scale, *zero = inputs
        scales = self.constants[scale]
        if source in self.constants:
            self.weights[output] = self.constants[source], scales
            return
        integers = self.name(source)
        if integers not in self.tensors and integers not in self.padded:
            raise make_refusal(f"a layer behind {printable(source)}, which is no image")
        self.values[output] = integers, ScaleAndZero(scales, int(self.constants[zero[0]]))
        if integers == self.graph.input[0].name and float(scales) != 1.0:
            raise make_refusal("pixels with a scale other than 1")

    def read_quantizelinear(self, inputs: list[str], output: str, _: dict[str, Any]) -> None:
        source, scale, zero = inputs
        grid = ScaleAndZero(self.constants[scale], int(self.constants[zero]))
        if source in self.values:  # put on the grid that it lies on: the integers stay
            known, old = self.values[source]
            if old.zero != grid.zero or float(old.scale) != float(grid.scale):
                raise make_refusal(f"the second grid of {printable(source)}")
            self.same_as[output] = known
            return
        if source not in self.pending:
            raise make_refusal(f"{printable(source)} in float")
        if grid.zero not in (0, PIXEL_ZERO):
            raise make_refusal(f"the zero point {grid.zero} of {printable(output)}")
        self.pending.pop(source)(output, grid)

    def read_clip(self, inputs: list[str], output: str, _: dict[str, Any]) -> None:
        source, low, high = inputs
        if source not in self.tensors:
            raise make_refusal(f"a Clip of {printable(source)} in float")
        limits = int(self.constants[low]), int(self.constants[high])
        self.tensors[source] = replace(self.tensors[source], low=limits[0], high=limits[1])
        self.same_as[output] = source

    def make(self, layer: Layer, shape: tuple[int, int, int], grid: ScaleAndZero) -> None:
        self.tensors[layer.output] = Tensor(layer.output, *shape, float(grid.scale), grid.zero)
        self.layers.append(layer)

    def integers_of(self, names: list[str], source: ScaleAndZero) -> tuple[Array, Array, Array]:
        """Weights, bias int32 and the scales of the sums, float64, one an output."""
        if names[0] not in self.weights:
            raise make_refusal(f"{printable(names[0])} in float")
        weight, scales = self.weights[names[0]]
        outputs = len(weight)
        sums = np.broadcast_to(scales.astype(np.float64) * float(source.scale), (outputs,))
        bias = self.weights[names[1]][0] if len(names) > 1 else np.zeros(outputs, np.int32)
        return weight, bias.astype(np.int32), sums

    def read_conv(self, inputs: list[str], output: str, attributes: dict[str, Any]) -> None:
        source, grid, padding = self.window_input(inputs[0], attributes)
        weight, bias, scales = self.integers_of(inputs[1:], grid)
        stride = tuple(attributes.get("strides", (1, 1)))
        shape = len(weight), *positions(source, weight.shape[2:], stride, padding)
        groups, colour = attributes.get("group", 1), self.colour_behind(inputs[0])
        if colour is not None and groups > 1:
            raise make_refusal(f"the convolution {printable(output)} in groups of pixels in a coloured border")
        if groups == len(weight) > 1:
            weight, padding = widen(weight, stride, padding)

        def finish(name: str, to: ScaleAndZero) -> None:
            multiplier = multiplier_of(scales, float(to.scale))
            layer = Conv((source.name,), name, weight, bias, multiplier, stride, padding, groups, colour)
            self.make(layer, shape, to)

        self.pending[output] = finish

    def read_add(self, inputs: list[str], output: str, _: dict[str, Any]) -> None:
        (first, one), (second, other) = (self.float_input(name) for name in inputs)

        def finish(name: str, to: ScaleAndZero) -> None:
            factors = [float(multiplier_of(float(grid.scale), float(to.scale))) for grid in (one, other)]
            layer = Sum((first.name, second.name), name, (factors[0], factors[1]))
            self.make(layer, (first.channels, first.height, first.width), to)

        self.pending[output] = finish

    def read_maxpool(self, inputs: list[str], output: str, attributes: dict[str, Any]) -> None:
        source, padding = self.read_behind_pad(inputs[0], attributes)
        if self.colour_behind(inputs[0]) is not None:
            raise make_refusal(f"a coloured border in front of the MaxPool {printable(output)}")
        if self.name(inputs[0]) in self.padded and source.zero:
            raise make_refusal(f"a Pad of zeros in front of the MaxPool {printable(output)}")
        kernel, stride = tuple(attributes["kernel_shape"]), tuple(attributes["strides"])
        height, width = positions(source, kernel, stride, padding)
        self.follow(MaxPool((source.name,), output, kernel, stride, padding), source, (source.channels, height, width))

    def read_averagepool(self, inputs: list[str], output: str, attributes: dict[str, Any]) -> None:
        """The mean of all of the image; else a depthwise convolution whose weights are 1."""
        source, grid, padding = self.window_input(inputs[0], attributes)
        kernel, stride = tuple(attributes["kernel_shape"]), tuple(attributes.get("strides", (1, 1)))
        if self.colour_behind(inputs[0]) is not None:
            raise make_refusal(f"a coloured border in front of the AveragePool {printable(output)}")
        if any(padding) and not attributes.get("count_include_pad"):
            raise make_refusal(f"the AveragePool {printable(output)}, which leaves its border out")
        if kernel == (source.height, source.width) and not any(padding):
            self.read_globalaveragepool(inputs, output, {})
            return
        count, channels = kernel[0] * kernel[1], source.channels
        weight, bias = np.ones((channels, 1, *kernel), np.int8), np.zeros(channels, np.int32)
        shape = channels, *positions(source, kernel, stride, padding)
        weight, padding = widen(weight, stride, padding)

        def finish(name: str, to: ScaleAndZero) -> None:
            multiplier = multiplier_of(np.full(channels, float(grid.scale) / count), float(to.scale))
            self.make(Conv((source.name,), name, weight, bias, multiplier, stride, padding, channels), shape, to)

        self.pending[output] = finish

    def follow(self, layer: Layer, source: Tensor, shape: tuple[int, int, int]) -> None:
        """``layer`` makes values of its source's grid."""
        self.tensors[layer.output] = Tensor(layer.output, *shape, source.scale, source.zero, source.low, source.high)
        self.layers.append(layer)

    def read_globalaveragepool(self, inputs: list[str], output: str, _: dict[str, Any]) -> None:
        source, grid = self.float_input(inputs[0])

        def finish(name: str, to: ScaleAndZero) -> None:
            count = source.height * source.width
            factor = float(multiplier_of(float(grid.scale) / count, float(to.scale)))
            self.make(Mean((source.name,), name, factor), (source.channels, 1, 1), to)

        self.pending[output] = finish

    def read_flatten(self, inputs: list[str], output: str, _: dict[str, Any]) -> None:
        source, places = self.places(inputs[0])
        self.move(source, output, places.ravel())

    def read_reshape(self, inputs: list[str], output: str, _: dict[str, Any]) -> None:
        source, places = self.places(inputs[0])
        shape = [int(axis) for axis in self.constants[inputs[1]][1:]]
        self.move(source, output, places.reshape(shape))

    def read_transpose(self, inputs: list[str], output: str, attributes: dict[str, Any]) -> None:
        source, places = self.places(inputs[0])
        self.move(source, output, places.transpose([axis - 1 for axis in attributes["perm"][1:]]))

    def places(self, name: str) -> tuple[str, Array]:
        """The tensor that ``name`` is moved from, and where each of its values is now."""
        if name in self.moved:
            return self.moved[name]
        tensor = self.tensor(name)
        shape = tensor.channels, tensor.height, tensor.width
        return tensor.name, np.arange(np.prod(shape)).reshape(shape)

    def move(self, source: str, output: str, places: Array) -> None:
        tensor = self.tensors[source]
        shape = tensor.channels, tensor.height, tensor.width
        self.moved[output] = source, places
        if places.size == tensor.channels and (places.ravel() == np.arange(places.size)).all():
            self.same_as[output] = source  # one number a channel, in another shape
            return
        if places.shape != shape:
            return
        order = places[:, 0, 0] // (tensor.height * tensor.width)
        if not (places == np.arange(places.size).reshape(shape)[order]).all():
            return  # no shuffle of channels yet
        self.follow(Shuffle((source,), output, tuple(int(c) for c in order)), tensor, shape)

    def read_gemm(self, inputs: list[str], output: str, attributes: dict[str, Any]) -> None:
        source, grid = self.float_input(inputs[0])
        weight, bias, scales = self.integers_of(inputs[1:], grid)
        if weight.shape[1] != source.channels or source.height * source.width != 1:
            raise make_refusal(f"the Gemm {printable(output)} of a whole map")
        if output != self.graph.output[0].name:

            def finish(name: str, to: ScaleAndZero) -> None:
                multiplier, window = np.broadcast_to(multiplier_of(scales, float(to.scale)), len(weight)), (0, 0, 0, 0)
                wide = weight[:, :, None, None]
                self.make(
                    Conv((source.name,), name, wide, bias, multiplier, (1, 1), window, 1), (len(weight), 1, 1), to
                )

            self.pending[output] = finish
            return
        self.classes = len(weight)
        self.layers.append(Linear((source.name,), output, weight, bias, multiplier_of(scales, 1.0)))


def widen(weight: Array, stride: Any, padding: Padding) -> tuple[Array, Padding]:
    """Depthwise ``weight`` with zeros below and to the right, and so much more padding, so that windows overlap.

    The sums stay what they are. The kernels go on with what they have read.
    """
    down, across = (max(0, step + 1 - size) for step, size in zip(stride, weight.shape[2:], strict=True))
    top, left, bottom, right = padding
    return np.pad(weight, ((0, 0), (0, 0), (0, down), (0, across))), (top, left, bottom + down, right + across)


def positions(source: Tensor, kernel: Any, stride: Any, padding: Any) -> tuple[int, int]:
    """Height and width of what a window of ``kernel`` makes of ``source``."""
    height = (source.height + padding[0] + padding[2] - kernel[0]) // stride[0] + 1
    width = (source.width + padding[1] + padding[3] - kernel[1]) // stride[1] + 1
    return height, width

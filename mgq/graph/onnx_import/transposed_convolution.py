"""ConvTranspose and Col2Im: a convolution of pictures that are made larger by zeros between their numbers."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from mgq.graph.onnx_import.operators import Operator, Steps, UnknownFormError, add_convolution

Array = npt.NDArray[Any]


def read_transposed_convolution(op: Operator) -> None:
    weight, shape = op.constant(1), op.shape()
    if weight is None or weight.ndim != 4 or len(shape) != 4:
        raise UnknownFormError("spreads other axes than those of pictures")
    stride = [int(step) for step in op.read_attribute("strides", [1, 1])]
    gaps = [int(gap) for gap in op.read_attribute("dilations", [1, 1])]
    reach = [gap * (size - 1) for gap, size in zip(gaps, weight.shape[2:], strict=True)]
    steps = Steps(list(weight.shape[2:]), stride, cut_sides(op, reach, stride), gaps)
    op.give(convolve_spread(op, op.layer(), weight, op.constant(2), steps, int(op.read_attribute("group", 1))))


def read_col2im(op: Operator) -> None:
    """Parts of a picture that are put where they were taken from, and summed where they overlap."""
    image, block = op.numbers("", 1), op.numbers("", 2)
    if len(image) != 2 or len(block) != 2:
        raise UnknownFormError("puts together other axes than those of pictures")
    stride, gaps = op.read_attribute("strides", [1, 1]), op.read_attribute("dilations", [1, 1])
    pads = op.read_attribute("pads", [0] * 4)
    whole = [size + first + last for size, first, last in zip(image, pads[:2], pads[2:], strict=True)]
    spare = [size - gap * (part - 1) - 1 for size, gap, part in zip(whole, gaps, block, strict=True)]
    counts = [left // step + 1 for left, step in zip(spare, stride, strict=True)]
    channels = op.shape()[1] // math.prod(block)
    if list(stride) == block and not any(pads) and [n * part for n, part in zip(counts, block, strict=True)] == image:
        parts = op.add("reshape", op.layer(), shape=[channels, *block, *counts])
        op.make("reshape", [op.add("transpose", parts, axes=[0, 1, 4, 2, 5, 3])], shape=[channels, *image])
        return
    behind = [last - left % step for last, left, step in zip(pads[2:], spare, stride, strict=True)]
    source = op.add("reshape", op.layer(), shape=[channels * math.prod(block), *counts])
    places = np.tile(np.eye(math.prod(block), dtype=np.float32), (channels, 1)).reshape(-1, 1, *block)
    steps = Steps(block, list(stride), [*pads[:2], *behind], list(gaps))
    op.give(convolve_spread(op, source, places, None, steps, channels))


def convolve_spread(op: Operator, source: str, weight: Array, bias: Array | None, steps: Steps, groups: int) -> str:
    """``source`` with zeros between its numbers, convolved; the pads of ``steps`` are cut off the whole result."""
    reach = [gap * (size - 1) for gap, size in zip(steps.gaps, steps.kernel, strict=True)]
    around = [far - side for far, side in zip(reach * 2, steps.pads, strict=True)]
    around[2:] = [side - (step - 1) for side, step in zip(around[2:], steps.stride, strict=True)]  # zeros behind
    source = cut(op, spread(op, source, steps.stride), around)
    plain = Steps(steps.kernel, [1, 1], [max(side, 0) for side in around], steps.gaps)
    return add_convolution(op, source, turn_weights(weight, groups), bias, plain, groups)


def cut_sides(op: Operator, reach: list[int], stride: list[int]) -> list[int]:
    """How much of the whole result is cut off above, left, below and right: as given, or by the size that is wanted."""
    more = [int(size) for size in op.read_attribute("output_padding", [0, 0])]
    auto = op.read_attribute("auto_pad", "NOTSET")
    sizes = op.shape()[2:]
    wanted = op.read_attribute("output_shape", None)
    if wanted is None and not auto.startswith("SAME"):
        pads = [int(side) for side in op.read_attribute("pads", [0] * 4)]
        return [*pads[:2], *(side - extra for side, extra in zip(pads[2:], more, strict=True))]
    ends = [size * step for size, step in zip(sizes, stride, strict=True)] if wanted is None else list(wanted)[-2:]
    starts, behind = [], []
    for size, step, far, end, extra in zip(sizes, stride, reach, ends, more, strict=True):
        total = step * (size - 1) + extra + far + 1 - int(end)
        first = total // 2 if auto == "SAME_UPPER" else total - total // 2
        starts.append(first)
        behind.append(total - first - extra)
    return starts + behind


def spread(op: Operator, source: str, stride: list[int]) -> str:
    """``source``, (N, C, H, W), with zeros behind each number, so that it is as many times as large."""
    channels, height, width = op.scope.draft.shape(source)[1:]
    down, right = stride
    if right > 1:
        source = op.add("reshape", source, shape=[channels, height * width, 1])
        source = op.add("pad", source, pads=[0, 0, 0, right - 1], value=0.0)
    if down > 1:
        source = op.add("reshape", source, shape=[channels * height, 1, width * right])
        source = op.add("pad", source, pads=[0, 0, down - 1, 0], value=0.0)
    if op.scope.draft.shape(source)[1:] == (channels, height, width):
        return source
    return op.add("reshape", source, shape=[channels, height * down, width * right])


def cut(op: Operator, source: str, around: list[int]) -> str:
    """``source`` without what lies where ``around``, above, left, below and right, is below 0."""
    shape = op.scope.draft.shape(source)
    for axis, (first, last) in enumerate(zip(around[:2], around[2:], strict=True), 2):
        if min(first, last) < 0:
            stop = shape[axis] + min(last, 0)
            source = op.add("slice", source, axis=axis, start=max(-first, 0), stop=stop, step=1)
    return source


def turn_weights(weight: Array, groups: int) -> Array:
    """(inputs, outputs of a group, height, width) as a convolution of the same has them."""
    inputs, outputs, *kernel = weight.shape
    apart = weight.reshape(groups, inputs // groups, outputs, *kernel).swapaxes(1, 2)
    return np.ascontiguousarray(apart.reshape(groups * outputs, inputs // groups, *kernel)[:, :, ::-1, ::-1])

"""ConvTranspose: a convolution of pictures that are made larger by zeros between their numbers."""

from __future__ import annotations

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
    groups = int(op.read_attribute("group", 1))
    reach = [gap * (size - 1) for gap, size in zip(gaps, weight.shape[2:], strict=True)]
    around = [far - side for far, side in zip(reach * 2, cut_sides(op, reach, stride), strict=True)]
    around[2:] = [side - (step - 1) for side, step in zip(around[2:], stride, strict=True)]  # of zeros behind the last
    source = cut(op, spread(op, op.layer(), stride), around)
    steps = Steps(list(weight.shape[2:]), [1, 1], [max(side, 0) for side in around], gaps)
    op.give(add_convolution(op, source, turn_weights(weight, groups), op.constant(2), steps, groups))


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

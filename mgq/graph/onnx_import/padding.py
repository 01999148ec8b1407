"""Pad: numbers around a picture, around rows, or between channels; and what cuts them."""

from __future__ import annotations

import math
from collections.abc import Sequence

from mgq.graph.onnx_import.operators import BatchMixedError, Operator, UnknownFormError, read_first

MODES = ("constant", "edge", "reflect", "wrap")


def read_pad(op: Operator) -> None:
    mode = str(op.read_attribute("mode", "constant"))
    if mode not in MODES:
        raise UnknownFormError(f"pads by the mode {mode}")
    starts, ends = sides_of(op)
    if starts[0] or ends[0]:
        raise BatchMixedError
    source = op.layer()
    for axis, (start, end) in enumerate(zip(starts, ends, strict=True)):
        if min(start, end) < 0:
            size = op.scope.draft.shape(source)[axis]
            first, last = max(-start, 0), size - max(-end, 0)
            source = op.add("slice", source, axis=axis, start=first, stop=last, step=1)
    source = pad(op, source, [max(size, 0) for size in starts], [max(size, 0) for size in ends], mode)
    op.settle(source)


def sides_of(op: Operator) -> tuple[list[int], list[int]]:
    """How many numbers stand before each axis, and behind it."""
    rank = len(op.shape())
    given = [int(size) for size in op.numbers("pads", 1)]
    axes = op.numbers("axes", 3, list(range(rank))) if op.scope.opset >= 18 else list(range(rank))
    starts, ends = [0] * rank, [0] * rank
    for place, axis in enumerate(axes):
        starts[int(axis) % rank], ends[int(axis) % rank] = given[place], given[place + len(axes)]
    return starts, ends


def pad(op: Operator, source: str, starts: Sequence[int], ends: Sequence[int], mode: str) -> str:
    """``source`` with numbers around it, of each axis."""
    axes = [axis for axis, sizes in enumerate(zip(starts, ends, strict=True)) if any(sizes)]
    if not axes:
        return source
    if mode == "wrap":
        for axis in axes:
            source = wrap(op, source, axis, starts[axis], ends[axis])
        return source
    shape = op.scope.draft.shape(source)
    if len(shape) != 4 or axes[-1] - axes[0] > 1 or (mode != "constant" and axes[0] == 1):
        return pad_rows(op, source, starts, ends, mode)
    if axes[0] == 1 and len(axes) == 1:
        return op.add("pad", source, pads=[0] * 4, value=border(op), channels=[starts[1], ends[1]])
    if axes[0] == 1:  # channels last: the axes of pictures are those before them
        first = op.add("transpose", source, axes=[0, 3, 1, 2])
        padded = op.add("pad", first, pads=[*starts[1:3], *ends[1:3]], value=border(op))
        return op.add("transpose", padded, axes=[0, 2, 3, 1])
    return pad_pictures(op, source, [*starts[2:], *ends[2:]], mode)


def border(op: Operator) -> float:
    return read_first(op.numbers("value", 2), 0.0)


def pad_pictures(op: Operator, source: str, pads: list[int], mode: str) -> str:
    """``source``, (N, C, H, W), with ``pads`` above, left, below and right."""
    if mode == "constant":
        return op.add("pad", source, pads=pads, value=border(op))
    return op.add("border", source, pads=pads, mode=mode)


def pad_rows(op: Operator, source: str, starts: Sequence[int], ends: Sequence[int], mode: str) -> str:
    """Along one axis after the other: as the height of a picture whose width are all axes behind it."""
    for axis in range(1, len(starts)):
        if starts[axis] or ends[axis]:
            shape = list(op.scope.draft.shape(source))
            before, size, behind = shape[1:axis], shape[axis], shape[axis + 1 :]
            flat = op.add("reshape", source, shape=[math.prod(before), size, math.prod(behind)])
            padded = pad_pictures(op, flat, [starts[axis], 0, ends[axis], 0], mode)
            source = op.add("reshape", padded, shape=[*before, starts[axis] + size + ends[axis], *behind])
    return source


def wrap(op: Operator, source: str, axis: int, start: int, end: int) -> str:
    """Around ``axis`` stands what is at its other end."""
    size = op.scope.draft.shape(source)[axis]
    if max(start, end) > size:
        raise UnknownFormError("repeats more than there is")
    parts = [(size - start, size), (0, size), (0, end)]
    pieces = [
        op.add("slice", source, axis=axis, start=first, stop=last, step=1) for first, last in parts if first < last
    ]
    return op.add("concat", *pieces, axis=axis)

"""The reference implementation of the integers in numpy, slow and plain. Every kernel gives the same bits."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from mgq.export.native.program import Conv, Layer, Linear, MaxPool, Mean, Program, Shuffle, Sum, Tensor

Array = npt.NDArray[np.generic]
Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]


def run_reference(program: Program, images: Bytes) -> tuple[Floats, dict[str, Bytes]]:
    """Logits of ``images``, uint8 (N, 3, S, S), float32 (N, classes), and the integers of all tensors, (N, C, H, W)."""
    values: dict[str, Bytes] = {program.input: images}
    logits = np.zeros((len(images), program.classes), np.float32)
    for layer in program.layers:
        if isinstance(layer, Linear):
            logits = classify(program, layer, values)
        else:
            values[layer.output] = integers_of(program, layer, values)
    return logits, values


def integers_of(program: Program, layer: Layer, values: dict[str, Bytes]) -> Bytes:
    """The output of ``layer``, uint8 (N, C, H, W)."""
    source, target = program.tensors[layer.inputs[0]], program.tensors[layer.output]
    read = values[source.name]
    if isinstance(layer, Conv):
        return saturate(convolve(layer, read, source.zero) * layer.multiplier[:, None, None], target)
    if isinstance(layer, Sum):
        parts = [
            (values[name].astype(np.float32) - np.float32(program.tensors[name].zero)) * np.float32(factor)
            for name, factor in zip(layer.inputs, layer.multipliers, strict=True)
        ]
        return saturate(parts[0] + parts[1], target)
    if isinstance(layer, Mean):
        total = (read.astype(np.int64) - source.zero).sum((2, 3), keepdims=True)
        return saturate(total.astype(np.float32) * np.float32(layer.multiplier), target)
    if isinstance(layer, MaxPool):
        return max_pool(layer, read)
    assert isinstance(layer, Shuffle)
    return read[:, list(layer.order)]


def saturate(values: Floats, target: Tensor) -> Bytes:
    """Halves to even, then the zero point, then the limits of ``target``."""
    return np.clip(np.rint(values) + np.float32(target.zero), target.low, target.high).astype(np.uint8)


def convolve(layer: Conv, read: Bytes, zero: int) -> Floats:
    """Sums of products and bias, exact in int32 (which wraps), as float32 (N, O, H, W)."""
    top, left, bottom, right = layer.padding
    colour = (zero,) * read.shape[1] if layer.colour is None else layer.colour
    whole = (len(read), read.shape[1], top + read.shape[2] + bottom, left + read.shape[3] + right)
    padded = np.broadcast_to(np.array(colour, np.int32)[:, None, None] - zero, whole).copy()
    padded[:, :, top : top + read.shape[2], left : left + read.shape[3]] = read.astype(np.int32) - zero
    outputs, inputs, rows, columns = layer.weight.shape
    down, across = layer.stride
    height = (padded.shape[2] - rows) // down + 1
    width = (padded.shape[3] - columns) // across + 1
    weight = layer.weight.reshape(layer.groups, -1, inputs, rows, columns).astype(np.float64)
    total = np.zeros((len(read), layer.groups, outputs // layer.groups, height, width), np.float64)
    for row in range(rows):
        for column in range(columns):
            part = padded[:, :, row : row + down * (height - 1) + 1 : down]
            part = part[..., column : column + across * (width - 1) + 1 : across].astype(np.float64)
            # float64 holds these sums exactly, and multiplies matrices faster than integers.
            part = part.reshape(len(read), layer.groups, inputs, height * width)
            product = np.matmul(weight[None, :, :, :, row, column], part)
            total += product.reshape(total.shape)
    sums = total.reshape(len(read), outputs, height, width).astype(np.int64) + layer.bias[:, None, None]
    result: Floats = sums.astype(np.int32).astype(np.float32)
    return result


def max_pool(layer: MaxPool, read: Bytes) -> Bytes:
    """The largest of each window; what lies outside of the image counts as the smallest."""
    top, left, bottom, right = layer.padding
    padded = np.pad(read, ((0, 0), (0, 0), (top, bottom), (left, right)))
    windows: Any = np.lib.stride_tricks.sliding_window_view(padded, layer.kernel, axis=(2, 3))  # type: ignore[call-overload]
    largest: Bytes = windows[:, :, :: layer.stride[0], :: layer.stride[1]].max((4, 5))
    return largest


def classify(program: Program, layer: Linear, values: dict[str, Bytes]) -> Floats:
    source = program.tensors[layer.inputs[0]]
    read = values[source.name].reshape(len(values[source.name]), -1).astype(np.int64) - source.zero
    total = read @ layer.weight.astype(np.int64).T + layer.bias
    logits: Floats = total.astype(np.int32).astype(np.float32) * layer.multiplier
    return logits

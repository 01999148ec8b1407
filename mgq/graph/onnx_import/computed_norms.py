"""Batch norms whose statistics are computed of the picture itself: layer norms, as TensorFlow spells them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from mgq.graph.onnx_import.operators import BatchMixedError, Operator, add_affine

Array = npt.NDArray[Any]


def is_computed_norm(op: Operator) -> bool:
    """Whether ``op`` is a batch norm that reads what layers give as its mean, variance, scale or shift."""
    return op.node.op_type == "BatchNormalization" and not all(map(op.scope.is_constant, op.inputs[1:5]))


def read_computed_norm(op: Operator) -> None:
    if op.inputs[0] in op.scope.without_batch or len(op.shape()) < 3:
        raise BatchMixedError
    epsilon = float(op.read_attribute("epsilon", 1e-5))
    if has_own_statistics(op):
        normal = normalize_channels(op, epsilon)
    else:
        spread = add_affine(op, channel_layer(op, 4), 1.0, epsilon)
        normal = op.add("div", op.add("sub", op.layer(), channel_layer(op, 3)), op.add("sqrt", spread))
    if all(map(op.scope.is_constant, op.inputs[1:3])):
        shape = (-1, *(1,) * (len(op.shape()) - 2))
        op.give(add_affine(op, normal, *(op.scope.constant(name).reshape(shape) for name in op.inputs[1:3])))
    else:
        op.give(op.add("add", op.add("mul", normal, channel_layer(op, 1)), channel_layer(op, 2)))


def has_own_statistics(op: Operator) -> bool:
    """Whether mean and variance are those of each channel of the picture that is normalized: of the one at hand."""
    if any(map(op.scope.is_constant, op.inputs[3:5])):
        return False
    samples = op.scope.draft.samples
    values = samples[op.layer()].reshape(op.shape()[1], -1)
    return all(
        samples[op.layer(place)].size == len(values)
        and np.allclose(samples[op.layer(place)].ravel(), wanted, rtol=1e-4, atol=1e-5 * float(np.abs(wanted).max()))
        for place, wanted in ((3, values.mean(axis=1)), (4, values.var(axis=1)))
    )


def normalize_channels(op: Operator, epsilon: float) -> str:
    channels, *sizes = op.shape()[1:]
    size, draft = math.prod(sizes), op.scope.draft
    rows = op.add("reshape", op.layer(), shape=[channels, size])
    normal = draft.add("layer_norm", [rows], "", {"eps": epsilon}, {"scale": np.ones(size)})
    return op.add("reshape", normal, shape=[channels, *sizes])


def channel_layer(op: Operator, place: int) -> str:
    """What ``op`` reads at ``place``, a number for each channel, beside its picture: constants, too."""
    channels, *sizes = op.shape()[1:]
    shape = [channels, *(1 for _ in sizes)]
    name = op.inputs[place]
    if not op.scope.is_constant(name):
        return op.add("reshape", op.scope.layer(name), shape=shape)
    first = op.layer()
    for axis in range(2, len(shape) + 1):
        first = op.add("slice", first, axis=axis, start=0, stop=1, step=1)
    return add_affine(op, first, 0.0, op.scope.constant(name).reshape(shape))

"""ONNX operators that make one number of several: along axes, or over the windows of a picture."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from mgq.graph.onnx_import.operators import (
    BatchMixedError,
    Operator,
    UnknownFormError,
    add_affine,
    add_global_pool,
    add_pool,
    axes_named,
    reduce,
)


def read_highest(op: Operator) -> None:
    op.give(add_highest(op, op.layer()))


def read_lowest(op: Operator) -> None:
    op.give(op.add("neg", add_highest(op, op.add("neg", op.layer()))))


def add_highest(op: Operator, source: str) -> str:
    return reduce(op, source, "highest", "global_max")


def add_sum(op: Operator, source: str) -> str:
    """``source`` summed up: the mean of so many numbers, that many times."""
    mean = reduce(op, source, "mean", "global_avg")
    size = math.prod(op.scope.draft.shape(source)) / math.prod(op.scope.draft.shape(mean))
    return add_affine(op, mean, size)


def read_sum_over(op: Operator) -> None:
    op.give(add_sum(op, op.layer()))


def read_length(op: Operator) -> None:
    """ReduceL2: the root of the sum of squares."""
    op.give(op.add("sqrt", add_sum(op, square(op, op.layer()))))


def square(op: Operator, source: str) -> str:
    return op.add("mul", source, source)


def read_squares(op: Operator) -> None:
    op.give(add_sum(op, square(op, op.layer())))


def read_amounts(op: Operator) -> None:
    """ReduceL1: the sum of what is left without signs."""
    op.give(add_sum(op, op.add("abs", op.layer())))


def read_log_of_sum(op: Operator) -> None:
    op.give(op.add("log", add_sum(op, op.layer())))


def read_log_of_powers(op: Operator) -> None:
    """ReduceLogSumExp: powers of what is less than the highest, which is added behind."""
    source = op.layer()
    highest = op.add("highest", source, axes=axes_named(op, len(op.shape())))
    total = op.add("log", add_sum(op, op.add("exp", op.add("sub", source, highest))))
    shape = list(op.scope.draft.shape(total)[1:])
    op.give(op.add("add", total, op.add("reshape", highest, shape=shape)))


def read_running_sum(op: Operator) -> None:
    """CumSum: each number with those before it, or behind it, with itself or without."""
    shape, axis = op.shape(), op.axis(int(op.numbers("axis", 1)[0]), len(op.shape()))
    if axis == 0:
        raise BatchMixedError
    before = np.triu(np.ones((shape[axis],) * 2), int(op.read_attribute("exclusive", 0)))
    weight = before.T if op.read_attribute("reverse", 0) else before
    rows = [math.prod(shape[1:axis]), shape[axis], math.prod(shape[axis + 1 :])]
    last = op.add("transpose", op.add("reshape", op.layer(), shape=rows), axes=[0, 1, 3, 2])
    summed = op.scope.draft.add("matmul", [last], "", {}, {"weight": weight})
    op.give(op.add("reshape", op.add("transpose", summed, axes=[0, 1, 3, 2]), shape=list(shape[1:])))


# ---- lengths, by the power p ----


def read_normal_length(op: Operator) -> None:
    """LpNormalization: divided by the length along one axis."""
    power, source, rank = int(op.read_attribute("p", 2)), op.layer(), len(op.shape())
    axis = op.axis(int(op.read_attribute("axis", -1)), rank)
    size = op.shape()[axis]
    total = add_affine(op, op.add("mean", raise_to(op, source, power), axes=[axis]), size)
    op.give(op.add("div", source, take_root(op, total, power)))


def raise_to(op: Operator, source: str, power: int) -> str:
    if power == 2:
        return square(op, source)
    amount = op.add("abs", source)
    return amount if power == 1 else op.add("pow", amount, power=float(power))


def take_root(op: Operator, source: str, power: int) -> str:
    if power == 1:
        return source
    return op.add("sqrt", source) if power == 2 else op.add("pow", source, power=1 / power)


def read_length_pool(op: Operator) -> None:
    """LpPool: the length of each window."""
    power = int(op.read_attribute("p", 2))
    if op.read_attribute("ceil_mode", 0) or max(op.read_attribute("dilations", [1])) > 1:
        raise UnknownFormError("takes windows with gaps, or that hang over")
    op.attributes["count_include_pad"] = 1
    means = add_pool(op, "avg_pool", raise_to(op, op.layer(), power))
    total = add_affine(op, means, math.prod(op.read_attribute("kernel_shape", [])))
    op.give(take_root(op, total, power))


def read_whole_length(op: Operator) -> None:
    """GlobalLpPool."""
    power = int(op.read_attribute("p", 2))
    means = add_global_pool(op, "global_avg", raise_to(op, op.layer(), power))
    op.give(take_root(op, add_affine(op, means, np.asarray(math.prod(op.shape()[2:]))), power))


REDUCING: dict[str, Callable[[Operator], None]] = {
    "CumSum": read_running_sum,
    "GlobalLpPool": read_whole_length,
    "LpNormalization": read_normal_length,
    "LpPool": read_length_pool,
    "ReduceL1": read_amounts,
    "ReduceL2": read_length,
    "ReduceLogSum": read_log_of_sum,
    "ReduceLogSumExp": read_log_of_powers,
    "ReduceMax": read_highest,
    "ReduceMin": read_lowest,
    "ReduceSum": read_sum_over,
    "ReduceSumSquare": read_squares,
}
"""ONNX's name of an operator -> what reads it."""
REDUCING_AXES = frozenset(name for name in REDUCING if name.startswith("Reduce"))
"""Those that name axes."""

"""ONNX operators that compare numbers, and choose among them: the largest of several, masks, and thresholds."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

import numpy as np
import numpy.typing as npt

from mgq.graph.onnx_import.operators import (
    BatchMixedError,
    Operator,
    UnknownFormError,
    add_affine,
    limit,
    read_first,
)

Array = npt.NDArray[Any]


def constant_for(op: Operator, layer: str, value: Array) -> Array:
    """``value``, beside what ``layer`` gives, without the axis of pictures. Raises UnknownFormError where it makes that
    larger."""
    shape, value = op.scope.draft.shape(layer), op.scope.value_for_one(np.asarray(value))
    if value.ndim == len(shape) and len(value) == 1:
        value = value[0]
    if value.ndim >= len(shape) and value.size > 1 and len(shape) > 1:
        raise BatchMixedError
    if value.size > 1 and np.broadcast_shapes(shape, value.shape) != shape:
        raise UnknownFormError("adds axes by a constant")
    return value.reshape(()) if value.size == 1 else value


# ---- the largest and the smallest ----


def read_limit(is_max: bool) -> Callable[[Operator], None]:
    """Max or Min of layers and constants."""
    kind, join = ("maximum", np.maximum) if is_max else ("minimum", np.minimum)

    def read(op: Operator) -> None:
        layers, values = apart(op)
        refuse_other_ranks(op, layers)
        whole = layers[0]
        for other in layers[1:]:
            whole = op.add(kind, whole, other)
        if not values:
            op.settle(whole)
            return
        value = constant_for(op, whole, reduce(join, values))
        if value.size > 1:
            op.give(op.scope.draft.add(kind, [whole], "", {}, {"value": value}))
            return
        number = read_first(value.ravel().tolist(), 0.0)
        limits = (number, math.inf) if is_max else (-math.inf, number)
        op.settle(op.limit(whole, *limits))

    return read


def apart(op: Operator) -> tuple[list[str], list[Array]]:
    """The layers that ``op`` reads, and the constants."""
    layers = [op.scope.layers[name] for name in op.inputs if not op.scope.is_constant(name)]
    return layers, [op.scope.constants[name] for name in op.inputs if op.scope.is_constant(name)]


def refuse_other_ranks(op: Operator, layers: Sequence[str]) -> None:
    if len({len(op.scope.draft.shape(name)) for name in layers}) > 1:
        raise BatchMixedError


# ---- sums and means ----


def read_total(is_mean: bool) -> Callable[[Operator], None]:
    """Sum or Mean of layers and constants."""

    def read(op: Operator) -> None:
        layers, values = apart(op)
        refuse_other_ranks(op, layers)
        total = reduce(lambda one, other: op.add("add", one, other), layers)
        if values:
            total = add_affine(op, total, 1.0, constant_for(op, total, sum(values[1:], values[0])))
        if is_mean and len(op.inputs) > 1:
            total = add_affine(op, total, 1 / len(op.inputs))
        op.settle(total)

    return read


# ---- masks: 1 where something is so, else 0 ----


def read_greater(swapped: bool, negated: bool) -> Callable[[Operator], None]:
    """Greater, Less (``swapped``), LessOrEqual (``negated``) and GreaterOrEqual (both)."""

    def read(op: Operator) -> None:
        first, second = (1, 0) if swapped else (0, 1)
        mask = compare(op, first, second)
        op.give(add_affine(op, mask, -1.0, 1.0) if negated else mask)

    return read


def compare(op: Operator, first: int, second: int) -> str:
    """A layer that gives 1 where the input at ``first`` is greater than that at ``second``."""
    names = [op.inputs[first], op.inputs[second]]
    if not any(map(op.scope.is_constant, names)):
        refuse_other_ranks(op, [op.scope.layer(name) for name in names])
        return op.add("greater", *(op.scope.layer(name) for name in names))
    is_first = op.scope.is_constant(names[0])
    layer, value = op.scope.layer(names[is_first]), op.scope.constant(names[not is_first])
    value = constant_for(op, layer, value).astype(np.float64)
    if is_first:  # c > x where -x > -c
        layer, value = op.add("neg", layer), -value
    return op.scope.draft.add("greater", [layer], "", {}, {"value": value})


def read_equal(op: Operator) -> None:
    """Neither is greater."""
    op.give(add_affine(op, op.add("add", compare(op, 0, 1), compare(op, 1, 0)), -1.0, 1.0))


def read_not(op: Operator) -> None:
    op.give(add_affine(op, op.layer(), -1.0, 1.0))


def read_both(kind: str) -> Callable[[Operator], None]:
    """And, the ``minimum`` of two masks, or Or, the ``maximum``."""

    def read(op: Operator) -> None:
        layers, values = apart(op)
        refuse_other_ranks(op, layers)
        if not values:
            op.give(op.add(kind, *layers))
            return
        value = constant_for(op, layers[0], values[0]).astype(np.float64)
        op.give(op.scope.draft.add(kind, layers, "", {}, {"value": value}))

    return read


def read_never(op: Operator) -> None:
    """IsNaN and IsInf: no number of a classifier is one."""
    op.scope.constants[op.node.output[0]] = np.zeros((1,) * len(op.shape()), np.bool_)


def read_where(op: Operator) -> None:
    """By a mask that is known, or by one that is computed."""
    if op.scope.is_constant(op.inputs[0]):
        choose_by_constant(op, op.scope.constant(op.inputs[0]).astype(bool))
        return
    mask, others = op.layer(0), op.inputs[1:]
    if all(map(op.scope.is_constant, others)):
        high, low = (limit(constant_for(op, mask, op.scope.constant(name))) for name in others)
        op.give(add_affine(op, mask, high - low, low))
        return
    beside = next(op.scope.layer(name) for name in others if not op.scope.is_constant(name))
    layers = [layer_beside(op, beside, name) if op.scope.is_constant(name) else op.scope.layer(name) for name in others]
    refuse_other_ranks(op, [mask, *layers])
    op.give(op.add("choose", mask, *layers))


def layer_beside(op: Operator, layer: str, name: str) -> str:
    """A layer that gives the constant ``name`` whatever ``layer`` gives."""
    value = limit(constant_for(op, layer, op.scope.constant(name)))
    return add_affine(op, layer, 0.0, value)


def choose_by_constant(op: Operator, mask: Array) -> None:
    names = op.inputs[1:]
    if mask.all() or not mask.any():
        chosen, other = names if mask.all() else names[::-1]
        if not op.scope.is_constant(chosen):
            op.pass_through(op.scope.layer(chosen))
            return
        op.give(layer_beside(op, op.scope.layer(other), chosen))
        return
    parts, shift = [], np.zeros(())
    for name, where in zip(names, (mask, ~mask), strict=True):
        if op.scope.is_constant(name):
            shift = shift + np.where(where, limit(op.scope.constant(name)), 0.0)
        else:
            layer = op.scope.layer(name)
            parts.append((layer, constant_for(op, layer, where).astype(np.float64)))
    refuse_other_ranks(op, [layer for layer, _ in parts])
    first, *rest = (
        add_affine(op, layer, where, constant_for(op, layer, shift) if place == 0 else 0.0)
        for place, (layer, where) in enumerate(parts)
    )
    op.give(reduce(lambda one, other: op.add("add", one, other), rest, first))


def read_triangle(op: Operator) -> None:
    """Trilu: what lies above, or below, a diagonal of matrices."""
    shape, side = op.shape(), op.constant(1)
    offset = 0 if side is None else int(side.ravel()[0])
    if len(shape) < 3:
        raise BatchMixedError
    ones = np.ones(shape[-2:])
    mask = np.triu(ones, offset) if op.read_attribute("upper", 1) else np.tril(ones, offset)
    op.give(add_affine(op, op.layer(), mask))


# ---- thresholds ----


def add_greater(op: Operator, layer: str, value: float) -> str:
    return op.scope.draft.add("greater", [layer], "", {}, {"value": np.asarray(value)})


def read_threshold(op: Operator) -> None:
    """ThresholdedRelu: what is above ``alpha``, else 0."""
    mask = add_greater(op, op.layer(), float(op.read_attribute("alpha", 1.0)))
    op.give(op.add("mul", op.layer(), mask))


def read_shrink(op: Operator) -> None:
    """0 up to ``lambd`` on both sides; beyond it nearer to 0 by ``bias``."""
    far, bias = float(op.read_attribute("lambd", 0.5)), float(op.read_attribute("bias", 0.0))
    source = op.layer()
    if bias == far:  # what is beyond the limits
        op.give(op.add("sub", source, op.add("clip", source, low=-far, high=far)))
        return
    above, below = add_greater(op, source, far), add_greater(op, op.add("neg", source), far)
    result = op.add("mul", source, op.add("add", above, below))
    op.give(op.add("sub", result, add_affine(op, op.add("sub", above, below), bias)))


COMPARING: dict[str, Callable[[Operator], None]] = {
    "And": read_both("minimum"),
    "Equal": read_equal,
    "Greater": read_greater(False, False),
    "GreaterOrEqual": read_greater(True, True),
    "IsInf": read_never,
    "IsNaN": read_never,
    "Less": read_greater(True, False),
    "LessOrEqual": read_greater(False, True),
    "Max": read_limit(True),
    "Mean": read_total(True),
    "Min": read_limit(False),
    "Not": read_not,
    "Or": read_both("maximum"),
    "Shrink": read_shrink,
    "Sum": read_total(False),
    "ThresholdedRelu": read_threshold,
    "Trilu": read_triangle,
    "Where": read_where,
}
"""ONNX's name of an operator -> what reads it."""

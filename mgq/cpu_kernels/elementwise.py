"""Arithmetic on large arrays, element by element: in pieces that stay in a core's cache, on all cores.

numpy passes over an array once for every operation, on one core, and without the lock that threads share in Python.
Every result here is the same to the bit whatever the number of cores.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from mgq.cpu_kernels import numba_loops
from mgq.cpu_kernels.tensor_exchange import Array, empty
from mgq.machine import usable_cores

Mask = npt.NDArray[np.bool_]
Values = npt.NDArray[np.float64]
Result = TypeVar("Result")
Scalar = TypeVar("Scalar", bound=np.generic)

PIECE = 1 << 15
"""Elements of a piece: a few float32 arrays of this size fit into the second-level cache together."""
LONG_PIECE = 1 << 17
"""Elements of a piece for functions that pass over memory once: the call's overhead is negligible then."""
LEAST_SPAN = 1e-30
"""What a range without a width is taken for: bins in float32 cannot be narrower."""
# Arrays with fewer pieces for each core are not worth a thread.
PIECES_A_CORE = 4


@cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(usable_cores(), "mgq-elementwise")


# A forked process has no threads but the one that forked.
os.register_at_fork(after_in_child=_threads.cache_clear)


def share_out(run: Callable[[int, int], Result], pieces: int) -> list[Result]:
    """Call ``run`` with the first piece and the one behind the last of each core's share; return the results in
    order."""
    if pieces < PIECES_A_CORE or (cores := usable_cores()) == 1 or pieces < PIECES_A_CORE * cores:
        return [run(0, pieces)]
    share = -(-pieces // cores)
    futures = [_threads().submit(run, start, min(start + share, pieces)) for start in range(share, pieces, share)]
    return [run(0, share), *(future.result() for future in futures)]


def run_in_pieces(function: Callable[[slice], Result], size: int, piece: int = PIECE) -> list[Result]:
    """Call ``function`` with slices of ``piece`` elements that cover ``size``, on all cores; return the results in
    order."""
    if 0 < size <= piece:
        return [function(slice(0, size))]

    def run(first: int, last: int) -> list[Result]:
        return [function(slice(at * piece, min((at + 1) * piece, size))) for at in range(first, last)]

    return [result for part in share_out(run, -(-size // piece)) for result in part]


def run_in_rows(function: Callable[[slice], Result], rows: npt.NDArray[Any], piece: int = PIECE) -> list[Result]:
    """Call ``function`` with slices of ``rows`` (rows, elements), as many whole rows as fit into a piece."""
    return run_in_pieces(function, len(rows), max(1, piece // max(1, rows.shape[1])))


def fake_quantize(
    array: Array, scale: np.float32, zero_point: np.float32, qmin: np.float32, qmax: np.float32, positive: bool = False
) -> Mask | None:
    """Round ``array`` in place to multiples of ``scale``; where it was not clipped, None where it was nowhere.

    Where ``positive`` is set what is 0 or less counts as clipped.
    """
    passes = np.empty(array.shape, np.bool_)
    steps, marks = array.reshape(-1), passes.reshape(-1)
    above = np.float32(0 if positive else -np.inf)

    def quantize(piece: slice) -> bool:
        numba_loops.quantize(steps[piece], marks[piece], scale, zero_point, qmin, qmax, above)
        return bool(marks[piece].all())

    return None if all(run_in_pieces(quantize, steps.size, LONG_PIECE)) else passes


def fold_factors(scale: Array, variance: Array, epsilon: float) -> tuple[Array, Array]:
    """What a batch norm of these (C,) divides by and multiplies with: 1 / deviation, shaped as ``scale``, and
    ``scale`` / deviation (C,)."""
    inverse, factor = empty(scale.shape), empty((scale.size,))
    numba_loops.fold_factors(scale.reshape(-1), variance.reshape(-1), np.float32(epsilon), inverse.reshape(-1), factor)
    return inverse, factor


def round_rows(
    array: Array, factors: Array, divide: bool, scale: np.float32, qmin: np.float32, qmax: np.float32
) -> Array:
    """Each row of ``array``, seen as (factors.size, elements), times its factor, quantized, and by it again."""
    output = empty(array.shape)
    source, target = (rows_of(a, factors.size) for a in (array, output))
    each = factors.reshape(-1)

    def run(part: slice) -> None:
        numba_loops.round_rows(source[part], target[part], each[part], divide, scale, qmin, qmax)

    run_in_rows(run, source, LONG_PIECE)
    return output


def find_passing_rows(array: Array, factors: Array, scale: np.float32, qmin: np.float32, qmax: np.float32) -> Mask:
    """Where :func:`round_rows` does not clip: as ``array``."""
    passes = np.empty(array.shape, np.bool_)
    source, marks = rows_of(array, factors.size), rows_of(passes, factors.size)
    each = factors.reshape(-1)

    def run(part: slice) -> None:
        numba_loops.find_passing_rows(source[part], marks[part], each[part], scale, qmin, qmax)

    run_in_rows(run, source, LONG_PIECE)
    return passes


def mask_rows(
    gradient: Array, passes: Mask | None, weights: Array, effective: Array | None = None, factors: Array | None = None
) -> Array:
    """Keep of the ``gradient`` with respect to ``weights`` what ``passes``, in place, times ``factors`` by output.
    None: all passes.

    Returns, for each output channel, the sum of what passed times ``weights``, less that of all times ``effective``:
    (O,), O the leading axes.
    """
    outputs = math.prod(weights.shape[: weights.ndim - 3])
    sums = empty((outputs,))
    rows, others = (rows_of(array, outputs) for array in (gradient, weights))
    marks = None if passes is None else rows_of(passes, outputs)
    used = None if effective is None else rows_of(effective, outputs)

    def run(part: slice) -> None:
        numba_loops.mask_rows(
            rows[part],
            None if marks is None else marks[part],
            others[part],
            None if used is None else used[part],
            None if factors is None else factors[part],
            sums[part],
        )

    run_in_rows(run, rows, LONG_PIECE)
    return sums


def rows_of(array: npt.NDArray[Scalar], rows: int) -> npt.NDArray[Scalar]:
    return array.reshape(rows, -1)


def add_to_histograms(values: Array, weights: Array, qmin: Values, qmax: Values, squares: Values, sums: Array) -> None:
    """Add to histograms of each row of ``values`` (rows, elements), whose bins reach from ``qmin`` to ``qmax``.

    Squared ``weights`` to ``squares``, float64 (rows, bins), ``weights`` to ``sums``, float32 (rows, few): bins is a
    multiple of few. Values of 0 count for nothing.
    """
    bins = squares.shape[1]
    span = np.maximum(qmax - qmin, LEAST_SPAN)
    factors, share = (bins / span).astype(np.float32), bins // sums.shape[1]
    low = qmin.astype(np.float32)

    def run(part: slice) -> None:
        rows = values[part], weights[part], low[part], factors[part]
        numba_loops.add_to_histograms(*rows, squares[part], sums[part], share)

    run_in_rows(run, values, LONG_PIECE)


def find_moments(rows: Array) -> tuple[Array, Array, Values, Values]:
    """The least and the largest element of each of ``rows`` (rows, elements), their sum and that of their squares:
    (rows,) each. The sum is not finite where an element is not."""
    ends, sums = empty((2, len(rows))), np.empty((2, len(rows)))

    def run(part: slice) -> None:
        numba_loops.find_moments(rows[part], *ends[:, part], *sums[:, part])

    run_in_rows(run, rows, LONG_PIECE)
    return ends[0], ends[1], sums[0], sums[1]


def extremes(array: Array) -> Array:
    """(2,): the least and the largest element; NaN where there is one."""
    elements = array.reshape(-1)
    return merge_pieces(run_in_pieces(lambda piece: least_and_largest(elements[piece]), elements.size, LONG_PIECE))


def extremes_of_rows(array: Array, factors: Array) -> Array:
    """The same of ``array``, seen as (factors.size, elements), with each row times its factor."""
    rows, each = rows_of(array, factors.size), factors.reshape(-1)

    def find_ends(part: slice) -> tuple[np.float32, np.float32]:
        low, high = numba_loops.find_ends_of_rows(rows[part], each[part])
        return np.float32(low), np.float32(high)

    return merge_pieces(run_in_rows(find_ends, rows, LONG_PIECE))


def least_and_largest(values: Array) -> tuple[np.float32, np.float32]:
    return np.minimum.reduce(values, axis=None), np.maximum.reduce(values, axis=None)


def merge_pieces(found: list[tuple[np.float32, np.float32]]) -> Array:
    """(2,): the extremes of all pieces from those of each."""
    if len(found) == 1:
        return np.array(found[0], np.float32)
    lows, highs = zip(*found, strict=True)
    return np.array([np.min(lows), np.max(highs)], np.float32)


def apply_mask(array: Array, mask: Mask) -> Array:
    """``array`` where ``mask`` is set, else 0."""
    result = empty(array.shape)
    elements, chosen, target = array.reshape(-1), mask.reshape(-1), result.reshape(-1)
    run_in_pieces(
        lambda piece: numba_loops.mask(elements[piece], chosen[piece], target[piece]), elements.size, LONG_PIECE
    )
    return result


def clamp_below(array: Array, ceiling: float) -> Mask | None:
    """Hold ``array`` in place at or below ``ceiling``; where it was below, or None where it was so everywhere."""
    elements, below = array.reshape(-1), np.empty(array.shape, np.bool_)
    marks = below.reshape(-1)

    def hold(piece: slice) -> int:
        return numba_loops.hold(elements[piece], np.float32(ceiling), marks[piece])

    return below if sum(run_in_pieces(hold, elements.size, LONG_PIECE)) else None


@dataclass(frozen=True)
class Requantization:
    """(sums + ``before``) * ``factors`` + ``after``, each float32 (C,), held between ``low`` and ``high``."""

    before: Array
    factors: Array
    after: Array
    low: np.float32
    high: np.float32

    @classmethod
    def of_values(cls, channels: int) -> Requantization:
        """Of what stands for itself."""
        zeros = np.zeros(channels, np.float32)
        return cls(zeros, zeros + np.float32(1), zeros, np.float32(-np.inf), np.float32(np.inf))


def requantize(
    steps: Array, work: Requantization, scale: np.float32, qmin: np.float32, qmax: np.float32, even: bool
) -> None:
    """In place: how many times ``scale``, from ``qmin`` to ``qmax``, what ``work`` makes of ``steps`` (N, C, H, W) is.

    Halves are rounded to ``even``, or away from zero.
    """
    rows = rows_of(steps, steps.shape[0] * steps.shape[1])
    each = [np.tile(values, steps.shape[0]) for values in (work.before, work.factors, work.after)]
    limits, inverse = (work.low, work.high), np.float32(1) / scale

    def run(part: slice) -> None:
        before, factors, after = (values[part] for values in each)
        numba_loops.requantize(rows[part], before, factors, after, limits, inverse, qmin, qmax, even)

    run_in_rows(run, rows, LONG_PIECE)


def step_parameter(
    value: Array, speed: Array, gradient: Array, rate: np.float32, momentum: np.float32, decay: np.float32
) -> Array:
    """A parameter's new value after a step of gradient descent with momentum and weight decay; ``speed`` is changed."""
    new_value = empty(value.shape)
    old, moving, by, now = (a.reshape(-1) for a in (value, speed, gradient, new_value))
    if value.size <= LONG_PIECE:
        numba_loops.descend(old, moving, by, now, rate, momentum, decay)
        return new_value

    def run(piece: slice) -> None:
        numba_loops.descend(old[piece], moving[piece], by[piece], now[piece], rate, momentum, decay)

    run_in_pieces(run, value.size, LONG_PIECE)
    return new_value


def move_statistics(
    running: Sequence[Array], mean: Array, variance: Array, keep: np.float32, unbias: np.float32
) -> tuple[Array, Array]:
    """Running mean and variance after a batch with this ``mean`` and (biased) ``variance``, which ``unbias`` mends.

    ``keep`` is the share of what was: float32 (C,) or (1, C, 1, 1), in arrays of their own.
    """
    new_mean, new_variance = (empty(old.shape) for old in running)
    old_mean, old_variance, moved_mean, moved_variance = (a.reshape(-1) for a in (*running, new_mean, new_variance))
    numba_loops.move_statistics(old_mean, old_variance, mean, variance, moved_mean, moved_variance, keep, unbias)
    return new_mean, new_variance

"""Arithmetic on large arrays, element by element: in pieces that stay in a core's cache, on all cores.

numpy passes over an array once for every operation, on one core, and without the lock that threads share in Python.
Every result here is the same to the bit whatever the number of cores.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from mgq.data.loader import cores
from mgq.engine.fast_grad.exchange import Array, empty

Mask = npt.NDArray[np.bool_]
Result = TypeVar("Result")

PIECE = 1 << 15
"""Elements: a few float32 arrays of so many lie in the second cache together."""
# Arrays with fewer pieces for each core are not worth a thread.
PIECES_A_CORE = 4


@cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(cores(), "mgq-elementwise")


# A forked process has no threads but the one that forked.
os.register_at_fork(after_in_child=_threads.cache_clear)


def in_pieces(function: Callable[[slice], Result], size: int, piece: int = PIECE) -> list[Result]:
    """What ``function`` gives for slices of ``piece`` elements that together are ``size``, in their order."""

    def run(first: int, last: int) -> list[Result]:
        return [function(slice(start, min(start + piece, last))) for start in range(first, last, piece)]

    pieces = -(-size // piece)
    if cores() == 1 or pieces < PIECES_A_CORE * cores():
        return run(0, size)
    share = -(-pieces // cores()) * piece
    futures = [_threads().submit(run, start, min(start + share, size)) for start in range(share, size, share)]
    results = run(0, share)
    for future in futures:
        results += future.result()
    return results


def in_rows(function: Callable[[slice], Result], rows: int, width: int) -> list[Result]:
    """What ``function`` gives for slices of ``rows`` of ``width`` elements each: whole rows, as many as a piece has."""
    return in_pieces(function, rows, max(1, PIECE // max(1, width)))


def scaled_rows(array: Array, factor: Array, divide: bool = False) -> Array:
    """Each row of ``array``, an array of any shape seen as (factor.size, elements), times or by its ``factor``."""
    result = empty(array.shape)
    rows, column = array.reshape(factor.size, -1), factor.reshape(-1, 1)
    target = result.reshape(rows.shape)
    operation = np.divide if divide else np.multiply
    in_rows(lambda part: operation(rows[part], column[part], out=target[part]), *rows.shape)
    return result


def summed_products(one: Array, other: Array) -> Array:
    """The sum of ``one`` times ``other`` for each output channel of weights of one shape: (O,), O the leading axes."""
    axes = 1 if one.ndim == 4 else 2
    rows = int(np.prod(one.shape[:axes]))
    a, b = one.reshape(rows, -1), other.reshape(rows, -1)
    parts = in_rows(lambda part: np.einsum("ok,ok->o", a[part], b[part]), *a.shape)
    return np.concatenate(parts)


def extremes(array: Array) -> Array:
    """(2,): the least and the largest element; NaN where there is one."""
    elements = array.reshape(-1)
    found = np.array(in_pieces(lambda piece: (elements[piece].min(), elements[piece].max()), elements.size))
    return np.array([found[:, 0].min(), found[:, 1].max()], np.float32)


def masked(array: Array, mask: Mask) -> Array:
    """``array`` where ``mask`` is set, else 0."""
    result = empty(array.shape)
    elements, chosen, target = array.reshape(-1), mask.reshape(-1), result.reshape(-1)
    in_pieces(lambda piece: np.multiply(elements[piece], chosen[piece], out=target[piece]), elements.size)
    return result


def held_below(array: Array, ceiling: float) -> Mask | None:
    """Hold ``array`` in place at or below ``ceiling``; where it was below, or None where it was so everywhere."""
    elements, below = array.reshape(-1), np.empty(array.shape, np.bool_)
    marks = below.reshape(-1)

    def hold(piece: slice) -> bool:
        part = elements[piece]
        np.less(part, np.float32(ceiling), out=marks[piece])
        np.minimum(part, np.float32(ceiling), out=part)
        return bool(marks[piece].all())

    return None if all(in_pieces(hold, elements.size)) else below

"""Sums, pooling and shuffles of feature maps: float32 (N, H, W, C), C-contiguous. Results are arrays of their own."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from mgq.cpu_kernels import numba_loops
from mgq.cpu_kernels.elementwise import LONG_PIECE, least_and_largest, merge_pieces, run_in_pieces, run_in_rows
from mgq.cpu_kernels.tensor_exchange import Array, empty

Pair = tuple[int, int]


class Pool(NamedTuple):
    """Windows of ``size``, ``stride`` apart, with ``padding`` at each end: (height, width)."""

    size: Pair
    stride: Pair
    padding: Pair

    def output(self, source: Pair) -> Pair:
        """Height and width of what is pooled from ``source``."""
        height, width = (
            (n + 2 * p - k) // s + 1 for n, k, s, p in zip(source, self.size, self.stride, self.padding, strict=True)
        )
        return height, width


def to_channels_last(array: Array) -> Array:
    """(N, C, H, W) -> (N, H, W, C)."""
    return np.ascontiguousarray(array.transpose(0, 2, 3, 1))


def to_channels_first(array: Array) -> Array:
    """(N, H, W, C) -> (N, C, H, W)."""
    return np.ascontiguousarray(array.transpose(0, 3, 1, 2))


def add(a: Array, b: Array, relu: bool = False) -> Array:
    """``a + b`` and, with ``relu``, max(a + b, 0)."""
    output = empty(a.shape)
    one, other, target = a.reshape(-1), b.reshape(-1), output.reshape(-1)
    loop = numba_loops.add_relu if relu else numba_loops.add
    run_in_pieces(lambda piece: loop(one[piece], other[piece], target[piece]), a.size, LONG_PIECE)
    return output


def add_and_watch(a: Array, b: Array, relu: bool) -> tuple[Array, Array]:
    """The same, and its extremes, as :func:`mgq.cpu_kernels.elementwise.extremes` gives them."""
    output = empty(a.shape)
    one, other, target = a.reshape(-1), b.reshape(-1), output.reshape(-1)
    loop = numba_loops.add_relu if relu else numba_loops.add

    def run(piece: slice) -> tuple[np.float32, np.float32]:
        # One loop with both takes four times as long as two of which the second finds the piece in the cache.
        loop(one[piece], other[piece], target[piece])
        return least_and_largest(target[piece])

    return output, merge_pieces(run_in_pieces(run, a.size, LONG_PIECE))


def mask_negative(output: Array, gradient: Array) -> Array:
    """``gradient`` where ``output`` is above 0, else 0."""
    result = empty(gradient.shape)
    chosen, source, target = output.reshape(-1), gradient.reshape(-1), result.reshape(-1)

    def run(piece: slice) -> None:
        numba_loops.where_positive(chosen[piece], source[piece], target[piece])

    run_in_pieces(run, gradient.size, LONG_PIECE)
    return result


def max_pool(source: Array, pool: Pool) -> Array:
    batch, height, width, channels = source.shape
    output = empty((batch, *pool.output((height, width)), channels))
    numbers = (*pool.size, *pool.stride, *pool.padding)
    run_in_rows(lambda part: numba_loops.max_pool(source[part], output[part], *numbers), source.reshape(batch, -1))
    return output


def max_pool_gradient(source: Array, output: Array, d_output: Array, pool: Pool) -> Array:
    """The gradient with respect to ``source``; each of several largest values of a window gets it whole."""
    d_source = np.zeros(source.shape, np.float32)
    numbers = (*pool.size, *pool.stride, *pool.padding)

    def run(part: slice) -> None:
        numba_loops.max_pool_gradient(source[part], output[part], d_output[part], d_source[part], *numbers)

    run_in_rows(run, source.reshape(len(source), -1))
    return d_source


def shuffle(source: Array, groups: int) -> Array:
    """Channels seen as a (C / groups, groups) table, transposed."""
    output = empty(source.shape)
    rows, target = source.reshape(-1, source.shape[-1]), output.reshape(-1, source.shape[-1])
    run_in_rows(lambda part: numba_loops.shuffle(rows[part], target[part], groups), rows, LONG_PIECE)
    return output

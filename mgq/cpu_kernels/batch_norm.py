"""Batch norm of feature maps, float32 (N, H, W, C), with what follows it: limits, and rounding in training for int8.

A layer of quantization-aware training normalizes, holds its output between limits, observes its range and rounds it.
One by one that is a dozen passes over memory, forward and backward. Here there are two each way: batch norm and limits
keep the order of what they take, so the range of the output follows from that of each channel of pixels, which is found
with the statistics; then one pass does the rest. What was clipped is found backward from the same pixels once more.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from mgq.cpu_kernels import batch_norm_loops as loops
from mgq.cpu_kernels.elementwise import LONG_PIECE, share_out
from mgq.cpu_kernels.fake_quantization import Quantizer
from mgq.cpu_kernels.statistics_exchange import Exchange, share_gradients, share_moments
from mgq.cpu_kernels.tensor_exchange import Array, empty

INFINITE = np.float32(np.inf)
LONG_ROW, LONGEST_ROW, LINE = 256, 1024, 64
"""Elements of a row that loops like: at least, at most, and a multiple of what they take at a time."""
SPLITS_KEPT = 1024


class Limits(NamedTuple):
    """What an output lies between."""

    least: np.float32 = -INFINITE
    largest: np.float32 = INFINITE

    @classmethod
    def of(cls, relu: bool, ceiling: float | None) -> Limits:
        least = np.float32(0) if relu else -INFINITE
        return cls(least, INFINITE if ceiling is None else np.float32(ceiling))


class Split(NamedTuple):
    """``rows`` of ``width`` elements, one or several pixels each, in ``pieces`` of ``long`` rows."""

    rows: int
    width: int
    long: int
    pieces: int

    def of(self, array: Array) -> Array:
        return array.reshape(self.rows, self.width)

    def part(self, first: int, last: int) -> slice:
        """The rows of these pieces."""
        return slice(first * self.long, last * self.long)


@lru_cache(SPLITS_KEPT)
def split(pixels: int, channels: int) -> Split:
    """How to pass over ``pixels`` of so many ``channels``, whoever works on which piece."""
    together = 1
    while is_short(together * channels) and pixels % (2 * together) == 0:
        together *= 2
    width, rows = together * channels, pixels // together
    long = max(1, LONG_PIECE // width)
    return Split(rows, width, long, -(-rows // long))


def is_short(row: int) -> bool:
    return 2 * row <= LONGEST_ROW and (row < LONG_ROW or row % LINE != 0)


class NormalizedMap:
    """``pixels``, a feature map, less ``mean``, over the deviation, times ``scale`` plus ``shift``, between ``limits``.

    ``mean`` and biased ``variance`` (C,) are read where they are ``fixed``, constants then, and else written to: those
    of the pixels. With ``observed`` the output's range is known before the output. With an ``exchange`` statistics are
    those of all processes' pixels, and so are what the gradients of pixels take off; ``elements`` are those of all.
    """

    def __init__(
        self,
        pixels: Array,
        scale: Array,
        shift: Array,
        epsilon: float,
        limits: Limits,
        mean: Array,
        variance: Array,
        fixed: bool,
        observed: bool,
        exchange: Exchange | None = None,
    ) -> None:
        channels = pixels.shape[-1]
        self.exchange = None if fixed else exchange
        self.elements = pixels.size // channels
        self.split = split(self.elements, channels)
        self.pixels, self.rows = pixels, self.split.of(pixels)
        self.limits, self.passing = limits, np.array(limits, np.float32)
        self.masks, self.fixed, self.observed = limits != Limits(), fixed, observed
        self.table, self.inverse, self.ends = empty((5, self.split.width)), empty((channels,)), empty((2,))
        parts = self.measure(observed) if observed or not fixed else empty((4, 0, self.split.width))
        factors = scale.reshape(-1), shift.reshape(-1), np.float32(epsilon), limits
        target = self.table, self.inverse, self.ends
        found, rows = empty((4, channels)), (self.split.rows, self.split.long)
        if self.exchange is None:
            loops.tabulate(parts, *rows, fixed, self.elements, mean, variance, *factors, found, *target)
        else:
            self.merge(parts, self.exchange, found)
            loops.fill_table(found, *factors, *target)
        if not fixed:
            mean[:], variance[:] = found[0], found[1]

    def merge(self, parts: Array, exchange: Exchange, found: Array) -> None:
        """Write to ``found`` (4, C) mean and variance of all processes, and the ends of this one's pixels."""
        centre, spread = np.empty((2, found.shape[1]))
        loops.merge(parts, self.split.rows, self.split.long, centre, spread, found[2], found[3])
        self.elements, found[0], found[1] = share_moments(exchange, self.elements, centre, spread)

    def measure(self, observed: bool) -> Array:
        """Statistics of all pieces, and where it is ``observed`` their ranges: (4, pieces, channels of a row)."""
        parts = empty((4, self.split.pieces, self.split.width))

        def run(first: int, last: int) -> None:
            loops.measure(self.rows, self.split.long, first, last, observed, parts)

        share_out(run, self.split.pieces)
        return parts

    def extremes(self) -> Array:
        """(2,): the least and the largest of the output before it is rounded; NaN where there is one."""
        return self.ends

    def output(self, quantizer: Quantizer | None = None) -> Array:
        """(N, H, W, C), rounded by ``quantizer``, whose zero point is 0."""
        output = empty(self.pixels.shape)
        target = self.split.of(output)

        def run(first: int, last: int) -> None:
            part = self.split.part(first, last)
            arguments = self.rows[part], target[part], self.table, *self.limits
            if quantizer is None:
                loops.normalize(*arguments)
            else:
                loops.normalize_quantized(*arguments, quantizer.scale, quantizer.qmin, quantizer.qmax)

        share_out(run, self.split.pieces)
        if quantizer is not None:
            self.pass_within(quantizer)
        return output

    def pass_within(self, quantizer: Quantizer) -> None:
        """Let the gradient pass only where ``quantizer`` does not clip."""
        loops.find_clipped(quantizer.scale, quantizer.qmin, quantizer.qmax, *self.limits, self.passing)
        above, below = self.passing
        self.masks = not (self.observed and above < self.ends[0] and self.ends[1] < below)

    def gradients(self, d_output: Array) -> tuple[Array, Array, Array]:
        """With respect to pixels, scale and shift: (N, H, W, C), (C,), (C,)."""
        given, d_pixels = self.split.of(d_output), empty(self.pixels.shape)
        target, sums = self.split.of(d_pixels), empty((2, self.split.pieces, self.split.width))
        d_scale, d_shift = empty(self.inverse.shape), empty(self.inverse.shape)

        def add_up(first: int, last: int) -> None:
            loops.add_up(self.rows, given, self.split.long, first, last, self.table, self.passing, self.masks, sums)

        def find_gradient(first: int, last: int) -> None:
            part = self.split.part(first, last)
            loops.find_gradient(self.rows[part], given[part], target[part], self.table, self.passing, self.masks)

        share_out(add_up, self.split.pieces)
        if self.exchange is None:
            elements = 0 if self.fixed else self.elements
            loops.merge_sums(sums, self.inverse, elements, self.table, d_scale, d_shift)
        else:
            self.merge_gradients(sums, self.exchange, d_scale, d_shift)
        share_out(find_gradient, self.split.pieces)
        return d_pixels, d_scale, d_shift

    def merge_gradients(self, sums: Array, exchange: Exchange, d_scale: Array, d_shift: Array) -> None:
        """Find the gradients of scale and shift of this process's loss, and what that of all takes off."""
        whole, products = np.zeros((2, d_scale.size))
        loops.merge_gradients(sums, self.inverse, whole, products)
        d_shift[:], d_scale[:] = whole, products
        whole, products = share_gradients(exchange, whole, products)
        loops.take_off_mean(whole, products, self.inverse, 1 / self.elements, self.table)

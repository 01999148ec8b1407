"""Loops of batch norm over rows of channels, compiled by numba: statistics, output and gradients.

Arrays of pixels are float32 (rows, C), and hold several pixels a row where few channels would make short rows. They are
worked on in pieces of rows, whose results are merged in order: bits do not depend on who works on which.

The first loop over a piece takes it row by row, as it lies in memory, which the processor then fetches ahead. Loops
over what is in the cache already take four rows at once: there the sums' own loads and stores are the most work.

A mask is multiplied with, not chosen by: a choice would become a load under a mask, which takes twice as long. So where
an infinite gradient meets a 0 of a mask, the result is NaN.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mgq.cpu_kernels.numba_loops import ALMOST_HALF, ONE, ZERO, make_compiler

CHUNK = 1 << 14
"""About how many elements are passed over several times before the next: they stay in the second-level cache."""
LEAST_ROWS = 16
"""The fewest rows of a chunk, so that what is done once for each is little."""
FOUR = 4
HALF = np.float32(0.5)


@make_compiler()
def find_means(pixels: Any, start: Any, end: Any, means: Any) -> None:
    """Write the mean of each channel of the rows ``start`` to ``end`` to ``means``."""
    means[:] = ZERO
    for r in range(start, end):
        for c in range(means.size):
            means[c] += pixels[r, c]
    part = ONE / np.float32(end - start)
    for c in range(means.size):
        means[c] *= part


@make_compiler()
def add_squares(pixels: Any, start: Any, end: Any, means: Any, squares: Any) -> None:
    """Write the sums of squared distances from ``means`` to ``squares``."""
    rest = end - (end - start) % FOUR
    squares[:] = ZERO
    for r in range(start, rest, FOUR):
        for c in range(means.size):
            a, b = pixels[r, c] - means[c], pixels[r + 1, c] - means[c]
            d, e = pixels[r + 2, c] - means[c], pixels[r + 3, c] - means[c]
            squares[c] += (a * a + b * b) + (d * d + e * e)
    for r in range(rest, end):
        for c in range(means.size):
            a = pixels[r, c] - means[c]
            squares[c] += a * a


@make_compiler()
def widen_ends(pixels: Any, start: Any, end: Any, low: Any, high: Any) -> None:
    """Let ``low`` and ``high`` hold the pixels of the rows ``start`` to ``end``, too."""
    rest = end - (end - start) % FOUR
    for r in range(start, rest, FOUR):
        for c in range(low.size):
            a, b, d, e = pixels[r, c], pixels[r + 1, c], pixels[r + 2, c], pixels[r + 3, c]
            low[c] = min(low[c], min(min(a, b), min(d, e)))
            high[c] = max(high[c], max(max(a, b), max(d, e)))
    for r in range(rest, end):
        for c in range(low.size):
            low[c], high[c] = min(low[c], pixels[r, c]), max(high[c], pixels[r, c])


@make_compiler()
def measure(pixels: Any, rows: Any, first: Any, last: Any, ranges: Any, parts: Any) -> None:
    """Statistics of the pieces ``first`` to ``last`` of ``rows`` rows each, float32.

    To ``parts`` (4, pieces, C) go their means, sums of squared distances from these and, if ``ranges`` are wanted,
    least and largest elements.
    """
    channels = pixels.shape[1]
    chunk = max(LEAST_ROWS, CHUNK // channels)
    part, spread = np.empty(channels, np.float32), np.empty(channels, np.float32)
    for piece in range(first, last):
        mean, square, low, high = parts[0, piece], parts[1, piece], parts[2, piece], parts[3, piece]
        mean[:], square[:], low[:], high[:] = ZERO, ZERO, np.inf, -np.inf
        begin, finish = piece * rows, min((piece + 1) * rows, pixels.shape[0])
        for start in range(begin, finish, chunk):
            end = min(start + chunk, finish)
            find_means(pixels, start, end, part)
            add_squares(pixels, start, end, part, spread)
            if ranges:
                widen_ends(pixels, start, end, low, high)
            share = np.float32(end - start) / np.float32(end - begin)
            cross = np.float32(start - begin) * share
            for c in range(channels):
                step = part[c] - mean[c]
                mean[c] += step * share
                square[c] += spread[c] + step * step * cross


@make_compiler()
def merge(parts: Any, rows: Any, long: Any, centre: Any, spread: Any, least: Any, largest: Any) -> None:
    """Of the ``parts`` of all pieces, of ``long`` of the ``rows`` each: mean and sum of squared distances from it of
    each channel, float64 (C,), and its least and largest, float32 (C,).

    Rows hold one pixel or more. Where a pixel is no number, so is all of its channel.
    """
    channels, seen = centre.size, 0.0
    centre[:], spread[:] = 0.0, 0.0
    least[:], largest[:] = np.inf, -np.inf
    for piece in range(parts.shape[1]):
        count = float(min(long, rows - piece * long))
        for start in range(0, parts.shape[2], channels):
            seen += count
            share, cross = count / seen, count * (seen - count) / seen
            for c in range(channels):
                step = parts[0, piece, start + c] - centre[c]
                centre[c] += step * share
                spread[c] += parts[1, piece, start + c] + step * step * cross
            for c in range(channels):
                least[c] = min(least[c], parts[2, piece, start + c])
                largest[c] = max(largest[c], parts[3, piece, start + c])
    for c in range(channels):
        if centre[c] != centre[c]:
            least[c], largest[c] = np.nan, np.nan


@make_compiler()
def find_ends(low: Any, high: Any, table: Any, limits: Any, ends: Any) -> None:
    """Write to ``ends`` (2,) the least and the largest that :func:`normalize` gives within ``limits`` for pixels from
    ``low`` to ``high`` (C,): rounded operations keep the order of what they take."""
    least, largest = limits
    unknown = 0
    for c in range(low.size):
        one = min(max((low[c] - table[0, c]) * table[1, c] + table[2, c], least), largest)
        other = min(max((high[c] - table[0, c]) * table[1, c] + table[2, c], least), largest)
        unknown += (one != one) | (other != other)
        low[c], high[c] = min(one, other), max(one, other)
    ends[0], ends[1] = np.inf, -np.inf
    for c in range(low.size):
        ends[0], ends[1] = min(ends[0], low[c]), max(ends[1], high[c])
    if unknown:
        ends[:] = np.nan


@make_compiler()
def tabulate(
    parts: Any,
    rows: Any,
    long: Any,
    fixed: Any,
    elements: Any,
    mean: Any,
    variance: Any,
    scale: Any,
    shift: Any,
    epsilon: Any,
    limits: Any,
    found: Any,
    table: Any,
    inverse: Any,
    ends: Any,
) -> None:
    """Write to ``table`` (5, channels of a row) what :func:`normalize` takes: mean, factor and shift of each channel.

    ``parts``, of no piece where nothing was measured, are merged by :func:`merge`. Where they are ``fixed``, ``mean``
    and ``variance`` are given, and else ``found``, of so many ``elements``. ``inverse`` (C,): one over the standard
    deviation. ``ends`` (2,): the extremes of what :func:`normalize` will give.
    """
    centre, spread = np.empty(mean.size), np.empty(mean.size)
    merge(parts, rows, long, centre, spread, found[2], found[3])
    for c in range(mean.size):
        if fixed:
            found[0, c], found[1, c] = mean[c], variance[c]
        else:
            found[0, c], found[1, c] = centre[c], spread[c] / elements
    fill_table(found, scale, shift, epsilon, limits, table, inverse, ends)


@make_compiler()
def fill_table(
    found: Any, scale: Any, shift: Any, epsilon: Any, limits: Any, table: Any, inverse: Any, ends: Any
) -> None:
    """See :func:`tabulate`: for what is ``found`` (4, C), mean, variance, least and largest of each channel."""
    mean, variance, low, high = found[0], found[1], found[2], found[3]
    channels = mean.size
    for c in range(channels):
        inverse[c] = ONE / np.sqrt(variance[c] + epsilon)
    for start in range(0, table.shape[1], channels):
        for c in range(channels):
            table[0, start + c], table[1, start + c], table[2, start + c] = mean[c], scale[c] * inverse[c], shift[c]
    find_ends(low, high, table, limits, ends)


@make_compiler()
def normalize(pixels: Any, output: Any, table: Any, least: Any, largest: Any) -> None:
    """Write (pixel - mean) * factor + shift, held between ``least`` and ``largest``, to ``output``; NaN stays."""
    mean, factor, shift = table[0], table[1], table[2]
    for r in range(pixels.shape[0]):
        for c in range(pixels.shape[1]):
            output[r, c] = min(max((pixels[r, c] - mean[c]) * factor[c] + shift[c], least), largest)


@make_compiler()
def normalize_quantized(
    pixels: Any, output: Any, table: Any, least: Any, largest: Any, step: Any, qmin: Any, qmax: Any
) -> None:
    """The same, rounded to multiples of ``step`` from ``qmin`` to ``qmax``, halves away from zero."""
    mean, factor, shift = table[0], table[1], table[2]
    for r in range(pixels.shape[0]):
        for c in range(pixels.shape[1]):
            steps = min(max((pixels[r, c] - mean[c]) * factor[c] + shift[c], least), largest) / step
            steps = np.trunc(steps + np.copysign(ALMOST_HALF, steps))
            output[r, c] = min(max(steps, qmin), qmax) * step


@make_compiler()
def find_clipped(step: Any, qmin: Any, qmax: Any, least: Any, largest: Any, clipped: Any) -> None:
    """Write to ``clipped`` (2,) the largest float that is less than ``qmin`` multiples of ``step`` once it is rounded,
    but at least ``least``, and the least that is more than ``qmax``, but at most ``largest``: float32."""
    for end in range(2):
        level, outwards = (qmin, np.float32(-np.inf)) if end == 0 else (qmax, np.float32(np.inf))
        # The half is exact, its product with the step is rounded: the limit is a few floats away at most.
        value = np.float32((level + np.copysign(HALF, outwards)) * step)
        found = False
        while not found:
            inner = np.nextafter(value, -outwards)
            steps, inner_steps = value / step, inner / step
            steps = np.trunc(steps + np.copysign(ALMOST_HALF, steps))
            inner_steps = np.trunc(inner_steps + np.copysign(ALMOST_HALF, inner_steps))
            outside = steps < level if end == 0 else steps > level
            inner_outside = inner_steps < level if end == 0 else inner_steps > level
            if inner_outside:
                value = inner
            elif outside or value == outwards or steps != steps:
                found = True
            else:
                value = np.nextafter(value, outwards)
        clipped[end] = value
    clipped[0], clipped[1] = max(clipped[0], least), min(clipped[1], largest)


@make_compiler()
def sum_passing(
    pixels: Any, d_output: Any, start: Any, end: Any, table: Any, limits: Any, plain: Any, products: Any
) -> None:
    """Sums of the gradient, see :func:`add_up`, of the rows ``start`` to ``end``: to ``plain`` and ``products``."""
    mean, factor, shift = table[0], table[1], table[2]
    above, below = limits[0], limits[1]
    plain[:], products[:] = ZERO, ZERO
    for r in range(start, end):
        for c in range(plain.size):
            distance = pixels[r, c] - mean[c]
            y = distance * factor[c] + shift[c]
            kept = d_output[r, c] * (ONE if (y > above) & (y < below) else ZERO)
            plain[c] += kept
            products[c] += kept * distance


@make_compiler()
def sum_all(pixels: Any, d_output: Any, start: Any, end: Any, mean: Any, plain: Any, products: Any) -> None:
    """The same of the whole gradient."""
    plain[:], products[:] = ZERO, ZERO
    for r in range(start, end):
        for c in range(plain.size):
            plain[c] += d_output[r, c]
            products[c] += d_output[r, c] * (pixels[r, c] - mean[c])


@make_compiler()
def add_up(
    pixels: Any, d_output: Any, rows: Any, first: Any, last: Any, table: Any, limits: Any, masks: Any, sums: Any
) -> None:
    """Sums of the gradient of each piece, where the output lies between ``limits`` if it ``masks``, and elsewhere 0.

    To ``sums`` (2, pieces, C) go those of the gradient and those of its products with pixel - mean.
    """
    channels = pixels.shape[1]
    chunk = max(LEAST_ROWS, CHUNK // channels)
    plain, products = np.empty(channels, np.float32), np.empty(channels, np.float32)
    for piece in range(first, last):
        sums[:, piece] = ZERO
        finish = min((piece + 1) * rows, pixels.shape[0])
        for start in range(piece * rows, finish, chunk):
            end = min(start + chunk, finish)
            if masks:
                sum_passing(pixels, d_output, start, end, table, limits, plain, products)
            else:
                sum_all(pixels, d_output, start, end, table[0], plain, products)
            for c in range(channels):
                sums[0, piece, c] += plain[c]
                sums[1, piece, c] += products[c]


@make_compiler()
def merge_sums(sums: Any, inverse: Any, elements: Any, table: Any, d_scale: Any, d_shift: Any) -> None:
    """Gradients of scale and shift (C,) from :func:`add_up`'s sums, and what :func:`take_off_mean` does.

    ``elements`` of a channel: 0 where statistics are fixed.
    """
    whole, products = np.zeros(d_scale.size), np.zeros(d_scale.size)
    merge_gradients(sums, inverse, whole, products)
    for c in range(d_scale.size):
        d_shift[c], d_scale[c] = whole[c], products[c]
    take_off_mean(whole, products, inverse, 1.0 / elements if elements else 0.0, table)


@make_compiler()
def merge_gradients(sums: Any, inverse: Any, whole: Any, products: Any) -> None:
    """Add :func:`add_up`'s sums of all pieces to ``whole``, the gradient of the shift, and ``products``, that of the
    scale: float64 (C,)."""
    channels = whole.size
    for piece in range(sums.shape[1]):
        for start in range(0, sums.shape[2], channels):
            for c in range(channels):
                whole[c] += sums[0, piece, start + c]
                products[c] += sums[1, piece, start + c]
    for c in range(channels):
        products[c] *= inverse[c]


@make_compiler()
def take_off_mean(whole: Any, products: Any, inverse: Any, share: Any, table: Any) -> None:
    """Write to ``table`` what :func:`find_gradient` subtracts: the means over the batch. ``whole`` and ``products``
    are sums over it, and ``share`` one over its elements."""
    channels = whole.size
    for start in range(0, table.shape[1], channels):
        for c in range(channels):
            factor = table[1, start + c]
            table[3, start + c] = whole[c] * share * factor
            table[4, start + c] = products[c] * inverse[c] * share * factor


@make_compiler()
def find_gradient(pixels: Any, d_output: Any, d_pixels: Any, table: Any, limits: Any, masks: Any) -> None:
    """Write the gradient with respect to ``pixels`` to ``d_pixels``, see :func:`add_up`."""
    mean, factor, shift, least, slope = table[0], table[1], table[2], table[3], table[4]
    above, below = limits[0], limits[1]
    if masks:
        for r in range(pixels.shape[0]):
            for c in range(pixels.shape[1]):
                distance = pixels[r, c] - mean[c]
                y = distance * factor[c] + shift[c]
                kept = d_output[r, c] * (ONE if (y > above) & (y < below) else ZERO)
                d_pixels[r, c] = kept * factor[c] - distance * slope[c] - least[c]
    else:
        for r in range(pixels.shape[0]):
            for c in range(pixels.shape[1]):
                d_pixels[r, c] = d_output[r, c] * factor[c] - (pixels[r, c] - mean[c]) * slope[c] - least[c]

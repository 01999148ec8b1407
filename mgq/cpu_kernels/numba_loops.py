"""Loops compiled by numba on their first run: numpy would pass over memory several times for each."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from functools import cached_property, update_wrapper
from types import FunctionType
from typing import Any, TypeVar, cast

import numpy as np

from mgq.quantization.half_to_even import SHIFT

Loop = TypeVar("Loop", bound=Callable[..., Any])

# The float32 next below a half. Added, away from zero, before truncation it rounds halves away from zero; a half itself
# would also round up its lower neighbour.
ALMOST_HALF = np.nextafter(np.float32(0.5), np.float32(0))
ZERO, ONE = np.float32(0), np.float32(1)
THREE = 3
NAN = np.float32(np.nan)
EVEN_SHIFT = np.float32(SHIFT)
LANES = 64


def make_compiler(**options: Any) -> Callable[[Loop], Loop]:
    """The loop as machine code that frees Python's lock, by numba with ``options``."""

    def compile_loop(loop: Loop) -> Loop:
        return cast(Loop, CompiledLoop(loop, options))

    return compile_loop


class CompiledLoop:
    """A loop that is compiled when it is first called. numba is imported then: most commands need none of it.

    The machine code is kept on disk where a folder can be written to.
    """

    def __init__(self, loop: Any, options: Mapping[str, Any]) -> None:
        self.loop, self.options = loop, options

    def __call__(self, *arguments: Any) -> Any:
        return self.compiled(*arguments)

    @cached_property
    def compiled(self) -> Callable[..., Any]:
        with warnings.catch_warnings():
            # MegEngine has the processor flush subnormal numbers to 0, of which numpy warns when asked for limits.
            warnings.simplefilter("ignore", UserWarning)
            import numba
        options = {"nogil": True, "error_model": "numpy", **self.options}
        loop = self.link_parts()
        try:
            result: Callable[..., Any] = numba.njit(cache=True, **options)(loop)
        except RuntimeError:  # nowhere to keep it
            result = numba.njit(**options)(loop)
        return result

    def link_parts(self) -> Any:
        """The loop, with those that it calls as numba knows them."""
        known = self.loop.__globals__
        parts = {name: known.get(name) for name in self.loop.__code__.co_names}
        compiled = {name: part.compiled for name, part in parts.items() if isinstance(part, CompiledLoop)}
        if not compiled:
            return self.loop
        copy = FunctionType(self.loop.__code__, {**known, **compiled}, self.loop.__name__)
        return update_wrapper(copy, self.loop)


@make_compiler()
def quantize(array: Any, passes: Any, scale: Any, zero_point: Any, qmin: Any, qmax: Any, above: Any) -> None:
    """Round ``array`` to multiples of ``scale`` in place, and write to ``passes`` where it was not clipped.

    float32 and bool, each (N,). What is not ``above`` that counts as clipped. Halves are rounded away from zero. Also
    to count what was clipped would take the loop twice as long.
    """
    for i in range(array.size):
        value = array[i]
        steps = value / scale
        steps = np.trunc(steps + np.copysign(ALMOST_HALF, steps)) + zero_point
        passes[i] = (steps >= qmin) & (steps <= qmax) & (value > above)
        array[i] = (min(max(steps, qmin), qmax) - zero_point) * scale


@make_compiler()
def round_rows(source: Any, target: Any, factors: Any, divide: Any, scale: Any, qmin: Any, qmax: Any) -> None:
    """The same without a zero point for each row of ``source`` times its factor, where ``divide`` then by it again.

    ``source`` and ``target``: (rows, elements); ``factors``: float32 (rows,).
    """
    for row in range(source.shape[0]):
        factor = factors[row]
        step = scale / factor if divide else scale
        for i in range(source.shape[1]):
            steps = source[row, i] * factor / scale
            steps = np.trunc(steps + np.copysign(ALMOST_HALF, steps))
            target[row, i] = min(max(steps, qmin), qmax) * step


@make_compiler()
def find_passing_rows(source: Any, passes: Any, factors: Any, scale: Any, qmin: Any, qmax: Any) -> None:
    """Write to ``passes``, bool (rows, elements), where :func:`round_rows` does not clip."""
    for row in range(source.shape[0]):
        factor = factors[row]
        for i in range(source.shape[1]):
            steps = source[row, i] * factor / scale
            steps = np.trunc(steps + np.copysign(ALMOST_HALF, steps))
            passes[row, i] = (steps >= qmin) & (steps <= qmax)


@make_compiler()
def are_within(ends: Any, scale: Any, qmin: Any, qmax: Any) -> bool:
    """Whether rounding clips none of ``ends``, float32 (2,); not so where one is no number."""
    low, high = ends[0] / scale, ends[1] / scale
    low, high = np.trunc(low + np.copysign(ALMOST_HALF, low)), np.trunc(high + np.copysign(ALMOST_HALF, high))
    return bool(low >= qmin and high <= qmax)


@make_compiler()
def fold_factors(scale: Any, variance: Any, epsilon: Any, inverse: Any, factor: Any) -> None:
    """Write 1 / sqrt(``variance`` + ``epsilon``) to ``inverse``, that times ``scale`` to ``factor``: float32 (C,)."""
    for c in range(scale.size):
        inverse[c] = ONE / np.sqrt(variance[c] + epsilon)
        factor[c] = scale[c] * inverse[c]


@make_compiler()
def find_ends_of_rows(rows: Any, factors: Any) -> Any:
    """The least and the largest element of ``rows`` (rows, elements) times their ``factors``; NaN where there is one.

    By column first: a loop with one result would take its elements one by one.
    """
    elements = rows.shape[1]
    low, high = np.full(elements, np.inf, np.float32), np.full(elements, -np.inf, np.float32)
    unknown = np.zeros(elements, np.float32)
    for row in range(rows.shape[0]):
        factor = factors[row]
        for i in range(elements):
            value = rows[row, i] * factor
            low[i], high[i] = min(low[i], value), max(high[i], value)
            unknown[i] += ZERO if value == value else ONE
    if unknown.sum() > 0:
        return NAN, NAN
    return low.min(), high.max()


@make_compiler(fastmath={"reassoc", "contract"})
def mask_rows(gradient: Any, passes: Any, weights: Any, effective: Any, factors: Any, sums: Any) -> None:
    """Keep of ``gradient`` what ``passes``, in place, and multiply each row by its factor, if there are any.

    To ``sums`` (rows,) go, for each row, the products of what passed and ``weights``, less those of the whole gradient
    and ``effective``, if it is given. All others are (rows, elements), ``factors`` (rows,). Without ``passes`` all do.
    """
    for row in range(gradient.shape[0]):
        total = ZERO
        for i in range(gradient.shape[1]):
            whole = gradient[row, i]
            kept = whole
            if passes is not None:
                kept = whole if passes[row, i] else ZERO
            total += kept * weights[row, i]
            if effective is not None:
                total -= whole * effective[row, i]
            if factors is not None:
                kept *= factors[row]
            if passes is not None or factors is not None:
                gradient[row, i] = kept
        sums[row] = total


@make_compiler()
def mask(source: Any, passes: Any, target: Any) -> None:
    """Write ``source`` where it ``passes``, else 0, to ``target``: float32, bool and float32, each (N,).

    Multiplied: a choice would become a load under a mask, which takes twice as long.
    """
    for i in range(source.size):
        target[i] = source[i] * (ONE if passes[i] else ZERO)


@make_compiler()
def hold(array: Any, ceiling: Any, below: Any) -> int:
    """Hold ``array`` (N,) in place at or below ``ceiling``; where it was ``below``, bool (N,). Returns how many not."""
    held = 0
    for i in range(array.size):
        is_below = array[i] < ceiling
        below[i] = is_below
        held += 1 - is_below
        array[i] = min(array[i], ceiling)
    return held


@make_compiler()
def add_to_histograms(
    values: Any, weights: Any, qmin: Any, bins_a_unit: Any, squares: Any, sums: Any, share: Any
) -> None:
    """Add ``weights``, and their squares, to the bins into which ``values`` fall.

    ``values`` and ``weights``: float32 (rows, elements). ``qmin`` and ``bins_a_unit``, float32 (rows,), tell the bins
    of each row. ``squares``: float64 (rows, bins); ``sums``: float32 (rows, bins / ``share``). Values of 0 count for
    nothing. They are sorted out without a branch first: half of a tensor behind a ReLU is 0, and no processor foresees
    which half, which made this loop 3.5 times as slow.
    """
    last, elements = np.float32(squares.shape[1] - 1), values.shape[1]
    coarse = np.arange(squares.shape[1]) // share
    places, chosen = np.empty(elements, np.int32), np.empty(elements, np.int32)
    for row in range(values.shape[0]):
        low, factor = qmin[row], bins_a_unit[row]
        fine, few, number = squares[row], sums[row], 0
        for i in range(elements):
            position = (values[row, i] - low) * factor
            places[i] = int(min(position, last)) if position > ZERO else 0  # what is no number is in the first bin
        for i in range(elements):
            chosen[number] = i
            number += values[row, i] != ZERO
        for j in range(number):
            i = chosen[j] if number < elements else j
            at, weight = places[i], weights[row, i]
            fine[at] += weight * weight
            few[coarse[at]] += weight


@make_compiler()
def count_limits_below(magnitudes: Any, limits: Any, places: Any) -> None:
    """Write to ``places`` how many of ``limits``, ascending, are below each of ``magnitudes``; both (elements,).

    A place is looked for beside that of the element before.
    """
    place, last = 0, len(limits)
    for i in range(len(magnitudes)):
        magnitude = magnitudes[i]
        while place < last and limits[place] < magnitude:
            place += 1
        while place > 0 and limits[place - 1] >= magnitude:
            place -= 1
        places[i] = place


@make_compiler()
def add_moments_by_place(values: Any, weights: Any, places: Any, sums: Any) -> None:
    """Add ``weights`` times the sign of ``values`` times their magnitude to the powers 0 to 2, all (rows, elements), to
    ``sums`` (rows, places, 3)."""
    for row in range(values.shape[0]):
        own = sums[row]
        for i in range(values.shape[1]):
            value, weight, place = values[row, i], weights[row, i], places[row, i]
            signed = weight if value > 0 else -weight
            own[place, 0] += signed
            own[place, 1] += weight * value
            own[place, 2] += signed * value * value


@make_compiler()
def find_moments(rows: Any, lows: Any, highs: Any, totals: Any, squares: Any) -> None:
    """The least and the largest element of each of ``rows`` (rows, elements), their sum and that of their squares.

    ``lows`` and ``highs``: float32 (rows,), ``totals`` and ``squares``: float64 (rows,). Where an element is no number,
    or infinite, so is their sum. Each lane sees a part: a loop with one result would take elements one by one.
    """
    elements = rows.shape[1]
    whole = elements // LANES * LANES
    low, high = np.empty(LANES, np.float32), np.empty(LANES, np.float32)
    total, square = np.empty(LANES, np.float32), np.empty(LANES, np.float32)
    for row in range(rows.shape[0]):
        low[:], high[:], total[:], square[:] = np.inf, -np.inf, ZERO, ZERO
        for start in range(0, whole, LANES):
            for lane in range(LANES):
                value = rows[row, start + lane]
                low[lane], high[lane] = min(low[lane], value), max(high[lane], value)
                total[lane] += value
                square[lane] += value * value
        for i in range(whole, elements):
            value, lane = rows[row, i], i - whole
            low[lane], high[lane] = min(low[lane], value), max(high[lane], value)
            total[lane] += value
            square[lane] += value * value
        lows[row], highs[row] = low.min(), high.max()
        totals[row], squares[row] = 0.0, 0.0
        for lane in range(LANES):
            totals[row] += total[lane]
            squares[row] += square[lane]


@make_compiler()
def gather_patches(source: Any, image: Any, top: Any, left: Any, target: Any) -> None:
    """Copy to ``target``, (C, kernel height, width, positions), what a kernel covers of ``source``, (N, C, H, W).

    ``image``, ``top`` and ``left``, (positions,), tell where it lies; what is outside of a channel is 0. It is fast
    where positions that are near to each other follow each other.
    """
    height, width = source.shape[2:]
    for channel in range(source.shape[1]):
        for y in range(target.shape[1]):
            for x in range(target.shape[2]):
                found = target[channel, y, x]
                for at in range(len(found)):
                    row, column = top[at] + y, left[at] + x
                    is_inside = 0 <= row < height and 0 <= column < width
                    found[at] = source[image[at], channel, row, column] if is_inside else ZERO


@make_compiler()
def requantize(
    steps: Any, before: Any, factors: Any, after: Any, limits: Any, inverse: Any, qmin: Any, qmax: Any, even: Any
) -> None:
    """Put (``steps`` + ``before``) * ``factors`` + ``after``, held between the two ``limits``, on a grid, in place.

    ``steps``: float32 (rows, elements); ``before``, ``factors`` and ``after``: float32 (rows,). They become how many
    times 1 / ``inverse`` that is, ``qmin`` to ``qmax``. Halves are rounded to ``even``, or away from zero.
    """
    low, high = limits
    for row in range(steps.shape[0]):
        first, factor, last = before[row], factors[row], after[row]
        for i in range(steps.shape[1]):
            value = min(max((steps[row, i] + first) * factor + last, low), high) * inverse
            value = min(max(value, qmin), qmax)
            steps[row, i] = (
                (value + EVEN_SHIFT) - EVEN_SHIFT if even else np.trunc(value + np.copysign(ALMOST_HALF, value))
            )


@make_compiler()
def add(a: Any, b: Any, target: Any) -> None:
    """Write the sum of ``a`` and ``b`` to ``target``: float32 (N,)."""
    for i in range(a.size):
        target[i] = a[i] + b[i]


@make_compiler()
def add_relu(a: Any, b: Any, target: Any) -> None:
    """Write max(a + b, 0) to ``target``: float32 (N,)."""
    for i in range(a.size):
        target[i] = max(a[i] + b[i], ZERO)


@make_compiler()
def where_positive(chosen: Any, source: Any, target: Any) -> None:
    """Write ``source`` where ``chosen`` is above 0, else 0, to ``target``: float32 (N,)."""
    for i in range(source.size):
        target[i] = source[i] * (ONE if chosen[i] > ZERO else ZERO)


@make_compiler()
def max_pool(
    source: Any, output: Any, height: Any, width: Any, step: Any, step_across: Any, top: Any, left: Any
) -> None:
    """Write the largest values of windows of ``source``, float32 (N, H, W, C), to ``output`` (N, OH, OW, C)."""
    for n in range(output.shape[0]):
        for row in range(output.shape[1]):
            for column in range(output.shape[2]):
                largest = output[n, row, column]
                largest[:] = -np.inf
                for y in range(max(row * step - top, 0), min(row * step - top + height, source.shape[1])):
                    first = max(column * step_across - left, 0)
                    for x in range(first, min(column * step_across - left + width, source.shape[2])):
                        seen = source[n, y, x]
                        for c in range(seen.size):
                            largest[c] = max(largest[c], seen[c])


@make_compiler()
def max_pool_gradient(
    source: Any,
    output: Any,
    d_output: Any,
    d_source: Any,
    height: Any,
    width: Any,
    step: Any,
    step_across: Any,
    top: Any,
    left: Any,
) -> None:
    """Add ``d_output`` to ``d_source`` wherever ``source`` is as large as the ``output`` of its window."""
    for n in range(output.shape[0]):
        for row in range(output.shape[1]):
            for column in range(output.shape[2]):
                largest, gradient = output[n, row, column], d_output[n, row, column]
                for y in range(max(row * step - top, 0), min(row * step - top + height, source.shape[1])):
                    first = max(column * step_across - left, 0)
                    for x in range(first, min(column * step_across - left + width, source.shape[2])):
                        seen, target = source[n, y, x], d_source[n, y, x]
                        for c in range(seen.size):
                            target[c] += gradient[c] if seen[c] == largest[c] else ZERO


@make_compiler()
def shuffle(source: Any, target: Any, groups: Any) -> None:
    """Write each row of ``source`` (rows, C), seen as a (C / groups, groups) table, to ``target``, transposed."""
    long = source.shape[1] // groups
    for row in range(source.shape[0]):
        seen, written = source[row], target[row]
        # With a stride of three that the compiler knows it sorts by whole vectors: three times as fast, either way.
        if groups == THREE:
            for i in range(long):
                written[i] = seen[THREE * i]
                written[long + i] = seen[THREE * i + 1]
                written[2 * long + i] = seen[THREE * i + 2]
        elif long == THREE:
            for i in range(groups):
                written[THREE * i] = seen[i]
                written[THREE * i + 1] = seen[groups + i]
                written[THREE * i + 2] = seen[2 * groups + i]
        else:
            for group in range(groups):
                for i in range(long):
                    written[group * long + i] = seen[i * groups + group]


@make_compiler()
def descend(value: Any, speed: Any, gradient: Any, new_value: Any, rate: Any, momentum: Any, decay: Any) -> None:
    """A step of gradient descent: float32, all arrays (N,), ``speed`` in place.

    Rounded after every operation, as MegEngine does.
    """
    for i in range(value.size):
        slope = gradient[i] + value[i] * decay if decay != ZERO else gradient[i]
        moving = speed[i] * momentum + slope
        speed[i] = moving
        new_value[i] = value[i] - rate * moving


@make_compiler()
def move_statistics(
    old_mean: Any, old_variance: Any, mean: Any, variance: Any, new_mean: Any, new_variance: Any, keep: Any, unbias: Any
) -> None:
    """Running statistics: ``keep`` of the old and the rest of the batch's; all arrays float32 (C,)."""
    for c in range(mean.size):
        new_mean[c] = old_mean[c] * keep + mean[c] * (ONE - keep)
        new_variance[c] = old_variance[c] * keep + variance[c] * unbias * (ONE - keep)


@make_compiler()
def address_of(array: Any) -> Any:
    """Where ``array`` begins in memory; numpy's own way makes objects and takes five times as long."""
    return array.ctypes.data


@make_compiler()
def scale_of_range(low: Any, high: Any, half: Any, least: Any) -> Any:
    """The step for ``low`` to ``high`` in ``half`` steps a side, at least ``least``: float32, NaN of NaN."""
    if low != low or high != high:
        return low + high
    return max(max(-min(ZERO, low), max(ZERO, high)) / half, least)

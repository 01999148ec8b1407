"""Range estimators: from the values behind a layer to the range that its int8 grid should span.

The grid is MegEngine's: symmetric, of step range / 127.5, from -128 to 127 steps. Behind a ReLU only 0 to 127 are used.
As the negative half mirrors the positive one, all that counts is the distribution of absolute values on 128 levels,
with a ReLU or without.
"""

from __future__ import annotations

import math
from abc import abstractmethod

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]
Range = tuple[float, float]

LEVELS = 128  # absolute values of an int8 grid
HALF = 127.5  # range / step
BINS = 4096
SAMPLE = 1 << 17


class RangeEstimator:
    """Sees float32 arrays of any shape, one after the other, and then gives a range."""

    def __init__(self) -> None:
        self.lowest, self.highest = math.inf, -math.inf

    def update(self, values: Array) -> None:
        """Take note of ``values``, the outputs of one layer for one batch."""
        self.lowest = min(self.lowest, float(values.min()))
        self.highest = max(self.highest, float(values.max()))

    @property
    def has_seen(self) -> bool:
        return self.lowest <= self.highest

    def range(self) -> Range:
        """Smallest and largest value of the range; of the values seen, where they do not reach its bounds."""
        limit = self.limit()
        if self.lowest < 0 and -self.lowest >= self.highest:
            return -limit, min(self.highest, limit)
        return max(self.lowest, -limit), limit if self.highest > 0 else self.highest

    @abstractmethod
    def limit(self) -> float:
        """The largest absolute value of the range."""


class MinMax(RangeEstimator):
    """The smallest and the largest value seen."""

    def limit(self) -> float:
        return max(-self.lowest, self.highest)


class MovingAverage(RangeEstimator):
    """Moving average of each batch's smallest and largest value: MegEngine's ExponentialMovingAverageObserver."""

    MOMENTUM = 0.9

    def update(self, values: Array) -> None:
        lowest, highest = float(values.min()), float(values.max())
        keep = self.MOMENTUM if self.has_seen else 0.0
        self.lowest = keep * self.lowest + (1 - keep) * lowest if keep else lowest
        self.highest = keep * self.highest + (1 - keep) * highest if keep else highest

    def limit(self) -> float:
        return max(-self.lowest, self.highest)


class HistogramEstimator(RangeEstimator):
    """Counts of absolute values in ``BINS`` equal bins from 0 to ``top``, a power of two that grows as needed.

    Of a large array every k-th value is counted; its smallest and largest are always exact.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts = np.zeros(BINS)
        self.top = 0.0

    def update(self, values: Array) -> None:
        super().update(values)
        self.grow(max(-self.lowest, self.highest))
        flat = values.reshape(-1)
        # An odd stride meets every column of a picture.
        sample = np.abs(flat[:: flat.size // SAMPLE | 1])
        sample *= np.float32(BINS / self.top)
        bins = sample.astype(np.int32)
        self.counts += np.bincount(np.minimum(bins, BINS - 1, out=bins), minlength=BINS)

    def grow(self, largest: float) -> None:
        """Make ``top`` at least ``largest``, by adding up neighbouring bins."""
        wanted = max(self.top, 2.0 ** math.ceil(math.log2(max(largest, 1e-30))))
        if self.top and wanted > self.top:
            merged = min(BINS, int(wanted / self.top))
            kept = self.counts.reshape(-1, merged).sum(axis=1)
            self.counts = np.concatenate([kept, np.zeros(BINS - kept.size)])
        self.top = wanted

    @property
    def centres(self) -> npt.NDArray[np.float64]:
        return (np.arange(BINS) + 0.5) * (self.top / BINS)

    @property
    def largest(self) -> float:
        return max(-self.lowest, self.highest)


class MeanSquaredError(HistogramEstimator):
    """The range of the smallest squared error of rounding and clipping together."""

    CANDIDATES = 200

    def limit(self) -> float:
        candidates = self.largest * np.linspace(0.05, 1, self.CANDIDATES)
        used = np.flatnonzero(self.counts)
        centres, counts = self.centres[used], self.counts[used]
        errors = [float(counts @ rounding_errors(centres, limit / HALF) ** 2) for limit in candidates]
        return float(candidates[int(np.argmin(errors))])


class Entropy(HistogramEstimator):
    """The range that loses the least information (Kullback-Leibler divergence), as in TensorRT's calibration.

    Migacz 2017, "8-bit inference with TensorRT".
    """

    CANDIDATES = 200

    def limit(self) -> float:
        width = self.top / BINS
        last = math.ceil(self.largest / width)
        first = min(LEVELS, last)
        candidates = np.unique(np.linspace(first, last, self.CANDIDATES).astype(int))
        # The first bin holds the zeros of a ReLU, which every range keeps.
        counts = self.counts.copy()
        counts[0] = 0
        divergences = [divergence(counts, int(bins)) for bins in candidates]
        return min(float(candidates[int(np.argmin(divergences))]) * width, self.largest)


class Percentile(HistogramEstimator):
    """The range that holds all but a small share of the values."""

    SHARE = 0.9999

    def limit(self) -> float:
        reached = np.cumsum(self.counts) >= self.SHARE * self.counts.sum()
        return min(float((np.argmax(reached) + 1) * self.top / BINS), self.largest)


def rounding_errors(values: npt.NDArray[np.float64], step: float) -> npt.NDArray[np.float64]:
    """What int8 of that step makes of absolute ``values``, minus them."""
    return np.minimum(np.rint(values / step), LEVELS - 1) * step - values


def divergence(counts: npt.NDArray[np.float64], bins: int) -> float:
    """Kullback-Leibler divergence of the distribution clipped to so many ``bins`` from the same on 128 levels."""
    clipped = counts[:bins].copy()
    clipped[-1] += counts[bins:].sum()
    if not clipped.sum():
        return math.inf
    kept = counts[:bins]
    starts = (np.arange(LEVELS) * bins) // LEVELS
    level = np.repeat(np.arange(LEVELS), np.diff([*starts, bins]))
    sums = np.bincount(level, kept, LEVELS)
    used = np.bincount(level, kept > 0, LEVELS)
    spread = np.where(kept > 0, (sums / np.maximum(used, 1))[level], 0.0)
    p, q = clipped / clipped.sum(), spread / max(spread.sum(), 1e-300)
    there = p > 0
    return float((p[there] * np.log(p[there] / np.maximum(q[there], 1e-12))).sum())


ESTIMATORS: dict[str, type[RangeEstimator]] = {
    "min-max": MinMax,
    "ema": MovingAverage,
    "histogram": Entropy,
    "mse": MeanSquaredError,
}

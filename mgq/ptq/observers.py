"""Range estimators: from the values behind a layer to the range that its int8 grid should span.

The grid is symmetric. MegEngine's has a step of range / 127.5, from -128 to 127 steps, behind a ReLU only 0 to 127;
uint8 behind a ReLU has a step of range / 255. As a negative half mirrors the positive one, all that counts is the
distribution of absolute values on 128 or 256 levels, with a ReLU or without.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from mgq.quantization.option_names import EMA, HISTOGRAM, MIN_MAX, MSE
from mgq.quantization.qat_layers import Range

Array = npt.NDArray[np.float32]

HALF = 127.5  # range / step on an int8 grid
BINS = 4096
SAMPLE = 1 << 15  # values of a layer and batch


class Observer:
    """Collects float32 arrays of any shape, then estimates a range. ``half`` is range / step."""

    def __init__(self, half: float = HALF) -> None:
        self.half = half
        self.lowest, self.highest = math.inf, -math.inf

    def update(self, values: Array) -> None:
        """Collect ``values``, the outputs of one layer for one batch."""
        self.lowest = min(self.lowest, float(values.min()))
        self.highest = max(self.highest, float(values.max()))

    @property
    def has_seen(self) -> bool:
        return self.lowest <= self.highest

    def range(self) -> Range:
        """Smallest and largest value of the range; of the values seen, where they do not reach its bounds."""
        limit = self.limit()
        if self.lowest < 0 and -self.lowest >= self.highest:
            return Range(-limit, min(self.highest, limit))
        return Range(max(self.lowest, -limit), limit if self.highest > 0 else self.highest)

    def limit(self) -> float:
        """The largest absolute value of the range."""
        return self.largest

    @property
    def largest(self) -> float:
        return max(-self.lowest, self.highest)


class MinMaxObserver(Observer):
    """The smallest and the largest value seen."""


class MovingAverageObserver(Observer):
    """Moving average of each batch's smallest and largest value: MegEngine's ExponentialMovingAverageObserver."""

    MOMENTUM = 0.9

    def update(self, values: Array) -> None:
        lowest, highest = float(values.min()), float(values.max())
        keep = self.MOMENTUM if self.has_seen else 0.0
        self.lowest = keep * self.lowest + (1 - keep) * lowest if keep else lowest
        self.highest = keep * self.highest + (1 - keep) * highest if keep else highest


class HistogramObserver(Observer):
    """Counts of absolute values in ``BINS`` equal bins from 0 to ``top``, a power of two that grows as needed.

    Of a large array every k-th value is counted; its smallest and largest are always exact.
    """

    def __init__(self, half: float = HALF) -> None:
        super().__init__(half)
        self.counts = np.zeros(BINS)
        self.top = 0.0

    def update(self, values: Array) -> None:
        super().update(values)
        self.grow(self.largest)
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


class MeanSquaredErrorObserver(HistogramObserver):
    """The range of the smallest squared error of rounding and clipping together."""

    CANDIDATES = 200

    def limit(self) -> float:
        if not self.largest:
            return 0.0
        candidates = self.largest * np.linspace(0.05, 1, self.CANDIDATES)
        used = np.flatnonzero(self.counts)
        centres, counts = self.centres[used], self.counts[used]
        errors = [
            float(counts @ rounding_errors(centres, limit / self.half, int(self.half)) ** 2) for limit in candidates
        ]
        return float(candidates[int(np.argmin(errors))])


class PercentileObserver(HistogramObserver):
    """The range that holds all but one value in 10,000.

    Chosen by measurement over the threshold of least Kullback-Leibler divergence, which cost EfficientNet-Lite0 two
    points more.
    """

    SHARE = 0.9999

    def limit(self) -> float:
        reached = np.cumsum(self.counts) >= self.SHARE * self.counts.sum()
        return min(float((np.argmax(reached) + 1) * self.top / BINS), self.largest)


def rounding_errors(values: npt.NDArray[np.float64], step: float, steps: int) -> npt.NDArray[np.float64]:
    """Quantized minus exact: the errors of absolute ``values`` on a grid of ``step``, at most ``steps`` steps."""
    rounded: npt.NDArray[np.float64] = np.minimum(np.rint(values / step), steps) * step
    return rounded - values


RANGE_OBSERVERS: dict[str, type[Observer]] = {
    MIN_MAX: MinMaxObserver,
    EMA: MovingAverageObserver,
    HISTOGRAM: PercentileObserver,
    MSE: MeanSquaredErrorObserver,
}

"""Computes the figures that are shown from the raw times of a benchmark.

The times of a case are kept by round: ``rounds[r][i]`` is the i-th single run of round r in nanoseconds.
Quantiles interpolate linearly between the sorted values (type 7 of Hyndman and Fan, 1996: numpy's default).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Rounds: TypeAlias = Sequence[Sequence[int]]
Floats: TypeAlias = npt.NDArray[np.float64]

RESAMPLES = 4000
INTERVAL = (0.025, 0.975)


@dataclass(frozen=True)
class Speed:
    """How fast one case was.

    ``fps`` is the median over rounds of pictures a second, ``fps_iqr`` the interquartile range of the same
    values. The milliseconds are quantiles over all single runs of all rounds; ``runs`` counts them.
    """

    fps: float
    fps_iqr: float
    p50_ms: float
    p90_ms: float
    p99_ms: float
    runs: int


@dataclass(frozen=True)
class Speedup:
    """How many times faster one case was than another: median over rounds, and its confidence interval.

    ``low`` to ``high`` holds the true median with a probability of 95 %, as far as the rounds are alike: percentiles
    of the medians of ``RESAMPLES`` bootstrap samples of the rounds (Efron, 1979). None of one round alone.
    """

    median: float
    low: float | None
    high: float | None


def measure_speed(rounds: Rounds, batch: int) -> Speed:
    """The speed that ``rounds`` show, where every single run took ``batch`` pictures.

    Of copies that run side by side all runs are in a round, and ``batch`` counts the pictures of all copies.
    """
    rates = images_per_second(rounds, batch)
    milliseconds = np.concatenate([np.asarray(turn, np.float64) for turn in rounds]) / 1e6
    p50, p90, p99 = (float(value) for value in np.quantile(milliseconds, (0.5, 0.9, 0.99)))
    return Speed(float(np.median(rates)), interquartile_range(rates), p50, p90, p99, milliseconds.size)


def measure_speedup(rounds: Rounds, base: Rounds) -> Speedup:
    """How many times faster ``rounds`` are than ``base``, round by round.

    What slows the machine for a while slows both within a round, and falls out of their ratio; it would stay
    in the ratio of two medians. Both must have the same rounds and the same batch.
    """
    if len(rounds) != len(base):
        raise ValueError(f"{len(rounds)} rounds cannot be compared with {len(base)}")
    return median_time(images_per_second(rounds, 1) / images_per_second(base, 1))


def median_time(ratios: Floats) -> Speedup:
    """The median of ``ratios``, one a round, with its interval."""
    if len(ratios) < 2:
        return Speedup(float(np.median(ratios)), None, None)
    drawn = np.random.default_rng(0).integers(0, len(ratios), (RESAMPLES, len(ratios)))
    low, high = np.quantile(np.median(ratios[drawn], axis=1), INTERVAL)
    return Speedup(float(np.median(ratios)), float(low), float(high))


def images_per_second(rounds: Rounds, batch: int) -> Floats:
    """float64 (rounds,): the throughput of each round, all its pictures over the sum of its times."""
    return np.array([len(turn) * batch * 1e9 / sum(turn) for turn in rounds])


def interquartile_range(values: Floats) -> float:
    """The distance from the first quartile to the third: half of the values lie between them."""
    low, high = np.quantile(values, (0.25, 0.75))
    return float(high - low)

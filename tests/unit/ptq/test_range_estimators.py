"""Range estimators: what they make of values that are known."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from megengine import Tensor
from megengine.quantization import FakeQuantize
from megengine.quantization.observer import ExponentialMovingAverageObserver
from megengine.quantization.observer import MinMaxObserver as MegEngineMinMax

from mgq.ptq.observers import (
    BINS,
    RANGE_OBSERVERS,
    SAMPLE,
    HistogramObserver,
    MeanSquaredErrorObserver,
    MinMaxObserver,
    MovingAverageObserver,
    Observer,
    PercentileObserver,
)

Array = npt.NDArray[np.float32]


def after(kind: type[Observer], *arrays: Array) -> Observer:
    estimator = kind()
    for array in arrays:
        estimator.update(array)
    return estimator


def normal(seed: int, size: int = 20_000, spread: float = 1.0) -> Array:
    return np.random.default_rng(seed).normal(0, spread, size).astype(np.float32)


def error_of(values: Array, low: float, high: float) -> float:
    """Mean squared error of MegEngine's own int8 fake quantization with an observer of that range."""
    observer = MegEngineMinMax(dtype="qint8")
    observer.min_val[...], observer.max_val[...] = Tensor(np.float32(low)), Tensor(np.float32(high))
    rounded = FakeQuantize("qint8")(Tensor(values), observer.get_qparams()).numpy()
    return float(((rounded - values) ** 2).mean())


@pytest.mark.parametrize("kind", RANGE_OBSERVERS.values())
class TestEachEstimator:
    def test_one_that_saw_nothing_says_so(self, kind: type[Observer]) -> None:
        assert not kind().has_seen
        assert after(kind, normal(0)).has_seen

    def test_a_range_lies_within_what_was_seen(self, kind: type[Observer]) -> None:
        batches = [normal(seed, spread=1 + seed) for seed in range(3)]
        low, high = after(kind, *batches).range()
        seen = np.concatenate(batches)
        assert seen.min() <= low < 0 < high <= seen.max()

    def test_a_range_behind_a_relu_starts_at_0(self, kind: type[Observer]) -> None:
        values = np.maximum(normal(1), 0)
        low, high = after(kind, values).range()
        assert low == 0
        assert 1 < high <= values.max()

    def test_a_range_behind_a_relu6_never_exceeds_6(self, kind: type[Observer]) -> None:
        assert after(kind, np.clip(normal(1, spread=10), 0, 6)).range()[1] <= 6

    def test_a_layer_that_is_never_positive_has_a_range(self, kind: type[Observer]) -> None:
        low, high = after(kind, (-np.abs(normal(2)) - 1).astype(np.float32)).range()
        assert low < -1
        assert high < 0

    def test_nothing_but_zeros_is_a_range_of_its_own(self, kind: type[Observer]) -> None:
        found = after(kind, np.zeros((2, 3), np.float32))
        assert found.has_seen and found.range() == (0, 0)

    def test_the_shape_does_not_matter_nor_does_the_array_change(self, kind: type[Observer]) -> None:
        values = normal(3, 2 * 3 * 10 * 10)
        before = values.copy()
        assert after(kind, values).range() == after(kind, values.reshape(2, 3, 10, 10)).range()
        assert np.array_equal(values, before)


class TestMinMax:
    def test_the_smallest_and_largest_of_all_batches(self) -> None:
        batches = [normal(seed) for seed in range(4)]
        seen = np.concatenate(batches)
        assert after(MinMaxObserver, *batches).range() == (seen.min(), seen.max())


class TestMovingAverage:
    def test_it_is_megengines(self) -> None:
        batches = [normal(seed, spread=1 + seed) for seed in range(5)]
        stock = ExponentialMovingAverageObserver(dtype="qint8")
        for batch in batches:
            stock(Tensor(batch))
        expected = stock.min_val.numpy(), stock.max_val.numpy()
        np.testing.assert_allclose(after(MovingAverageObserver, *batches).range(), expected, rtol=1e-5)


class TestHistogram:
    def test_every_value_is_counted_in_its_bin(self) -> None:
        values = normal(0, 10_000)
        found = after(HistogramObserver, values)
        assert isinstance(found, HistogramObserver)
        assert found.top == 4  # the next power of two
        expected, _ = np.histogram(np.abs(values), BINS, (0, 4))
        assert found.counts.sum() == values.size
        assert np.abs(np.cumsum(found.counts) - np.cumsum(expected)).max() <= 2  # values on an edge, in float32

    def test_growing_merges_bins_as_if_it_had_been_that_large_before(self) -> None:
        small, large = normal(0, spread=0.01), normal(1, spread=30)
        grown = after(HistogramObserver, small, large)
        at_once = after(HistogramObserver, large, small)
        assert isinstance(grown, HistogramObserver)
        assert isinstance(at_once, HistogramObserver)
        assert grown.top == at_once.top == 128
        assert grown.counts.sum() == small.size + large.size
        assert np.array_equal(grown.counts, at_once.counts)

    def test_one_that_outgrows_all_its_bins_keeps_its_counts(self) -> None:
        grown = after(HistogramObserver, np.full(10, 1e-6, np.float32), np.full(3, 1e6, np.float32))
        assert isinstance(grown, HistogramObserver)
        assert grown.counts[0] == 10
        assert grown.counts.sum() == 13

    def test_a_large_array_is_sampled_but_its_extremes_are_not(self) -> None:
        values = normal(0, 5 * SAMPLE)
        values[1] = 100
        found = after(HistogramObserver, values)
        assert isinstance(found, HistogramObserver)
        assert found.counts.sum() <= 1.1 * SAMPLE
        assert found.highest == 100


class TestPercentile:
    def test_all_but_one_in_10000(self) -> None:
        values = np.random.default_rng(0).permutation(100_000)
        assert np.isclose(after(PercentileObserver, values.astype(np.float32)).range()[1], 99_990, rtol=1e-3)

    def test_an_outlier_does_not_stretch_it(self) -> None:
        values = normal(0, 100_000)
        values[7] = 1000
        assert after(PercentileObserver, values).range()[1] < 6


class TestMeanSquaredError:
    @pytest.mark.parametrize("relu", [False, True])
    def test_it_is_the_best_range_for_megengines_grid(self, relu: bool) -> None:
        batches = [normal(seed, 50_000) for seed in range(10)]
        batches[3][5] = 14
        batches = [np.maximum(batch, 0) for batch in batches] if relu else batches
        low, high = after(MeanSquaredErrorObserver, *batches).range()
        values = np.concatenate(batches)
        errors = [error_of(values, 0 if relu else -limit, limit) for limit in np.linspace(0.5, 14, 100)]
        assert max(-low, high) < 0.6 * values.max()  # the outlier is clipped
        assert error_of(values, low, high) < 1.02 * min(errors)
        assert error_of(values, low, high) < 0.6 * error_of(values, float(values.min()), float(values.max()))

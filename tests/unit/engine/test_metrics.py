"""Loss and accuracy: right by hand, the same after an interruption, and deterministic in ties."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from mgq.engine.classifier.metrics import Meter, cross_entropy, ranks, standard_error


def float32(*rows: list[float]) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    return np.array(rows, np.float32)


def int64(*labels: int) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
    return np.array(labels, np.int64)


def test_cross_entropy_is_the_negative_logarithm_of_the_probability() -> None:
    logits = float32([0, 0, 0, 0], [math.log(6), math.log(2), 0, 0])
    losses = cross_entropy(logits, int64(2, 1))
    assert losses.dtype == np.float64
    np.testing.assert_allclose(losses, [math.log(4), math.log(5)], rtol=1e-7)


def test_cross_entropy_of_large_logits_neither_overflows_nor_loses_small_ones() -> None:
    logits = float32([1e4, 0], [-3e38, 3e38], [20, 0])
    losses = cross_entropy(logits, int64(1, 1, 0))
    assert losses[0] == 1e4 and losses[1] == 0
    np.testing.assert_allclose(losses[2], math.log1p(math.exp(-20)), rtol=1e-6)


def test_of_equal_logits_the_lower_class_comes_first() -> None:
    logits = float32([5, 5, 5, 9])
    assert [int(ranks(logits, int64(label))[0]) for label in range(4)] == [1, 2, 3, 0]
    # What a network answers is then the same by either measure.
    assert ranks(float32([1, 1]), int64(0))[0] == 0 and float32([1, 1]).argmax() == 0


def test_an_answer_that_is_not_a_number_is_never_right() -> None:
    logits = float32([math.nan, math.nan, 0], [math.nan] * 3)
    assert ranks(logits, int64(2, 0)).tolist() == [3, 3]


def test_top1_and_top5_are_percent_of_images() -> None:
    meter = Meter()
    row = [float(10 - i) for i in range(10)]
    meter.add(0.0, float32(*[row] * 5), int64(0, 1, 4, 5, 9))
    assert (meter.images, meter.top1, meter.top5) == (5, 20.0, 60.0)


def test_with_fewer_than_five_classes_top5_counts_them_all() -> None:
    meter = Meter()
    meter.add(0.0, float32([3, 2, 1]), int64(2))
    assert (meter.top1, meter.top5) == (0.0, 100.0)
    meter.add(0.0, float32([math.nan, 2, 1]), int64(1))
    assert meter.top5 == 50.0


def test_the_loss_of_unequal_batches_is_the_mean_over_images() -> None:
    meter = Meter()
    meter.add(2.0, np.zeros((3, 2), np.float32), int64(0, 0, 0))
    meter.add(np.array([6.0]), np.zeros((1, 2), np.float32), int64(0))
    assert meter.loss == 3.0


def test_nothing_measured_is_not_a_number() -> None:
    meter = Meter()
    assert all(math.isnan(value) for value in (meter.loss, meter.top1, meter.top5))


@pytest.mark.parametrize("cut", [0, 1, 7])
def test_an_interrupted_meter_goes_on_to_the_same_numbers(cut: int) -> None:
    rng = np.random.default_rng(3)
    batches = [(rng.random(5) * 3, rng.normal(size=(5, 8)).astype(np.float32), rng.integers(0, 8, 5)) for _ in range(9)]
    whole, first = Meter(), Meter()
    for batch in batches:
        whole.add(*batch)
    for batch in batches[:cut]:
        first.add(*batch)
    second = Meter.from_state(json.loads(json.dumps(first.state())))
    for batch in batches[cut:]:
        second.add(*batch)
    assert second == whole and second.loss == whole.loss
    assert all(type(value) in (int, float) for value in second.state().values())


def test_the_standard_error_is_that_of_a_share() -> None:
    assert standard_error(86.2, 500) == pytest.approx(1.5424, abs=1e-4)
    assert standard_error(100, 10) == 0 and math.isnan(standard_error(50, 0))

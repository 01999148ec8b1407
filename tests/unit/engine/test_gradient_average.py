"""Gradients travel in half the bytes without leaving the range of half floats."""

from __future__ import annotations

import numpy as np
import pytest

from mgq.engine.distributed.gradient_average import pack, unpack


@pytest.mark.parametrize("magnitude", [1e-20, 1e-9, 1.0, 1e6, 1e20])
def test_halves_keep_three_digits_at_any_magnitude(magnitude: float) -> None:
    rows = (np.random.default_rng(0).normal(size=(3, 1000)) * magnitude).astype(np.float32)
    halves = pack(rows)
    assert halves.dtype == np.float16 and halves.shape == (3, 1002)
    assert np.abs(unpack(halves) - rows).max() < 2**-11 * np.abs(rows).max()


def test_rows_of_nothing_stay_so() -> None:
    assert not unpack(pack(np.zeros((2, 5), np.float32))).any()


def test_what_is_not_finite_stays_so() -> None:
    rows = np.array([[1.0, np.nan], [np.inf, 1.0]], np.float32)
    assert not np.isfinite(unpack(pack(rows))).all(1).any()

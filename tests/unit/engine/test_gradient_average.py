"""Gradients travel in half the bytes without leaving the range of half floats."""

from __future__ import annotations

import mmap
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from megengine import Tensor

from mgq.engine.distributed import gradient_average
from mgq.engine.distributed.gradient_average import GradientAverage, pack, unpack
from mgq.engine.distributed.shared_memory import SharedExchange, SharedMemory


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


@pytest.mark.parametrize("on_one_machine", [True, False])
def test_only_what_leaves_the_machine_is_compressed(on_one_machine: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[Any] = []
    team: Any = SimpleNamespace(rank=0, size=1, wait_until=lambda holds: None, make_progress=lambda: None)
    memory = SharedMemory(team, mmap.mmap(-1, 2 * 64 + 4 * 3), 3) if on_one_machine else None
    monkeypatch.setattr(gradient_average, "share_memory", lambda *_: memory)
    monkeypatch.setitem(gradient_average.EXCHANGES, "fp16", lambda _, array: begun.append(array))
    average = GradientAverage(team, "fp16", 3)
    average(Tensor([0.0, 0.0, 0.0]), Tensor([1.0, 2.0, 3.0]))
    average.send()
    assert isinstance(average.under_way[0].exchange, SharedExchange) == on_one_machine == (not begun)

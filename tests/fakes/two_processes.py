"""Two threads that exchange statistics as two processes do."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any, TypeVar

import numpy as np

Result = TypeVar("Result")
WITHIN_S = 60


class Meeting:
    """What both show each other."""

    def __init__(self) -> None:
        self.barrier = Barrier(2)
        self.shown: list[Any] = [None, None]

    def show(self, rank: int, array: Any) -> list[Any]:
        self.shown[rank] = array
        self.barrier.wait(WITHIN_S)
        found = list(self.shown)
        self.barrier.wait(WITHIN_S)
        return found


class ThreadExchange:
    """The exchange of one of both; ``sums`` counts what it was asked for."""

    def __init__(self, meeting: Meeting, rank: int) -> None:
        self.meeting, self.rank, self.sums = meeting, rank, 0

    def merge_extremes(self, extremes: Any) -> Any:
        low, high = np.transpose(self.meeting.show(self.rank, extremes))
        return np.array([low.min(), high.max()], np.float32)

    def add_up(self, values: Any) -> Any:
        self.sums += 1
        return np.add.reduce(self.meeting.show(self.rank, values))


def run_both(work: Callable[[ThreadExchange], Result]) -> list[Result]:
    """What ``work`` returns in each, by rank."""
    meeting = Meeting()
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(work, [ThreadExchange(meeting, rank) for rank in range(2)]))

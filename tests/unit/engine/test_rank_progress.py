"""What the first rank's view tells of all."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

from mgq.engine.distributed import mpi_group
from mgq.engine.distributed.mpi_group import MpiGroup


@dataclass
class FakeTeam:
    """A team whose other ranks hear of progress at once, or not yet."""

    progress: dict[int, list[float]] = field(default_factory=dict)
    noted: tuple[int, float, float] = (0, 0.0, 0.0)
    waited: float = 0.0
    epoch: int = 0

    def tell(self, progress: list[float]) -> None:
        self.progress[0] = progress

    def name_of(self, rank: int) -> str:
        return f"rank {rank} on here"


@pytest.fixture
def team(monkeypatch: pytest.MonkeyPatch) -> Any:
    team = FakeTeam()
    monkeypatch.setattr(mpi_group, "current_team", lambda: team)
    return team


def test_the_view_has_steps_and_milliseconds_of_each_rank(team: FakeTeam) -> None:
    group = MpiGroup(0, 2)
    assert group.describe() == ""
    group.note_progress(2, 0.8)
    team.progress[1] = [1, 0.5, 0]
    assert group.describe() == "ranks at 2 1, 400 500 ms"


def test_steps_of_an_epoch_that_is_over_are_not_shown(team: FakeTeam) -> None:
    group = MpiGroup(0, 2)
    group.note_progress(19, 1.9)
    team.progress[1] = [19, 0.1, 0]
    group.note_progress(1, 0.1)
    assert group.describe() == ""
    group.note_progress(3, 0.5)
    assert group.describe() == "ranks at 3, 200 ms"


def test_of_many_ranks_the_slowest_is_shown(team: FakeTeam) -> None:
    team.progress = {rank: [7 + rank, 0.1 * (1 + rank), 0] for rank in range(9)}
    assert MpiGroup(0, 9).describe() == "9 ranks, step 7, longest 900 ms on rank 8 on here"

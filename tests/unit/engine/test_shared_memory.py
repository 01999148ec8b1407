"""Sums through memory that several ranks see; here they are in one process."""

from __future__ import annotations

import mmap
import os
import platform
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil  # type: ignore[import-untyped]
import pytest

from mgq.engine.distributed import shared_memory
from mgq.engine.distributed.shared_memory import (
    SharedBoard,
    SharedExchange,
    SharedFile,
    SharedMemory,
    make_file,
    map_file,
    share_memory,
)

RANKS, SIZE = 3, 100


class WouldWaitError(Exception):
    pass


def team_of(rank: int, **more: Any) -> Any:
    def wait_until(holds: Callable[[], bool]) -> None:
        if not holds():
            raise WouldWaitError

    return SimpleNamespace(rank=rank, size=RANKS, wait_until=wait_until, **more)


@pytest.fixture
def memories() -> list[SharedMemory]:
    whole = mmap.mmap(-1, RANKS * (2 * 64 + 4 * SIZE))
    return [SharedMemory(team_of(rank), whole, SIZE) for rank in range(RANKS)]


def begin(memory: SharedMemory, values: Any) -> SharedExchange:
    part = memory.part(values.size)
    assert part is not None
    part[:] = values
    return SharedExchange(memory, part)


def test_all_ranks_come_to_the_same_bits_once_all_have_written(memories: list[SharedMemory]) -> None:
    given = np.random.default_rng(0).standard_normal((RANKS, 2, 50)).astype(np.float32)
    exchanges = [[begin(memory, values) for values in parts] for memory, parts in zip(memories, given, strict=True)]
    for exchange in [exchange for found in exchanges for exchange in found]:
        assert exchange.is_done()
    for place in range(2):
        expected = given[0, place] + given[1, place] + given[2, place]
        for found in exchanges:
            np.testing.assert_array_equal(found[place].array, expected)


def test_a_sum_is_not_there_before_the_last_rank_has_written(memories: list[SharedMemory]) -> None:
    ones = np.ones(SIZE, np.float32)
    first, second = (begin(memory, ones) for memory in memories[:2])
    assert not first.is_done() and not second.is_done()
    begin(memories[2], ones)
    assert first.is_done() and second.is_done()


def test_nobody_writes_where_another_rank_has_yet_to_read(memories: list[SharedMemory]) -> None:
    ones = np.ones(SIZE, np.float32)
    first, second, third = (begin(memory, ones) for memory in memories)
    assert first.is_done() and second.is_done()
    memories[0].begin_step()
    with pytest.raises(WouldWaitError):
        memories[0].part(SIZE)
    assert third.is_done()
    memories[0].begin_step()
    assert memories[0].part(SIZE) is not None


def test_what_does_not_fit_goes_another_way(memories: list[SharedMemory]) -> None:
    assert memories[0].part(SIZE + 1) is None
    assert memories[0].part(60) is not None and memories[0].part(60) is None


@pytest.mark.parametrize("others_see_it", [True, False])
def test_the_file_never_has_a_name(others_see_it: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So a rank that is killed, at whatever moment, leaves nothing behind."""
    monkeypatch.setattr(shared_memory, "FOLDER", tmp_path)
    monkeypatch.setattr(shared_memory, "ORDERED", (platform.machine(),))
    names: list[Path] = []

    def share(file: Any) -> Any:
        names.extend(tmp_path.iterdir())
        return file

    team = team_of(0, is_on_one_machine=True, share=share, gather=lambda seen: [seen, others_see_it])
    found = share_memory(team, SIZE)
    assert (found is not None) == others_see_it and not names and not list(tmp_path.iterdir())


def test_two_who_map_one_file_see_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_memory, "FOLDER", tmp_path)
    descriptor = make_file(SIZE)
    assert descriptor is not None
    shared = SharedFile.of(descriptor)
    one, other = map_file(shared), map_file(shared)
    os.close(descriptor)
    assert one is not None and other is not None and other[3] == 0
    one[3] = 7
    assert other[3] == 7


def test_another_file_under_that_path_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As another process has it in a container, where numbers of processes are its own."""
    monkeypatch.setattr(shared_memory, "FOLDER", tmp_path)
    descriptor, other = make_file(SIZE), make_file(SIZE)
    assert descriptor is not None and other is not None
    shared = SharedFile.of(descriptor)
    os.dup2(other, descriptor)
    assert map_file(shared) is None
    os.close(descriptor)
    os.close(other)
    assert map_file(shared) is None


def test_without_room_there_is_no_shared_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: int) -> None:
        raise OSError("no room")

    monkeypatch.setattr(shared_memory, "FOLDER", tmp_path)
    monkeypatch.setattr(os, "posix_fallocate", refuse)
    before = psutil.Process().num_fds()
    team = team_of(0, is_on_one_machine=True, share=lambda name: name, gather=lambda seen: [seen])
    assert share_memory(team, SIZE) is None and psutil.Process().num_fds() == before


def boards(size: int = 64) -> list[SharedBoard]:
    whole = mmap.mmap(-1, RANKS * (64 + 2 * size))
    return [SharedBoard(board_team(rank), whole, size) for rank in range(RANKS)]


def board_team(rank: int) -> Any:
    team = team_of(rank)
    team.wait_for_others = team.wait_until
    return team


def show_all(found: list[SharedBoard], arrays: list[Any]) -> list[Any]:
    """The last sees what all have; the others would wait, and look again."""
    for board, array in zip(found[:-1], arrays[:-1], strict=True):
        with pytest.raises(WouldWaitError):
            board.show(array)
    seen = found[-1].show(arrays[-1])
    assert seen is not None
    return list(seen)


@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_a_board_shows_what_all_ranks_have_by_rank(kind: Any) -> None:
    found = boards()
    for turn in range(5):  # each of both places several times
        given = [np.arange(6, dtype=kind).reshape(2, 3) + 10 * rank + turn for rank in range(RANKS)]
        np.testing.assert_array_equal(show_all(found, given), given)


def test_what_is_too_long_for_a_board_goes_another_way() -> None:
    board, *_ = boards()
    assert board.show(np.zeros(65, np.uint8)) is None and board.begun == 0

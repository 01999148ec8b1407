"""Processes that stand for ranks of an MPI job."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest

from mgq.system.local_ranks import count_local_ranks, find_local_ranks
from mgq.system.mpi_world import RANK_AND_SIZE

SEES_OTHERS = "from mgq.system.local_ranks import find_local_ranks; print(sorted(find_local_ranks()))"
LASTS = "print(flush=True); input()"


@contextmanager
def lasting_rank(environment: dict[str, str]) -> Iterator[None]:
    """A process in ``environment`` that is there until the end."""
    with subprocess.Popen(
        [sys.executable, "-c", LASTS], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdout.readline()
        yield
        process.stdin.close()


def as_rank(names: tuple[str, str], number: int) -> dict[str, str]:
    return {**os.environ, names[0]: str(number), names[1]: "4"}


@pytest.mark.parametrize("names", RANK_AND_SIZE)
@pytest.mark.parametrize("wrapper", [[], ["sh", "-c", '"$@"; exit', "sh"]])
def test_a_rank_finds_those_beside_it(names: tuple[str, str], wrapper: list[str]) -> None:
    with ExitStack() as others:
        for number in (0, 3):
            others.enter_context(lasting_rank(as_rank(names, number)))
        command = [*wrapper, sys.executable, "-c", SEES_OTHERS]
        found = subprocess.run(command, env=as_rank(names, 1), capture_output=True, text=True, check=True)
    assert found.stdout == "[0, 1, 3]\n"


def test_where_no_launcher_is_there_are_no_ranks() -> None:
    assert find_local_ranks() == {} and count_local_ranks({}) == 1


@pytest.mark.parametrize("name", ["MPI_LOCALNRANKS", "OMPI_COMM_WORLD_LOCAL_SIZE"])
def test_a_launcher_tells_how_many_ranks_are_on_a_machine(name: str) -> None:
    assert count_local_ranks({name: "3"}) == 3 and count_local_ranks({name: "?"}) == 1

"""Processes that stand for ranks of an MPI job."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest

from mgq.machine import usable_cores
from mgq.system.local_ranks import count_local_ranks, find_local_ranks
from mgq.system.mpi_world import RANK_AND_SIZE

SEES_OTHERS = "from mgq.system.local_ranks import find_local_ranks; print(sorted(find_local_ranks()))"
TAKES_CORES = """
import os, threading
from pathlib import Path
import numpy
from threadpoolctl import threadpool_info
from mgq.system.local_ranks import take_idle_cores
stays = threading.Event()
threading.Thread(target=stays.wait, daemon=True).start()
take_idle_cores()
numbers = sorted(int(task.name) for task in Path("/proc/self/task").iterdir())
print([sorted(os.sched_getaffinity(number)) for number in numbers])
print({library["num_threads"] for library in threadpool_info()})
"""
LASTS = "print(flush=True); input()"


@contextmanager
def lasting_rank(environment: dict[str, str], *wrapper: str) -> Iterator[None]:
    """A process in ``environment`` that is there until the end."""
    with subprocess.Popen(
        [*wrapper, sys.executable, "-c", LASTS], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE
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


@pytest.mark.skipif(usable_cores() < 2, reason="one core cannot be shared out")
def test_the_first_of_ranks_that_have_computed_takes_the_cores_of_those_that_only_wait() -> None:
    names, (first, second, *_) = RANK_AND_SIZE[0], sorted(os.sched_getaffinity(0))
    with lasting_rank(as_rank(names, 1), "taskset", "-c", str(second)):
        found = subprocess.run(
            ["taskset", "-c", str(first), sys.executable, "-c", TAKES_CORES],
            env={**as_rank(names, 0), "MPI_LOCALNRANKS": "2", "OPENBLAS_NUM_THREADS": "2"},
            capture_output=True,
            text=True,
            check=True,
        )
    threads, numbers = found.stdout.splitlines()
    assert all(cores == [first, second] for cores in json.loads(threads)) and len(json.loads(threads)) >= 2
    assert numbers == "{2}"


def test_where_no_launcher_is_there_are_no_ranks() -> None:
    assert find_local_ranks() == {} and count_local_ranks({}) == 1


@pytest.mark.parametrize("name", ["MPI_LOCALNRANKS", "OMPI_COMM_WORLD_LOCAL_SIZE"])
def test_a_launcher_tells_how_many_ranks_are_on_a_machine(name: str) -> None:
    assert count_local_ranks({name: "3"}) == 3 and count_local_ranks({name: "?"}) == 1

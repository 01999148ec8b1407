"""What the first of the processes that MPI started shares with those beside it, where it works alone."""

from __future__ import annotations

import contextlib
import os
import select
import time
from collections.abc import Mapping

import psutil  # type: ignore[import-untyped]

from mgq.machine import place_threads, usable_cores, use_threads
from mgq.system.mpi_world import find_world

LOCAL_SIZE = ("MPI_LOCALNRANKS", "OMPI_COMM_WORLD_LOCAL_SIZE")
"""How many ranks are on this machine, as MPICH and its kin, and Open MPI, tell them."""
MEETING_S = 5.0
"""All ranks of a machine are started at once: so long is waited for the last, on a busy machine."""
_TICK_S = 0.02


def count_local_ranks(environment: Mapping[str, str] = os.environ) -> int:
    """How many processes the launcher started on this machine, this one included; 1 where it does not tell."""
    return next((int(environment[name]) for name in LOCAL_SIZE if environment.get(name, "").isdigit()), 1)


def find_local_ranks() -> dict[int, psutil.Process]:
    """The ranks on this machine by number, each its outermost process; those that have not begun yet are left out."""
    with contextlib.suppress(psutil.Error):
        starter = next((process for process in psutil.Process().parents() if rank_of(process) is None), None)
        found: dict[int, psutil.Process] = {}
        for process in starter.children(recursive=True) if starter is not None else ():  # parents before children
            rank = rank_of(process)
            if rank is not None:
                found.setdefault(rank, process)
        return found
    return {}


def rank_of(process: psutil.Process) -> int | None:
    """The number that a launcher gave to ``process``; None where it gave none, or that cannot be seen."""
    try:
        world = find_world(process.environ())
    except (psutil.Error, OSError):
        return None
    return None if world is None else world.rank


def take_local_cores() -> None:
    """Let this process use the cores of all ranks on this machine: a launcher may have bound each to its own.

    To be called before a library counts cores. Threads that run already keep theirs.
    """
    if not hasattr(os, "sched_setaffinity"):
        return
    until = time.monotonic() + MEETING_S
    while len(ranks := find_local_ranks()) < count_local_ranks() and time.monotonic() < until:
        time.sleep(_TICK_S)
    cores = set(os.sched_getaffinity(0))
    for process in ranks.values():
        with contextlib.suppress(OSError):
            cores |= os.sched_getaffinity(process.pid)
    with contextlib.suppress(OSError):
        os.sched_setaffinity(0, cores)


def take_idle_cores() -> None:
    """Let all threads of this process use the cores of the ranks beside it too, and its libraries as many threads.

    To be called once those only wait.
    """
    take_local_cores()
    if hasattr(os, "sched_getaffinity"):
        place_threads(os.sched_getaffinity(0))
    use_threads(usable_cores())


def wait_for_first() -> None:
    """Sleep until the first rank has ended, where that is on this machine.

    MPICH's process beside the ranks (5.0.2) reads without a pause from each that has ended, and so takes a core from
    the rank that works. And the first rank can see which cores this one has.
    """
    first = find_local_ranks().get(0)
    if first is None:
        return
    try:
        watch = os.pidfd_open(first.pid)
    except (OSError, AttributeError):  # another system, or one that forbids it
        with contextlib.suppress(psutil.Error):
            first.wait()
        return
    select.select([watch], [], [])
    os.close(watch)

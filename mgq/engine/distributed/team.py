"""The processes that MPI started, seen from one of them: who they are, and how they talk.

Every wait is a loop that looks whether all are to end, and sleeps once it takes long: MPI's own waits take a whole
core, and never end when another process is gone.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mgq.errors import FailureError, InputError, MgqError, plural, printable
from mgq.machine import PACKAGES, package_version
from mgq.system.mpi_world import MEND, World
from mgq.system.supervision import PATIENCE_S, SILENCE_S, Link

if TYPE_CHECKING:
    from mpi4py.MPI import Comm, Request

THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")
_SPIN_S = 0.002
_LONGEST_SLEEP_S = 0.002


class Team:
    """This process, number ``rank`` of ``size``, on ``hosts[rank]``; ``second`` is for a second row of exchanges."""

    def __init__(self, comm: Comm, link: Link) -> None:
        self.comm = comm
        self.second = comm.Dup()
        self.link = link
        self.rank, self.size = comm.Get_rank(), comm.Get_size()
        self.hosts: tuple[str, ...] = tuple(comm.allgather(socket.gethostname()))
        self.is_on_one_machine = False  # until :func:`pin` has looked
        self.progress: dict[int, list[float]] = {}  # of each rank: steps done, seconds of work for one, in which epoch
        self.waited = 0.0  # seconds spent on nothing but waiting for what others have
        self.noted = (0, 0.0, 0.0)  # steps, seconds and waited when progress was told last
        self.epoch = 0  # how many have ended since the start
        self._verdict: MgqError | None = None
        self._sending = threading.Lock()

    def name_of(self, rank: int) -> str:
        return f"rank {rank} on {self.hosts[rank]}"

    # ---- with the supervisor ----

    def listen(self) -> None:
        """Hear from the supervisor from here on."""
        threading.Thread(target=self._hear, name="supervisor", daemon=True).start()

    def tell(self, **message: Any) -> None:
        with self._sending:
            self.link.send(**message)

    def check(self) -> None:
        """Raise what all are to end by, if they are."""
        if self._verdict is not None:
            raise self._verdict

    def _hear(self) -> None:
        while not self.link.closed:
            for message in self.link.read():
                if "end" in message and self._verdict is None:
                    kind = InputError if message["code"] == InputError.exit_code else FailureError
                    self._verdict = kind(message["end"])
                    self._verdict.is_said = bool(message.get("said"))
                self.progress |= {int(rank): found for rank, found in message.get("ranks", {}).items()}

    # ---- with the others ----

    def wait(self, *requests: Request) -> None:
        """Until all of ``requests`` are done. Raises what all are to end by, and FailureError where MPI gives up."""
        self.wait_until(lambda: all(self.is_done(request) for request in requests))

    def wait_until(self, holds: Callable[[], bool]) -> None:
        """Until ``holds``. Raises what all are to end by, if they are."""
        started = time.monotonic()
        while not holds():
            self.rest(started)

    def wait_for_others(self, holds: Callable[[], bool]) -> None:
        """The same, and count it as time spent on nothing but waiting for others."""
        if holds():
            return
        started = time.monotonic()
        self.wait_until(holds)
        self.waited += time.monotonic() - started

    def rest(self, started: float) -> None:
        """Leave the core to others for a moment, once waiting since ``started`` takes longer than an exchange does.

        An exchange makes progress only while MPI is called: with sleeps from the first moment on one of 64 KiB took
        1 ms instead of 0.02. Raises what all are to end by, if they are.
        """
        self.check()
        waited = time.monotonic() - started
        if waited > _SPIN_S:
            time.sleep(min(waited / 8, _LONGEST_SLEEP_S))

    def make_progress(self) -> None:
        """Let MPI move what is under way: it does so only while it is called."""
        from mpi4py import MPI

        with contextlib.suppress(MPI.Exception):  # whoever waits for it will see
            self.comm.Iprobe()

    def is_done(self, request: Request) -> bool:
        """Whether ``request`` is done; it makes progress meanwhile. Raises as :meth:`wait`."""
        from mpi4py import MPI

        try:
            return bool(request.Test())
        except MPI.Exception as error:
            # As a rule because another rank is gone, which the supervisors tell of.
            until = time.monotonic() + 2 * SILENCE_S + PATIENCE_S / 2
            while time.monotonic() < until:
                self.check()
                time.sleep(0.05)
            raise FailureError(f"{self.name_of(self.rank)}: MPI gave up: {printable(error)}") from None

    def share(self, thing: Any) -> Any:
        """The first rank's ``thing``, on all: it can be pickled."""
        data = pickle.dumps(thing) if self.rank == 0 else b""
        short = np.zeros(_SHORT, np.uint8)  # its length, and what is short itself
        short[:_COUNT] = np.frombuffer(len(data).to_bytes(_COUNT, "little"), np.uint8)
        short[_COUNT : _COUNT + len(data)] = np.frombuffer(data[: _SHORT - _COUNT], np.uint8)
        self.wait(self.comm.Ibcast(short))
        length = int.from_bytes(short[:_COUNT].tobytes(), "little")
        if length <= _SHORT - _COUNT:
            return thing if self.rank == 0 else pickle.loads(short[_COUNT:].tobytes())
        found = bytearray(data) if self.rank == 0 else bytearray(length)
        for start in range(0, len(found), _LONGEST_MESSAGE):
            self.wait(self.comm.Ibcast(memoryview(found)[start : start + _LONGEST_MESSAGE]))
        return thing if self.rank == 0 else pickle.loads(found)

    def gather(self, thing: Any) -> list[Any]:
        """Every rank's ``thing``, by rank, on all: they can be pickled."""
        data = pickle.dumps(thing)
        lengths = np.empty(self.size, np.int64)
        self.wait(self.comm.Iallgather(np.array([len(data)], np.int64), lengths))
        starts = np.concatenate([[0], np.cumsum(lengths)])
        found = bytearray(int(starts[-1]))
        self.wait(self.comm.Iallgatherv(data, [found, lengths.tolist(), starts[:-1].tolist(), _byte()]))
        return [pickle.loads(memoryview(found)[a:b]) for a, b in pairwise(starts)]


_SHORT, _COUNT = 256, 8
_LONGEST_MESSAGE = 1 << 26  # MPI counts in 32 bits


def _byte() -> Any:
    from mpi4py import MPI

    return MPI.BYTE


_team: Team | None = None


def current_team() -> Team | None:
    """The processes that this one was started with; None where it works alone."""
    return _team


def join_team(world: World, link: Link, words: Sequence[str]) -> Team:
    """Meet the others, give this process its share of the cores, and see that all were asked for the same.

    To be called before MegEngine is imported. Raises InputError where another MPI than the launcher's is at work, or
    a rank has other versions or options.
    """
    global _team
    import mpi4py

    mpi4py.rc.thread_level = "serialized"
    mpi4py.rc.finalize = False  # done by :func:`leave_team`: after a failure it would wait for ever
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    if comm.Get_size() != world.size:
        raise InputError(
            f"the launcher started {plural(world.size, 'process')} and mpi4py sees {comm.Get_size()}: it "
            f"belongs to another MPI, take that one's mpirun, or {MEND}"
        )
    team = Team(comm, link)
    unname_memory()
    hub = next((m["hub"] for m in link.read() if "hub" in m), None) if team.rank == 0 else None
    hub = comm.bcast(hub)
    team.tell(hosts=team.hosts, **({} if team.rank == 0 else {"join": hub}))
    team.is_on_one_machine = pin(comm) == team.size
    team.listen()
    refuse_differences(team, words)
    _team = team
    return team


def leave_team() -> None:
    """End MPI, once all are done: the first process lets all others know that there is no more work."""
    global _team
    if _team is not None:
        from mpi4py import MPI

        if _team.rank == 0:
            _team.share(None)
        _team = None
        MPI.Finalize()


@dataclass(frozen=True)
class Part:
    """Work for another process, which stays pickled until that is prepared for what is loaded with it."""

    prepare: Callable[[], None]
    work: bytes

    def __call__(self, team: Team) -> None:
        self.prepare()
        pickle.loads(self.work)(team)


def send_work(team: Team, work: Callable[[Team], None], prepare: Callable[[], None]) -> None:
    """Have all processes but the first, which calls this, do ``work``, once each is prepared."""
    team.share(Part(prepare, pickle.dumps(work)))


def serve(team: Team) -> None:
    """Do all the work that the first process sends, until it sends none any more.

    Raises what goes wrong; but being stopped, which all are together, ends one work alone.
    """
    while (part := team.share(None)) is not None:
        try:
            part(team)
        except MgqError as error:
            if error.exit_code in (InputError.exit_code, FailureError.exit_code):
                raise


def unname_memory() -> None:
    """Take the names off the memory that MPICH shares among the ranks of this machine, which all of them have by now.

    MPICH does so at its end, so that each run that is killed would leave 2 MB behind.
    """
    with contextlib.suppress(OSError):
        mapped = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace")
        for name in {line.rpartition(" ")[2] for line in mapped.splitlines() if f" {_MPICH_MEMORY}" in line}:
            Path(name).unlink(missing_ok=True)


_MPICH_MEMORY = "/dev/shm/mpich_shm_"


def pin(comm: Comm) -> int:
    """Keep to an equal share of this machine's cores, with as many threads: more would only hinder each other.

    A share that the launcher has given stays. Returns how many ranks are on this machine.
    """
    from mpi4py import MPI

    here = comm.Split_type(MPI.COMM_TYPE_SHARED)
    rank, size = here.Get_rank(), here.Get_size()
    cores = here.allgather(sorted(os.sched_getaffinity(0)))
    here.Free()
    own = cores[rank]
    if all(other == own for other in cores):
        number = max(1, len(own) // size)
        first = rank * number % len(own)
        own = own[first : first + number]
        with contextlib.suppress(OSError):
            os.sched_setaffinity(0, own)
    for name in THREAD_VARIABLES:
        os.environ[name] = str(len(own))
    return int(size)


def refuse_differences(team: Team, words: Sequence[str]) -> None:
    """Raises InputError, which names the rank, where another than the first was given other options or versions."""
    versions = {name: package_version(package) for name, package in {**PACKAGES, "mpi4py": "mpi4py"}.items()}
    first, *others = team.gather((versions, list(words)))
    for rank, (has, given) in enumerate(others, 1):
        for name, version in first[0].items():
            if has[name] != version:
                raise InputError(
                    f"{team.name_of(rank)} has {name} {has[name]}, rank 0 {version}: install the same on all machines"
                )
        if given != first[1]:
            raise InputError(
                f"{team.name_of(rank)} was given `{' '.join(given)}`, rank 0 `{' '.join(first[1])}`: give all the same"
            )

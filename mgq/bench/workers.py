"""Workers of a benchmark: a backend with a network, in this process or in one of its own."""

from __future__ import annotations

import contextlib
import gc
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from mgq.errors import FailureError, plural
from mgq.machine import mute_stderr
from mgq.runtime.protocol import Runtime
from mgq.system.processes import AnsweringProcess, Channel
from mgq.zoo.own_networks import has_own_networks

Batch = npt.NDArray[np.uint8]
Logits = npt.NDArray[np.float32]
Clock = Callable[[], int]

LOAD_PATIENCE_S = 180.0
"""How long an engine may take to load a network: traced and eager ones build it first."""
TURN_PATIENCE_S = 120.0
STATUS = Path("/proc/self/status")


class Worker(Protocol):
    """What takes turns in a benchmark. Every method may raise an MgqError, whose line says what went wrong."""

    name: str
    version: str
    threads: int
    macs: int | None

    def wait_until_ready(self) -> None:
        """To be called before all other methods; before it, name and version may be unknown."""

    def logits(self) -> Logits:
        """float32 (N, classes) for the images of the benchmark."""

    def turn(self, repeats: int) -> tuple[int, ...]:
        """The times of ``repeats`` single runs in nanoseconds, after one that is not counted."""

    def peak_memory(self) -> int | None:
        """The most bytes of memory that its process has held; None where it has none of its own."""

    def close(self) -> None: ...


class InProcessWorker:
    """A runtime in this process. ``macs`` is what a run of it multiplies and adds, where it tells."""

    def __init__(self, runtime: Runtime, batch: Batch, clock: Clock = time.perf_counter_ns) -> None:
        self.runtime, self.batch, self.clock = runtime, batch, clock
        self.name, self.version, self.threads = runtime.name, runtime.version, runtime.threads
        self.macs: int | None = getattr(runtime, "macs", None)

    def wait_until_ready(self) -> None:
        pass

    def logits(self) -> Logits:
        logits = self.runtime.run(self.batch)
        if logits.ndim != 2 or logits.shape[0] != self.batch.shape[0] or logits.shape[1] == 0:
            raise FailureError(
                f"{self.name} gave no logits but an array of shape {logits.shape} for "
                f"{plural(len(self.batch), 'picture')}"
            )
        return logits.copy()

    def turn(self, repeats: int) -> tuple[int, ...]:
        # The first run brings back into the caches what the others' turns drove out.
        with without_garbage_collection():
            return time_runs(self.runtime, self.batch, repeats, self.clock)

    def peak_memory(self) -> int | None:
        return None

    def close(self) -> None:
        pass


def time_runs(runtime: Runtime, batch: Batch, repeats: int, clock: Clock) -> tuple[int, ...]:
    """The times of ``repeats`` runs in nanoseconds, after one that is not counted."""
    runtime.run(batch)
    times = []
    for _ in range(repeats):
        start = clock()
        runtime.run(batch)
        times.append(clock() - start)
    return tuple(times)


class SideBySide(InProcessWorker):
    """As many copies of a runtime of one thread as there are threads, all at work at the same time."""

    def __init__(self, copies: Sequence[Runtime], batch: Batch, clock: Clock = time.perf_counter_ns) -> None:
        super().__init__(copies[0], batch, clock)
        self.copies = copies
        self.threads = len(copies)
        self.pool = ThreadPoolExecutor(self.threads)

    def turn(self, repeats: int) -> tuple[int, ...]:
        with without_garbage_collection():
            turns = self.pool.map(lambda one: time_runs(one, self.batch, repeats, self.clock), self.copies)
            return tuple(time for turn in turns for time in turn)

    def close(self) -> None:
        self.pool.shutdown(wait=False)


@contextlib.contextmanager
def without_garbage_collection() -> Iterator[None]:
    """Turns off garbage collection inside: it would be counted in the time of the worker that happens to run."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


# ---- in a process of its own ----


@dataclass(frozen=True)
class WorkerConfig:
    """How a worker's process is set up: ``load``, which is pickled, makes the runtime there.

    ``copies`` run side by side, each on ``threads`` threads; ``cores`` are all that the process may run on. ``imports``
    are modules to be loaded before that, on any core.
    """

    load: Callable[[int], Runtime]
    threads: int
    copies: int
    cores: tuple[int, ...]
    imports: tuple[str, ...] = ()


@dataclass(frozen=True)
class WorkerReady:
    """What a worker in a process of its own reports when it is ready."""

    name: str
    version: str
    threads: int
    macs: int | None


@dataclass(frozen=True)
class WorkerMain:
    """The main loop of a worker's process: load, report :class:`WorkerReady`, and answer until the pipe is closed."""

    seat: WorkerConfig
    batch: Batch

    def __call__(self, channel: Channel) -> None:
        with mute_stderr():  # What libraries say is no news; their threads may say it late, on a busy machine.
            self.work(channel)

    def work(self, channel: Channel) -> None:
        seat = self.seat
        for name in seat.imports:
            import_module(name)
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, seat.cores)
        runtimes = [seat.load(seat.threads) for _ in range(seat.copies)]
        worker = SideBySide(runtimes, self.batch) if seat.copies > 1 else InProcessWorker(runtimes[0], self.batch)
        channel.send(WorkerReady(worker.name, worker.version, worker.threads, worker.macs))
        for question, *arguments in channel.questions():
            channel.send(ANSWERS[question](worker, *arguments))


ANSWERS: dict[str, Callable[..., Any]] = {
    "logits": lambda worker: worker.logits(),
    "turn": lambda worker, repeats: worker.turn(repeats),
    "memory": lambda worker: most_memory(),
}


def most_memory() -> int | None:
    """The most bytes of memory that this process has held; None where the system does not tell.

    ``getrusage`` would count those of the process that started this one.
    """
    try:
        lines = STATUS.read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), None)


class SubprocessWorker:
    """A worker in a process of its own, which begins to load at once and is paused between its turns."""

    def __init__(self, what: str, seat: WorkerConfig, batch: Batch) -> None:
        self.process = AnsweringProcess(WorkerMain(seat, batch), what, seat.threads, with_main=has_own_networks())
        self.name, self.version = what, ""
        self.threads = seat.threads * seat.copies
        self.macs: int | None = None

    def wait_until_ready(self) -> None:
        """Raises an MgqError where the engine is missing, or cannot run the network."""
        greeting: WorkerReady = self.process.answer(LOAD_PATIENCE_S)
        self.name, self.version = greeting.name, greeting.version
        self.threads, self.macs = greeting.threads, greeting.macs

    def ask(self, *question: Any) -> Any:
        return self.process.ask(question, TURN_PATIENCE_S)

    def logits(self) -> Logits:
        logits: Logits = self.ask("logits")
        return logits

    def turn(self, repeats: int) -> tuple[int, ...]:
        times: tuple[int, ...] = self.ask("turn", repeats)
        return times

    def peak_memory(self) -> int | None:
        memory: int | None = self.ask("memory")
        return memory

    def close(self) -> None:
        self.process.close()

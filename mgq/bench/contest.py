"""Who takes part in a benchmark, whether they all do the same work, and their times, taken in turns."""

from __future__ import annotations

import contextlib
import gc
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from mgq.bench.settings import Precision
from mgq.errors import FailureError, MgqError
from mgq.events import OnProgress, Progress, silent
from mgq.runtime.base import Runtime

Batch = npt.NDArray[np.uint8]
Logits = npt.NDArray[np.float32]
Clock = Callable[[], int]

TURN_NS = 250_000_000
"""About how long a contestant's turn in a round lasts, in nanoseconds."""
MOST_RUNS = 50
"""The most single runs of a turn, so that fast networks do not fill the memory and the report."""
WARM_UP_RUNS = 5
ALIKE = 0.95
"""Cosine of logits that differ by rounding alone; those of another network, or another picture, are below."""


class Loaded(NamedTuple):
    """An engine with a network in it: where the weights come from, and the bytes of the file that it read."""

    runtime: Runtime
    weights: str
    file_bytes: int | None = None


@dataclass(frozen=True)
class Contestant:
    """One row of the table: a network in one precision in one engine.

    ``load`` gives it ready to run. It raises an MgqError, whose line says why and how to mend it, where the
    engine is not there or cannot run the network. ``rounds_otherwise``: its int8 is not MegEngine's to the bit.
    """

    network: str
    precision: Precision
    engine: str
    load: Callable[[], Loaded]
    rounds_otherwise: bool = False


@dataclass(frozen=True)
class Agreement:
    """How one engine's answers compare with the ``reference`` engine's, same network, precision and pictures.

    ``same`` of the ``pictures`` have the same most probable class. ``largest_difference`` is that of any two
    logits; it is not finite where an engine gave something else than finite numbers. ``likeness`` is the cosine of the
    angle between all logits of both. Where ``rounds_otherwise``, int8 in another library, that decides: networks with
    random weights amplify single steps until the answer flips.
    """

    reference: str
    pictures: int
    same: int
    largest_difference: float
    likeness: float = field(default=1.0, compare=False)
    rounds_otherwise: bool = False

    @property
    def holds(self) -> bool:
        return self.same == self.pictures or (self.rounds_otherwise and self.likeness >= ALIKE)


@dataclass
class Entry:
    """A contestant and what became of it: ``problem`` says why it has no times, ``rounds`` holds them."""

    contestant: Contestant
    loaded: Loaded | None = None
    problem: str | None = None
    agreement: Agreement | None = None
    rounds: tuple[tuple[int, ...], ...] = ()

    @property
    def runtime(self) -> Runtime:
        assert self.loaded is not None
        return self.loaded.runtime


def contest(
    contestants: Sequence[Contestant],
    batch: Batch,
    rounds: int,
    seed: int = 0,
    clock: Clock = time.perf_counter_ns,
    on_progress: OnProgress = silent,
) -> list[Entry]:
    """Load all ``contestants``, compare their answers, time them in turns, and compare once more.

    ``batch`` is uint8 (N, 3, H, W), BGR. An entry that cannot be loaded, or gives no logits for the batch,
    has a ``problem`` and no times. The answers are compared again at the end, when every engine has run among
    the others; the worse of both comparisons counts.
    """
    entries = loaded_entries(contestants, on_progress)
    references: dict[tuple[str, Precision], tuple[str, Logits]] = {}
    for entry in ready(entries):
        compare(entry, batch, references)
    timed = ready(entries)
    for entry, times in zip(
        timed,
        interleaved_times([entry.runtime for entry in timed], batch, rounds, seed, clock, on_progress),
        strict=True,
    ):
        entry.rounds = times
        compare(entry, batch, references)
    return entries


def ready(entries: Sequence[Entry]) -> list[Entry]:
    return [entry for entry in entries if entry.problem is None]


def loaded_entries(contestants: Sequence[Contestant], on_progress: OnProgress) -> list[Entry]:
    """Every contestant, loaded or with the reason why not."""
    entries: list[Entry] = []
    for contestant in contestants:
        on_progress(Progress("prepare", len(entries), len(contestants), "engines"))
        try:
            entries.append(Entry(contestant, contestant.load()))
        except MgqError as error:
            entries.append(Entry(contestant, problem=str(error)))
    on_progress(Progress("prepare", len(entries), len(contestants), "engines"))
    return entries


# ---- the same work ----


def compare(entry: Entry, batch: Batch, references: dict[tuple[str, Precision], tuple[str, Logits]]) -> None:
    """Note how the answers of ``entry`` compare with the first engine's that ran its network and precision.

    The first one's own are noted in ``references``. Sets ``problem`` where there are no logits to compare.
    """
    contestant = entry.contestant
    try:
        logits = checked_logits(entry.runtime, batch)
    except MgqError as error:
        entry.problem, entry.rounds = str(error), ()
        return
    of = (contestant.network, contestant.precision)
    reference, expected = references.setdefault(of, (contestant.engine, logits.copy()))
    if logits.shape != expected.shape:
        wrong = f"{logits.shape[1]} logits a picture where {reference} gives {expected.shape[1]}"
        entry.problem, entry.rounds = f"{contestant.engine} gave {wrong}", ()
        return
    found = agreement_of(logits, expected, reference, contestant.rounds_otherwise)
    entry.agreement = worse(entry.agreement, found)


def checked_logits(runtime: Runtime, batch: Batch) -> Logits:
    """What ``runtime`` gives for ``batch``. Raises FailureError where it is no row of logits a picture."""
    logits = runtime.run(batch)
    if logits.ndim != 2 or logits.shape[0] != batch.shape[0] or logits.shape[1] == 0:
        raise FailureError(
            f"{runtime.name} gave no logits but an array of shape {logits.shape} for {len(batch)} pictures"
        )
    return logits


def agreement_of(logits: Logits, expected: Logits, reference: str, rounds_otherwise: bool = False) -> Agreement:
    """Compare two (N, classes) arrays of logits. A picture with a NaN or an infinity has no answer."""
    sound = np.isfinite(logits).all(axis=1) & np.isfinite(expected).all(axis=1)
    same = sound & (logits.argmax(axis=1) == expected.argmax(axis=1))
    difference = float(np.abs(logits - expected).max()) if sound.all() else float("nan")
    return Agreement(reference, len(logits), int(same.sum()), difference, cosine(logits, expected), rounds_otherwise)


def cosine(one: Logits, other: Logits) -> float:
    norms = float(np.linalg.norm(one)) * float(np.linalg.norm(other))
    return float(np.vdot(one, other)) / norms if norms > 0 else 0.0


def worse(one: Agreement | None, other: Agreement) -> Agreement:
    """The comparison with fewer same answers, then with the larger difference."""
    if one is None or one.same > other.same:
        return other
    return one if one.same < other.same or one.largest_difference >= other.largest_difference else other


# ---- the times ----


def interleaved_times(
    runtimes: Sequence[Runtime],
    batch: Batch,
    rounds: int,
    seed: int = 0,
    clock: Clock = time.perf_counter_ns,
    on_progress: OnProgress = silent,
) -> list[tuple[tuple[int, ...], ...]]:
    """The times of single runs in nanoseconds, one tuple a round, for each of ``runtimes``.

    In every round each runtime has one turn, in an order that is shuffled anew, so that a machine that slows
    down or speeds up does it to all alike. A warm-up, which is not counted, tells how many single runs fill a
    turn of ``TURN_NS``; the number stays the same in all rounds.
    """
    order = random.Random(seed)
    repeats = [0] * len(runtimes)
    for index in shuffled(len(runtimes), order):
        fastest = min(turn(runtimes[index], batch, WARM_UP_RUNS, clock))
        repeats[index] = min(max(TURN_NS // max(fastest, 1), 1), MOST_RUNS)
    times: list[list[tuple[int, ...]]] = [[] for _ in runtimes]
    total = rounds * len(runtimes)
    for number in range(rounds):
        for place, index in enumerate(shuffled(len(runtimes), order)):
            on_progress(Progress("measure", number * len(runtimes) + place, total, "turns"))
            times[index].append(turn(runtimes[index], batch, repeats[index], clock))
    on_progress(Progress("measure", total, total, "turns"))
    return [tuple(turns) for turns in times]


def shuffled(number: int, order: random.Random) -> list[int]:
    return order.sample(range(number), number)


def turn(runtime: Runtime, batch: Batch, repeats: int, clock: Clock) -> tuple[int, ...]:
    """The times of ``repeats`` single runs, after one that is not counted.

    That one brings back into the caches what the others' turns drove out: a network in use is not called once
    among five others.
    """
    with garbage_kept():
        runtime.run(batch)
        times = []
        for _ in range(repeats):
            start = clock()
            runtime.run(batch)
            times.append(clock() - start)
    return tuple(times)


@contextlib.contextmanager
def garbage_kept() -> Iterator[None]:
    """No garbage collection inside, which would fall into the time of whoever happens to run."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()

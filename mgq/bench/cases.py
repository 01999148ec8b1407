"""Runs the cases of a benchmark in turns, and checks that all of them compute the same."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from mgq.bench.interleaving import take_turns
from mgq.bench.settings import Precision, pluralize
from mgq.bench.workers import Logits, Worker
from mgq.errors import MgqError
from mgq.events import OnProgress, Progress, log_progress
from mgq.machine import usable_cores

TURN_NS = 125_000_000
"""About how long the turn of a case in a round lasts, in nanoseconds."""
MOST_RUNS = 50
"""The most single runs of a turn, so that fast networks do not fill the memory and the report."""
WARM_UP_RUNS = 3
ALIKE = 0.95
"""Cosine of logits that differ by rounding alone; those of another network, or another picture, are below."""


class LoadedWorker(NamedTuple):
    """A worker with a network: where the weights come from, and the bytes of the file that its engine reads."""

    worker: Worker
    weights: str
    file_bytes: int | None = None


@dataclass(frozen=True)
class BenchmarkCase:
    """One row of the table: a network in one precision in one engine on so many threads.

    ``load`` starts a worker, which may not be ready yet. It raises an MgqError, whose line says why and how to
    mend it, where the engine is not there or cannot run the network. Those with the same ``answers`` have to give the
    same; None: it is compared with nobody. ``rounds_otherwise``: its int8 is not MegEngine's to the bit. ``target`` is
    what an int8 network was quantized for, ``file`` the name of a file that is not mgq's. ``macs``: what one picture
    takes to multiply and add, where known. ``shares_network``: other files are of the same network, and float among
    them is what int8 is measured by. ``is_peak``: no network at all, but the processor's ceiling.
    """

    network: str
    precision: Precision
    engine: str
    load: Callable[[], LoadedWorker]
    rounds_otherwise: bool = False
    threads: int = 1
    answers: str | None = ""
    target: str = ""
    file: str = ""
    macs: int | None = None
    shares_network: bool = False
    is_peak: bool = False


@dataclass(frozen=True)
class Agreement:
    """How one engine's answers compare with the ``reference`` engine's, same network, precision and pictures.

    ``same`` of the ``images`` have the same most probable class. ``largest_difference`` is that of any two
    logits; it is not finite where an engine gave something else than finite numbers. ``likeness`` is the cosine of the
    angle between all logits of both. Where ``rounds_otherwise``, int8 in another library, that decides: networks with
    random weights amplify single steps until the answer flips.
    """

    reference: str
    images: int
    same: int
    largest_difference: float
    likeness: float = field(default=1.0, compare=False)
    rounds_otherwise: bool = False

    def to_json(self) -> dict[str, Any]:
        """Its fields by the names that reports have had from the beginning."""
        return {"pictures" if name == "images" else name: value for name, value in asdict(self).items()}

    @property
    def holds(self) -> bool:
        return self.same == self.images or (self.rounds_otherwise and self.likeness >= ALIKE)


@dataclass
class CaseResult:
    """A case and its result: ``problem`` says why it has no times, ``rounds`` holds them.

    ``peak_memory`` is in bytes, of the process that ran it.
    """

    case: BenchmarkCase
    loaded: LoadedWorker | None = None
    problem: str | None = None
    agreement: Agreement | None = None
    rounds: tuple[tuple[int, ...], ...] = ()
    peak_memory: int | None = None

    @property
    def worker(self) -> Worker:
        assert self.loaded is not None
        return self.loaded.worker

    def fail(self, error: MgqError) -> None:
        self.problem, self.rounds = str(error), ()


References = dict[str, tuple[str, Logits]]
"""What has to answer alike -> whose answers count, and these."""


def run_cases(
    cases: Sequence[BenchmarkCase],
    rounds: int,
    seed: int = 0,
    on_progress: OnProgress = log_progress,
    references: Mapping[str, tuple[str, Logits]] | None = None,
) -> list[CaseResult]:
    """Load all ``cases``, compare their answers, time them in turns, and compare once more.

    An entry that cannot be loaded, gives no logits, or fails on the way has a ``problem`` and no times. Where
    ``references`` have no logits for an entry's answers, those of the first one count. The answers are compared again
    at the end, when every engine has run among the others; the worse of both comparisons counts.
    """
    known: References = dict(references or {})
    entries = [CaseResult(case) for case in cases]
    try:
        load(entries, on_progress)
        for entry in select_ready(entries):
            compare(entry, known)
        measure(entries, rounds, seed, on_progress)
        for entry in select_ready(entries):
            compare(entry, known)
        for entry in select_ready(entries):
            note_memory(entry)
    finally:
        for entry in entries:
            if entry.loaded is not None:
                entry.worker.close()
    return entries


def note_memory(entry: CaseResult) -> None:
    try:
        entry.peak_memory = entry.worker.peak_memory()
    except MgqError as error:
        entry.fail(error)


def select_ready(entries: Sequence[CaseResult]) -> list[CaseResult]:
    return [entry for entry in entries if entry.problem is None]


def load(entries: Sequence[CaseResult], on_progress: OnProgress) -> None:
    """Load every entry, or note why not. As many get ready at the same time as there are cores."""
    at_once = usable_cores()
    on_progress(Progress("prepare", 0, len(entries), "engines"))
    for number in range(len(entries) + at_once - 1):
        if number < len(entries):
            start_case(entries[number])
        oldest = number - at_once + 1
        if oldest >= 0:
            await_worker(entries[oldest])
            on_progress(Progress("prepare", oldest + 1, len(entries), "engines"))


def start_case(entry: CaseResult) -> None:
    try:
        entry.loaded = entry.case.load()
    except MgqError as error:
        entry.fail(error)


def await_worker(entry: CaseResult) -> None:
    """Wait until the worker of ``entry`` is ready; it must have the threads that were asked for."""
    if entry.problem is not None:
        return
    worker, wanted = entry.worker, entry.case.threads
    try:
        worker.wait_until_ready()
    except MgqError as error:
        entry.fail(error)
        return
    if worker.threads != wanted:
        takes = pluralize(worker.threads, "thread")
        entry.problem = f"{worker.name} runs on {takes} where {wanted} were asked for"


# ---- the same work ----


def compare(entry: CaseResult, references: References) -> None:
    """Note how the answers of ``entry`` compare with the reference's; its own are noted where there is none.

    Sets ``problem`` where there are no logits to compare.
    """
    case = entry.case
    try:
        logits = entry.worker.logits()
    except MgqError as error:
        entry.fail(error)
        return
    if case.answers is None:
        return
    of = case.answers or f"{case.network} {case.precision.value}"
    reference, expected = references.setdefault(of, (case.engine, logits))
    if logits.shape != expected.shape:
        wrong = f"{logits.shape[1]} logits a picture where {reference} gives {expected.shape[1]}"
        entry.problem, entry.rounds = f"{case.engine} gave {wrong}", ()
        return
    found = measure_agreement(logits, expected, reference, case.rounds_otherwise)
    entry.agreement = choose_worse(entry.agreement, found)


def measure_agreement(logits: Logits, expected: Logits, reference: str, rounds_otherwise: bool = False) -> Agreement:
    """Compare two (N, classes) arrays of logits. A picture with a NaN or an infinity has no answer."""
    sound = np.isfinite(logits).all(axis=1) & np.isfinite(expected).all(axis=1)
    same = sound & (logits.argmax(axis=1) == expected.argmax(axis=1))
    difference = float(np.abs(logits - expected).max()) if sound.all() else float("nan")
    return Agreement(reference, len(logits), int(same.sum()), difference, cosine(logits, expected), rounds_otherwise)


def cosine(one: Logits, other: Logits) -> float:
    norms = float(np.linalg.norm(one)) * float(np.linalg.norm(other))
    return float(np.vdot(one, other)) / norms if norms > 0 else 0.0


def choose_worse(one: Agreement | None, other: Agreement) -> Agreement:
    """The comparison with fewer same answers, then with the larger difference."""
    if one is None or one.same > other.same:
        return other
    return one if one.same < other.same or one.largest_difference >= other.largest_difference else other


# ---- the times ----


def measure(entries: Sequence[CaseResult], rounds: int, seed: int, on_progress: OnProgress) -> None:
    """Note the times of single runs in nanoseconds, one tuple a round, in each entry that is ready; see
    :func:`mgq.bench.interleaving.take_turns`. One that fails on the way drops out."""

    def report(done: int, total: int) -> None:
        on_progress(Progress("measure", done, total, "turns"))

    timed = select_ready(entries)
    turns = [partial(turn, entry) for entry in timed]
    for entry, times in zip(
        timed, take_turns(turns, rounds, seed, report, TURN_NS, WARM_UP_RUNS, MOST_RUNS), strict=True
    ):
        if entry.problem is None:
            entry.rounds = tuple(map(tuple, times))


def turn(entry: CaseResult, repeats: int) -> tuple[int, ...]:
    """The times of one turn; none of an entry that has a problem, or gets one."""
    if entry.problem is not None:
        return ()
    try:
        return entry.worker.turn(repeats)
    except MgqError as error:
        entry.fail(error)
        return ()

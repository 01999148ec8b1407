"""Measures training steps in turns: with MegEngine's own kernels, with the fast ones and in PyTorch."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import megengine as mge
import megengine.module as M
import numpy as np
from megengine import Tensor
from megengine.autodiff import GradManager
from megengine.optimizer import SGD

from mgq.bench.interleaving import take_turns
from mgq.bench.settings import EXAMPLE_NETWORKS, parse_threads, pluralize
from mgq.bench.statistics import Rounds, Speed, Speedup, measure_speed, measure_speedup
from mgq.bench.tables import format_three_digits, markdown_list, markdown_table
from mgq.bench.torch_peer import TorchProcess, torch_python
from mgq.bench.workers import Clock, without_garbage_collection
from mgq.cpu_kernels import fast_gradients
from mgq.engine.classifier.open import versions
from mgq.engine.training.losses import cross_entropy
from mgq.errors import InputError, MgqError
from mgq.events import OnProgress, Progress, log_progress
from mgq.machine import place_threads
from mgq.ptq.range_measurement import as_input
from mgq.quantization.modes import Mode
from mgq.quantization.qat import Phase, prepare_qat, set_phase
from mgq.system.environment import Machine, this_machine
from mgq.system.megengine_start import prepare_process
from mgq.system.processes import AnsweringProcess, Channel
from mgq.weights.checkpoint import check_size
from mgq.zoo.own_networks import has_own_networks
from mgq.zoo.registry import create_model, spec_of

FORMAT = "mgq bench --train 1"
STOCK, FAST, TORCH = "MegEngine", "mgq", "PyTorch"
MODES = (Mode.NORMAL, Mode.QAT)
CLASSES = 10
TURN_NS = 1_500_000_000
"""About how long a turn lasts, in nanoseconds; one step, where that is longer."""
MOST_STEPS = 20
WARM_UP_STEPS = 2
START_PATIENCE_S, TURN_PATIENCE_S = 180.0, 1800.0
"""How long a network may take to be built, and a turn: MegEngine's own kernels take seconds for a step."""
COLUMNS = ("mode", "kernels", "pictures/s", "IQR", "cores", "/MegEngine", "/PyTorch", "qat/float")
LEGEND = (
    "A step: forward, label-smoothed cross entropy, backward, SGD with momentum, on drawn noise in memory, with random "
    "weights. pictures/s: median over rounds, and the interquartile range (IQR) of the rounds. cores: processor time "
    "over wall time. /MegEngine, /PyTorch (channels last; QAT by FX), qat/float: median over rounds of the ratio of "
    "speeds within a round."
)


@dataclass(frozen=True)
class TrainingSettings:
    """Which networks, and how: ``batch`` pictures of ``image_size`` pixels a side, ``rounds`` of turns.

    On ``threads`` cores. ``stock``: MegEngine's own kernels take part; ``torch``, a Python with PyTorch: that does.
    """

    networks: tuple[str, ...] = EXAMPLE_NETWORKS
    rounds: int = 3
    batch: int = 32
    image_size: int = 64
    seed: int = 0
    threads: int = 1
    stock: bool = True
    torch: str | None = None


@dataclass(frozen=True)
class TrainingRow:
    """One network in one mode by one set of kernels.

    ``speedup`` is over MegEngine's own kernels and ``of_torch`` over PyTorch, on the rows of the fast ones;
    ``of_float`` over the float network by the same kernels, on rows of mode ``qat``. ``cores``: processor time over
    wall time. ``rounds_ns`` are the single steps in nanoseconds, by round.
    """

    network: str
    mode: str
    kernels: str
    speed: Speed
    speedup: Speedup | None
    of_torch: Speedup | None
    of_float: Speedup | None
    cores: float
    rounds_ns: Rounds


@dataclass(frozen=True)
class TrainingReport:
    """The whole benchmark: conditions and rows."""

    settings: TrainingSettings
    machine: Machine
    versions: Mapping[str, str]
    rows: tuple[TrainingRow, ...]
    problems: tuple[str, ...] = ()

    def rows_of(self, network: str) -> tuple[TrainingRow, ...]:
        return tuple(row for row in self.rows if row.network == network)

    def conditions(self) -> list[tuple[str, str]]:
        """What the numbers depend on, as (name, value) lines for people."""
        machine, settings = self.machine, self.settings
        size = settings.image_size
        return [
            ("CPU", f"{machine.cpu}; every row on the same {pluralize(settings.threads, 'core')}"),
            ("versions", ", ".join(f"{name} {version}" for name, version in self.versions.items())),
            ("step", f"batch {settings.batch} of {size}x{size} pixels, {pluralize(settings.rounds, 'round')} of turns"),
            ("load at start", ", ".join(f"{load:.2f}" for load in machine.load)),
        ]

    def remarks(self) -> list[str]:
        problems = list(self.problems)
        if not self.machine.busy:
            return problems
        return [
            *problems,
            "the machine was busy at the start: compare rows of this run with each other, not with other runs",
        ]

    def to_json(self) -> str:
        """Everything, with every sample."""
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=1) + "\n"


def make_training_settings(
    networks: Sequence[str],
    rounds: int | None,
    batch: int | None,
    image_size: int | None,
    threads: Sequence[str] = (),
    stock: bool = True,
    against: Sequence[Path] = (),
    python: Path | None = None,
) -> TrainingSettings:
    """Checked settings; None means the default. ``against`` names PyTorch, if anything; ``python`` may have it.

    Raises InputError for what cannot be.
    """
    default = TrainingSettings()
    names = tuple(dict.fromkeys(spec_of(name).name for name in networks)) or default.networks
    given = {"rounds": rounds, "batch": batch, "image_size": image_size}
    numbers: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    settings = replace(default, networks=names, **numbers)
    if min(settings.rounds, settings.batch) < 1:
        raise InputError("--rounds and --batch count from 1: give at least 1")
    check_size(settings.image_size)
    on = parse_threads(threads or ["1"])
    if len(on) > 1:
        raise InputError("--train measures on one number of threads: give --threads once")
    if any(str(peer) != "torch" for peer in against):
        raise InputError("--train compares with PyTorch alone: --against torch")
    torch = torch_python(python) if against or python is not None else None
    return replace(settings, threads=on[0], stock=stock, torch=torch)


class TrainingCase(Protocol):
    """One network in one mode, trained by one set of kernels: what takes turns."""

    arch: str
    mode: Mode
    kernels: str

    def steps(self, number: int, clock: Clock) -> tuple[tuple[int, ...], int]:
        """Run ``number`` steps: the time of each, and the processor time of all, in nanoseconds."""

    def close(self) -> None: ...


class Stepper:
    """One network that is trained step by step on the same pictures, by one set of kernels."""

    def __init__(self, arch: str, mode: Mode, kernels: str, settings: TrainingSettings) -> None:
        self.arch, self.mode, self.kernels = arch, mode, kernels
        rng = np.random.default_rng(settings.seed)
        size = settings.image_size
        self.pixels = rng.integers(0, 256, (settings.batch, 3, size, size), dtype=np.uint8)
        self.labels = rng.integers(0, CLASSES, settings.batch).astype(np.int32)
        network = create_model(arch, CLASSES)
        if mode is Mode.QAT:
            settle_statistics(network, self.images())
            network = prepare_qat(network, in_place=True)
            set_phase(network, Phase.OBSERVE)
            network(self.images())
            set_phase(network, Phase.QUANTIZE)
        else:
            network.train()
        self.network = network
        self.manager = GradManager().attach(network.parameters())
        self.optimizer = SGD(network.parameters(), lr=1e-4, momentum=0.9, weight_decay=1e-4)

    def images(self) -> Tensor:
        return Tensor(as_input(self.pixels))

    def by_kernels(self) -> contextlib.AbstractContextManager[None]:
        """Within it steps run by the kernels of this stepper."""
        return fast_gradients() if self.kernels == FAST else contextlib.nullcontext()

    def step(self) -> float:
        """The loss of one training step, which is over when it returns."""
        with self.manager:
            loss = cross_entropy(self.network(self.images()), Tensor(self.labels), 0.1)
            self.manager.backward(loss)
        self.optimizer.step().clear_grad()
        mge._full_sync()
        return float(loss.numpy().item())

    def steps(self, number: int, clock: Clock) -> tuple[tuple[int, ...], int]:
        times, processor = [], time.process_time_ns()
        with self.by_kernels(), without_garbage_collection():
            for _ in range(number):
                start = clock()
                self.step()
                times.append(clock() - start)
        return tuple(times), time.process_time_ns() - processor

    def close(self) -> None:
        pass


def settle_statistics(network: M.Module, images: Tensor) -> None:
    """Let the batch norms of ``network`` have the statistics of ``images``, as those of a trained one do.

    By those of a new one activations grow from layer to layer, and their ranges with them: all would be rounded to 0,
    and a few steps later nothing would be a number.
    """
    norms = [module for module in network.modules() if isinstance(module, M.BatchNorm2d)]
    kept = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    network.train()
    network(images)
    for norm, momentum in zip(norms, kept, strict=True):
        norm.momentum = momentum


@dataclass(frozen=True)
class StepperMain:
    """The main loop of a stepper's process: every question is a number of steps."""

    arch: str
    mode: Mode
    kernels: str
    settings: TrainingSettings

    def __call__(self, channel: Channel) -> None:
        stepper = Stepper(self.arch, self.mode, self.kernels, self.settings)
        channel.send(None)
        for number in channel.questions():
            channel.send(stepper.steps(number, time.perf_counter_ns))


class StepperProcess:
    """A stepper in a process of its own, as a user trains: two networks in one disturb each other's memory.

    It runs on the cores that this process may run on, and is paused between its turns. Raises an MgqError where it
    cannot.
    """

    def __init__(self, arch: str, mode: Mode, kernels: str, settings: TrainingSettings) -> None:
        self.arch, self.mode, self.kernels = arch, mode, kernels
        main = StepperMain(arch, mode, kernels, settings)
        what = f"{arch}, {mode.value}, {kernels}"
        self.process = AnsweringProcess(main, what, settings.threads, prepare_process, has_own_networks())
        self.process.answer(START_PATIENCE_S)

    def steps(self, number: int, clock: Clock) -> tuple[tuple[int, ...], int]:
        answer: tuple[tuple[int, ...], int] = self.process.ask(number, TURN_PATIENCE_S)
        return answer

    def close(self) -> None:
        self.process.close()


class TorchStepper:
    """A network that is trained step by step in PyTorch. Raises an MgqError where that fails."""

    kernels = TORCH

    def __init__(self, arch: str, mode: Mode, settings: TrainingSettings) -> None:
        self.arch, self.mode = arch, mode
        assert settings.torch is not None
        named = {"arch": arch, "mode": mode.value, "classes": CLASSES}
        numbers = {"batch": settings.batch, "image_size": settings.image_size, "threads": settings.threads}
        self.process = TorchProcess(settings.torch, {**named, **numbers})

    def steps(self, number: int, clock: Clock) -> tuple[tuple[int, ...], int]:
        return self.process.steps(number)

    def close(self) -> None:
        self.process.close()


@dataclass
class Entry:
    """A case, and what its turns took so far: wall and processor time in nanoseconds."""

    case: TrainingCase
    wall_ns: int = 0
    processor_ns: int = 0

    @property
    def cores(self) -> float:
        return self.processor_ns / max(self.wall_ns, 1)

    def turn(self, clock: Clock, number: int) -> tuple[int, ...]:
        start = time.perf_counter_ns()
        times, processor = self.case.steps(number, clock)
        self.wall_ns += time.perf_counter_ns() - start
        self.processor_ns += processor
        return times


@contextlib.contextmanager
def on_cores(number: int) -> Iterator[None]:
    """Inside, this process and its children run on the last ``number`` of its cores, as other benchmarks do."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    place_threads(set(sorted(before)[-number:]))
    try:
        yield
    finally:
        place_threads(before)


def make_cases(
    arch: str, settings: TrainingSettings, problems: list[str], make: Callable[..., TrainingCase] = Stepper
) -> list[TrainingCase]:
    """All cases of ``arch``, MegEngine's by ``make``. Where PyTorch is wanted and fails, the reason is added to
    ``problems``."""
    found: list[TrainingCase] = []
    for mode in MODES:
        found += [make(arch, mode, kernels, settings) for kernels in ((STOCK, FAST) if settings.stock else (FAST,))]
        if settings.torch is not None:
            try:
                found.append(TorchStepper(arch, mode, settings))
            except MgqError as error:
                problems.append(f"{arch}, {mode.value}, PyTorch: {error}")
    return found


def training_benchmark(
    settings: TrainingSettings, clock: Clock | None = None, on_progress: OnProgress = log_progress
) -> TrainingReport:
    """Measure the steps of every network of ``settings`` in both modes, by MegEngine's kernels, the fast ones, PyTorch.

    One network at a time, so that memory holds six at most, each in a process of its own; within a round its rows take
    shuffled turns, on the same cores. Where a ``clock`` is given, they run in this process, by it. Raises FailureError
    where oneDNN is missing.
    """
    machine = this_machine()
    with on_cores(settings.threads):
        return measure_steps(settings, machine, clock, on_progress)


def measure_steps(
    settings: TrainingSettings, machine: Machine, clock: Clock | None, on_progress: OnProgress
) -> TrainingReport:
    make: Callable[..., TrainingCase] = StepperProcess if clock is None else Stepper
    rows: list[TrainingRow] = []
    problems: list[str] = []
    known = dict(versions())
    for place, arch in enumerate(settings.networks):
        entries = [Entry(case) for case in make_cases(arch, settings, problems, make)]
        for entry in entries:
            if isinstance(entry.case, TorchStepper):
                known["torch"] = entry.case.process.version

        def report(done: int, total: int, before: int = place) -> None:
            whole = total * len(settings.networks)
            on_progress(Progress("measure", before * total + done, whole, "turns"))

        turns = [partial(entry.turn, clock or time.perf_counter_ns) for entry in entries]
        try:
            times = take_turns(turns, settings.rounds, settings.seed, report, TURN_NS, WARM_UP_STEPS, MOST_STEPS)
        finally:
            for entry in entries:
                entry.case.close()
        rows += make_training_rows(entries, times, settings.batch)
    return TrainingReport(settings, machine, known, tuple(rows), tuple(problems))


def make_training_rows(entries: Sequence[Entry], rounds: Sequence[Rounds], batch: int) -> list[TrainingRow]:
    found = {(entry.case.mode, entry.case.kernels): times for entry, times in zip(entries, rounds, strict=True)}

    def compare(times: Rounds, mode: Mode, kernels: str) -> Speedup | None:
        base = found.get((mode, kernels))
        return None if base is None else measure_speedup(times, base)

    return [
        TrainingRow(
            network=stepper.arch,
            mode=stepper.mode.value,
            kernels=stepper.kernels,
            speed=measure_speed(times, batch),
            speedup=compare(times, stepper.mode, STOCK) if stepper.kernels == FAST else None,
            of_torch=compare(times, stepper.mode, TORCH) if stepper.kernels == FAST else None,
            of_float=compare(times, Mode.NORMAL, stepper.kernels) if stepper.mode is Mode.QAT else None,
            cores=entry.cores,
            rounds_ns=times,
        )
        for entry, times in zip(entries, rounds, strict=True)
        for stepper in (entry.case,)
    ]


def cells(row: TrainingRow) -> tuple[str, ...]:
    """The texts of ``row`` under ``COLUMNS``."""
    return (
        row.mode,
        row.kernels,
        format_three_digits(row.speed.fps),
        format_three_digits(row.speed.fps_iqr),
        f"{row.cores:.2f}",
        f"{row.speedup.median:.1f}x" if row.speedup else "-",
        f"{row.of_torch.median:.2f}x" if row.of_torch else "-",
        f"{row.of_float.median:.2f}x" if row.of_float else "-",
    )


def training_markdown(report: TrainingReport) -> str:
    """The report as a Markdown document."""
    parts = [
        "# mgq bench --train",
        markdown_list([f"{name}: {value}" for name, value in report.conditions()]),
        markdown_table(("network", *COLUMNS), [(row.network, *cells(row)) for row in report.rows], left=3),
        LEGEND,
        *([markdown_list(report.remarks())] if report.remarks() else []),
    ]
    return "\n\n".join(parts) + "\n"

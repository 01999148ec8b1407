"""How fast a training step is here: MegEngine's own kernels and the fast gradients, taken in turns."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial

import megengine as mge
import numpy as np
from megengine import Tensor
from megengine.autodiff import GradManager
from megengine.optimizer import SGD

from mgq.bench.interleaving import take_turns
from mgq.bench.settings import EXAMPLE_NETWORKS, pluralize
from mgq.bench.statistics import Rounds, Speed, Speedup, measure_speed, measure_speedup
from mgq.bench.tables import markdown_list, markdown_table, three_digits
from mgq.bench.workers import Clock, without_garbage_collection
from mgq.cpu_kernels import fast_gradients
from mgq.engine.classifier.open import versions
from mgq.engine.training.losses import cross_entropy
from mgq.errors import InputError
from mgq.events import OnProgress, Progress, log_progress
from mgq.ptq.range_measurement import as_input
from mgq.quantization.modes import Mode
from mgq.quantization.qat import Phase, prepare_qat, set_phase
from mgq.system.environment import Machine, this_machine
from mgq.weights.checkpoint import check_size
from mgq.zoo.registry import create_model, spec_of

FORMAT = "mgq bench --train 1"
STOCK, FAST = "MegEngine", "mgq"
MODES = (Mode.NORMAL, Mode.QAT)
CLASSES = 10
TURN_NS = 1_500_000_000
"""About how long a turn lasts, in nanoseconds; one step, where that is longer."""
MOST_STEPS = 20
WARM_UP_STEPS = 2
COLUMNS = ("mode", "kernels", "pictures/s", "IQR", "ms a step", "times MegEngine", "qat/float")
LEGEND = (
    "A step: forward, label-smoothed cross entropy, backward, SGD with momentum, on drawn noise in memory, with random "
    "weights. pictures/s: median over rounds, and the interquartile range (IQR) of the rounds. times MegEngine, "
    "qat/float: median over rounds of the ratio within a round."
)


@dataclass(frozen=True)
class TrainingSettings:
    """Which networks, and how: ``batch`` pictures of ``image_size`` pixels a side, so many ``rounds`` of turns."""

    networks: tuple[str, ...] = EXAMPLE_NETWORKS
    rounds: int = 3
    batch: int = 32
    image_size: int = 64
    seed: int = 0


@dataclass(frozen=True)
class TrainingRow:
    """One network in one mode by one set of kernels.

    ``speedup`` is over MegEngine's own kernels, on the rows of the fast ones; ``of_float`` over the float network by
    the same kernels, on rows of mode ``qat``. ``rounds_ns`` are the single steps in nanoseconds, by round.
    """

    network: str
    mode: str
    kernels: str
    speed: Speed
    speedup: Speedup | None
    of_float: Speedup | None
    rounds_ns: Rounds


@dataclass(frozen=True)
class TrainingReport:
    """The whole benchmark: conditions and rows."""

    settings: TrainingSettings
    machine: Machine
    versions: Mapping[str, str]
    rows: tuple[TrainingRow, ...]

    def rows_of(self, network: str) -> tuple[TrainingRow, ...]:
        return tuple(row for row in self.rows if row.network == network)

    def conditions(self) -> list[tuple[str, str]]:
        """What the numbers depend on, as (name, value) lines for people."""
        machine, settings = self.machine, self.settings
        size = settings.image_size
        return [
            ("CPU", f"{machine.cpu}; {pluralize(machine.usable_cores, 'core')} in use"),
            ("versions", ", ".join(f"{name} {version}" for name, version in self.versions.items())),
            ("step", f"batch {settings.batch} of {size}x{size} pixels, {pluralize(settings.rounds, 'round')} of turns"),
            ("load at start", ", ".join(f"{load:.2f}" for load in machine.load)),
        ]

    def remarks(self) -> list[str]:
        if not self.machine.busy:
            return []
        return ["the machine was busy at the start: compare rows of this run with each other, not with other runs"]

    def to_json(self) -> str:
        """Everything, with every sample."""
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=1) + "\n"


def make_training_settings(
    networks: Sequence[str], rounds: int | None, batch: int | None, image_size: int | None
) -> TrainingSettings:
    """Checked settings; None means the default. Raises InputError for what cannot be."""
    default = TrainingSettings()
    names = tuple(dict.fromkeys(spec_of(name).name for name in networks)) or default.networks
    given = {"rounds": rounds, "batch": batch, "image_size": image_size}
    settings = replace(default, networks=names, **{name: value for name, value in given.items() if value is not None})
    if min(settings.rounds, settings.batch) < 1:
        raise InputError("--rounds and --batch count from 1: give at least 1")
    check_size(settings.image_size)
    return settings


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

    def step(self) -> float:
        """The loss of one training step, which is over when it returns."""
        with fast_gradients() if self.kernels == FAST else contextlib.nullcontext():
            with self.manager:
                loss = cross_entropy(self.network(self.images()), Tensor(self.labels), 0.1)
                self.manager.backward(loss)
            self.optimizer.step().clear_grad()
            mge._full_sync()
            return float(loss.numpy().item())


def training_benchmark(
    settings: TrainingSettings, clock: Clock = time.perf_counter_ns, on_progress: OnProgress = log_progress
) -> TrainingReport:
    """Measure the steps of every network of ``settings`` in both modes, by MegEngine's kernels and by the fast ones.

    One network at a time, so that memory holds four at most; within a round its four rows take shuffled turns.
    Raises FailureError where oneDNN is missing.
    """
    machine = this_machine()
    rows: list[TrainingRow] = []
    for place, arch in enumerate(settings.networks):
        steppers = [Stepper(arch, mode, kernels, settings) for mode in MODES for kernels in (STOCK, FAST)]

        def told(done: int, total: int, before: int = place) -> None:
            whole = total * len(settings.networks)
            on_progress(Progress("measure", before * total + done, whole, "turns"))

        turns = [partial(turn, stepper, clock) for stepper in steppers]
        times = take_turns(turns, settings.rounds, settings.seed, told, TURN_NS, WARM_UP_STEPS, MOST_STEPS)
        rows += make_training_rows(steppers, times, settings.batch)
    return TrainingReport(settings, machine, versions(), tuple(rows))


def turn(stepper: Stepper, clock: Clock, steps: int) -> tuple[int, ...]:
    times = []
    with without_garbage_collection():
        for _ in range(steps):
            start = clock()
            stepper.step()
            times.append(clock() - start)
    return tuple(times)


def make_training_rows(steppers: Sequence[Stepper], rounds: Sequence[Rounds], batch: int) -> list[TrainingRow]:
    found = {(stepper.mode, stepper.kernels): times for stepper, times in zip(steppers, rounds, strict=True)}
    return [
        TrainingRow(
            network=stepper.arch,
            mode=stepper.mode.value,
            kernels=stepper.kernels,
            speed=measure_speed(times, batch),
            speedup=measure_speedup(times, found[stepper.mode, STOCK]) if stepper.kernels == FAST else None,
            of_float=measure_speedup(times, found[Mode.NORMAL, stepper.kernels]) if stepper.mode is Mode.QAT else None,
            rounds_ns=times,
        )
        for stepper, times in zip(steppers, rounds, strict=True)
    ]


def cells(row: TrainingRow) -> tuple[str, ...]:
    """The texts of ``row`` under ``COLUMNS``."""
    return (
        row.mode,
        row.kernels,
        three_digits(row.speed.fps),
        three_digits(row.speed.fps_iqr),
        three_digits(row.speed.p50_ms),
        f"{row.speedup.median:.1f}x" if row.speedup else "-",
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

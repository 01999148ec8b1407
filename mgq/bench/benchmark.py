"""Runs a whole benchmark: from settings to a report."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from mgq.bench.benchmark_report import Report, make_peaks, make_rows
from mgq.bench.cases import CaseResult, run_cases
from mgq.bench.file_cases import file_cases, list_sizes, precision_of
from mgq.bench.peak import find_instruction
from mgq.bench.settings import FILES, Precision, Settings
from mgq.engine.classifier.classifier import versions
from mgq.errors import plural
from mgq.events import OnProgress, Progress, log_progress
from mgq.io.temporary_folders import temporary_folder
from mgq.runtime.registry import COMPARED, Backend
from mgq.system.environment import Machine, saturates, this_machine

IMAGE = "the bundled photograph of a cat"
SHIFTED = ", shifted sideways from picture to picture"


def benchmark(
    settings: Settings | None = None,
    on_progress: OnProgress = log_progress,
    engines: Sequence[Backend] = COMPARED,
) -> Report:
    """Measure how fast every network of ``settings`` is in every engine of ``engines``, all of them by default.

    One network after the other. Each of its rows runs in a process of its own, pinned to as many cores as it has
    threads, and sleeps while the others have their turns (see :func:`mgq.bench.cases.run_cases`); files for engines
    that read one go to a temporary folder. An engine that is missing, crashes, or gives other answers, costs only its
    row. Raises InputError where a file of ``against`` is none that an engine could read.
    """
    settings = settings or Settings()
    machine = this_machine()
    for path in settings.against:
        precision_of(path)
    entries: list[CaseResult] = []
    with temporary_folder() as folder:
        for network in settings.networks:
            told = partial(benchmark_network, network, on_progress)
            if network == FILES:
                entries += run_cases(file_cases(settings, machine), settings.rounds, settings.seed, told)
                continue
            from mgq.bench.suite import BenchmarkSuite

            suite = BenchmarkSuite(network, settings, machine, folder, engines)
            entries += run_cases(suite.cases(), settings.rounds, settings.seed, told, suite.references())
    image = IMAGE + (SHIFTED if settings.batch > 1 else "")
    notes = list_notes(machine, settings)
    rows = make_rows(entries, settings)
    return Report(settings, machine, versions(), image, rows, notes, make_peaks(entries), list_sizes(settings))


def benchmark_network(network: str, on_progress: OnProgress, event: Progress) -> None:
    on_progress(event._replace(what=f"{event.what} {network}"))


def list_notes(machine: Machine, settings: Settings) -> tuple[str, ...]:
    """What should be known of the machine before its numbers are compared with others."""
    notes = []
    if machine.busy:
        notes.append(
            f"the machine was busy at the start (load {machine.load[0]:.2f} on "
            f"{plural(machine.usable_cores, 'core')}): compare rows of this run with each other, not with other runs"
        )
    if Precision.INT8 in settings.precisions and saturates(machine.features):
        notes.append(
            "this processor has no VNNI: sums of two products of uint8 and int8 can saturate in ONNX Runtime and "
            "OpenVINO. What `--target onnx-avx2` quantizes cannot; `mgq dump --check layers` shows the difference"
        )
    notes += [
        f"no share of the {precision.value} peak: the self-test knows no instruction of this processor"
        for precision in settings.precisions
        if find_instruction(precision, machine.features) is None
    ]
    return tuple(notes)

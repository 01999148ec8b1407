"""A run's networks in every engine: the size of the file, the answers to the same pictures, and the speed."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mgq.bench.cases import BenchmarkCase, CaseResult, LoadedWorker, run_cases
from mgq.bench.settings import Precision, Settings
from mgq.bench.statistics import Rounds, Speed, Speedup, measure_speed, measure_speedup
from mgq.bench.suite import NetworkJob, computes_in, start_backend
from mgq.data.datasets import pick_evenly
from mgq.data.transforms import Pixels, to_batch
from mgq.engine.classifier.evaluate import Evaluation
from mgq.engine.classifier.metrics import standard_error
from mgq.engine.classifier.open import Classifier
from mgq.errors import FailureError, MgqError
from mgq.events import OnProgress, Progress
from mgq.machine import usable_cores
from mgq.quantization.targets import MEGENGINE
from mgq.reports.run_predictions import FLOAT, INT8, Measurements, Networks, crops_at
from mgq.runtime.protocol import in_batches
from mgq.runtime.registry import COMPARED, TRACED, Backend

ROUNDS = 5
IMAGES = 200
"""On so many pictures at most the engines' answers are counted."""
PRECISIONS = {FLOAT: Precision.FP32, INT8: Precision.INT8}
# MegEngine as mgq itself runs it, and all engines that read a file.
SHOWN = tuple(backend for backend in COMPARED if backend is not TRACED)


@dataclass(frozen=True)
class GivenJob(NetworkJob):
    """A job for a network that is there already."""

    given: Classifier

    @cached_property
    def classifier(self) -> Classifier:
        return self.given


@dataclass(frozen=True)
class Row:
    """The network ``what`` in one engine. ``problem`` says why there is no speed. ``top1`` and ``same``, its answers
    that are MegEngine's, are percent; None where there were no pictures. ``rounds`` are times in nanoseconds."""

    what: str
    engine: str
    version: str = ""
    file_bytes: int | None = None
    rounds: Rounds = ()
    problem: str | None = None
    top1: float | None = None
    same: float | None = None

    @property
    def speed(self) -> Speed | None:
        return measure_speed(self.rounds, 1) if self.rounds else None

    def to_json(self) -> dict[str, Any]:
        body = {name: value for name, value in asdict(self).items() if name != "rounds"}
        return {**body, "speed": asdict(self.speed) if self.speed else None}


@dataclass(frozen=True)
class BackendComparison:
    """All rows; ``images`` is on how many the answers were counted."""

    rows: tuple[Row, ...]
    images: int

    def fastest(self, what: str) -> Row | None:
        timed = [row for row in self.rows if row.what == what and row.rounds]
        return max(timed, key=lambda row: row.speed.fps if row.speed else 0.0, default=None)

    @property
    def gain(self) -> Speedup | None:
        """The fastest int8 beside the fastest float, each in its engine."""
        one, other = self.fastest(INT8), self.fastest(FLOAT)
        return measure_speedup(one.rounds, other.rounds) if one is not None and other is not None else None

    @property
    def error(self) -> float:
        """The standard error of an accuracy of those of the rows, in points: the largest."""
        return max((standard_error(row.top1, self.images) for row in self.rows if row.top1 is not None), default=0.0)


def compare_backends(
    networks: Networks,
    found: Measurements | None,
    on_progress: OnProgress,
    engines: Sequence[Backend] = SHOWN,
    rounds: int = ROUNDS,
) -> BackendComparison:
    """Float and int8 in each of ``engines``: times are taken one picture at a time on one thread, in shuffled turns of
    processes of their own (:func:`mgq.bench.cases.run_cases`). One that is missing costs its row alone."""
    classifier = networks.any
    settings = Settings((classifier.spec.name,), threads=(1,), rounds=rounds, image_size=classifier.image_size)
    crops, indices = select_crops(classifier, found) if found is not None else (None, [])
    with tempfile.TemporaryDirectory(prefix="mgq-report-") as folder:
        jobs = {
            what: GivenJob(classifier.spec.name, PRECISIONS[what], one.target, settings, Path(folder), one)
            for what, one in networks.by_name.items()
            if what in PRECISIONS
        }
        cases = [
            make_case(job, backend)
            for job in jobs.values()
            for backend in engines
            if computes_in(backend, job.precision)
        ]
        entries = run_cases(cases, rounds, on_progress=on_progress)
        rows: list[Row] = []
        for entry in entries:
            row = row_of(entry)
            if found is not None and crops is not None and row.problem is None:
                on_progress(Progress("answers of engines", len(rows), len(entries), "engines"))
                backend = next(backend for backend in engines if backend.name == row.engine)
                row = add_agreement(row, backend, jobs[row.what], found.found[row.what], crops, indices)
            rows.append(row)
        on_progress(Progress("answers of engines", len(entries), len(entries), "engines"))
    return BackendComparison(tuple(rows), len(indices))


def make_case(job: GivenJob, backend: Backend) -> BenchmarkCase:
    return BenchmarkCase(
        network=job.network,
        precision=job.precision,
        engine=backend.name,
        load=partial(start_case, job, backend),
        answers=None,  # they are counted on the pictures
        target=job.target.name,
    )


def start_case(job: GivenJob, backend: Backend) -> LoadedWorker:
    of_megengine = backend.target == MEGENGINE.name
    if of_megengine and job.precision is Precision.INT8 and job.target is not MEGENGINE:
        raise FailureError(f"MegEngine cannot run what was quantized for the target {job.target.name}")
    return start_backend(backend, job, 1)


def row_of(entry: CaseResult) -> Row:
    case = entry.case
    what = next(name for name, precision in PRECISIONS.items() if precision is case.precision)
    if entry.loaded is None or entry.problem is not None:
        return Row(what, case.engine, problem=entry.problem)
    return Row(what, case.engine, entry.worker.version, entry.loaded.file_bytes, entry.rounds)


def select_crops(classifier: Classifier, found: Measurements) -> tuple[npt.NDArray[np.uint8], list[int]]:
    """uint8 (N, 3, S, S): pictures that were measured, evenly spread; and their numbers in the dataset."""
    all_of_them = found.last.indices
    indices: list[int] = all_of_them[pick_evenly(len(all_of_them), IMAGES)].tolist()
    crops: Sequence[Pixels] = crops_at(classifier, found.dataset, indices)
    return to_batch(crops), indices


def add_agreement(
    row: Row,
    backend: Backend,
    job: GivenJob,
    evaluation: Evaluation,
    crops: npt.NDArray[np.uint8],
    indices: Sequence[int],
) -> Row:
    """``row`` with what its ``backend`` answers to ``crops``, whose numbers are ``indices``; MegEngine's are known."""
    places = np.searchsorted(evaluation.indices, indices)
    labels, known = evaluation.labels[places], evaluation.predictions[places]
    try:
        answers = known
        if backend.suffix:
            runtime = backend.load(job.deployed(backend.suffix), usable_cores())
            answers = in_batches(runtime, crops).argmax(1)
    except MgqError as error:
        return replace(row, problem=str(error), rounds=())
    return replace(row, top1=100 * float((answers == labels).mean()), same=100 * float((answers == known).mean()))

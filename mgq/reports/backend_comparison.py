"""Compares a run's networks in every engine: file size, answers to the same images, and speed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np
import numpy.typing as npt

from mgq.bench.cases import BenchmarkCase, LoadedWorker, run_cases
from mgq.bench.settings import Precision, Settings
from mgq.bench.suite import NetworkJob, computes_in, start_backend
from mgq.engine.classifier.evaluation_result import Evaluation
from mgq.engine.classifier.open import Classifier
from mgq.errors import FailureError
from mgq.events import OnProgress
from mgq.io.temporary_folders import temporary_folder
from mgq.quantization.targets import MEGENGINE
from mgq.reports.engine_rows import PRECISIONS, ROUNDS, BackendComparison, Row, collect_rows, select_crops, with_answers
from mgq.reports.measurements import Measurements
from mgq.reports.run_predictions import Networks
from mgq.runtime.registry import COMPARED, TRACED, Backend

# MegEngine as mgq itself runs it, and all engines that read a file.
SHOWN = tuple(backend for backend in COMPARED if backend is not TRACED)


@dataclass(frozen=True)
class GivenJob(NetworkJob):
    """A job for a network that is there already."""

    given: Classifier

    @cached_property
    def classifier(self) -> Classifier:
        return self.given


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
    with temporary_folder() as folder:
        jobs = {
            what: GivenJob(classifier.spec.name, PRECISIONS[what], one.target, settings, folder, one)
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

        def add(row: Row) -> Row:
            assert found is not None and crops is not None
            backend = next(backend for backend in engines if backend.name == row.engine)
            return add_agreement(row, backend, jobs[row.what], found.found[row.what], crops, indices)

        rows = collect_rows(entries, add if crops is not None else None, on_progress)
    return BackendComparison(rows, len(indices))


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


def add_agreement(
    row: Row,
    backend: Backend,
    job: GivenJob,
    evaluation: Evaluation,
    crops: npt.NDArray[np.uint8],
    indices: Sequence[int],
) -> Row:
    """``row`` with what its ``backend`` answers to ``crops``, whose numbers are ``indices``; MegEngine's are known."""
    file = (lambda: job.write_file(backend.suffix)) if backend.suffix else None
    return with_answers(row, backend, file, evaluation, crops, indices)

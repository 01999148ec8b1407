"""Rows of networks in engines: sizes, answers and speeds. Importing this imports no MegEngine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mgq.bench.cases import CaseResult
from mgq.bench.settings import Precision
from mgq.bench.statistics import Rounds, Speed, Speedup, measure_speed, measure_speedup
from mgq.data.datasets import pick_evenly
from mgq.data.transforms import Pixels, to_batch
from mgq.engine.classifier.classifier import Classifier
from mgq.engine.classifier.evaluation_result import Evaluation
from mgq.engine.classifier.metrics import standard_error
from mgq.errors import MgqError
from mgq.events import OnProgress, Progress
from mgq.machine import usable_cores
from mgq.reports.measurements import FLOAT, INT8, Measurements, crops_at
from mgq.runtime.protocol import run_in_batches
from mgq.runtime.registry import Backend

ROUNDS = 5
IMAGES = 200
"""The most images on which the engines' answers are compared."""
PRECISIONS = {FLOAT: Precision.FP32, INT8: Precision.INT8}


@dataclass(frozen=True)
class Row:
    """The network ``what`` in one engine. ``problem`` says why there is no speed. ``top1`` and ``same``, its answers
    that are MegEngine's, are percent; None where there were no pictures. ``rounds`` are times in nanoseconds, of
    ``batch`` pictures each."""

    what: str
    engine: str
    version: str = ""
    file_bytes: int | None = None
    rounds: Rounds = ()
    problem: str | None = None
    top1: float | None = None
    same: float | None = None
    batch: int = 1

    @property
    def speed(self) -> Speed | None:
        return measure_speed(self.rounds, self.batch) if self.rounds else None

    def to_json(self) -> dict[str, Any]:
        body = {name: value for name, value in asdict(self).items() if name != "rounds"}
        return {**body, "speed": asdict(self.speed) if self.speed else None}


@dataclass(frozen=True)
class BackendComparison:
    """All rows; ``images`` is on how many the answers were counted, ``batch`` how many pictures a run took."""

    rows: tuple[Row, ...]
    images: int
    batch: int = 1

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


def row_of(entry: CaseResult) -> Row:
    case = entry.case
    what = next(name for name, precision in PRECISIONS.items() if precision is case.precision)
    if entry.loaded is None or entry.problem is not None:
        return Row(what, case.engine, problem=entry.problem)
    return Row(what, case.engine, entry.worker.version, entry.loaded.file_bytes, entry.rounds)


def collect_rows(
    entries: Sequence[CaseResult], add: Callable[[Row], Row] | None, on_progress: OnProgress
) -> tuple[Row, ...]:
    """A row for each of ``entries``; ``add`` gives those that ran their answers."""
    rows: list[Row] = []
    for entry in entries:
        row = row_of(entry)
        if add is not None and row.problem is None:
            on_progress(Progress("answers of engines", len(rows), len(entries), "engines"))
            row = add(row)
        rows.append(row)
    on_progress(Progress("answers of engines", len(entries), len(entries), "engines"))
    return tuple(rows)


def select_crops(classifier: Classifier, found: Measurements) -> tuple[npt.NDArray[np.uint8], list[int]]:
    """uint8 (N, 3, S, S): pictures that were measured, evenly spread; and their numbers in the dataset."""
    all_of_them = found.last.indices
    indices: list[int] = all_of_them[pick_evenly(len(all_of_them), IMAGES)].tolist()
    crops: Sequence[Pixels] = crops_at(classifier, found.dataset, indices)
    return to_batch(crops), indices


def with_answers(
    row: Row,
    backend: Backend,
    file: Callable[[], Path] | None,
    evaluation: Evaluation,
    crops: npt.NDArray[np.uint8],
    indices: Sequence[int],
) -> Row:
    """``row`` with what its ``backend`` answers to ``crops``, whose numbers in the dataset are ``indices``.

    ``file`` gives what it reads; None where the answers of ``evaluation`` are its own.
    """
    places = np.searchsorted(evaluation.indices, indices)
    labels, known = evaluation.labels[places], evaluation.predictions[places]
    try:
        answers = known if file is None else run_in_batches(backend.load(file(), usable_cores()), crops).argmax(1)
    except MgqError as error:
        return replace(row, problem=str(error), rounds=())
    return replace(row, top1=100 * float((answers == labels).mean()), same=100 * float((answers == known).mean()))

"""A deployed file, measured anew and laid out on one page that opens off line. Reading it imports no MegEngine."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from mgq.bench.cases import BenchmarkCase, run_cases
from mgq.bench.file_cases import start_file
from mgq.bench.settings import Settings
from mgq.data.datasets import Dataset, pick_evenly, subset
from mgq.data.transforms import to_batch
from mgq.engine.classifier.classifier import Classifier, versions
from mgq.engine.classifier.evaluate import batch_for, evaluate, evaluation_data, match_classes
from mgq.engine.classifier.network_choice import choose_network
from mgq.engine.classifier.predict import ClassScore, best_scores
from mgq.errors import InputError
from mgq.events import OnProgress
from mgq.io.atomic import write_text_atomically
from mgq.io.download import sha256_of
from mgq.quantization.option_names import Mode
from mgq.reports.engine_rows import (
    PRECISIONS,
    ROUNDS,
    BackendComparison,
    Row,
    collect_rows,
    select_crops,
    with_answers,
)
from mgq.reports.file_page import page_of
from mgq.reports.html import check_page_path
from mgq.reports.measurements import FLOAT, INT8, Measurements, crops_at, name_of, thumbnail_of
from mgq.reports.report_options import ReportOptions
from mgq.runtime.protocol import FileRuntime
from mgq.runtime.registry import BACKENDS, Backend
from mgq.system.environment import Machine, this_machine

LEFT_TO_RUNS = (
    "float32 beside it, the error of each layer, training curves: only the run that made the file knows them, and "
    "`mgq report RUN` shows them where MegEngine is installed"
)


@dataclass(frozen=True)
class WrongAnswer:
    """A picture that the network takes for something else. ``truth`` has the probability that its own class got;
    ``thumbnail`` is what the network saw of it, a JPEG of ``side`` pixels on a side."""

    name: str
    truth: ClassScore
    answer: ClassScore
    thumbnail: bytes
    side: int


@dataclass(frozen=True, eq=False)
class FileReport:
    """All that the page shows of the deployed file at ``path``.

    ``found`` is None where there were no pictures, ``engines`` where they were not wanted. ``missing`` has a line for
    everything that is not there, with the mend. ``command`` makes the report again, ``page`` is where it is written.
    """

    path: Path
    classifier: Classifier
    sha256: str
    found: Measurements | None
    wrong: tuple[WrongAnswer, ...]
    engines: BackendComparison | None
    missing: tuple[str, ...]
    machine: Machine
    versions: Mapping[str, str]
    made: datetime
    command: str
    page: Path

    @property
    def what(self) -> str:
        return precision_of(self.classifier)

    @property
    def runtime(self) -> FileRuntime:
        """The engine that the accuracy was measured in, with the file."""
        found: FileRuntime = self.classifier.network.runtime
        return found

    @property
    def engine(self) -> str:
        return f"{self.runtime.name} {self.runtime.version}".strip()

    @property
    def file_bytes(self) -> int:
        size: int = self.classifier.network.size
        return size

    @property
    def about(self) -> Mapping[str, Any]:
        """What the file says of itself, but for the names of its classes."""
        return {name: value for name, value in self.runtime.about.items() if name != "classes"}

    def summary(self) -> list[str]:
        """The result in a few lines."""
        lines = [f"{self.path}: {self.classifier.spec.name}, {self.what}, in {self.engine}"]
        if self.found is not None:
            kind = "synthetic pictures" if self.found.synthetic else f"pictures of {self.found.dataset.name}"
            one = self.found.last
            lines.append(f"top-1 on {self.found.images} {kind}: {one.top1:.1f} % ± {one.top1_error:.1f}")
        best = self.engines.fastest(self.what) if self.engines is not None else None
        if best is not None and best.speed is not None:
            lines.append(f"fastest on one thread: {best.engine}, {best.speed.fps:.1f} pictures/s")
        return lines

    def to_json(self) -> dict[str, Any]:
        """Plain data: percent, nats, bytes, pictures a second."""
        found, compared = self.found, self.engines
        return {
            "file": str(self.path),
            "file_bytes": self.file_bytes,
            "sha256": self.sha256,
            "arch": self.classifier.spec.name,
            "kind": self.what,
            "engine": self.engine,
            "page": str(self.page),
            "images": found.images if found else 0,
            "accuracy": {
                name: {"top1": one.top1, "top5": one.top5, "loss": one.loss}
                for name, one in (found.found.items() if found else ())
            },
            "engines": [row.to_json() for row in compared.rows] if compared else [],
            "missing": list(self.missing),
            "about": dict(self.about),
            "versions": dict(self.versions),
        }


def report_file(path: Path, options: ReportOptions, on_progress: OnProgress) -> FileReport:
    """Measure the deployed file at ``path`` and write the page about it, as ``options`` say. MegEngine is imported
    where it runs the file alone."""
    machine = this_machine()  # as it is before the work begins
    page = check_page_path(options.output or path.with_name(f"{path.name}.report.html"), "--output")
    classifier = choose_network(checkpoint=path)
    missing = [LEFT_TO_RUNS]
    found = None
    try:
        labelled = evaluation_data(options.data, classifier.recipe, classifier.image_size, on_progress)
    except InputError:
        if options.data is not None:
            raise
        missing.append("accuracy and answers: pass -d FOLDER with labelled pictures")
    else:
        labelled = labelled if options.limit is None else subset(labelled, options.limit)
        found = measure_file(classifier, labelled, on_progress)
    engines = BACKENDS if options.engines is True else options.engines or ()
    result = FileReport(
        path=path,
        classifier=classifier,
        sha256=sha256_of(path),
        found=found,
        wrong=() if found is None else tuple(wrong_answers(classifier, found, options.images)),
        engines=compare_engines(path, classifier, found, on_progress, engines) if engines else None,
        missing=tuple(missing),
        machine=machine,
        versions=versions(),
        made=datetime.now().astimezone(),
        command=command_of(path, options.data, options.limit),
        page=page,
    )
    write_text_atomically(page, page_of(result))
    return result


def precision_of(classifier: Classifier) -> str:
    return FLOAT if classifier.mode is Mode.NORMAL else INT8


def measure_file(classifier: Classifier, dataset: Dataset, on_progress: OnProgress) -> Measurements:
    labelled = match_classes(dataset, classifier.classes)
    found = evaluate(classifier, labelled, batch_size=batch_for(classifier.image_size), on_progress=on_progress)
    return Measurements(labelled, {precision_of(classifier): found}, "", {})


def wrong_answers(classifier: Classifier, found: Measurements, most: int) -> list[WrongAnswer]:
    """``most`` of the pictures that were answered wrong, evenly spread."""
    one = found.last
    [wrong] = (one.predictions != one.labels).nonzero()
    places = wrong[pick_evenly(len(wrong), most)]
    if not len(places):
        return []
    indices = one.indices[places].tolist()
    crops = crops_at(classifier, found.dataset, indices)
    shown = []
    for place, index, crop in zip(places, indices, crops, strict=True):
        logits = classifier.logits(to_batch([crop]))[0]
        scores = {score.index: score for score in best_scores(logits, classifier.classes, len(classifier.classes))}
        # Classes that are numbers to the network have the names of the pictures' folders.
        truth, answer = (named(scores[int(number[place])], one.classes) for number in (one.labels, one.predictions))
        shown.append(WrongAnswer(name_of(found.dataset, index), truth, answer, *thumbnail_of(crop)))
    return shown


def named(score: ClassScore, classes: Sequence[str]) -> ClassScore:
    return ClassScore(score.index, classes[score.index], score.probability)


def compare_engines(
    path: Path,
    classifier: Classifier,
    found: Measurements | None,
    on_progress: OnProgress,
    engines: Sequence[Backend],
    rounds: int = ROUNDS,
) -> BackendComparison:
    """The file in each of ``engines`` that is installed and reads it, as :func:`mgq.bench.cases.run_cases` does."""
    what, arch = precision_of(classifier), classifier.spec.name
    batch = classifier.network.runtime.batch or 1
    settings = Settings((arch,), threads=(1,), rounds=rounds, batch=batch, image_size=classifier.image_size)
    reading = [one for one in engines if one.suffix == path.suffix.lower() and one.is_installed and one.reads(path)]
    cases = [
        BenchmarkCase(arch, PRECISIONS[what], one.name, partial(start_file, one, path, settings, 1), answers=None)
        for one in reading
    ]
    crops, indices = select_crops(classifier, found) if found is not None else (None, [])

    def add(row: Row) -> Row:
        assert found is not None and crops is not None
        backend = next(backend for backend in reading if backend.name == row.engine)
        is_known = classifier.file is not None and classifier.file[1] == backend.key
        return with_answers(row, backend, None if is_known else lambda: path, found.last, crops, indices)

    entries = run_cases(cases, rounds, on_progress=on_progress)
    rows = collect_rows(entries, add if crops is not None else None, on_progress)
    return BackendComparison(tuple(replace(row, batch=batch) for row in rows), len(indices), batch)


def command_of(path: Path, data: Path | None, limit: int | None) -> str:
    options = {"-d": data, "--limit": limit}
    said = [word for name, value in options.items() if value is not None for word in (name, str(value))]
    return shlex.join(["mgq", "report", str(path), *said])

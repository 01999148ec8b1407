"""Measures a deployed file and writes the page about it. Importing this imports no MegEngine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from functools import partial
from pathlib import Path

from mgq.bench.cases import BenchmarkCase, run_cases
from mgq.bench.file_cases import start_file
from mgq.bench.settings import Settings
from mgq.data.datasets import Dataset, pick_evenly, subset
from mgq.data.transforms import to_batch
from mgq.engine.classifier.classifier import Classifier, versions
from mgq.engine.classifier.evaluate import batch_for, evaluate
from mgq.engine.classifier.labelled_sets import evaluation_data, match_classes
from mgq.engine.classifier.network_choice import choose_network
from mgq.engine.classifier.network_options import NetworkOptions
from mgq.engine.classifier.predict import ClassScore, best_scores
from mgq.errors import InputError
from mgq.events import OnProgress
from mgq.io.atomic import write_text_output
from mgq.io.download import sha256_of
from mgq.reports.contents import FileReport, WrongAnswer, precision_of
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
from mgq.reports.measurements import Measurements, crops_at, name_of, thumbnail_of
from mgq.reports.report_options import ReportOptions
from mgq.runtime.registry import BACKENDS, Backend
from mgq.system.environment import this_machine

LEFT_TO_RUNS = (
    "float32 beside it, the error of each layer, training curves: only the run that made the file knows them, and "
    "`mgq report RUN` shows them where MegEngine is installed"
)


def report_file(path: Path, options: ReportOptions, on_progress: OnProgress) -> FileReport:
    """Measure the deployed file at ``path`` and write the page about it, as ``options`` say. MegEngine is imported
    where it runs the file alone."""
    machine = this_machine()  # as it is before the work begins
    page = check_page_path(options.output or path.with_name(f"{path.name}.report.html"), "--output")
    classifier = choose_network(NetworkOptions(options.arch, path))
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
        command=options.command_for(path),
        page=page,
    )
    write_text_output(page, page_of(result))
    return result


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
        truth, answer = (rename(scores[int(number[place])], one.classes) for number in (one.labels, one.predictions))
        shown.append(WrongAnswer(name_of(found.dataset, index), truth, answer, *thumbnail_of(crop)))
    return shown


def rename(score: ClassScore, classes: Sequence[str]) -> ClassScore:
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

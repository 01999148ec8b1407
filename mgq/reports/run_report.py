"""Measures a run and writes the page about it."""

from __future__ import annotations

import shlex
from dataclasses import replace
from datetime import datetime
from pathlib import Path

from mgq.data.datasets import subset
from mgq.engine.classifier.onnx_import import refuse_other_import
from mgq.engine.classifier.open import versions
from mgq.errors import InputError, plural, printable
from mgq.events import OnProgress, log_progress
from mgq.io.atomic import write_text_output
from mgq.reports.backend_comparison import SHOWN as ENGINES
from mgq.reports.backend_comparison import compare_backends
from mgq.reports.contents import Report
from mgq.reports.finished_run import Run, find_float_weights, find_run, float_metrics, images_of
from mgq.reports.html import check_page_path
from mgq.reports.report_options import ReportOptions
from mgq.reports.report_page import page_of
from mgq.reports.run_predictions import measure_networks, networks_of
from mgq.system.environment import this_machine
from mgq.weights.checkpoint import info_of
from mgq.weights.state_file import read_state
from mgq.zoo.registry import spec_for, spec_of
from mgq.zoo.weight_loading import Weights, read_weights

PAGE = "report.html"


def report_run(options: ReportOptions, on_progress: OnProgress = log_progress) -> Report:
    """Measure a run anew and write the page about it, as ``options`` say.

    Images that the run knows of and that are gone cost their parts of the page alone.
    """
    machine = this_machine()  # as it is before the work begins
    run, checkpoint = choose_run(options)
    options = replace(options, checkpoint=checkpoint)
    if options.arch not in (None, run.weights.arch):
        raise InputError(f"{printable(run.path)} is a run of {run.weights.arch}, not of {options.arch}; leave out -a")
    page = check_page_path(options.output or run.path / PAGE, "--output")
    normal, why_not = find_float_network(run, options.checkpoint, options.key)
    networks = networks_of(run, normal)
    missing = [f"float32: {why_not}"] if why_not else []
    if not run.is_int8:
        arch = shlex.quote(spec_of(run.weights.arch).typed)
        missing.append(f"int8: this run made a float network; `mgq qat -a {arch}` or `mgq calibrate -a {arch}` goes on")
    found = None
    try:
        labelled, left_out = images_of(run, options.data, on_progress)
    except InputError as error:
        if options.data is not None:
            raise
        missing.append(f"accuracy, changed answers, confusions: {error}")
    else:
        labelled = subset(labelled, options.limit) if options.limit is not None else labelled
        found = measure_networks(networks, labelled, left_out, options.images, on_progress)
    compared = None
    if options.engines is not False:
        backends = ENGINES if options.engines is True else options.engines
        compared = compare_backends(networks, found, on_progress, backends)
    result = Report(
        run=run,
        networks=networks,
        found=found,
        engines=compared,
        float_metrics=float_metrics(run),
        missing=tuple(missing),
        machine=machine,
        versions=versions(),
        made=datetime.now().astimezone(),
        command=options.command_for(run.path),
        page=page,
    )
    write_text_output(page, page_of(result))
    return result


def choose_run(options: ReportOptions) -> tuple[Run, Path | None]:
    """The run that ``options`` name, and the file of the float network to compare with, where they give one.

    Where no run is named, ``-c`` tells it: an int8 checkpoint is that of the run, and of a float network it is the
    newest run. Raises InputError as :func:`find_run` does.
    """
    file = options.checkpoint
    if options.run is not None or file is None:
        return find_run(options.run, options.save, options.arch), file
    info = info_of(read_state(file, options.key).metadata, printable(file))
    if info is not None and info.mode == "qat":
        return find_run(file, options.save), None
    arch = None if info is None else spec_for(info.arch, info.options).name
    return find_run(None, options.save, options.arch or arch), file


def find_float_network(run: Run, checkpoint: Path | None, key: str | None) -> tuple[Weights | None, str]:
    """The float network of ``checkpoint``, else what the run knows of; or why there is none."""
    if checkpoint is None:
        return find_float_weights(run)
    weights = read_weights(checkpoint, spec_of(run.weights.arch), key=key)
    if weights.classes != run.weights.classes:
        raise InputError(
            f"{weights.origin} answers {plural(weights.classes, 'class')} and the run {run.weights.classes}"
        )
    refuse_other_import(run.checkpoint, weights.options)
    return weights, ""

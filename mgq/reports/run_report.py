"""A run, measured anew and laid out on one page that opens off line."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from mgq.data.datasets import subset
from mgq.engine.classifier.open import versions
from mgq.engine.runs.run_folder import Metrics
from mgq.errors import InputError
from mgq.events import OnProgress, log_progress
from mgq.io.atomic import write_text_atomically
from mgq.reports.backend_comparison import SHOWN as ENGINES
from mgq.reports.backend_comparison import compare_backends
from mgq.reports.engine_rows import BackendComparison
from mgq.reports.finished_run import Run, find_float_weights, find_run, float_metrics, images_of
from mgq.reports.html import check_page_path
from mgq.reports.measurements import Measurements
from mgq.reports.report_options import ReportOptions
from mgq.reports.report_page import page_of
from mgq.reports.run_predictions import Networks, measure_networks, networks_of
from mgq.system.environment import Machine, this_machine
from mgq.zoo.registry import spec_of
from mgq.zoo.weight_loading import Weights, read_weights

PAGE = "report.html"


@dataclass(frozen=True, eq=False)
class Report:
    """All that the page shows of ``run``.

    ``found`` is None where there were no pictures, ``engines`` where they were not wanted. ``missing`` has a line for
    everything that is not there, with the mend. ``float_metrics`` are those of the float training before. ``command``
    makes the report again, ``page`` is where it is written.
    """

    run: Run
    networks: Networks
    found: Measurements | None
    engines: BackendComparison | None
    float_metrics: list[Metrics]
    missing: tuple[str, ...]
    machine: Machine
    versions: Mapping[str, str]
    made: datetime
    command: str
    page: Path

    def summary(self) -> list[str]:
        """The result in a few lines."""
        lines = [f"{self.run.path}: {self.run.weights.arch}, {self.run.kind}"]
        if self.found is not None:
            kind = "synthetic pictures" if self.found.synthetic else f"pictures of {self.found.dataset.name}"
            tops = ", ".join(f"{name} {one.top1:.1f} %" for name, one in self.found.found.items())
            lines.append(f"top-1 on {self.found.images} {kind}: {tops} (± {self.found.last.top1_error:.1f})")
            if self.found.pair is not None:
                counts = {verdict: len(group) for verdict, group in self.found.groups.items()}
                told = ", ".join(f"{verdict} {count}" for verdict, count in counts.items())
                lines.append(f"int8 changed {sum(counts.values())} answers: {told}")
        return lines

    def to_json(self) -> dict[str, Any]:
        """Plain data: percent, nats, bytes, pictures a second."""
        found, compared = self.found, self.engines
        return {
            "run": str(self.run.path),
            "arch": self.run.weights.arch,
            "kind": self.run.kind,
            "page": str(self.page),
            "images": found.images if found else 0,
            "accuracy": {
                name: {"top1": one.top1, "top5": one.top5, "loss": one.loss}
                for name, one in (found.found.items() if found else ())
            },
            "changed": {verdict: len(group) for verdict, group in found.groups.items()} if found else {},
            "engines": [row.to_json() for row in compared.rows] if compared else [],
            "missing": list(self.missing),
            "versions": dict(self.versions),
        }


def report_run(options: ReportOptions, on_progress: OnProgress = log_progress) -> Report:
    """Measure a run anew and write the page about it, as ``options`` say.

    Images that the run knows of and that are gone cost their parts of the page alone.
    """
    machine = this_machine()  # as it is before the work begins
    run = find_run(options.run, options.save)
    page = check_page_path(options.output or run.path / PAGE, "--output")
    normal, why_not = find_float_network(run, options.checkpoint, options.key)
    networks = networks_of(run, normal)
    missing = [f"float32: {why_not}"] if why_not else []
    if not run.is_int8:
        arch = shlex.quote(run.weights.arch)
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
        command=command_of(run, options),
        page=page,
    )
    write_text_atomically(page, page_of(result))
    return result


def find_float_network(run: Run, checkpoint: Path | None, key: str | None) -> tuple[Weights | None, str]:
    """The float network of ``checkpoint``, else what the run knows of; or why there is none."""
    if checkpoint is None:
        return find_float_weights(run)
    weights = read_weights(checkpoint, spec_of(run.weights.arch), key=key)
    if weights.classes != run.weights.classes:
        raise InputError(f"{weights.origin} answers {weights.classes} classes and the run {run.weights.classes}")
    return weights, ""


def command_of(run: Run, options: ReportOptions) -> str:
    """The command that makes the report again."""
    words = {"-d": options.data, "-c": options.checkpoint, "--key": options.key, "--limit": options.limit}
    said = [word for name, value in words.items() if value is not None for word in (name, str(value))]
    return shlex.join(["mgq", "report", str(run.path), *said])

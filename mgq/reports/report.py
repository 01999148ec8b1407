"""``mgq report`` as a call: one page about a run or a deployed file. Reading it imports no MegEngine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mgq.deprecation import accept_old_keywords
from mgq.engine.classifier.network_options import RUNS
from mgq.events import OnProgress, log_progress
from mgq.machine import load_megengine
from mgq.reports.measurements import SHOWN
from mgq.reports.report_options import ReportOptions
from mgq.runtime.registry import Backend

if TYPE_CHECKING:
    from mgq.reports.contents import FileReport, Report


@accept_old_keywords(pictures="images")
def report(
    run: str | Path | None = None,
    data: str | Path | None = None,
    checkpoint: str | Path | None = None,
    save: str | Path = RUNS,
    output: str | Path | None = None,
    limit: int | None = None,
    images: int = SHOWN,
    engines: bool | Sequence[Backend] = True,
    on_progress: OnProgress = log_progress,
    key: str | None = None,
    arch: str | None = None,
) -> Report | FileReport:
    """Measure a run or a deployed file and write an HTML page about it, as ``mgq report`` does; ``.page`` of the result
    is its path.

    ``run`` is the folder of a run, or its name under ``save``; by default the newest one there. It may be a deployed
    file, too: that needs no MegEngine. The networks are measured on the labelled pictures in ``data``, by default on
    those that the run was measured on, or on ``limit`` of them, evenly spread. ``checkpoint`` holds the float network
    to compare with, where the run no longer has it; ``key`` chooses one of several in it. ``images``: the number of
    images shown, whose answer int8 changed, or, of a file, whose answer is wrong. ``arch``: the architecture that the
    run or the file must have. ``engines``: whether backends are compared, or which. ``output`` is by default
    ``report.html`` in the run's folder, and ``FILE.report.html`` beside a file.

    Raises InputError where there is no such run or file, the page cannot be written, ``data`` is no labelled set, or
    its classes are not the network's; for a run where MegEngine is not installed.
    """
    options = ReportOptions(
        run=run,
        data=as_path(data),
        checkpoint=as_path(checkpoint),
        save=Path(save),
        output=as_path(output),
        limit=limit,
        images=images,
        engines=engines,
        key=key,
        arch=arch,
    )
    return write_report(options, on_progress)


def write_report(options: ReportOptions, on_progress: OnProgress = log_progress) -> Report | FileReport:
    """As :func:`report`, with all options in one object."""
    file = options.find_file()
    if file is not None:
        from mgq.reports.file_report import report_file

        return report_file(file, options, on_progress)
    load_megengine()
    from mgq.reports.run_report import report_run

    return report_run(options, on_progress)


def as_path(text: str | Path | None) -> Path | None:
    return None if text is None else Path(text)

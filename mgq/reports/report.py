"""``mgq report`` as a call: one page about a run or a deployed file. Reading it imports no MegEngine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mgq.deprecation import accept_old_keywords
from mgq.errors import InputError, printable
from mgq.events import OnProgress, log_progress
from mgq.export.formats import format_of
from mgq.machine import refuse_without_megengine
from mgq.reports.measurements import SHOWN
from mgq.runtime.registry import BACKENDS, Backend

if TYPE_CHECKING:
    from mgq.reports.file_report import FileReport
    from mgq.reports.run_report import Report


@accept_old_keywords(pictures="images")
def report(
    run: str | Path | None = None,
    data: str | Path | None = None,
    checkpoint: str | Path | None = None,
    save: str | Path = "runs",
    output: str | Path | None = None,
    limit: int | None = None,
    images: int = SHOWN,
    engines: bool | Sequence[Backend] = True,
    on_progress: OnProgress = log_progress,
    key: str | None = None,
    arch: str | None = None,
) -> Report | FileReport:
    """Measure a run or a deployed file anew and write the HTML page about it, as ``mgq report`` does; where it is, is
    ``.page``.

    ``run`` is the folder of a run, or its name under ``save``; by default the newest one there. It may be a deployed
    file, too: that needs no MegEngine. The networks are measured on the labelled pictures in ``data``, by default on
    those that the run was measured on, or on ``limit`` of them, evenly spread. ``checkpoint`` holds the float network
    to compare with where the run does not know it any more; ``key`` chooses one of several in it. ``images`` is how
    many pictures are shown: those that int8 answers otherwise, of a file those that it answers wrong. ``arch``
    is the architecture that the run or the file has to be of. ``engines``:
    whether engines are compared, too, or which. ``output`` is by default ``report.html`` in the run's folder, and
    ``FILE.report.html`` beside a file.

    Raises InputError where there is no such run or file, the page cannot be written, ``data`` is no labelled set, or
    its classes are not the network's; for a run where MegEngine is not installed.
    """
    if limit is not None and limit < 1:
        raise InputError(f"--limit {limit} is too small: give at least 1")
    if images < 0:
        raise InputError(f"--pictures {images} is not possible: give 0 or more")
    place = Path(output) if output is not None else None
    file = find_file(run, checkpoint, key)
    if file is not None:
        from mgq.reports.file_report import report_file

        shown = BACKENDS if engines is True else engines or ()
        return report_file(
            file, Path(data) if data is not None else None, place, limit, images, shown, on_progress, arch
        )
    refuse_without_megengine()
    from mgq.reports.run_report import report_run

    return report_run(run, data, checkpoint, save, place, limit, images, engines, on_progress, key, arch)


def find_file(run: str | Path | None, checkpoint: str | Path | None = None, key: str | None = None) -> Path | None:
    """The deployed file that these words name, ``checkpoint`` only without a ``run``; None where they name none.

    Raises InputError where it cannot be read, another program wrote it, or words are said that belong to a run.
    """
    named = run if run is not None else checkpoint
    path = Path(named) if named is not None else None
    if path is None or format_of(path) is None or path.is_dir():
        return None
    if path.suffix.lower() == ".onnx":
        from mgq.export.onnx.foreign_file import is_foreign

        if is_foreign(path):
            if run is None:
                return None  # it is a float network to compare a run with
            raise InputError(
                f"{printable(path)} was written by another program: `mgq calibrate -c {printable(path)} -d PHOTOS` "
                "makes an int8 file and a run of it"
            )
    for option, value in (("-c", checkpoint if run is not None else None), ("--key", key)):
        if value is not None:
            raise InputError(f"{printable(path)} is a finished file: leave out {option}")
    return path

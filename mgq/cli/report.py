"""``mgq report``: a run on one page that opens off line."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mgq.cli.import_options import NONE_GIVEN, ImportOptions
from mgq.cli.shared_options import RUNS, AsJson, KeyName, LabelledData, Limit, Save, prepare_megengine

if TYPE_CHECKING:
    from mgq.reports.report import Report


def report(
    run: Annotated[
        str | None, typer.Argument(help="Folder of a run, or its name.", show_default="the newest run")
    ] = None,
    data: LabelledData = None,
    checkpoint: Annotated[
        Path | None, typer.Option("-c", "--checkpoint", help="The float network to compare with, if it was moved.")
    ] = None,
    key: KeyName = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="The page to write.", show_default="report.html in the run")
    ] = None,
    limit: Limit = None,
    images: Annotated[int, typer.Option("--pictures", help="Pictures shown whose answer int8 changes.")] = 24,
    engines: Annotated[bool, typer.Option("--engines/--no-engines", help="Measure the installed engines, too.")] = True,
    save: Save = RUNS,
    as_json: AsJson = False,
    imported: ImportOptions = NONE_GIVEN,
) -> None:
    """Write one HTML page about a run.

    It shows accuracy, training, changed answers and engines. The networks are measured anew, on the pictures that the
    run was measured on or those of -d. The page needs no other file and no network, so it can be kept and sent.

    \b
    Examples:
      mgq report
      mgq report resnet18.qat -d flowers
      mgq report efficientnet_lite0.calibration --limit 200 --no-engines
    """
    from mgq.cli.console import progress

    checkpoint = prepare_megengine(checkpoint, deployed=False, key=key, save=save, wish=imported.wish())
    from mgq.reports import report as reports

    with progress() as on_progress:
        written = reports.report(run, data, checkpoint, save, output, limit, images, engines, on_progress, key)
    if as_json:
        sys.stdout.write(json.dumps(written.to_json()) + "\n")
    else:
        show_report(written)


def show_report(written: Report) -> None:
    """Print what is missing, the figures in a line or two, and where the page is."""
    from mgq.cli.console import note, say

    for line in written.missing:
        note(line)
    for line in written.summary():
        say(line)
    size = written.page.stat().st_size / 1e6
    say(f"page: {written.page} ({size:.1f} MB)")

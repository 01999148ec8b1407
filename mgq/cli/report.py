"""``mgq report``: a run, or a deployed file, on one page that opens off line."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mgq.cli.import_options import NONE_GIVEN, ImportOptions
from mgq.cli.shared_options import (
    RUNS,
    Arch,
    AsJson,
    KeyName,
    LabelledData,
    Limit,
    Save,
    prepare_megengine,
    take_checkpoint,
)

if TYPE_CHECKING:
    from mgq.reports.file_report import FileReport
    from mgq.reports.run_report import Report


def report(
    run: Annotated[
        str | None,
        typer.Argument(help="Folder of a run, or its name; or a deployed file.", show_default="the newest run"),
    ] = None,
    data: LabelledData = None,
    arch: Arch = None,
    checkpoint: Annotated[
        Path | None, typer.Option("-c", "--checkpoint", help="The float network to compare with, if it was moved.")
    ] = None,
    key: KeyName = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o", "--output", help="The page to write.", show_default="report.html in the run; FILE.report.html"
        ),
    ] = None,
    limit: Limit = None,
    images: Annotated[
        int, typer.Option("--pictures", help="Pictures shown whose answer int8 changes; of a file, wrong ones.")
    ] = 24,
    engines: Annotated[bool, typer.Option("--engines/--no-engines", help="Measure the installed engines, too.")] = True,
    save: Save = RUNS,
    as_json: AsJson = False,
    imported: ImportOptions = NONE_GIVEN,
) -> None:
    """Write one HTML page about a run or a deployed file.

    It shows accuracy, training, changed answers and engines. The networks are measured anew, on the pictures that the
    run was measured on or those of -d. The page needs no other file and no network, so it can be kept and sent. For a
    deployed file, .onnx or native, MegEngine is not needed.

    \b
    Examples:
      mgq report
      mgq report resnet18.qat -d flowers
      mgq report efficientnet_lite0.calibration --limit 200 --no-engines
      mgq report network.onnx -d photos
    """
    from mgq.cli.console import progress
    from mgq.reports import report as reports

    file = reports.find_file(run, checkpoint, key)
    if file is None:
        checkpoint = prepare_megengine(checkpoint, deployed=False, key=key, save=save, wish=imported.wish())
    else:
        prepare_file(file, imported)

    with progress() as on_progress:
        written = reports.report(run, data, checkpoint, save, output, limit, images, engines, on_progress, key, arch)
    if as_json:
        sys.stdout.write(json.dumps(written.to_json()) + "\n")
    else:
        show_report(written)


def prepare_file(file: Path, imported: ImportOptions) -> None:
    """Import MegEngine, quietly, where it runs the deployed ``file``. Raises InputError for options of other files."""
    from mgq.export.formats import format_of
    from mgq.quantization.option_names import MEGENGINE
    from mgq.system.megengine_start import import_megengine

    take_checkpoint(file, wish=imported.wish())
    if format_of(file) == MEGENGINE:
        import_megengine()


def show_report(written: Report | FileReport) -> None:
    """Print what is missing, the figures in a line or two, and where the page is."""
    from mgq.cli.console import note, say

    for line in written.missing:
        note(line)
    for line in written.summary():
        say(line)
    size = written.page.stat().st_size / 1e6
    say(f"page: {written.page} ({size:.1f} MB)")

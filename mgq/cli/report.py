"""``mgq report``: writes an HTML page about a run or a deployed file."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mgq.cli.import_options import ImportOptions
from mgq.cli.option_needs import OF_IMPORT, OF_RUNS, OF_SEVERAL_NETWORKS
from mgq.cli.shared_options import (
    Arch,
    AsJson,
    KeyName,
    LabelledData,
    Limit,
    Save,
    prepare_megengine,
    take_checkpoint,
)
from mgq.engine.classifier.network_options import RUNS
from mgq.export.formats import format_of

if TYPE_CHECKING:
    from mgq.reports.contents import FileReport, Report


@dataclass(frozen=True, kw_only=True)
class ReportCommand(ImportOptions):
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

    run: Annotated[
        str | None,
        typer.Argument(help="Folder of a run, or its name; or a deployed file.", show_default="the newest run"),
    ] = None
    data: LabelledData = None
    arch: Arch = None
    checkpoint: Annotated[
        Path | None, typer.Option("-c", "--checkpoint", help="The float network to compare with, if it was moved.")
    ] = None
    key: KeyName = None
    output: Annotated[
        Path | None,
        typer.Option(
            "-o", "--output", help="The page to write.", show_default="report.html in the run; FILE.report.html"
        ),
    ] = None
    limit: Limit = None
    images: Annotated[
        int, typer.Option("--pictures", help="Pictures shown whose answer int8 changes; of a file, wrong ones.")
    ] = 24
    engines: Annotated[bool, typer.Option("--engines/--no-engines", help="Measure the installed engines, too.")] = True
    save: Save = RUNS
    as_json: AsJson = False

    needs = (
        replace(OF_SEVERAL_NETWORKS, is_met=lambda command: command.checkpoint is not None or command.names_file()),
        OF_IMPORT,
        OF_RUNS,
    )

    def names_file(self) -> bool:
        """Whether the report is on a deployed file, which says itself what does not go with it."""
        return self.run is not None and format_of(Path(self.run)) is not None

    def execute(self) -> None:
        """Write the page and say where it is."""
        from mgq.cli.console import progress
        from mgq.reports.report import write_report
        from mgq.reports.report_options import ReportOptions

        options = ReportOptions(
            run=self.run,
            data=self.data,
            checkpoint=self.checkpoint,
            save=self.save,
            output=self.output,
            limit=self.limit,
            images=self.images,
            engines=self.engines,
            key=self.key,
            arch=self.arch,
        )
        file = options.find_file()
        if file is None:
            wish = self.import_wish()
            checkpoint = prepare_megengine(self.checkpoint, deployed=False, key=self.key, save=self.save, wish=wish)
            options = replace(options, checkpoint=checkpoint)
        else:
            prepare_file(file)
        with progress() as on_progress:
            written = write_report(options, on_progress)
        if self.as_json:
            sys.stdout.write(json.dumps(written.to_json()) + "\n")
        else:
            show_report(written)


def prepare_file(file: Path) -> None:
    """Import MegEngine, quietly, where it runs the deployed ``file``."""
    from mgq.errors import name_in_errors, printable
    from mgq.quantization.option_names import MEGENGINE
    from mgq.system.megengine_start import import_megengine

    take_checkpoint(file)
    if format_of(file) == MEGENGINE:
        with name_in_errors(printable(file)):
            import_megengine()


def show_report(written: Report | FileReport) -> None:
    """Print what is missing, the figures in a line or two, and where the page is."""
    from mgq.cli.console import note, say
    from mgq.errors import format_size

    for line in written.missing:
        note(line)
    for line in written.summary():
        say(line)
    say(f"page: {written.page} ({format_size(written.page.stat().st_size)})")

"""``mgq analyze``: shows which layers the error of int8 comes from."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mgq.cli.import_options import ImportOptions
from mgq.cli.option_needs import OF_IMPORT, OF_SEVERAL_NETWORKS, OF_ZOO, Need, need_run
from mgq.cli.option_types import COUNT
from mgq.cli.shared_options import (
    Arch,
    AsJson,
    CheckpointFile,
    KeyName,
    Pretrained,
    Save,
    TargetName,
    prepare_megengine,
)
from mgq.engine.classifier.network_options import RUNS
from mgq.errors import plural, printable

if TYPE_CHECKING:
    from rich.table import Table

    from mgq.engine.calibration.analysis import Analysis
    from mgq.ptq.sensitivity import LayerSensitivity, Values


@dataclass(frozen=True, kw_only=True)
class AnalyzeCommand(ImportOptions):
    """Show where the error of int8 comes from, layer by layer.

    Each layer is quantized alone, all others in float, and the answers are compared with float: the worst layers come
    as a table, all of them with histograms as one HTML page. Without pictures it takes those that the run was measured
    on, else the bundled cat.

    \b
    Examples:
      mgq analyze -d flowers
      mgq analyze -a efficientnet_lite0 --pretrained -d imagenet
      mgq analyze photos/ --html report.html --worst 20
    """

    files: Annotated[list[str] | None, typer.Argument(help="Files, folders, globs.")] = None
    data: Annotated[
        Path | None, typer.Option("-d", "--data", help="Folder of pictures; labelled ones show top-1, too.")
    ] = None
    arch: Arch = None
    checkpoint: CheckpointFile = None
    key: KeyName = None
    images: Annotated[
        int, typer.Option("--images", click_type=COUNT, help="Pictures used, spread evenly over all.")
    ] = 32
    worst: Annotated[int, typer.Option("--worst", click_type=COUNT, metavar="N", help="Layers in the table.")] = 10
    html: Annotated[
        Path | None, typer.Option("--html", help="The page to write.", show_default="<arch>.analysis.html")
    ] = None
    target: TargetName = None
    save: Save = RUNS
    pretrained: Pretrained = None
    as_json: AsJson = False

    needs = (
        OF_SEVERAL_NETWORKS,
        OF_IMPORT,
        OF_ZOO,
        need_run(lambda command: ["qat"]),
        Need(("data",), lambda command: not command.files, "is a folder, and pictures were named: give one of them"),
        Need(("worst",), lambda command: not command.as_json, "is for the table: leave it out with --json"),
    )

    def execute(self) -> None:
        """Analyze, write the page, and print the table or the JSON."""
        from mgq.cli.console import note, progress
        from mgq.data.image_sources import expand, refuse_hopeless

        refuse_hopeless(expand(self.files or [], note))
        checkpoint = prepare_megengine(
            self.checkpoint, deployed=False, key=self.key, save=self.save, wish=self.import_wish(), int8=True
        )
        from mgq.engine.calibration import analysis
        from mgq.reports.analysis_page import write_page
        from mgq.reports.html import check_page_path

        check_page_path(self.html or Path("analysis.html"))
        with progress() as on_progress:
            found = analysis.analyze(
                data=self.data,
                files=self.files or [],
                arch=self.arch,
                checkpoint=checkpoint,
                save=self.save,
                pretrained=self.pretrained or False,
                target=self.target,
                images=self.images,
                on_progress=on_progress,
                on_message=note,
                key=self.key,
            )
        for remark in [*found.remarks, *found.images.problems]:
            note(remark)
        page = self.html or Path(f"{found.classifier.spec.name}.analysis.html")
        write_page(found, page)
        if self.as_json:
            sys.stdout.write(json.dumps({**found.to_json(), "page": str(page)}) + "\n")
        else:
            show_analysis(found, self.worst, page)


def show_analysis(found: Analysis, worst: int, page: Path) -> None:
    """Print the conditions, the figures of the whole network, the worst layers and the page's path. Fits 80 columns."""
    from mgq.cli.console import out, say, show_table
    from mgq.engine.calibration.analysis import format_decibels, format_points

    classifier, result = found.classifier, found.found
    head = f"{classifier.spec.name}, target {classifier.target.name}\nweights: {classifier.origin}"
    head += f"\npictures: {result.images} of {found.images.name}"
    say(head, style="dim")
    whole = (
        f"all {plural(len(result.layers), 'layer')} in int8: logits {format_decibels(result.whole.logit_snr, ' dB')}, "
    )
    whole += f"{result.whole.same:.1f} % same answers"
    if result.float_top1 is not None:
        whole += (
            f"\ntop-1 {format_points(result.whole)} points, from {result.float_top1:.1f} ±{found.float_error:.1f} %"
        )
    say(whole)
    for line in calibration_lines(found.calibration):
        say(line)
    out.print()
    show_table(table_of(result.worst(worst), result.float_top1 is not None))
    out.print()
    legend = (
        "Each layer alone in int8, all others float, compared with float. Logits, weights, outputs: signal to noise, "
        "less is worse. Median: how much of the range of the weights the median channel uses; channel: the one that "
        "sets it."
    )
    legend += " ± one standard error." if result.float_top1 is not None else ""
    out.print(legend, style="dim", markup=False)
    say(f"page: {page}")


def calibration_lines(calibration: Mapping[str, Any]) -> list[str]:
    """One line for each candidate of the calibration, the best first; none where the checkpoint does not say."""
    if not calibration.get("tried"):
        return []
    kind = "held back" if calibration["held_back"] else "that it was fitted to"
    lines = [f"calibration, logits on {plural(calibration['judged_on'], 'picture')} {kind}:"]
    for trial in sorted(calibration["tried"], key=lambda trial: -float(trial["snr"])):
        kept = "  (kept)" if trial["steps"] == calibration["steps"] else ""
        lines.append(f"  {trial['snr']:6.1f} dB  {', '.join(trial['steps'])}{kept}")
    return lines


def table_of(layers: list[LayerSensitivity], labelled: bool) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from mgq.engine.calibration.analysis import format_decibels, format_points

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("layer", overflow="fold")
    heads = ["logits\ndB", "same\n%", "weights\ndB", "\nmedian", "\nchannel", "outputs\ndB"]
    if labelled:
        heads.insert(2, "top-1\npoints")
    for head in heads:
        table.add_column(head, justify="right", no_wrap=True)
    for layer in layers:
        cells = [format_decibels(layer.alone.logit_snr), f"{layer.alone.same:.1f}"]
        cells += [format_points(layer.alone)] if labelled else []
        cells += weight_cells(layer.weights)
        cells.append(format_decibels(layer.activations.snr if layer.activations is not None else None))
        table.add_row(Text(printable(layer.name)), *cells)
    return table


def weight_cells(weights: Values | None) -> list[str]:
    from mgq.engine.calibration.analysis import format_decibels

    if weights is None:
        return ["-", "-", "-"]
    channel = str(weights.find_dominant_channels(1)[0]) if weights.find_dominant_channels(1) else "-"
    return [format_decibels(weights.snr), f"{weights.median_share:.0%}", channel]

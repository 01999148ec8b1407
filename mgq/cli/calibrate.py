"""``mgq calibrate``: post-training quantization, from a few hundred pictures."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mgq.cli.help_layout import OUTPUT
from mgq.cli.import_options import ImportOptions, KeepInput
from mgq.cli.option_needs import OF_IMPORT, OF_SEVERAL_NETWORKS, OF_ZOO, Need
from mgq.cli.option_types import AT_LEAST_ZERO, COUNT, METHOD, QUALITY
from mgq.cli.shared_options import (
    Arch,
    AsJson,
    CheckpointFile,
    ImageSize,
    KeyName,
    Limit,
    MaxBad,
    Pretrained,
    Save,
    TargetName,
    Width,
    Workers,
    find_source,
    prepare_megengine,
)
from mgq.engine.classifier.network_options import RUNS
from mgq.errors import plural
from mgq.machine import keep_freed_memory

if TYPE_CHECKING:
    from mgq.engine.calibration.calibrate_options import CalibrateOptions
    from mgq.engine.calibration.calibration_job import CalibrationResult
    from mgq.engine.calibration.mixed_precision import MixedPrecisionResult


def describe_mixed_precision(mixed: MixedPrecisionResult, max_drop: float) -> str:
    """Which layers keep float weights, what that costs in speed, and whether the wanted accuracy is reached."""
    drop = mixed.comparison.drop
    reached = f"drop {drop:.1f}, at most {max_drop:g} wanted"
    if not mixed.float_layers:
        return f"{reached}: " + ("all layers are int8" if drop <= max_drop else "float weights do not help")
    layers = f"weights kept in float: {', '.join(mixed.float_layers)}"
    cost = f"a picture takes {mixed.slowdown:.2f} times as long as with int8 alone (here, median of rounds in turns)"
    short = "" if drop <= max_drop else "\nthe rest is lost by activations: try another --target, or `mgq qat`"
    return f"{reached}; {layers}\n{cost}{short}"


@dataclass(frozen=True, kw_only=True)
class CalibrateCommand(ImportOptions):
    """Make a float network ready for int8, without training.

    Ranges are measured on pictures, channels equalized, weights rounded by GPTQ, biases corrected. Without any
    pictures, ranges come from the batch norms. Writes a checkpoint that is ready for int8 to <save>/<arch>.calibration,
    with the ranges as text beside it. Where there are more labelled pictures, it compares float, fake-quantized and
    int8 on them, on --limit at most.

    \b
    Examples:
      mgq calibrate photos/
      mgq calibrate -d flowers --quality fast
      mgq calibrate -a efficientnet_lite0 --data-free
      mgq calibrate -c model.onnx -d photos --preprocess tf --labels names.txt
    """

    files: Annotated[list[str] | None, typer.Argument(help="Files, folders, globs.")] = None
    data: Annotated[
        Path | None, typer.Option("-d", "--data", help="Folder of pictures; its train/ where it has one.")
    ] = None
    arch: Arch = None
    checkpoint: CheckpointFile = None
    key: KeyName = None
    images: Annotated[
        int, typer.Option("--images", click_type=COUNT, help="Pictures used, spread evenly over all.")
    ] = 256
    quality: Annotated[
        str,
        typer.Option(
            "--quality", click_type=QUALITY, help="fast or balanced (also named best): how many candidates are tried."
        ),
    ] = "balanced"
    method: Annotated[
        str | None,
        typer.Option(
            "--method",
            click_type=METHOD,
            help="Use one range method: logits, min-max, ema, histogram, mse or easyquant.",
            show_default="by quality",
        ),
    ] = None
    data_free: Annotated[bool, typer.Option("--data-free", help="Use no pictures, only batch-norm statistics.")] = False
    correct_bias: Annotated[
        bool,
        typer.Option("--bias-correction/--no-bias-correction", help="Correct biases for the mean shift of int8."),
    ] = True
    nearest: Annotated[
        bool,
        typer.Option("--nearest", help="Round weights to the nearest integer instead of by GPTQ."),
    ] = False
    max_drop: Annotated[
        float | None,
        typer.Option(
            "--max-drop",
            click_type=AT_LEAST_ZERO,
            help="Keep layers in float until int8 loses no more points of top-1.",
        ),
    ] = None
    target: TargetName = None
    save: Save = RUNS
    limit: Limit = None
    workers: Workers = None
    max_bad: MaxBad = 0.01
    ranges_file: Annotated[
        Path | None,
        typer.Option(
            "--ranges",
            rich_help_panel=OUTPUT,
            help="Write ranges for the float weights to this text file, too; implies --nearest.",
        ),
    ] = None
    about: Annotated[str, typer.Option("--about", help="What the pictures are; kept in the ranges.")] = ""
    pretrained: Pretrained = None
    width: Width = None
    image_size: ImageSize = None
    keep_input: KeepInput = False
    as_json: AsJson = False

    needs = (
        OF_SEVERAL_NETWORKS,
        OF_IMPORT,
        OF_ZOO,
        Need(
            ("files", "images", "quality", "method", "correct_bias", "nearest", "ranges_file", "about", "max_drop"),
            lambda command: not command.data_free,
            "is for calibration on pictures, and --data-free takes none: leave out one of them",
        ),
        Need(
            ("max_drop",),
            lambda command: command.ranges_file is None,
            "mixes precisions, and --ranges knows one: leave out one of them",
        ),
    )

    def execute(self) -> None:
        """Calibrate, and print what came of it."""
        from mgq.cli.console import note, progress
        from mgq.data.image_sources import expand, refuse_hopeless

        options = self.options()
        options.refuse_contradictions()
        refuse_hopeless(expand(self.files or [], note))
        wish = self.import_wish()
        keep_freed_memory()  # before MegEngine starts its threads
        checkpoint = prepare_megengine(self.checkpoint, deployed=False, key=self.key, save=self.save, wish=wish)
        options = replace(options, checkpoint=checkpoint, source=find_source(self.checkpoint, checkpoint))
        with progress() as on_progress:
            from mgq.engine.calibration.calibration_job import run_calibration
            from mgq.events import Callbacks

            result = run_calibration(options, Callbacks(on_progress, note))
        if self.as_json:
            sys.stdout.write(json.dumps(result.to_json()) + "\n")
        else:
            show_calibration(result, options)

    def options(self) -> CalibrateOptions:
        """The options as the Python call takes them."""
        from mgq.engine.calibration.calibrate_options import CalibrateOptions
        from mgq.quantization.option_names import BY_GPTQ, TO_NEAREST

        return CalibrateOptions(
            files=self.files or [],
            data=self.data,
            arch=self.arch,
            checkpoint=self.checkpoint,
            key=self.key,
            images=self.images,
            preset=self.quality,
            method=self.method,
            data_free=self.data_free,
            correct_bias=self.correct_bias,
            weight_rounding=TO_NEAREST if self.nearest else BY_GPTQ,
            max_drop=self.max_drop,
            target=self.target,
            save=self.save,
            limit=self.limit,
            workers=self.workers,
            max_bad=self.max_bad,
            ranges_file=self.ranges_file,
            about=self.about,
            pretrained=self.pretrained or False,
            width=self.width,
            image_size=self.image_size,
            keep_input=self.keep_input,
        )


def show_calibration(result: CalibrationResult, options: CalibrateOptions) -> None:
    """Print what was calibrated, what it costs in accuracy, and where the files are."""
    from mgq.cli.console import note, say, show_table

    found = result.calibration
    say(
        f"{found.classifier.spec.name}: ranges of {plural(len(found.ranges.ranges), 'layer')} from "
        f"{plural(found.used, 'picture') if found.used else 'no pictures'} by {found.ranges.observer}, "
        f"target {found.ranges.target}, "
        f"weights: {result.weights}"
    )
    comparison = result.comparison
    if comparison is not None:
        from mgq.cli.training import agreements, table_of

        show_table(table_of(comparison))
        say(
            f"measured on {comparison.images} other pictures of {result.images_of} (top-1 ± "
            f"{comparison.normal.top1_error:.1f})\n{agreements(comparison)}"
        )
        if result.mixed is not None and options.max_drop is not None:
            say(describe_mixed_precision(result.mixed, options.max_drop))
    elif result.why_not:
        note(f"accuracy was not measured: {result.why_not}")
    if result.deployment is not None:
        from mgq.cli.deployment_table import show_deployment

        show_deployment(result.deployment)
    say(f"checkpoint: {result.checkpoint}" + (f"\nranges: {options.ranges_file}" if options.ranges_file else ""))

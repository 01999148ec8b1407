"""``mgq calibrate``: activation ranges from a few hundred pictures, for int8 without training."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mgq.cli.help_layout import OUTPUT
from mgq.cli.import_options import NONE_GIVEN, ImportOptions, KeepInput
from mgq.cli.option_types import AT_LEAST_ZERO, COUNT, METHOD, QUALITY
from mgq.cli.shared_options import (
    RUNS,
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
    prepare_megengine,
)

if TYPE_CHECKING:
    from mgq.engine.calibration.calibrate_options import CalibrateOptions
    from mgq.engine.calibration.calibration_job import CalibrationResult
    from mgq.engine.calibration.mixed_precision import MixedPrecisionResult


def describe_mixed_precision(mixed: MixedPrecisionResult, max_drop: float) -> str:
    """What is kept in float, what that costs, and whether it is enough."""
    drop = mixed.comparison.drop
    reached = f"drop {drop:.1f}, at most {max_drop:g} wanted"
    if not mixed.float_layers:
        return f"{reached}: " + ("all layers are int8" if drop <= max_drop else "float weights do not help")
    layers = f"weights kept in float: {', '.join(mixed.float_layers)}"
    cost = f"a picture takes {mixed.slowdown:.2f} times as long as with int8 alone (here, median of rounds in turns)"
    short = "" if drop <= max_drop else "\nthe rest is lost by activations: try another --target, or `mgq qat`"
    return f"{reached}; {layers}\n{cost}{short}"


def calibrate(
    files: Annotated[list[str] | None, typer.Argument(help="Files, folders, globs.")] = None,
    data: Annotated[
        Path | None, typer.Option("-d", "--data", help="Folder of pictures; its train/ where it has one.")
    ] = None,
    arch: Arch = None,
    checkpoint: CheckpointFile = None,
    key: KeyName = None,
    images: Annotated[
        int, typer.Option("--images", click_type=COUNT, help="Pictures used, spread evenly over all.")
    ] = 256,
    quality: Annotated[
        str,
        typer.Option("--quality", click_type=QUALITY, help="fast or balanced: how many candidates are tried."),
    ] = "balanced",
    method: Annotated[
        str | None,
        typer.Option(
            "--method",
            click_type=METHOD,
            help="Use one range method: logits, min-max, ema, histogram, mse or easyquant.",
            show_default="by quality",
        ),
    ] = None,
    data_free: Annotated[
        bool, typer.Option("--data-free", help="Use no pictures, only batch-norm statistics.")
    ] = False,
    correct_bias: Annotated[
        bool,
        typer.Option("--bias-correction/--no-bias-correction", help="Correct biases for the mean shift of int8."),
    ] = True,
    nearest: Annotated[
        bool,
        typer.Option("--nearest", help="Round weights to the nearest integer instead of by GPTQ."),
    ] = False,
    max_drop: Annotated[
        float | None,
        typer.Option(
            "--max-drop",
            click_type=AT_LEAST_ZERO,
            help="Keep layers in float until int8 loses no more points of top-1.",
        ),
    ] = None,
    target: TargetName = None,
    save: Save = RUNS,
    limit: Limit = None,
    workers: Workers = None,
    max_bad: MaxBad = 0.01,
    ranges_file: Annotated[
        Path | None,
        typer.Option(
            "--ranges",
            rich_help_panel=OUTPUT,
            help="Write ranges for the float weights to this text file, too; implies --nearest.",
        ),
    ] = None,
    about: Annotated[str, typer.Option("--about", help="What the pictures are; kept in the ranges.")] = "",
    pretrained: Pretrained = None,
    width: Width = None,
    image_size: ImageSize = None,
    keep_input: KeepInput = False,
    as_json: AsJson = False,
    imported: ImportOptions = NONE_GIVEN,
) -> None:
    """Make a float network ready for int8, without training.

    Ranges are measured on pictures, channels equalized, weights rounded so that errors make up for each other, biases
    corrected. Without any pictures, ranges come from the batch norms. Writes a checkpoint that is ready for int8
    to <save>/<arch>.calibration, with the ranges as text beside it. Where there are more labelled pictures, it
    compares float, fake-quantized and int8 on them (--limit so many).

    \b
    Examples:
      mgq calibrate photos/
      mgq calibrate -d flowers --quality best
      mgq calibrate -a efficientnet_lite0 --data-free
      mgq calibrate -c model.onnx -d photos --preprocess tf --labels names.txt
    """
    from mgq.cli.console import note, progress
    from mgq.data.image_sources import expand, refuse_hopeless
    from mgq.engine.calibration.calibrate_options import CalibrateOptions
    from mgq.quantization.option_names import BY_GPTQ, TO_NEAREST

    options = CalibrateOptions(
        files=files or [],
        data=data,
        arch=arch,
        checkpoint=checkpoint,
        key=key,
        images=images,
        preset=quality,
        method=method,
        data_free=data_free,
        correct_bias=correct_bias,
        weight_rounding=TO_NEAREST if nearest else BY_GPTQ,
        max_drop=max_drop,
        target=target,
        save=save,
        limit=limit,
        workers=workers,
        max_bad=max_bad,
        ranges_file=ranges_file,
        about=about,
        pretrained=pretrained or False,
        width=width,
        image_size=image_size,
        keep_input=keep_input,
    )
    options.refuse_contradictions()
    refuse_hopeless(expand(files or [], note))
    wish = imported.wish()
    checkpoint = prepare_megengine(checkpoint, deployed=False, key=key, save=save, wish=wish)
    options = replace(options, checkpoint=checkpoint)
    with progress() as on_progress:
        from mgq.engine.calibration.calibration_job import run_calibration
        from mgq.events import Callbacks

        result = run_calibration(options, Callbacks(on_progress, note))
    if as_json:
        sys.stdout.write(json.dumps(result.to_json()) + "\n")
    else:
        show_calibration(result, options)


def show_calibration(result: CalibrationResult, options: CalibrateOptions) -> None:
    """Print what was calibrated, what it costs in accuracy, and where it lies."""
    from mgq.cli.console import note, say, show_table

    found = result.calibration
    say(
        f"{found.classifier.spec.name}: ranges of {len(found.ranges.ranges)} layers from "
        f"{found.used or 'no'} pictures by {found.ranges.observer}, target {found.ranges.target}, "
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

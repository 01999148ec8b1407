"""``mgq calibrate``: activation ranges from a few hundred pictures, for int8 without training."""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mgq.cli.help_layout import OUTPUT
from mgq.cli.import_options import Labels, Mean, Order, Preprocess, Size, Std, wish_of
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
    find_arch,
    open_network,
    prepare_megengine,
)

if TYPE_CHECKING:
    from mgq.engine.calibration.mixed_precision import MixedPrecisionResult
    from mgq.engine.classifier.deployment import Deployment

WITHOUT = "; `mgq calibrate FOLDER` or -d FOLDER would measure them"


def show_deployment(deployment: Deployment) -> None:
    """The int8 file beside a float one, in each engine here; where it is slower, and what to do then."""
    from rich import box
    from rich.table import Table

    from mgq.cli.console import note, say, show_table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("engine", no_wrap=True)
    for heading in ("float ms", "int8 ms", "faster", "same answer", "logits"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in deployment.rows:
        floats, faster = ("", "") if row.float_ms is None else (f"{row.float_ms:.2f}", f"{row.speedup:.2f}x")
        cells = (floats, f"{row.int8_ms:.2f}", faster, f"{row.same:.1f} %", f"{row.snr:.1f} dB")
        table.add_row(f"{row.engine} {row.version}", *cells)
    show_table(table)
    cores = "core" if deployment.threads == 1 else "cores"
    say(
        f"one picture at a time on {deployment.threads} {cores}, {deployment.images} pictures compared; "
        f"{deployment.float_bytes / 1e6:.1f} MB float, {deployment.int8_bytes / 1e6:.1f} MB int8"
    )
    if deployment.slower:
        engines = " and ".join(deployment.slower)
        note(f"int8 is slower than float in {engines}: run the float file there (`mgq dump -m normal`)")
    if deployment.rows and len(deployment.slower) == len(deployment.rows):
        note(f"not done: {deployment.path} is slower than float in every engine here, and only smaller")
    else:
        say(f"int8 file: {deployment.path}")


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
        typer.Option("--quality", click_type=QUALITY, help="fast or balanced: how much is tried."),
    ] = "balanced",
    method: Annotated[
        str | None,
        typer.Option(
            "--method",
            click_type=METHOD,
            help="Ranges by one way alone: logits, min-max, ema, histogram, mse or easyquant.",
            show_default="by quality",
        ),
    ] = None,
    data_free: Annotated[
        bool, typer.Option("--data-free", help="Look at no pictures: believe the batch norms.")
    ] = False,
    correct_bias: Annotated[
        bool,
        typer.Option("--bias-correction/--no-bias-correction", help="Take what int8 shifts on average out of biases."),
    ] = True,
    nearest: Annotated[
        bool,
        typer.Option(
            "--nearest", help="Round weights to the nearest integer, not so that errors make up for each other."
        ),
    ] = False,
    max_drop: Annotated[
        float | None,
        typer.Option(
            "--max-drop",
            click_type=AT_LEAST_ZERO,
            help="Keep weights of layers in float until int8 loses no more points of top-1.",
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
    as_json: AsJson = False,
    preprocess: Preprocess = None,
    mean: Mean = None,
    std: Std = None,
    rgb: Order = None,
    size: Size = None,
    labels: Labels = None,
) -> None:
    """Make a float network ready for int8, without training.

    Ranges are measured on pictures, channels equalized, weights rounded so that errors make up for each other, biases
    corrected. Without any pictures at hand, all comes from the batch norms. Writes a checkpoint that is ready for int8
    to <save>/<arch>.calibration, with the ranges as text beside it. Where there are labelled pictures besides, it
    compares float, fake-quantized and int8 on them (--limit so many).

    \b
    Examples:
      mgq calibrate photos/
      mgq calibrate -d flowers --quality best
      mgq calibrate -a efficientnet_lite0 --data-free
      mgq calibrate -c resnet18.pkl -d imagenet --images 500 --method mse
      mgq calibrate -c model.onnx -d photos --preprocess tf --labels names.txt
    """
    from mgq.cli.console import duration, note, progress, say, show_table
    from mgq.data.image_sources import expand, refuse_hopeless
    from mgq.errors import InputError
    from mgq.io.atomic import ensure_writable_folder

    if data_free and (files or method or nearest or ranges_file is not None):
        raise InputError("--data-free looks at no pictures: leave out FILES, --method, --nearest and --ranges")
    if max_drop is not None and (data_free or ranges_file is not None):
        raise InputError("--max-drop measures on pictures: leave out --data-free and --ranges")
    refuse_hopeless(expand(files or [], note))
    wish = wish_of(preprocess, mean, std, rgb, size, labels)
    checkpoint = prepare_megengine(checkpoint, deployed=False, key=key, save=save, wish=wish)
    arch = arch or (None if checkpoint or pretrained else find_arch(save, "normal"))
    words = (arch, checkpoint, "normal", save, pretrained, None, width, image_size)
    with progress() as on_progress:
        classifier = open_network(*words, on_progress, key=key)
        from mgq.data.datasets import subset
        from mgq.engine.calibration.calibration_images import find_images_nearby
        from mgq.engine.calibration.calibration_run import calibrate, calibrate_data_free, estimate_seconds
        from mgq.engine.calibration.mixed_precision import rank_layers, search_float_layers
        from mgq.engine.classifier.evaluate import evaluate
        from mgq.engine.classifier.mode_comparison import Comparison, compare_modes
        from mgq.engine.classifier.open import Classifier
        from mgq.events import Callbacks
        from mgq.ptq.calibrate import count_images_used
        from mgq.quantization.option_names import BEST
        from mgq.quantization.targets import MEGENGINE, ONNX, get_target

        used = count_images_used(method, images) if method else images
        compensate = not nearest and ranges_file is None  # which would fit the rounded weights alone
        default = ONNX if classifier.spec.is_described else MEGENGINE
        kind = get_target(target or default.name)
        found = find_images_nearby(classifier, files or [], data, 0 if data_free else used, on_progress, note)
        labelled = subset(found.labelled, limit) if limit and found.labelled is not None else found.labelled
        how: dict[str, Any] = {"workers": workers, "max_bad": max_bad}
        callbacks = Callbacks(on_progress, note)
        for folder in (save, ranges_file.absolute().parent if ranges_file is not None else save):
            ensure_writable_folder(folder)  # found out before the work, which takes minutes
        comparison: Comparison | None = None
        mixed: MixedPrecisionResult | None = None
        if data_free or found.sources is None:
            note("no pictures: ranges and corrections follow from the batch norms" + ("" if data_free else WITHOUT))
            result = calibrate_data_free(classifier, kind)
        else:
            number = min(used, len(found.sources))
            seconds = estimate_seconds(classifier, number, quality, method)
            if quality == BEST:
                note("--quality best is balanced now, which tries as much: it will go in the next release")
            note(f"calibrating on {number} pictures, quality {quality}: about {duration(seconds)}")
            how_to = (images, about or found.name, on_progress, method, correct_bias, compensate, kind, quality)
            sources = found.sources
            if max_drop is None:
                result = calibrate(classifier, sources, *how_to, on_message=note)
            elif labelled is None:
                raise InputError(f"--max-drop needs labelled pictures, with -d FOLDER: {found.why_not}")
            else:
                shown, known = labelled, evaluate(classifier, labelled, on_progress=on_progress, **how)

                note_once = functools.cache(note)  # the same pictures come again and again

                def compare(other: Classifier) -> Comparison:
                    return compare_modes(classifier, other, shown, callbacks, known, **how)

                mixed = search_float_layers(
                    max_drop,
                    rank_layers(classifier, kind),
                    lambda float_layers: calibrate(classifier, sources, *how_to, float_layers, note_once),
                    compare,
                )
                result, comparison = mixed.calibration, mixed.comparison
        for problem in result.problems:
            note(problem)
        path = result.write(save)
        if ranges_file is not None:
            result.write_ranges(ranges_file)
        if labelled is not None and comparison is None:
            comparison = compare_modes(classifier, result.classifier, labelled, callbacks, **how)
        deployment = None
        if classifier.spec.is_described and found.sources is not None:
            from mgq.engine.calibration.calibration_images import few_crops
            from mgq.engine.classifier.deployment import deploy

            file = path.parent / f"{classifier.spec.name}.int8.onnx"
            crops = few_crops(classifier, labelled if labelled is not None else found.sources)
            deployment = deploy(classifier, result.classifier, file, crops)
    if as_json:
        document = {
            "arch": result.classifier.spec.name,
            "target": kind.name,
            "method": result.ranges.observer,
            "pictures": result.used,
            "weights": classifier.origin,
            "checkpoint": str(path),
            "comparison": comparison.to_json() if comparison else None,
            "float_layers": list(mixed.float_layers) if mixed else [],
            "slowdown": mixed.slowdown if mixed else 1.0,
            "deployment": deployment.to_json() if deployment else None,
        }
        sys.stdout.write(json.dumps(document) + "\n")
        return
    say(
        f"{classifier.spec.name}: ranges of {len(result.ranges.ranges)} layers from "
        f"{result.used or 'no'} pictures by {result.ranges.observer}, target {kind.name}, "
        f"weights: {classifier.origin}"
    )
    if comparison is not None:
        from mgq.cli.training import agreements, table_of

        show_table(table_of(comparison))
        say(
            f"measured on {comparison.images} other pictures of {found.name} (top-1 ± "
            f"{comparison.normal.top1_error:.1f})\n{agreements(comparison)}"
        )
        if mixed is not None and max_drop is not None:
            say(describe_mixed_precision(mixed, max_drop))
    elif found.why_not:
        note(f"accuracy was not measured: {found.why_not}")
    if deployment is not None:
        show_deployment(deployment)
    say(f"checkpoint: {path}" + (f"\nranges: {ranges_file}" if ranges_file else ""))

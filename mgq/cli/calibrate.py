"""``mgq calibrate``: activation ranges from a few hundred pictures, for int8 without training."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mgq.cli.options import (
    RUNS,
    Arch,
    CheckpointFile,
    ImageSize,
    Pretrained,
    Save,
    Width,
    opened,
)


def calibrate(
    pictures: Annotated[list[str] | None, typer.Argument(help="Files, folders, globs.")] = None,
    data: Annotated[
        Path | None, typer.Option("-d", "--data", help="Folder of pictures; its train/ where it has one.")
    ] = None,
    arch: Arch = None,
    checkpoint: CheckpointFile = None,
    images: Annotated[int, typer.Option("--images", help="Pictures used, spread evenly over all.")] = 256,
    save: Save = RUNS,
    ranges_file: Annotated[
        Path | None, typer.Option("--ranges", help="Write the ranges as text to this file, too.")
    ] = None,
    about: Annotated[str, typer.Option("--about", help="What the pictures are; kept in the ranges.")] = "",
    pretrained: Pretrained = False,
    width: Width = None,
    image_size: ImageSize = None,
) -> None:
    """Measure activation ranges on pictures, for int8.

    Writes a checkpoint that is ready for int8 to <save>/<arch>.calibration, with the ranges as text beside it.

    \b
    Examples:
      mgq calibrate photos/
      mgq calibrate -a resnet18 -c resnet18.pkl -d imagenet --images 500
    """
    from mgq.cli.console import note, out, progress
    from mgq.data.sources import expand
    from mgq.errors import InputError

    folder = data / "train" if data and (data / "train").is_dir() else data
    arguments = [*(pictures or []), *([str(folder)] if folder else [])]
    if not arguments:
        raise InputError("calibration needs pictures: `mgq calibrate FOLDER` or -d FOLDER")
    sources = expand(arguments)
    with progress() as on_progress:
        classifier = opened(arch, checkpoint, "normal", save, pretrained, None, width, image_size, on_progress)
        from mgq.engine.calibration import calibrated

        result = calibrated(classifier, sources, images, about, on_progress)
    for problem in result.problems:
        note(problem)
    path = result.write(save)
    if ranges_file is not None:
        result.write_ranges(ranges_file)
    out.print(
        f"{classifier.spec.name}: ranges of {len(result.ranges.ranges)} layers from {result.used} pictures, "
        f"weights: {classifier.origin}\ncheckpoint: {path}" + (f"\nranges: {ranges_file}" if ranges_file else ""),
        markup=False,
        soft_wrap=True,
    )

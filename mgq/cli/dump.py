"""``mgq dump``: the network as a file to deploy."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mgq.cli.options import (
    RUNS,
    Arch,
    CheckpointFile,
    ImageSize,
    ModeName,
    Pretrained,
    Ranges,
    Save,
    Width,
    opened,
)

if TYPE_CHECKING:
    from rich.console import Console

    from mgq.engine.networks import Classifier

SUFFIX = ".megengine"


def dump(
    arch: Arch = None,
    checkpoint: CheckpointFile = None,
    mode: ModeName = "quantized",
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="File to write; <arch>.<mode>.megengine by default.")
    ] = None,
    input_type: Annotated[
        str, typer.Option("--input", help="What the file takes: uint8 pixels, int8 or float32 pixels minus 128.")
    ] = "uint8",
    batch: Annotated[int, typer.Option("--batch", help="Pictures a run.")] = 1,
    save: Save = RUNS,
    pretrained: Pretrained = False,
    ranges: Ranges = None,
    width: Width = None,
    image_size: ImageSize = None,
) -> None:
    """Write a .megengine file that takes raw pixels.

    It is for MegEngine and MegEngine Lite. After writing it is loaded again and must answer to the bit as the
    network in memory.

    \b
    Examples:
      mgq dump
      mgq dump -a resnet18 -c resnet18.safetensors -m normal -o resnet18.megengine
    """
    from mgq.cli.console import out, progress

    with progress() as on_progress:
        classifier = opened(arch, checkpoint, mode, save, pretrained, ranges, width, image_size, on_progress)
    path = output or default_path(classifier, Path())
    written(classifier, path, input_type, batch, out)
    if mode == "quantized":
        with progress() as on_progress:
            other = opened(arch, checkpoint, "normal", save, pretrained, None, width, image_size, on_progress)
        show_float_size(other, path, input_type, batch, out)


def default_path(classifier: Classifier, folder: Path) -> Path:
    return folder / f"{classifier.spec.name}.{classifier.mode.value}{SUFFIX}"


def written(classifier: Classifier, path: Path, input_type: str, batch: int, to: Console) -> None:
    """Write the file and say so."""
    from mgq.engine.dump import dump_classifier

    report = dump_classifier(classifier, path, input_type, batch)
    size = classifier.image_size
    to.print(
        f"{path}: {megabytes(path)}, takes {input_type} ({batch}, 3, {size}, {size}) BGR, "
        f"mode {classifier.mode.value}, weights: {classifier.origin}; "
        f"loaded again in {report.exact_in}, it answers to the bit as the network in memory",
        markup=False,
        soft_wrap=True,
    )


def show_float_size(classifier: Classifier, int8: Path, input_type: str, batch: int, to: Console) -> None:
    """Write the float32 network beside, in a temporary folder, to say what int8 saves."""
    from mgq.engine.dump import dump_classifier

    with tempfile.TemporaryDirectory(prefix="mgq-dump-") as folder:
        path = default_path(classifier, Path(folder))
        dump_classifier(classifier, path, "uint8" if input_type == "uint8" else "float32", batch)
        ratio = path.stat().st_size / int8.stat().st_size
        to.print(f"size: float32 {megabytes(path)}, int8 {megabytes(int8)} ({ratio:.1f} times smaller)")


def megabytes(path: Path) -> str:
    return f"{path.stat().st_size / 1e6:.1f} MB"

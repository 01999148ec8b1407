"""Opens the network that a command's options choose: a deployed file, the built-in one, or one that MegEngine runs.

MegEngine is imported for the last alone.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from mgq.engine.classifier.builtin_file import builtin_file
from mgq.engine.classifier.classifier import Classifier
from mgq.engine.classifier.deployed_files import attach_backend, open_file
from mgq.errors import InputError, name_in_errors, printable
from mgq.events import OnProgress, log_progress
from mgq.export.formats import format_of
from mgq.machine import load_megengine
from mgq.quantization.option_names import MEGENGINE, Mode
from mgq.runtime.registry import AUTO, get_backend

RUNS = Path("runs")


def choose_network(
    arch: str | None = None,
    checkpoint: Path | None = None,
    mode: Mode = Mode.QUANTIZED,
    save: Path = RUNS,
    pretrained: str | None = None,
    ranges: Path | None = None,
    width: float | None = None,
    image_size: int | None = None,
    on_progress: OnProgress = log_progress,
    target: str | None = None,
    engine: str | None = None,
    key: str | None = None,
    start_megengine: Callable[[], None] = load_megengine,
    few: bool = False,
    kept: bool = False,
    threads: int | None = None,
) -> Classifier:
    """The network that these words mean, ready to run.

    ``checkpoint`` may be a deployed file, which ``engine`` runs. Without any words that say otherwise it is the
    built-in network. ``start_megengine`` is called before MegEngine is imported.
    ``few``: no more than a few pictures will be asked about, so that an engine is chosen that starts soon. ``kept``:
    the built-in network may come from the file that is kept of it, which cannot be written again. ``threads``: of a
    file's engine, by default one a core. Other words as for
    :func:`mgq.engine.classifier.open.open_classifier`, which raises what this one does.
    """
    if checkpoint is not None and format_of(checkpoint):
        if key is not None:
            raise InputError(f"{printable(checkpoint)} is a finished file with one network: leave out --key")
        said = {"--target": target, "--ranges": ranges, "--width": width, "--image-size": image_size}
        return open_finished_file(checkpoint, mode, engine, arch, said, start_megengine, few, threads)
    plain = (checkpoint, ranges, width, image_size, key)
    if mode is Mode.QUANTIZED and kept and not any(plain) and target != MEGENGINE and reads_onnx(engine):
        file = builtin_file(arch, save, pretrained, start_megengine, on_progress)
        if file is not None:
            return file.open(engine or AUTO, few, threads)
    start_for(checkpoint, start_megengine)
    from mgq.engine.classifier.open import open_classifier
    from mgq.quantization.activation_ranges import read_ranges

    builder: dict[str, Any] = {} if width is None else {"width": width}
    found = read_ranges(ranges) if ranges else None
    words = (arch, checkpoint, mode, save, pretrained or False, found, builder, image_size, on_progress, target, key)
    classifier = open_classifier(*words)
    return classifier if engine is None else attach_backend(classifier, engine, threads)


def start_for(path: Path | None, start_megengine: Callable[[], None]) -> None:
    """Start MegEngine, which ``path`` needs. Raises InputError, which names it, where it is not installed."""
    if path is None:
        start_megengine()
        return
    with name_in_errors(printable(path)):
        start_megengine()


def open_finished_file(
    path: Path,
    mode: Mode,
    engine: str | None,
    arch: str | None,
    said: dict[str, Any],
    start_megengine: Callable[[], None],
    few: bool,
    threads: int | None,
) -> Classifier:
    """The network in a deployed file, for which nothing of what was ``said`` can be chosen any more."""
    for option, value in said.items():
        if value is not None:
            raise InputError(f"{printable(path)} is a finished file: leave out {option}")
    if format_of(path) == MEGENGINE:
        start_for(path, start_megengine)
    found = open_file(path, engine or AUTO, threads, arch, few)
    if mode is Mode.NORMAL and found.mode is not Mode.NORMAL:
        raise InputError(f"{printable(path)} is int8: leave out -m {mode.value}, or give a float checkpoint")
    return found


def reads_onnx(engine: str | None) -> bool:
    return engine in (None, AUTO) or get_backend(str(engine)).suffix == ".onnx"

"""Opens the network that a command's options choose: a deployed file, the built-in one, or one that MegEngine runs.

MegEngine is imported for the last alone.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from mgq.engine.classifier.builtin_file import BuiltinFile, builtin_file
from mgq.engine.classifier.classifier import Classifier
from mgq.engine.classifier.deployed_files import attach_backend, open_file
from mgq.engine.classifier.network_options import ANY_USAGE, NetworkOptions, Usage
from mgq.errors import InputError, name_in_errors, printable
from mgq.events import OnProgress, log_progress
from mgq.export.formats import format_of
from mgq.machine import load_megengine
from mgq.quantization.option_names import MEGENGINE, Mode
from mgq.runtime.registry import AUTO, get_backend

ANY_NETWORK = NetworkOptions()
MODES_IN_WORDS = {Mode.NORMAL: "float", Mode.QAT: "fake-quantized", Mode.QUANTIZED: "int8"}


def choose_network(
    options: NetworkOptions = ANY_NETWORK,
    mode: Mode | None = None,
    usage: Usage = ANY_USAGE,
    on_progress: OnProgress = log_progress,
    start_megengine: Callable[[], None] = load_megengine,
) -> Classifier:
    """The network that ``options`` choose in ``mode``, ready to run: by default int8, a deployed file as it is.

    ``start_megengine`` is called before MegEngine is imported. Raises InputError as
    :func:`mgq.engine.classifier.open.open_classifier` does, and for a deployed file where an option chooses what
    cannot be chosen any more.
    """
    if options.checkpoint is not None and format_of(options.checkpoint):
        return open_finished_file(options.checkpoint, options, mode, usage, start_megengine)
    mode = mode or Mode.QUANTIZED
    file = find_builtin_file(options, mode, start_megengine, on_progress) if usage.kept else None
    if file is not None:
        return file.open(options.engine or AUTO, usage.few, usage.threads)
    start_for(options.checkpoint, start_megengine)
    from mgq.engine.classifier.open import open_classifier
    from mgq.quantization.activation_ranges import read_ranges

    classifier = open_classifier(
        options.arch,
        options.checkpoint,
        mode,
        options.save,
        options.pretrained or False,
        read_ranges(options.ranges) if options.ranges else None,
        {} if options.width is None else {"width": options.width},
        options.image_size,
        on_progress,
        options.target,
        options.key,
    )
    return classifier if options.engine is None else attach_backend(classifier, options.engine, usage.threads)


def find_builtin_file(
    options: NetworkOptions, mode: Mode, start_megengine: Callable[[], None], on_progress: OnProgress
) -> BuiltinFile | None:
    """The file that is kept of the built-in network, where ``options`` mean that; else None."""
    others = (options.checkpoint, options.ranges, options.width, options.image_size, options.key)
    if mode is not Mode.QUANTIZED or any(others) or options.target == MEGENGINE or not reads_onnx(options.engine):
        return None
    return builtin_file(options.arch, options.save, options.pretrained, start_megengine, on_progress)


def start_for(path: Path | None, start_megengine: Callable[[], None]) -> None:
    """Start MegEngine, which ``path`` needs. Raises InputError, which names it, where it is not installed."""
    if path is None:
        start_megengine()
        return
    with name_in_errors(printable(path)):
        start_megengine()


def open_finished_file(
    path: Path, options: NetworkOptions, mode: Mode | None, usage: Usage, start_megengine: Callable[[], None]
) -> Classifier:
    """The network in a deployed file, of which ``options`` may choose the engine alone."""
    chosen_before = ("key", "pretrained", "target", "ranges", "width", "image_size")
    for name in chosen_before:
        if getattr(options, name) is not None:
            flag = f"--{name.replace('_', '-')}"
            raise InputError(f"{printable(path)} is a finished file: leave out {flag}")
    if format_of(path) == MEGENGINE:
        start_for(path, start_megengine)
    found = open_file(path, options.engine or AUTO, usage.threads, options.arch, usage.few)
    if mode not in (None, found.mode):
        its = MODES_IN_WORDS[found.mode]
        raise InputError(f"{printable(path)} is {its}: leave out -m {mode.value}, or give the checkpoint it is made of")
    return found


def reads_onnx(engine: str | None) -> bool:
    return engine in (None, AUTO) or get_backend(str(engine)).suffix == ".onnx"

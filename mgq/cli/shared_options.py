"""Options that several verbs share."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mgq.cli.option_types import (
    ARCH,
    AT_LEAST_NONE,
    COUNT,
    ENGINE,
    FACTOR,
    FOLDER,
    MODE,
    PIXELS,
    PRETRAINED,
    SHARE,
    TARGET,
)
from mgq.engine.classifier.network_options import ANY_USAGE, RUNS, NetworkOptions, Usage

if TYPE_CHECKING:
    from mgq.engine.classifier.classifier import Classifier
    from mgq.engine.classifier.import_wish import ImportWish
    from mgq.events import OnProgress
    from mgq.quantization.option_names import Mode

Arch = Annotated[
    str | None,
    typer.Option(
        "-a", "--arch", click_type=ARCH, help="Architecture, see `mgq models`; or FILE.py:FUNCTION, which is run."
    ),
]
CheckpointFile = Annotated[
    Path | None,
    typer.Option("-c", "--checkpoint", help="Weights: .safetensors, .pkl of the example, PyTorch .pth; or a dump."),
]
KEY_HELP = "Which network of the file of -c, where it has several, such as state_dict_ema."
KeyName = Annotated[str | None, typer.Option("--key", metavar="NAME", help=KEY_HELP)]


def mode_option(default: bool | str = True) -> Any:
    """``-m``; ``default`` is what is said of its default, where that is not the value itself."""
    said = "normal (float32), qat (fake-quantized) or quantized (int8)."
    return typer.Option("-m", "--mode", click_type=MODE, help=said, show_default=default)


ModeName = Annotated[str, mode_option()]
Save = Annotated[Path, typer.Option("-s", "--save", click_type=FOLDER, help="Folder of the runs.")]
Pretrained = Annotated[
    str | None,
    typer.Option(
        "--pretrained",
        click_type=PRETRAINED,
        help="The zoo's weights, not a run's; a version behind it picks one of several; downloads published ones.",
        show_default=False,
    ),
]
Ranges = Annotated[Path | None, typer.Option("--ranges", help="Activation ranges written by `mgq calibrate`.")]
Width = Annotated[float | None, typer.Option("--width", click_type=FACTOR, help="Width multiplier (mobilenet_v2).")]
ImageSize = Annotated[
    int | None, typer.Option("--image-size", click_type=PIXELS, help="Pixels on a side, a multiple of 32.")
]
LabelledData = Annotated[
    Path | None,
    typer.Option("-d", "--data", help="Labelled pictures: val/<class>/ or <class>/ in this folder."),
]
Workers = Annotated[
    int | None,
    typer.Option("-w", "--workers", click_type=AT_LEAST_NONE, help="Threads that decode pictures; one a core."),
]
Jobs = Annotated[int, typer.Option("--jobs", click_type=COUNT, help="Processes that share the pictures; same result.")]
Limit = Annotated[int | None, typer.Option("--limit", click_type=COUNT, help="Use this many pictures, evenly spread.")]
MaxBad = Annotated[
    float, typer.Option("--max-bad", click_type=SHARE, help="Share of broken pictures that is accepted.")
]
ReportFreq = Annotated[
    int | None,
    typer.Option("--report-freq", click_type=COUNT, help="Print a line every this many batches instead of a bar."),
]
TargetName = Annotated[
    str | None,
    typer.Option(
        "--target",
        click_type=TARGET,
        help="What int8 is for: megengine; onnx (ONNX Runtime, OpenVINO); onnx-avx2 (those without VNNI).",
        show_default=False,
    ),
]
EngineName = Annotated[
    str | None,
    typer.Option(
        "--engine",
        click_type=ENGINE,
        help="Engine that runs it: native, openvino, onnxruntime, lite, or auto, the fastest.",
        show_default=False,
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="JSON on standard output.")]


def find_arch(save: Path, mode: str | None) -> str | None:
    """The architecture of the newest run that can serve ``mode``, or any mode; None without a run."""
    from mgq.engine.classifier.run_lookup import find_newest_arch
    from mgq.quantization.option_names import Mode, parse_mode

    modes = (parse_mode(mode),) if mode else (Mode.QUANTIZED, Mode.NORMAL)
    return next((arch for wanted in modes if (arch := find_newest_arch(save, wanted))), None)


def take_checkpoint(
    checkpoint: Path | None,
    deployed: bool = True,
    key: str | None = None,
    save: Path | None = None,
    wish: ImportWish | None = None,
    int8: bool = False,
) -> Path | None:
    """Raise InputError for a ``checkpoint`` that cannot be read, before anything slow is done.

    ``deployed`` says whether it may be a dumped file, ``key`` which of its networks is meant. The result is
    ``checkpoint`` itself, or what an ONNX file of another program was imported to, under ``save``, as ``wish`` says;
    with ``int8`` it is the newest run that made int8 of that, where there is one.
    """
    from mgq.engine.classifier.file_validation import validate_file
    from mgq.errors import InputError, name_in_errors, printable
    from mgq.export.formats import format_of

    foreign = checkpoint if checkpoint is not None and key is None and is_onnx_of_others(checkpoint) else None
    if foreign is not None:
        from mgq.cli.console import note
        from mgq.system.megengine_start import import_megengine

        with name_in_errors(f"{printable(foreign)}, written by another program"):
            import_megengine()
        from mgq.engine.classifier.import_wish import NO_WISH
        from mgq.engine.classifier.onnx_import import find_int8_of, import_checkpoint

        imported = import_checkpoint(foreign, save or RUNS, wish or NO_WISH, note)
        made = find_int8_of(imported, save or RUNS) if int8 else None
        if made is not None:
            note(f"int8 from {printable(made)}")
        return made or imported
    if checkpoint is not None and not deployed and format_of(checkpoint):
        raise InputError(f"{printable(checkpoint)} is a finished file: give the checkpoint that it was made from")
    if checkpoint is not None:
        validate_file(checkpoint, key)
    return checkpoint


def find_source(given: Path | None, taken: Path | None) -> Path | None:
    """The ``given`` file of -c where it is of another program, so that what was ``taken`` for it is another one."""
    return given if given != taken else None


def prepare_megengine(
    checkpoint: Path | None,
    deployed: bool = True,
    key: str | None = None,
    save: Path | None = None,
    wish: ImportWish | None = None,
    int8: bool = False,
) -> Path | None:
    """As :func:`take_checkpoint`; then import MegEngine, quietly unless in debug mode."""
    from mgq.system.megengine_start import import_megengine

    taken = take_checkpoint(checkpoint, deployed, key, save, wish, int8)
    import_megengine()
    return taken


def is_onnx_of_others(path: Path) -> bool:
    """Whether ``path`` is an ONNX file that another program wrote. Raises InputError where it cannot be read."""
    if path.suffix.lower() != ".onnx":
        return False
    from mgq.export.onnx.foreign_file import is_foreign

    return is_foreign(path)


def with_newest_run(options: NetworkOptions, mode: str | None) -> NetworkOptions:
    """``options``; where nothing in them says which, of the architecture of the newest run that can serve ``mode``."""
    if options.arch or options.checkpoint or options.pretrained:
        return options
    return replace(options, arch=find_arch(options.save, mode))


def tell_of_unused_runs(options: NetworkOptions, mode: Mode) -> None:
    """Say so where the architecture has a float run alone, which ``mode`` passes over for other weights, or where it
    was not chosen and another one has the newest run."""
    from mgq.cli.console import note
    from mgq.engine.classifier.run_lookup import describe_unused_runs

    if options.checkpoint or options.pretrained or options.ranges:
        return
    for line in describe_unused_runs(options.arch, mode, options.save):
        note(line)


def open_network(
    options: NetworkOptions, mode: str | None, on_progress: OnProgress, usage: Usage = ANY_USAGE
) -> Classifier:
    """The network that ``options`` choose, in ``mode`` or, without one, as
    :func:`mgq.engine.classifier.network_choice.choose_network` says; behind :func:`take_checkpoint`. It imports
    MegEngine if that runs it."""
    from mgq.engine.classifier.network_choice import choose_network
    from mgq.quantization.option_names import Mode, parse_mode
    from mgq.system.megengine_start import import_megengine

    wanted = parse_mode(mode) if mode is not None else None
    found = choose_network(options, wanted, usage, on_progress, import_megengine)
    tell_of_unused_runs(options, wanted or Mode.QUANTIZED)
    return found

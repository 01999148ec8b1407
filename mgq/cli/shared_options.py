"""Options that several verbs share."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

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

if TYPE_CHECKING:
    from mgq.engine.classifier.classifier import Classifier
    from mgq.engine.classifier.import_wish import ImportWish
    from mgq.events import OnProgress

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
ModeName = Annotated[
    str,
    typer.Option("-m", "--mode", click_type=MODE, help="normal (float32), qat (fake-quantized) or quantized (int8)."),
]
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
RUNS = Path("runs")
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
    refuse_wish(wish)
    if checkpoint is not None and not deployed and format_of(checkpoint):
        raise InputError(f"{printable(checkpoint)} is a finished file: give the checkpoint that it was made from")
    if checkpoint is None and key is not None:
        raise InputError(f"--key {printable(key)} chooses a network in the file of -c: give one, or leave --key out")
    if checkpoint is not None:
        validate_file(checkpoint, key)
    return checkpoint


def refuse_wish(wish: ImportWish | None) -> None:
    """Raise InputError where import options are given and -c is no ONNX file of another program."""
    from mgq.errors import InputError

    if wish is not None and not wish.is_open:
        options = "--preprocess, --mean, --std, --rgb, --bgr, --size, --labels and --scores"
        raise InputError(f"{options} are for ONNX files of others")


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


@dataclass(frozen=True)
class NetworkOptions:
    """The shared options that choose a network."""

    arch: str | None = None
    checkpoint: Path | None = None
    key: str | None = None
    save: Path = RUNS
    pretrained: str | None = None
    ranges: Path | None = None
    width: float | None = None
    image_size: int | None = None
    target: str | None = None
    engine: str | None = None

    def with_newest_run(self, mode: str | None) -> NetworkOptions:
        """Where nothing else says which, the architecture is that of the newest run that can serve ``mode``."""
        if self.arch or self.checkpoint or self.pretrained:
            return self
        return replace(self, arch=find_arch(self.save, mode))

    def tell_of_unused_run(self, mode: str | None) -> None:
        """Say so where the architecture has a float run alone, which ``mode`` passes over for other weights, or where
        it was not chosen and another one has the newest run."""
        from mgq.cli.console import note
        from mgq.engine.classifier.run_lookup import describe_unused_runs
        from mgq.quantization.option_names import parse_mode

        if self.checkpoint or self.pretrained or self.ranges or mode is None:
            return
        for line in describe_unused_runs(self.arch, parse_mode(mode), self.save):
            note(line)


def open_network(
    options: NetworkOptions,
    mode: str,
    on_progress: OnProgress,
    few: bool = False,
    kept: bool = False,
    threads: int | None = None,
) -> Classifier:
    """The network that ``options`` choose, in ``mode``; behind :func:`take_checkpoint`. It imports MegEngine if that
    runs it. Other words are as for :func:`mgq.engine.classifier.network_choice.choose_network`."""
    from mgq.engine.classifier.network_choice import choose_network
    from mgq.quantization.option_names import parse_mode
    from mgq.system.megengine_start import import_megengine

    found = choose_network(
        arch=options.arch,
        checkpoint=options.checkpoint,
        mode=parse_mode(mode),
        save=options.save,
        pretrained=options.pretrained,
        ranges=options.ranges,
        width=options.width,
        image_size=options.image_size,
        on_progress=on_progress,
        target=options.target,
        engine=options.engine,
        key=options.key,
        start_megengine=import_megengine,
        few=few,
        kept=kept,
        threads=threads,
    )
    options.tell_of_unused_run(mode)
    return found

"""``mgq dump``: writes the network as a file to deploy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from mgq.cli.import_options import KeepInput
from mgq.cli.network_command import NetworkCommand
from mgq.cli.option_needs import Need, need_run, reads_import, refuse_idle_options
from mgq.cli.option_types import BATCH, CPU, FORM, FORMAT, INPUT, NameOption
from mgq.cli.shared_options import (
    ModeName,
    find_source,
    open_network,
    prepare_megengine,
    with_newest_run,
)
from mgq.errors import format_size, plural
from mgq.export.formats import find_format, refuse_format, refuse_words_of_other_formats
from mgq.io.temporary_folders import temporary_folder
from mgq.quantization.option_names import parse_mode

CHECKS = ("logits", "layers", "none")
COMPARED = 32

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from rich.console import Console

    from mgq.engine.classifier.deployment import Deployment
    from mgq.engine.classifier.dump import Dump
    from mgq.engine.classifier.open import Classifier
    from mgq.engine.classifier.parity import LayerParity
    from mgq.events import OnProgress


@dataclass(frozen=True, kw_only=True)
class DumpCommand(NetworkCommand):
    """Write the network as a file to deploy, which takes raw pixels.

    A .megengine file is for MegEngine and MegEngine Lite: it is loaded, and must give the network's answers to the
    bit. An .onnx file is for ONNX Runtime and OpenVINO, and is compared with MegEngine on a picture. A native .so is
    the network as machine code, with a C header beside it: it needs no engine at all.

    \b
    Examples:
      mgq dump
      mgq dump --format onnx
      mgq dump --format native --cpu avx2
      mgq dump -a resnet18 -c resnet18.safetensors -m normal -o resnet18.megengine
    """

    mode: ModeName = "quantized"
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="File to write; <arch>.<mode>.megengine, .onnx or .so by default."),
    ] = None
    kind: Annotated[
        str | None,
        typer.Option(
            "--format",
            click_type=FORMAT,
            help="megengine, onnx or native.",
            show_default="as the file is called, else as the target",
        ),
    ] = None
    input_type: Annotated[
        str,
        typer.Option(
            "--input", click_type=INPUT, help="What the file takes: uint8 pixels; for MegEngine also int8, float32."
        ),
    ] = "uint8"
    check: Annotated[
        str,
        typer.Option(
            "--check",
            click_type=NameOption("check", lambda: CHECKS),
            help="How an .onnx file is compared with MegEngine: logits, layers or none.",
        ),
    ] = "logits"
    data: Annotated[
        Path | None, typer.Option("-d", "--data", help="Pictures to compare on, 32 at most; a cat by default.")
    ] = None
    batch: Annotated[int, typer.Option("--batch", click_type=BATCH, help="Batch size; 0 for any, in ONNX.")] = 1
    cpu: Annotated[
        str | None,
        typer.Option(
            "--cpu", click_type=CPU, help="Processors a native library is for.", show_default="native, this machine's"
        ),
    ] = None
    engine: Annotated[
        str,
        typer.Option(
            "--for", click_type=FORM, help="The engine that an .onnx file is for: any, openvino or onnxruntime."
        ),
    ] = "any"
    tune: Annotated[
        bool, typer.Option("--tune", help="Measure exact rewrites of the .onnx file, and keep what is faster here.")
    ] = False
    keep_input: KeepInput = False

    needs = (
        need_run(lambda command: [command.mode]),
        Need(
            ("check", "data"),
            lambda command: command.kind in (None, "onnx"),
            "is for comparing an .onnx file with MegEngine: pass --format onnx, or leave it out",
        ),
        Need(
            ("tune",),
            lambda command: command.kind in (None, "onnx"),
            "is for .onnx files: pass --format onnx, or leave it out",
        ),
        Need(("batch",), lambda command: command.kind != "native", "is free in a native library: leave it out"),
        Need(
            ("data",),
            lambda command: command.check != "none",
            "is for comparing, and --check none does not: leave out one of them",
        ),
        Need(
            ("check",),
            lambda command: command.check != "layers" or command.mode != "normal",
            "layers compares integers, and -m normal has none: leave out one of them",
        ),
        Need(
            ("engine",),
            lambda command: command.mode != "normal" or command.engine == "any",
            "chooses where int8 is rounded, and -m normal is float: leave out one of them",
        ),
        Need(
            ("keep_input",),
            lambda command: command.mode != "normal",
            "is for int8: the float file with its input is the one that was imported",
        ),
        Need(
            ("batch",),
            lambda command: not command.keep_input,
            "is open, and --keep-input keeps that of the imported file: leave out one of them",
        ),
    )

    def execute(self) -> None:
        """Write the file, compare it with MegEngine, and say what was found: of the file as it is in the end."""
        from mgq.cli.console import out, progress

        self.refuse_contradictions()
        wish = self.import_wish()
        int8 = self.mode != "normal"
        checkpoint = prepare_megengine(self.checkpoint, False, self.key, self.save, wish, int8)
        with progress() as on_progress:
            classifier = self.open(checkpoint, on_progress)
        wanted = self.settle(classifier)
        compared = self.check != "none"
        images = find_images(classifier, self.data) if self.data is not None and compared else None
        dumped = write_file(classifier, wanted, out)
        is_timed = self.mode == "quantized" and dumped.format == "onnx" and classifier.spec.is_described and compared
        source = find_source(self.checkpoint, checkpoint)
        timed = measure_speed(classifier, dumped, images, wanted, source) if is_timed else None
        dumped = replace(dumped, size=dumped.path.stat().st_size)  # written again where an engine runs that sooner
        say_file(classifier, dumped, wanted, out)
        if dumped.format == "onnx" and compared:
            show_parity(classifier, dumped, images, self.check == "layers", out)
            self.note_rounding()
        if self.mode == "quantized" and dumped.format != "native":
            show_float_size(classifier, dumped, wanted, out)
        if timed is not None:
            show_speed(timed, wanted)

    def note_rounding(self) -> None:
        """Say why a file for one engine differs from MegEngine."""
        from mgq.cli.console import note
        from mgq.quantization.option_names import ANY_ENGINE

        if self.engine != ANY_ENGINE:
            note("a file for one engine rounds less than MegEngine's int8 does, so it need not give the same logits")

    def refuse_contradictions(self) -> None:
        """Raise InputError for options that contradict each other, as far as the format can be told from them."""
        from mgq.quantization.option_names import MEGENGINE

        by_target = None if self.target is None else "megengine" if self.target == MEGENGINE else "onnx"
        kind = find_format(self.output, self.kind) or by_target
        if kind is not None:
            refuse_format(kind, parse_mode(self.mode), self.target, reads_import(self))
            self.refuse_words(kind)

    def refuse_words(self, kind: str) -> None:
        """Raise InputError for options that a file of the format ``kind`` has no use for."""
        refuse_idle_options(replace(self, kind=kind))
        refuse_words_of_other_formats(kind, self.input_type, self.batch or None, self.cpu, self.engine, self.keep_input)

    def settle(self, classifier: Classifier) -> FileOptions:
        """What the file is to be, where the network is known. Raises InputError where it cannot be that."""
        from mgq.engine.classifier.dump import format_for
        from mgq.engine.classifier.onnx_import import find_float_input

        wanted = self.make_file_options()._replace(kind=format_for(classifier, self.output, self.kind))
        self.refuse_words(str(wanted.kind))
        if self.keep_input:
            find_float_input(classifier)
        return wanted

    def make_file_options(self) -> FileOptions:
        """What the file is to be."""
        return FileOptions(
            output=self.output,
            kind=self.kind,
            input_type=self.input_type,
            batch=self.batch or None,
            tune=self.tune,
            cpu=self.cpu,
            engine=self.engine,
            keep_input=self.keep_input,
        )

    def open(self, checkpoint: Path | None, on_progress: OnProgress) -> Classifier:
        """Open the network to write; ``checkpoint`` is the file that ``-c`` stands for, after an import."""
        from mgq.engine.classifier.dump import open_for_target

        options = with_newest_run(self.network_options(checkpoint), self.mode)

        def open_for(target: str | None) -> Classifier:
            return open_network(replace(options, target=target), self.mode, on_progress)

        return open_for_target(open_for, self.output, self.kind, self.target)


class FileOptions(NamedTuple):
    """What the file is to be: where (None: a name that says what it is), in what format, and what it takes."""

    output: Path | None = None
    kind: str | None = None
    input_type: str = "uint8"
    batch: int | None = 1
    tune: bool = False
    cpu: str | None = None
    engine: str = "any"
    keep_input: bool = False


def write_file(classifier: Classifier, wanted: FileOptions, to: Console) -> Dump:
    """Write the file, as it is without regard to an engine's speed."""
    from mgq.engine.classifier.dump import dump_classifier, format_for
    from mgq.export.formats import SUFFIXES

    kind = format_for(classifier, wanted.output, wanted.kind)
    path = wanted.output or Path(f"{classifier.spec.name}.{classifier.mode.value}{SUFFIXES[kind]}")
    rewrites: Sequence[str] = ()
    if wanted.tune:
        rewrites = choose_rewrites(classifier, wanted.batch or 1, to)
    return dump_classifier(
        classifier,
        path,
        wanted.input_type,
        wanted.batch,
        kind,
        rewrites,
        wanted.cpu,
        wanted.engine,
        wanted.keep_input,
    )


def say_file(classifier: Classifier, dumped: Dump, wanted: FileOptions, to: Console) -> None:
    """What was written, what it takes and what it was made from."""
    from mgq.cli.console import say

    height, width = classifier.spec.only_size or (classifier.image_size,) * 2
    batch = "N" if dumped.format == "native" or wanted.batch is None else wanted.batch
    takes = dumped.takes or f"{wanted.input_type} ({batch}, 3, {height}, {width}) BGR"
    say(
        f"{dumped.path}: {format_size(dumped.size)}, takes {takes}, "
        f"mode {classifier.mode.value}{target_of(classifier)}, weights: {classifier.origin}; {dumped.checked}",
        to=to,
    )


def choose_rewrites(classifier: Classifier, batch: int, to: Console) -> Sequence[str]:
    """The rewrites that make the file faster on this machine; says what was measured."""
    from mgq.bench.tables import ratio_text
    from mgq.bench.tune import find_fastest, measure_forms, name_of
    from mgq.cli.console import progress, say

    with progress() as on_progress:
        forms = measure_forms(classifier, batch, on_progress)
    if len(forms) == 1:
        say("no rewrite changes this network", to=to)
    else:
        found = ", ".join(f"{name_of(form.rewrites)} {ratio_text(form.speedup)}" for form in forms[1:])
        kept = name_of(find_fastest(forms).rewrites)
        say(f"times as fast as plain in {forms[0].engine} (95 %): {found}; kept: {kept}", to=to)
    return find_fastest(forms).rewrites


def find_images(classifier: Classifier, data: Path) -> npt.NDArray[np.uint8]:
    """Up to ``COMPARED`` of the pictures in ``data``, as the network sees them. Raises InputError without any."""
    from mgq.cli.console import note
    from mgq.data.image_sources import expand
    from mgq.engine.calibration.calibration_run import CalibrationImages, spread_evenly
    from mgq.events import log_progress

    found = CalibrationImages(classifier, spread_evenly(expand([str(data)]), COMPARED), log_progress)
    images = found.all()
    for problem in found.problems:
        note(problem)
    return images


def show_parity(
    classifier: Classifier, dumped: Dump, images: npt.NDArray[np.uint8] | None, layers: bool, to: Console
) -> None:
    """Each installed engine beside MegEngine: equal answers, differences of logits, and on request of layers."""
    from mgq.cli.console import say
    from mgq.engine.classifier.parity import (
        compute_reference,
        list_backends,
        make_views,
        measure_layer_parity,
        measure_parity,
    )

    what = "pictures" if images is not None else "views of the bundled cat"
    images = make_views(classifier) if images is None else images
    say(f"compared with MegEngine on {len(images)} {what}; an output step is the largest logit / 127.5:", to=to)
    for found in measure_parity(dumped.path, images, compute_reference(classifier, images)):
        say(
            f"  {found.engine} {found.version}: same answer {found.same:.1f} %, logits differ by "
            f"{found.mean:.2f} steps on average, {found.largest:.2f} at most",
            to=to,
        )
    if layers and classifier.fake_quantized is not None:
        for engine in (engine for engine in list_backends(dumped.path) if engine.shows_layers):
            differences = measure_layer_parity(engine, dumped.path, classifier.fake_quantized, images)
            say(f"  {engine.name}, layer by layer: {describe_parity(differences)}", to=to)


def describe_parity(differences: list[LayerParity]) -> str:
    if not differences:
        return "it gives no integers between its layers"
    far = next((found for found in differences if found.largest > 1), None)
    values = sum(found.values for found in differences)
    share = sum(found.share * found.values for found in differences) / values
    if far is not None:
        return f"{far.layer} is the first of {len(differences)} that differs by more than one step ({far.largest})"
    return (
        f"no integer of {plural(len(differences), 'layer')} differs by more than one step, {share:.3%} of them by one"
    )


def target_of(classifier: Classifier) -> str:
    return "" if classifier.fake_quantized is None else f", target {classifier.target.name}"


def show_float_size(classifier: Classifier, int8: Dump, wanted: FileOptions, to: Console) -> None:
    """Print the sizes of the int8 and of the float32 file; the latter is written to a temporary folder."""
    from mgq.engine.classifier.dump import dump_classifier
    from mgq.engine.classifier.open import to_float
    from mgq.export.formats import SUFFIXES

    with temporary_folder() as folder:
        path = folder / f"float{SUFFIXES[int8.format]}"
        input_type = "uint8" if wanted.input_type == "uint8" else "float32"
        size = dump_classifier(to_float(classifier), path, input_type, wanted.batch, int8.format).size
        ratio = size / int8.size
        to.print(f"size: float32 {format_size(size)}, int8 {format_size(int8.size)} ({ratio:.1f} times smaller)")


def measure_speed(
    classifier: Classifier,
    dumped: Dump,
    images: npt.NDArray[np.uint8] | None,
    wanted: FileOptions,
    source: Path | None = None,
) -> Deployment:
    """Compare the speed of an imported network in int8 and in float32, in each engine. Float is the ``source`` that it
    was imported from, where that is given and faster.

    A file for one engine is written again where that runs it sooner with some layers in float, unless it was tuned.
    """
    from mgq.cli.console import note
    from mgq.engine.classifier.deployment import TIMING, measure_file
    from mgq.engine.classifier.dump import dump_classifier
    from mgq.engine.classifier.open import to_float
    from mgq.engine.classifier.parity import make_views
    from mgq.quantization.option_names import ANY_ENGINE

    write = partial(dump_classifier, classifier, batch=wanted.batch, engine=wanted.engine, keep_input=wanted.keep_input)
    images = make_views(classifier) if images is None else images
    form = ANY_ENGINE if wanted.tune else wanted.engine
    note(TIMING)
    return measure_file(to_float(classifier), dumped, images, write, form, source)


def show_speed(found: Deployment, wanted: FileOptions) -> None:
    from mgq.cli.deployment_table import show_deployment
    from mgq.quantization.option_names import ANY_ENGINE
    from mgq.runtime.registry import BACKENDS

    own = next((backend.name for backend in BACKENDS if backend.key == wanted.engine), "")
    is_of_others = wanted.engine == ANY_ENGINE or own not in found.slower
    show_deployment(found, "write a file for it alone (`--for`)" if is_of_others else "")

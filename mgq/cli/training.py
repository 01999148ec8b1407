"""``mgq train`` and ``mgq qat``: their options, and how their results are shown."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import typer

from mgq.cli.import_options import ImportOptions
from mgq.cli.option_needs import OF_IMPORT, OF_SEVERAL_NETWORKS, OF_ZOO, Need
from mgq.cli.option_types import (
    ARCH,
    AT_LEAST_NONE,
    COMPRESSION,
    COUNT,
    FACTOR,
    FOLDER,
    OBSERVER,
    PIXELS,
    PRETRAINED,
    SCHEDULE,
    SHARE,
    TARGET,
    NameOption,
    RecipeNumber,
)
from mgq.cli.shared_options import KEY_HELP, prepare_megengine
from mgq.engine.classifier.network_options import RUNS
from mgq.errors import InputError, format_size
from mgq.io.temporary_folders import temporary_folder
from mgq.system.end_signals import end_signals
from mgq.system.mpi_world import JOBS_VARIABLE, find_world, run_jobs

if TYPE_CHECKING:
    from types import FrameType

    from rich.table import Table

    from mgq.engine.classifier.mode_comparison import Comparison
    from mgq.engine.training.training_run import TrainResult

SHOWN_OR_READ = {"as_json", "jobs", *(field.name for field in fields(ImportOptions))}
"""Fields of a command that are no options of training itself."""


@dataclass(frozen=True, kw_only=True)
class TrainingCommand(ImportOptions):
    """The options that ``train`` and ``qat`` share."""

    mode: ClassVar[Literal["train", "qat"]]
    simulated: ClassVar[str]
    """How the table names the fake-quantized network of the result."""

    arch: Annotated[
        str | None,
        typer.Option(
            "-a", "--arch", click_type=ARCH, help="Architecture, see `mgq models`; or FILE.py:FUNCTION, which is run."
        ),
    ] = None
    data: Annotated[
        Path | None, typer.Option("-d", "--data", help="Folder with train/ and val/, or ImageNet's archives.")
    ] = None
    save: Annotated[Path, typer.Option("-s", "--save", click_type=FOLDER, help="Folder of the runs.")] = RUNS
    checkpoint: Annotated[
        Path | None, typer.Option("-c", "--checkpoint", help="Weights to start from; any that mgq reads.")
    ] = None
    key: Annotated[str | None, typer.Option("--key", help=KEY_HELP)] = None
    pretrained: Annotated[
        str | None,
        typer.Option(
            "--pretrained", click_type=PRETRAINED, help="Start from the zoo's weights; downloads published ones."
        ),
    ] = None
    recipe: Annotated[Path | None, typer.Option("--recipe", help="TOML file, such as recipe.toml of any run.")] = None
    resume: Annotated[bool, typer.Option("--resume", help="Resume the interrupted run, to the bit.")] = False
    epochs: Annotated[
        int | None,
        typer.Option("--epochs", click_type=RecipeNumber(int, "epochs"), help="Passes over the pictures."),
    ] = None
    batch_size: Annotated[
        int | None,
        typer.Option("--batch-size", click_type=RecipeNumber(int, "batch_size"), help="Batch size on each device."),
    ] = None
    lr: Annotated[
        float | None,
        typer.Option(
            "--lr", click_type=RecipeNumber(float, "lr"), help="Learning rate at its highest, for one device."
        ),
    ] = None
    schedule: Annotated[str | None, typer.Option("--schedule", click_type=SCHEDULE, help="cosine, linear or step.")] = (
        None
    )
    weight_decay: Annotated[
        float | None, typer.Option("--weight-decay", click_type=RecipeNumber(float, "weight_decay"), help="L2 penalty.")
    ] = None
    label_smoothing: Annotated[
        float | None,
        typer.Option(
            "--label-smoothing",
            click_type=RecipeNumber(float, "label_smoothing"),
            help="Label smoothing: share of a label given to all classes.",
        ),
    ] = None
    image_size: Annotated[
        int | None, typer.Option("--image-size", click_type=PIXELS, help="Pixels on a side, a multiple of 32.")
    ] = None
    limit: Annotated[
        int | None, typer.Option("--limit", click_type=COUNT, help="Use this many pictures of each set, evenly spread.")
    ] = None
    val_every: Annotated[
        int | None,
        typer.Option("--val-every", click_type=RecipeNumber(int, "val_every"), help="Epochs between two measurements."),
    ] = None
    ema: Annotated[
        float | None,
        typer.Option(
            "--ema", click_type=RecipeNumber(float, "ema"), help="Keep averaged weights, with this decay (0.999)."
        ),
    ] = None
    freeze_backbone: Annotated[bool, typer.Option("--freeze-backbone", help="Train the classifier only.")] = False
    amp: Annotated[bool, typer.Option("--amp", help="Mixed float16, on GPUs.")] = False
    bf16: Annotated[bool, typer.Option("--bf16", help="Convolutions in bfloat16, on processors that have it.")] = False
    seed: Annotated[
        int | None,
        typer.Option("--seed", click_type=RecipeNumber(int, "seed"), help="The same seed gives the same weights."),
    ] = None
    devices: Annotated[
        int | None,
        typer.Option("-n", "--ngpus", click_type=AT_LEAST_NONE, help="GPUs; all by default, 0 for the processor."),
    ] = None
    nodes: Annotated[int, typer.Option("--nnodes", click_type=COUNT, help="Machines that train together.")] = 1
    node: Annotated[
        int, typer.Option("--node-rank", click_type=AT_LEAST_NONE, help="The number of this machine, from 0.")
    ] = 0
    master: Annotated[str | None, typer.Option("--master", help="HOST:PORT of machine 0.")] = None
    jobs: Annotated[
        int | None,
        typer.Option("--jobs", click_type=COUNT, help="Processes on this machine that train together, by MPI."),
    ] = None
    sync_bn: Annotated[
        bool, typer.Option("--sync-bn", help="Batch norms see the pictures of all processes, not of their own alone.")
    ] = False
    compress: Annotated[
        str | None,
        typer.Option(
            "--compress",
            click_type=COMPRESSION,
            help="How gradients travel between machines: none, or fp16 in half the bytes.",
        ),
    ] = None
    workers: Annotated[
        int | None,
        typer.Option(
            "-w", "--workers", click_type=AT_LEAST_NONE, help="Threads that read pictures; one a core by default."
        ),
    ] = None
    max_bad: Annotated[
        float, typer.Option("--max-bad", click_type=SHARE, help="Share of broken pictures that is accepted.")
    ] = 0.01
    report_every: Annotated[
        int, typer.Option("--report-freq", click_type=AT_LEAST_NONE, help="Print a line every this many steps.")
    ] = 0
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Write TensorBoard events, too.")] = False
    as_json: Annotated[bool, typer.Option("--json", help="The result as JSON on standard output.")] = False

    needs: ClassVar[tuple[Need, ...]] = (
        OF_SEVERAL_NETWORKS,
        OF_IMPORT,
        OF_ZOO,
        Need(
            ("sync_bn",),
            lambda command: command.may_share(),
            "is for several processes, and one trains here: give --jobs, or leave it out",
        ),
        Need(
            ("compress",),
            lambda command: command.nodes > 1 or find_world() is not None or command.compress == "none",
            "is for what travels between machines: start mgq on several by mpirun, or leave it out",
        ),
        Need(("node", "master"), lambda command: command.nodes > 1, "is for several machines: give --nnodes, too"),
        Need(
            ("jobs",),
            lambda command: command.nodes == 1,
            "is for one machine, and --nnodes for several: leave out one of them",
        ),
    )

    def may_share(self) -> bool:
        """Whether more than one process may train."""
        from mgq.system.graphics_cards import graphics_cards

        by_gpus = self.devices not in (0, 1) and len(graphics_cards()) > 1
        return (self.jobs or 1) > 1 or self.nodes > 1 or find_world() is not None or by_gpus

    def execute(self) -> None:
        """Train and show the result; where the training was stopped, say how to resume it."""
        from mgq.cli.console import note, progress, say, show_table
        from mgq.engine.training.recipe import read_changes

        start_jobs(self.jobs)
        if self.recipe is not None:
            read_changes(self.recipe)  # where it is none, nothing else needs to be loaded
        checkpoint = prepare_megengine(self.checkpoint, False, self.key, self.save, self.import_wish())
        from mgq.api import make_train_options
        from mgq.engine.training import training_run
        from mgq.engine.training.trainer import StoppedError
        from mgq.events import Callbacks
        from mgq.system.megengine_start import prepare_process

        train_options = replace(
            make_train_options(replace(self, checkpoint=checkpoint).collect_options()), prepare=prepare_process
        )
        start = training_run.qat if self.mode == "qat" else training_run.train
        with progress() as on_progress, watch_for_stop() as watch:
            try:
                result = start(train_options, Callbacks(on_progress, note, watch.should_stop, watch.while_training))
            except StoppedError as stopped:
                jobs = "" if self.jobs is None else f" --jobs {self.jobs}"
                note(f"{stopped}, go on with")
                note(f"  mgq {stopped.verb} --resume -a {stopped.arch} -s {shlex.quote(str(self.save))}{jobs}")
                raise typer.Exit(stopped.exit_code) from None
            except training_run.ElsewhereError as done:
                note(str(done))
                raise typer.Exit(done.exit_code) from None
        if self.as_json:
            sys.stdout.write(json.dumps(result_to_json(result)) + "\n")
            return
        show_table(table_of(result.comparison, self.simulated))
        say(describe_result(result))

    def collect_options(self) -> dict[str, Any]:
        """The options by name. A flag that was not given does not override the recipe file."""
        values = {field.name: getattr(self, field.name) for field in fields(self) if field.name not in SHOWN_OR_READ}
        return {name: value for name, value in values.items() if value is not False or name == "distill"}


@dataclass(frozen=True, kw_only=True)
class TrainCommand(TrainingCommand):
    """Train a float network.

    Without -d it learns drawn pictures, which need no files. It begins with the zoo's weights where they are installed,
    else with random ones. Writes <save>/<arch>.normal.

    \b
    Examples:
      mgq train
      mgq train -a efficientnet_lite0 -d flowers
      mgq train -a resnet18 -d flowers --image-size 64 --epochs 20
    """

    mode = "train"
    simulated = "fake-quantized, calibrated"

    classes: Annotated[
        int | None,
        typer.Option(
            "--classes",
            click_type=RecipeNumber(int, "classes"),
            help="Outputs of the classifier, if more than the pictures' classes.",
        ),
    ] = None
    width: Annotated[
        float | None, typer.Option("--width", click_type=FACTOR, help="Width multiplier (mobilenet_v2).")
    ] = None
    activation: Annotated[
        str | None,
        typer.Option(
            "--activation",
            click_type=NameOption("activation", lambda: ("relu", "relu6")),
            help="relu or relu6 (mobilenet_v2).",
        ),
    ] = None
    from_scratch: Annotated[bool, typer.Option("--from-scratch", help="Start from random weights.")] = False
    new_head: Annotated[bool, typer.Option("--new-head", help="Start with a new classifier for these classes.")] = False

    needs = (
        Need(
            ("checkpoint", "pretrained", "new_head"),
            lambda command: not command.from_scratch,
            "is for trained weights, and --from-scratch starts from random ones: leave out one of them",
        ),
    )


@dataclass(frozen=True, kw_only=True)
class QatCommand(TrainingCommand):
    """Train on with fake quantization, for int8.

    It begins with the newest float run, and trains one first where there is none. Writes <save>/<arch>.qat, and
    compares float, fake-quantized and int8 in the end.

    \b
    Examples:
      mgq qat --arch resnet18
      mgq qat -d flowers
      mgq qat -a mobilenet_v2 -c mobilenet_v2.pkl -d imagenet
    """

    mode = "qat"
    simulated = "fake-quantized"

    observer: Annotated[
        str | None,
        typer.Option("--observer", click_type=OBSERVER, help="How scales are found: ema, min-max, lsq or tqt."),
    ] = None
    target: Annotated[
        str | None,
        typer.Option(
            "--target",
            click_type=TARGET,
            help="What int8 is for: megengine, onnx (ONNX Runtime, OpenVINO) or onnx-avx2.",
        ),
    ] = None
    distill: Annotated[
        bool | None,
        typer.Option(
            "--distill/--no-distill",
            help="Learn from the float network's answers, too; default if there is one.",
        ),
    ] = None


def start_jobs(jobs: int | None) -> None:
    """With ``--jobs``: start the processes, wait for them and exit as they do.

    Raises InputError where they cannot be started, or MPI has started this one already.
    """
    if jobs is None:
        return
    if find_world() is None and jobs > 1:
        with temporary_folder() as folder:
            code = run_jobs(jobs, sys.argv[1:], folder)
        raise typer.Exit(code)
    if find_world() is not None and os.environ.get(JOBS_VARIABLE) != str(jobs):
        raise InputError(f"--jobs {jobs} starts processes by itself: leave it out where MPI starts mgq")


class StopWatch:
    """Takes :func:`end_signals`. While the network trains, the first one is remembered for :meth:`should_stop`.

    That is asked after each step. The second one, and one that comes before or after, ends the process at once.
    """

    def __init__(self) -> None:
        self.is_asked = False
        self.is_training = False

    def should_stop(self) -> bool:
        return self.is_asked

    def take_signal(self, number: int, frame: FrameType | None) -> None:
        if self.is_asked or not self.is_training:
            raise KeyboardInterrupt
        self.is_asked = True

    @contextlib.contextmanager
    def while_training(self) -> Iterator[None]:
        self.is_training = True
        try:
            yield
        finally:
            self.is_training = False
        if self.is_asked:  # after the last step
            raise KeyboardInterrupt


@contextlib.contextmanager
def watch_for_stop() -> Iterator[StopWatch]:
    watch = StopWatch()
    before = {number: signal.signal(number, watch.take_signal) for number in end_signals()}
    try:
        yield watch
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def table_of(comparison: Comparison, simulated: str = "fake-quantized") -> Table:
    """The three modes of a network: accuracy, drop against float, size."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("", no_wrap=True)
    for heading in ("top-1", "top-5", "drop", "weights"):
        table.add_column(heading, justify="right", no_wrap=True)
    base = comparison.normal.top1
    for label, found, size in (
        ("float32", comparison.normal, comparison.normal_bytes),
        (simulated, comparison.qat, None),
        ("int8", comparison.quantized, comparison.quantized_bytes),
    ):
        drop = "" if found is comparison.normal else f"{base - found.top1:.1f}"
        weights = "" if size is None else format_size(size)
        table.add_row(label, f"{found.top1:.1f} %", f"{found.top5:.1f} %", drop, weights)
    return table


def describe_result(result: TrainResult) -> str:
    """The lines below the table: images, agreement, best epoch, checkpoint."""
    recipe, found = result.recipe, result.comparison
    images = "synthetic pictures" if recipe.is_synthetic else f"pictures of {recipe.data}"
    return (
        f"{recipe.arch}, {recipe.image_size}x{recipe.image_size}, measured on {found.images} {images} "
        f"(top-1 ± {found.normal.top1_error:.1f})\n"
        f"{agreements(found)}\n"
        f"{gains(result)}best epoch: {result.best['epoch']:.0f} of {recipe.epochs}\n"
        f"checkpoint: {result.checkpoint}{pointer(result)}"
    )


def pointer(result: TrainResult) -> str:
    """A line on the page that can be made of a run for int8; making it here would take as long as measuring again."""
    if result.recipe.mode != "qat":
        return ""
    return f"\nas a page, with pictures and engines: mgq report {shlex.quote(str(result.checkpoint.parent))}"


def gains(result: TrainResult) -> str:
    """Float, calibrated and trained side by side, where all three were measured: a line."""
    if not result.calibrated:
        return ""
    figures = result.comparison.normal.top1, result.calibrated["top1"], result.comparison.quantized.top1
    return "top-1: float {:.1f} %, calibrated {:.1f} %, trained with quantization {:.1f} %\n".format(*figures)


def agreements(comparison: Comparison) -> str:
    return (
        f"int8 answers as float on {comparison.same_as_float:.1f} %, "
        f"as fake quantization on {comparison.same_as_simulated:.1f} %"
    )


def result_to_json(result: TrainResult) -> dict[str, Any]:
    from mgq.engine.training.recipe import to_plain

    return {
        "checkpoint": str(result.checkpoint),
        "best": dict(result.best),
        "calibrated": dict(result.calibrated),
        "comparison": result.comparison.to_json(),
        "recipe": to_plain(result.recipe),
    }

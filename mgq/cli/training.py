"""``mgq train`` and ``mgq qat``: their options, each said once, and how they show what comes of it."""

from __future__ import annotations

import contextlib
import inspect
import json
import shlex
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import typer
from click import ParamType

from mgq.cli.option_types import (
    ARCH,
    AT_LEAST_NONE,
    AT_LEAST_ZERO,
    COUNT,
    FACTOR,
    FOLDER,
    OBSERVER,
    PIXELS,
    PRETRAINED,
    SCHEDULE,
    SHARE,
    TARGET,
    Named,
    Number,
)
from mgq.cli.shared_options import KEY_HELP, RUNS, prepare_megengine

if TYPE_CHECKING:
    from types import FrameType

    from rich.table import Table

    from mgq.engine.classifier.mode_comparison import Comparison
    from mgq.engine.training.training_run import TrainResult


class Option(NamedTuple):
    """An option of a verb."""

    kind: Any
    default: Any
    flags: tuple[str, ...]
    help: str
    value: ParamType[Any] | None = None

    @property
    def annotation(self) -> Any:
        return self.kind | None if self.default is None else self.kind

    @property
    def parameter(self) -> Any:
        return typer.Option(self.default, *self.flags, help=self.help, click_type=self.value)


def recipe_value(kind: type, flag: str, text: str, value: ParamType[Any]) -> Option:
    return Option(kind, None, (flag,), text, value)


SHARED: dict[str, Option] = {
    "arch": Option(str, None, ("-a", "--arch"), "Architecture; `mgq models` lists them.", ARCH),
    "data": Option(Path, None, ("-d", "--data"), "Folder with train/ and val/, or ImageNet's archives."),
    "save": Option(Path, RUNS, ("-s", "--save"), "Folder of the runs.", FOLDER),
    "checkpoint": Option(Path, None, ("-c", "--checkpoint"), "Weights to begin with; any that mgq reads."),
    "key": Option(str, None, ("--key",), KEY_HELP),
    "pretrained": Option(
        str, None, ("--pretrained",), "Begin with the zoo's weights; downloads published ones.", PRETRAINED
    ),
    "recipe": Option(Path, None, ("--recipe",), "TOML file, such as recipe.toml of any run."),
    "resume": Option(bool, False, ("--resume",), "Go on with the run that was interrupted, to the bit."),
    "epochs": recipe_value(int, "--epochs", "How often every picture is seen.", COUNT),
    "batch_size": recipe_value(int, "--batch-size", "Pictures a step, on each device.", COUNT),
    "lr": recipe_value(float, "--lr", "Learning rate at its highest, for one device.", AT_LEAST_ZERO),
    "schedule": recipe_value(str, "--schedule", "cosine, linear or step.", SCHEDULE),
    "weight_decay": recipe_value(float, "--weight-decay", "L2 penalty.", AT_LEAST_ZERO),
    "label_smoothing": recipe_value(float, "--label-smoothing", "Share of a label that goes to all classes.", SHARE),
    "image_size": recipe_value(int, "--image-size", "Pixels on a side, a multiple of 32.", PIXELS),
    "limit": recipe_value(int, "--limit", "So many pictures of each set, evenly spread.", COUNT),
    "val_every": recipe_value(int, "--val-every", "Epochs from one measurement to the next.", COUNT),
    "ema": recipe_value(float, "--ema", "Keep averaged weights, with this decay (0.999).", SHARE),
    "freeze_backbone": Option(bool, False, ("--freeze-backbone",), "Train the classifier alone."),
    "amp": Option(bool, False, ("--amp",), "Mixed float16, on GPUs."),
    "seed": recipe_value(int, "--seed", "The same seed gives the same weights.", AT_LEAST_NONE),
    "devices": Option(int, None, ("-n", "--ngpus"), "GPUs; all by default, 0 for the processor.", AT_LEAST_NONE),
    "nodes": Option(int, 1, ("--nnodes",), "Machines that train together.", COUNT),
    "node": Option(int, 0, ("--node-rank",), "Which of them this is, from 0.", AT_LEAST_NONE),
    "master": Option(str, None, ("--master",), "HOST:PORT of machine 0."),
    "workers": Option(
        int, None, ("-w", "--workers"), "Threads that read pictures; one a core by default.", AT_LEAST_NONE
    ),
    "max_bad": Option(float, 0.01, ("--max-bad",), "Share of broken pictures that is put up with.", SHARE),
    "report_every": Option(int, 0, ("--report-freq",), "A line every so many steps.", AT_LEAST_NONE),
    "tensorboard": Option(bool, False, ("--tensorboard",), "Write TensorBoard events, too."),
    "as_json": Option(bool, False, ("--json",), "The result as JSON on standard output."),
}
OF_TRAIN: dict[str, Option] = {
    "classes": recipe_value(
        int, "--classes", "Outputs of the classifier, if more than the pictures' classes.", Number(int, 2)
    ),
    "width": Option(float, None, ("--width",), "Width multiplier (mobilenet_v2).", FACTOR),
    "activation": Option(
        str, None, ("--activation",), "relu or relu6 (mobilenet_v2).", Named("activation", lambda: ("relu", "relu6"))
    ),
    "from_scratch": Option(bool, False, ("--from-scratch",), "Begin with random weights."),
    "new_head": Option(bool, False, ("--new-head",), "Begin with a new classifier for these classes."),
}
OF_QAT: dict[str, Option] = {
    "observer": recipe_value(str, "--observer", "What gives scales: ema, min-max, lsq or tqt.", OBSERVER),
    "target": recipe_value(
        str, "--target", "What int8 is for: megengine, onnx (ONNX Runtime, OpenVINO) or onnx-avx2.", TARGET
    ),
    "distill": Option(
        bool,
        None,
        ("--distill/--no-distill",),
        "Learn from the float network's answers, too; by default where it is at hand.",
    ),
}

TRAIN_HELP = """Train a float network.

Without -d it learns drawn pictures, which need no files. It begins with the zoo's weights where they are installed,
else with random ones. Writes <save>/<arch>.normal.

\b
Examples:
  mgq train
  mgq train -a efficientnet_lite0 -d flowers
  mgq train -a resnet18 -d flowers --image-size 64 --epochs 20
"""
QAT_HELP = """Train on with fake quantization, for int8.

It begins with the newest float run, and trains one first where there is none. Writes <save>/<arch>.qat, and
compares float, fake-quantized and int8 in the end.

\b
Examples:
  mgq qat --arch resnet18
  mgq qat -d flowers
  mgq qat -a mobilenet_v2 -c mobilenet_v2.pkl -d imagenet
"""


def verb(name: str, text: str, own: Mapping[str, Option]) -> Callable[..., None]:
    """The command ``name`` with the shared options and its ``own``."""
    options = {**SHARED, **own}

    def command(**values: Any) -> None:
        run(name, values)

    command.__name__, command.__doc__ = name, text
    keyword = inspect.Parameter.KEYWORD_ONLY
    command.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [inspect.Parameter(n, keyword, default=o.parameter, annotation=o.annotation) for n, o in options.items()]
    )
    command.__annotations__ = {n: option.annotation for n, option in options.items()}
    return command


train = verb("train", TRAIN_HELP, OF_TRAIN)
qat = verb("qat", QAT_HELP, OF_QAT)


def run(name: str, values: Mapping[str, Any]) -> None:
    """Do what the verb ``name`` is asked for and show what comes of it; when stopped, say how to go on."""
    from mgq.cli.console import note, prepare_process, progress, say, show_table
    from mgq.engine.training.recipe import read_changes

    if values["recipe"] is not None:
        read_changes(values["recipe"])  # where it is none, nothing else needs to be loaded
    save = Path(values["save"]) if values.get("save") else None
    checkpoint = prepare_megengine(values["checkpoint"], deployed=False, key=values["key"], save=save)
    values = {**values, "checkpoint": checkpoint}
    from mgq.api import make_train_options
    from mgq.engine.training import training_run
    from mgq.engine.training.trainer import StoppedError
    from mgq.events import Callbacks

    # A flag that was not given leaves what a recipe file says.
    said = {name: value for name, value in values.items() if name != "as_json"}
    given = {name: value for name, value in said.items() if value is not False or name == "distill"}
    train_options = replace(make_train_options(given), prepare=prepare_process)
    with progress() as on_progress, watch_for_stop() as should_stop:
        callbacks = Callbacks(on_progress, note, should_stop)
        try:
            result: TrainResult = getattr(training_run, name)(train_options, callbacks)
        except StoppedError as stopped:
            command = f"mgq {stopped.verb} --resume -a {stopped.arch} -s {shlex.quote(str(train_options.save))}"
            note(f"{stopped}, go on with\n  {command}")
            raise typer.Exit(stopped.exit_code) from None
        except training_run.ElsewhereError as done:
            note(str(done))
            raise typer.Exit(done.exit_code) from None
    if values["as_json"]:
        sys.stdout.write(json.dumps(result_to_json(result)) + "\n")
        return
    simulated = "fake-quantized" if name == "qat" else "fake-quantized, calibrated"
    show_table(table_of(result.comparison, simulated))
    say(describe_result(result))


@contextlib.contextmanager
def watch_for_stop() -> Iterator[Callable[[], bool]]:
    """Whether Ctrl-C or a polite kill has come since; a second one ends the process at once."""
    asked: list[int] = []

    def remember(number: int, _: FrameType | None) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)

    before = {number: signal.signal(number, remember) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(asked)
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
        weights = "" if size is None else f"{size / 1e6:.1f} MB"
        table.add_row(label, f"{found.top1:.1f} %", f"{found.top5:.1f} %", drop, weights)
    return table


def describe_result(result: TrainResult) -> str:
    """What the table leaves open: pictures, agreement, where everything lies."""
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
    from mgq.engine.training.recipe import plain

    return {
        "checkpoint": str(result.checkpoint),
        "best": dict(result.best),
        "calibrated": dict(result.calibrated),
        "comparison": result.comparison.to_json(),
        "recipe": plain(result.recipe),
    }

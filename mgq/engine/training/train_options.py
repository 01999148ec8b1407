"""What a user asks of ``train`` and ``qat``, and what of it changes the recipe."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mgq.engine.classifier.network_options import RUNS
from mgq.engine.distributed.process_group import check_cluster, gpus, runs_on_processor
from mgq.engine.training.recipe import DISTILLED, SYNTHETIC, Recipe, check_changes, option, read_changes
from mgq.errors import InputError
from mgq.machine import has_bfloat16
from mgq.quantization.modes import Mode
from mgq.system.processes import do_nothing
from mgq.zoo.weight_loading import Weights


@dataclass(frozen=True)
class TrainOptions:
    """What a user asked for; everything may be left out.

    ``changes`` are values of the recipe by name, which come before those of the file ``recipe``. ``devices`` counts
    GPUs (None: all there are; 0: the processor). ``prepare`` is called in each process that several of them need,
    before it loads MegEngine.
    """

    arch: str | None = None
    data: Path | None = None
    save: Path = RUNS
    checkpoint: Path | None = None
    key: str | None = None
    recipe: Path | None = None
    changes: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    pretrained: bool | str = False
    from_scratch: bool = False
    new_head: bool = False
    distill: bool | None = None
    resume: bool = False
    workers: int | None = None
    max_bad: float = 0.01
    report_every: int = 0
    tensorboard: bool = False
    devices: int | None = None
    nodes: int = 1
    node: int = 0
    master: str | None = None
    prepare: Callable[[], None] = do_nothing


def all_changes(train_options: TrainOptions, mode: Mode) -> dict[str, Any]:
    """What differs from the default recipe: the file's values, then those of the command."""
    in_file = read_changes(train_options.recipe) if train_options.recipe else {}
    if in_file.get("mode", mode.value) != mode.value:
        verb = "qat" if in_file["mode"] == "qat" else "train"
        raise InputError(f"{train_options.recipe} is a recipe for mode {in_file['mode']}: use `mgq {verb} --recipe`")
    in_file.pop("mode", None)
    changes = {**in_file, **check_changes(train_options.changes, "the command")}
    changes["devices"] = check_cluster(
        train_options.devices, train_options.nodes, train_options.node, train_options.master
    ).world
    if changes.get("amp") and gpus() == 0:
        raise InputError("--amp needs a GPU that computes in float16, and there is none here: leave it out")
    if changes.get("bf16"):
        if mode is not Mode.NORMAL:
            raise InputError("--bf16 is for float training, it would round what fake quantization rounds: leave it out")
        refuse_bfloat16()
    return changes


def refuse_bfloat16() -> None:
    """Raises InputError where convolutions cannot be trained in bfloat16."""
    if not runs_on_processor():
        raise InputError("--bf16 is for processors: leave it out, or take --amp on a GPU")
    if not has_bfloat16():
        raise InputError("--bf16 needs a processor with avx512_bf16 or amx_bf16, which this one has not: leave it out")


def find_data(train_options: TrainOptions, changes: dict[str, Any], given: Weights | None = None) -> str:
    """The folder of pictures, or ``synthetic``; taken out of ``changes``.

    By default what ``given`` was trained on, else the drawn pictures.
    """
    in_recipe = changes.pop("data", None)
    if train_options.data is not None:
        return str(train_options.data.resolve()) if str(train_options.data) != SYNTHETIC else SYNTHETIC
    if in_recipe is not None:
        return str(in_recipe)
    known = given.info.recipe.get("data") if given is not None and given.info else None
    return str(known) if known else SYNTHETIC


def refuse_changed_options(train_options: TrainOptions, recipe: Recipe, path: Path) -> None:
    """Raises InputError where the request says otherwise than ``recipe``."""
    wanted = dict(read_changes(train_options.recipe)) if train_options.recipe else {}
    wanted |= check_changes(train_options.changes, "the command")
    if train_options.data is not None:
        wanted["data"] = find_data(train_options, {})
    if train_options.options:
        wanted["options"] = {**recipe.options, **train_options.options}
    if train_options.distill is not None:
        wanted.setdefault("distill", (recipe.distill or DISTILLED) if train_options.distill else 0.0)
    if (
        train_options.checkpoint is not None
        or train_options.pretrained
        or train_options.from_scratch
        or train_options.new_head
    ):
        raise InputError(f"--resume goes on with the weights of {path}: leave out what chooses others")
    for name, value in wanted.items():
        has = getattr(recipe, name)
        if value != has:
            given = f"{value!r}" if isinstance(value, str) else value
            raise InputError(
                f"{path} was begun with {option(name)} {has}, not {given}: leave the option out to resume, "
                "or leave out --resume to start again"
            )

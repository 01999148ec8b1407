"""Opens a run that was interrupted, so that it goes on where it stood."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mgq.engine.classifier.labelled_sets import match_classes
from mgq.engine.classifier.metrics import Meter
from mgq.engine.classifier.open import find_newest
from mgq.engine.distributed.process_group import Cluster, runs_on_processor
from mgq.engine.runs.provenance import this_process
from mgq.engine.runs.run_folder import FLOAT_START, LAST, RunFolder
from mgq.engine.runs.training_state import START_AGAIN
from mgq.engine.training.initial_weights import InitialWeights
from mgq.engine.training.recipe import Recipe, restore_recipe, to_plain
from mgq.engine.training.train_options import TrainOptions, refuse_changed_options
from mgq.engine.training.training_process import TrainJob
from mgq.engine.training.training_sets import Sets, read_sets
from mgq.errors import InputError, plural, printable
from mgq.events import Callbacks
from mgq.io.records import record_of
from mgq.quantization.modes import Mode
from mgq.weights.checkpoint import CheckpointInfo
from mgq.weights.foreign_states import State
from mgq.zoo.registry import spec_of
from mgq.zoo.weight_loading import float_part, read_weights


@contextlib.contextmanager
def reopen_run(
    train_options: TrainOptions, mode: Mode, cluster: Cluster, callbacks: Callbacks
) -> Iterator[tuple[TrainJob, RunFolder]]:
    """The run that was interrupted, to go on with. Raises InputError for options that are not those it began with."""
    arch = train_options.arch or find_resumable_arch(train_options.save, mode)
    with RunFolder.open(train_options.save, spec_of(arch).name, mode.value, train_options.tensorboard) as run:
        state = run.read_state()
        recipe = restore_recipe(state.recipe, str(run.last))
        refuse_changed_options(train_options, recipe, run.path)
        note = describe_process_change(recipe, cluster, run)
        info = info_of_progress(state.progress, recipe, run.last)
        run.keep_metrics(state.progress["epoch"])
        run.note_environment(processes=[this_process(train_options.workers)])
        sets = read_sets(recipe.data, None, to_plain(recipe), callbacks)
        sets = Sets(*(match_classes(dataset, info.classes) for dataset in (sets.train, sets.val)))
        callbacks.on_message(
            f"going on with {run.path}: {plural(recipe.epochs, 'epoch')}, {state.progress['epoch']} done"
        )
        if note:
            callbacks.on_message(note)
        begun = float_start_of(run, recipe) if recipe.mode == "qat" else None
        initial = InitialWeights(begun, info.origin, recipe.options)
        yield TrainJob(recipe, sets, initial, info, train_options, state), run


def describe_process_change(recipe: Recipe, cluster: Cluster, run: RunFolder) -> str:
    """What to say where a run goes on with another number of processes than it began with; nothing where not.

    Raises InputError on GPUs, and where its pictures of a step cannot be shared equally.
    """
    if cluster.world == recipe.devices:
        return ""
    path, pictures = printable(run.path), recipe.batch_size * recipe.devices
    if not runs_on_processor() or cluster.nodes > 1:
        raise InputError(
            f"{path} was begun on {plural(recipe.devices, 'device')}, not {cluster.world}: give it the same"
        )
    if pictures % cluster.world:
        raise InputError(
            f"{path} takes {plural(pictures, 'picture')} a step, which {plural(cluster.world, 'process')} cannot share "
            f"equally: give it {recipe.devices}, with which it began"
        )
    alike = "equal up to rounding" if recipe.sync_bn else "equal up to rounding, but for what batch norms see at once"
    begun = f"begun with {plural(recipe.devices, 'process')}, going on with {cluster.world}"
    return f"{begun}: the same pictures a step, {alike}"


def info_of_progress(progress: Mapping[str, Any], recipe: Recipe, path: Path) -> CheckpointInfo:
    """What the checkpoints of the run say whose state in ``path`` has ``progress``.

    Raises InputError where that is no place in a training by ``recipe``.
    """
    try:
        counts = [progress["epoch"], progress["step_in_epoch"], *progress["pictures"]]
        if not all(type(count) is int and 0 <= count < 2**53 for count in counts) or len(counts) != 4:
            raise TypeError
        info = record_of(CheckpointInfo, progress["info"])
        Meter.from_state(progress["meter"])
        numbers = [progress["seconds"], *progress["best"].values(), *progress.get("start", {}).values()]
        if not all(isinstance(number, int | float) for number in numbers):
            raise TypeError
        # Of 0 and 1 classes, or others than the recipe's, there is nothing to learn.
        if progress["epoch"] > recipe.epochs or (info.arch, len(info.classes)) != (recipe.arch, recipe.classes):
            raise ValueError
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
        raise InputError(f"{printable(path)} does not say where the training stands; {START_AGAIN}") from None
    return info


def find_resumable_arch(save: Path, mode: Mode) -> str:
    """The architecture of the newest run under ``save`` that can go on."""
    newest = find_newest(path for path in save.glob(f"*.{mode.value}/{LAST}") if path.is_file())
    if newest is None:
        raise InputError(f"there is no run of mode {mode.value} under {save} to resume; leave out --resume")
    return newest.parent.name.removesuffix(f".{mode.value}")


def float_start_of(run: RunFolder, recipe: Recipe) -> State:
    """The float weights that a ``qat`` run began from, as it keeps them."""
    return float_part(read_weights(run.path / FLOAT_START, spec_of(recipe.arch)).state)

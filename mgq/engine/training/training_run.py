"""``train`` and ``qat`` as one call each: from what a user asked for to a trained network and what it is worth."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import megengine as mge

from mgq.data.datasets import subset
from mgq.deprecation import find_renamed
from mgq.engine.calibration.calibration_run import calibrate
from mgq.engine.classifier.labelled_sets import adopt_names
from mgq.engine.classifier.mode_comparison import Comparison, compare_modes
from mgq.engine.classifier.open import Classifier, open_classifier, versions
from mgq.engine.distributed.launch import launch
from mgq.engine.distributed.process_group import (
    Cluster,
    EndedError,
    ProcessGroup,
    check_cluster,
    gpus,
)
from mgq.engine.runs.provenance import listing_of, this_process
from mgq.engine.runs.run_folder import FLOAT_START, RunFolder
from mgq.engine.training.initial_weights import (
    InitialWeights,
    keeps_batch_norm,
    make_initial_weights,
    resolve_float_weights,
    resolve_network,
)
from mgq.engine.training.input_layer import input_layer_lr_scale
from mgq.engine.training.recipe import DISTILLED, SYNTHETIC, Recipe, Start, Task, make_recipe, to_plain
from mgq.engine.training.resumption import reopen_run
from mgq.engine.training.train_options import (
    TrainOptions,
    all_changes,
    find_data,
)
from mgq.engine.training.trainer import StoppedError
from mgq.engine.training.training_process import Figures, TrainJob, train_on_device
from mgq.engine.training.training_sets import SYNTHETIC_SIZE, Sets, make_loaders, read_sets
from mgq.errors import InputError, MgqError, plural, printable
from mgq.events import NO_CALLBACKS, Callbacks
from mgq.io.download import sha256_of
from mgq.ptq.presets import CalibrationConfig
from mgq.quantization.modes import Mode
from mgq.quantization.targets import ONNX, get_target
from mgq.system.graphics_cards import graphics_cards, refuse_unfit
from mgq.system.local_ranks import take_idle_cores
from mgq.weights.checkpoint import CheckpointInfo, write_checkpoint
from mgq.zoo.registry import ModelSpec
from mgq.zoo.weight_loading import fingerprint, float_part, read_weights

CALIBRATED_AFTER_TRAIN = 256
COMPARED_AFTER_TRAIN = 2_000
"""Pictures at most on which ``train`` shows what int8 would be like; ``qat`` measures all."""


@dataclass(frozen=True)
class TrainResult:
    """What a finished run left: its folder, its recipe, the best epoch's figures, and the three modes compared.

    ``calibrate``: of ``qat``, the figures of the fake-quantized network before it was trained.
    """

    checkpoint: Path
    recipe: Recipe
    best: Mapping[str, float]
    comparison: Comparison
    calibrated: Mapping[str, float] = field(default_factory=dict)


# ---- the two verbs ----


def train(train_options: TrainOptions, callbacks: Callbacks = NO_CALLBACKS) -> TrainResult:
    """Train a float network and keep the best, as ``mgq train`` does.

    It begins with ``checkpoint``, else the zoo's weights where they are installed (or ``pretrained`` fetches them),
    else random ones; without ``data`` it learns the drawn pictures. Writes ``<save>/<arch>.normal``; a run that is
    there is kept under another name. Raises InputError for what cannot be, before anything is written, and for a
    loss that is not a number; StoppedError when the watcher asks it to stop.
    """
    cluster = find_cluster(train_options)
    if train_options.resume:
        return resume_run(train_options, Mode.NORMAL, cluster, callbacks)
    job = make_float_job(train_options, callbacks)
    with create_run(job, callbacks) as run:
        return finish_run(job, run, cluster, callbacks)


def make_float_job(train_options: TrainOptions, callbacks: Callbacks) -> TrainJob:
    """What ``train`` will do."""
    changes = all_changes(train_options, Mode.NORMAL)
    data = find_data(train_options, changes)
    spec, given = resolve_network(train_options, changes)
    spec.refuse_options(train_options.options)
    sets = read_sets(data, None, changes, callbacks)
    initial = make_initial_weights(spec, given, sets, train_options, callbacks)
    return make_job(train_options, Mode.NORMAL, spec, data, sets, initial, changes)


def qat(train_options: TrainOptions, callbacks: Callbacks = NO_CALLBACKS) -> TrainResult:
    """Train on with fake quantization, and make the int8 network, as ``mgq qat`` does.

    It begins with ``checkpoint``, else the newest float run of the architecture under ``save``, else the zoo's
    weights where their classes are those of the data; else it trains a float network first, and says so. Writes
    ``<save>/<arch>.qat``. Raises as :func:`train` does.
    """
    cluster = find_cluster(train_options)
    if train_options.resume:
        return resume_run(train_options, Mode.QAT, cluster, callbacks)
    changes = all_changes(train_options, Mode.QAT)
    spec, given = resolve_float_weights(train_options, changes, callbacks)
    at_hand = given is not None
    if given is None and cluster.nodes > 1:
        raise InputError(f"--nnodes needs float weights of {spec.name} on every machine: give them, -c CHECKPOINT")
    if given is None:
        refuse_impossible(spec, changes)
        said = [f"no float weights of {spec.name} found: training some first, into {train_options.save}"]
        hushed = replace(callbacks, on_message=said.append)  # nothing is said to begin where that cannot be
        first = make_float_job(make_float_options(train_options, spec, changes), hushed)
        for line in said:
            callbacks.on_message(line)
        with create_run(first, callbacks) as run:
            train_on_all_devices(first, run, cluster, callbacks)
            given = read_weights(run.checkpoint, spec)
    data = find_data(train_options, changes, given)
    if train_options.distill is not None:
        changes.setdefault("distill", DISTILLED if train_options.distill else 0.0)
    elif not at_hand:
        changes.setdefault("distill", 0.0)
    sets = read_sets(data, given, changes, callbacks)
    initial = InitialWeights(
        float_part(given.state),
        given.origin,
        given.options,
        adopt_names(given.info.classes, sets.train) if given.info else None,
        given.info.image_size if given.info else None,
        keeps_batch_norm(given),
    )
    if given.classes != len(sets.train.classes) and initial.classes is None:
        raise InputError(
            f"{given.origin} answers {plural(given.classes, 'class')} and {sets.train.name} has "
            f"{len(sets.train.classes)}; run `mgq train -a {spec.name} -d {data}` first"
        )
    job = make_job(train_options, Mode.QAT, spec, data, sets, initial, changes)
    if at_hand:
        callbacks.on_message(f"{spec.name}: begins with {given.origin}")
    with create_run(job, callbacks) as run:
        return finish_run(job, run, cluster, callbacks)


def refuse_impossible(spec: ModelSpec, changes: Mapping[str, Any]) -> None:
    """Raises InputError for values that no recipe can have: before minutes are spent on what comes first."""
    values = {name: value for name, value in changes.items() if name != "data"}
    make_recipe(Task(spec.name, Mode.QAT.value, SYNTHETIC, 10, 1_000, SYNTHETIC_SIZE), values)


def make_float_options(train_options: TrainOptions, spec: ModelSpec, changes: Mapping[str, Any]) -> TrainOptions:
    """What ``train`` is asked for before ``qat``: the same pictures, its own epochs and rates."""
    shared = ("image_size", "limit", "seed", "amp", "synthetic_train", "synthetic_val", "jitter", "data")
    kept = {name: changes[name] for name in shared if name in changes}
    return replace(train_options, arch=spec.name, checkpoint=None, recipe=None, changes=kept, distill=None)


# ---- what is asked for ----


def find_cluster(train_options: TrainOptions) -> Cluster:
    """Where to train. With several GPUs this process keeps off them: those that it starts could not use them."""
    cluster = check_cluster(train_options.devices, train_options.nodes, train_options.node, train_options.master)
    if gpus() and train_options.devices != 0:
        refuse_unfit(graphics_cards()[: cluster.devices or None])
    if gpus() and (train_options.devices == 0 or cluster.world > 1):
        mge.set_default_device("cpux")
    return cluster


# ---- a run ----


def make_job(
    train_options: TrainOptions,
    mode: Mode,
    spec: ModelSpec,
    data: str,
    sets: Sets,
    initial: InitialWeights,
    changes: Mapping[str, Any],
) -> TrainJob:
    """A run with its whole recipe. Raises InputError where recipe and pictures do not go together."""
    if spec.only_size is not None and spec.only_size[0] != spec.only_size[1]:
        height, width = spec.only_size
        raise InputError(
            f"{spec.name} takes pictures of {height}x{width}, and trainings square ones: `mgq calibrate` it"
        )
    classes = initial.classes or name_classes(sets.train.classes, changes.get("classes"))
    default_size = initial.image_size or (SYNTHETIC_SIZE if data == SYNTHETIC else spec.image_size)
    task = Task(
        arch=spec.name,
        mode=mode.value,
        data=data,
        classes=len(classes),
        images=len(sets.train),
        image_size=changes.get("image_size", default_size),
        start=start_of(initial, spec),
        stem_lr=1.0 if initial.state is None else input_layer_lr_scale(initial.state),
        keep_batch_norm=initial.keeps_batch_norm,
        options=initial.options,
    )
    if spec.is_described:
        changes = {"target": ONNX.name, **changes}  # MegEngine has no int8 for imported networks
    recipe = make_recipe(task, {**changes, "classes": len(classes)})
    info = CheckpointInfo(
        arch=spec.name,
        mode=mode.value,
        classes=classes,
        image_size=recipe.image_size,
        origin=f"trained on {sets.train.name}, from {initial.origin}",
        options=dict(recipe.options),
        target=recipe.target,
        recipe=to_plain(recipe),
        versions=versions(),
        preprocessing=initial.preprocessing,
    )
    make_loaders(recipe, sets, train_options, ProcessGroup(), info.preprocessing)
    return TrainJob(recipe, sets, initial, info, train_options)


def start_of(initial: InitialWeights, spec: ModelSpec) -> Start:
    if initial.state is None:
        return Start.RANDOM
    return Start.TRAINED if spec.head in initial.state else Start.NEW_CLASSIFIER


@contextlib.contextmanager
def create_run(job: TrainJob, callbacks: Callbacks) -> Iterator[RunFolder]:
    """A new folder for the run, with its recipe and, for ``qat``, the float network that it begins with.

    Nothing is left of a run that ends before it has saved anything, and the earlier one is back.
    """
    recipe, train_options = job.recipe, job.train_options
    with RunFolder.create(train_options.save, recipe.arch, recipe.mode, train_options.tensorboard) as run:
        if run.notice:
            callbacks.on_message(run.notice)
        with run.whole_or_nothing():
            describe_start(job, run)
        with run.saved_or_nothing():
            yield run


def describe_start(job: TrainJob, run: RunFolder) -> None:
    """Write the recipe, what else the bits depend on and, for ``qat``, the float network."""
    recipe = job.recipe
    run.write_recipe(recipe.to_toml())
    run.note_environment(
        seed=recipe.seed,
        weights={
            "origin": job.initial.origin,
            "sha256": None if job.initial.state is None else fingerprint(job.initial.state),
        },
        train=listing_of(job.sets.train),
        val=listing_of(job.sets.val),
        processes=[this_process(job.train_options.workers)],
    )
    if recipe.mode == "qat":
        assert job.initial.state is not None
        normal = replace(job.info, mode="normal", origin=job.initial.origin)
        write_checkpoint(run.path / FLOAT_START, job.initial.state, normal)


def name_classes(names: tuple[str, ...], number: int | None) -> tuple[str, ...]:
    """``names``, with more outputs than there are classes of pictures where ``number`` asks for it."""
    if number is None or number == len(names):
        return names
    if number < len(names):
        raise InputError(
            f"--classes {number} is fewer than the {plural(len(names), 'class')} of the pictures: give no less"
        )
    return (*names, *(f"class {i}" for i in range(len(names), number)))


def resume_run(train_options: TrainOptions, mode: Mode, cluster: Cluster, callbacks: Callbacks) -> TrainResult:
    """Go on with the run that was interrupted."""
    with reopen_run(train_options, mode, cluster, callbacks) as (job, run):
        return finish_run(job, run, cluster, callbacks)


def finish_run(job: TrainJob, run: RunFolder, cluster: Cluster, callbacks: Callbacks) -> TrainResult:
    """Train until the end of the recipe, then open the best network in its three modes and compare them."""
    best, start = train_on_all_devices(job, run, cluster, callbacks)
    if cluster.by_mpi:
        take_idle_cores()
    run.note_environment(checkpoint_sha256=sha256_of(run.checkpoint))
    normal, simulated = open_float_and_simulated(job, run, callbacks)
    most = COMPARED_AFTER_TRAIN if job.recipe.mode == "normal" else len(job.sets.val)
    images = subset(job.sets.val, min(most, len(job.sets.val)))
    comparison = compare_modes(
        normal,
        simulated,
        images,
        callbacks,
        workers=job.train_options.workers,
        max_bad=job.train_options.max_bad,
    )
    return TrainResult(run.checkpoint, job.recipe, best, comparison, start)


def open_float_and_simulated(job: TrainJob, run: RunFolder, callbacks: Callbacks) -> tuple[Classifier, Classifier]:
    """The float network and the fake-quantized one. After ``train`` the latter comes from calibration."""
    if job.recipe.mode == "qat":
        normal = open_classifier(checkpoint=run.path / FLOAT_START, mode=Mode.NORMAL)
        return normal, open_classifier(checkpoint=run.checkpoint, mode=Mode.QAT)
    normal, other = (open_classifier(checkpoint=run.checkpoint, mode=Mode.NORMAL) for _ in range(2))
    config = CalibrationConfig(target=get_target(job.recipe.target))
    found = calibrate(other, job.sets.train, CALIBRATED_AFTER_TRAIN, job.recipe.data, config, callbacks)
    return normal, found.classifier


def train_on_all_devices(job: TrainJob, run: RunFolder, cluster: Cluster, callbacks: Callbacks) -> Figures:
    """Train on all devices, as :func:`train_on_device` does on one.

    Raises ElsewhereError on a machine that is not the first: what was learned lies there.
    """
    try:
        with callbacks.while_training():
            figures = launch(cluster, partial(train_on_device, job, run), callbacks, job.train_options.prepare)
    except EndedError:
        saved = "its state last saved is kept" if run.last.is_file() else "nothing was saved yet"
        raise StoppedError(f"stopped on {plural(cluster.devices, 'device')}; {saved}", job.recipe) from None
    if cluster.node:
        raise ElsewhereError(f"this machine has done its part: the network lies on machine 0, in {printable(run.path)}")
    return figures


class ElsewhereError(MgqError):
    """Nothing went wrong, and there is nothing to show: the result is on another machine."""

    exit_code = 0


__getattr__ = find_renamed(__name__, {"Outcome": "TrainResult"})

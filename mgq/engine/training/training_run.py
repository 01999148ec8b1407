"""``train`` and ``qat`` as one call each: from what a user asked for to a trained network and what it is worth."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import megengine as mge
import megengine.module as M

from mgq.cpu_kernels import fast_gradients
from mgq.data.datasets import subset
from mgq.data.loader import Loader
from mgq.deprecation import find_renamed
from mgq.engine.calibration.calibration_run import calibrate
from mgq.engine.classifier.labelled_sets import adopt_names, match_classes
from mgq.engine.classifier.metrics import Meter
from mgq.engine.classifier.mode_comparison import Comparison, compare_modes
from mgq.engine.classifier.open import Classifier, find_newest, open_classifier, versions
from mgq.engine.distributed.launch import launch
from mgq.engine.distributed.process_group import (
    Cluster,
    EndedError,
    ProcessGroup,
    check_cluster,
    gpus,
    runs_on_processor,
)
from mgq.engine.runs.provenance import listing_of, this_process
from mgq.engine.runs.run_folder import LAST, RunFolder
from mgq.engine.runs.training_state import START_AGAIN, TrainingState
from mgq.engine.training.initial_weights import (
    InitialWeights,
    keeps_batch_norm,
    make_initial_weights,
    resolve_float_weights,
    resolve_network,
)
from mgq.engine.training.input_layer import input_layer_lr_scale
from mgq.engine.training.recipe import DISTILLED, SYNTHETIC, Recipe, Start, Task, make_recipe, restore_recipe, to_plain
from mgq.engine.training.train_options import (
    TrainOptions,
    all_changes,
    find_data,
    refuse_bfloat16,
    refuse_changed_options,
)
from mgq.engine.training.trainer import StoppedError, Trainer
from mgq.engine.training.training_sets import SYNTHETIC_SIZE, Sets, make_loaders, make_measuring_loader, read_sets
from mgq.errors import FailureError, InputError, MgqError, plural, printable
from mgq.events import NO_CALLBACKS, Callbacks
from mgq.io.download import sha256_of
from mgq.io.records import record_of
from mgq.ptq.calibrate import MOST_LAYERWISE_IMAGES
from mgq.ptq.equalization import equalize_channels
from mgq.ptq.presets import CalibrationConfig
from mgq.quantization.modes import Mode
from mgq.quantization.qat import prepare_qat
from mgq.quantization.targets import ONNX, get_target
from mgq.system.graphics_cards import graphics_cards, refuse_unfit
from mgq.system.local_ranks import take_idle_cores
from mgq.weights.checkpoint import CheckpointInfo, write_checkpoint
from mgq.weights.foreign_states import State
from mgq.zoo.layers import without_initialization
from mgq.zoo.network_state import state_of
from mgq.zoo.registry import ModelSpec, spec_of
from mgq.zoo.weight_loading import fingerprint, float_part, load_state, read_weights

FLOAT_START = "float.safetensors"
"""In the folder of a ``qat`` run: the float network that it began from."""
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


@dataclass(frozen=True)
class TrainJob:
    """A run, ready to go: the same in every process that takes part."""

    recipe: Recipe
    sets: Sets
    initial: InitialWeights
    info: CheckpointInfo
    train_options: TrainOptions
    state: TrainingState | None = None


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
    """A new folder for the run, with its recipe and, for ``qat``, the float network that it begins with."""
    recipe, train_options = job.recipe, job.train_options
    with RunFolder.create(train_options.save, recipe.arch, recipe.mode, train_options.tensorboard) as run:
        if run.notice:
            callbacks.on_message(run.notice)
        run.write_recipe(recipe.to_toml())
        run.note_environment(
            seed=recipe.seed,
            weights={
                "origin": job.initial.origin,
                "sha256": None if job.initial.state is None else fingerprint(job.initial.state),
            },
            train=listing_of(job.sets.train),
            val=listing_of(job.sets.val),
            processes=[this_process(train_options.workers)],
        )
        if recipe.mode == "qat":
            assert job.initial.state is not None
            normal = replace(job.info, mode="normal", origin=job.initial.origin)
            write_checkpoint(run.path / FLOAT_START, job.initial.state, normal)
        yield run


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
    """Go on with the run that was interrupted. Raises InputError for options that are not those it began with."""
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
        job = TrainJob(recipe, sets, InitialWeights(begun, info.origin, recipe.options), info, train_options, state)
        return finish_run(job, run, cluster, callbacks)


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


Figures = tuple[dict[str, float], dict[str, float]]


def train_on_all_devices(job: TrainJob, run: RunFolder, cluster: Cluster, callbacks: Callbacks) -> Figures:
    """Train on all devices, as :func:`train_on_device` does on one.

    Raises ElsewhereError on a machine that is not the first: what was learned lies there.
    """
    try:
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


def train_on_device(job: TrainJob, run: RunFolder, group: ProcessGroup, callbacks: Callbacks) -> Figures:
    """Run one process's part of a training; return the figures of the best epoch, and those before the first."""
    recipe = job.recipe
    refuse_other_pictures(job, group)
    network = make_first_network(job)
    teacher = teacher_of(job) if recipe.mode == "qat" else None
    train_loader, val_loader = make_loaders(recipe, job.sets, job.train_options, group, job.info.preprocessing)
    examples = examples_of(job)
    with (
        training_kernels(callbacks, recipe.sync_bn and group.world_size > 1, recipe.bf16),
        train_loader,
        val_loader,
        examples or contextlib.nullcontext(),
    ):
        trainer = Trainer(
            recipe,
            network,
            train_loader,
            val_loader,
            run,
            job.info,
            teacher,
            group,
            callbacks,
            job.train_options.report_every,
            examples,
        )
        if job.state is not None:
            trainer.load(job.state)
        trainer.fit()
    return trainer.best, trainer.start


def make_first_network(job: TrainJob) -> M.Module:
    """The network as the run begins with it; random parts follow from the seed."""
    recipe, initial = job.recipe, job.initial
    spec = spec_of(recipe.arch)
    mge.random.seed(recipe.seed + 1)
    drawn = initial.state is None or spec.head not in initial.state
    with contextlib.nullcontext() if drawn else without_initialization():
        network = spec.build(recipe.classes, **recipe.options)
    if initial.state is not None:
        load_state(network, {**state_of(network), **initial.state}, initial.origin)
    if recipe.batch_norm_momentum:
        for module in network.modules():
            if isinstance(module, M.BatchNorm2d):
                module.momentum = recipe.batch_norm_momentum
    if recipe.mode != "qat":
        return network
    if recipe.calibrate:
        with contextlib.suppress(FailureError):  # an imported network whose batch norms are folded away
            equalize_channels(network, None, get_target(recipe.target), in_place=True)
    return prepare_qat(network, recipe.observer, get_target(recipe.target), in_place=True)


def examples_of(job: TrainJob) -> Loader | None:
    """Pictures to train on, without augmentation, for what the recipe has to be done before the first step."""
    recipe, images = job.recipe, job.sets.train
    number = recipe.classifier_pictures
    if recipe.mode == "qat":
        number = MOST_LAYERWISE_IMAGES
    if number == 0:
        return None
    few = subset(images, min(number, len(images)))
    return make_measuring_loader(recipe, few, job.train_options, job.info.preprocessing)


def teacher_of(job: TrainJob) -> M.Module:
    """The float network that a ``qat`` run began from."""
    assert job.initial.state is not None
    with without_initialization():
        network = spec_of(job.recipe.arch).build(job.recipe.classes, **job.recipe.options)
    load_state(network, job.initial.state, job.initial.origin)
    network.eval()
    return network


def float_start_of(run: RunFolder, recipe: Recipe) -> State:
    """The weights that :func:`teacher_of` takes, as a ``qat`` run keeps them."""
    return float_part(read_weights(run.path / FLOAT_START, spec_of(recipe.arch)).state)


def refuse_other_pictures(job: TrainJob, group: ProcessGroup) -> None:
    """Raises InputError, which names the rank, where a process finds other pictures than the first."""
    if group.share[1] == 1:
        return
    first, *others = group.gather([listing_of(images) for images in (job.sets.train, job.sets.val)])
    for rank, found in enumerate(others, 1):
        if found != first:
            where = f"rank {rank} finds other pictures in {printable(job.recipe.data)} than rank 0"
            raise InputError(f"{where}: all machines need the same files there")


@contextlib.contextmanager
def training_kernels(callbacks: Callbacks, sync_bn: bool = False, bf16: bool = False) -> Iterator[None]:
    """Fast gradients on a processor; MegEngine's own on a GPU, or where oneDNN is missing.

    Raises FailureError where it is missing and ``sync_bn`` or ``bf16`` needs it, and InputError where the processor has
    no bfloat16: a run may go on on another one.
    """
    if bf16:
        refuse_bfloat16()
    with contextlib.ExitStack() as stack:
        if runs_on_processor():
            try:
                stack.enter_context(fast_gradients(bf16))
            except FailureError as error:
                if sync_bn or bf16:
                    raise
                callbacks.on_message(f"{error}; training goes on with MegEngine's own kernels, many times slower")
        yield


__getattr__ = find_renamed(__name__, {"Outcome": "TrainResult"})

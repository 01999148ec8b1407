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
from mgq.engine.calibration.calibration_run import calibrated
from mgq.engine.classifier.evaluate import matched
from mgq.engine.classifier.metrics import Meter
from mgq.engine.classifier.mode_comparison import Comparison, compared
from mgq.engine.classifier.open import Classifier, newest_of, open_classifier, versions
from mgq.engine.distributed.process_group import (
    Cluster,
    EndedError,
    Peers,
    checked_cluster,
    gpus,
    on_every_device,
    on_processor,
)
from mgq.engine.runs.provenance import listing_of, this_process
from mgq.engine.runs.run_folder import LAST, RunFolder
from mgq.engine.runs.training_state import START_AGAIN, TrainingState
from mgq.engine.training.initial_weights import Beginning, beginning_of, float_weights, keeps_batch_norm, wanted_network
from mgq.engine.training.input_layer import stem_rate
from mgq.engine.training.recipe import DISTILLED, SYNTHETIC, Recipe, Start, Task, plain, recipe_for, recipe_from
from mgq.engine.training.train_options import Request, all_changes, data_of, refuse_changed
from mgq.engine.training.trainer import StoppedError, Trainer
from mgq.engine.training.training_sets import SYNTHETIC_SIZE, Sets, loaders_of, measuring_loader, read_sets
from mgq.errors import FailureError, InputError, MgqError, printable
from mgq.events import ALONE, Watcher
from mgq.io.download import sha256_of
from mgq.io.records import record_of
from mgq.ptq.calibrate import LAYERWISE_PICTURES
from mgq.ptq.equalization import equalized
from mgq.quantization.modes import Mode
from mgq.quantization.qat import prepared_for_qat
from mgq.quantization.targets import target_called
from mgq.weights.checkpoint import CheckpointInfo, write_checkpoint
from mgq.zoo.layers import without_initialization
from mgq.zoo.registry import ModelSpec, spec_of
from mgq.zoo.weight_loading import fingerprint, float_part, load_state, read_weights

FLOAT_START = "float.safetensors"
"""In the folder of a ``qat`` run: the float network that it began from."""
CALIBRATED_AFTER_TRAIN = 256
COMPARED_AFTER_TRAIN = 2_000
"""Pictures at most on which ``train`` shows what int8 would be like; ``qat`` measures all."""


@dataclass(frozen=True)
class Outcome:
    """What a finished run left: its folder, its recipe, the best epoch's figures, and the three modes compared.

    ``calibrated``: of ``qat``, the figures of the fake-quantized network before it was trained.
    """

    checkpoint: Path
    recipe: Recipe
    best: Mapping[str, float]
    comparison: Comparison
    calibrated: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """A run, ready to go: the same in every process that takes part."""

    recipe: Recipe
    sets: Sets
    beginning: Beginning
    info: CheckpointInfo
    request: Request
    state: TrainingState | None = None


# ---- the two verbs ----


def train(request: Request, watcher: Watcher = ALONE) -> Outcome:
    """Train a float network and keep the best, as ``mgq train`` does.

    It begins with ``checkpoint``, else the zoo's weights where they are installed (or ``pretrained`` fetches them),
    else random ones; without ``data`` it learns the drawn pictures. Writes ``<save>/<arch>.normal``; a run that is
    there is kept under another name. Raises InputError for what cannot be, before anything is written, and for a
    loss that is not a number; StoppedError when the watcher asks it to stop.
    """
    cluster = cluster_of(request)
    if request.resume:
        return resumed(request, Mode.NORMAL, cluster, watcher)
    plan = float_plan(request, watcher)
    with new_run(plan, watcher) as run:
        return finished(plan, run, cluster, watcher)


def float_plan(request: Request, watcher: Watcher) -> Plan:
    """What ``train`` will do."""
    changes = all_changes(request, Mode.NORMAL)
    data = data_of(request, changes)
    spec, given = wanted_network(request, changes)
    spec.refuse_options(request.options)
    sets = read_sets(data, None, changes, watcher)
    beginning = beginning_of(spec, given, sets, request, watcher)
    return planned(request, Mode.NORMAL, spec, data, sets, beginning, changes)


def qat(request: Request, watcher: Watcher = ALONE) -> Outcome:
    """Train on with fake quantization, and make the int8 network, as ``mgq qat`` does.

    It begins with ``checkpoint``, else the newest float run of the architecture under ``save``, else the zoo's
    weights where their classes are those of the data; else it trains a float network first, and says so. Writes
    ``<save>/<arch>.qat``. Raises as :func:`train` does.
    """
    cluster = cluster_of(request)
    if request.resume:
        return resumed(request, Mode.QAT, cluster, watcher)
    changes = all_changes(request, Mode.QAT)
    spec, given = float_weights(request, changes, watcher)
    at_hand = given is not None
    if given is None and cluster.nodes > 1:
        raise InputError(f"--nnodes needs float weights of {spec.name} on every machine: give them, -c CHECKPOINT")
    if given is None:
        refuse_impossible(spec, changes)
        watcher.on_remark(f"no float weights of {spec.name} at hand: training some first, into {request.save}")
        first = float_plan(first_request(request, spec, changes), watcher)
        with new_run(first, watcher) as run:
            trained_everywhere(first, run, cluster, watcher)
            given = read_weights(run.checkpoint, spec)
    data = data_of(request, changes, given)
    if request.distill is not None:
        changes.setdefault("distill", DISTILLED if request.distill else 0.0)
    elif not at_hand:
        changes.setdefault("distill", 0.0)
    sets = read_sets(data, given, changes, watcher)
    beginning = Beginning(
        float_part(given.state),
        given.origin,
        given.options,
        given.info.classes if given.info else None,
        given.info.image_size if given.info else None,
        keeps_batch_norm(given),
    )
    if given.classes != len(sets.train.classes) and beginning.classes is None:
        raise InputError(
            f"{given.origin} answers {given.classes} classes and {sets.train.name} has {len(sets.train.classes)}; "
            f"run `mgq train -a {spec.name} -d {data}` first"
        )
    plan = planned(request, Mode.QAT, spec, data, sets, beginning, changes)
    if at_hand:
        watcher.on_remark(f"{spec.name}: begins with {given.origin}")
    with new_run(plan, watcher) as run:
        return finished(plan, run, cluster, watcher)


def refuse_impossible(spec: ModelSpec, changes: Mapping[str, Any]) -> None:
    """Raises InputError for values that no recipe can have: before minutes are spent on what comes first."""
    values = {name: value for name, value in changes.items() if name != "data"}
    recipe_for(Task(spec.name, Mode.QAT.value, SYNTHETIC, 10, 1_000, SYNTHETIC_SIZE), values)


def first_request(request: Request, spec: ModelSpec, changes: Mapping[str, Any]) -> Request:
    """What ``train`` is asked for before ``qat``: the same pictures, its own epochs and rates."""
    shared = ("image_size", "limit", "seed", "amp", "synthetic_train", "synthetic_val", "jitter", "data")
    kept = {name: changes[name] for name in shared if name in changes}
    return replace(request, arch=spec.name, checkpoint=None, recipe=None, changes=kept, distill=None)


# ---- what is asked for ----


def cluster_of(request: Request) -> Cluster:
    """Where to train. With several GPUs this process keeps off them: those that it starts could not use them."""
    cluster = checked_cluster(request.devices, request.nodes, request.node, request.master)
    if gpus() and (request.devices == 0 or cluster.world > 1):
        mge.set_default_device("cpux")
    return cluster


# ---- a run ----


def planned(
    request: Request,
    mode: Mode,
    spec: ModelSpec,
    data: str,
    sets: Sets,
    beginning: Beginning,
    changes: Mapping[str, Any],
) -> Plan:
    """A run with its whole recipe. Raises InputError where recipe and pictures do not go together."""
    classes = beginning.classes or named_classes(sets.train.classes, changes.get("classes"))
    default_size = beginning.image_size or (SYNTHETIC_SIZE if data == SYNTHETIC else spec.image_size)
    task = Task(
        arch=spec.name,
        mode=mode.value,
        data=data,
        classes=len(classes),
        pictures=len(sets.train),
        image_size=changes.get("image_size", default_size),
        start=start_of(beginning, spec),
        stem_lr=1.0 if beginning.state is None else stem_rate(beginning.state),
        keep_batch_norm=beginning.keeps_batch_norm,
        options=beginning.options,
    )
    recipe = recipe_for(task, {**changes, "classes": len(classes)})
    info = CheckpointInfo(
        arch=spec.name,
        mode=mode.value,
        classes=classes,
        image_size=recipe.image_size,
        origin=f"trained on {sets.train.name}, from {beginning.origin}",
        options=dict(recipe.options),
        target=recipe.target,
        recipe=plain(recipe),
        versions=versions(),
        preprocessing=beginning.preprocessing,
    )
    loaders_of(recipe, sets, request, Peers(), info.preprocessing)
    return Plan(recipe, sets, beginning, info, request)


def start_of(beginning: Beginning, spec: ModelSpec) -> Start:
    if beginning.state is None:
        return Start.RANDOM
    return Start.TRAINED if spec.head in beginning.state else Start.NEW_CLASSIFIER


@contextlib.contextmanager
def new_run(plan: Plan, watcher: Watcher) -> Iterator[RunFolder]:
    """A new folder for the run, with its recipe and, for ``qat``, the float network that it begins with."""
    recipe, request = plan.recipe, plan.request
    with RunFolder.create(request.save, recipe.arch, recipe.mode, request.tensorboard) as run:
        if run.notice:
            watcher.on_remark(run.notice)
        run.write_recipe(recipe.to_toml())
        run.note_environment(
            seed=recipe.seed,
            weights={
                "origin": plan.beginning.origin,
                "sha256": None if plan.beginning.state is None else fingerprint(plan.beginning.state),
            },
            train=listing_of(plan.sets.train),
            val=listing_of(plan.sets.val),
            processes=[this_process(request.workers)],
        )
        if recipe.mode == "qat":
            assert plan.beginning.state is not None
            normal = replace(plan.info, mode="normal", origin=plan.beginning.origin)
            write_checkpoint(run.path / FLOAT_START, plan.beginning.state, normal)
        yield run


def named_classes(names: tuple[str, ...], number: int | None) -> tuple[str, ...]:
    """``names``, with more outputs than there are classes of pictures where ``number`` asks for it."""
    if number is None or number == len(names):
        return names
    if number < len(names):
        raise InputError(f"--classes {number} is fewer than the {len(names)} classes of the pictures: give no less")
    return (*names, *(f"class {i}" for i in range(len(names), number)))


def resumed(request: Request, mode: Mode, cluster: Cluster, watcher: Watcher) -> Outcome:
    """Go on with the run that was interrupted. Raises InputError for options that are not those it began with."""
    arch = request.arch or resumable_arch(request.save, mode)
    with RunFolder.open(request.save, spec_of(arch).name, mode.value, request.tensorboard) as run:
        state = run.read_state()
        recipe = recipe_from(state.recipe, str(run.last))
        refuse_changed(request, recipe, run.path)
        if cluster.world != recipe.devices:
            raise InputError(
                f"{printable(run.path)} was begun on {recipe.devices} devices, not {cluster.world}: give it the same"
            )
        info = info_of_progress(state.progress, recipe, run.last)
        run.keep_metrics(state.progress["epoch"])
        run.note_environment(processes=[this_process(request.workers)])
        sets = read_sets(recipe.data, None, plain(recipe), watcher)
        sets = Sets(*(matched(dataset, info.classes) for dataset in (sets.train, sets.val)))
        watcher.on_remark(f"going on with {run.path}: {recipe.epochs} epochs, {state.progress['epoch']} done")
        plan = Plan(recipe, sets, Beginning(None, info.origin, recipe.options), info, request, state)
        return finished(plan, run, cluster, watcher)


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


def resumable_arch(save: Path, mode: Mode) -> str:
    """The architecture of the newest run under ``save`` that can go on."""
    newest = newest_of(path for path in save.glob(f"*.{mode.value}/{LAST}") if path.is_file())
    if newest is None:
        raise InputError(f"there is no run of mode {mode.value} under {save} to resume; leave out --resume")
    return newest.parent.name.removesuffix(f".{mode.value}")


def finished(plan: Plan, run: RunFolder, cluster: Cluster, watcher: Watcher) -> Outcome:
    """Train until the end of the recipe, then open the best network in its three modes and compare them."""
    best, start = trained_everywhere(plan, run, cluster, watcher)
    run.note_environment(checkpoint_sha256=sha256_of(run.checkpoint))
    normal, simulated = float_and_simulated(plan, run, watcher)
    most = COMPARED_AFTER_TRAIN if plan.recipe.mode == "normal" else len(plan.sets.val)
    pictures = subset(plan.sets.val, min(most, len(plan.sets.val)))
    how: dict[str, Any] = {"workers": plan.request.workers, "max_bad": plan.request.max_bad}
    comparison = compared(normal, simulated, pictures, watcher, **how)
    return Outcome(run.checkpoint, plan.recipe, best, comparison, start)


def float_and_simulated(plan: Plan, run: RunFolder, watcher: Watcher) -> tuple[Classifier, Classifier]:
    """The float network and the fake-quantized one. After ``train`` the latter comes from calibration."""
    if plan.recipe.mode == "qat":
        normal = open_classifier(checkpoint=run.path / FLOAT_START, mode=Mode.NORMAL)
        return normal, open_classifier(checkpoint=run.checkpoint, mode=Mode.QAT)
    normal, other = (open_classifier(checkpoint=run.checkpoint, mode=Mode.NORMAL) for _ in range(2))
    words = (other, plan.sets.train, CALIBRATED_AFTER_TRAIN, plan.recipe.data, watcher.on_progress)
    found = calibrated(*words, on_remark=watcher.on_remark)
    return normal, found.classifier


Figures = tuple[dict[str, float], dict[str, float]]


def trained_everywhere(plan: Plan, run: RunFolder, cluster: Cluster, watcher: Watcher) -> Figures:
    """Train on all devices, as :func:`trained` does on one.

    Raises ElsewhereError on a machine that is not the first: what was learned lies there.
    """
    try:
        figures = on_every_device(cluster, partial(trained, plan, run), watcher, plan.request.prepare)
    except EndedError:
        saved = "its state last saved is kept" if run.last.is_file() else "nothing was saved yet"
        raise StoppedError(f"stopped on {cluster.devices} devices; {saved}", plan.recipe) from None
    if cluster.node:
        raise ElsewhereError(f"this machine has done its part: the network lies on machine 0, in {printable(run.path)}")
    return figures


class ElsewhereError(MgqError):
    """Nothing went wrong, and there is nothing to show: the result is on another machine."""

    exit_code = 0


def trained(plan: Plan, run: RunFolder, peers: Peers, watcher: Watcher) -> Figures:
    """One process's part of a training, to its end; the figures of the best epoch, and those before the first."""
    recipe = plan.recipe
    network = first_network(plan)
    teacher = teacher_of(recipe, run) if recipe.mode == "qat" else None
    train_loader, val_loader = loaders_of(recipe, plan.sets, plan.request, peers, plan.info.preprocessing)
    examples = examples_of(plan)
    with training_kernels(watcher), train_loader, val_loader, examples or contextlib.nullcontext():
        trainer = Trainer(
            recipe,
            network,
            train_loader,
            val_loader,
            run,
            plan.info,
            teacher,
            peers,
            watcher,
            plan.request.report_every,
            examples,
        )
        if plan.state is not None:
            trainer.load(plan.state)
        trainer.fit()
    return trainer.best, trainer.start


def first_network(plan: Plan) -> M.Module:
    """The network as the run begins with it; random parts follow from the seed."""
    recipe, beginning = plan.recipe, plan.beginning
    spec = spec_of(recipe.arch)
    mge.random.seed(recipe.seed + 1)
    drawn = beginning.state is None or spec.head not in beginning.state
    with contextlib.nullcontext() if drawn else without_initialization():
        network = spec.build(recipe.classes, **recipe.options)
    if beginning.state is not None:
        load_state(network, {**network.state_dict(), **beginning.state}, beginning.origin)
    if recipe.batch_norm_momentum:
        for module in network.modules():
            if isinstance(module, M.BatchNorm2d):
                module.momentum = recipe.batch_norm_momentum
    if recipe.mode != "qat":
        return network
    if recipe.calibrate:
        equalized(network, None, target_called(recipe.target), in_place=True)
    return prepared_for_qat(network, recipe.observer, target_called(recipe.target), in_place=True)


def examples_of(plan: Plan) -> Loader | None:
    """Pictures to train on, without augmentation, for what the recipe has to be done before the first step."""
    recipe, pictures = plan.recipe, plan.sets.train
    number = recipe.classifier_pictures
    if recipe.mode == "qat":
        number = LAYERWISE_PICTURES
    if number == 0:
        return None
    few = subset(pictures, min(number, len(pictures)))
    return measuring_loader(recipe, few, plan.request, plan.info.preprocessing)


def teacher_of(recipe: Recipe, run: RunFolder) -> M.Module:
    """The float network that a ``qat`` run began from."""
    network = read_weights(run.path / FLOAT_START, spec_of(recipe.arch)).network
    network.eval()
    return network


@contextlib.contextmanager
def training_kernels(watcher: Watcher) -> Iterator[None]:
    """Fast gradients on a processor; MegEngine's own on a GPU, or where oneDNN is missing."""
    with contextlib.ExitStack() as stack:
        if on_processor():
            try:
                stack.enter_context(fast_gradients())
            except FailureError as error:
                watcher.on_remark(f"{error}; training goes on with MegEngine's own kernels, many times slower")
        yield

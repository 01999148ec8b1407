"""``train`` and ``qat`` as one call each: from what a user asked for to a trained network and what it is worth."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import megengine as mge
import megengine.module as M
import numpy as np
import numpy.typing as npt

from mgq.data.augment import EvalTransform, TrainTransform
from mgq.data.datasets import Dataset, subset, training_folders
from mgq.data.loader import Loader
from mgq.data.synthetic import SyntheticPictures
from mgq.engine.comparison import Comparison, compared
from mgq.engine.distributed import Cluster, Peers, checked_cluster, gpus, on_every_device
from mgq.engine.evaluate import BATCH, matched
from mgq.engine.fast_grad import fast_gradients
from mgq.engine.networks import (
    RUN_CHECKPOINT,
    Classifier,
    newest_run,
    open_classifier,
    quantized_with,
    versions,
    ways_to_weights,
)
from mgq.engine.recipe import (
    SYNTHETIC,
    Recipe,
    Start,
    Task,
    checked_changes,
    option,
    plain,
    read_changes,
    recipe_for,
    recipe_from,
)
from mgq.engine.runs import LAST, RunFolder
from mgq.engine.trainer import Trainer
from mgq.engine.training_state import TrainingState
from mgq.errors import FailureError, InputError, printable
from mgq.events import ALONE, Progress, Watcher
from mgq.files.checkpoint import CheckpointInfo, write_checkpoint
from mgq.quant.calibrate import min_max_ranges
from mgq.quant.modes import Mode
from mgq.quant.qat import prepared_for_qat
from mgq.zoo.adapt import State
from mgq.zoo.layers import without_initialization
from mgq.zoo.registry import ModelSpec, spec_of
from mgq.zoo.weights import (
    Weights,
    fingerprint,
    float_part,
    is_cached,
    load_state,
    packaged_weights,
    published_weights,
    read_weights,
)

DEFAULT_ARCH = "resnet18"
SYNTHETIC_SIZE = 64
FLOAT_START = "float.safetensors"
"""In the folder of a ``qat`` run: the float network that it began from."""
CALIBRATED_AFTER_TRAIN = 256
COMPARED_AFTER_TRAIN = 2_000
"""Pictures at most on which ``train`` shows what int8 would be like; ``qat`` measures all."""


@dataclass(frozen=True)
class Request:
    """What a user asked for; everything may be left out.

    ``changes`` are values of the recipe by name, which come before those of the file ``recipe``. ``devices`` counts
    GPUs (None: all there are; 0: the processor).
    """

    arch: str | None = None
    data: Path | None = None
    save: Path = Path("runs")
    checkpoint: Path | None = None
    recipe: Path | None = None
    changes: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    pretrained: bool = False
    from_scratch: bool = False
    new_head: bool = False
    distill: bool = False
    resume: bool = False
    workers: int | None = None
    max_bad: float = 0.01
    report_every: int = 0
    tensorboard: bool = False
    devices: int | None = None
    nodes: int = 1
    node: int = 0
    master: str | None = None


@dataclass(frozen=True)
class Outcome:
    """What a finished run left: its folder, its recipe, the best epoch's figures, and the three modes compared."""

    checkpoint: Path
    recipe: Recipe
    best: Mapping[str, float]
    comparison: Comparison


@dataclass(frozen=True)
class Sets:
    """Pictures to train on and to measure on, both labelled by the same classes."""

    train: Dataset
    val: Dataset


@dataclass(frozen=True)
class Beginning:
    """The weights that a run begins with: none for random ones. ``origin`` says where they come from."""

    state: State | None
    origin: str
    options: Mapping[str, Any]
    classes: tuple[str, ...] | None = None
    image_size: int | None = None


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
    changes = all_changes(request, Mode.NORMAL)
    data = data_of(request, changes)
    spec, given = wanted_network(request, changes)
    sets = read_sets(data, None, changes, watcher)
    beginning = beginning_of(spec, given, sets, request, watcher)
    return begun(request, Mode.NORMAL, spec, data, sets, beginning, changes, cluster, watcher)


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
    if given is None:
        watcher.on_remark(f"no float weights of {spec.name} at hand: training some first, into {request.save}")
        first = train(first_request(request, spec, changes), watcher)
        given = read_weights(first.checkpoint, spec)
    data = data_of(request, changes, given)
    sets = read_sets(data, given, changes, watcher)
    beginning = Beginning(
        float_part(given.state),
        given.origin,
        given.options,
        given.info.classes if given.info else None,
        given.info.image_size if given.info else None,
    )
    if given.classes != len(sets.train.classes) and beginning.classes is None:
        raise InputError(
            f"{given.origin} answers {given.classes} classes and {sets.train.name} has {len(sets.train.classes)}; "
            f"run `mgq train -a {spec.name} -d {data}` first"
        )
    if request.distill:
        changes.setdefault("distill", 0.5)
    return begun(request, Mode.QAT, spec, data, sets, beginning, changes, cluster, watcher)


def first_request(request: Request, spec: ModelSpec, changes: Mapping[str, Any]) -> Request:
    """What ``train`` is asked for before ``qat``: the same pictures, its own epochs and rates."""
    shared = ("image_size", "limit", "seed", "amp", "synthetic_train", "synthetic_val", "jitter", "data")
    kept = {name: changes[name] for name in shared if name in changes}
    return replace(request, arch=spec.name, checkpoint=None, recipe=None, changes=kept, distill=False)


# ---- what is asked for ----


def cluster_of(request: Request) -> Cluster:
    cluster = checked_cluster(request.devices, request.nodes, request.node, request.master)
    if not uses_gpu(cluster, request):
        mge.set_default_device("cpux")
    return cluster


def uses_gpu(cluster: Cluster, request: Request) -> bool:
    return gpus() > 0 and request.devices != 0


def all_changes(request: Request, mode: Mode) -> dict[str, Any]:
    """What differs from the default recipe: the file's values, then those of the command."""
    in_file = read_changes(request.recipe) if request.recipe else {}
    if in_file.get("mode", mode.value) != mode.value:
        verb = "qat" if in_file["mode"] == "qat" else "train"
        raise InputError(f"{request.recipe} is a recipe for mode {in_file['mode']}: use `mgq {verb} --recipe`")
    in_file.pop("mode", None)
    changes = {**in_file, **checked_changes(request.changes, "the command")}
    changes["devices"] = checked_cluster(request.devices, request.nodes, request.node, request.master).world
    if changes.get("amp") and gpus() == 0:
        raise InputError("--amp needs a GPU that computes in float16, and there is none here: leave it out")
    return changes


def data_of(request: Request, changes: dict[str, Any], given: Weights | None = None) -> str:
    """The folder of pictures, or ``synthetic``; taken out of ``changes``.

    By default what ``given`` was trained on, else the drawn pictures.
    """
    in_recipe = changes.pop("data", None)
    if request.data is not None:
        return str(request.data.resolve()) if str(request.data) != SYNTHETIC else SYNTHETIC
    if in_recipe is not None:
        return str(in_recipe)
    known = given.info.recipe.get("data") if given is not None and given.info else None
    return str(known) if known else SYNTHETIC


def wanted_network(request: Request, changes: dict[str, Any]) -> tuple[ModelSpec, Weights | None]:
    """The architecture, and the weights of ``--checkpoint``; taken out of ``changes``."""
    in_recipe = changes.pop("arch", None)
    arch = request.arch or in_recipe
    changes.pop("options", None) if request.options else None
    if request.checkpoint is None:
        return spec_of(arch or DEFAULT_ARCH), None
    weights = read_weights(request.checkpoint, spec_of(arch) if arch else None)
    return spec_of(weights.arch), weights


def float_weights(request: Request, changes: dict[str, Any], watcher: Watcher) -> tuple[ModelSpec, Weights | None]:
    """What quantization-aware training begins with; no weights where none fit."""
    if request.checkpoint is None and request.arch is None and "arch" not in changes:
        newest = newest_of_all(request.save, "normal")
        if newest is not None:
            weights = read_weights(newest)
            return spec_of(weights.arch), weights
    spec, given = wanted_network(request, changes)
    if given is not None:
        return spec, given
    if request.pretrained:
        return spec, zoo_weights(spec, True, watcher)
    run = newest_run(spec, Mode.NORMAL, request.save)
    if run is not None:
        return spec, read_weights(run, spec)
    data = request.data or changes.get("data")
    if data is None or str(data) == SYNTHETIC:
        return spec, None
    found = packaged_weights(spec)
    if found is None:
        return spec, None
    sets = read_sets(str(data), None, changes, watcher)
    return spec, found if found.classes == len(sets.train.classes) else None


def newest_of_all(save: Path, kind: str) -> Path | None:
    """The checkpoint of the newest run of any architecture; None without one."""
    found = [path for path in save.glob(f"*.{kind}/{RUN_CHECKPOINT}") if path.is_file()]
    return max(found, key=lambda path: path.stat().st_mtime, default=None)


def zoo_weights(spec: ModelSpec, fetch: bool, watcher: Watcher) -> Weights | None:
    """The zoo's pretrained weights: those that are installed or were fetched before, or with ``fetch`` any."""
    found = packaged_weights(spec)
    if found is not None:
        return found
    if fetch and not spec.checkpoints:
        raise InputError(f"there are no pretrained weights of {spec.name}: {ways_to_weights(spec)}")
    if fetch or is_cached(spec, "normal"):
        return published_weights(spec, "normal", watcher.on_progress)
    return None


def beginning_of(spec: ModelSpec, given: Weights | None, sets: Sets, request: Request, watcher: Watcher) -> Beginning:
    """What training begins with. Raises InputError where a checkpoint's classes are not those of the pictures."""
    if request.from_scratch and (given is not None or request.pretrained):
        raise InputError("--from-scratch begins with random weights: leave out --checkpoint and --pretrained")
    from_zoo = given is None
    weights = given
    if weights is None and not request.from_scratch:
        weights = zoo_weights(spec, request.pretrained, watcher)
    if weights is None:
        watcher.on_remark(f"{spec.name}: random weights, trained from scratch")
        return Beginning(None, "random weights", request.options)
    for name, value in request.options.items():
        has = {**spec.options, **weights.options}.get(name)
        if has != value:
            raise InputError(f"{weights.origin} has {name} {has}, not {value}; leave the option out")
    state = float_part(weights.state)
    size = weights.info.image_size if weights.info else None
    fits = has_classes_of(weights, sets.train)
    if fits and not request.new_head:
        watcher.on_remark(f"{spec.name}: begins with {weights.origin}")
        return Beginning(state, weights.origin, weights.options, image_size=size)
    if not (from_zoo or request.new_head):
        raise InputError(
            f"{weights.origin} answers {classes_in_words(weights)} and {sets.train.name} has "
            f"{len(sets.train.classes)}; pass --new-head to begin with a new classifier"
        )
    watcher.on_remark(f"{spec.name}: begins with {weights.origin}, and a new classifier for these classes")
    head = spec.head.removesuffix("weight")
    body = {name: value for name, value in state.items() if not name.startswith(head)}
    return Beginning(body, weights.origin, weights.options, image_size=size)


def has_classes_of(weights: Weights, dataset: Dataset) -> bool:
    """Whether the classifier's outputs are the classes of ``dataset`` in order, as far as their names are known."""
    if weights.info is not None:
        return weights.info.classes == dataset.classes
    return weights.classes == len(dataset.classes)


def classes_in_words(weights: Weights) -> str:
    if weights.info is None or not weights.info.classes:
        return f"{weights.classes} classes"
    shown = ", ".join(printable(name) for name in weights.info.classes[:3])
    more = f" and {weights.classes - 3} more" if weights.classes > 3 else ""
    return f"{weights.classes} classes ({shown}{more})"


def read_sets(data: str, given: Weights | None, changes: Mapping[str, Any], watcher: Watcher) -> Sets:
    """The pictures in ``data``, labelled as ``given`` numbers its classes. Raises InputError where they do not fit."""
    if data == SYNTHETIC:
        seed = changes.get("seed", 0)
        size = changes.get("image_size", given.info.image_size if given and given.info else SYNTHETIC_SIZE)
        counts = {"train": changes.get("synthetic_train", 0), "val": changes.get("synthetic_val", 0)}
        default = recipe_for(Task("resnet18", "normal", SYNTHETIC, 10, 1, SYNTHETIC_SIZE), {})
        sets = Sets(
            SyntheticPictures(counts["train"] or default.synthetic_train, seed, size, "train"),
            SyntheticPictures(counts["val"] or default.synthetic_val, seed, size, "val"),
        )
    else:
        sets = Sets(*training_folders(Path(data), watcher.on_progress))
    if given is not None and given.info is not None:
        sets = Sets(*(matched(dataset, given.info.classes) for dataset in (sets.train, sets.val)))
    limit = changes.get("limit", 0)
    return Sets(subset(sets.train, limit), subset(sets.val, limit)) if limit else sets


# ---- a run ----


def begun(
    request: Request,
    mode: Mode,
    spec: ModelSpec,
    data: str,
    sets: Sets,
    beginning: Beginning,
    changes: Mapping[str, Any],
    cluster: Cluster,
    watcher: Watcher,
) -> Outcome:
    """A new run, from its recipe to its outcome."""
    classes = beginning.classes or named_classes(sets.train.classes, changes.get("classes"))
    default_size = beginning.image_size or (SYNTHETIC_SIZE if data == SYNTHETIC else spec.image_size)
    task = Task(
        arch=spec.name,
        mode=mode.value,
        data=data,
        classes=len(classes),
        pictures=len(sets.train),
        image_size=changes.get("image_size", default_size),
        start=Start.RANDOM if beginning.state is None else Start.TRAINED,
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
        recipe=plain(recipe),
        versions=versions(),
    )
    plan = Plan(recipe, sets, beginning, info, request)
    loaders_of(plan, Peers())  # whatever is wrong with the recipe and the pictures comes to light here
    with RunFolder.create(request.save, spec.name, mode.value, request.tensorboard) as run:
        if run.notice:
            watcher.on_remark(run.notice)
        run.write_recipe(recipe.to_toml())
        if mode is Mode.QAT:
            assert beginning.state is not None
            normal = replace(info, mode="normal", origin=beginning.origin)
            write_checkpoint(run.path / FLOAT_START, beginning.state, normal)
        return finished(plan, run, cluster, watcher)


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
        run.keep_metrics(state.progress["epoch"])
        body = dict(state.progress["info"])
        info = CheckpointInfo(**{**body, "classes": tuple(body["classes"])})
        known = {name: value for name, value in plain(recipe).items() if value or name == "seed"}
        sets = read_sets(recipe.data, None, known, watcher)
        sets = Sets(*(matched(dataset, info.classes) for dataset in (sets.train, sets.val)))
        watcher.on_remark(f"going on with {run.path}: {recipe.epochs} epochs, {state.progress['epoch']} done")
        plan = Plan(recipe, sets, Beginning(None, info.origin, recipe.options), info, request, state)
        return finished(plan, run, cluster, watcher)


def resumable_arch(save: Path, mode: Mode) -> str:
    """The architecture of the newest run under ``save`` that can go on."""
    found = [path for path in save.glob(f"*.{mode.value}/{LAST}") if path.is_file()]
    if not found:
        raise InputError(f"there is no run of mode {mode.value} under {save} to resume; leave out --resume")
    newest = max(found, key=lambda path: path.stat().st_mtime)
    return newest.parent.name.removesuffix(f".{mode.value}")


def refuse_changed(request: Request, recipe: Recipe, path: Path) -> None:
    """Raises InputError where the request says otherwise than ``recipe``."""
    wanted = dict(read_changes(request.recipe)) if request.recipe else {}
    wanted |= checked_changes(request.changes, "the command")
    if request.data is not None:
        wanted["data"] = data_of(request, {})
    if request.options:
        wanted["options"] = {**recipe.options, **request.options}
    if request.distill:
        wanted.setdefault("distill", recipe.distill or 0.5)
    if request.checkpoint is not None or request.pretrained or request.from_scratch or request.new_head:
        raise InputError(f"--resume goes on with the weights of {path}: leave out what chooses others")
    for name, value in wanted.items():
        has = getattr(recipe, name)
        if value != has:
            given = f"{value!r}" if isinstance(value, str) else value
            raise InputError(
                f"{path} was begun with {option(name)} {has}, not {given}: leave the option out to resume, "
                "or leave out --resume to start anew"
            )


def finished(plan: Plan, run: RunFolder, cluster: Cluster, watcher: Watcher) -> Outcome:
    """Train until the end of the recipe, then open the best network in its three modes and compare them."""
    best = on_every_device(cluster, lambda peers: trained(plan, run, peers, watcher))
    normal, simulated = float_and_simulated(plan, run, watcher)
    most = COMPARED_AFTER_TRAIN if plan.recipe.mode == "normal" else len(plan.sets.val)
    pictures = subset(plan.sets.val, min(most, len(plan.sets.val)))
    how = {"workers": plan.request.workers, "max_bad": plan.request.max_bad}
    return Outcome(run.checkpoint, plan.recipe, best, compared(normal, simulated, pictures, watcher, **how))


def float_and_simulated(plan: Plan, run: RunFolder, watcher: Watcher) -> tuple[Classifier, Classifier]:
    """The float network and the fake-quantized one. After ``train`` the latter comes from calibration."""
    if plan.recipe.mode == "qat":
        normal = open_classifier(checkpoint=run.path / FLOAT_START, mode=Mode.NORMAL)
        return normal, open_classifier(checkpoint=run.checkpoint, mode=Mode.QAT)
    normal, other = (open_classifier(checkpoint=run.checkpoint, mode=Mode.NORMAL) for _ in range(2))
    return normal, calibrated_quickly(other, plan, watcher)


def calibrated_quickly(classifier: Classifier, plan: Plan, watcher: Watcher) -> Classifier:
    """``classifier`` (mode ``normal``, used up) fake-quantized with the ranges of some training pictures."""
    pictures = subset(plan.sets.train, min(len(plan.sets.train), CALIBRATED_AFTER_TRAIN))
    with measuring_loader(plan.recipe, pictures, plan.request) as loader:

        def batches() -> Iterator[npt.NDArray[np.uint8]]:
            for number, batch in enumerate(loader, 1):
                yield batch.images
                watcher.on_progress(Progress("calibrate", number, len(loader), "batches"))

        spec, weights = classifier.spec, fingerprint(classifier.network.state_dict())
        ranges = min_max_ranges(classifier.network, batches(), spec.name, weights, {})
    return quantized_with(classifier, ranges, Mode.QAT)


def trained(plan: Plan, run: RunFolder, peers: Peers, watcher: Watcher) -> dict[str, float]:
    """One process's part of a training, to its end; the figures of the best epoch."""
    recipe = plan.recipe
    network = first_network(plan)
    teacher = teacher_of(recipe, run) if recipe.distill else None
    train_loader, val_loader = loaders_of(plan, peers)
    with training_kernels(watcher), train_loader, val_loader:
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
        )
        if plan.state is not None:
            trainer.load(plan.state)
        trainer.fit()
    return trainer.best


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
    return prepared_for_qat(network, recipe.observer, in_place=True) if recipe.mode == "qat" else network


def teacher_of(recipe: Recipe, run: RunFolder) -> M.Module:
    """The float network that a ``qat`` run began from."""
    network = read_weights(run.path / FLOAT_START, spec_of(recipe.arch)).network
    network.eval()
    return network


def loaders_of(plan: Plan, peers: Peers) -> tuple[Loader, Loader]:
    """Loaders of the pictures to learn from and to measure on."""
    recipe, request = plan.recipe, plan.request
    train_transform = TrainTransform(
        recipe.image_size, scale=(recipe.crop_scale, 1.0), flip=recipe.flip, jitter=recipe.jitter
    )
    train_loader = Loader(
        plan.sets.train,
        train_transform,
        recipe.batch_size,
        shuffle=True,
        seed=recipe.seed,
        workers=request.workers,
        drop_last=True,
        max_bad=request.max_bad,
        rank=peers.rank,
        ranks=peers.count,
    )
    return train_loader, measuring_loader(recipe, plan.sets.val, request)


def measuring_loader(recipe: Recipe, val: Dataset, request: Request) -> Loader:
    transform = EvalTransform(recipe.image_size, interpolation=spec_of(recipe.arch).interpolation)
    return Loader(val, transform, BATCH, workers=request.workers, broken="drop", max_bad=request.max_bad)


@contextlib.contextmanager
def training_kernels(watcher: Watcher) -> Iterator[None]:
    """Fast gradients on a processor; MegEngine's own on a GPU, or where oneDNN is missing."""
    with contextlib.ExitStack() as stack:
        if not mge.get_default_device().startswith("gpu") and not (
            mge.get_default_device().startswith("xpu") and gpus()
        ):
            try:
                stack.enter_context(fast_gradients())
            except FailureError as error:
                watcher.on_remark(f"{error}; training goes on with MegEngine's own kernels, many times slower")
        yield

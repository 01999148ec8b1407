"""One process's part of a training: the network that it begins with, its pictures, its kernels, and the loop."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import megengine as mge
import megengine.module as M

from mgq.cpu_kernels import fast_gradients
from mgq.data.datasets import subset
from mgq.data.loader import Loader
from mgq.engine.distributed.process_group import ProcessGroup, runs_on_processor
from mgq.engine.runs.provenance import listing_of
from mgq.engine.runs.run_folder import RunFolder
from mgq.engine.runs.training_state import TrainingState
from mgq.engine.training.initial_weights import InitialWeights
from mgq.engine.training.recipe import Recipe
from mgq.engine.training.train_options import TrainOptions, refuse_bfloat16
from mgq.engine.training.trainer import Trainer
from mgq.engine.training.training_sets import Sets, make_loaders, make_measuring_loader
from mgq.errors import FailureError, InputError, printable
from mgq.events import Callbacks
from mgq.machine import keep_freed_memory
from mgq.ptq.steps import LAYERWISE_IMAGES
from mgq.quantization.qat import prepare_qat
from mgq.quantization.targets import get_target
from mgq.weights.checkpoint import CheckpointInfo
from mgq.zoo.layers import without_initialization
from mgq.zoo.network_state import state_of
from mgq.zoo.registry import spec_of
from mgq.zoo.weight_loading import load_state

Figures = tuple[dict[str, float], dict[str, float]]


@dataclass(frozen=True)
class TrainJob:
    """A run, ready to go: the same in every process that takes part."""

    recipe: Recipe
    sets: Sets
    initial: InitialWeights
    info: CheckpointInfo
    train_options: TrainOptions
    state: TrainingState | None = None


def train_on_device(job: TrainJob, run: RunFolder, group: ProcessGroup, callbacks: Callbacks) -> Figures:
    """Run one process's part of a training; return the figures of the best epoch, and those before the first."""
    keep_freed_memory()  # before MegEngine starts its threads
    recipe = job.recipe
    refuse_other_pictures(job, group)
    network = make_first_network(job)
    teacher = teacher_of(job) if recipe.mode == "qat" else None
    train_loader, val_loader = make_loaders(recipe, job.sets, job.train_options, group, job.info.preprocessing)
    examples = examples_of(job)
    with train_loader, val_loader, examples or contextlib.nullcontext():
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
        # With MegEngine's own kernels alone calibration gives the same bits on any number of cores.
        trainer.prepare()
        with training_kernels(callbacks, recipe.sync_bn and group.world_size > 1, recipe.bf16):
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
    return prepare_qat(network, recipe.observer, get_target(recipe.target), in_place=True)


def examples_of(job: TrainJob) -> Loader | None:
    """Pictures to train on, without augmentation, for what the recipe has to be done before the first step."""
    recipe, images = job.recipe, job.sets.train
    number = recipe.classifier_pictures
    if recipe.mode == "qat":
        number = LAYERWISE_IMAGES
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

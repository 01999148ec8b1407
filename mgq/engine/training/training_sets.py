"""The pictures of a training: to learn from and to measure on, and how they are read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mgq.data.augmentation import EvalTransform, TrainTransform
from mgq.data.datasets import Dataset, subset
from mgq.data.labelled_folders import training_folders
from mgq.data.loader import Loader
from mgq.data.synthetic import SyntheticImages
from mgq.engine.classifier.evaluate import batch_for
from mgq.engine.classifier.labelled_sets import match_classes
from mgq.engine.distributed.process_group import ProcessGroup
from mgq.engine.training.recipe import SYNTHETIC, Recipe, Task, make_recipe
from mgq.engine.training.train_options import TrainOptions
from mgq.events import Callbacks
from mgq.weights.preprocessing import Preprocessing
from mgq.zoo.registry import spec_of
from mgq.zoo.weight_loading import Weights

SYNTHETIC_SIZE = 64


@dataclass(frozen=True)
class Sets:
    """Pictures to train on and to measure on, both labelled by the same classes."""

    train: Dataset
    val: Dataset


def read_sets(data: str, given: Weights | None, changes: Mapping[str, Any], callbacks: Callbacks) -> Sets:
    """The pictures in ``data``, labelled as ``given`` numbers its classes. Raises InputError where they do not fit."""
    if data == SYNTHETIC:
        seed = changes.get("seed", 0)
        size = changes.get("image_size", given.info.image_size if given and given.info else SYNTHETIC_SIZE)
        counts = {"train": changes.get("synthetic_train", 0), "val": changes.get("synthetic_val", 0)}
        default = make_recipe(Task("resnet18", "normal", SYNTHETIC, 10, 1, SYNTHETIC_SIZE), {})
        sets = Sets(
            SyntheticImages(counts["train"] or default.synthetic_train, seed, size, "train"),
            SyntheticImages(counts["val"] or default.synthetic_val, seed, size, "val"),
        )
    else:
        sets = Sets(*training_folders(Path(data), callbacks.on_progress, callbacks.on_message))
    if given is not None and given.info is not None:
        sets = Sets(*(match_classes(dataset, given.info.classes) for dataset in (sets.train, sets.val)))
    limit = changes.get("limit", 0)
    return Sets(subset(sets.train, limit), subset(sets.val, limit)) if limit else sets


def make_loaders(
    recipe: Recipe, sets: Sets, request: TrainOptions, group: ProcessGroup, how: Preprocessing | None
) -> tuple[Loader, Loader]:
    """Loaders of the pictures to learn from and to measure on."""
    train_transform = TrainTransform(
        recipe.image_size, scale=(recipe.crop_scale, 1.0), flip=recipe.flip, jitter=recipe.jitter
    )
    train_loader = Loader(
        sets.train,
        train_transform,
        # As many pictures a step as the run began with, whatever the number of processes is now.
        recipe.batch_size * recipe.devices // group.world_size,
        shuffle=True,
        seed=recipe.seed,
        workers=request.workers,
        drop_last=True,
        max_bad=request.max_bad,
        rank=group.rank,
        ranks=group.world_size,
    )
    return train_loader, make_measuring_loader(recipe, sets.val, request, how)


def make_measuring_loader(recipe: Recipe, images: Dataset, request: TrainOptions, how: Preprocessing | None) -> Loader:
    """A loader of ``images`` as they are measured on, prepared as ``how`` says or as the architecture's are."""
    how = how or spec_of(recipe.arch).preprocessing
    transform = EvalTransform(recipe.image_size, how.shorter_side(recipe.image_size), how.interpolation)
    batch = batch_for(recipe.image_size)
    return Loader(images, transform, batch, workers=request.workers, broken="drop", max_bad=request.max_bad)

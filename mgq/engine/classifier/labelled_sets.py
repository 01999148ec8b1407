"""The labelled images that a network is measured on, and their classes as the network knows them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mgq.data import SYNTHETIC
from mgq.data.datasets import Dataset, Selection
from mgq.data.labelled_folders import evaluation_folder, validation_folder
from mgq.data.synthetic import SyntheticImages
from mgq.engine.classifier.classifier import class_names
from mgq.engine.classifier.label_names import join_names
from mgq.errors import InputError, plural, printable
from mgq.events import OnMessage, OnProgress, log_message, log_progress

SYNTHETIC_VAL = 500
"""Pictures that a run on the synthetic set is measured on, unless its recipe says otherwise."""


def evaluation_data(
    root: Path | None,
    recipe: Mapping[str, Any],
    image_size: int,
    on_progress: OnProgress = log_progress,
    on_message: OnMessage = log_message,
) -> Dataset:
    """The labelled pictures in ``root``; without one, those that the run of ``recipe`` was measured on. If ``root`` is
    what it was trained on, these, too.

    ``recipe`` is what a checkpoint keeps of its training, empty where there was none; ``image_size`` is that of
    synthetic pictures where it does not say. Raises InputError where there is neither, or the folder is no labelled
    set.
    """
    if root is not None and not was_trained_on(recipe, root):
        return evaluation_folder(root, on_progress, on_message)
    data = recipe.get("data")
    if not isinstance(data, str) or not data:
        raise InputError("these weights do not say which pictures they are measured on: pass -d FOLDER")
    if data == SYNTHETIC:
        count, seed, size = (int(recipe.get(key) or 0) for key in ("synthetic_val", "seed", "image_size"))
        return SyntheticImages(count or SYNTHETIC_VAL, seed, size or image_size, "val")
    if not Path(data).is_dir():
        raise InputError(
            f"the pictures that these weights were trained on are not in {printable(data)}: pass -d FOLDER"
        )
    return validation_folder(Path(data), on_progress, on_message)


def was_trained_on(recipe: Mapping[str, Any], folder: Path) -> bool:
    """Whether ``folder`` is the one of a run's ``recipe``."""
    data = recipe.get("data")
    return isinstance(data, str) and data != SYNTHETIC and Path(data).resolve() == folder.resolve()


def match_classes(dataset: Dataset, classes: Sequence[str]) -> Dataset:
    """``dataset`` with its labels as indices into the network's ``classes``, which are matched by name.

    Only the classes that have pictures count. Weights without class names of their own (see ``class_names``) take
    those of a dataset that has as many, in its order. Raises InputError where there are no labels, or the network
    does not know a class.
    """
    labels = dataset.labels
    if labels is None:
        raise InputError(f"{dataset.name} has no classes: put the pictures in <class>/ to measure accuracy")
    names = adopt_names(classes, dataset)
    if names == dataset.classes:
        return dataset
    place = {name: index for index, name in enumerate(names)}
    used = np.unique(labels).tolist()
    unknown = [dataset.classes[label] for label in used if dataset.classes[label] not in place]
    if unknown:
        others = "weights for these with -c"
        if len(names) == len(dataset.classes):  # perhaps the same ones, under other names
            others += ", or, where -c is an imported ONNX file, its own names in your words by --labels FILE"
        raise InputError(
            f"{dataset.name} has {plural(len(unknown), 'class')} that the network does not know "
            f"({join_names(unknown)}; it knows {join_names(names)}): give pictures of its classes with -d, or {others}"
        )
    translation = np.zeros(len(dataset.classes), np.int64)
    translation[used] = [place[dataset.classes[label]] for label in used]
    return Selection(dataset, np.arange(len(dataset)), translation[labels], names)


def adopt_names(classes: Sequence[str], dataset: Dataset) -> tuple[str, ...]:
    """The names of a network's ``classes``; where these are numbers alone, those of a ``dataset`` that has as many."""
    names = tuple(classes)
    is_unnamed = names == class_names(len(names)) and len(names) != 1000
    return dataset.classes if is_unnamed and len(names) == len(dataset.classes) else names

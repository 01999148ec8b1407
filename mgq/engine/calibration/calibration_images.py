"""Finds the images of a calibration: those to measure ranges on, and labelled ones to measure accuracy on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mgq.data import SYNTHETIC
from mgq.data.datasets import Dataset, list_sources, subset, without_subset
from mgq.data.image_sources import Source, expand_existing
from mgq.data.labelled_folders import ImageFolder, calibration_folder, evaluation_folder, is_unsplit
from mgq.data.transforms import to_batch
from mgq.engine.calibration.calibration_run import spread_evenly
from mgq.engine.classifier.labelled_sets import match_classes, was_trained_on
from mgq.engine.classifier.open import Classifier
from mgq.engine.classifier.predict import read_crops
from mgq.engine.training.training_sets import read_sets
from mgq.errors import InputError
from mgq.events import Callbacks, OnMessage, OnProgress, log_message, log_progress

COMPARED = 48
"""Pictures that float and int8 files are compared on, in each engine."""


@dataclass(frozen=True)
class CalibrationSources:
    """``sources`` to measure ranges on, and ``labelled`` ones that are none of them, where there are any.

    ``why_not`` says what keeps the accuracy from being measured.
    """

    name: str
    sources: Sequence[Source] | Dataset | None
    labelled: Dataset | None
    why_not: str = ""


def find_images_nearby(
    classifier: Classifier,
    named: Sequence[str],
    data: Path | None,
    images: int,
    on_progress: OnProgress = log_progress,
    on_message: OnMessage = log_message,
) -> CalibrationSources:
    """As :func:`find_calibration_sources`, but without sources where nothing is named and weights know of no
    pictures."""
    if not named and data is None and not classifier.recipe.get("data"):
        return CalibrationSources("", None, None, "there are no pictures")
    return find_calibration_sources(classifier, named, data, images, on_progress, on_message)


def find_calibration_sources(
    classifier: Classifier,
    named: Sequence[str],
    data: Path | None,
    images: int,
    on_progress: OnProgress = log_progress,
    on_message: OnMessage = log_message,
) -> CalibrationSources:
    """The ``named`` files and folders; else those of the folder ``data``; else those the network was trained on.

    Raises InputError where there are none.
    """
    if named:
        arguments = [*named, *([str(data)] if data is not None else [])]
        sources = expand_existing(arguments, on_message)
        return CalibrationSources(", ".join(arguments), sources, None, "the pictures have no labels")
    if data is None or (is_unsplit(data) and was_trained_on(classifier.recipe, data)):
        return find_training_images(classifier, on_progress)
    dataset = calibration_folder(data, on_progress, on_message)
    try:
        labelled = evaluation_folder(data, on_progress, listed=dataset)
        same = isinstance(labelled, ImageFolder) and labelled.folder == dataset.folder
        rest = without_subset(labelled, images) if same else labelled
        if not len(rest):
            why_not = f"all {len(labelled)} labelled pictures are calibrated on: give a smaller --images"
            return CalibrationSources(str(data), dataset, None, why_not)
        return CalibrationSources(str(data), dataset, match_classes(rest, classifier.classes))
    except InputError as error:
        return CalibrationSources(str(data), dataset, None, str(error))


def read_some_crops(classifier: Classifier, dataset: Sequence[Source] | Dataset) -> npt.NDArray[np.uint8]:
    """Some of ``dataset`` as ``classifier`` sees them, evenly spread: uint8 (N, 3, H, W). Those that cannot be read
    are left out."""
    sources = list(dataset) if isinstance(dataset, Sequence) else list_sources(subset(dataset, COMPARED))
    crops = [
        crop for _, crop in read_crops(classifier, spread_evenly(sources, COMPARED)) if isinstance(crop, np.ndarray)
    ]
    return to_batch(crops)


def find_training_images(classifier: Classifier, on_progress: OnProgress) -> CalibrationSources:
    data = classifier.recipe.get("data")
    if not data:
        raise InputError("calibration needs pictures: `mgq calibrate FOLDER` or -d FOLDER")
    if data != SYNTHETIC and not Path(str(data)).is_dir():
        raise InputError(f"the pictures that these weights were trained on are not in {data}: pass -d FOLDER")
    sets = read_sets(str(data), None, classifier.recipe, Callbacks(on_progress))
    return CalibrationSources(sets.train.name, sets.train, match_classes(sets.val, classifier.classes))

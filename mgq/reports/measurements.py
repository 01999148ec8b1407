"""Holds what networks answered to labelled images: figures, and the images that a page shows.

Reading it imports no MegEngine.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import cv2
import numpy as np
import numpy.typing as npt

from mgq.data.datasets import Dataset, list_sources
from mgq.data.synthetic import SyntheticImages
from mgq.data.transforms import Pixels, to_batch
from mgq.engine.classifier.classifier import Classifier
from mgq.engine.classifier.evaluation_result import Evaluation, agreement
from mgq.engine.classifier.predict import ClassScore, best_scores, read_crops
from mgq.errors import plural

FLOAT, SIMULATED, INT8 = "float32", "fake-quantized", "int8"
THUMBNAIL, QUALITY = 160, 80
SHOWN = 24
"""The default number of images with changed answers on a page."""
VERDICTS = ("int8 was right", "float was right", "neither was right")


@dataclass(frozen=True)
class Change:
    """A picture to which int8 has another answer than float. ``thumbnail`` is what the networks saw of it, a JPEG."""

    name: str
    truth: str
    before: ClassScore
    after: ClassScore
    thumbnail: bytes
    side: int


@dataclass(frozen=True, eq=False)
class Measurements:
    """The evaluations by the names above, all of the same ``dataset``; ``left_out`` says which of them were not."""

    dataset: Dataset
    found: dict[str, Evaluation]
    left_out: str
    changes: dict[str, list[Change]]

    @property
    def synthetic(self) -> bool:
        return isinstance(source_of(self.dataset), SyntheticImages)

    @property
    def images(self) -> int:
        return self.last.images

    @property
    def images_of(self) -> str:
        """How many pictures were measured, and of what."""
        if self.synthetic:
            return plural(self.images, "synthetic picture")
        return f"{plural(self.images, 'picture')} of {self.dataset.name}"

    @property
    def last(self) -> Evaluation:
        """The evaluation of int8, or of float where it is the only one."""
        return self.found.get(INT8) or next(iter(self.found.values()))

    @cached_property
    def pair(self) -> tuple[Evaluation, Evaluation] | None:
        """Float and int8, where both were measured."""
        return (self.found[FLOAT], self.found[INT8]) if {FLOAT, INT8} <= self.found.keys() else None

    @cached_property
    def groups(self) -> dict[str, list[int]]:
        """The numbers in the dataset of all pictures whose answer int8 changed, by the verdict on the two answers."""
        groups: dict[str, list[int]] = {verdict: [] for verdict in VERDICTS}
        if self.pair is not None:
            for index, label, before, after in find_changes(*self.pair):
                groups[VERDICTS[0 if after == label else 1 if before == label else 2]].append(index)
        return groups

    def drop(self, name: str) -> tuple[float, float]:
        """Points of top-1 that the network ``name`` loses against float, and the standard error of that.

        The pictures are the same, so only those count on which one is right and the other is not.
        """
        one, other = self.found[FLOAT], self.found[name]
        _, here, there = np.intersect1d(one.indices, other.indices, return_indices=True)
        right = [(found.predictions == found.labels)[places] for found, places in ((one, here), (other, there))]
        loss = right[0].astype(np.float64) - right[1]
        error = float(loss.std(ddof=1)) / math.sqrt(len(loss)) if len(loss) > 1 else math.nan
        return 100 * float(loss.mean()), 100 * error

    def same(self, name: str) -> float:
        """Percent of the pictures that the network ``name`` answers as float does."""
        return agreement(self.found[FLOAT], self.found[name])


def source_of(dataset: Dataset) -> object:
    """The set that ``dataset`` was selected from."""
    while (source := getattr(dataset, "source", None)) is not None:
        dataset = source
    return dataset


def find_changes(one: Evaluation, other: Evaluation) -> list[tuple[int, int, int, int]]:
    """The pictures to which both have different answers: number in the dataset, label, the one's and the other's."""
    shared, here, there = np.intersect1d(one.indices, other.indices, return_indices=True)
    columns = np.stack([shared, one.labels[here], one.predictions[here], other.predictions[there]], 1)
    return [(int(a), int(b), int(c), int(d)) for a, b, c, d in columns[columns[:, 2] != columns[:, 3]]]


def score_of(classifier: Classifier, crop: Pixels, answer: int) -> ClassScore:
    """``answer``, as the network gave it to ``crop``, with its probability."""
    names = classifier.classes
    guesses = best_scores(classifier.logits(to_batch([crop]))[0], names, len(names))
    return next(guess for guess in guesses if guess.index == answer)


def crops_at(classifier: Classifier, dataset: Dataset, indices: Sequence[int]) -> list[Pixels]:
    """What ``classifier`` sees of the pictures with the numbers ``indices``, which could be read a moment ago."""
    sources = list_sources(dataset)
    crops = [crop for _, crop in read_crops(classifier, (sources[index] for index in indices))]
    for crop in crops:
        if isinstance(crop, Exception):
            raise crop
    return [crop for crop in crops if isinstance(crop, np.ndarray)]


def name_of(dataset: Dataset, index: int) -> str:
    """How the page calls a picture: its folder and name, or the number of a drawing."""
    image = dataset.image(index)
    return f"drawing {index}" if isinstance(image, np.ndarray) else f"{image.parent.name}/{image.name}"


def thumbnail_of(crop: npt.NDArray[np.uint8]) -> tuple[bytes, int]:
    """``crop`` as a small JPEG, and its pixels on a side."""
    side = min(THUMBNAIL, crop.shape[0])
    small = cv2.resize(crop, (side, side), interpolation=cv2.INTER_AREA) if side < crop.shape[0] else crop
    _, data = cv2.imencode(".jpg", small, [cv2.IMWRITE_JPEG_QUALITY, QUALITY])
    return data.tobytes(), side

"""What a network answered to labelled images: accuracy, and which classes it takes for which."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt

from mgq.engine.classifier.metrics import Labels, standard_error


@dataclass(frozen=True)
class ClassResult:
    """One class: its ``images``, how many of them were ``correct``, and how often it was ``predicted`` at all."""

    index: int
    name: str
    images: int
    correct: int
    predicted: int

    @property
    def top1(self) -> float:
        """The share of its pictures that were recognised, in percent; NaN where it has none."""
        return 100 * self.correct / self.images if self.images else math.nan

    @property
    def precision(self) -> float:
        """The share of the answers with its name that were right, in percent; NaN where there was none."""
        return 100 * self.correct / self.predicted if self.predicted else math.nan


@dataclass(frozen=True)
class Confusion:
    """``count`` of the ``images`` pictures of the class ``true`` were taken for ``predicted``."""

    true: str
    predicted: str
    count: int
    images: int


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What a network answered to ``images`` pictures.

    ``loss`` is the mean cross entropy in nats, ``top1`` and ``top5`` are percent (0..100). ``predictions``,
    ``labels`` and ``indices`` in the dataset are int64 (images,), in the order of the dataset. ``seconds`` are
    those of reading the pictures and asking the network, which goes on at the same time. ``problems`` has a line
    for each picture that could not be read and so was left out. ``jobs`` is the number of processes that worked.
    """

    images: int
    loss: float
    top1: float
    top5: float
    seconds: float
    predictions: Labels = field(repr=False)
    labels: Labels = field(repr=False)
    indices: Labels = field(repr=False)
    classes: tuple[str, ...] = field(repr=False)
    problems: tuple[str, ...] = ()
    jobs: int = 1

    @property
    def images_per_second(self) -> float:
        return self.images / self.seconds

    @property
    def top1_error(self) -> float:
        """The standard error of ``top1``, in points."""
        return standard_error(self.top1, self.images)

    @cached_property
    def confusion(self) -> npt.NDArray[np.int64]:
        """How often pictures of each class (row) got each answer (column), int64 (classes, classes)."""
        classes = len(self.classes)
        cells = np.bincount(self.labels * classes + self.predictions, minlength=classes * classes)
        return cells.reshape(classes, classes)

    def per_class(self) -> list[ClassResult]:
        """Every class of which there were pictures, in the order of the classes."""
        classes = len(self.classes)
        right = self.labels[self.labels == self.predictions]
        images, correct, predicted = (
            np.bincount(numbers, minlength=classes).tolist() for numbers in (self.labels, right, self.predictions)
        )
        return [
            ClassResult(i, name, images[i], correct[i], predicted[i])
            for i, name in enumerate(self.classes)
            if images[i]
        ]

    def confused(self, most: int | None = None) -> list[Confusion]:
        """The pairs that were mistaken for each other, the most frequent first; at most ``most`` of them."""
        wrong = self.labels != self.predictions
        pairs, counts = np.unique(np.stack([self.labels, self.predictions], 1)[wrong], axis=0, return_counts=True)
        images = np.bincount(self.labels, minlength=len(self.classes))
        order = np.argsort(-counts, kind="stable")[:most]
        return [
            Confusion(self.classes[true], self.classes[answer], count, int(images[true]))
            for (true, answer), count in zip(pairs[order].tolist(), counts[order].tolist(), strict=True)
        ]


def agreement(one: Evaluation, other: Evaluation) -> float:
    """Percent of equal answers to the pictures that both have answered."""
    shared, here, there = np.intersect1d(one.indices, other.indices, return_indices=True)
    return 100 * float((one.predictions[here] == other.predictions[there]).mean()) if shared.size else float("nan")

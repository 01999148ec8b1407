"""Measures a run's networks on labelled images, and finds the answers that int8 changed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import cv2
import numpy as np
import numpy.typing as npt

from mgq.data.datasets import Dataset
from mgq.data.synthetic import SyntheticImages
from mgq.data.transforms import Pixels, to_batch
from mgq.engine.calibration.calibration_run import list_sources
from mgq.engine.classifier.evaluate import Evaluation, batch_for, evaluate, match_classes
from mgq.engine.classifier.mode_comparison import agreement, bytes_of, compare_modes, name_progress
from mgq.engine.classifier.open import Classifier, classifier_from, convert
from mgq.engine.classifier.predict import ClassScore, best_scores, read_crops
from mgq.events import Callbacks, OnProgress
from mgq.quantization.modes import Mode
from mgq.reports.finished_run import Run
from mgq.zoo.weight_loading import Weights

FLOAT, SIMULATED, INT8 = "float32", "fake-quantized", "int8"
THUMBNAIL, QUALITY = 160, 80
SHOWN = 24
"""Pictures with changed answers that the page shows, unless it is told otherwise."""
VERDICTS = ("int8 was right", "float was right", "neither was right")


@dataclass(frozen=True)
class Networks:
    """The networks of a run by the names above; float or the others may be missing."""

    by_name: dict[str, Classifier]

    @property
    def any(self) -> Classifier:
        return next(iter(self.by_name.values()))

    def bytes_of(self, name: str) -> int:
        return bytes_of(self.by_name[name].network)


def networks_of(run: Run, normal: Weights | None) -> Networks:
    """``normal`` is the float network that the run began with, if there is one."""
    found: dict[str, Classifier] = {}
    if normal is not None:
        found[FLOAT] = classifier_from(normal, Mode.NORMAL)
        # Its input is what the run was for, also where the float weights were made for another size.
        found[FLOAT] = replace(found[FLOAT], image_size=run.info.image_size, classes=run.info.classes)
    if run.is_int8:
        found[SIMULATED] = classifier_from(run.weights, Mode.QAT)
        found[INT8] = convert(found[SIMULATED], Mode.QUANTIZED)
    return Networks(found)


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
    def last(self) -> Evaluation:
        """That of int8, or of float where it is alone: what the run was for."""
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


def measure_networks(
    networks: Networks, dataset: Dataset, left_out: str, most: int, on_progress: OnProgress
) -> Measurements:
    """All ``networks`` on the labelled ``dataset``, and ``most`` of those whose answer changed, to be shown."""
    dataset = match_classes(dataset, networks.any.classes)
    by_name = networks.by_name
    batch = batch_for(networks.any.image_size)
    if by_name.keys() >= {FLOAT, SIMULATED}:
        three = compare_modes(by_name[FLOAT], by_name[SIMULATED], dataset, Callbacks(on_progress), batch_size=batch)
        found = {FLOAT: three.normal, SIMULATED: three.qat, INT8: three.quantized}
    else:
        found = {
            name: evaluate(classifier, dataset, batch_size=batch, on_progress=name_progress(name, on_progress))
            for name, classifier in by_name.items()
        }
    result = Measurements(dataset, found, left_out, {})
    chosen = choose_changes(result.groups, most)
    answers = {index: (before, after) for index, _, before, after in find_changes(*result.pair)} if result.pair else {}
    changes = {
        verdict: [change_of(by_name[FLOAT], by_name[INT8], result, index, *answers[index]) for index in group]
        for verdict, group in chosen.items()
    }
    return replace(result, changes=changes)


def choose_changes(groups: dict[str, list[int]], most: int) -> dict[str, list[int]]:
    """``most`` of all in ``groups``, one from each in turn, so that small groups are shown whole."""
    sizes = dict.fromkeys(groups, 0)
    while sum(sizes.values()) < most:
        wanting = [name for name, group in groups.items() if sizes[name] < len(group)]
        if not wanting:
            break
        for name in wanting[: most - sum(sizes.values())]:
            sizes[name] += 1
    return {name: group[: sizes[name]] for name, group in groups.items()}


def change_of(normal: Classifier, int8: Classifier, found: Measurements, index: int, before: int, after: int) -> Change:
    [crop] = crops_at(normal, found.dataset, [index])
    assert found.dataset.labels is not None
    guesses = [score_of(one, crop, answer) for one, answer in ((normal, before), (int8, after))]
    truth = found.last.classes[int(found.dataset.labels[index])]
    return Change(name_of(found.dataset, index), truth, guesses[0], guesses[1], *thumbnail_of(crop))


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

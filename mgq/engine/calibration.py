"""Calibration as a run: pictures in, a checkpoint that is ready for int8 out."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import megengine.module as M
import numpy as np
import numpy.typing as npt
from megengine import Tensor

from mgq.data.datasets import Dataset, evenly, subset
from mgq.data.pictures import read_picture
from mgq.data.sources import Source
from mgq.data.transforms import to_batch
from mgq.engine.likeness import Likeness
from mgq.engine.networks import Classifier, versions
from mgq.engine.predict import BATCH, batched, crops_of
from mgq.engine.provenance import listing_of, this_process
from mgq.engine.runs import RunFolder
from mgq.errors import InputError
from mgq.events import OnProgress, OnRemark, Progress, silent, unheard
from mgq.files.atomic import write_text_atomically
from mgq.files.download import sha256_of
from mgq.quant.calibrate import (
    LAYERWISE_PICTURES,
    as_input,
    calibrated_network,
    checked_method,
    data_free_network,
    pictures_used,
)
from mgq.quant.modes import Mode
from mgq.quant.quality import DEFAULT_QUALITY, Steps, steps_of
from mgq.quant.ranges import ActivationRanges, refuse_incomplete
from mgq.quant.targets import MEGENGINE, Target
from mgq.zoo.weights import fingerprint

RANGES_FILE = "ranges.json"
JUDGED = 48
"""Pictures on which several ways of calibration are compared."""
TIMED = 8
LAYERWISE_PASSES, COMPENSATION_PASSES, SECONDS_PER_MILLION = 4.0, 4.0, 6.0
"""What a calibration costs, in passes of the float network over a picture and in seconds per million weights."""


@dataclass(frozen=True)
class Calibration:
    """What calibration found: the ranges, the network in ``qat`` mode that has them, the pictures left out."""

    ranges: ActivationRanges
    classifier: Classifier
    used: int
    problems: tuple[str, ...]
    beginning: Mapping[str, Any] = field(default_factory=dict)
    """The weights and pictures that it began with, by their SHA-256."""

    def write(self, save: Path) -> Path:
        """Write ranges, checkpoint and what the bits depend on to ``<save>/<arch>.calibration``; the checkpoint's path.

        An earlier calibration is kept under another name. Raises as :meth:`RunFolder.create` does.
        """
        with RunFolder.create(save, self.classifier.spec.name, "calibration") as run:
            self.write_ranges(run.path / RANGES_FILE)
            self.classifier.write_checkpoint(run.checkpoint)
            made = {"processes": [this_process()], "checkpoint_sha256": sha256_of(run.checkpoint)}
            run.note_environment(**self.beginning, **made)
            return run.checkpoint

    def write_ranges(self, path: Path) -> None:
        write_text_atomically(path, self.ranges.to_json())


def calibrated(
    classifier: Classifier,
    sources: Sequence[Source] | Dataset,
    images: int,
    about: str = "",
    on_progress: OnProgress = silent,
    method: str | None = None,
    correct_bias: bool = True,
    compensate: bool = True,
    target: Target = MEGENGINE,
    quality: str = DEFAULT_QUALITY,
    kept: Sequence[str] = (),
    on_remark: OnRemark = unheard,
) -> Calibration:
    """Ranges of ``classifier`` (mode ``normal``) over ``images`` of ``sources``, evenly spread.

    ``quality`` is one of :data:`mgq.quant.quality.QUALITIES`; ``method``, ``correct_bias``, ``compensate`` and
    ``target`` are those of :func:`mgq.quant.calibrate.calibrated_network`, and say otherwise where they are given;
    ``easyquant`` takes 64 pictures at most. The weights of the layers ``kept`` stay float32. Pictures that cannot be
    read are left out and named. ``on_remark`` is told of pictures that are few, blank or alike. Raises InputError where
    no picture can be read, and for another method or quality.
    """
    ways = changed(steps_of(quality), method, correct_bias, compensate)
    if images < 1:
        raise InputError(f"calibration needs at least 1 picture, not {images}")
    if len(sources) == 0:
        raise InputError("there are no pictures to calibrate with; name some")
    wanted = pictures_used(ways[0].method, images)
    few = spread(sources, wanted) if isinstance(sources, Sequence) else subset(sources, wanted)
    chosen = few if isinstance(few, Sequence) else sources_of(few)
    # Equalization looks at the first: they should be of all kinds.
    order = np.random.default_rng(0).permutation(len(chosen))
    pictures = Pictures(classifier, [chosen[i] for i in order], on_progress, on_remark)
    arch, weights = classifier.spec.name, fingerprint(classifier.network.state_dict())
    command = f"mgq calibrate -a {arch} --images {images}"
    command += f" --method {method}" if method else f" --quality {quality}"
    command += "" if correct_bias else " --no-bias-correction"
    command += "" if compensate else " --nearest"
    provenance: dict[str, Any] = {"pictures": about or "unnamed", "images": 0, "of": len(sources)}
    best: tuple[float, M.Module, ActivationRanges, Steps] | None = None
    for number, way in enumerate(ways, 1):
        told = f" {number}/{len(ways)}" if len(ways) > 1 else ""
        words = (way.method, way.correct_bias, way.compensate)
        network, ranges = calibrated_network(
            classifier.network,
            pictures.batches(told),
            arch,
            weights,
            {},
            *words,
            target=target,
            equalize=way.equalize,
            kept=kept,
        )
        pictures.refuse_none()
        score = 0.0 if len(ways) == 1 else noise_of(network, classifier.network, pictures.first(JUDGED))
        if best is None or score < best[0]:
            best = score, network, ranges, way
    assert best is not None
    _, network, ranges, way = best
    provenance |= {
        "images": pictures.used,
        "method": way.method,
        "bias_correction": way.correct_bias,
        "rounding": "compensated" if way.compensate else "nearest",
        "equalized": way.compensate and way.equalize,
        "float_layers": list(kept),
        "choice": "evenly spread over the sorted list",
        **of_all(classifier, command, target),
    }
    refuse_incomplete(network, ranges)
    ranges = replace(ranges, provenance=provenance)
    if way.compensate:
        ranges = replace(ranges, weights=fingerprint(network.state_dict()))
    found = replace(classifier, network=network, fake_quantized=network, mode=Mode.QAT)
    beginning = {"weights": {"origin": classifier.origin, "sha256": weights}, "pictures": listing_of(few)}
    return Calibration(ranges, found, pictures.used, tuple(pictures.problems), beginning)


def calibrated_without_pictures(classifier: Classifier, target: Target = MEGENGINE) -> Calibration:
    """Int8 of ``classifier`` (mode ``normal``) by what its batch norms say, without a picture."""
    provenance = {"pictures": "none: expected by the batch norms", "images": 0}
    provenance |= of_all(classifier, f"mgq calibrate -a {classifier.spec.name} --data-free", target)
    network, ranges = data_free_network(classifier.network, classifier.spec.name, "", provenance, target)
    refuse_incomplete(network, ranges)
    found = replace(classifier, network=network, fake_quantized=network, mode=Mode.QAT)
    weights = fingerprint(classifier.network.state_dict())
    beginning = {"weights": {"origin": classifier.origin, "sha256": weights}, "pictures": listing_of([])}
    ranges = replace(ranges, weights=fingerprint(network.state_dict()))
    return Calibration(ranges, found, 0, (), beginning)


def of_all(classifier: Classifier, command: str, target: Target) -> dict[str, Any]:
    """What every kind of calibration has to say of itself."""
    return {
        "weights": classifier.origin,
        "image_size": classifier.image_size,
        "made_by": command + ("" if target is MEGENGINE else f" --target {target.name}"),
        "versions": versions(),
    }


def changed(ways: tuple[Steps, ...], method: str | None, correct_bias: bool, compensate: bool) -> tuple[Steps, ...]:
    """``ways`` as far as nothing else is asked for; with a ``method`` there is only one. Raises InputError for one that
    there is not."""
    if method is not None:
        ways = (replace(ways[0], method=checked_method(method)),)
    found = [replace(way, correct_bias=way.correct_bias and correct_bias) for way in ways]
    return tuple(dict.fromkeys(found if compensate else [replace(way, compensate=False) for way in found]))


class Pictures:
    """The pictures of a calibration, as batches of what the network sees of them: as often as they are wanted."""

    def __init__(
        self,
        classifier: Classifier,
        sources: Sequence[Source],
        on_progress: OnProgress,
        on_remark: OnRemark = unheard,
    ) -> None:
        self.classifier = classifier
        self.sources = sources
        self.on_progress = on_progress
        self.on_remark = on_remark
        self.used = 0
        self.problems: list[str] = []

    def batches(self, told: str = "") -> Iterator[npt.NDArray[np.uint8]]:
        """uint8 (N, 3, H, W); what cannot be read is noted as a problem."""
        done = self.used = 0
        self.problems = []
        likeness = Likeness()
        for group in batched(crops_of(self.classifier, self.sources), BATCH):
            self.problems.extend(str(crop) for _, crop in group if isinstance(crop, InputError))
            crops = [crop for _, crop in group if isinstance(crop, np.ndarray)]
            self.used += len(crops)
            for crop in crops:
                likeness.add(crop)
            if crops:
                yield to_batch(crops)
            done += len(group)
            self.on_progress(Progress(f"calibrate{told}", done, len(self.sources), "pictures"))
        for line in likeness.warnings():
            self.on_remark(line)
        self.on_remark = unheard  # they are the same pictures the next time

    def first(self, number: int) -> npt.NDArray[np.uint8]:
        """uint8 (N, 3, H, W): so many of them."""
        return Pictures(self.classifier, self.sources[:number], silent).all()

    def all(self) -> npt.NDArray[np.uint8]:
        """uint8 (N, 3, H, W): those that can be read. Raises InputError without any."""
        batches = list(self.batches())
        self.refuse_none()
        return np.concatenate(batches)

    def refuse_none(self) -> None:
        """Raises InputError where no picture could be read."""
        if self.used == 0:
            raise InputError(f"none of {len(self.sources)} pictures could be read; the first: {self.problems[0]}")


def noise_of(network: M.Module, exact: M.Module, pictures: npt.NDArray[np.uint8]) -> float:
    """Mean square of what ``network`` answers to ``pictures`` minus what ``exact`` does, each picture's mean aside."""
    total = 0.0
    for start in range(0, len(pictures), BATCH):
        batch = Tensor(as_input(pictures[start : start + BATCH]))
        change = network(batch).numpy() - exact(batch).numpy()
        total += float(np.square(change - change.mean(axis=1, keepdims=True)).sum())
    return total / len(pictures)


def expected_seconds(classifier: Classifier, images: int, quality: str, method: str | None = None) -> float:
    """About how long :func:`calibrated` will take here: from one timed pass of a few made-up pictures."""
    ways = changed(steps_of(quality), method, True, True)
    size = classifier.image_size
    batch = Tensor(np.zeros((TIMED, 3, size, size), np.float32))
    classifier.network(batch).numpy()
    start = time.perf_counter()
    classifier.network(batch).numpy()
    one = (time.perf_counter() - start) / TIMED
    million = sum(float(value.size) for value in classifier.network.parameters()) / 1e6
    seconds = 0.0
    for way in ways:
        layerwise = min(images, LAYERWISE_PICTURES)
        seconds += one * (images + LAYERWISE_PASSES * layerwise)
        if way.compensate:
            seconds += one * COMPENSATION_PASSES * layerwise + SECONDS_PER_MILLION * million
        if len(ways) > 1:
            seconds += 3 * one * min(images, JUDGED)
    return seconds


def spread(sources: Sequence[Source], number: int) -> list[Source]:
    """``number`` of ``sources`` (or all, where there are fewer), evenly spread."""
    return [sources[i] for i in evenly(len(sources), number)]


@dataclass(frozen=True, kw_only=True)
class DatasetSource(Source):
    """One picture of a dataset, opened or made when it is read."""

    dataset: Dataset
    index: int

    @property
    def name(self) -> str:
        return f"picture {self.index} of {self.dataset.name}"

    def read(self) -> npt.NDArray[np.uint8]:
        picture = self.dataset.picture(self.index)
        return read_picture(picture) if isinstance(picture, Path) else picture


def sources_of(dataset: Dataset) -> list[Source]:
    """The pictures of ``dataset`` in their order."""
    return [DatasetSource(dataset=dataset, index=i) for i in range(len(dataset))]

"""Calibrates a classifier on images, and writes the checkpoint that is ready for int8."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from megengine import Tensor

from mgq.data.datasets import Dataset, list_sources, pick_evenly, subset
from mgq.data.image_sources import Source
from mgq.data.loader import are_too_many, too_many_error
from mgq.data.transforms import to_batch
from mgq.engine.calibration.image_variety import Likeness
from mgq.engine.classifier.open import Classifier, versions
from mgq.engine.classifier.predict import BATCH, group_items, read_crops
from mgq.engine.runs.provenance import listing_of, this_process
from mgq.engine.runs.run_folder import RunFolder
from mgq.errors import InputError, plural
from mgq.events import NO_CALLBACKS, Callbacks, OnMessage, OnProgress, Progress, log_message, log_progress
from mgq.io.atomic import write_text_output
from mgq.io.download import sha256_of
from mgq.ptq.calibrate import calibrate_network, find_best_network
from mgq.ptq.pipeline import HELD_SHARE, MOST_HELD, SearchResult
from mgq.ptq.presets import DEFAULT_CONFIG, CalibrationConfig, count_images_used, data_free_steps
from mgq.ptq.second_process import pays
from mgq.ptq.steps import LAYERWISE_IMAGES, NO_IMAGES, REACTION_IMAGES, RoundWeights
from mgq.quantization.activation_ranges import ActivationRanges, refuse_incomplete
from mgq.quantization.modes import Mode
from mgq.quantization.targets import MEGENGINE, Target
from mgq.zoo.network_state import state_of
from mgq.zoo.weight_loading import fingerprint

RANGES_FILE = "ranges.json"
TIMED = 2
GRID_PASSES, JUDGING_PASSES = 0.65, 0.65
LAYERWISE_PASSES, COMPENSATION_PASSES, SECONDS_PER_MILLION = 0.65, 1.3, 0.8
"""What a calibration costs, in passes of the float network over a picture and in seconds per million weights."""
SHARED = 0.7
"""Part of the time that is left where a second process takes its share: about that for MobileNetV2."""


@dataclass(frozen=True)
class Calibration:
    """The result of a calibration: ranges, the network in ``qat`` mode that has them, and the images left out."""

    ranges: ActivationRanges
    classifier: Classifier
    used: int
    problems: tuple[str, ...]
    beginning: Mapping[str, Any] = field(default_factory=dict)
    """The weights and pictures that it began with, by their SHA-256."""
    found: SearchResult | None = None
    """What was tried, and what it gave; None where there were no pictures."""

    def write(self, save: Path) -> Path:
        """Write ranges, checkpoint and what the bits depend on to ``<save>/<arch>.calibration``; the checkpoint's path.

        An earlier calibration is kept under another name. Raises as :meth:`RunFolder.create` does, and where not all
        can be written; nothing is left of it then.
        """
        with RunFolder.create(save, self.classifier.spec.name, "calibration") as run, run.whole_or_nothing():
            self.write_ranges(run.path / RANGES_FILE)
            self.classifier.write_checkpoint(run.checkpoint)
            made = {"processes": [this_process()], "checkpoint_sha256": sha256_of(run.checkpoint)}
            run.note_environment(**self.beginning, **made)
            return run.checkpoint

    def write_ranges(self, path: Path) -> None:
        write_text_output(path, self.ranges.to_json())


def calibrate(
    classifier: Classifier,
    sources: Sequence[Source] | Dataset,
    images: int,
    about: str = "",
    config: CalibrationConfig = DEFAULT_CONFIG,
    callbacks: Callbacks = NO_CALLBACKS,
    max_bad: float = 1.0,
) -> Calibration:
    """Ranges of ``classifier`` (mode ``normal``) over ``images`` of ``sources``, evenly spread.

    ``config`` says how, ``about`` what the images are. ``easyquant`` takes 64 images at most. Images that cannot be
    read are left out and named; ``callbacks`` get a message about what was done and left out, and where images are few,
    blank or alike. Raises InputError where no image can be read, or more than the share ``max_bad`` cannot, and for a
    method or preset that there is not.
    """
    preset = config.make_preset()
    few = choose_images(sources, images, config)
    seen = CalibrationImages(classifier, shuffle(list_of(few)), callbacks.on_progress, callbacks.on_message)
    arch, weights = classifier.spec.name, fingerprint(state_of(classifier.network))
    pixels = seen.all()
    seen.refuse_too_many_broken(max_bad)
    found, ranges = find_best_network(
        classifier.network,
        pixels,
        arch,
        weights,
        preset,
        config.target,
        config.float_layers,
        callbacks.on_progress,
    )
    for remark in found.remarks():
        callbacks.on_message(remark)
    network = found.network
    refuse_incomplete(network, ranges)
    provenance = {
        "pictures": about or "unnamed",
        "images": seen.used,
        "of": len(sources),
        **describe_config(config, found, ranges.observer),
        **common_provenance(classifier, f"mgq calibrate -a {arch} --images {images}{config.as_flags()}", config.target),
    }
    ranges = replace(ranges, provenance=provenance)
    result = replace(classifier, network=network, fake_quantized=network, mode=Mode.QAT)
    beginning = {"weights": {"origin": classifier.origin, "sha256": weights}, "pictures": listing_of(few)}
    return Calibration(ranges, result, seen.used, tuple(seen.problems), beginning, found)


def choose_images(
    sources: Sequence[Source] | Dataset, images: int, config: CalibrationConfig
) -> Sequence[Source] | Dataset:
    """The ``images`` of ``sources`` that are used, evenly spread. Raises InputError where there are none."""
    if images < 1:
        raise InputError(f"calibration needs at least 1 picture, not {images}")
    if len(sources) == 0:
        raise InputError("there are no pictures to calibrate with; name some")
    wanted = count_images_used(config.method, images)
    return spread_evenly(sources, wanted) if isinstance(sources, Sequence) else subset(sources, wanted)


def list_of(images: Sequence[Source] | Dataset) -> Sequence[Source]:
    return images if isinstance(images, Sequence) else list_sources(images)


def shuffle(sources: Sequence[Source]) -> list[Source]:
    """``sources`` in another order, always the same: those held back, and those that only some steps look at, should
    be of all kinds."""
    return [sources[i] for i in np.random.default_rng(0).permutation(len(sources))]


def describe_config(config: CalibrationConfig, found: SearchResult, observer: str) -> dict[str, Any]:
    """How the ranges were made, for their provenance."""
    return {
        "method": observer,
        "bias_correction": config.correct_bias,
        "rounding": "compensated" if found.draft.rounded else "nearest",
        "float_layers": list(config.float_layers),
        "choice": "evenly spread over the sorted list",
        **found.to_json(),
    }


def calibrate_data_free(classifier: Classifier, target: Target = MEGENGINE) -> Calibration:
    """Int8 of ``classifier`` (mode ``normal``) by what its batch norms say, without a picture."""
    provenance = {"pictures": "none: expected by the batch norms", "images": 0}
    provenance |= common_provenance(classifier, f"mgq calibrate -a {classifier.spec.name} --data-free", target)
    arch, weights = classifier.spec.name, fingerprint(state_of(classifier.network))
    network, ranges = calibrate_network(classifier.network, NO_IMAGES, arch, weights, data_free_steps(target), target)
    refuse_incomplete(network, ranges)
    found = replace(classifier, network=network, fake_quantized=network, mode=Mode.QAT)
    beginning = {"weights": {"origin": classifier.origin, "sha256": weights}, "pictures": listing_of([])}
    return Calibration(replace(ranges, provenance=provenance), found, 0, (), beginning)


def common_provenance(classifier: Classifier, command: str, target: Target) -> dict[str, Any]:
    """The provenance that every kind of calibration records."""
    return {
        "weights": classifier.origin,
        "image_size": classifier.image_size,
        "made_by": command + ("" if target is MEGENGINE else f" --target {target.name}"),
        "versions": versions(),
    }


class CalibrationImages:
    """The images of a calibration as batches of crops; they can be read several times."""

    def __init__(
        self,
        classifier: Classifier,
        sources: Sequence[Source],
        on_progress: OnProgress,
        on_message: OnMessage | None = log_message,
    ) -> None:
        self.classifier = classifier
        self.sources = sources
        self.on_progress = on_progress
        self.on_message = on_message
        self.used = 0
        self.problems: list[str] = []

    def batches(self, label: str = "") -> Iterator[npt.NDArray[np.uint8]]:
        """uint8 (N, 3, H, W); what cannot be read is noted as a problem."""
        done = self.used = 0
        self.problems = []
        likeness = Likeness()
        for group in group_items(read_crops(self.classifier, self.sources), BATCH):
            self.problems.extend(str(crop) for _, crop in group if isinstance(crop, InputError))
            crops = [crop for _, crop in group if isinstance(crop, np.ndarray)]
            self.used += len(crops)
            for crop in crops:
                likeness.add(crop)
            if crops:
                yield to_batch(crops)
            done += len(group)
            self.on_progress(Progress(f"calibrate{label}", done, len(self.sources), "pictures"))
        if self.on_message is not None:
            for line in likeness.warnings():
                self.on_message(line)
        self.on_message = None  # they are the same pictures the next time

    def take(self, number: int) -> npt.NDArray[np.uint8]:
        """The first ``number`` images: uint8 (N, 3, H, W)."""
        return CalibrationImages(self.classifier, self.sources[:number], log_progress, None).all()

    def all(self) -> npt.NDArray[np.uint8]:
        """All images that can be read: uint8 (N, 3, H, W). Raises InputError where there are none."""
        batches = list(self.batches())
        self.refuse_none()
        return np.concatenate(batches)

    def refuse_too_many_broken(self, max_bad: float) -> None:
        """Raises InputError where more than the share ``max_bad`` of the pictures could not be read."""
        if are_too_many(len(self.problems), len(self.sources), max_bad):
            raise too_many_error(self.problems, plural(len(self.sources), "picture"), max_bad)

    def refuse_none(self) -> None:
        """Raises InputError where no picture could be read."""
        if self.used == 0:
            raise InputError(f"none of {len(self.sources):,} pictures could be read; the first: {self.problems[0]}")


def estimate_seconds(
    classifier: Classifier, images: int, preset: str, method: str | None = None, target: Target = MEGENGINE
) -> float:
    """About how long :func:`calibrate` will take here: from one timed pass of a few made-up pictures."""
    chosen = CalibrationConfig(preset, method, target=target).make_preset()
    height, width = classifier.spec.only_size or (classifier.image_size, classifier.image_size)
    batch = Tensor(np.zeros((TIMED, 3, height, width), np.float32))
    classifier.network(batch).numpy()
    start = time.perf_counter()
    classifier.network(batch).numpy()
    one = (time.perf_counter() - start) / TIMED
    million = sum(float(value.size) for value in classifier.network.parameters()) / 1e6
    layerwise, judged = min(images, LAYERWISE_IMAGES), min(images, MOST_HELD)
    grids, again = len(chosen.grids) + len(chosen.rewrites), chosen.finishes[: len(chosen.rewrites)]
    finishes = (*chosen.finishes, *again)
    rounded = sum(isinstance(step, RoundWeights) for step in finishes)
    seconds = one * grids * (GRID_PASSES * min(images, REACTION_IMAGES) + JUDGING_PASSES * judged)
    seconds += one * len(finishes) * (LAYERWISE_PASSES * layerwise + JUDGING_PASSES * judged)
    seconds += rounded * (one * COMPENSATION_PASSES * layerwise + SECONDS_PER_MILLION * million)
    is_shared = pays(classifier.network, 3 * height * width * layerwise, one * min(images // HELD_SHARE, MOST_HELD))
    return seconds * (SHARED if is_shared else 1)


def spread_evenly(sources: Sequence[Source], number: int) -> list[Source]:
    """``number`` of ``sources`` (or all, where there are fewer), evenly spread."""
    return [sources[i] for i in pick_evenly(len(sources), number)]

"""Calibration as a run: pictures in, a checkpoint that is ready for int8 out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mgq.data.datasets import Dataset, subset
from mgq.data.pictures import read_picture
from mgq.data.sources import Source
from mgq.data.transforms import to_batch
from mgq.engine.networks import (
    RUN_CHECKPOINT,
    Classifier,
    versions,
)
from mgq.engine.predict import BATCH, batched, crops_of
from mgq.errors import InputError
from mgq.events import OnProgress, Progress, silent
from mgq.files.atomic import ensure_writable_folder, write_text_atomically
from mgq.quant.calibrate import DEFAULT_METHOD, calibrated_network, checked_method, pictures_used
from mgq.quant.modes import Mode
from mgq.quant.ranges import ActivationRanges, refuse_incomplete
from mgq.quant.targets import MEGENGINE, Target
from mgq.zoo.weights import fingerprint

RANGES_FILE = "ranges.json"


@dataclass(frozen=True)
class Calibration:
    """What calibration found: the ranges, the network in ``qat`` mode that has them, the pictures left out."""

    ranges: ActivationRanges
    classifier: Classifier
    used: int
    problems: tuple[str, ...]

    def write(self, save: Path) -> Path:
        """Write checkpoint and ranges to ``<save>/<arch>.calibration``; the checkpoint's path."""
        folder = ensure_writable_folder(save / f"{self.classifier.spec.name}.calibration")
        self.write_ranges(folder / RANGES_FILE)
        self.classifier.write_checkpoint(folder / RUN_CHECKPOINT)
        return folder / RUN_CHECKPOINT

    def write_ranges(self, path: Path) -> None:
        write_text_atomically(path, self.ranges.to_json())


def calibrated(
    classifier: Classifier,
    sources: Sequence[Source] | Dataset,
    images: int,
    about: str = "",
    on_progress: OnProgress = silent,
    method: str = DEFAULT_METHOD,
    correct_bias: bool = True,
    compensate: bool = True,
    target: Target = MEGENGINE,
) -> Calibration:
    """Ranges of ``classifier`` (mode ``normal``) over ``images`` of ``sources``, evenly spread, by ``method``.

    The methods, ``correct_bias``, ``compensate`` and ``target`` are those of
    :func:`mgq.quant.calibrate.calibrated_network`; ``easyquant`` takes 64 pictures at most. Those that cannot be read
    are left out and named.
    Raises InputError where no picture can be read, and for another method.
    """
    checked_method(method)
    if images < 1:
        raise InputError(f"calibration needs at least 1 picture, not {images}")
    if len(sources) == 0:
        raise InputError("there are no pictures to calibrate with; name some")
    wanted = pictures_used(method, images)
    chosen = spread(sources, wanted) if isinstance(sources, Sequence) else sources_of(subset(sources, wanted))
    problems: list[str] = []

    def batches() -> Iterator[npt.NDArray[np.uint8]]:
        done = 0
        for group in batched(crops_of(classifier, chosen), BATCH):
            problems.extend(str(crop) for _, crop in group if isinstance(crop, InputError))
            crops = [crop for _, crop in group if isinstance(crop, np.ndarray)]
            if crops:
                yield to_batch(crops)
            done += len(group)
            on_progress(Progress("calibrate", done, len(chosen), "pictures"))

    state = classifier.network.state_dict()
    command = f"mgq calibrate -a {classifier.spec.name} --images {images} --method {method}"
    command += "" if correct_bias else " --no-bias-correction"
    command += "" if compensate else " --nearest"
    command += "" if target is MEGENGINE else f" --target {target.name}"
    # The provenance is still a promise when the pictures are read: the count is set right afterwards.
    provenance = {
        "pictures": about or "unnamed",
        "images": 0,
        "of": len(sources),
        "method": method,
        "bias_correction": correct_bias,
        "rounding": "compensated" if compensate else "nearest",
        "choice": "evenly spread over the sorted list",
        "weights": classifier.origin,
        "image_size": classifier.image_size,
        "made_by": command,
        "versions": versions(),
    }
    about_it = (classifier.spec.name, fingerprint(state), provenance, method, correct_bias, compensate)
    network, ranges = calibrated_network(classifier.network, batches(), *about_it, target=target)
    used = len(chosen) - len(problems)
    provenance["images"] = used
    if used == 0:
        raise InputError(f"none of {len(chosen)} pictures could be read; the first: {problems[0]}")
    refuse_incomplete(network, ranges)
    if compensate:
        ranges = replace(ranges, weights=fingerprint(network.state_dict()))
    found = replace(classifier, network=network, fake_quantized=network, mode=Mode.QAT)
    return Calibration(ranges, found, used, tuple(problems))


def spread(sources: Sequence[Source], number: int) -> list[Source]:
    """``number`` of ``sources`` (or all, where there are fewer), evenly spread."""
    if number >= len(sources):
        return list(sources)
    return [sources[i * len(sources) // number] for i in range(number)]


@dataclass(frozen=True)
class DatasetSource(Source):
    """One picture of a dataset, opened or made when it is read."""

    dataset: Dataset | None = None
    index: int = 0

    def read(self) -> npt.NDArray[np.uint8]:
        assert self.dataset is not None
        picture = self.dataset.picture(self.index)
        return read_picture(picture, self.name) if isinstance(picture, Path) else picture


def sources_of(dataset: Dataset) -> list[Source]:
    """The pictures of ``dataset`` in their order."""
    return [DatasetSource(f"picture {i} of {dataset.name}", None, None, dataset, i) for i in range(len(dataset))]

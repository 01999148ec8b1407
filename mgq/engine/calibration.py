"""Calibration as a run: pictures in, a checkpoint that is ready for int8 out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mgq.data.sources import Source
from mgq.data.transforms import to_batch
from mgq.engine.networks import (
    RUN_CHECKPOINT,
    Classifier,
    quantized_with,
    versions,
)
from mgq.engine.predict import BATCH, batched, crops_of
from mgq.errors import InputError
from mgq.events import OnProgress, Progress, silent
from mgq.files.atomic import ensure_writable_folder, write_text_atomically
from mgq.quant.calibrate import min_max_ranges
from mgq.quant.modes import Mode
from mgq.quant.ranges import ActivationRanges
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
    sources: Sequence[Source],
    images: int,
    about: str = "",
    on_progress: OnProgress = silent,
) -> Calibration:
    """Min-max ranges of ``classifier`` (mode ``normal``) over ``images`` of ``sources``, evenly spread.

    Pictures that cannot be read are left out and named. Raises InputError where none can be read.
    """
    if images < 1:
        raise InputError(f"calibration needs at least 1 picture, not {images}")
    if not sources:
        raise InputError("there are no pictures to calibrate with; name some")
    chosen = spread(sources, images)
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
    # The provenance is still a promise when the pictures are read: the count is set right afterwards.
    provenance = {
        "pictures": about or "unnamed",
        "images": 0,
        "of": len(sources),
        "choice": "evenly spread over the sorted list",
        "weights": classifier.origin,
        "image_size": classifier.image_size,
        "made_by": f"mgq calibrate -a {classifier.spec.name} --images {images}",
        "versions": versions(),
    }
    ranges = min_max_ranges(classifier.network, batches(), classifier.spec.name, fingerprint(state), provenance)
    used = len(chosen) - len(problems)
    provenance["images"] = used
    if used == 0:
        raise InputError(f"none of {len(chosen)} pictures could be read; the first: {problems[0]}")
    return Calibration(ranges, quantized_with(classifier, ranges, Mode.QAT), used, tuple(problems))


def spread(sources: Sequence[Source], number: int) -> list[Source]:
    """``number`` of ``sources`` (or all, where there are fewer), evenly spread."""
    if number >= len(sources):
        return list(sources)
    return [sources[i * len(sources) // number] for i in range(number)]

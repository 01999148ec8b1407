"""``mgq analyze`` as a call: measures what quantization does to each layer of a network."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mgq.data.datasets import Dataset, list_sources, subset
from mgq.data.image_sources import Source, expand_existing
from mgq.data.labelled_folders import calibration_folder
from mgq.data.transforms import to_batch
from mgq.deprecation import accept_old_keywords
from mgq.engine.calibration.calibration_run import RANGES_FILE, spread_evenly
from mgq.engine.classifier.labelled_sets import evaluation_data, match_classes
from mgq.engine.classifier.metrics import Labels, standard_error
from mgq.engine.classifier.network_options import RUNS
from mgq.engine.classifier.open import (
    Classifier,
    classifier_from,
    find_newest_arch,
    find_ranges,
    find_weights,
    versions,
)
from mgq.engine.classifier.parity import make_views
from mgq.engine.classifier.predict import read_crops
from mgq.engine.classifier.run_lookup import describe_unused_runs
from mgq.errors import InputError
from mgq.events import OnMessage, OnProgress, log_message, log_progress
from mgq.ptq.sensitivity import EXACT, Effect, LayerSensitivity, Sensitivity, Values, sensitivity_of
from mgq.quantization.activation_ranges import read_ranges
from mgq.quantization.modes import Mode
from mgq.zoo.network_state import state_of
from mgq.zoo.registry import spec_of
from mgq.zoo.weight_loading import fingerprint

IMAGES = 32
"""Pictures by default: each layer costs a run of all of them."""


CALIBRATION_KEYS = ("steps", "tried", "judged_on", "held_back")


@dataclass(frozen=True)
class AnalyzedImages:
    """``images`` uint8 (N, 3, S, S), BGR, and ``labels`` int64 (N,), None where there are none.

    ``name`` says what they are; ``remark`` why there are no labels, or why it is not what was asked for.
    ``problems`` has a line for each picture that could not be read.
    """

    name: str
    images: npt.NDArray[np.uint8]
    labels: Labels | None
    remark: str = ""
    problems: tuple[str, ...] = ()


@dataclass(frozen=True)
class Analysis:
    """What was found in ``classifier`` (mode ``qat``) with ``images``.

    ``corrected``: its biases make up for what int8 shifts, which float and single layers went without.
    """

    classifier: Classifier
    images: AnalyzedImages
    found: Sensitivity
    corrected: bool = False
    calibration: Mapping[str, Any] = field(default_factory=dict)
    """What its calibration tried and kept (:meth:`mgq.ptq.pipeline.SearchResult.to_json`), where that is known."""

    @property
    def float_error(self) -> float:
        """The standard error of the float network's top-1, in points; NaN without labels."""
        top1 = self.found.float_top1
        return math.nan if top1 is None else standard_error(top1, self.found.images)

    @property
    def remarks(self) -> list[str]:
        """Remarks on the conditions, one line each."""
        remarks = [self.images.remark] if self.images.remark else []
        if self.corrected:
            remarks.append("single layers go without the bias corrections that all layers together have")
        if self.found.rounded_before:
            remarks.append(
                "calibration or training has put these weights on the int8 grid already: float means them as they are,"
                " and their own error is nil"
            )
        return remarks

    def to_json(self) -> dict[str, Any]:
        """Plain data, the layers in the order in which they run: dB, percent, points; None for infinite dB."""
        classifier, found = self.classifier, self.found
        return {
            "arch": classifier.spec.name,
            "target": classifier.target.name,
            "weights": classifier.origin,
            "data": self.images.name,
            "pictures": found.images,
            "labelled": self.images.labels is not None,
            "image_size": classifier.image_size,
            "float_top1": found.float_top1,
            "all_layers": to_plain(asdict(found.whole)),
            "layers": [to_plain_layer(layer) for layer in found.layers],
            "calibration": dict(self.calibration),
            "versions": versions(),
            "remarks": self.remarks,
            "problems": list(self.images.problems),
        }


def to_plain_layer(layer: LayerSensitivity) -> dict[str, Any]:
    return {
        "layer": layer.name,
        "kind": layer.kind,
        "alone": to_plain(asdict(layer.alone)),
        "weights": to_plain_values(layer.weights),
        "activations": to_plain_values(layer.activations),
        "carried_snr": finite(layer.carried_snr),
    }


def to_plain_values(values: Values | None) -> dict[str, Any] | None:
    """The fields as plain data, without histograms and single channels."""
    if values is None:
        return None
    numbers = {name: finite(getattr(values, name)) for name in ("snr", "low", "high", "limit", "clipped")}
    return {**numbers, "median_share": values.median_share, "dominating": values.find_dominant_channels()}


def to_plain(numbers: Mapping[str, float | None]) -> dict[str, float | None]:
    return {name: finite(value) for name, value in numbers.items()}


def finite(value: float | None) -> float | None:
    """``value``, or None for NaN and infinity, which JSON does not have."""
    return value if value is not None and math.isfinite(value) else None


def format_decibels(value: float | None, unit: str = "") -> str:
    """Format dB for a table, with ``unit`` behind a number: ``exact`` where only float32's rounding is left, ``-`` for
    None."""
    if value is None:
        return "-"
    return "exact" if value > EXACT else f"{value:.1f}{unit}"


def format_points(effect: Effect) -> str:
    """The change of top-1 and its standard error; ``-`` without labels."""
    if effect.top1_change is None or effect.top1_error is None:
        return "-"
    # Where no picture changed, or there is but one, nothing can be said of the error.
    error = f" ±{effect.top1_error:.1f}" if effect.top1_error > 0 else ""
    return f"{effect.top1_change:+.1f}{error}"


@accept_old_keywords(pictures="files", on_remark="on_message")
def analyze(
    data: str | Path | None = None,
    files: Sequence[str | Path] = (),
    arch: str | None = None,
    checkpoint: str | Path | None = None,
    save: str | Path = RUNS,
    pretrained: bool | str = False,
    target: str | None = None,
    images: int = IMAGES,
    on_progress: OnProgress = log_progress,
    on_message: OnMessage = log_message,
    key: str | None = None,
) -> Analysis:
    """Measure where the error of int8 comes from, layer by layer, as ``mgq analyze`` does.

    The network is chosen as ``mgq eval -m qat`` chooses it. ``images`` of the ``files`` (files, folders, patterns)
    or of the folder ``data`` are used, evenly spread; without either, those that the run was measured on, else the
    bundled cat. Raises InputError where there are no weights, no ranges for int8, or no pictures that can be read.
    """
    if images < 1:
        raise InputError(f"an analysis needs at least 1 picture, not {images}")
    where = Path(checkpoint) if checkpoint is not None else None
    if arch is None and where is None and not pretrained:
        arch = find_newest_arch(Path(save), Mode.QAT)
    classifier, corrections = open_with_corrections(arch, where, Path(save), pretrained, target, on_progress, key)
    for line in [] if where or pretrained else describe_unused_runs(arch, Mode.QAT, Path(save)):
        on_message(line)
    root = Path(data) if data is not None else None
    seen = load_images(classifier, [str(file) for file in files], root, images, on_progress, on_message)
    tried = calibration_of(classifier, [where.parent] if where is not None else [], Path(save))
    found = sensitivity_of(classifier.network, seen.images, seen.labels, corrections, on_progress)
    return Analysis(classifier, seen, found, bool(corrections), tried)


def calibration_of(classifier: Classifier, folders: Sequence[Path], save: Path) -> Mapping[str, Any]:
    """What the calibration that made ``classifier``, mode ``qat``, tried and kept; empty where that is not known.

    It is read from the ranges in one of ``folders`` or in the network's run, if they belong to just these weights.
    """
    own = fingerprint(state_of(classifier.network))
    for folder in (*folders, save / f"{classifier.spec.name}.calibration"):
        path = folder / RANGES_FILE
        ranges = read_ranges(path) if path.is_file() else None
        if ranges is not None and ranges.weights == own:
            return {key: ranges.provenance[key] for key in CALIBRATION_KEYS if key in ranges.provenance}
    return {}


def open_with_corrections(
    arch: str | None,
    checkpoint: Path | None,
    save: Path,
    pretrained: bool | str,
    target: str | None,
    on_progress: OnProgress,
    key: str | None = None,
) -> tuple[Classifier, Mapping[str, Sequence[float]]]:
    """The network in mode ``qat``, and the corrections in its biases, by layer."""
    spec = spec_of(arch) if arch is not None else None
    weights = find_weights(spec, checkpoint, Mode.QAT, save, pretrained, on_progress, key)
    if weights.mode == Mode.QAT.value:
        return classifier_from(weights, Mode.QAT, target=target), {}
    ranges = find_ranges(weights, None, target)
    return classifier_from(weights, Mode.QAT, ranges), ranges.bias_corrections


def load_images(
    classifier: Classifier,
    named: Sequence[str],
    data: Path | None,
    images: int,
    on_progress: OnProgress = log_progress,
    on_message: OnMessage = log_message,
) -> AnalyzedImages:
    """``images`` of the ``named`` files; else of the folder ``data``; else of those the network was measured on; else
    the cat. Raises InputError where none can be read."""
    if named:
        sources = spread_evenly(expand_existing(named, on_message), images)
        return read_images(classifier, ", ".join(named), sources, None, "")
    if data is not None:
        return describe_dataset(classifier, *find_dataset(classifier, data, on_progress, on_message), images)
    try:
        dataset = evaluation_data(None, classifier.recipe, classifier.image_size, on_progress)
    except InputError as error:
        cat = make_views(classifier)[:images]
        return AnalyzedImages("the bundled cat's views", cat, None, f"the bundled cat stands in: {error}")
    return describe_dataset(classifier, match_classes(dataset, classifier.classes), "", images)


def find_dataset(
    classifier: Classifier, data: Path, on_progress: OnProgress, on_message: OnMessage = log_message
) -> tuple[Dataset, str]:
    """The pictures in ``data``, and why they have no labels that the network knows, where they have none."""
    try:
        found = evaluation_data(data, classifier.recipe, classifier.image_size, on_progress, on_message)
        return match_classes(found, classifier.classes), ""
    except InputError as error:
        return calibration_folder(data, on_progress), f"accuracy was not measured: {error}"


def describe_dataset(classifier: Classifier, dataset: Dataset, remark: str, images: int) -> AnalyzedImages:
    name = dataset.name
    chosen = subset(dataset, images)
    labels = None if remark else chosen.labels
    return read_images(classifier, name, list_sources(chosen), labels, remark)


def read_images(
    classifier: Classifier, name: str, sources: Sequence[Source], labels: Labels | None, remark: str
) -> AnalyzedImages:
    """``sources`` as the network sees them; those that cannot be read are left out and named."""
    crops = [crop for _, crop in read_crops(classifier, sources)]
    good = [i for i, crop in enumerate(crops) if isinstance(crop, np.ndarray)]
    problems = tuple(str(crop) for crop in crops if isinstance(crop, InputError))
    if not good:
        raise InputError(f"none of {len(crops):,} pictures could be read; the first: {problems[0]}")
    images = to_batch([crop for crop in crops if isinstance(crop, np.ndarray)])
    return AnalyzedImages(name, images, None if labels is None else labels[good], remark, problems)

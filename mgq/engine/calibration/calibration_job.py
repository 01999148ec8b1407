"""Runs ``mgq calibrate``: from its options to a checkpoint for int8 and its accuracy beside float."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mgq.data.datasets import Dataset, subset
from mgq.data.image_sources import Source
from mgq.engine.calibration.calibrate_options import CalibrateOptions
from mgq.engine.calibration.calibration_images import CalibrationSources, find_images_nearby, read_some_crops
from mgq.engine.calibration.calibration_run import (
    Calibration,
    calibrate,
    calibrate_data_free,
    choose_images,
    estimate_seconds,
)
from mgq.engine.calibration.mixed_precision import MixedPrecisionResult, rank_layers, search_float_layers
from mgq.engine.classifier.deployment import TIMING, Deployment, deploy
from mgq.engine.classifier.evaluate import evaluate
from mgq.engine.classifier.evaluation_result import Evaluation
from mgq.engine.classifier.input_advice import advise_on_input
from mgq.engine.classifier.label_names import join_names
from mgq.engine.classifier.labelled_sets import adopt_names
from mgq.engine.classifier.mode_comparison import Comparison, compare_modes
from mgq.engine.classifier.onnx_import import find_float_input
from mgq.engine.classifier.open import Classifier, find_newest_arch, open_classifier
from mgq.errors import InputError, plural, printable
from mgq.events import NO_CALLBACKS, Callbacks, duration
from mgq.io.atomic import refuse_unwritable_folder
from mgq.ptq.presets import CalibrationConfig, count_images_used
from mgq.quantization.modes import Mode
from mgq.quantization.option_names import BEST
from mgq.quantization.targets import MEGENGINE, ONNX, get_target

WITHOUT_IMAGES = "no pictures: ranges and corrections follow from the batch norms"
MEND = "; `mgq calibrate FOLDER` or -d FOLDER would measure them"


@dataclass(frozen=True)
class CalibrationResult:
    """A calibration, where its ``checkpoint`` lies, and what int8 costs.

    ``comparison`` is None where there are no labelled images; ``why_not`` says why. ``images_of`` names the images,
    ``weights`` says where the float weights come from. ``mixed`` is what ``max_drop`` led to. ``deployment`` is the
    int8 file of an imported network beside a float one.
    """

    calibration: Calibration
    checkpoint: Path
    comparison: Comparison | None
    mixed: MixedPrecisionResult | None
    images_of: str
    why_not: str
    weights: str
    deployment: Deployment | None = None

    def to_json(self) -> dict[str, Any]:
        found = self.calibration
        return {
            "arch": found.classifier.spec.name,
            "target": found.ranges.target,
            "method": found.ranges.observer,
            "pictures": found.used,
            "weights": self.weights,
            "checkpoint": str(self.checkpoint),
            "comparison": self.comparison.to_json() if self.comparison else None,
            "float_layers": list(self.mixed.float_layers) if self.mixed else [],
            "slowdown": self.mixed.slowdown if self.mixed else 1.0,
            "deployment": self.deployment.to_json() if self.deployment else None,
        }


def run_calibration(options: CalibrateOptions, callbacks: Callbacks = NO_CALLBACKS) -> CalibrationResult:
    """Make a float network ready for int8 and compare it with float, as ``mgq calibrate`` does.

    Writes ``<save>/<arch>.calibration``; what is there already is kept under another name. Raises InputError for
    options that cannot be, before anything is written, and where there are no weights or no images that can be read.
    """
    options.refuse_contradictions()
    classifier = open_float_network(options, callbacks)
    if options.target is None and classifier.spec.is_described:
        options = replace(options, target=ONNX.name)  # MegEngine has no int8 for imported networks
    found = find_images_nearby(
        classifier,
        options.files,
        options.data,
        0 if options.data_free else count_images(options),
        callbacks.on_progress,
        callbacks.on_message,
    )
    classifier = name_classes(classifier, found, callbacks)
    refuse_unwritable_folders(options)
    labelled = found.labelled
    labelled = subset(labelled, options.limit) if options.limit and labelled is not None else labelled
    mixed: MixedPrecisionResult | None = None
    if options.data_free or found.sources is None:
        callbacks.on_message(WITHOUT_IMAGES + ("" if options.data_free else MEND))
        result = calibrate_data_free(classifier, get_target(options.target or MEGENGINE.name))
    elif options.max_drop is None:
        announce(classifier, found.sources, options, callbacks)
        result = calibrate_on(found, classifier, options, callbacks)
    else:
        if labelled is None:
            raise InputError(f"--max-drop needs labelled pictures, with -d FOLDER: {found.why_not}")
        announce(classifier, found.sources, options, callbacks)
        mixed = mix_precisions(found, labelled, classifier, options, callbacks)
        result = mixed.calibration
    for problem in result.problems:
        callbacks.on_message(problem)
    checkpoint = result.write(options.save)
    if options.ranges_file is not None:
        result.write_ranges(options.ranges_file)
    comparison = mixed.comparison if mixed else None
    if labelled is not None and comparison is None:
        comparison = compare(classifier, result.classifier, labelled, options, callbacks)
    report_advice(classifier, labelled, comparison, callbacks)
    deployment = deploy_imported(classifier, result, found.sources, labelled, checkpoint.parent, options, callbacks)
    return CalibrationResult(
        result, checkpoint, comparison, mixed, found.name, found.why_not, classifier.origin, deployment
    )


def report_advice(
    classifier: Classifier, labelled: Dataset | None, comparison: Comparison | None, callbacks: Callbacks
) -> None:
    """Send the advice of :func:`advise_on_input` as a message, where there is any."""
    if labelled is not None and comparison is not None:
        advice = advise_on_input(classifier, labelled, comparison.normal)
        if advice is not None:
            callbacks.on_message(advice)


def deploy_imported(
    classifier: Classifier,
    result: Calibration,
    sources: Sequence[Source] | Dataset | None,
    labelled: Dataset | None,
    folder: Path,
    options: CalibrateOptions,
    callbacks: Callbacks,
) -> Deployment | None:
    """An int8 file of an imported network in ``folder``, measured on the ``labelled`` images, else on ``sources``; None
    of other networks, and without images. Its forms are corrected by those of ``sources`` that it was calibrated on.
    """
    if sources is None or not classifier.spec.is_described:
        return None
    file = folder / f"{classifier.spec.name}.int8.onnx"
    images = read_some_crops(classifier, labelled or sources)
    seen = None if options.data_free else choose_images(sources, options.images, make_config(options))
    fit = None if seen is None else read_some_crops(classifier, seen)
    callbacks.on_message(TIMING)
    return deploy(classifier, result.classifier, file, images, options.keep_input, options.source, fit)


def open_float_network(options: CalibrateOptions, callbacks: Callbacks) -> Classifier:
    """The network that ``options`` choose; where they name none, that of the newest float run."""
    arch = options.arch
    if not (arch or options.checkpoint or options.pretrained):
        arch = find_newest_arch(options.save, Mode.NORMAL)
    classifier = open_classifier(
        arch=arch,
        checkpoint=options.checkpoint,
        mode=Mode.NORMAL,
        save=options.save,
        pretrained=options.pretrained,
        options={} if options.width is None else {"width": options.width},
        image_size=options.image_size,
        on_progress=callbacks.on_progress,
        key=options.key,
    )
    if options.keep_input:
        find_float_input(classifier)  # which refuses where there is none
    return classifier


def name_classes(classifier: Classifier, found: CalibrationSources, callbacks: Callbacks) -> Classifier:
    """``classifier`` with the names of the class folders among the pictures, where it has none and is of as many."""
    if found.sources is None or isinstance(found.sources, Sequence):
        return classifier
    names = adopt_names(classifier.classes, found.sources)
    if names != classifier.classes:
        callbacks.on_message(f"names of classes: those of the folders in {found.name}, in order ({join_names(names)})")
    return replace(classifier, classes=names)


def count_images(options: CalibrateOptions) -> int:
    """The most images that are used."""
    return count_images_used(options.method, options.images)


def refuse_unwritable_folders(options: CalibrateOptions) -> None:
    """Raises InputError where results could not be written, before the work, which takes minutes."""
    refuse_unwritable_folder(options.save)
    if options.ranges_file is not None:
        if options.ranges_file.is_dir():
            raise InputError(f"--ranges {printable(options.ranges_file)} is a folder: give the name of a file")
        refuse_unwritable_folder(options.ranges_file.absolute().parent)


def announce(
    classifier: Classifier, sources: Sequence[Source] | Dataset, options: CalibrateOptions, callbacks: Callbacks
) -> None:
    """Report the number of images and the estimated time."""
    number = min(count_images(options), len(sources))
    target = get_target(options.target or MEGENGINE.name)
    seconds = estimate_seconds(classifier, number, options.preset, options.method, target)
    if options.preset == BEST:
        callbacks.on_message("--quality best is balanced now, which tries as much: it will go in the next release")
    callbacks.on_message(
        f"calibrating on {plural(number, 'picture')}, quality {options.preset}: about {duration(seconds)}"
    )


def calibrate_on(
    found: CalibrationSources,
    classifier: Classifier,
    options: CalibrateOptions,
    callbacks: Callbacks,
    float_layers: tuple[str, ...] = (),
) -> Calibration:
    assert found.sources is not None
    config, about = make_config(options, float_layers), options.about or found.name
    return calibrate(classifier, found.sources, options.images, about, config, callbacks, options.max_bad)


def make_config(options: CalibrateOptions, float_layers: tuple[str, ...] = ()) -> CalibrationConfig:
    """How ``options`` calibrate, with the weights of ``float_layers`` in float32."""
    return CalibrationConfig(
        preset=options.preset,
        method=options.method,
        correct_bias=options.correct_bias,
        weight_rounding=options.rounding,
        target=get_target(options.target or MEGENGINE.name),
        float_layers=float_layers,
    )


def mix_precisions(
    found: CalibrationSources,
    labelled: Dataset,
    classifier: Classifier,
    options: CalibrateOptions,
    callbacks: Callbacks,
) -> MixedPrecisionResult:
    """Keep as few layers in float as ``max_drop`` allows on the ``labelled`` images."""
    assert options.max_drop is not None
    known = evaluate(
        classifier, labelled, workers=options.workers, max_bad=options.max_bad, on_progress=callbacks.on_progress
    )
    # The same images come again and again, and what is to be said of them.
    once = replace(callbacks, on_message=functools.cache(callbacks.on_message))
    return search_float_layers(
        options.max_drop,
        rank_layers(classifier, get_target(options.target or MEGENGINE.name)),
        lambda float_layers: calibrate_on(found, classifier, options, once, float_layers),
        lambda other: compare(classifier, other, labelled, options, callbacks, known),
    )


def compare(
    normal: Classifier,
    simulated: Classifier,
    labelled: Dataset,
    options: CalibrateOptions,
    callbacks: Callbacks,
    known: Evaluation | None = None,
) -> Comparison:
    return compare_modes(
        normal, simulated, labelled, callbacks, known, workers=options.workers, max_bad=options.max_bad
    )

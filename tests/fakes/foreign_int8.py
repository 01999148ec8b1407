"""Imported networks in int8, without the time that a calibration takes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from mgq.engine.classifier.import_wish import ImportWish
from mgq.engine.classifier.onnx_import import import_classifier
from mgq.engine.classifier.open import Classifier, quantize_with_ranges
from mgq.ptq.calibrate import calibrate_network
from mgq.quantization.modes import Mode
from mgq.quantization.option_names import TO_NEAREST
from mgq.quantization.targets import ONNX

Pixels = npt.NDArray[np.uint8]


def int8_of(path: Path, preprocess: str) -> Classifier:
    """The network in ``path`` in int8, its ranges told from made-up pictures."""
    classifier, _ = import_classifier(path, ImportWish(preprocess=preprocess), "")
    images = grey_noise(4, *(classifier.spec.only_size or (32, 32)))
    _, ranges = calibrate_network(
        classifier.network, [images], "", "", {}, "min-max", correct_bias=False, weight_rounding=TO_NEAREST, target=ONNX
    )
    return quantize_with_ranges(classifier, ranges, Mode.QUANTIZED)


def grey_noise(number: int, height: int, width: int) -> Pixels:
    """Grey noise: all channels are the same, so that networks for grey pictures see no colours mixed."""
    noise = np.random.default_rng(3).integers(0, 256, (number, 1, height, width), np.uint8)
    return np.repeat(noise, 3, axis=1)

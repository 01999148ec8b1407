"""Imported networks in int8, without the time that a calibration takes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from mgq.engine.classifier.import_wish import ImportWish
from mgq.engine.classifier.onnx_import import import_classifier
from mgq.engine.classifier.open import Classifier, quantize_with_ranges
from mgq.quantization.modes import Mode
from mgq.quantization.targets import ONNX
from tests.fakes.measured_ranges import measure_ranges

Pixels = npt.NDArray[np.uint8]


def int8_of(path: Path, preprocess: str) -> Classifier:
    """The network in ``path`` in int8, its ranges told from made-up pictures."""
    classifier, _ = import_classifier(path, ImportWish(preprocess=preprocess), "")
    images = grey_noise(4, *(classifier.spec.only_size or (32, 32)))
    ranges = measure_ranges(classifier.network, [images], "", "", {}, correct_bias=False, target=ONNX)
    return quantize_with_ranges(classifier, ranges, Mode.QUANTIZED)


def grey_noise(number: int, height: int, width: int) -> Pixels:
    """Grey noise: all channels are the same, so that networks for grey pictures see no colours mixed."""
    noise = np.random.default_rng(3).integers(0, 256, (number, 1, height, width), np.uint8)
    return np.repeat(noise, 3, axis=1)

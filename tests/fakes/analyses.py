"""An analysis of a network with made-up weights."""

from __future__ import annotations

from dataclasses import replace

from mgq.engine.calibration.analysis import Analysis, AnalyzedImages
from mgq.ptq.sensitivity import Sensitivity
from mgq.quantization.modes import Mode
from tests.conftest import classifier_of, smooth_images

ARCH = "resnet18"


def analysis_of(found: Sensitivity, origin: str = "made-up weights", corrected: bool = False) -> Analysis:
    images = AnalyzedImages("made-up pictures", smooth_images(1), None)
    return Analysis(replace(classifier_of(ARCH, Mode.QAT), origin=origin), images, found, corrected)

"""Programs of the native engine: networks of the zoo with random weights, calibrated on noise."""

from __future__ import annotations

from functools import cache
from typing import Any

import megengine
import megengine.module as M
import numpy as np
import numpy.typing as npt

from mgq.engine.classifier.dump import source_of
from mgq.engine.classifier.open import make_random_classifier
from mgq.export.native.cpu import LEVELS
from mgq.export.native.program import Program, read_program
from mgq.export.onnx.writer import model_of, plain_graph
from mgq.ptq.quantize import quantize
from mgq.quantization.modes import Mode
from mgq.quantization.targets import ONNX, Target
from mgq.zoo.registry import spec_of
from tests.fakes.measured_ranges import measure_ranges

HERE = [level for level in LEVELS if level.runs_here()]
BEST, PORTABLE = HERE[0], LEVELS[-1]
Images = npt.NDArray[np.uint8]


def noise(size: int, count: int = 1, seed: int = 0) -> Images:
    return np.random.default_rng(seed).integers(0, 256, (count, 3, size, size), np.uint8)


@cache
def network_for(arch: str, target: Target, classes: int) -> M.Module:
    """In mode ``qat``, with random weights, calibrated on noise."""
    if classes == 1000:
        return source_of(make_random_classifier(arch, Mode.QAT, image_size=64, target=target))
    megengine.random.seed(3)
    network = spec_of(arch).build(classes)
    network.eval()
    ranges = measure_ranges(network, [noise(64)], arch, "", {}, correct_bias=False, target=target)
    return quantize(network, ranges=ranges, mode=Mode.QAT, in_place=True)


@cache
def model_for(arch: str, size: int, target: Target = ONNX, classes: int = 1000) -> Any:
    """An ONNX model of it for images of ``size``; its integers are those of every other size."""
    return model_of(plain_graph(network_for(arch, target, classes), size), size, None, {"arch": arch})


@cache
def program_for(arch: str, size: int = 64, classes: int = 1000) -> Program:
    return read_program(model_for(arch, size, ONNX, classes))

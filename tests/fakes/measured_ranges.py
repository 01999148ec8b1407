"""Calibrations by one way to choose ranges, the quickest way: weights rounded to the nearest."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import megengine.module as M
import numpy as np
import numpy.typing as npt

from mgq.ptq.calibrate import calibrate_network
from mgq.ptq.presets import check_method
from mgq.ptq.steps import CorrectBias, RangesFromImages, RangesFromLogits, Step
from mgq.quantization.activation_ranges import ActivationRanges
from mgq.quantization.option_names import LOGITS, MIN_MAX
from mgq.quantization.targets import MEGENGINE, Target


def steps_by(method: str = MIN_MAX) -> tuple[Step, ...]:
    """What chooses ranges by ``method`` alone."""
    check_method(method)
    return (RangesFromLogits() if method == LOGITS else RangesFromImages(method),)


def measure_ranges(
    network: M.Module,
    batches: Iterable[npt.NDArray[np.uint8]],
    arch: str,
    weights: str,
    provenance: Mapping[str, Any],
    method: str = MIN_MAX,
    correct_bias: bool = True,
    target: Target = MEGENGINE,
) -> ActivationRanges:
    """Those of ``network`` (mode ``normal``) over ``batches``, chosen by ``method``."""
    steps = (*steps_by(method), CorrectBias()) if correct_bias else steps_by(method)
    _, ranges = calibrate_network(network, np.concatenate(list(batches)), arch, weights, steps, target)
    return replace(ranges, provenance=provenance)


def simulate(
    network: M.Module, images: npt.NDArray[np.uint8], steps: tuple[Step, ...], target: Target = MEGENGINE
) -> M.Module:
    """``network`` (mode ``normal``) in mode ``qat``, as ``steps`` make it with ``images``."""
    return calibrate_network(network, images, "", "", steps, target)[0]

"""Searches for the fewest layers that must stay float32 to keep an accuracy."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from mgq.data.decoding import bundled_cat, read_image
from mgq.data.transforms import to_batch
from mgq.engine.calibration.calibration_run import Calibration
from mgq.engine.classifier.mode_comparison import Comparison
from mgq.engine.classifier.open import Classifier, convert
from mgq.ptq.equalization import equalize_channels, noise_of_weights
from mgq.quantization.modes import Mode
from mgq.quantization.targets import Target

ROUNDS = 15
"""In which two networks take turns, to compare their speed."""

Calibrate = Callable[[tuple[str, ...]], Calibration]
Compare = Callable[[Classifier], Comparison]


@dataclass(frozen=True)
class MixedPrecisionResult:
    """A calibration whose layers ``float_layers`` have float32 weights, and how it compares with float.

    ``slowdown``: time for a picture, in terms of what all-int8 takes; the median of interleaved rounds.
    """

    calibration: Calibration
    comparison: Comparison
    float_layers: tuple[str, ...]
    slowdown: float = 1.0


def rank_layers(normal: Classifier, target: Target) -> list[str]:
    """The convolutions of ``normal`` (mode ``normal``), those first whose weights lose most by rounding."""
    noise = noise_of_weights(equalize_channels(normal.network, None, target)[0], target)
    return sorted(noise, key=lambda name: -noise[name])


def search_float_layers(
    max_drop: float, ranking: list[str], calibrate: Calibrate, compare: Compare
) -> MixedPrecisionResult:
    """The network with the fewest float32 layers that loses at most ``max_drop`` points of top-1.

    Layers are kept in the order of the ``ranking``: twice as many from try to try, then by bisection. Where not even
    all of them are enough, it is the one that loses least.
    """
    tried: dict[int, MixedPrecisionResult] = {}

    def drop_with(number: int) -> float:
        float_layers = tuple(ranking[:number])
        calibration = calibrate(float_layers)
        tried[number] = MixedPrecisionResult(calibration, compare(calibration.classifier), float_layers)
        return tried[number].comparison.drop

    too_few, number = -1, 0
    while drop_with(number) > max_drop:
        if number == len(ranking):
            return measure_slowdown(min(tried.values(), key=lambda result: result.comparison.drop), tried[0])
        too_few, number = number, min(len(ranking), max(1, 2 * number))
    enough = number
    while enough - too_few > 1:
        middle = (enough + too_few) // 2
        if drop_with(middle) > max_drop:
            too_few = middle
        else:
            enough = middle
    return measure_slowdown(tried[enough], tried[0])


def measure_slowdown(result: MixedPrecisionResult, whole: MixedPrecisionResult) -> MixedPrecisionResult:
    """``result``, its speed measured beside that of the ``whole`` int8 network."""
    if not result.float_layers:
        return result
    classifiers = [convert(found.calibration.classifier, Mode.QUANTIZED) for found in (whole, result)]
    image = to_batch([classifiers[0].crop(read_image(bundled_cat()))])
    seconds: list[list[float]] = [[], []]
    for _ in range(ROUNDS + 1):
        for classifier, times in zip(classifiers, seconds, strict=True):
            start = time.perf_counter()
            classifier.logits(image)
            times.append(time.perf_counter() - start)
    # The first round warms up.
    ratios = [mixed / plain for plain, mixed in zip(seconds[0][1:], seconds[1][1:], strict=True)]
    return MixedPrecisionResult(result.calibration, result.comparison, result.float_layers, float(np.median(ratios)))

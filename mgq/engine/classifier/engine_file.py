"""Writes the int8 file of a network for one engine, with logits that are right on average there."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mgq.engine.classifier.dump import dump_classifier
from mgq.engine.classifier.open import Classifier
from mgq.machine import usable_cores
from mgq.ptq.bias_correction import find_last_linear, shift_bias
from mgq.ptq.pipeline import snr_of
from mgq.runtime.protocol import run_in_batches
from mgq.runtime.registry import Backend

LEAST_GAIN = 1.0
"""dB by which logits that are shifted back have to be nearer to float: less would be chance on some images."""

Logits = npt.NDArray[np.float64]


@dataclass(frozen=True)
class FloatAnswers:
    """``images``, uint8 (N, 3, H, W), and the ``logits``, (N, classes), that they have in float."""

    images: npt.NDArray[np.uint8]
    logits: Logits


@dataclass(frozen=True)
class EngineFileWriter:
    """Writes ``int8`` in the form for ``engine``, for ``batch`` images at a time, any number where that is None.

    Calibration makes logits right on average where everything is rounded that the file for any engine rounds. That of
    one engine rounds less, and may leave layers in float, so that what was made up for does not happen in it. There the
    bias of the classifier is corrected by the ``wanted`` answers, where these are known.
    """

    int8: Classifier
    engine: Backend
    keep_input: bool = False
    batch: int | None = None
    wanted: FloatAnswers | None = None

    def write(self, path: Path, float_share: float = 0.0) -> Path:
        """Write the file to ``path``. Raises as the dump does."""
        self.dump(self.int8, path, float_share)
        if self.wanted is not None:
            self.correct(path, float_share, self.wanted)
        return path

    def correct(self, path: Path, float_share: float, wanted: FloatAnswers) -> None:
        """Write the file at ``path`` again with a corrected bias, where that brings its logits nearer to those
        ``wanted``."""
        answers = self.answer(path, wanted.images)
        corrected = correct_logits(self.int8, wanted.logits - answers)
        if corrected is None:
            return
        self.dump(corrected, path, float_share)
        if snr_of(self.answer(path, wanted.images), wanted.logits) < snr_of(answers, wanted.logits):
            self.dump(self.int8, path, float_share)

    def dump(self, int8: Classifier, path: Path, float_share: float) -> None:
        dump_classifier(
            int8,
            path,
            batch=self.batch,
            engine=self.engine.key,
            keep_input=self.keep_input,
            float_share=float_share,
        )

    def answer(self, path: Path, images: npt.NDArray[np.uint8]) -> Logits:
        """What the engine answers with the file at ``path``, (N, classes)."""
        return run_in_batches(self.engine.load(path, usable_cores()), images).astype(np.float64)


def correct_logits(int8: Classifier, errors: Logits) -> Classifier | None:
    """``int8`` with logits that are higher by the mean of ``errors``, (N, classes), to be dumped.

    None where the errors would hardly be smaller by that, or where the network does not end in a linear layer.
    """
    shift = find_mean_error(errors)
    if shift is None:
        return None
    network = deepcopy(int8.fake_quantized)
    linear = find_last_linear(network)
    if linear is None:
        return None
    shift_bias(linear[1], shift)
    return replace(int8, fake_quantized=network)


def find_mean_error(errors: Logits) -> Logits | None:
    """The mean of ``errors``, (N, classes), where such errors are smaller without it by ``LEAST_GAIN``; else None."""
    number, mean = len(errors), errors.mean(axis=0)
    if number < 2:
        return None
    with_it, without = (errors**2).sum() / number, ((errors - mean) ** 2).sum() / (number - 1)
    return mean if with_it > without * 10 ** (LEAST_GAIN / 10) else None

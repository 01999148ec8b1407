"""The file for one engine answers rightly on average, whatever calibration made up for in that for any."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import megengine.module as M
import numpy as np
import pytest

from mgq.engine.classifier.engine_file import EngineFileWriter, FloatAnswers, correct_logits, find_mean_error
from mgq.engine.classifier.open import Classifier
from mgq.ptq.bias_correction import find_last_linear
from mgq.ptq.pipeline import snr_of
from mgq.runtime.registry import BACKENDS, Backend
from tests.fakes.foreign_int8 import grey_noise, int8_of
from tests.fakes.foreign_models import write

RANDOM = np.random.default_rng(0)
IMAGES = grey_noise(8, 32, 32)
OPENVINO = next(backend for backend in BACKENDS if backend.key == "openvino")


@pytest.fixture(scope="module")
def int8(tmp_path_factory: pytest.TempPathFactory) -> Classifier:
    return int8_of(write(tmp_path_factory.mktemp("float") / "small.onnx", "swishes"), "torch")


def writer_of(int8: Classifier, exact: Any, engine: Backend = OPENVINO) -> EngineFileWriter:
    return EngineFileWriter(int8, engine, batch=1, wanted=FloatAnswers(IMAGES, exact))


def answers_of(int8: Classifier, path: Path, share: float = 0.0) -> Any:
    """What the form for OpenVINO answers without any correction."""
    writer = writer_of(int8, 0.0)
    writer.dump(int8, path, share)
    return writer.answer(path, IMAGES)


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_logits_that_are_off_on_average_are_shifted_back(tmp_path: Path, int8: Classifier, share: float) -> None:
    plain = answers_of(int8, tmp_path / "plain.onnx", share)
    exact = plain + RANDOM.normal(size=plain.shape[1]) * np.abs(plain).mean()
    writer = writer_of(int8, exact)
    written = writer.write(tmp_path / "own.onnx", share)
    assert snr_of(plain, exact) < 10 and snr_of(writer.answer(written, IMAGES), exact) > 30


def test_without_answers_in_float_nothing_is_corrected(tmp_path: Path, int8: Classifier) -> None:
    written = EngineFileWriter(int8, OPENVINO, batch=1).write(tmp_path / "own.onnx")
    np.testing.assert_array_equal(
        writer_of(int8, 0.0).answer(written, IMAGES), answers_of(int8, tmp_path / "plain.onnx")
    )


def test_logits_that_are_right_on_average_stay_as_they_are(tmp_path: Path, int8: Classifier) -> None:
    plain = answers_of(int8, tmp_path / "plain.onnx")
    noise = RANDOM.normal(size=plain.shape) * np.abs(plain).mean() / 10
    writer = writer_of(int8, plain + noise - noise.mean(axis=0))
    np.testing.assert_array_equal(writer.answer(writer.write(tmp_path / "own.onnx"), IMAGES), plain)


def test_a_correction_that_makes_it_worse_is_taken_back(
    tmp_path: Path, int8: Classifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where the last linear layer does not make the logits alone."""
    plain = answers_of(int8, tmp_path / "plain.onnx")
    wrong = correct_logits(int8, np.full_like(plain, -9 * np.abs(plain).max()))
    monkeypatch.setattr("mgq.engine.classifier.engine_file.correct_logits", lambda *_: wrong)
    writer = writer_of(int8, plain * 1.01)
    np.testing.assert_array_equal(writer.answer(writer.write(tmp_path / "own.onnx"), IMAGES), plain)


def test_the_network_itself_keeps_its_bias(int8: Classifier) -> None:
    found = find_last_linear(int8.fake_quantized)
    assert found is not None
    before = found[1].bias.numpy().copy()
    corrected = correct_logits(int8, np.ones((2, before.size)))
    assert corrected is not None
    changed = find_last_linear(corrected.fake_quantized) or found
    np.testing.assert_array_equal(found[1].bias.numpy(), before)
    np.testing.assert_allclose(changed[1].bias.numpy().ravel(), before.ravel() + 1, atol=1e-5)


@pytest.mark.parametrize(
    ("errors", "is_shift"),
    [
        (RANDOM.normal(size=(8, 100)), False),
        (RANDOM.normal(size=(8, 100)) + 1, True),
        (np.ones((1, 100)), False),  # of one image nothing is told from chance
        (np.zeros((8, 100)), False),
    ],
    ids=["chance", "shift", "one image", "no error"],
)
def test_a_mean_error_is_told_from_chance(errors: Any, is_shift: bool) -> None:
    found = find_mean_error(errors)
    assert (found is not None) == is_shift
    if found is not None:
        np.testing.assert_allclose(found, errors.mean(axis=0))


def test_a_network_that_does_not_end_in_a_linear_layer_with_a_bias_has_none_to_correct() -> None:
    assert find_last_linear(M.Sequential(M.Conv2d(1, 1, 1))) is None
    assert find_last_linear(M.Sequential(M.Linear(2, 2), M.Linear(2, 2, bias=False))) is None
    with_bias = M.Linear(2, 2)
    assert find_last_linear(M.Sequential(M.Linear(2, 2), with_bias)) == ("1", with_bias)

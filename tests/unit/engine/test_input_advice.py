"""An imported network that is hardly ever right: which preprocessing gives more."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from mgq.engine.classifier.evaluation_result import Evaluation
from mgq.engine.classifier.import_wish import ImportWish
from mgq.engine.classifier.input_advice import candidates, is_chance, logits_fed, words_for
from mgq.engine.classifier.onnx_import import import_classifier
from mgq.zoo.input_contract import CONTRACTS
from tests.conftest import Mgq
from tests.fakes.foreign_models import Model, write
from tests.fakes.native_programs import noise

CLASSES = 4
SIZE = 32
COLORS = np.array([[200, 40, 40], [40, 200, 40], [40, 40, 200], [200, 200, 200]])
"""Of the pictures of each class, RGB."""


def color_classifier(path: Path, preprocess: str) -> Path:
    """Knows ``COLORS``, where it is fed as ``preprocess`` says: the nearest of them, by the mean of the picture."""
    contract = CONTRACTS[preprocess]
    colors = COLORS if contract.order == "rgb" else COLORS[:, ::-1]
    fed = (colors - np.array(contract.mean)) / np.array(contract.std)
    model = Model((1, 3, SIZE, SIZE))
    kernel = model.constant(np.eye(3).reshape(3, 3, 1, 1))
    flat = model.add("Flatten", model.add("GlobalAveragePool", model.add("Conv", "image", kernel)))
    logits = model.add("Gemm", flat, model.constant(fed), model.constant(-(fed**2).sum(1) / 2), transB=1)
    return model.save(path, logits)


def photos(root: Path, shift: int = 0) -> Path:
    """Four pictures of each class; ``shift``: by so many classes they lie in the wrong folder."""
    random = np.random.default_rng(0)
    for index, color in enumerate(np.roll(COLORS, shift, 0)):
        folder = root / f"kind{index}"
        folder.mkdir(parents=True)
        for number in range(4):
            image = np.clip(color[::-1] + random.normal(0, 8, (40, 40, 3)), 0, 255).astype(np.uint8)
            cv2.imwrite(str(folder / f"{number}.png"), image)
    return root


@pytest.mark.parametrize(("right", "is_guessing"), [(5, True), (7, True), (8, False), (12, False)])
def test_chance_is_told_by_how_much_guesses_scatter(right: int, is_guessing: bool) -> None:
    """8 of 20 right among 5 classes were called chance: it was added to by the error of these 8."""
    labels = np.arange(20) % 5
    answers = np.where(np.arange(20) < right, labels, (labels + 1) % 5)
    found = Evaluation(20, 1.0, 100 * right / 20, 100.0, 1.0, answers, labels, np.arange(20), ("a", "b", "c", "d", "e"))
    assert is_chance(found) == is_guessing


@pytest.mark.parametrize("right", ["caffe", "torch"])
def test_eval_says_which_preprocessing_gives_more(tmp_path: Path, mgq: Mgq, right: str) -> None:
    path, data = color_classifier(tmp_path / "model.onnx", right), photos(tmp_path / "data")
    wrong = "raw" if right == "torch" else "tf"
    said = mgq("eval", "-c", path, "-m", "normal", "-d", data, "--preprocess", wrong)
    assert said.code == 0, said
    assert f"--preprocess {right} gives 100.0 %" in " ".join(said.err.split())
    said = mgq("eval", "-c", path, "-m", "normal", "-d", data, "--preprocess", right)
    assert "chance" not in said.err
    assert "100.0 %" in said.out


def test_calibrate_says_which_preprocessing_gives_more(tmp_path: Path, mgq: Mgq) -> None:
    path, data = color_classifier(tmp_path / "model.onnx", "caffe"), photos(tmp_path / "data")
    how = ["--preprocess", "tf", "--quality", "fast", "--images", "4"]
    said = mgq("calibrate", "-c", path, "-d", data, *how)
    assert said.code == 0, said
    assert "--preprocess caffe gives 100.0 %" in " ".join(said.err.split()), said


def test_eval_asks_for_the_names_where_no_preprocessing_gives_more(tmp_path: Path, mgq: Mgq) -> None:
    path, data = color_classifier(tmp_path / "model.onnx", "tf"), photos(tmp_path / "data", 1)
    said = mgq("eval", "-c", path, "-m", "normal", "-d", data, "--preprocess", "tf")
    assert "no --preprocess gives more" in " ".join(said.err.split())


def test_answers_are_those_of_an_import_with_the_other_preprocessing(tmp_path: Path) -> None:
    path, images = write(tmp_path / "model.onnx", "padless"), noise(SIZE, 2)
    had = import_classifier(path, ImportWish(preprocess="torch"), "")[0]
    for other in candidates():
        wanted = import_classifier(path, ImportWish(preprocess=other.name, order=other.order), "")[0].logits(images)
        found = logits_fed(had, images, CONTRACTS["torch"], other)
        assert np.abs(found - wanted).max() <= 1e-4 * np.abs(wanted).max(), words_for(other)

"""By which pictures the int8 files of an imported network are compared, and by which they are corrected."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest

from mgq.data.image_sources import expand
from mgq.engine.calibration import calibration_job
from mgq.engine.calibration.calibrate_options import CalibrateOptions
from mgq.engine.classifier.import_wish import ImportWish
from mgq.engine.classifier.onnx_import import import_checkpoint
from mgq.engine.classifier.open import open_classifier
from mgq.events import NO_CALLBACKS
from mgq.quantization.modes import Mode
from tests.fakes.foreign_models import write

PICTURES, CALIBRATED = 20, 8
Pixels = list[bytes]


@pytest.fixture
def network(tmp_path: Path) -> Path:
    return import_checkpoint(write(tmp_path / "model.onnx"), tmp_path / "runs", ImportWish(preprocess="torch"))


@pytest.fixture
def deployed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Pixels, Pixels | None]]:
    """The pictures that were compared, and those by which files were corrected."""
    found: list[tuple[Pixels, Pixels | None]] = []

    def note(*arguments: Any) -> None:
        images, fit = arguments[3], arguments[6]
        found.append(([image.tobytes() for image in images], None if fit is None else [i.tobytes() for i in fit]))

    monkeypatch.setattr(calibration_job, "deploy", note)
    return found


def write_pictures(*folders: Path) -> None:
    random = np.random.default_rng(0)
    for number in range(PICTURES):
        folder = folders[number * len(folders) // PICTURES]
        folder.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(folder / f"{number:02}.png"), random.integers(0, 256, (40, 40, 3), np.uint8))


def calibrate(network: Path, tmp_path: Path, data: Path) -> None:
    calibration_job.run_calibration(
        CalibrateOptions(data=data, checkpoint=network, save=tmp_path / "runs", images=CALIBRATED, preset="fast")
    )


def test_pictures_without_labels_are_all_compared_and_those_that_calibrated_correct(
    network: Path, tmp_path: Path, deployed: list[tuple[Pixels, Pixels | None]]
) -> None:
    write_pictures(tmp_path / "photos")
    calibrate(network, tmp_path, tmp_path / "photos")
    [(compared, fit)] = deployed
    assert fit is not None and len(set(compared)) == PICTURES and len(set(fit)) == CALIBRATED
    assert set(fit) < set(compared)


def test_labelled_pictures_are_compared_that_calibrated_nothing(
    network: Path, tmp_path: Path, deployed: list[tuple[Pixels, Pixels | None]]
) -> None:
    write_pictures(*(tmp_path / "photos" / f"class{number}" for number in range(10)))
    calibrate(network, tmp_path, tmp_path / "photos")
    [(compared, fit)] = deployed
    assert fit is not None and len(compared) == PICTURES - CALIBRATED and len(fit) == CALIBRATED
    assert not set(fit) & set(compared)


def test_without_pictures_nothing_is_corrected(
    network: Path, tmp_path: Path, deployed: list[tuple[Pixels, Pixels | None]]
) -> None:
    write_pictures(tmp_path / "photos")
    sources, classifier = expand([str(tmp_path / "photos")]), open_classifier(checkpoint=network, mode=Mode.NORMAL)
    result: Any = SimpleNamespace(classifier=classifier)
    options = CalibrateOptions(data_free=True)
    calibration_job.deploy_imported(classifier, result, sources, None, tmp_path, options, NO_CALLBACKS)
    [(compared, fit)] = deployed
    assert fit is None and len(set(compared)) == PICTURES

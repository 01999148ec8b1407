"""The pictures of a calibration are found."""

from __future__ import annotations

from pathlib import Path

import pytest

from mgq.engine.calibration.calibration_images import find_calibration_sources
from mgq.events import Progress
from tests.conftest import classifier_of
from tests.fakes.photo_folders import make


@pytest.mark.parametrize("split", ["", "val/"])
def test_pictures_that_calibrate_and_measure_are_listed_once(tmp_path: Path, split: str) -> None:
    folder = make(tmp_path / "set", *(f"{split}kind {kind}/{i}.jpg" for kind in range(2) for i in range(3)))
    steps: list[Progress] = []
    found = find_calibration_sources(classifier_of("shufflenet_v1_x0_5_g3"), [], folder, 4, steps.append)
    assert [step.done for step in steps if step.what.startswith("list")] == [1, 2]
    assert found.labelled is not None and len(found.labelled) == 2

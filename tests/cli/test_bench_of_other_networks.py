"""``mgq bench`` of networks that are none of the zoo's: by their files, float beside int8."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from safetensors.numpy import save_file

from mgq.zoo.network_state import state_of
from tests.conftest import Mgq, classifier_of, the_error
from tests.fakes.foreign_models import write


def test_an_imported_network_is_to_be_calibrated_before_it_is_measured(tmp_path: Path, mgq: Mgq) -> None:
    path = write(tmp_path / "model.onnx")
    assert "mgq calibrate -c" in the_error(mgq("bench", "-c", path))


def test_bench_takes_one_network_of_several_in_a_file(tmp_path: Path, mgq: Mgq) -> None:
    state = state_of(classifier_of("shufflenet_v1_x0_5_g3").network)
    both = {f"{name}.{key}": value for name in ("student", "teacher") for key, value in state.items()}
    save_file(both, tmp_path / "two.safetensors")
    words = ("bench", "-a", "shufflenet_v1_x0_5_g3", "-c", "two.safetensors")
    assert "--key student" in the_error(mgq(*words))
    assert "`mgq calibrate -c two.safetensors --key student -d" in the_error(mgq(*words, "--key", "student"))
    assert "--key student chooses a network in the file of -c" in the_error(mgq("bench", "--key", "student"))


def test_report_compares_int8_with_no_other_import(tmp_path: Path, mgq: Mgq) -> None:
    path = write(tmp_path / "model.onnx")
    random = np.random.default_rng(0)
    for number in range(4):
        cv2.imwrite(str(tmp_path / f"{number}.png"), random.integers(0, 256, (40, 40, 3), np.uint8))
    calibrated = mgq("calibrate", *sorted(tmp_path.glob("*.png")), "-c", path, "--quality", "fast")
    assert calibrated.code == 0 and "timing int8 beside float in each engine" in calibrated.err, calibrated
    said = mgq("report", "-c", path, "--preprocess", "tf", "--no-engines")
    assert "fed as torch" in said.err, said
    assert the_error(said).endswith("run `mgq calibrate` again with -c")
    assert mgq("report", "-c", path, "--preprocess", "torch", "--no-engines").code == 0


@pytest.mark.slow
def test_an_imported_network_is_measured_in_float_and_in_int8(tmp_path: Path, mgq: Mgq) -> None:
    path = write(tmp_path / "model.onnx", "swishes")
    random = np.random.default_rng(0)
    for number in range(4):
        cv2.imwrite(str(tmp_path / f"{number}.png"), random.integers(0, 256, (40, 40, 3), np.uint8))
    calibrated = mgq("calibrate", *sorted(tmp_path.glob("*.png")), "-c", path, "--quality", "fast")
    assert calibrated.code == 0, calibrated
    said = mgq("bench", "-c", path, "--rounds", "1", "--threads", "1", "--json", "-")
    assert said.code == 0, said
    files = {Path(file).name for file in json.loads(said.out)["settings"]["files"]}
    assert {"model.float.onnx", "model.imported.onnx", "model.int8.onnx", "model.int8.openvino.onnx"} <= files
    assert all((row["precision"] == "int8") == (row["speedup"] is not None) for row in json.loads(said.out)["rows"])

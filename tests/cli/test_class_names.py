"""Names of classes that come from the folders of the pictures, from calibration on."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import onnx
import pytest
import requests

from mgq.data.decoding import bundled_cat
from mgq.engine.classifier.deployed_files import open_file
from tests.conftest import Mgq, the_error
from tests.fakes.foreign_models import CLASSES, write
from tests.fakes.services import PATIENCE_S, served

KINDS = [f"kind of {letter}" for letter in "jihgfedcba"]
INT8 = "runs/model.calibration/model.int8.onnx"


def fill(folder: Path, kinds: list[str], number: int = 2, size: int = 32) -> Path:
    random = np.random.default_rng(0)
    for kind in kinds:
        (folder / kind).mkdir(parents=True)
        for place in range(number):
            cv2.imwrite(str(folder / kind / f"{place}.png"), random.integers(0, 256, (size, size, 3), np.uint8))
    return folder


def names_of(mgq: Mgq, *words: str | Path) -> set[str]:
    said = mgq("infer", bundled_cat(), "--json", "--topk", str(CLASSES), *words)
    assert said.code == 0, said.err
    return {guess["class"] for guess in json.loads(said.out)["answers"][0]["guesses"]}


@pytest.fixture()
def model(tmp_path: Path) -> Path:
    return write(tmp_path / "model.onnx", "padless")


def calibrate(mgq: Mgq, *words: str | Path) -> str:
    said = mgq("calibrate", "--quality", "fast", "--images", "10", *words)
    assert said.code == 0, said.err
    return said.err


def test_folders_name_the_classes_of_an_imported_network(mgq: Mgq, model: Path, tmp_path: Path) -> None:
    photos = fill(tmp_path / "photos", KINDS)
    said = calibrate(mgq, "-c", model, "-d", photos)
    assert "names of classes: those of the folders in" in said and "kind of a, kind of b" in said
    for words in (["-c", INT8], ["-c", "runs/model.calibration/checkpoint.safetensors"], ["-c", str(model)]):
        assert names_of(mgq, *words) == set(KINDS)
    assert mgq("dump", "-c", "runs/model.calibration/checkpoint.safetensors", "-o", "other.onnx").code == 0
    assert names_of(mgq, "-c", "other.onnx") == set(KINDS)


def test_labels_and_other_numbers_of_folders_are_stronger(mgq: Mgq, model: Path, tmp_path: Path) -> None:
    labels = tmp_path / "labels.txt"
    labels.write_text("\n".join(kind.replace("kind", "sort") for kind in KINDS))
    photos = fill(tmp_path / "photos", [kind.replace("kind", "sort") for kind in KINDS])
    assert "names of classes" not in calibrate(mgq, "-c", model, "-d", photos, "--labels", labels)
    assert names_of(mgq, "-c", INT8) == set(labels.read_text().splitlines())
    few = fill(tmp_path / "few", KINDS[:9])
    assert "names of classes" not in calibrate(mgq, "-c", model, "-d", few, "--save", "others")
    assert names_of(mgq, "-c", "others/model.calibration/model.int8.onnx") == {f"class {i}" for i in range(CLASSES)}


def test_names_in_the_file_that_folders_do_not_have_are_said_with_the_option(
    mgq: Mgq, model: Path, tmp_path: Path
) -> None:
    proto = onnx.load(str(model))
    proto.metadata_props.add(key="names", value=json.dumps([f"sort {i}" for i in range(CLASSES)]))
    onnx.save(proto, str(model))
    photos, labels = fill(tmp_path / "photos", KINDS), tmp_path / "labels.txt"
    labels.write_text("\n".join(KINDS))
    words = ("eval", "-c", model, "-m", "normal", "-d", photos)
    line = the_error(mgq(*words))
    assert "it knows sort 0" in line and "by --labels FILE" in line
    assert mgq(*words, "--labels", labels).code == 0


def test_a_service_answers_with_the_names_of_folders(mgq: Mgq, model: Path, tmp_path: Path) -> None:
    calibrate(mgq, "-c", model, "-d", fill(tmp_path / "photos", KINDS))
    with served(open_file(tmp_path / INT8, "onnxruntime")) as (address, _):
        photo = bundled_cat().read_bytes()
        body = requests.post(f"{address}/predict?topk={CLASSES}", photo, timeout=PATIENCE_S).json()
    assert {guess["class"] for guess in body["answers"][0]["guesses"]} == set(KINDS)


def test_another_programs_file_is_not_served_but_what_was_made_of_it(mgq: Mgq, model: Path, tmp_path: Path) -> None:
    said = the_error(mgq("serve", "-c", "model.onnx"))
    assert "`mgq calibrate -c model.onnx -d FOLDER`" in said and not (tmp_path / "runs").exists()
    (tmp_path / INT8).parent.mkdir(parents=True)
    (tmp_path / INT8).touch()
    assert f"-c {INT8}" in the_error(mgq("serve", "-c", "model.onnx"))


@pytest.mark.parametrize("verb", ["train", "qat"])
def test_training_names_the_classes_of_an_imported_network(mgq: Mgq, model: Path, tmp_path: Path, verb: str) -> None:
    for part in ("train", "val"):
        fill(tmp_path / "photos" / part, KINDS)
    said = mgq(verb, "-c", model, "-d", tmp_path / "photos", "--epochs", "1", "--batch-size", "4")
    assert said.code == 0, said.err
    kind = {"train": "normal", "qat": "qat"}[verb]
    mode = {"train": "normal", "qat": "quantized"}[verb]
    assert names_of(mgq, "-c", f"runs/model.{kind}/checkpoint.safetensors", "-m", mode) == set(KINDS)

"""Commands on the folders and pictures that people have: what is said, what is kept off the terminal."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from mgq.data.image_sources import expand
from mgq.engine.calibration.calibration_run import calibrate
from mgq.engine.calibration.image_variety import FEWEST, Likeness
from mgq.engine.classifier.open import Classifier
from mgq.events import Callbacks
from mgq.ptq.presets import CalibrationConfig
from mgq.quantization.modes import Mode
from mgq.zoo.registry import spec_of
from tests.conftest import Mgq, blank, classifier_of, filled, one_line_about, smooth_images, the_error, write_images

ARCH = "shufflenet_v1_x0_5_g3"
KINDS = ("kind 3", "kind 7")

pytestmark = pytest.mark.usefixtures("no_downloads", "short_shufflenet")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / "float.safetensors"
    classifier_of(ARCH).write_checkpoint(path)
    return path


def folders(root: Path, *places: str, suffix: str = ".png", number: int = 2) -> Path:
    """Pictures in folders of each of ``places``, named after classes of the network."""
    for place in places:
        for seed, kind in enumerate(KINDS):
            (root / place / kind).mkdir(parents=True)
            for i, image in enumerate(smooth_images(number, 40, 48, seed)):
                Image.fromarray(image.transpose(1, 2, 0)).save(root / place / kind / f"{i}{suffix}")
    return root


# ---- folders ----


@pytest.mark.parametrize("places", [("training", "validation"), ("Train", "Val"), ("train", "valid"), ("train", "dev")])
def test_eval_measures_on_the_split_that_is_meant(
    mgq: Mgq, tmp_path: Path, checkpoint: Path, places: tuple[str, str]
) -> None:
    folders(tmp_path / "set", *places)
    said = mgq("eval", "-m", "normal", "-c", checkpoint, "-d", "set")
    assert said.code == 0, said.err
    assert f"data: set/{places[1]}, 4 pictures" in said.out
    assert f"{places[1]}/ is measured on (4 pictures)" in said.err


@pytest.mark.slow
def test_train_says_what_was_taken_for_what(mgq: Mgq, tmp_path: Path) -> None:
    folders(tmp_path / "set", "training", "validation", number=6)
    said = mgq("train", "-a", ARCH, "-d", "set", "--from-scratch", "--image-size", "32", "--epochs", "1")
    assert said.code == 0, said.err
    assert "set: training/ is trained on (12 pictures), validation/ is measured on (12 pictures)" in said.err
    assert "float32" in said.out


@pytest.mark.parametrize("suffix", [".ppm", ".jp2", ".avif", ".tga", ".bmp"])
def test_eval_and_infer_read_what_is_in_the_folder(mgq: Mgq, tmp_path: Path, checkpoint: Path, suffix: str) -> None:
    folders(tmp_path / "set", ".", suffix=suffix)
    said = mgq("eval", "-m", "normal", "-c", checkpoint, "-d", "set")
    assert said.code == 0 and "data: set, 4 pictures" in said.out, said.err
    for path in (tmp_path / "set").rglob(f"*{suffix}"):
        if suffix != ".tga":  # which nothing but its suffix tells
            path.rename(path.with_suffix(""))
    said = mgq("infer", "-m", "normal", "-c", checkpoint, "set", "--json")
    assert len(json.loads(said.out)["answers"]) == 4 and json.loads(said.out)["failed"] == 0


@pytest.mark.parametrize("verb", ["eval", "infer", "calibrate", "analyze"])
def test_what_was_left_out_is_said_by_every_verb(mgq: Mgq, tmp_path: Path, checkpoint: Path, verb: str) -> None:
    root = folders(tmp_path / "set", ".")
    (root / "__MACOSX" / KINDS[0]).mkdir(parents=True)
    (root / "__MACOSX" / KINDS[0] / "._a.jpg").touch()
    (root / KINDS[0] / "x.heic").touch()
    if verb == "analyze":
        assert mgq("calibrate", "-c", checkpoint, "set", "--quality", "fast").code == 0
        checkpoint = tmp_path / "runs" / f"{ARCH}.calibration" / "checkpoint.safetensors"
    where = ["-d", "set"] if verb == "eval" else ["set"]
    mode = ["-m", "normal"] if verb in ("eval", "infer") else []
    quick = {"calibrate": ["--quality", "fast"], "analyze": ["--html", "page.html"]}.get(verb, [])
    said = mgq(verb, *mode, "-c", checkpoint, *where, *quick)
    assert said.code == 0, said.err
    lines = [line for line in said.err.splitlines() if line.startswith("set: ")]
    assert len(lines) == 2, said.err
    assert one_line_about(lines[0], "passed over", "1 __MACOSX")
    assert one_line_about(lines[1], "left out 1 file", "1 .heic (HEIF is not read: save as JPEG)")


@pytest.mark.parametrize("verb", ["eval", "calibrate"])
def test_a_broken_image_of_two_is_more_than_a_hundredth(mgq: Mgq, tmp_path: Path, checkpoint: Path, verb: str) -> None:
    root = folders(tmp_path / "set", ".", number=1)
    (broken,) = (root / KINDS[0]).iterdir()
    broken.write_bytes(broken.read_bytes()[:200])
    words = (verb, "-c", checkpoint, "-d", "set", *(("-m", "normal") if verb == "eval" else ("--quality", "fast")))
    told = the_error(mgq(*words))
    assert one_line_about(told, "1 of 2 pictures", "at most 1 % may be", broken.name), told
    assert not (tmp_path / "runs" / f"{ARCH}.calibration").exists()
    said = mgq(*words, "--max-bad", "0.5")
    assert said.code == 0 and broken.name in said.err, said.err


# ---- defaults that fit ----


def test_infer_shows_as_many_classes_as_there_are(mgq: Mgq, tmp_path: Path) -> None:
    network = filled(blank(ARCH, 2))
    two = Classifier(network, None, spec_of(ARCH), Mode.NORMAL, KINDS, 64, "made-up weights", {})
    two.write_checkpoint(tmp_path / "two.safetensors")
    write_images(tmp_path / "set", 1)
    infer = ("infer", "-m", "normal", "-c", "two.safetensors", "set")
    said = mgq(*infer)
    assert said.code == 0, said.err
    assert all(kind in said.out for kind in KINDS)
    (answer,) = json.loads(mgq(*infer, "--json").out)["answers"]
    assert sum(guess["probability"] for guess in answer["guesses"]) == pytest.approx(1, abs=1e-5)
    assert len(answer["guesses"]) == 2
    assert one_line_about(the_error(mgq(*infer, "--topk", "3")), "top 3 of 2 classes", "give 1 to 2")


@pytest.mark.parametrize("kinds", [KINDS[:1], KINDS])
@pytest.mark.parametrize("number", [1, 2])
def test_eval_measures_any_subset_of_the_classes(
    mgq: Mgq, tmp_path: Path, checkpoint: Path, kinds: tuple[str, ...], number: int
) -> None:
    root = folders(tmp_path / "set", ".", number=number)
    for kind in set(KINDS) - set(kinds):
        for path in (root / kind).iterdir():
            path.unlink()
        (root / kind).rmdir()
    said = mgq("eval", "-m", "normal", "-c", checkpoint, "-d", "set", "--json")
    assert said.code == 0, said.err
    document = json.loads(said.out)
    assert document["images"] == number * len(kinds) and document["classes"] == 10
    assert [entry["class"] for entry in document["per_class"]] == list(kinds)
    assert [entry["index"] for entry in document["per_class"]] == [int(kind[-1]) for kind in kinds]


# ---- pictures of a calibration ----


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("quality", ["fast", "balanced", "best"])
def test_one_image_and_two_calibrate_with_a_warning(tmp_path: Path, number: int, quality: str) -> None:
    sources = expand([str(write_images(tmp_path / "set", number))])
    remarks: list[str] = []
    config, callbacks = CalibrationConfig(quality), Callbacks(on_message=remarks.append)
    found = calibrate(classifier_of(ARCH), sources, 256, config=config, callbacks=callbacks)
    assert found.used == number and found.classifier.mode is Mode.QAT
    warning, done = remarks
    assert one_line_about(warning, f"calibrated on {number} picture", "so few")
    assert one_line_about(done, f"on {number} image", "too few to hold some back")


def image(*values: int) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    return np.array(values, np.uint8).reshape(1, -1, 1).repeat(3, 2)


@pytest.mark.parametrize(
    ("images", "parts"),
    [
        ([image(0, 0)] * 20, [("20 of 20 calibration pictures are blank", "single colour")]),
        ([image(9, 9), *(image(i, 1) for i in range(20, 40))], [("1 of 21 calibration pictures is blank",)]),
        ([image(0, 1)] * 20, [("all 20 calibration pictures are alike to the pixel",)]),
        ([image(i % 3, 5) for i in range(60)], [("calibrated on 60 pictures, 3 of them different",)]),
        ([image(i, 99) for i in range(FEWEST - 1)], [(f"calibrated on {FEWEST - 1} pictures:",)]),
        ([image(i, 99) for i in range(FEWEST)], []),
    ],
)
def test_images_that_tell_little_are_counted(
    images: list[np.ndarray[tuple[int, ...], np.dtype[np.uint8]]], parts: list[tuple[str, ...]]
) -> None:
    likeness = Likeness()
    for one in images:
        likeness.add(one)
    lines = likeness.warnings()
    assert len(lines) == len(parts)
    assert all(one_line_about(line, *words) for line, words in zip(lines, parts, strict=True))


def test_calibration_on_black_images_warns_with_their_number(mgq: Mgq, tmp_path: Path, checkpoint: Path) -> None:
    (tmp_path / "black").mkdir()
    for i in range(17):
        cv2.imwrite(str(tmp_path / "black" / f"{i}.png"), np.zeros((40, 40, 3), np.uint8))
    said = mgq("calibrate", "-c", checkpoint, "black", "--quality", "best")
    assert said.code == 0, said.err
    assert said.err.count("17 of 17 calibration pictures are blank") == 1

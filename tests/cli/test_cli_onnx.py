"""Targets, ONNX files and engines as the user of the command line meets them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest

from mgq.data.decoding import bundled_cat
from mgq.data.image_sources import expand
from mgq.engine.calibration import calibration_run
from mgq.engine.classifier.open import open_classifier
from mgq.ptq.presets import CalibrationConfig
from mgq.quantization.targets import ONNX
from tests.conftest import SIZE, Mgq, classifier_of, one_line_about, slow, the_error

pytestmark = pytest.mark.usefixtures("short_shufflenet")
ARCH = "shufflenet_v1_x0_5_g3"


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight labelled pictures in two classes, called as the made-up networks call theirs."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for number in range(8):
        place = folder / "val" / f"kind {number % 2}"
        place.mkdir(parents=True, exist_ok=True)
        small = rng.integers(0, 256, (8, 8, 3), np.uint8)
        cv2.imwrite(str(place / f"{number}.png"), cv2.resize(small, (SIZE, SIZE), interpolation=cv2.INTER_CUBIC))
    return folder


@pytest.fixture(scope="module")
def float_checkpoint(short_shufflenet: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("float") / "net.safetensors"
    classifier_of(ARCH).write_checkpoint(path)
    return path


@pytest.fixture(scope="module")
def calibrated(short_shufflenet: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a network for the target onnx."""
    found = calibration_run.calibrate(
        classifier_of(ARCH),
        expand([str(bundled_cat())]),
        1,
        config=CalibrationConfig(target=ONNX, weight_rounding="nearest"),
    )
    return found.write(tmp_path_factory.mktemp("calibrated"))


def test_calibrate_takes_a_target(mgq: Mgq, float_checkpoint: Path, images: Path) -> None:
    said = mgq("calibrate", images / "val", "-c", float_checkpoint, "--target", "onnx", "--quality", "fast", "--json")
    assert said.code == 0, said.err
    body = json.loads(said.out)
    assert body["target"] == "onnx" and open_classifier(checkpoint=Path(body["checkpoint"])).target is ONNX


def test_a_network_for_onnx_goes_from_calibration_to_a_file_that_answers(mgq: Mgq, calibrated: Path) -> None:
    said = mgq("dump", "-c", calibrated, "--check", "layers", "-o", "net.onnx")
    assert said.code == 0, said.err
    assert "target onnx" in said.out and "times smaller" in said.out
    for engine in ("OpenVINO", "ONNX Runtime"):
        assert f"{engine}, layer by layer: no integer of" in said.out
    answers = []
    for words in (["-c", "net.onnx"], ["-c", "net.onnx", "--engine", "onnxruntime"], ["-c", str(calibrated)]):
        said = mgq("infer", bundled_cat(), "--json", *words)
        assert said.code == 0, said.err
        body = json.loads(said.out)
        assert body["arch"] == ARCH and body["mode"] == "quantized"
        answers.append({guess["class"]: guess["probability"] for guess in body["answers"][0]["guesses"]})
    for other in answers[1:]:
        assert set(other) & set(answers[0])
    assert "ONNX Runtime" in mgq("infer", "-c", "net.onnx", "--engine", "onnxruntime").out
    said = mgq("dump", "-c", calibrated, "--check", "layers", "--batch", "3", "-o", "three.onnx")
    assert said.code == 0 and said.out.count("layer by layer: no integer of") == 2, said


def test_without_output_the_file_is_called_after_the_target(mgq: Mgq, calibrated: Path) -> None:
    assert mgq("infer", "-c", calibrated, "--dump").code == 0
    assert Path(f"{ARCH}.quantized.onnx").is_file() and not Path(f"{ARCH}.quantized.megengine").exists()


@pytest.mark.parametrize(("options", "target"), [((), "onnx"), slow(("--target", "megengine"), "megengine")])
def test_installed_ranges_for_the_target_of_the_format_are_taken(
    mgq: Mgq, options: tuple[str, ...], target: str
) -> None:
    said = mgq("dump", "--format", "onnx", "--check", "none", "-o", "net.onnx", *options)
    assert said.code == 0, said.err
    assert f"target {target}, weights: ImageNet weights" in said.out


@pytest.mark.slow
def test_rewrites_are_measured_and_the_file_answers_as_before(mgq: Mgq, calibrated: Path) -> None:
    said = mgq("dump", "-c", calibrated, "--tune", "--check", "logits", "-o", "net.onnx")
    assert said.code == 0, said.err
    assert "times as fast as plain in OpenVINO" in said.out and "; kept: " in said.out
    assert "same answer 100.0 %" in said.out
    plain = mgq("dump", "-c", calibrated, "--tune", "--format", "megengine")
    assert plain.code == 2


def test_eval_of_a_file_is_the_same_in_one_process_and_in_two(mgq: Mgq, calibrated: Path, images: Path) -> None:
    assert mgq("dump", "-c", calibrated, "--batch", "0", "-o", "net.onnx", "--check", "none").code == 0
    found = []
    for jobs in ("1", "2"):
        said = mgq("eval", "-c", "net.onnx", "-d", images, "--json", "--jobs", jobs, "--batch-size", "2")
        assert said.code == 0, said.err
        found.append(json.loads(said.out))
    assert found[0]["images"] == 8
    assert [found[0][key] for key in ("top1", "loss")] == [found[1][key] for key in ("top1", "loss")]


def test_eval_in_an_engine_is_the_same_in_one_process_and_in_two(mgq: Mgq, calibrated: Path, images: Path) -> None:
    found = []
    for jobs in ("1", "2"):
        words = ("-c", calibrated, "-d", images, "--engine", "onnxruntime", "--batch-size", "2", "--jobs", jobs)
        said = mgq("eval", *words, "--json")
        assert said.code == 0, said.err
        found.append(json.loads(said.out))
    assert all("in ONNX Runtime" in body["weights"] for body in found)
    assert [found[0][key] for key in ("top1", "loss")] == [found[1][key] for key in ("top1", "loss")]


def test_infer_in_an_engine_dumps_the_network_itself(mgq: Mgq, calibrated: Path, tmp_path: Path) -> None:
    said = mgq("infer", bundled_cat(), "-c", calibrated, "--engine", "openvino", "--dump")
    assert said.code == 0, said.err
    again = open_classifier(checkpoint=tmp_path / f"{ARCH}.quantized.safetensors")
    assert again.target is ONNX and (tmp_path / f"{ARCH}.quantized.onnx").is_file()


def test_names_of_files_are_told_in_either_case(mgq: Mgq, calibrated: Path) -> None:
    assert mgq("dump", "-c", calibrated, "-o", "NET.ONNX", "--check", "logits").code == 0
    assert mgq("infer", bundled_cat(), "-c", "NET.ONNX").code == 0


def test_a_float_network_is_written_too(mgq: Mgq, float_checkpoint: Path) -> None:
    said = mgq("dump", "-c", float_checkpoint, "-m", "normal", "-o", "float.onnx")
    assert said.code == 0, said.err
    assert said.out.count("same answer 100.0 %, logits differ by 0.00 steps") == 2


class TestBadInput:
    def test_a_finished_file_is_neither_dumped_nor_calibrated_nor_changed(
        self, mgq: Mgq, calibrated: Path, images: Path
    ) -> None:
        assert mgq("dump", "-c", calibrated, "-o", "net.onnx", "--check", "none").code == 0
        for words, mend in (
            (("dump", "-o", "other.onnx"), "give the checkpoint"),
            (("calibrate", images / "val"), "give the checkpoint"),
            (("analyze", images / "val"), "give the checkpoint"),
            (("infer", bundled_cat(), "--dump"), "give the checkpoint"),
            (("infer", bundled_cat(), "-m", "normal"), "leave out -m normal"),
            (("infer", bundled_cat(), "--target", "onnx"), "leave out --target"),
            (("infer", bundled_cat(), "--image-size", "64"), "leave out --image-size"),
        ):
            assert one_line_about(the_error(mgq(*words, "-c", "net.onnx")), "net.onnx", mend), words

    def test_images_to_compare_on_are_read_before_anything_is_written(
        self, mgq: Mgq, calibrated: Path, tmp_path: Path
    ) -> None:
        said = mgq("dump", "-c", calibrated, "-o", "net.onnx", "-d", "nowhere")
        assert one_line_about(the_error(said), "nowhere") and not (tmp_path / "net.onnx").exists()

    def test_another_target_than_the_checkpoint_has(self, mgq: Mgq, calibrated: Path) -> None:
        said = mgq("infer", "-c", calibrated, "--target", "megengine")
        told = the_error(said)
        assert said.code == 2 and one_line_about(told, "for the target onnx, not megengine", "--target megengine"), told

    def test_an_unknown_target_format_check_or_engine(self, mgq: Mgq, float_checkpoint: Path, images: Path) -> None:
        c = ("-c", float_checkpoint)
        for words, what in (
            (("calibrate", images, *c, "--target", "tensorrt"), "there is no target 'tensorrt'; choose"),
            (("dump", *c, "-m", "normal", "--format", "tflite"), "there is no format 'tflite'"),
            (("dump", *c, "-m", "normal", "--check", "all"), "there is no check 'all'; choose"),
            (("infer", *c, "-m", "normal", "--engine", "tvm"), "there is no engine 'tvm'; choose"),
            (("dump", *c, "-m", "normal", "--format", "onnx", "-o", "a.megengine"), "is no name for format onnx"),
            (("dump", *c, "-m", "normal", "--format", "onnx", "--input", "int8"), "takes uint8 pixels, not int8"),
        ):
            said = mgq(*words)
            assert said.code == 2 and what in the_error(said), words
            assert not list(Path().glob("*.onnx"))

    def test_megengine_cannot_run_what_is_for_onnx(self, mgq: Mgq, calibrated: Path) -> None:
        said = mgq("dump", "-c", calibrated, "--format", "megengine")
        assert said.code == 2 and "--format onnx" in the_error(said)

    @pytest.mark.parametrize("kind", ["truncated", "foreign"])
    def test_a_file_that_is_damaged_or_not_ours(self, mgq: Mgq, calibrated: Path, kind: str) -> None:
        import onnx

        assert mgq("dump", "-c", calibrated, "-o", "net.onnx", "--check", "none").code == 0
        path = Path("net.onnx")
        if kind == "truncated":
            path.write_bytes(path.read_bytes()[:-1000])
        else:
            model = onnx.load("net.onnx")
            del model.metadata_props[:]
            onnx.save(model, "net.onnx")
        said = mgq("infer", "-c", "net.onnx")
        expected = "is damaged, cut off, or no ONNX file" if kind == "truncated" else "is quantized already"
        assert said.code == 2 and expected in the_error(said)

    def test_another_architecture_than_the_file_has(self, mgq: Mgq, calibrated: Path) -> None:
        assert mgq("dump", "-c", calibrated, "-o", "net.onnx", "--check", "none").code == 0
        said = mgq("infer", "-c", "net.onnx", "-a", "resnet18")
        assert said.code == 2 and f"is a network of {ARCH}, not of resnet18" in the_error(said)

    def test_learned_scales_are_for_megengine_alone(self, mgq: Mgq, float_checkpoint: Path, images: Path) -> None:
        shutil.copytree(images / "val", "data/train")
        shutil.copytree(images / "val", "data/val")
        said = mgq("qat", "-c", float_checkpoint, "-d", "data", "--target", "onnx", "--observer", "lsq")
        assert said.code == 2 and "choose ema or min-max" in the_error(said)

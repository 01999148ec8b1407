"""``mgq eval``: what it measures, shows and refuses."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import cv2
import pytest

from mgq.cli.console import plain_lines
from mgq.data.decoding import bundled_cat
from mgq.engine.classifier.open import DEFAULT_ARCH, RUN_CHECKPOINT
from mgq.events import Progress
from mgq.quantization.modes import Mode
from mgq.weights.checkpoint import write_checkpoint
from mgq.zoo.network_state import state_of
from tests.conftest import Mgq, classifier_of, document, one_line_about, smooth_images, the_error

ARCH = "shufflenet_v1_x0_5_g3"
NAMES = tuple(f"kind {i}" for i in range(10))

pytestmark = pytest.mark.usefixtures("no_downloads")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with labelled pictures of ten classes, three each, and checkpoints of a small network."""
    root = tmp_path_factory.mktemp("made")
    for place, name in enumerate(NAMES):
        (root / "set" / "val" / name).mkdir(parents=True)
        for i, image in enumerate(smooth_images(3, 72, 90, seed=place)):
            cv2.imwrite(str(root / "set" / "val" / name / f"{i}.png"), image.transpose(1, 2, 0))
    for mode in (Mode.NORMAL, Mode.QAT):
        classifier_of(ARCH, mode).write_checkpoint(root / f"{mode.value}.safetensors")
    network = classifier_of(ARCH, Mode.NORMAL)
    recipe = {"data": "synthetic", "synthetic_val": 20, "seed": 1, "image_size": 64}
    info = replace(network.info(), recipe=recipe, classes=DRAWN)
    write_checkpoint(root / "drawn.safetensors", state_of(network.network), info)
    return root


DRAWN = ("glow", "dots", "checkerboard", "stripes", "cross", "star", "triangle", "square", "ring", "disc")


def test_a_table_shows_the_figures_and_their_conditions(mgq: Mgq, made: Path) -> None:
    said = mgq("eval", "-d", made / "set", "-c", made / "qat.safetensors", "--per-class", "--confused", "3")
    assert said.code == 0, said.err
    for part in (
        "mode quantized (int8)",
        "qat.safetensors",
        "30 pictures",
        "top-1",
        "±",
        "top-5",
        "loss",
        "pictures/s",
    ):
        assert part in said.out, part
    for part in ("1 process", "MegEngine 1.13.0", "64 pixels", "precision", "taken for", *NAMES):
        assert part in said.out, part
    assert all(len(line) <= 80 for line in said.out.splitlines() if not line.startswith(("weights:", "data:")))


def test_tables_of_classes_come_on_request_only(mgq: Mgq, made: Path) -> None:
    said = mgq("eval", "-d", made / "set", "-c", made / "qat.safetensors", "--confused", "0")
    assert "precision" not in said.out and "taken for" not in said.out


def test_json_is_one_document_with_everything(mgq: Mgq, made: Path) -> None:
    said = mgq("eval", "-d", made / "set", "-c", made / "qat.safetensors", "-m", "qat", "--json", "--batch-size", "5")
    body = document(said.out)
    assert (body["arch"], body["mode"], body["images"], body["pictures"]) == (ARCH, "qat", 30, 30)
    assert (body["jobs"], body["batch_size"], body["image_size"], body["classes"]) == (1, 5, 64, 10)
    assert sum(entry["images"] for entry in body["per_class"]) == 30
    correct = sum(entry["correct"] for entry in body["per_class"])
    assert body["top1"] == pytest.approx(100 * correct / 30)
    assert correct + sum(pair["count"] for pair in body["confused"]) == 30
    share = correct / 30
    assert body["top1_standard_error"] == pytest.approx(100 * math.sqrt(share * (1 - share) / 30))
    assert body["cpu"] and body["versions"]["megengine"] == "1.13.0"


def test_all_modes_of_one_checkpoint_are_measured(mgq: Mgq, made: Path) -> None:
    losses = []
    for mode in ("normal", "qat", "quantized"):
        body = document(mgq("eval", "-d", made / "set", "-c", made / "qat.safetensors", "-m", mode, "--json").out)
        assert body["mode"] == mode
        losses.append(body["loss"])
    normal, simulated, real = losses
    assert normal != real and simulated == pytest.approx(real, rel=1e-6)  # the simulation is exact


def test_without_a_mode_float_weights_are_measured_as_they_are_and_it_says_so(mgq: Mgq, made: Path) -> None:
    said = mgq("eval", "-d", made / "set", "-c", made / "normal.safetensors", "--json")
    assert document(said.out)["mode"] == "normal"
    assert "measured in mode normal" in said.err and "without activation ranges" in said.err
    line = the_error(mgq("eval", "-d", made / "set", "-c", made / "normal.safetensors", "-m", "quantized"))
    assert "without activation ranges" in line


def test_the_newest_run_is_measured_in_the_mode_it_has(mgq: Mgq, made: Path, tmp_path: Path) -> None:
    run = tmp_path / "runs" / f"{ARCH}.normal" / RUN_CHECKPOINT
    run.parent.mkdir(parents=True)
    run.write_bytes((made / "normal.safetensors").read_bytes())
    said = mgq("eval", "-a", ARCH, "-d", made / "set", "--json")
    assert document(said.out)["mode"] == "normal" and "mode normal" in said.err
    run = tmp_path / "runs" / f"{ARCH}.qat" / RUN_CHECKPOINT
    run.parent.mkdir(parents=True)
    run.write_bytes((made / "qat.safetensors").read_bytes())
    said = mgq("eval", "-a", ARCH, "-d", made / "set", "--json")
    assert document(said.out)["mode"] == "quantized" and f"{ARCH}.qat" in document(said.out)["weights"]


@pytest.mark.parametrize("typed", ["infer", "dump", "analyze", "eval -m quantized", "infer -m qat"])
def test_a_float_run_is_named_with_what_makes_int8_of_it(mgq: Mgq, made: Path, tmp_path: Path, typed: str) -> None:
    run = tmp_path / "runs" / f"{ARCH}.normal" / RUN_CHECKPOINT
    run.parent.mkdir(parents=True)
    run.write_bytes((made / "normal.safetensors").read_bytes())
    line = the_error(mgq(*typed.split(), "-a", ARCH))
    assert f"runs/{ARCH}.normal is float" in line and f"`mgq calibrate -a {ARCH}`" in line
    assert "no weights" not in line and "-m normal" in line


def test_it_is_said_that_a_float_run_gives_way_to_installed_weights(mgq: Mgq, tmp_path: Path) -> None:
    run = tmp_path / "runs" / f"{DEFAULT_ARCH}.normal" / RUN_CHECKPOINT
    run.parent.mkdir(parents=True)
    classifier_of(DEFAULT_ARCH, Mode.NORMAL).write_checkpoint(run)
    said = mgq("infer", "--json")
    assert said.code == 0 and "ImageNet" in document(said.out)["weights"]
    assert f"not used: runs/{DEFAULT_ARCH}.normal is float" in said.err
    for words in (("-m", "normal"), ("--pretrained",)):
        assert "not used" not in mgq("infer", "--json", *words).err


def test_it_is_said_that_another_network_has_the_newest_run(mgq: Mgq, made: Path, tmp_path: Path) -> None:
    for name, option in ((ARCH, f"-a {ARCH}"), ("mine", "-c runs/mine.calibration/checkpoint.safetensors")):
        run = tmp_path / "runs" / f"{name}.calibration" / RUN_CHECKPOINT
        run.parent.mkdir(parents=True)
        run.write_bytes((made / "qat.safetensors").read_bytes())
        said = mgq("infer", "--json")
        assert "ImageNet" in document(said.out)["weights"]
        assert f"not used: runs/{name}.calibration is the newest run: `{option}` takes it" in said.err
        assert "not used" not in mgq("infer", "--json", *option.split()).err
    assert "not used" not in mgq("infer", "--json", "-a", DEFAULT_ARCH).err


def test_without_a_folder_it_takes_what_the_checkpoint_was_measured_on(mgq: Mgq, made: Path) -> None:
    said = mgq("eval", "-c", made / "drawn.safetensors", "-m", "normal", "--json")
    assert said.code == 0, said.err
    body = document(said.out)
    assert (body["data"], body["images"]) == ("synthetic pictures", 20)
    # Two of each, whose places among the network's outputs are not those among the drawn classes.
    assert {entry["class"]: entry["images"] for entry in body["per_class"]} == dict.fromkeys(DRAWN, 2)


def test_a_limit_is_said(mgq: Mgq, made: Path) -> None:
    said = mgq("eval", "-d", made / "set", "-c", made / "qat.safetensors", "--limit", "10")
    assert "10 of 30 pictures" in said.out


def test_broken_images_are_named_and_counted(mgq: Mgq, made: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    for path in (made / "set" / "val").glob("*/*.png"):
        (copy / path.parent.name).mkdir(parents=True, exist_ok=True)
        (copy / path.parent.name / path.name).write_bytes(path.read_bytes())
    (copy / "kind 3" / "1.png").write_bytes(b"no picture")
    words = ("eval", "-d", copy, "-c", made / "qat.safetensors")
    assert "1 of 30 pictures" in the_error(mgq(*words))
    said = mgq(*words, "--max-bad", "0.1")
    assert said.code == 0 and "29 of 30 pictures" in said.out
    assert "1.png" in said.err and "1 of 30 pictures could not be read and are left out" in said.err


@pytest.fixture
def sets(made: Path, tmp_path: Path) -> Iterator[Path]:
    """Folders that cannot be measured on."""
    image = bundled_cat().read_bytes()
    for name in ("loose/1.jpg", "one/a/1.jpg", "hollow/a/1.jpg", "other/oak/1.jpg", "other/fir/1.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(image)
    (tmp_path / "hollow" / "b").mkdir()
    (tmp_path / "hollow" / "b" / "notes.txt").touch()
    yield tmp_path


@pytest.mark.parametrize(
    ("folder", "named"),
    [
        ("gone", "gone does not exist"),
        ("loose", "no class folders"),
        ("one", "does not know (a;"),
        ("hollow", "no pictures in b"),
        ("other", "fir, oak"),
    ],
)
def test_a_folder_that_cannot_be_measured_on(mgq: Mgq, made: Path, sets: Path, folder: str, named: str) -> None:
    line = the_error(mgq("eval", "-d", sets / folder, "-c", made / "qat.safetensors"))
    assert one_line_about(line, named)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--limit", "0"], "--limit 0"),
        (["--jobs", "0"], "--jobs 0"),
        (["--jobs", "100000"], "--jobs 100000"),
        (["--batch-size", "0"], "--batch-size 0"),
        (["--confused", "-1"], "--confused -1"),
        (["--report-freq", "0"], "--report-freq 0"),
        (["--max-bad", "2"], "--max-bad 2"),
        (["-m", "int8"], "int8"),
        (["-w", "-1"], "--workers -1"),
        ([], "pass -d FOLDER"),
    ],
)
def test_wrong_use_is_one_line_that_names_it(mgq: Mgq, made: Path, arguments: list[str], named: str) -> None:
    where = ["-d", str(made / "set")] if arguments else []
    assert named in the_error(mgq("eval", *where, "-c", made / "qat.safetensors", *arguments))


def test_lines_come_as_often_as_asked(mgq: Mgq, made: Path) -> None:
    said = mgq(
        "eval", "-d", made / "set", "-c", made / "qat.safetensors", "--batch-size", "5", "--report-freq", "2", "-n", "2"
    )
    lines = [line for line in said.err.splitlines() if line.startswith("evaluate: ")]
    assert [line.split(",")[0] for line in lines] == [f"evaluate: {n} of 30 pictures" for n in (10, 20, 30)]
    assert all("top-1" in line for line in lines)
    assert "--jobs" in said.err


def test_plain_lines_tell_again_what_is_done_again(capfd: pytest.CaptureFixture[str]) -> None:
    listener = plain_lines()
    for _ in range(2):
        for done in (16, 32):
            listener(Progress("validate", done, 32, "pictures"))
    assert len(capfd.readouterr().err.splitlines()) == 4


def test_plain_lines_tell_the_detail(capfd: pytest.CaptureFixture[str]) -> None:
    listener = plain_lines()
    for done in range(0, 101, 5):
        listener(Progress("evaluate", done, 100, "pictures", f"top-1 {done} %"))
    lines = capfd.readouterr().err.splitlines()
    assert lines == [f"evaluate: {n} of 100 pictures, top-1 {n} %" for n in range(10, 101, 10)]

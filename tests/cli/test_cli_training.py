"""``mgq train`` and ``mgq qat`` as their user meets them: tables, errors, Ctrl-C, and kills at any moment."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path

import cv2
import pytest

from mgq.cli.training import watch_for_stop
from mgq.errors import FailureError
from mgq.events import Callbacks
from mgq.io.download import sha256_of
from mgq.system.end_signals import end_signals
from tests.conftest import Mgq, classifier_of, one_line_about, smooth_images, the_error, write_images
from tests.fakes.commands import ARCH, lines_of, started, waited_for

pytestmark = pytest.mark.usefixtures("short_shufflenet")
RECIPE = "image_size = 32\nbatch_size = 8\nsynthetic_train = 40\nsynthetic_val = 20\n"


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "small.toml"
    path.write_text(RECIPE)
    return path


def test_train_ends_with_one_table(mgq: Mgq, recipe: Path) -> None:
    said = mgq("train", "-a", ARCH, "--recipe", recipe, "--epochs", "1", "--report-freq", "2", "-w", "1")
    assert said.code == 0, said
    for part in ("float32", "fake-quantized", "int8", "top-1", "drop", "MB", "synthetic pictures"):
        assert part in said.out
    assert f"checkpoint: runs/{ARCH}.normal/checkpoint.safetensors" in said.out
    assert "random weights" in said.err and "epoch 1/1" in said.err and "step 4/5" in said.err
    assert all(len(line) <= 80 for line in said.out.splitlines()[:6])


def test_qat_as_json_begins_with_the_newest_run_and_serves_eval(mgq: Mgq, recipe: Path) -> None:
    assert mgq("train", "-a", ARCH, "--recipe", recipe, "--epochs", "1").code == 0
    recipe.write_text(RECIPE + 'observer = "min-max"\n')
    said = mgq("qat", "--recipe", recipe, "--epochs", "1", "--json")
    assert said.code == 0, said
    body = json.loads(said.out)
    assert body["recipe"]["arch"] == ARCH and body["recipe"]["observer"] == "min-max"
    assert set(body["comparison"]) >= {"normal", "qat", "quantized", "drop", "images"}
    evaluated = json.loads(mgq("eval", "--json").out)
    assert evaluated["mode"] == "quantized" and evaluated["arch"] == ARCH
    assert evaluated["top1"] == pytest.approx(body["comparison"]["quantized"]["top1"])


FLOAT = ("-c", f"runs/{ARCH}.normal/checkpoint.safetensors")


@pytest.mark.slow
def test_calibrate_compares_the_modes_on_the_images_of_the_run(mgq: Mgq, recipe: Path) -> None:
    assert mgq("train", "-a", ARCH, "--recipe", recipe, "--epochs", "1").code == 0
    said = mgq("calibrate", "--images", "8", "--method", "min-max")
    assert said.code == 0 and "fake-quantized" in said.out and "synthetic pictures" in said.out
    body = json.loads(mgq("calibrate", "--images", "8", "--method", "mse", "--json", "--limit", "5").out)
    assert body["pictures"] == 8 and body["method"] == "mse" and body["comparison"]["images"] == 5


@pytest.mark.slow
def test_calibrate_and_dump_give_the_same_bits_again(mgq: Mgq, recipe: Path, tmp_path: Path) -> None:
    assert mgq("train", "-a", ARCH, "--recipe", recipe, "--epochs", "1").code == 0
    made = []
    for workers in ("1", "2"):
        assert mgq("calibrate", "--images", "8", "--quality", "fast", "-w", workers, *FLOAT).code == 0
        files = [tmp_path / "runs" / f"{ARCH}.calibration" / "checkpoint.safetensors"]
        for form in ("megengine", "onnx"):
            files.append(tmp_path / f"net.{form}")
            assert mgq("dump", "-c", files[0], "-o", files[-1], "--format", form).code == 0
        made.append([sha256_of(path) for path in files])
    assert made[0] == made[1]


@pytest.mark.slow
def test_calibrate_measures_on_images_that_it_did_not_use(mgq: Mgq, tmp_path: Path) -> None:
    for name in ("n01440764", "n02123045"):
        (tmp_path / "set").mkdir(exist_ok=True)
        write_images(tmp_path / "set" / name, 3)
    said = mgq("calibrate", "-d", "set", "--images", "4", "--quality", "fast", "--json")
    body = json.loads(said.out)
    assert body["arch"] == "efficientnet_lite0" and body["pictures"] == 4 and body["comparison"]["images"] == 2


@pytest.fixture
def small_network(tmp_path: Path) -> Path:
    """A checkpoint of a network that takes no time, with classes called ``kind 0`` and so on."""
    path = tmp_path / "small.safetensors"
    classifier_of(ARCH).write_checkpoint(path)
    return path


def test_an_earlier_calibration_is_kept(mgq: Mgq, tmp_path: Path, small_network: Path) -> None:
    (tmp_path / "set").mkdir()
    for name in ("kind 0", "kind 1"):
        write_images(tmp_path / "set" / name, 3)
    for _ in range(2):
        said = mgq("calibrate", "-c", small_network, "-d", "set", "--method", "min-max", "--nearest")
        assert said.code == 0, said
    assert "all 6 labelled pictures are calibrated on: give a smaller --images" in said.err
    for name in (f"{ARCH}.calibration", f"{ARCH}.calibration.1"):
        assert (tmp_path / "runs" / name / "checkpoint.safetensors").is_file()


def test_unlabelled_images_calibrate_without_a_table(mgq: Mgq, tmp_path: Path, small_network: Path) -> None:
    write_images(tmp_path / "set", 3)
    said = mgq("calibrate", "-c", small_network, "-d", "set", "--method", "min-max", "--nearest")
    assert said.code == 0 and "top-1" not in said.out and "accuracy was not measured" in said.err


# ---- bad input ----


def folders(root: Path, train: dict[str, int], val: dict[str, int]) -> Path:
    """Class folders with that many pictures."""
    for split, classes in (("train", train), ("val", val)):
        for name, count in classes.items():
            (root / split / name).mkdir(parents=True)
            for i, image in enumerate(smooth_images(count, 40, 40)):
                cv2.imwrite(str(root / split / name / f"{i}.png"), image.transpose(1, 2, 0))
    return root


@pytest.mark.parametrize(
    ("train", "val", "parts"),
    [
        ({"a": 4, "b": 4}, {}, ("val",)),
        ({}, {"a": 1, "b": 1}, ("train",)),
        ({"a": 4}, {"a": 1}, ("1 class",)),
        ({"a": 4, "b": 0}, {"a": 1, "b": 1}, ("no pictures in b",)),
        ({"a": 4, "b": 4}, {"a": 1, "c": 1}, ("b in train/", "val/")),
    ],
)
def test_folders_that_make_no_training_are_named(
    mgq: Mgq, tmp_path: Path, train: dict[str, int], val: dict[str, int], parts: tuple[str, ...]
) -> None:
    folders(tmp_path / "set", train, val)
    assert one_line_about(the_error(mgq("train", "-a", ARCH, "-d", "set")), "set", *parts)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("verb", ["train", "qat"])
@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["-a", "resnet81"], ("resnet81", "did you mean resnet18")),
        (["--epochs", "0"], ("--epochs 0",)),
        (["--lr", "-1"], ("--lr -1",)),
        (["--schedule", "never"], ("never", "cosine")),
        (["--recipe", "none.toml"], ("none.toml",)),
        (["-c", "none.pkl"], ("none.pkl",)),
        (["--resume"], ("resume",)),
        (["-n", "2"], ("GPU",)),
        (["--amp"], ("--amp", "GPU")),
        (["-d", "none"], ("none", "does not exist")),
    ],
)
def test_what_cannot_be_is_one_line(
    mgq: Mgq, tmp_path: Path, verb: str, arguments: list[str], parts: tuple[str, ...]
) -> None:
    assert one_line_about(the_error(mgq(verb, *arguments)), *parts)
    assert not (tmp_path / "runs").exists()


def test_an_unknown_key_of_a_recipe_is_named(mgq: Mgq, recipe: Path) -> None:
    recipe.write_text("learning_rat = 1\n")
    assert one_line_about(the_error(mgq("train", "--recipe", recipe)), "small.toml", "learning_rat")


def test_a_truncated_checkpoint_is_named(mgq: Mgq, recipe: Path, tmp_path: Path) -> None:
    assert mgq("train", "-a", ARCH, "--recipe", recipe, "--epochs", "1").code == 0
    whole = (tmp_path / "runs" / f"{ARCH}.normal" / "checkpoint.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    for verb in ("train", "qat", "eval"):
        assert one_line_about(the_error(mgq(verb, "-c", "cut.safetensors")), "cut.safetensors")


def test_a_broken_image_is_named_and_the_run_goes_on(mgq: Mgq, tmp_path: Path) -> None:
    folders(tmp_path / "set", {"a": 8, "b": 8}, {"a": 2, "b": 2})
    (tmp_path / "set" / "train" / "a" / "3.png").write_bytes(b"\x89PNG broken")
    words = ("train", "-a", ARCH, "-d", "set", "--image-size", "32", "--epochs", "1")
    assert one_line_about(the_error(mgq(*words)), "1 of 16 pictures", "3.png")
    said = mgq(*words, "--max-bad", "0.1")
    assert said.code == 0 and "3.png" in said.err


# ---- stopped and killed ----

OPTIONS = ("-a", ARCH, "--image-size", "32", "--batch-size", "8", "--limit", "48", "--epochs", "3", "-w", "1")


@pytest.mark.slow
def test_a_run_killed_at_several_moments_ends_with_the_same_weights(tmp_path: Path) -> None:
    whole = started("train", tmp_path, *OPTIONS, "-s", "whole")
    assert whole.wait(120) == 0
    run = tmp_path / "killed" / f"{ARCH}.normal"
    last = run / "last.safetensors"
    moments: list[Callable[[], bool]] = [
        lambda: last.exists(),
        lambda: lines_of(run / "metrics.jsonl") >= 1,
        lambda: any(run.glob(".*.part")),
    ]
    options: tuple[str, ...] = (*OPTIONS, "-s", "killed")
    for moment in moments:
        child = started("train", tmp_path, *options)
        waited_for(moment, child)
        child.kill()
        child.communicate()
        options = ("--resume", "-a", ARCH, "-s", "killed")
    final = started("train", tmp_path, *options)
    _, err = final.communicate(timeout=120)
    assert final.returncode == 0, err
    name = f"{ARCH}.normal/checkpoint.safetensors"
    assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert [json.loads(line)["epoch"] for line in (run / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3]


@pytest.mark.parametrize("number", end_signals())
def test_a_signal_ends_a_training_run_at_once_where_nobody_asks_for_it(
    mgq: Mgq, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    """Before the first step and after the last: the calibration behind a training worked on for minutes."""
    went_on = []

    def train(_: object, callbacks: Callbacks) -> None:
        with callbacks.while_training():
            went_on.append("trains")
        signal.raise_signal(number)
        went_on.append("calibrates")

    monkeypatch.setattr("mgq.engine.training.training_run.train", train)
    said = mgq("train")
    assert (said.code, went_on) == (130, ["trains"]), said.err


@pytest.mark.parametrize("is_seen", [True, False])
def test_a_signal_between_two_steps_waits_for_the_next_and_is_not_lost_behind_the_last(is_seen: bool) -> None:
    ends_by = FailureError if is_seen else KeyboardInterrupt
    with watch_for_stop() as watch, pytest.raises(ends_by), watch.while_training():
        signal.raise_signal(signal.SIGTERM)
        if is_seen and watch.should_stop():
            raise FailureError("stopped")

"""Training from a request to a trained network: what is written, and that it goes on to the bit."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import pytest
from megengine import Tensor

from mgq.data.loader import Batch, Loader
from mgq.engine.classifier.open import open_classifier
from mgq.engine.distributed.process_group import ProcessGroup
from mgq.engine.runs.run_folder import FLOAT_START
from mgq.engine.training import calibrated_start, trainer, training_run
from mgq.engine.training.train_options import TrainOptions
from mgq.engine.training.trainer import StoppedError, Trainer
from mgq.engine.training.training_run import TrainResult, qat, train
from mgq.errors import FailureError, InputError
from mgq.events import Callbacks, Progress
from mgq.ptq.calibrate import find_best_network
from mgq.quantization.modes import Mode
from mgq.runtime.protocol import BatchRuntime, run_in_batches
from mgq.zoo.network_state import State, state_of
from mgq.zoo.weight_loading import read_weights
from tests.conftest import one_line_about, same_state, slow, smooth_images
from tests.fakes.training_options import ARCH, SMALL, small_request, stopping_after

pytestmark = pytest.mark.usefixtures("short_shufflenet")
ASKED_BEFORE = 2 + 5 + 5
"""How often ``qat`` is asked to stop before its first step: at each batch and candidate of its calibration, and at each
batch that is observed."""


@pytest.fixture(scope="module")
def undisturbed(short_shufflenet: None, tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    """One float training of two epochs of five steps."""
    return train(small_request(tmp_path_factory.mktemp("undisturbed")))


@pytest.fixture(scope="module")
def float_run(undisturbed: TrainResult) -> Path:
    return undisturbed.checkpoint.parent


@pytest.fixture(scope="module")
def undisturbed_qat(undisturbed: TrainResult, tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    save = tmp_path_factory.mktemp("undisturbed-qat")
    return qat(replace(small_request(save), checkpoint=undisturbed.checkpoint))


# ---- what a run leaves ----


def test_a_run_leaves_recipe_log_metrics_curves_and_checkpoints(undisturbed: TrainResult, float_run: Path) -> None:
    assert float_run.name == f"{ARCH}.normal"
    there = {path.name for path in float_run.iterdir()}
    assert {"recipe.toml", "log.txt", "metrics.jsonl", "curves.png", "checkpoint.safetensors"} <= there
    metrics = [json.loads(line) for line in (float_run / "metrics.jsonl").read_text().splitlines()]
    assert [entry["epoch"] for entry in metrics] == [1, 2] and [entry["step"] for entry in metrics] == [5, 10]
    assert all(0 <= entry["val_top1"] <= 100 and entry["loss"] > 0 for entry in metrics)
    assert undisturbed.best["top1"] == max(entry["val_top1"] for entry in metrics)
    assert cv2.imread(str(float_run / "curves.png")) is not None


def test_the_checkpoint_says_what_it_is(undisturbed: TrainResult) -> None:
    info = read_weights(undisturbed.checkpoint).info
    assert info is not None and info.arch == ARCH and info.mode == "normal"
    assert "star" in info.classes and info.image_size == 32
    assert info.recipe["data"] == "synthetic" and info.recipe["seed"] == 0
    assert info.metrics["top1"] == undisturbed.best["top1"] and "synthetic" in info.origin


@pytest.mark.slow
def test_the_best_epoch_is_kept_not_the_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = iter((30.0, 50.0, 40.0))

    class Figures:
        def __init__(self, top1: float) -> None:
            self.top1, self.top5, self.loss = top1, top1, 1.0

    monkeypatch.setattr(Trainer, "validate", lambda *_: Figures(next(found)))
    outcome = train(small_request(tmp_path, epochs=3))
    assert outcome.best["epoch"] == 2 and outcome.best["top1"] == 50
    info = read_weights(outcome.checkpoint).info
    assert info is not None and info.step == 10


def test_training_learns(tmp_path: Path) -> None:
    data = coloured_folders(tmp_path / "data", 24)
    changes: dict[str, Any] = {"epochs": 5, "lr": 0.02, "warmup": 0.5, "jitter": 0.0}
    outcome = train(replace(small_request(tmp_path, **changes), data=data))
    assert outcome.best["top1"] > 60 and outcome.comparison.quantized.top1 > 60  # of three classes


@pytest.mark.slow
def test_equal_seeds_give_equal_weights_and_others_other_ones(undisturbed: TrainResult, tmp_path: Path) -> None:
    again = train(small_request(tmp_path / "again"))
    assert again.checkpoint.read_bytes() == undisturbed.checkpoint.read_bytes()
    other = train(small_request(tmp_path / "other", seed=1))
    assert other.checkpoint.read_bytes() != undisturbed.checkpoint.read_bytes()


@pytest.mark.slow
def test_an_earlier_run_is_kept(tmp_path: Path) -> None:
    first = train(small_request(tmp_path, epochs=1))
    content = first.checkpoint.read_bytes()
    remarks: list[str] = []
    train(small_request(tmp_path, epochs=1, seed=3), Callbacks(on_message=remarks.append))
    assert (tmp_path / f"{ARCH}.normal.1" / "checkpoint.safetensors").read_bytes() == content
    assert any("is kept as" in remark for remark in remarks)


# ---- interrupted and resumed ----


@pytest.mark.parametrize("moment", [slow(1), 5, slow(8)])
def test_a_stopped_training_goes_on_to_the_bit(undisturbed: TrainResult, tmp_path: Path, moment: int) -> None:
    request = small_request(tmp_path)
    with pytest.raises(StoppedError) as stopped:
        train(request, stopping_after(moment))
    assert "stopped in epoch" in str(stopped.value) and stopped.value.verb == "train"
    outcome = train(TrainOptions(save=tmp_path, resume=True, workers=2))
    assert outcome.checkpoint.read_bytes() == undisturbed.checkpoint.read_bytes()
    assert outcome.best == undisturbed.best
    assert epochs_in(outcome) == [1, 2]


@pytest.fixture(scope="module")
def solved(short_shufflenet: None, tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    """A training of one epoch whose classifier is solved before."""
    return train(small_request(tmp_path_factory.mktemp("solved"), epochs=1, classifier_pictures=20))


@pytest.mark.slow
@pytest.mark.parametrize("moment", [1, 3, 4])
def test_a_classifier_that_was_being_solved_is_solved_again(solved: TrainResult, tmp_path: Path, moment: int) -> None:
    with pytest.raises(StoppedError):  # it is asked at each of three batches, and after each step
        train(small_request(tmp_path, epochs=1, classifier_pictures=20), stopping_after(moment))
    again = train(TrainOptions(save=tmp_path, resume=True, workers=1))
    assert again.checkpoint.read_bytes() == solved.checkpoint.read_bytes()


@pytest.mark.parametrize("observer", ["ema", slow("lsq")])
def test_qat_that_begins_with_calibration_is_calibrated_again_when_resumed(
    undisturbed: TrainResult, tmp_path: Path, observer: str
) -> None:
    checkpoints = []
    changes: dict[str, Any] = {
        "calibrate": True,
        "keep_batch_norm": True,
        "observer": observer,
        "lr": 1e-6,
        "epochs": 1,
    }
    for name, moments in (("undisturbed", ()), ("stopped", (2, 5, 9))):
        request = replace(small_request(tmp_path / name, **changes), checkpoint=undisturbed.checkpoint)
        for moment in moments:  # it is asked at each of two batches to calibrate on and five candidates, and each step
            with pytest.raises(StoppedError):
                qat(request, stopping_after(moment))
            request = TrainOptions(save=tmp_path / name, resume=True, workers=1)
        checkpoints.append(qat(request).checkpoint)
    assert checkpoints[0].read_bytes() == checkpoints[1].read_bytes()
    state, before = read_weights(checkpoints[0]).state, read_weights(undisturbed.checkpoint).state
    shifted = {n for n in before if n.endswith("bn.bias") and np.abs(state[n] - before[n]).max() > 1e-3}
    weight, own = (np.squeeze(of["classifier.0.weight"]) for of in (state, before))
    equalized = own * (weight * own).sum(0) / (own * own).sum(0)  # each channel by one factor
    assert np.abs(weight - equalized).max() < 1e-4
    assert shifted and not any(np.abs(state[n] - before[n]).max() for n in before if n.endswith("running_mean"))


def test_the_first_of_several_processes_stops_between_candidates_of_its_calibration(
    undisturbed: TrainResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training_run, "launch", lambda _, work, callbacks, __: work(ProcessGroup(0, 2), callbacks))
    told: list[Progress] = []
    request = replace(small_request(tmp_path), checkpoint=undisturbed.checkpoint)
    with pytest.raises(StoppedError):
        qat(request, replace(stopping_after(4), on_progress=told.append))
    what, done, total, *_ = told[-1]
    assert what == "calibrate: candidates" and done < (total or 0)


class SecondProcess(ProcessGroup):
    """The second of two: what the first one does comes pickled."""

    def call_on_first(self, function: Callable[[], Any]) -> Any:
        return pickle.loads(pickle.dumps(function()))


def test_an_error_of_the_calibration_reaches_all_processes(
    undisturbed: TrainResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise FailureError("the layer stem gives numbers that are not finite")

    monkeypatch.setattr(trainer, "calibrate", fail)
    monkeypatch.setattr(training_run, "launch", lambda _, work, callbacks, __: work(SecondProcess(1, 2), callbacks))
    request = replace(small_request(tmp_path), checkpoint=undisturbed.checkpoint)
    with pytest.raises(FailureError, match="the layer stem"):
        qat(request)


@pytest.mark.parametrize("moment", [slow(3), 9])
def test_a_stopped_qat_goes_on_to_the_bit(
    undisturbed: TrainResult, undisturbed_qat: TrainResult, tmp_path: Path, moment: int
) -> None:
    request = replace(small_request(tmp_path), checkpoint=undisturbed.checkpoint)
    with pytest.raises(StoppedError):
        qat(request, stopping_after(moment + ASKED_BEFORE))
    outcome = qat(TrainOptions(save=tmp_path, resume=True, workers=2))
    assert outcome.checkpoint.read_bytes() == undisturbed_qat.checkpoint.read_bytes()


@pytest.mark.parametrize("changes", [slow({"ema": 0.9}), {"observer": "lsq"}, slow({"observer": "tqt"})])
def test_averages_and_learned_scales_go_on_to_the_bit(
    undisturbed: TrainResult, tmp_path: Path, changes: dict[str, Any]
) -> None:
    results = []
    for save, moment in ((tmp_path / "a", 10**9), (tmp_path / "b", ASKED_BEFORE + 2)):
        request = replace(small_request(save, epochs=1, **changes), checkpoint=undisturbed.checkpoint)
        try:
            outcome = qat(request, stopping_after(moment))
        except StoppedError:
            outcome = qat(TrainOptions(save=save, resume=True, workers=1))
        results.append(outcome.checkpoint.read_bytes())
    assert results[0] == results[1]


def test_a_finished_run_is_resumed_to_the_same_end(undisturbed: TrainResult, tmp_path: Path) -> None:
    shutil.copytree(undisturbed.checkpoint.parent, tmp_path / f"{ARCH}.normal")
    outcome = train(TrainOptions(save=tmp_path, resume=True, workers=1))
    assert outcome.checkpoint.read_bytes() == undisturbed.checkpoint.read_bytes()
    assert outcome.comparison.to_json() == undisturbed.comparison.to_json()


@pytest.mark.parametrize(
    ("changed", "parts"),
    [
        (TrainOptions(changes={"lr": 0.5}), ("--lr 0.5", "--resume")),
        (TrainOptions(changes={"epochs": 7}), ("--epochs", "7")),
        (TrainOptions(data=Path("elsewhere")), ("--data", "elsewhere")),
        (TrainOptions(from_scratch=True), ("--resume", "leave out")),
    ],
)
def test_resuming_with_changed_options_is_refused(
    undisturbed: TrainResult, tmp_path: Path, changed: TrainOptions, parts: tuple[str, ...]
) -> None:
    run = Path(shutil.copytree(undisturbed.checkpoint.parent, tmp_path / f"{ARCH}.normal"))
    before = contents(run)
    with pytest.raises(InputError) as caught:
        train(replace(changed, save=tmp_path, resume=True))
    wanted = [part if part != "--lr 0.5" else "--lr" for part in parts]
    assert one_line_about(str(caught.value), *wanted)
    assert contents(run) == before


def test_resuming_with_other_images_is_refused(tmp_path: Path) -> None:
    data = coloured_folders(tmp_path / "data", 8)
    with pytest.raises(StoppedError):
        train(replace(small_request(tmp_path), data=data), stopping_after(1))
    next((data / "train" / "blue").iterdir()).unlink()
    with pytest.raises(InputError, match="pictures when this run began"):
        train(TrainOptions(save=tmp_path, resume=True))


def test_there_is_nothing_to_resume_in_an_empty_folder(tmp_path: Path) -> None:
    for request in (TrainOptions(save=tmp_path, resume=True), TrainOptions(arch=ARCH, save=tmp_path, resume=True)):
        with pytest.raises(InputError, match="resume"):
            train(request)


@pytest.mark.parametrize("size", [0, 100, 5_000])
def test_a_damaged_state_is_refused_and_left_alone(undisturbed: TrainResult, tmp_path: Path, size: int) -> None:
    run = Path(shutil.copytree(undisturbed.checkpoint.parent, tmp_path / f"{ARCH}.normal"))
    state = run / "last.safetensors"
    state.write_bytes(state.read_bytes()[:size])
    before = contents(run)
    with pytest.raises(InputError, match=r"last\.safetensors"):
        train(TrainOptions(save=tmp_path, resume=True))
    assert contents(run) == before


# ---- a loss that is lost ----


def test_a_loss_that_is_not_a_number_stops_and_keeps_the_last_good_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[Batch] = []
    original = Trainer.step

    def step(self: Trainer, batch: Batch) -> None:
        steps.append(batch)
        if len(steps) == 8:
            weight = next(iter(self.parameters.values()))
            weight._reset(Tensor(np.full(weight.shape, np.nan, np.float32)))
        original(self, batch)

    monkeypatch.setattr(Trainer, "step", step)
    with pytest.raises(InputError) as caught:
        train(small_request(tmp_path))
    checkpoint = tmp_path / f"{ARCH}.normal" / "checkpoint.safetensors"
    assert one_line_about(str(caught.value), "step 8", "nan", str(checkpoint), "--lr")
    state = read_weights(checkpoint).state
    assert all(np.isfinite(value).all() for value in state.values())


# ---- quantization-aware training ----


def test_qat_measures_real_int8_and_keeps_the_float_network(
    undisturbed: TrainResult, undisturbed_qat: TrainResult
) -> None:
    run = undisturbed_qat.checkpoint.parent
    assert run.name == f"{ARCH}.qat" and (run / FLOAT_START).is_file()
    info = read_weights(undisturbed_qat.checkpoint).info
    assert info is not None and info.mode == "qat"
    found = undisturbed_qat.comparison
    assert found.images == 20 and found.normal.images == found.quantized.images
    assert found.quantized_bytes * 3 < found.normal_bytes
    assert open_classifier(checkpoint=undisturbed_qat.checkpoint).mode is Mode.QUANTIZED


def test_qat_begins_with_the_newest_float_run_and_measures_epochs_as_real_int8(
    undisturbed: TrainResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engines: list[str] = []

    def note(runtime: BatchRuntime, images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        engines.append(type(runtime).__name__)
        return run_in_batches(runtime, images)

    monkeypatch.setattr(trainer, "run_in_batches", note)
    shutil.copytree(undisturbed.checkpoint.parent, tmp_path / f"{ARCH}.normal")
    outcome = qat(replace(small_request(tmp_path, epochs=1), arch=None))
    assert outcome.recipe.arch == ARCH
    start = read_weights(outcome.checkpoint.parent / FLOAT_START)
    trained = read_weights(undisturbed.checkpoint)
    assert all(np.array_equal(value, trained.state[name]) for name, value in start.state.items())
    assert set(engines) == {"TracedRuntime"}


def test_qat_without_a_float_run_says_so_and_trains_one(tmp_path: Path) -> None:
    remarks: list[str] = []
    changes = {name: value for name, value in SMALL.items() if name != "epochs"}
    request = TrainOptions(arch=ARCH, save=tmp_path, changes=changes, workers=1)
    outcome = qat(request, Callbacks(on_message=remarks.append))
    assert "no float weights" in remarks[0] and "training some first" in remarks[0]
    assert (tmp_path / f"{ARCH}.normal" / "checkpoint.safetensors").is_file()
    assert outcome.checkpoint == tmp_path / f"{ARCH}.qat" / "checkpoint.safetensors"


@pytest.mark.parametrize("target", ["onnx", slow("megengine")])
def test_what_calibration_gives_is_kept_to_the_bit_where_no_epoch_is_better(
    undisturbed: TrainResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str
) -> None:
    calibrated: list[State] = []

    def note(*arguments: Any, **options: Any) -> Any:
        found = find_best_network(*arguments, **options)
        calibrated.append(state_of(found[0].network))
        return found

    monkeypatch.setattr(calibrated_start, "find_best_network", note)
    monkeypatch.setattr(Trainer, "is_best", lambda self, _: not self.best)
    request = small_request(tmp_path, epochs=1, calibrate=True, target=target)
    outcome = qat(replace(request, checkpoint=undisturbed.checkpoint))
    assert outcome.best["epoch"] == 0 and outcome.calibrated["top1"] == outcome.best["top1"]
    assert same_state(read_weights(outcome.checkpoint).state, calibrated[0])


def test_distillation_follows_the_float_network(undisturbed: TrainResult, tmp_path: Path) -> None:
    request = replace(small_request(tmp_path, epochs=1), checkpoint=undisturbed.checkpoint)
    plain = qat(replace(request, save=tmp_path / "plain"))
    taught = qat(replace(request, save=tmp_path / "taught", distill=True))
    assert taught.recipe.distill == 0.5 and plain.recipe.distill == 0
    assert taught.checkpoint.read_bytes() != plain.checkpoint.read_bytes()


# ---- what training begins with ----


@pytest.mark.slow
def test_a_frozen_backbone_stays_as_it_was(undisturbed: TrainResult, tmp_path: Path) -> None:
    request = small_request(tmp_path, epochs=1, freeze_backbone=True)
    outcome = train(replace(request, checkpoint=undisturbed.checkpoint))
    before, after = read_weights(undisturbed.checkpoint).state, read_weights(outcome.checkpoint).state
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert changed == {"classifier.0.weight"}


def test_other_classes_need_a_new_head(undisturbed: TrainResult, tmp_path: Path) -> None:
    data = coloured_folders(tmp_path / "data", 8)
    request = replace(small_request(tmp_path, epochs=1), data=data, checkpoint=undisturbed.checkpoint)
    with pytest.raises(InputError) as caught:
        train(request)
    assert one_line_about(str(caught.value), "10 classes", "--new-head", "3")
    assert not (tmp_path / f"{ARCH}.normal").exists()
    outcome = train(replace(request, new_head=True))
    info = read_weights(outcome.checkpoint).info
    assert info is not None and info.classes == ("blue", "green", "red")


def test_qat_on_images_of_other_classes_is_refused(undisturbed: TrainResult, tmp_path: Path) -> None:
    data = coloured_folders(tmp_path / "data", 8)
    with pytest.raises(InputError) as caught:
        qat(replace(small_request(tmp_path), data=data, checkpoint=undisturbed.checkpoint))
    assert one_line_about(str(caught.value), "does not know", "blue")
    assert not (tmp_path / f"{ARCH}.qat").exists()


def test_more_outputs_than_classes_are_possible_and_fewer_are_not(tmp_path: Path) -> None:
    outcome = train(small_request(tmp_path, epochs=1, classes=12))
    info = read_weights(outcome.checkpoint).info
    assert info is not None and len(info.classes) == 12
    with pytest.raises(InputError, match="--classes 3"):
        train(small_request(tmp_path, classes=3))


Wrong = Callable[[Path], TrainOptions]


@pytest.mark.parametrize(
    ("wrong", "parts"),
    [
        (lambda p: replace(small_request(p), data=p / "none"), ("none", "does not exist")),
        (lambda p: replace(small_request(p), recipe=p / "none.toml"), ("none.toml",)),
        (lambda p: replace(small_request(p), arch="resnet19"), ("resnet19", "resnet18")),
        (lambda p: small_request(p, amp=True), ("--amp", "GPU")),
        (lambda p: replace(small_request(p), devices=3), ("-n 3", "GPU")),
        (lambda p: replace(small_request(p), nodes=2), ("--nnodes",)),
        (lambda p: small_request(p, batch_size=100), ("100", "too few")),
        (lambda p: small_request(p, image_size=50), ("--image-size 50", "32")),
        (lambda p: replace(small_request(p), pretrained=True), ("pretrained", ARCH)),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(
    tmp_path: Path, wrong: Wrong, parts: tuple[str, ...]
) -> None:
    with pytest.raises(InputError) as caught:
        train(wrong(tmp_path))
    assert one_line_about(str(caught.value), *parts)
    assert list(tmp_path.iterdir()) == []


# ---- the parts ----


def test_progress_tells_loss_and_accuracy(tmp_path: Path) -> None:
    events: list[Progress] = []
    train(small_request(tmp_path, epochs=1), Callbacks(on_progress=events.append))
    epoch = [event for event in events if event.what == "epoch 1/1"]
    assert epoch and epoch[-1].done == epoch[-1].total == 40
    assert "loss" in epoch[-1].detail and "top-1" in epoch[-1].detail


def test_ranks_share_out_each_batch(tmp_path: Path) -> None:
    from mgq.data.augmentation import EvalTransform
    from mgq.data.synthetic import SyntheticImages

    images = SyntheticImages(20, size=32)
    how = {"shuffle": True, "seed": 4, "workers": 0, "drop_last": True}
    with Loader(images, EvalTransform(32), 6, **how) as whole:  # type: ignore[arg-type]
        wanted = [batch.indices.tolist() for batch in whole]
    parts = []
    for rank in (0, 1, 2):
        with Loader(images, EvalTransform(32), 2, rank=rank, ranks=3, **how) as loader:  # type: ignore[arg-type]
            parts.append([batch.indices.tolist() for batch in loader])
    assert [[index for part in shared for index in part] for shared in zip(*parts, strict=True)] == wanted


def epochs_in(outcome: TrainResult) -> list[int]:
    lines = (outcome.checkpoint.parent / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["epoch"] for line in lines]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def coloured_folders(root: Path, number: int) -> Path:
    """Blue, green and red pictures in ``train`` and ``val``, that many of each for training."""
    for split, count in (("train", number), ("val", max(4, number // 4))):
        for channel, name in enumerate(("blue", "green", "red")):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i, image in enumerate(smooth_images(count, 40, 40, seed=channel + 10 * len(split))):
                image[channel] = image[channel] // 2 + 127
                image[(channel + 1) % 3] //= 2
                cv2.imwrite(str(folder / f"{i:03}.png"), image.transpose(1, 2, 0))
    return root

"""Evaluation: figures right by hand, classes matched by name, the same result from one process and from two."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import pytest

from mgq.data.augmentation import EvalTransform
from mgq.data.datasets import subset
from mgq.data.imagenet_classes import imagenet_classes
from mgq.data.labelled_folders import evaluation_folder, training_folders
from mgq.data.loader import Loader
from mgq.data.synthetic import SyntheticImages
from mgq.engine.classifier import evaluate as module
from mgq.engine.classifier.evaluate import evaluate, evaluate_loader
from mgq.engine.classifier.evaluation_result import Evaluation, agreement
from mgq.engine.classifier.labelled_sets import evaluation_data, match_classes
from mgq.engine.classifier.open import Classifier, class_names
from mgq.errors import FailureError, InputError
from mgq.events import Progress
from mgq.quantization.modes import Mode
from mgq.system.megengine_start import import_megengine
from tests.conftest import classifier_of, one_line_about, smooth_images

SIZE = 32
NAMES = ("ant", "bee", "cat")
# The answers to six pictures, three classes: right, right, wrong (second), right, wrong (third), right.
LOGITS = np.array(
    [[3, 1, 0], [2, 1, 0], [1, 2, 0], [0, 9, 1], [3, 1, 2], [0, 1, 5]],
    np.float32,
)
LABELS = (0, 0, 0, 1, 1, 2)


@dataclass(eq=False)
class Plain:
    """Pictures of one colour each, which is their number; some may be files that are no pictures."""

    labels: npt.NDArray[np.int64] | None
    classes: tuple[str, ...] = NAMES
    name: str = "plain pictures"
    broken: Mapping[int, Path] = field(default_factory=dict)
    count: int = len(LABELS)

    def __len__(self) -> int:
        return self.count

    def image(self, index: int) -> Path | npt.NDArray[np.uint8]:
        return self.broken.get(index, np.full((SIZE, SIZE, 3), index, np.uint8))


def plain(labels: Sequence[int] = LABELS, **changes: Any) -> Plain:
    return Plain(np.array(labels, np.int64), **changes)


def network(images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    assert images.dtype == np.uint8 and images.shape[1:] == (3, SIZE, SIZE)
    answers: npt.NDArray[np.float32] = LOGITS[images[:, 0, 0, 0]]
    return answers


def loader_of(dataset: Plain, batch_size: int = 4, max_bad: float = 0.01) -> Loader:
    return Loader(dataset, EvalTransform(SIZE), batch_size, workers=0, broken="drop", max_bad=max_bad)


def broken_file(folder: Path) -> Path:
    path = folder / "broken.jpg"
    path.write_text("this is no picture")
    return path


# ---- figures ----


@pytest.mark.parametrize("batch_size", [1, 4, 6])
def test_the_figures_are_those_of_all_images(batch_size: int) -> None:
    result = evaluate_loader(network, loader_of(plain(), batch_size))
    exact = LOGITS.astype(np.float64)
    losses = np.log(np.exp(exact).sum(1)) - exact[np.arange(6), LABELS]
    assert (result.images, result.top5, result.problems, result.jobs) == (6, 100.0, (), 1)
    assert result.top1 == pytest.approx(100 * 4 / 6)
    assert result.loss == pytest.approx(losses.mean(), rel=1e-12)
    assert result.top1_error == pytest.approx(100 * math.sqrt(4 / 6 * 2 / 6 / 6))
    assert result.predictions.dtype == np.int64 and result.predictions.tolist() == [0, 0, 1, 1, 0, 2]
    assert result.indices.tolist() == list(range(6)) and result.labels.tolist() == list(LABELS)
    assert result.images_per_second == result.images / result.seconds


def test_the_confusion_has_the_true_class_in_its_rows() -> None:
    result = evaluate_loader(network, loader_of(plain()))
    assert result.confusion.dtype == np.int64
    assert result.confusion.tolist() == [[2, 1, 0], [1, 1, 0], [0, 0, 1]]


def test_classes_have_a_share_recognised_and_a_precision() -> None:
    ant, bee, cat = evaluate_loader(network, loader_of(plain())).per_class()
    assert (ant.name, ant.images, ant.correct, ant.predicted) == ("ant", 3, 2, 3)
    assert ant.top1 == pytest.approx(200 / 3) and ant.precision == pytest.approx(200 / 3)
    assert (bee.top1, bee.precision, cat.top1, cat.precision) == (50, 50, 100, 100)


def test_classes_without_images_are_left_out_and_never_named_ones_have_no_precision() -> None:
    result = evaluate_loader(network, loader_of(plain((2, 2, 2, 2, 2, 0))))
    assert [(entry.index, entry.images) for entry in result.per_class()] == [(0, 1), (2, 5)]
    never = evaluate_loader(network, loader_of(plain((2, 2), count=2))).per_class()
    assert len(never) == 1 and never[0].top1 == 0 and math.isnan(never[0].precision)


def test_the_most_confused_pairs_come_first() -> None:
    result = evaluate_loader(network, loader_of(plain((1, 1, 0, 1, 1, 2))))
    pairs = [(pair.true, pair.predicted, pair.count, pair.images) for pair in result.confused()]
    assert pairs == [("bee", "ant", 3, 4), ("ant", "bee", 1, 1)]
    assert len(result.confused(1)) == 1 and result.confused(0) == []


def answers_of(predictions: Sequence[int], indices: Sequence[int]) -> Evaluation:
    nothing = np.zeros(len(indices), np.int64)
    return Evaluation(len(indices), 0, 0, 0, 1, np.array(predictions), nothing, np.array(indices), ("a", "b"))


def test_agreement_is_of_the_images_that_both_have_answered() -> None:
    one, other = answers_of([0, 1, 1, 0], [1, 2, 3, 4]), answers_of([1, 1, 0, 1], [2, 3, 4, 9])
    assert agreement(one, other) == agreement(other, one) == 100
    assert agreement(one, answers_of([1, 0], [1, 2])) == 0
    assert agreement(one, answers_of([1, 0, 1, 0], [1, 4, 5, 2])) == pytest.approx(100 / 3)
    assert math.isnan(agreement(one, answers_of([0], [7])))


def test_progress_counts_images_and_says_top1() -> None:
    events: list[Progress] = []
    evaluate_loader(network, loader_of(plain()), "validate", events.append)
    assert events == [
        Progress("validate", 4, 6, "pictures", "top-1 75.0 %"),
        Progress("validate", 6, 6, "pictures", "top-1 66.7 %"),
    ]


def test_broken_images_are_left_out_and_named(tmp_path: Path) -> None:
    broken = {2: broken_file(tmp_path)}
    for batch_size in (1, 2, 6):
        events: list[Progress] = []
        result = evaluate_loader(network, loader_of(plain(broken=broken), batch_size, 0.5), "x", events.append)
        assert result.images == 5 and result.indices.tolist() == [0, 1, 3, 4, 5] and result.top1 == 80
        assert len(result.problems) == 1 and one_line_about(result.problems[0], "broken.jpg")
        assert events[-1].done == 6


def test_a_last_batch_of_broken_images_alone_is_told_of_too(tmp_path: Path) -> None:
    result = evaluate_loader(network, loader_of(plain(broken={5: broken_file(tmp_path)}), 1, 0.5))
    assert result.images == 5 and len(result.problems) == 1


def test_too_many_broken_images_stop_it(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="1 of 6 pictures"):
        evaluate_loader(network, loader_of(plain(broken={2: broken_file(tmp_path)})))


def test_images_without_labels_cannot_be_measured() -> None:
    with pytest.raises(InputError, match="plain pictures has no classes"):
        evaluate_loader(network, loader_of(Plain(None)))


def test_labels_without_an_output_are_refused() -> None:
    with pytest.raises(InputError, match="4 classes and the network has 3 outputs"):
        evaluate_loader(network, loader_of(plain((0, 0, 0, 3, 1, 2), classes=(*NAMES, "dog"))))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_answers_that_are_not_finite_are_a_failure(value: float) -> None:
    with pytest.raises(FailureError, match="not finite"):
        evaluate_loader(lambda images: np.full((len(images), 3), value, np.float32), loader_of(plain()))


# ---- classes ----


def test_classes_are_matched_by_name_whatever_their_order() -> None:
    data = match_classes(plain(), ("dog", "cat", "bee", "ant"))
    assert data.labels is not None and data.labels.tolist() == [3, 3, 3, 2, 2, 1]
    assert data.classes == ("dog", "cat", "bee", "ant") and data.image(5) is not None


def test_only_classes_with_images_have_to_be_known() -> None:
    data = match_classes(plain((0, 0, 0, 1, 1, 1)), ("bee", "ant"))
    assert data.labels is not None and data.labels.tolist() == [1, 1, 1, 0, 0, 0]


def test_classes_that_the_network_does_not_know_are_named() -> None:
    with pytest.raises(InputError) as caught:
        match_classes(plain(), ("ant", "Bee", "cow", "dog", "eel"))
    message = str(caught.value)
    assert one_line_about(message, "plain pictures", "2 classes", "bee, cat", "ant, Bee, cow and 2 more", "-d", "-c")


def test_weights_without_class_names_take_those_of_as_many_folders() -> None:
    assert match_classes(plain(), class_names(3)).classes == NAMES
    with pytest.raises(InputError):
        match_classes(plain(), class_names(4))


def test_wnid_folders_are_matched_with_imagenets_names(tmp_path: Path) -> None:
    for entry in (imagenet_classes()[7], imagenet_classes()[901]):
        (tmp_path / entry.wnid).mkdir()
        (tmp_path / entry.wnid / "1.jpg").touch()
    data = match_classes(evaluation_folder(tmp_path), class_names(1000))
    assert data.labels is not None and data.labels.tolist() == [7, 901]
    two = (imagenet_classes()[901].name, imagenet_classes()[7].name)
    data = match_classes(evaluation_folder(tmp_path), two)
    assert data.labels is not None and data.labels.tolist() == [1, 0]


# ---- which pictures ----


def folder_of_classes(root: Path, names: Sequence[str], number: int = 3) -> Path:
    for place, name in enumerate(names):
        (root / name).mkdir(parents=True)
        for i, image in enumerate(smooth_images(number, 72, 90, seed=place)):
            cv2.imwrite(str(root / name / f"{i}.png"), image.transpose(1, 2, 0))
    return root


def test_of_a_folder_without_splits_only_what_training_left_out_is_measured(tmp_path: Path) -> None:
    root = folder_of_classes(tmp_path / "set", NAMES, 10)
    other = folder_of_classes(tmp_path / "other", NAMES, 2)
    recipe = {"data": str(root)}
    (_, kept), whole = training_folders(root), evaluation_folder(root)
    for given in (None, root, root.parent / "other" / ".." / "set"):
        found = evaluation_data(given, recipe, 64)
        assert [found.image(i) for i in range(len(found))] == [kept.image(i) for i in range(len(kept))]
    assert len(evaluation_data(other, recipe, 64)) == 2 * len(NAMES)
    assert len(evaluation_data(root, {}, 64)) == len(whole) > len(kept)


def test_a_folder_that_is_given_comes_before_the_one_trained_on(tmp_path: Path) -> None:
    given = folder_of_classes(tmp_path / "given", NAMES)
    data = evaluation_data(given, {"data": "synthetic"}, 64)
    assert data.classes == NAMES and len(data) == 9


def test_without_a_folder_it_is_what_the_run_was_measured_on(tmp_path: Path) -> None:
    folder_of_classes(tmp_path / "set" / "val", NAMES)
    assert len(evaluation_data(None, {"data": str(tmp_path / "set")}, 64)) == 9
    recipe = {"data": "synthetic", "synthetic_val": 30, "seed": 5, "image_size": 48}
    drawn = evaluation_data(None, recipe, 64)
    assert isinstance(drawn, SyntheticImages)
    assert (len(drawn), drawn.seed, drawn.size, drawn.split) == (30, 5, 48, "val")
    default = evaluation_data(None, {"data": "synthetic"}, 64)
    assert isinstance(default, SyntheticImages) and (len(default), default.seed, default.size) == (500, 0, 64)


def test_without_any_data_it_says_what_to_pass(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="pass -d FOLDER"):
        evaluation_data(None, {}, 64)
    with pytest.raises(InputError, match=r"are not in .*gone.*pass -d FOLDER"):
        evaluation_data(None, {"data": str(tmp_path / "gone")}, 64)


# ---- processes ----


def small_classifier(mode: Mode, classes: Sequence[str]) -> Classifier:
    return replace(classifier_of("shufflenet_v1_x0_5_g3", mode), classes=tuple(classes))


def same(one: Evaluation, other: Evaluation) -> bool:
    """Whether they are equal to the bit but for the time and the number of processes."""
    figures = ("images", "loss", "top1", "top5", "classes", "problems")
    arrays = ("predictions", "labels", "indices")
    return all(getattr(one, name) == getattr(other, name) for name in figures) and all(
        np.array_equal(getattr(one, name), getattr(other, name)) for name in arrays
    )


needs_two_cores = pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="two processes need two cores")
quietly = import_megengine


@needs_two_cores
@pytest.mark.slow
def test_two_processes_give_the_result_of_one_to_the_bit(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    drawn = SyntheticImages(70, size=64, split="val")
    root = folder_of_classes(tmp_path / "set", drawn.classes, 7)
    (root / "disc" / "0.png").write_text("this is no picture")
    (root / "star" / "6.png").write_text("nor is this")
    dataset = evaluation_folder(root)
    classifier = small_classifier(Mode.QUANTIZED, drawn.classes)
    events: list[Progress] = []
    one = evaluate(classifier, dataset, batch_size=8, max_bad=0.1)
    two = evaluate(classifier, dataset, jobs=2, batch_size=8, max_bad=0.1, prepare=quietly, on_progress=events.append)
    assert same(one, two)
    assert (one.images, len(one.problems), one.jobs, two.jobs) == (68, 2, 1, 2)
    assert len(set(one.predictions.tolist())) > 1
    assert [event.done for event in events] == sorted(event.done for event in events)
    assert events[-1].done == 70
    assert capfd.readouterr().err == ""


def test_broken_images_of_all_parts_count_together() -> None:
    part = module._Deal(loader_of(plain(), 2, max_bad=0.34), 0, 2)
    part.refuse_too_many({0: "one", 1: "two"})
    with pytest.raises(InputError, match=r"3 of 6 pictures.*the first: one; two; three"):
        part.refuse_too_many({0: "one", 1: "two", 5: "three"})


def test_no_more_processes_than_batches() -> None:
    classifier = small_classifier(Mode.NORMAL, SyntheticImages(1).classes)
    result = evaluate(classifier, SyntheticImages(8, size=64, split="val"), jobs=min(2, len(os.sched_getaffinity(0))))
    assert result.jobs == 1 and result.images == 8


@pytest.mark.parametrize("jobs", [0, -1, 1 + len(os.sched_getaffinity(0))])
def test_a_number_of_processes_that_cannot_be(jobs: int) -> None:
    classifier = small_classifier(Mode.NORMAL, SyntheticImages(1).classes)
    with pytest.raises(InputError, match=f"--jobs {jobs} "):
        evaluate(classifier, SyntheticImages(8), jobs=jobs)


def test_parts_deal_out_whole_batches() -> None:
    whole = loader_of(plain(), 2)
    parts = [module._Deal(whole, part, 2) for part in range(2)]
    found = [[batch.indices.tolist() for batch in part] for part in parts]
    assert found == [[[0, 1], [4, 5]], [[2, 3]]] and [len(part) for part in parts] == [2, 1]


def test_an_evaluation_of_a_part_of_the_images_has_their_labels() -> None:
    result = evaluate_loader(network, Loader(subset(plain(), 3), EvalTransform(SIZE), 2, workers=0, broken="drop"))
    assert result.labels.tolist() == [0, 0, 1] and result.predictions.tolist() == [0, 1, 0]

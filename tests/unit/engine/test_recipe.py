"""Recipes: defaults that fit the data, files and options that change them, and what they refuse."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from mgq.engine.training.recipe import (
    SYNTHETIC,
    Recipe,
    Start,
    Task,
    check_changes,
    make_recipe,
    read_changes,
    restore_recipe,
    to_plain,
)
from mgq.engine.training.schedule import learning_rate
from mgq.errors import InputError
from tests.conftest import one_line_about

IMAGENET = Task("resnet18", "normal", "imagenet", 1000, 1_281_167, 224)
FLOWERS = Task("resnet18", "normal", "flowers", 5, 1_250, 64)


def test_imagenet_gets_the_recipe_of_the_public_example() -> None:
    resnet = make_recipe(IMAGENET, {})
    assert (resnet.batch_size, resnet.lr, resnet.epochs) == (32, 0.0125, 90)
    assert resnet.milestones == (30, 60, 80) and resnet.schedule == "step"
    assert resnet.weight_decay == 1e-4 and resnet.decay_all and resnet.label_smoothing == 0.1
    for arch in ("mobilenet_v2", "shufflenet_v1_x1_5_g3"):
        recipe = make_recipe(replace(IMAGENET, arch=arch), {})
        assert (recipe.batch_size, recipe.lr, recipe.epochs) == (128, 0.0625, 240)
        assert recipe.schedule == "linear" and recipe.jitter == 0.4
        assert recipe.weight_decay == 4e-5 and not recipe.decay_all


def test_imagenet_qat_gets_the_recipe_of_the_public_example() -> None:
    resnet = make_recipe(replace(IMAGENET, mode="qat"), {})
    assert (resnet.batch_size, resnet.lr, resnet.epochs, resnet.milestones) == (32, 0.000125, 12, (6,))
    other = make_recipe(replace(IMAGENET, arch="mobilenet_v2", mode="qat"), {})
    assert (other.batch_size, other.lr, other.epochs, other.schedule) == (32, 0.0015625, 30, "linear")


@pytest.mark.parametrize("start", list(Start))
def test_fewer_images_are_seen_more_often(start: Start) -> None:
    epochs = [make_recipe(replace(FLOWERS, images=n, start=start), {}).epochs for n in (300, 1_250, 10_000, 100_000)]
    assert epochs == sorted(epochs, reverse=True) and epochs[0] > epochs[-1]


def test_a_new_classifier_is_solved_first_and_what_the_weights_know_is_kept() -> None:
    recipe = make_recipe(replace(FLOWERS, start=Start.NEW_CLASSIFIER, stem_lr=0.01), {})
    assert recipe.classifier_pictures > 1_250 and recipe.keep_batch_norm and recipe.stem_lr == 0.01
    for start in (Start.RANDOM, Start.TRAINED):
        other = make_recipe(replace(FLOWERS, start=start), {})
        assert other.classifier_pictures == 0 and not other.keep_batch_norm and other.stem_lr == 1
    kept = replace(FLOWERS, start=Start.TRAINED, keep_batch_norm=True)
    assert make_recipe(kept, {}).keep_batch_norm and make_recipe(replace(kept, mode="qat"), {}).keep_batch_norm


def test_qat_of_a_small_set_begins_with_calibration_and_of_weights_that_kept_batch_norms_gently() -> None:
    task = replace(FLOWERS, mode="qat", start=Start.TRAINED)
    free, kept = (make_recipe(replace(task, keep_batch_norm=keep), {}) for keep in (False, True))
    assert free.calibrate and kept.calibrate and free.ema == kept.ema > 0
    assert free.lr > 10 * kept.lr and kept.distill == 1 > free.distill > 0


def test_a_handful_of_images_still_makes_batches() -> None:
    for images in (4, 9, 40):
        recipe = make_recipe(replace(FLOWERS, images=images), {})
        assert 1 <= recipe.batch_size <= images // 4


def test_other_epochs_shift_what_counts_in_epochs() -> None:
    assert make_recipe(IMAGENET, {"epochs": 9}).milestones == (3, 6, 8)
    qat = make_recipe(replace(IMAGENET, mode="qat"), {"epochs": 6})
    assert (qat.freeze_batch_norm, qat.freeze_observers) == (3, 4)


def test_another_batch_changes_the_learning_rate_in_proportion_unless_it_is_given() -> None:
    assert make_recipe(IMAGENET, {"batch_size": 256}).lr == 0.1
    assert make_recipe(IMAGENET, {"batch_size": 256, "lr": 0.3}).lr == 0.3


def test_a_recipe_comes_back_from_its_file(tmp_path: Path) -> None:
    recipe = make_recipe(replace(FLOWERS, options={"width": 0.5}), {"lr": 0.0123, "seed": 7, "milestones": (1.0, 2.5)})
    path = tmp_path / "recipe.toml"
    path.write_text(recipe.to_toml())
    assert restore_recipe(read_changes(path), "it") == recipe
    assert restore_recipe(to_plain(recipe), "it") == recipe


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("learning_rate = 1", ("unknown key 'learning_rate'",)),
        ("epoch = 1", ("epoch", "did you mean epochs?")),
        ("epochs = 1.5", ("epochs", "whole number")),
        ("epochs = true", ("epochs", "whole number")),
        ("lr = 'fast'", ("lr", "a number")),
        ("amp = 1", ("amp", "true or false")),
        ("milestones = ['a']", ("milestones", "list of numbers")),
        ("lr = ", ("not a TOML file",)),
    ],
)
def test_a_bad_recipe_file_is_named_with_its_key(tmp_path: Path, text: str, parts: tuple[str, ...]) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    with pytest.raises(InputError) as caught:
        read_changes(path)
    assert one_line_about(str(caught.value), "recipe.toml", *parts)


def test_a_missing_recipe_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot read the recipe .*none\.toml"):
        read_changes(tmp_path / "none.toml")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("epochs", 0),
        ("batch_size", -1),
        ("lr", -0.1),
        ("lr", float("nan")),
        ("label_smoothing", 1.5),
        ("ema", 1.5),
        ("momentum", -0.5),
        ("crop_scale", 0.0),
        ("schedule", "sometimes"),
        ("observer", "eye"),
        ("image_size", 100),
        ("seed", -1),
    ],
)
def test_values_that_cannot_be_are_refused_by_name(name: str, value: float | str) -> None:
    with pytest.raises(InputError) as caught:
        make_recipe(FLOWERS, {name: value})
    assert one_line_about(str(caught.value), name.replace("_", "-"), str(value))


def test_options_of_the_command_are_checked_as_a_file_is() -> None:
    assert check_changes({"lr": 1}, "the command") == {"lr": 1.0}
    with pytest.raises(InputError, match="unknown key"):
        check_changes({"nonsense": 1}, "the command")


# ---- learning rates ----


def scheduled(**values: object) -> Recipe:
    return replace(make_recipe(FLOWERS, {"lr": 1.0, "epochs": 10}), **{"warmup": 0.0, **values})  # type: ignore[arg-type]


def test_linear_and_cosine_fall_from_the_top_to_nothing() -> None:
    for schedule in ("linear", "cosine"):
        recipe = scheduled(schedule=schedule)
        rates = [learning_rate(recipe, epoch / 2) for epoch in range(21)]
        assert rates[0] == 1 and abs(rates[-1]) < 1e-9 and rates == sorted(rates, reverse=True)
        assert learning_rate(recipe, 5) == pytest.approx(0.5)
    assert learning_rate(scheduled(schedule="cosine"), 2.5) > learning_rate(scheduled(schedule="linear"), 2.5)


def test_steps_divide_at_their_milestones() -> None:
    recipe = scheduled(schedule="step", milestones=(3.0, 6.0))
    found = [learning_rate(recipe, epoch) for epoch in (0, 2.99, 3, 5.99, 6, 9.9)]
    assert found == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])


def test_warmup_rises_from_nothing_and_several_devices_multiply() -> None:
    recipe = scheduled(warmup=2.0, devices=4)
    assert [learning_rate(recipe, epoch) for epoch in (0, 1, 2)] == pytest.approx([0, 2, 4])


def test_synthetic_is_told_by_its_name() -> None:
    assert make_recipe(replace(FLOWERS, data=SYNTHETIC), {}).is_synthetic
    assert not make_recipe(FLOWERS, {}).is_synthetic

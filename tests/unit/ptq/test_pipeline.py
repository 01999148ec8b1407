"""Candidates of post-training quantization: judged on images held back, and never worse than a simpler one."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import megengine.functional as F
import megengine.module as M
import numpy as np
import numpy.typing as npt
import pytest
from megengine import Tensor

import mgq.ptq.pipeline as pipeline
from mgq.cli.analyze import calibration_lines
from mgq.engine.calibration.analysis import calibration_of
from mgq.engine.calibration.calibration_run import calibrate
from mgq.errors import FailureError
from mgq.events import Progress
from mgq.ptq.calibrate import find_best_network
from mgq.ptq.logit_gradients import BINS, FEW_BINS, HEADROOM, LIMITS, Reaction, measure_reactions
from mgq.ptq.pipeline import (
    FEWEST,
    NO_NOISE,
    Candidate,
    SearchResult,
    Trial,
    apply_steps,
    choose_best,
    doubt_between,
    find_best,
    snr_of,
    split,
)
from mgq.ptq.presets import (
    BY_LOGITS,
    PRESETS,
    UP_TO_CEILINGS,
    WITH_HEADROOM,
    CalibrationConfig,
    data_free_steps,
    get_preset,
)
from mgq.ptq.range_measurement import as_input
from mgq.ptq.steps import (
    NO_IMAGES,
    CorrectBias,
    CorrectShifts,
    Draft,
    Equalize,
    Images,
    RangesFromImages,
    RangesFromLogits,
    RoundWeights,
    Step,
    logits_of,
    split_float,
)
from mgq.ptq.stray_images import find_usual
from mgq.quantization.activations import RELU6
from mgq.quantization.batch_norm_folding import activation_of, fold_batch_norms
from mgq.quantization.qat_layers import Range, bias_parameter, find_quantized_layers, quantize_weight, set_range
from mgq.quantization.targets import MEGENGINE, ONNX, Target
from tests.conftest import classifier_of, slow, smooth_images
from tests.fakes.measured_ranges import simulate
from tests.fakes.uneven_networks import network_of, with_true_statistics

IMAGES = smooth_images(24, seed=3)
ENOUGH = smooth_images(80, seed=3)
"""Of eight held back, chance decides which candidate is the best: 16 tell."""
UNSEEN = smooth_images(16, seed=11)
SHUFFLE = "shufflenet_v1_x0_5_g3"
CASES: list[Any] = [slow("mobilenet_v2", {"activation": "relu6"}, "fast", ONNX)]
CASES += [(SHUFFLE, {}, "balanced", ONNX), (SHUFFLE, {}, "balanced", MEGENGINE)]
NAMES = ["mobilenet", "shufflenet", "per-layer"]
pytestmark = pytest.mark.usefixtures("short_shufflenet")


def trained_like(arch: str, options: dict[str, object]) -> M.Module:
    """A network whose batch norms have the statistics of the images, as in a trained one."""
    network = network_of(arch, **options)
    with_true_statistics(network)
    network.eval()
    return network


@dataclass(frozen=True)
class Harm:
    """A step that makes everything worse: ranges a hundredth of what they should be."""

    name: str = "harm"

    def apply(self, draft: Draft) -> Draft:
        done = RangesFromImages().apply(draft)
        narrow = {name: Range(low / 100, high / 100) for name, (low, high) in done.activations.items()}
        return draft.with_ranges(draft.prepare(), narrow, "harm")


class TestHeldBack:
    def test_a_fifth_is_held_back_and_never_fitted_to(self) -> None:
        images = np.arange(100, dtype=np.uint8).reshape(100, 1, 1, 1)
        fit, held = split(images)
        assert len(held) == 20 and len(fit) == 80
        assert not set(held.ravel().tolist()) & set(fit.ravel().tolist())

    @pytest.mark.parametrize("number", [1, 2, FEWEST - 1])
    def test_of_too_few_none_are_held_back(self, number: int) -> None:
        fit, held = split(IMAGES[:number])
        assert len(fit) == len(held) == number

    def test_of_some_at_least_eight_are_held_back(self) -> None:
        fit, held = split(IMAGES[:FEWEST])
        assert (len(fit), len(held)) == (FEWEST - 8, 8)


class TestSearch:
    @pytest.mark.parametrize(("arch", "options", "quality", "target"), CASES, ids=NAMES)
    def test_no_candidate_is_better_than_what_is_kept(
        self, arch: str, options: dict[str, object], quality: str, target: Target
    ) -> None:
        network = trained_like(arch, options)
        found, _ = find_best_network(network, ENOUGH, arch, "", get_preset(quality), target)
        fit, held = split(ENOUGH)
        finished = [trial for trial in found.trials if len(trial.steps) == len(found.best.steps)]
        assert found.best.snr >= max(trial.snr for trial in finished) - 0.1
        many = smooth_images(64, seed=77)
        simplest = RangesFromImages().apply(Draft(network, fit, target)).watched
        kept, plain = (snr_of(logits_of(each, many), logits_of(network, many)) for each in (found.network, simplest))
        assert kept > plain - 0.2
        assert found.held_back and found.judged_on == len(held)
        # What was measured is what is handed out.
        exact = logits_of(fold_batch_norms(network), held)
        assert snr_of(logits_of(found.network, held), exact) == pytest.approx(found.best.snr, abs=1e-6)

    @pytest.mark.slow
    def test_presets_are_no_worse_than_cheaper_ones_and_than_no_images(self) -> None:
        """On images held back, enough of them to tell candidates apart, and on images that had no part in it."""
        network = trained_like(SHUFFLE, {})
        fit, held = split(ENOUGH)
        plain = RangesFromImages().apply(Draft(network, fit, ONNX)).watched
        free = simulate(network, NO_IMAGES, data_free_steps(ONNX), ONNX)
        fast, balanced = (
            find_best_network(network, ENOUGH, "", "", get_preset(quality), ONNX)[0].network
            for quality in ("fast", "balanced")
        )
        for images, most in ((held, 1.0), (smooth_images(128, seed=77), 0.2)):
            exact = logits_of(network, images)
            found = [snr_of(logits_of(each, images), exact) for each in (plain, free, fast, balanced)]
            assert found[3] >= found[2] - 0.2
            assert found[2] >= max(found[:2]) - most

    def test_a_step_that_harms_is_left_out_and_named(self) -> None:
        network = trained_like(SHUFFLE, {})
        preset = replace(PRESETS["fast"], grids=((Harm(),), (RangesFromImages(),)))
        found = find_best(network, IMAGES, preset, lambda fit: Draft(network, fit, ONNX))
        assert "harm" not in found.best.steps
        assert "left out, as it did not help: harm" in found.summary()
        assert "\n" not in found.summary()

    def test_a_step_that_was_kept_on_few_images_is_not_left_out_too(self) -> None:
        few, all_of_them, other = ("biases on 16 images",), ("biases",), ("harm",)
        trials = (Trial(few, 20.0), Trial(all_of_them, 20.0), Trial(other, 10.0))
        draft = Draft(trained_like(SHUFFLE, {}), IMAGES, ONNX)
        said = SearchResult(draft, trials[0], trials, judged_on=8, held_back=True).summary()
        assert said.endswith("left out, as it did not help: harm")

    def test_a_finish_that_harms_is_left_out(self) -> None:
        network = trained_like(SHUFFLE, {})
        good: Step = PRESETS["fast"].finishes[0]
        found = find_best(
            network,
            IMAGES,
            replace(PRESETS["fast"], grids=((RangesFromImages(),),), finishes=(Harm(), good)),
            lambda fit: Draft(network, fit, ONNX),
        )
        assert "harm" not in found.best.steps and found.best.steps[0] == "ranges by min-max"

    def test_the_quick_finish_is_kept_where_the_others_harm(self) -> None:
        preset = replace(PRESETS["fast"], grids=((RangesFromImages(),),), finishes=(Harm(),), touches=())
        network = trained_like(SHUFFLE, {})
        found = find_best(network, IMAGES, preset, lambda fit: Draft(network, fit, ONNX))
        assert preset.preview is not None
        assert found.best.steps == ("ranges by min-max", preset.preview.name)

    def test_a_network_without_ceilings_is_not_equalized_up_to_them(self) -> None:
        preset = replace(PRESETS["balanced"], grids=((RangesFromImages(),), UP_TO_CEILINGS), finishes=(), touches=())
        network = trained_like(SHUFFLE, {})
        found = find_best(network, IMAGES, preset, lambda fit: Draft(network, fit, ONNX))
        assert [trial.steps[0] for trial in found.trials] == ["ranges by min-max"]

    def test_the_float_network_stays_as_it_is(self) -> None:
        network = trained_like(SHUFFLE, {})
        before = logits_of(network, UNSEEN)
        find_best_network(network, IMAGES[:16], "", "", get_preset("balanced"), ONNX)
        assert np.array_equal(logits_of(network, UNSEEN), before)


ODD: dict[str, Images] = {
    "one": IMAGES[:1],
    "two": IMAGES[:2],
    "black": np.zeros((20, *IMAGES.shape[1:]), np.uint8),
    "alike": np.repeat(IMAGES[:1], 20, axis=0),
}


class TestOddInput:
    @pytest.mark.parametrize("kind", ["one", slow("two"), "black", slow("alike")])
    def test_odd_images_give_a_sound_network(self, kind: str) -> None:
        network = trained_like(SHUFFLE, {})
        found, ranges = find_best_network(network, ODD[kind], "", "", get_preset("fast"), ONNX)
        assert found.best.snr > 15, found.summary()
        assert np.isfinite(logits_of(found.network, UNSEEN)).all()
        assert all(np.isfinite(limit) for limits in ranges.ranges.values() for limit in limits)

    def test_a_network_whose_logits_are_constant_is_calibrated(self) -> None:
        network = trained_like(SHUFFLE, {})
        head = network.classifier[0] if hasattr(network.classifier, "__getitem__") else network.classifier
        head.weight[...] = Tensor(np.zeros_like(head.weight.numpy()))
        found, _ = find_best_network(network, IMAGES[:16], "", "", get_preset("fast"), ONNX)
        np.testing.assert_allclose(logits_of(found.network, UNSEEN), logits_of(network, UNSEEN), atol=1e-6)

    def test_a_layer_that_gives_nothing_but_0_has_a_range(self) -> None:
        network = trained_like(SHUFFLE, {})
        layer = network.features[1].branch_main_1[0]
        for parameter in (layer.bn.weight, layer.bn.bias):
            parameter[...] = Tensor(np.zeros_like(parameter.numpy()))
        draft = RangesFromLogits().apply(Draft(network, IMAGES[:8], ONNX))
        assert draft.watched is not None
        assert "features.1.branch_main_1.0" not in draft.reactions
        assert draft.activations["features.1.branch_main_1.0"] == pytest.approx((0.0, 255e-5))
        assert np.isfinite(logits_of(draft.watched, UNSEEN)).all()

    def test_dead_channels_and_variances_near_zero_are_sound(self) -> None:
        network = trained_like(SHUFFLE, {})
        bn = next(module for module in network.modules() if isinstance(module, M.BatchNorm2d))
        for parameter, value in ((bn.weight, 0.0), (bn.running_var, 1e-12)):
            changed = parameter.numpy().copy()
            changed[:, :2] = value
            parameter[...] = Tensor(changed)
        found, _ = find_best_network(network, IMAGES[:16], "", "", get_preset("balanced"), ONNX)
        assert found.best.snr > 10

    def test_a_network_whose_answers_are_not_finite_is_refused_by_the_layer(self) -> None:
        network = trained_like(SHUFFLE, {})
        weight = network.features[1].branch_main_1[0].bn.weight
        weight[...] = Tensor(np.full_like(weight.numpy(), 3e38))
        with pytest.raises(FailureError, match=r"layer features\.1\.branch_main_1\.0.* not finite"):
            find_best_network(network, IMAGES[:4], "", "", get_preset("balanced"), ONNX)

    def test_a_layer_whose_numbers_are_finite_and_huge_is_refused_by_name(self) -> None:
        network = trained_like(SHUFFLE, {})
        bn = network.features[1].branch_main_1[0].bn
        bn.weight[...] = Tensor(np.full_like(bn.weight.numpy(), 1e20))
        head = network.classifier[0].weight
        head[...] = Tensor(head.numpy() * np.float32(1e-20))
        with pytest.raises(FailureError, match=r"layer features\.1\.branch_main_1\.0.* gives numbers up to .*e\+"):
            find_best_network(network, IMAGES[:4], "", "", get_preset("balanced"), ONNX)

    def test_it_is_said_that_logits_do_not_depend_on_the_image(self) -> None:
        network, preset = trained_like(SHUFFLE, {}), get_preset("fast")
        found = find_best(network, IMAGES[:8], preset, lambda fit: Draft(network, fit, ONNX))
        assert found.remarks() == [found.summary()]
        head = network.classifier[0].weight
        head[...] = Tensor(np.zeros_like(head.numpy()))
        found = find_best(network, IMAGES[:8], preset, lambda fit: Draft(network, fit, ONNX))
        assert "do not depend on the picture" in found.remarks()[1]
        alike = np.repeat(IMAGES[:1], 8, axis=0)
        found = find_best(network, alike, preset, lambda fit: Draft(network, fit, ONNX))
        assert found.remarks() == [found.summary()]

    @pytest.mark.parametrize("far", [0, 3], ids=["all alike", "three far"])
    def test_images_with_logits_of_another_magnitude_are_neither_fitted_to_nor_judged(
        self, far: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        network, preset = trained_like(SHUFFLE, {}), get_preset("fast")
        seen: list[Images] = []

        def draft_of(fit: Images) -> Draft:
            seen.append(fit)
            return Draft(network, fit, ONNX)

        exact = logits_of(network, IMAGES)
        exact[1 : 1 + far] *= 1000
        logits = np.concatenate(split(exact))
        monkeypatch.setattr(pipeline, "find_usual", lambda found: find_usual(logits))
        found = find_best(network, IMAGES, preset, draft_of)
        usual = np.delete(IMAGES, range(1, 1 + far), axis=0)
        np.testing.assert_array_equal(seen[-1], split(usual)[0])
        assert (found.strays, found.judged_on, found.held_back) == (far, 8, True)
        assert any(f"{far} images left out" in line for line in found.remarks()) == bool(far)

    def test_many_images_with_larger_logits_are_a_kind_of_their_own(self) -> None:
        logits = np.ones((10, 4))
        logits[:2] *= 100
        assert find_usual(logits).tolist() == [False] * 2 + [True] * 8
        logits[:3] *= 100
        assert find_usual(logits).all()
        assert find_usual(np.zeros((4, 2))).all()

    def test_where_no_grid_can_be_made_the_first_reason_is_told(self) -> None:
        network = trained_like(SHUFFLE, {})
        preset = replace(PRESETS["fast"], grids=((Refused("first"),), (Refused("second"),)))
        with pytest.raises(FailureError, match="first"):
            find_best(network, IMAGES[:2], preset, lambda fit: Draft(network, fit, ONNX))


@dataclass(frozen=True)
class Refused:
    """A step that no network can have."""

    name: str

    def apply(self, _: Draft) -> Draft:
        raise FailureError(self.name)


def tame(images: Images, contrast: float) -> Images:
    """``images`` with that part of their contrast."""
    return np.clip(128 + (images.astype(np.float64) - 128) * contrast, 0, 255).astype(np.uint8)


def judged(noise: npt.NDArray[np.float64], *steps: Step, expected: float = 1000.0) -> Candidate:
    """A candidate of which the images held back have this noise, beside logits of the energy ``expected``."""
    draft = Draft(M.Identity(), IMAGES, ONNX)
    return Candidate(draft, Trial((), float(10 * np.log10(expected / noise.mean()))), draft, noise, grid=steps)


class TestVerdict:
    """What is kept where images held back tell candidates apart, and where they cannot."""

    CLOSE, ROOMY = RangesFromLogits(), RangesFromLogits(headroom=True)

    def draw(self, number: int, random: np.random.Generator) -> tuple[Candidate, Candidate]:
        """Noise of five logits. Close ranges have 20 % less, but clip one image of 50, and nobody knows which."""
        chance = random.lognormal(0, 1, (2, number))
        clipped = np.where(random.random(number) < 1 / 50, 50.0, 0.0)
        return judged(0.8 * chance[0] + clipped, self.CLOSE), judged(chance[1], self.ROOMY)

    def test_of_few_logits_headroom_is_kept_unless_it_is_clearly_worse(self) -> None:
        random = np.random.default_rng(0)
        draws = [self.draw(20, random) for _ in range(200)]
        roomy = np.mean([choose_best(draw) is draw[1] for draw in draws])
        by_images_alone = np.mean([draw[1].trial.snr > draw[0].trial.snr for draw in draws])
        assert by_images_alone < 0.6
        assert roomy > 0.7

    def test_a_sure_verdict_of_the_images_stands(self) -> None:
        even = np.random.default_rng(0).normal(1, 0.1, (2, 20))  # of a thousand logits each image has the same noise
        close, roomy = judged(0.9 * even[0], self.CLOSE), judged(even[1], self.ROOMY)
        assert choose_best([close, roomy]) is close and choose_best([roomy, close]) is close

    def test_what_is_much_worse_is_left_out_however_unsure(self) -> None:
        chance = np.random.default_rng(0).lognormal(0, 2, (2, 8))
        close, roomy = judged(chance[0], self.CLOSE), judged(30 * chance[1], self.ROOMY)
        assert choose_best([close, roomy]) is close

    def test_noise_that_is_none_or_infinite_leaves_no_doubt(self) -> None:
        for noise in (np.zeros(4), np.full(4, np.inf), np.ones(1)):
            assert doubt_between(noise, np.ones_like(noise)) == 0

    def test_of_tame_images_headroom_is_kept_and_others_are_clipped_less(self) -> None:
        network = trained_like(SHUFFLE, {})
        seen, unseen = tame(IMAGES, 0.6), tame(UNSEEN[:12], 0.8)
        preset = replace(
            PRESETS["balanced"],
            grids=(BY_LOGITS, WITH_HEADROOM),
            finishes=(),
            rewrites=(),
            touches=(),
        )
        found = find_best(network, seen, preset, lambda fit: Draft(network, fit, ONNX))
        assert "ranges by the logits with headroom" in found.best.steps
        assert found.trials[0].snr > found.trials[1].snr  # which is why it takes more than the images held back
        assert "thought to be chance" in found.summary()
        fit, _ = split(seen)
        close = apply_steps((*BY_LOGITS, CorrectBias(images=16)), {(): Draft(network, fit, ONNX)})
        assert close.watched is not None
        exact = logits_of(network, unseen)
        assert snr_of(logits_of(found.network, unseen), exact) > snr_of(logits_of(close.watched, unseen), exact) + 1


def test_progress_counts_no_candidate_that_the_network_cannot_have() -> None:
    network, seen = trained_like(SHUFFLE, {}), list[Progress]()
    preset = replace(PRESETS["fast"], grids=((Refused("first"),), (RangesFromImages(),)), touches=())
    find_best(network, IMAGES[:2], preset, lambda fit: Draft(network, fit, ONNX), seen.append)
    assert [(each.done, each.total) for each in seen] == [(1, 2), (2, 2)]


class TestSignalToNoise:
    def test_equal_logits_have_no_noise(self) -> None:
        logits = np.ones((2, 3), np.float64)
        assert snr_of(logits, logits) == NO_NOISE

    def test_it_is_the_ratio_of_energies(self) -> None:
        exact: npt.NDArray[np.float64] = np.full((4, 5), 10.0)
        assert snr_of(exact + 1, exact) == pytest.approx(20)

    def test_logits_that_are_not_finite_are_the_worst(self) -> None:
        exact = np.ones((1, 2))
        assert snr_of(exact * np.nan, exact) == -NO_NOISE


def on_grid(limit: float, _: M.Module, __: object, output: Tensor) -> Tensor:
    """What an int8 grid up to ``limit`` makes of the output of a layer."""
    step = limit / 127.5
    return Tensor((np.clip(np.rint(output.numpy() / step), -128, 127) * step).astype(np.float32))


def best_limit(reaction: Reaction, half: float, headroom: bool = False) -> float:
    """The limit of least noise, where nothing is spared for other images."""
    return reaction.largest_limit(reaction.noises_at_limits(half, headroom), spare=0.0)


class TestReactions:
    def test_the_noise_of_a_grid_is_foretold(self) -> None:
        """The estimate, made of gradients alone, beside the change of the logits that the grid really makes."""
        network = trained_like(SHUFFLE, {})
        draft = Draft(network, IMAGES, ONNX)
        exact = logits_of(network, IMAGES)
        name = "features.1.branch_main_2.0"
        reaction = draft.reactions[name]
        modules = dict(network.named_modules())
        for limit in (reaction.largest, 0.6 * reaction.largest):
            hook = modules[name].register_forward_hook(functools.partial(on_grid, limit))
            try:
                real = float(np.square(logits_of(network, IMAGES) - exact).sum())
            finally:
                hook.remove()
            assert 0.25 < reaction.noises(np.array([limit]), 127.5).item() / real < 4

    @pytest.mark.parametrize("shift", [0.0, 2.0])
    def test_the_noise_of_clipping_is_what_each_bin_loses(self, shift: float) -> None:
        """The larger of two estimates, written out: independent errors, and those that add up in an image."""
        rng = np.random.default_rng(0)
        values = (rng.normal(0, 1, (3, 4, 6, 6)) + shift).astype(np.float32)
        gradients = rng.normal(0.2, 1, values.shape).astype(np.float32)
        reaction = Reaction.from_bounds(values.min(axis=(0, 2, 3)), values.max(axis=(0, 2, 3)))
        reaction.add(values, gradients)
        for limit in (0.4, 1.0, 2.5):
            fine, coarse = reaction.centres(BINS), reaction.centres(FEW_BINS)
            alone = float((reaction.squares * np.square(np.maximum(np.abs(fine) - limit, 0))).sum())
            lost = coarse - np.clip(coarse, -limit, limit)
            together = float(sum(np.square((pull * lost).sum()) for pull in reaction.pulls))
            kept = float(reaction.squares[np.abs(fine) <= limit].sum())
            wanted = max(alone, together) + kept * (limit / 127.5) ** 2 / 12
            np.testing.assert_allclose(reaction.noises(np.array([limit]), 127.5), wanted, rtol=1e-5)

    def test_values_that_matter_to_no_logit_may_be_clipped(self) -> None:
        rng = np.random.default_rng(0)
        values = rng.normal(0, 1, (8, 4, 6, 6)).astype(np.float32)
        gradients = rng.normal(0, 1, values.shape).astype(np.float32)
        values[:, 0, 0, 0], gradients[:, 0, 0, 0] = 50.0, 0.0
        reaction = Reaction.from_bounds(values.min(axis=(0, 2, 3)), values.max(axis=(0, 2, 3)))
        reaction.add(values, gradients)
        assert best_limit(reaction, 127.5) < 10

    def test_headroom_lets_ranges_reach_beyond_what_was_seen(self) -> None:
        """Where rounding costs little, nothing that was seen is clipped, and images that are stronger are not, too."""
        rng = np.random.default_rng(0)
        values, gradients = rng.uniform(0, 1, (2, 8, 4, 6, 6)).astype(np.float32)
        reaction = Reaction.from_bounds(values.min(axis=(0, 2, 3)), values.max(axis=(0, 2, 3)))
        reaction.add(values, gradients)
        assert best_limit(reaction, 127.5) <= reaction.largest
        enough = LIMITS[LIMITS >= HEADROOM].min()
        assert reaction.largest < best_limit(reaction, 127.5, headroom=True) <= enough * reaction.largest

    def test_ranges_are_wider_where_that_costs_next_to_nothing(self) -> None:
        """Other images have larger values. What rounding adds for them stays below what may be spared."""
        rng = np.random.default_rng(0)
        values, gradients = rng.uniform(0, 1, (2, 8, 4, 6, 6)).astype(np.float32)
        reaction = Reaction.from_bounds(values.min(axis=(0, 2, 3)), values.max(axis=(0, 2, 3)))
        reaction.add(values, gradients)
        noises = reaction.noises_at_limits(127.5)
        best = best_limit(reaction, 127.5)
        assert reaction.largest_limit(noises, spare=1e-9 * noises.min()) == best
        wider = reaction.largest_limit(noises, spare=noises.min())
        assert best < wider
        assert reaction.noises(np.array([wider]), 127.5).item() <= 2 * noises.min()

    def test_behind_a_relu6_no_headroom_reaches_beyond_6(self) -> None:
        network = trained_like("mobilenet_v2", {"activation": "relu6"})
        draft = RangesFromLogits(headroom=True).apply(Draft(network, IMAGES, ONNX))
        assert draft.watched is not None
        layers = find_quantized_layers(draft.watched)
        ends = [high for name, (_, high) in draft.activations.items() if activation_of(layers[name]) is RELU6]
        assert ends and max(ends) <= 6

    def test_reactions_of_channels_made_larger_are_those_measured_again(self) -> None:
        """Equalized channels need no second look at the images."""
        draft = Draft(trained_like(SHUFFLE, {}), IMAGES[:16], ONNX)
        foretold = Equalize().apply(draft)
        again = foretold.forget()
        assert foretold.reactions.keys() == again.reactions.keys()
        for name, reaction in again.reactions.items():
            limit = best_limit(foretold.reactions[name], 127.5)
            assert limit == pytest.approx(best_limit(reaction, 127.5), rel=0.1), name

    def test_layers_that_give_nothing_are_left_out(self) -> None:
        network = trained_like("mobilenet_v2", {})
        bn = network.features[0].bn
        for parameter in (bn.weight, bn.bias):
            parameter[...] = Tensor(np.zeros_like(parameter.numpy()))
        found = measure_reactions(network, ["features.0", "features.1.conv.0"], split_float(IMAGES[:8]))
        assert "features.0" not in found


class TestCorrectShifts:
    def test_a_channel_that_is_always_the_same_loses_nothing_on_average(self) -> None:
        """0.3 of a step is rounded to nothing at every position; its readers make up for it."""
        network = trained_like("mobilenet_v2", {})
        bn = network.features[0].bn
        bn.weight[...], bn.bias[...] = (
            Tensor(np.zeros_like(bn.weight.numpy())),
            Tensor(np.full_like(bn.bias.numpy(), 0.3)),
        )
        draft = RangesFromImages().apply(Draft(network, IMAGES, ONNX))
        assert draft.watched is not None
        set_range(find_quantized_layers(draft.watched)["features.0"].act_observer, 0, 255)
        corrected = CorrectShifts().apply(draft)
        assert corrected.watched is not None
        reader = find_quantized_layers(draft.watched)["features.1.conv.0"]
        size = IMAGES.shape[-1] // 2
        missing = Tensor(np.full((1, len(bn.bias.numpy().ravel()), size, size), 0.3, np.float32))
        taken = F.conv2d(missing, quantize_weight(reader), None, 1, 1, groups=reader.conv.groups).mean(axis=(0, 2, 3))
        np.testing.assert_allclose(corrected.corrections["features.1.conv.0"], taken.numpy().ravel(), rtol=1e-4)
        exact = logits_of(network, UNSEEN)
        assert snr_of(logits_of(corrected.watched, UNSEEN), exact) > snr_of(logits_of(draft.watched, UNSEEN), exact) + 3

    def test_corrections_of_both_kinds_add_up(self) -> None:
        network = trained_like(SHUFFLE, {})
        first = apply_steps((RangesFromImages(), CorrectBias()), {(): Draft(network, IMAGES, ONNX)})
        both = CorrectShifts().apply(first)
        assert both.watched is not None and both.corrections.keys() >= first.corrections.keys()
        layers, plain = find_quantized_layers(both.watched), find_quantized_layers(first.prepare())
        for name, correction in both.corrections.items():
            now, before = bias_parameter(layers[name]), bias_parameter(plain[name])
            assert now is not None and before is not None
            np.testing.assert_allclose((now - before).numpy().ravel(), correction, rtol=1e-3, atol=1e-5)


def test_ranges_by_logits_do_not_need_a_network_of_the_zoo() -> None:
    class Net(M.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.quant, self.dequant = M.QuantStub(), M.DequantStub()
            self.first = M.ConvBnRelu2d(3, 8, 3, 2, 1)
            self.head = M.Linear(8, 4)
            self.head.disable_quantize()

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.dequant(self.first(self.quant(x))).mean(axis=(2, 3)))

    network = Net()
    network.eval()
    done = RoundWeights().apply(RangesFromLogits().apply(Draft(network, IMAGES[:8], MEGENGINE)))
    assert done.watched is not None
    exact: npt.NDArray[np.float64] = logits_of(network, IMAGES[:8])
    assert snr_of(logits_of(done.watched, IMAGES[:8]), exact) > 15
    assert as_input(IMAGES[:1]).dtype == np.float32


class Drawn:
    """A data set in memory."""

    name = "drawn"
    classes = ("a", "b")
    labels = None

    def __len__(self) -> int:
        return 20

    def image(self, index: int) -> Images:
        return np.ascontiguousarray(smooth_images(1, 80, 96, index)[0].transpose(1, 2, 0))


def test_analysis_tells_what_calibration_tried_of_just_these_weights(tmp_path: Path) -> None:
    made = calibrate(classifier_of(SHUFFLE), Drawn(), 20, config=CalibrationConfig("fast", target=ONNX))
    made.write(tmp_path)
    assert made.found is not None
    found = calibration_of(made.classifier, [], tmp_path)
    assert found["steps"] == list(made.found.best.steps)
    first, *rest = calibration_lines(found)
    assert "8 pictures held back" in first and len(rest) == len(found["tried"])
    assert sum(line.endswith("(kept)") for line in rest) == 1
    decibels = [float(line.split()[0]) for line in rest]
    assert decibels == sorted(decibels, reverse=True)
    assert calibration_of(classifier_of(SHUFFLE), [], tmp_path) == {}

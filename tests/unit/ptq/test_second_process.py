"""A calibration that uses a second process: the same bits, the same verdicts, and none where it does not pay."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import astuple, dataclass, replace
from typing import Any

import megengine.module as M
import numpy as np
import pytest

from mgq.errors import FailureError
from mgq.events import Progress
from mgq.graph.network_reader import graph_of
from mgq.ptq import logit_gradients, second_process, tensor_samples
from mgq.ptq.calibrate import find_best_network
from mgq.ptq.channel_mixing import apply_mixing, find_linear_tensors
from mgq.ptq.channel_statistics import survey_network
from mgq.ptq.logit_gradients import count_numbers, measure_mixtures, measure_part, measure_reactions, value_ranges
from mgq.ptq.pipeline import SearchResult, find_best
from mgq.ptq.presets import PRESETS, get_preset
from mgq.ptq.second_process import find_idle_process, is_known_elsewhere, open_second_process, simulate_fast
from mgq.ptq.steps import Draft, ExpectedRanges, RangesFromImages, Step, split_float
from mgq.ptq.tensor_samples import Part, keep_samples
from mgq.quantization.activation_ranges import ActivationRanges
from mgq.quantization.batch_norm_folding import fold_batch_norms
from mgq.quantization.qat_layers import names_that_run
from mgq.quantization.targets import MEGENGINE, ONNX, Target
from mgq.system.megengine_start import prepare_long_process
from mgq.system.side_process import Call, SideProcess
from mgq.zoo.weight_loading import fingerprint
from tests.conftest import logits_of, smooth_images
from tests.fakes.uneven_networks import network_of, with_true_statistics

IMAGES = smooth_images(45, seed=3)  # nine are held back: two batches, of which each process can take one
pytestmark = pytest.mark.usefixtures("short_shufflenet")


class OwnLayer(M.Identity):  # type: ignore[misc]
    """A layer that no other process knows."""


@pytest.fixture
def network() -> M.Module:
    made = network_of("shufflenet_v1_x0_5_g3")
    with_true_statistics(made)
    made.eval()
    return made


@pytest.fixture
def worthwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the work, a second process is worth it here."""
    monkeypatch.setattr(second_process, "WORTH_S", 0.0)
    monkeypatch.setattr(second_process, "MEMORY", 0)
    monkeypatch.setattr(second_process, "usable_cores", lambda: 2)


def calibrate(
    network: M.Module, target: Target, on_progress: Callable[[Progress], None] | None = None
) -> tuple[SearchResult, ActivationRanges]:
    options: dict[str, Any] = {"on_progress": on_progress} if on_progress else {}
    return find_best_network(network, IMAGES, "", "", get_preset("balanced"), target, **options)


@pytest.mark.usefixtures("worthwhile")
@pytest.mark.parametrize("target", [ONNX, pytest.param(MEGENGINE, marks=pytest.mark.slow)], ids=["onnx", "megengine"])
def test_two_processes_give_the_bits_of_one(network: M.Module, target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[str] = []
    failed: list[str] = []
    begin, result = SideProcess.begin, Call.result

    def note(side: SideProcess, function: Any, *arguments: Any) -> Call[Any]:
        begun.append(function.__name__)
        return begin(side, function, *arguments)

    def note_failures(call: Call[Any]) -> Any:
        if call.future is not None and (call.future.exception() or call.future.result() is None):
            failed.append(call.function.__name__)
        return result(call)

    monkeypatch.setattr(SideProcess, "begin", note)
    monkeypatch.setattr(Call, "result", note_failures)
    counts: list[tuple[int, Any]] = []
    two, ranges_of_two = calibrate(network, target, lambda at: counts.append((at.done, at.total)))
    assert {"try_grids", "try_finishes", "sum_rounding_errors", "logits_of_batches"} <= set(begun) and not failed
    monkeypatch.setattr(second_process, "WORTH_S", np.inf)
    one, ranges_of_one = calibrate(network, target)
    assert ranges_of_two == ranges_of_one
    assert fingerprint(two.network.state_dict()) == fingerprint(one.network.state_dict())
    assert (two.trials, two.best, two.summary()) == (one.trials, one.best, one.summary())
    assert counts == sorted(counts) and counts[-1] == (len(two.trials), len(two.trials))


@dataclass(frozen=True)
class Spoil:
    """A step behind which no ranges can be found."""

    name: str = "spoil"

    def apply(self, draft: Draft) -> Draft:
        return replace(draft, method=self.name)


@dataclass(frozen=True)
class RangesUnlessSpoiled(RangesFromImages):
    def apply(self, draft: Draft) -> Draft:
        if draft.method == Spoil().name:
            raise FailureError("no ranges")
        return super().apply(draft)


@pytest.mark.usefixtures("worthwhile")
@pytest.mark.parametrize("ranges", [RangesUnlessSpoiled(), ExpectedRanges()], ids=["fail", "need no images"])
def test_a_rewrite_that_does_not_apply_is_counted_once(network: M.Module, ranges: Step) -> None:
    preset = replace(PRESETS["fast"], grids=((ranges,),), rewrites=(Spoil(),))
    counts: list[tuple[int, Any]] = []
    found = find_best(
        network,
        IMAGES[:20],
        preset,
        lambda fit: Draft(network, fit, ONNX),
        lambda at: counts.append((at.done, at.total)),
    )
    assert counts[-1] == (len(found.trials), len(found.trials)) == (3, 3)


@pytest.mark.usefixtures("worthwhile")
def test_there_is_one_where_it_pays_alone(network: M.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    def is_opened() -> bool:
        with open_second_process(network, IMAGES, 1.0) as side:
            return side is not None

    assert is_opened()
    for name, value in (("WORTH_S", 2.0), ("MEMORY", 1 << 40), ("usable_cores", lambda: 1)):
        with monkeypatch.context() as patch:
            patch.setattr(second_process, name, value)
            assert not is_opened(), name


def test_reactions_measured_by_two_processes_have_the_bits_of_one() -> None:
    network = network_of("mobilenet_v2")
    names, batches = ["features.1.conv.1", "features.3.add"], split_float(smooth_images(20, seed=5))
    side = SideProcess("the test's second process")
    try:
        shared = measure_reactions(network, names, batches, in_pairs=names[1:], side=side)
        assert find_idle_process() is None and side.is_idle
    finally:
        side.close()
    alone = measure_reactions(network, names, batches, in_pairs=names[1:])
    ranges = {name: (found.lowest, found.highest) for name, found in alone.items()}
    at_once = measure_part(network, ranges, batches, 0, 0, (), Part("", 0))
    for name in names:
        for one, two in zip(astuple(shared[name]), astuple(alone[name]), strict=True):
            np.testing.assert_array_equal(one, two)
        assert len(alone[name].pulls) == 20
        np.testing.assert_array_equal(alone[name].pulls, at_once[name].pulls)
        np.testing.assert_allclose(alone[name].squares, at_once[name].squares)


@pytest.mark.parametrize("two_processes", [False, True])
def test_mixtures_of_channels_are_known_from_what_was_kept(two_processes: bool) -> None:
    """Of channels that were scaled before, too: as in a network whose channels are scaled and mixed."""
    network = network_of("mobilenet_v2")
    linear = next(each for each in find_linear_tensors(graph_of(network, 64)) if "features.3.add" in each.tensors)
    names, batches = linear.tensors, split_float(smooth_images(20, seed=5))
    side = SideProcess("the test's second process", prepare_long_process) if two_processes else None
    try:
        with keep_samples():
            if side is not None:
                side.begin(simulate_fast).result()
            before = measure_reactions(network, names, batches, in_pairs=names, side=side)
            rng = np.random.default_rng(0)
            shape = linear.channels, linear.channels
            factors, mixing = rng.uniform(0.5, 2.0, linear.channels), rng.normal(0, 1, shape)
            scaled = {name: each.scale(factors) for name, each in before.items()}
            whole = {name: mixing * each.factors for name, each in scaled.items()}
            found = measure_mixtures(whole, before[names[0]].run, side)
            assert measure_mixtures(whole, "another", side) is None
    finally:
        if side is not None:
            side.close()
    assert found is not None
    assert measure_mixtures(whole, before[names[0]].run) is None, "kept for as long as somebody wants them"
    apply_mixing(dict(network.named_modules()), linear, whole[names[0]])
    again = measure_reactions(network, names, batches)
    for name in names:
        np.testing.assert_allclose(found[name].lowest, again[name].lowest, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(found[name].squares.sum(axis=1), again[name].squares.sum(axis=1), rtol=1e-2)
        np.testing.assert_allclose(
            np.sum(found[name].pulls, axis=2), np.sum(again[name].pulls, axis=2), rtol=1e-2, atol=1e-3
        )


def test_samples_that_are_too_many_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    network = network_of("mobilenet_v2")
    names, batches = ["features.3.conv.2"], split_float(smooth_images(16, seed=5))
    with keep_samples():
        for most, is_kept in ((1 << 27, True), (1000, False)):
            monkeypatch.setattr(tensor_samples, "MOST_KEPT", most)
            before = measure_reactions(network, names, batches, in_pairs=names)[names[0]]
            mixing = np.eye(len(before.lowest))
            assert (measure_mixtures({names[0]: mixing}, before.run) is not None) is is_kept


def test_reactions_of_large_layers_are_measured_for_few_images_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    network = network_of("mobilenet_v2")
    names, batches = ["features.1.conv.1", "features.3.add"], split_float(smooth_images(9, seed=5))
    at_once = measure_reactions(network, names, batches)
    sizes: list[int] = []
    network.register_forward_pre_hook(lambda _, inputs: sizes.append(inputs[0]._tuple_shape[0]))
    monkeypatch.setattr(logit_gradients, "MOST_NUMBERS", 3 * count_numbers(network, batches[0][:1]))
    sizes.clear()
    few = measure_reactions(network, names, batches)
    assert sizes == [8, 1, 1, 3, 3, 2, 1, 1], (
        "ranges of all; of each half the numbers of one, and gradients of at most three"
    )
    for name in names:
        np.testing.assert_allclose(few[name].squares.sum(axis=1), at_once[name].squares.sum(axis=1), rtol=1e-3)
        np.testing.assert_allclose(few[name].pulls, at_once[name].pulls, rtol=1e-3, atol=1e-4)


def test_known_ranges_are_not_measured_again() -> None:
    network = network_of("mobilenet_v2")
    names, batches = ["features.1.conv.1", "features.3.add"], split_float(smooth_images(16, seed=5))
    measured = measure_reactions(network, names, batches)
    known = {name: (each.lowest, each.highest) for name, each in measured.items()}
    passes: list[int] = []
    network.register_forward_pre_hook(lambda _, inputs: passes.append(inputs[0]._tuple_shape[0]))
    found = measure_reactions(network, names, batches, known=known)
    assert passes == [1, 8, 1, 8], "of each half the numbers of one, and gradients"
    for name in names:
        np.testing.assert_array_equal(found[name].squares, measured[name].squares)


def test_a_draft_that_saw_its_images_knows_ranges_and_answers_of_both_processes() -> None:
    network = fold_batch_norms(network_of("mobilenet_v2"))
    draft = Draft(network_of("mobilenet_v2"), smooth_images(20, seed=5), ONNX).see_images()
    assert draft.exact is not None
    np.testing.assert_allclose(draft.logits, logits_of(network, draft.images), rtol=1e-4, atol=1e-4)
    names = names_that_run(draft.prepare())
    for name, ends in value_ranges(network, names, split_float(draft.images)).items():
        np.testing.assert_allclose(draft.find_channel_ranges()[name], ends, rtol=1e-5, atol=1e-6, err_msg=name)
    side = SideProcess("the test's second process")
    graph, batches = graph_of(draft.network, 64), split_float(draft.images)
    try:
        shared = survey_network(network, graph, batches, side)
    finally:
        side.close()
    alone = survey_network(network, graph, batches)
    np.testing.assert_array_equal(shared.logits, alone.logits)
    for name, moments in alone.statistics.items():
        for one, two in zip(astuple(moments), astuple(shared.statistics[name]), strict=True):
            np.testing.assert_array_equal(one, two)


def test_a_network_with_code_of_ones_own_is_not_known_elsewhere(network: M.Module) -> None:
    assert is_known_elsewhere(network)
    network.own = OwnLayer()
    assert not is_known_elsewhere(network)

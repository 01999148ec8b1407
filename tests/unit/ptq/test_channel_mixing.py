"""Mixed channels: float answers as before, all channels are alike, and a grid makes less noise."""

from __future__ import annotations

from collections.abc import Iterator
from operator import attrgetter
from pathlib import Path

import megengine.module as M
import numpy as np
import pytest

from mgq.errors import FailureError
from mgq.export.onnx.writer import write_onnx
from mgq.graph.network_reader import graph_of
from mgq.ptq.channel_mixing import (
    SHRINKAGE,
    find_linear_tensors,
    find_mixing,
    level_diagonal,
    mix_channels,
)
from mgq.ptq.channel_statistics import IMAGE_SIZE, Values
from mgq.ptq.equalization import survey_images
from mgq.ptq.logit_gradients import Pairs
from mgq.ptq.steps import Draft, Equalize, ExactScales, MixChannels, RangesFromLogits
from mgq.quantization.targets import ONNX
from mgq.runtime.registry import BACKENDS, Backend, load
from mgq.zoo import mobilenet_v2
from tests.conftest import logits_of
from tests.fakes.uneven_networks import IMAGES, network_of, with_true_statistics

pytestmark = pytest.mark.usefixtures("short_shufflenet")
SHORT = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 1, 2))
"""Stages of a MobileNetV2 with one sum, and with tensors that no sum shares."""


@pytest.fixture(scope="module")
def draft() -> Iterator[Draft]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mobilenet_v2, "STAGES", SHORT)
        yield equalized()


def equalized() -> Draft:
    network = network_of("mobilenet_v2", activation="relu6")
    with_true_statistics(network)
    return Equalize().apply(Draft(network, IMAGES, ONNX))


@pytest.fixture(scope="module")
def mixed(draft: Draft) -> Draft:
    return MixChannels().apply(draft)


def related(channels: int, seed: int) -> Values:
    """Mean products of channels of which some are large, and some vary together."""
    made = np.random.default_rng(seed).standard_normal((channels, channels)) * np.geomspace(1, 10, channels)[:, None]
    return np.asarray(made @ made.T, np.float64)


def noise_of(mixing: Values, pairs: Pairs) -> float:
    """Of a grid that reaches as far as the largest mixed channel."""
    inverse = np.linalg.inv(mixing)
    sizes = np.diag(mixing @ pairs.values @ mixing.T)
    return float(sizes.max() * np.trace(inverse.T @ pairs.gradients @ inverse))


class TestNetworks:
    def test_the_float_network_answers_as_before(self, draft: Draft, mixed: Draft) -> None:
        before, after = logits_of(draft.network, IMAGES), logits_of(mixed.network, IMAGES)
        np.testing.assert_allclose(after, before, atol=3e-4 * float(np.abs(before).max()))

    def test_what_is_mixed_differs_and_its_channels_are_equally_large(self, draft: Draft, mixed: Draft) -> None:
        """But for what shrinkage keeps, and tensors that share channels with others."""
        name = next(
            linear.tensors[0]
            for linear in reversed(find_linear_tensors(graph_of(draft.network, IMAGE_SIZE)))
            if len(linear.tensors) == 1
        )
        before, after = (survey_images(each.network, IMAGES).statistics[name].mean_square for each in (draft, mixed))
        assert after.max() / after.mean() < 0.5 * before.max() / before.mean()

    def test_every_tensor_without_an_activation_is_mixed(self, draft: Draft) -> None:
        _, names = mix_channels(draft.network, graph_of(draft.network, IMAGE_SIZE), draft.reactions)
        modules = dict(draft.network.named_modules())
        plain = {name for name, module in modules.items() if type(module) is M.ConvBn2d}
        used = {node.output for node in graph_of(draft.network, IMAGE_SIZE).nodes}
        sums = {name for name, module in modules.items() if isinstance(module, M.Elemwise)}
        assert set(names) == plain | (sums & used)

    @pytest.mark.parametrize(
        "engine", [engine for engine in BACKENDS if engine.suffix == ".onnx"], ids=attrgetter("key")
    )
    def test_files_answer_as_the_simulation(self, mixed: Draft, engine: Backend, tmp_path: Path) -> None:
        watched = ExactScales().apply(RangesFromLogits().apply(mixed)).watched
        assert watched is not None
        path = tmp_path / "mixed.onnx"
        write_onnx(watched, path, image_size=IMAGES.shape[-1], batch=len(IMAGES), provenance={})
        wanted = logits_of(watched, IMAGES)
        largest = float(np.abs(wanted).max())
        np.testing.assert_allclose(load(path, engine.key).run(IMAGES), wanted, atol=2e-6 * largest)

    def test_batch_norms_keep_statistics_that_can_be_folded(self, mixed: Draft) -> None:
        for module in mixed.network.modules():
            if type(module) is M.ConvBn2d:
                assert (module.bn.running_var.numpy() > 0).all() and np.isfinite(module.bn.weight.numpy()).all()

    @pytest.mark.parametrize("arch", ["resnet18", "shufflenet_v1_x0_5_g3"])
    def test_a_network_whose_sums_have_activations_has_nothing_to_be_mixed(self, arch: str) -> None:
        assert find_linear_tensors(graph_of(network_of(arch), IMAGE_SIZE)) == []
        with pytest.raises(FailureError, match="no channels"):
            MixChannels().apply(Draft(network_of(arch), IMAGES[:2], ONNX))


class TestMatrices:
    def test_a_grid_makes_less_noise_than_behind_scaled_channels(self) -> None:
        pairs = Pairs(related(24, 1), related(24, 2))
        sizes, harms = np.diag(pairs.values), np.diag(pairs.gradients)
        mixing = find_mixing([pairs])
        assert mixing is not None
        scaled = min(noise_of(np.diag((harms / sizes) ** power), pairs) for power in (0.0, 0.25, 0.5))
        assert noise_of(mixing, pairs) < 0.7 * scaled

    def test_what_no_logit_cares_for_takes_no_part_of_the_grid(self) -> None:
        values, gradients = np.eye(4), np.eye(4)
        values[0, 0], gradients[0, 0] = 1e6, 0.0
        pairs = Pairs(values, gradients)
        mixing = find_mixing([pairs])
        assert mixing is not None
        assert noise_of(mixing, pairs) < 0.1 * noise_of(np.eye(4), pairs)

    def test_two_tensors_with_the_same_channels_share_a_mixture(self) -> None:
        both = [Pairs(related(8, 1), related(8, 2)), Pairs(related(8, 3), related(8, 4))]
        mixing = find_mixing(both)
        assert mixing is not None
        assert sum(noise_of(mixing, own) for own in both) < sum(noise_of(np.eye(8), own) for own in both)

    def test_nothing_known_is_nothing_mixed(self) -> None:
        assert find_mixing([]) is None
        assert not Pairs.of(3).matters

    @pytest.mark.parametrize("size", [2, 3, 24])
    def test_the_diagonal_is_level(self, size: int) -> None:
        matrix = related(size, 5)
        turn = level_diagonal(matrix)
        np.testing.assert_allclose(turn @ turn.T, np.eye(size), atol=1e-9)
        np.testing.assert_allclose(np.diag(turn @ matrix @ turn.T), np.trace(matrix) / size, rtol=1e-4)

    def test_pairs_are_sums_of_products_and_scale_with_their_channels(self) -> None:
        rng = np.random.default_rng(0)
        values, gradients = (rng.standard_normal((2, 3, 4, 4)).astype(np.float32) for _ in range(2))
        pairs, larger, factors = Pairs.of(3), Pairs.of(3), np.array([1.0, 2.0, 0.5])
        pairs.add(values, gradients)
        np.testing.assert_allclose(pairs.values[0, 1], (values[:, 0] * values[:, 1]).sum(), rtol=1e-5)
        each = factors.astype(np.float32).reshape(1, 3, 1, 1)
        larger.add(values * each, gradients / each)
        np.testing.assert_allclose(pairs.scale(factors).values, larger.values, rtol=1e-5)
        np.testing.assert_allclose(pairs.scale(factors).gradients, larger.gradients, rtol=1e-5)

    def test_shrinkage_keeps_matrices_of_few_images_invertible(self) -> None:
        one = np.zeros((5, 5))
        one[0, 0] = 1.0
        mixing = find_mixing([Pairs(one, one)])
        assert SHRINKAGE > 0 and mixing is not None and np.linalg.cond(mixing) < 100

"""Cross-layer equalization: the answers stay to the bit that float32 allows, and int8 loses less."""

from __future__ import annotations

from typing import Any

import megengine.module as M
import numpy as np
import numpy.typing as npt
import pytest
from megengine import Tensor

from mgq.graph.network_reader import graph_of
from mgq.ptq.bias_correction import BiasCorrection
from mgq.ptq.channel_statistics import Sums, predict_statistics, survey_network
from mgq.ptq.equalization import (
    Channels,
    Problem,
    equalize_channels,
    sets_of,
    soft_maximum,
)
from mgq.ptq.gptq import GPTQ
from mgq.ptq.layerwise import visit_beside_float
from mgq.ptq.presets import PLAIN
from mgq.ptq.range_measurement import as_input
from mgq.ptq.steps import CorrectBias
from mgq.quantization.targets import MEGENGINE, ONNX, Target
from tests.conftest import logits_of, slow
from tests.fakes.measured_ranges import simulate
from tests.fakes.uneven_networks import IMAGES, network_of, with_true_statistics

NETWORKS: tuple[Any, ...] = (
    slow("resnet18", {}),
    slow("mobilenet_v2", {}),
    ("mobilenet_v2", {"activation": "relu6"}),
    ("shufflenet_v1_x0_5_g3", {}),
    slow("efficientnet_lite0", {}),
)


@pytest.mark.parametrize(("arch", "options"), NETWORKS, ids=str)
@pytest.mark.parametrize(("target", "with_images"), [(MEGENGINE, True), (ONNX, False)], ids=["measured", "expected"])
def test_the_float_network_answers_as_before(
    arch: str, options: dict[str, object], target: Target, with_images: bool
) -> None:
    network = network_of(arch, **options)
    found, factors = equalize_channels(network, IMAGES if with_images else None, target)
    before, after = logits_of(network, IMAGES), logits_of(found, IMAGES)
    np.testing.assert_allclose(after, before, atol=1e-4 * max(1.0, float(np.abs(before).max())))
    assert max(float(of_tensor.max()) for of_tensor in factors.values()) > 1.2, "nothing was equalized"


@pytest.mark.parametrize("arch", [slow("resnet18"), slow("mobilenet_v2"), "shufflenet_v1_x0_5_g3"])
def test_int8_is_nearer_to_float(arch: str) -> None:
    network = network_of(arch)
    wanted = logits_of(network, IMAGES)

    def noise(source: M.Module) -> float:
        quantized = simulate(source, IMAGES, (*PLAIN, CorrectBias()))
        return float(np.square(logits_of(quantized, IMAGES) - wanted).mean())

    assert noise(equalize_channels(network, IMAGES)[0]) < 0.8 * noise(network)


@pytest.mark.slow
def test_a_channel_that_can_reach_the_ceiling_keeps_its_size() -> None:
    network = network_of("mobilenet_v2", activation="relu6")
    found, _ = equalize_channels(network, IMAGES)
    before, after = network.features[0].bn, found.features[0].bn
    assert np.array_equal(before.weight.numpy(), after.weight.numpy())
    # A channel that never comes near 6 is free.
    shape = before.bias.numpy().shape
    before.weight[...] = Tensor(np.full(shape, 1e-5, np.float32))
    found, _ = equalize_channels(network, IMAGES)
    assert not np.allclose(found.features[0].bn.weight.numpy(), before.weight.numpy(), rtol=1e-3)
    np.testing.assert_allclose(logits_of(found, IMAGES), logits_of(network, IMAGES), rtol=1e-3, atol=1e-4)


def test_channels_that_meet_in_a_sum_have_one_factor() -> None:
    network = network_of("resnet18")
    sets = sets_of(graph_of(network, 64))
    of = sets.of
    assert np.array_equal(of["layer2.0.conv_bn2"], of["layer2.0.downsample"])
    assert np.array_equal(of["layer2.0.conv_bn2"], of["layer2.1.conv_bn2"])
    assert not set(of["layer2.0.conv_bn_relu1"]) & set(of["layer2.0.conv_bn2"])


def test_union_find_joins_what_is_joined() -> None:
    channels = Channels()
    one, other, third = channels.new(2), channels.new(2), channels.new(1)
    channels.join(one, other)
    assert np.array_equal(channels.roots(one), channels.roots(other))
    assert channels.root(int(third[0])) not in channels.roots(one)


@pytest.mark.parametrize("target", [MEGENGINE, ONNX], ids=lambda target: target.name)
def test_the_gradient_is_that_of_the_noise(target: Target) -> None:
    network = network_of("shufflenet_v1_x0_5_g3")
    graph = graph_of(network, 64)
    sets = sets_of(graph)
    problem = Problem.of(graph, sets, predict_statistics(network, graph), target)
    rng = np.random.default_rng(0)
    logs = rng.normal(0, 0.2, sets.number)
    problem = problem.with_factors(logs)
    _, gradient = problem.noise(logs)
    for _ in range(3):
        way = rng.normal(0, 1, sets.number)
        ahead, behind = (problem.noise(logs + sign * 1e-5 * way)[0] for sign in (1, -1))
        assert (ahead - behind) / 2e-5 == pytest.approx(float(gradient @ way), rel=1e-4, abs=1e-7)


def test_the_soft_maximum_is_near_the_largest() -> None:
    square, parts = soft_maximum(np.log(np.array([1.0, 2.0, 5.0])))
    assert 5 <= np.sqrt(square) < 5.1 and parts.sum() == pytest.approx(1) and parts.argmax() == 2


@pytest.mark.parametrize("arch", ["resnet18", "shufflenet_v1_x0_5_g3", "efficientnet_lite0"])
def test_measured_statistics_are_those_of_the_tensors(arch: str) -> None:
    network = network_of(arch)
    graph = graph_of(network, 64)
    halves = [as_input(IMAGES[:4]), as_input(IMAGES[4:])]
    found = survey_network(network, graph, halves).statistics
    name = next(node.output for node in reversed(graph.nodes) if node.output.endswith("add"))
    seen: list[npt.NDArray[np.float32]] = []
    hook = dict(network.named_modules())[name].register_forward_hook(lambda _, __, out: seen.append(out.numpy()))
    logits_of(network, IMAGES)
    hook.remove()
    whole = seen[0]
    np.testing.assert_allclose(found[name].mean, whole.mean((0, 2, 3)), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(found[name].variance, whole.var((0, 2, 3)), rtol=1e-2, atol=1e-5)
    np.testing.assert_allclose(found[name].highest, whole.max((0, 2, 3)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("strange", "finite"), [(3e38, True), (-3e38, True), (np.nan, False), (np.inf, False), (-np.inf, False)]
)
def test_values_are_finite_however_large_their_sum_is(strange: float, finite: bool) -> None:
    values = np.zeros((2, 3, 40, 40), np.float32)
    values[1, 2] = strange
    assert Sums.of(values).is_finite == finite


def test_batch_norms_with_true_statistics_expect_what_is_seen() -> None:
    network = network_of("resnet18")
    with_true_statistics(network)
    graph = graph_of(network, 64)
    expected, found = predict_statistics(network, graph), survey_network(network, graph, [as_input(IMAGES)]).statistics
    for name in ("layer1.0.conv_bn2", "layer3.0.downsample"):  # no activation: exact
        np.testing.assert_allclose(expected[name].mean, found[name].mean, rtol=0.02, atol=0.02)
        np.testing.assert_allclose(expected[name].variance, found[name].variance, rtol=0.1, atol=0.02)
    rectified = "layer3.0.conv_bn_relu1"  # as if normally distributed
    similarity = np.corrcoef(expected[rectified].mean, found[rectified].mean)[0, 1]
    assert similarity > 0.95


@pytest.mark.slow
def test_steps_work_alone_and_in_order() -> None:
    """Weights rounded together bring a network nearer to float, and biases corrected after that change it again."""
    network = network_of("mobilenet_v2")
    wanted, pixels = logits_of(network, IMAGES), as_input(IMAGES)

    def noise(found: M.Module) -> float:
        return float(np.square(logits_of(found, IMAGES) - wanted).mean())

    plain = simulate(network, IMAGES, PLAIN)
    noises = [noise(plain)]
    for step in (GPTQ(refit=False), BiasCorrection()):
        visit_beside_float(plain, pixels, step)
        noises.append(noise(plain))
    assert noises[1] < 0.9 * noises[0] and noises[2] != noises[1]

"""One truth: the simulation, integer arithmetic and every engine give the same integers, to the last bit."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any

import megengine
import megengine.module as M
import numpy as np
import numpy.typing as npt
import onnx
import pytest
from megengine import Tensor
from megengine.quantization.quantize import disable_observer

from mgq.engine.classifier import parity
from mgq.engine.classifier.parity import measure_layer_parity
from mgq.errors import InputError
from mgq.export.native.program import read_program
from mgq.export.native.reference import run_reference
from mgq.export.onnx.writer import write_onnx
from mgq.graph.layer_graph import (
    Add,
    Convolution,
    GlobalAverage,
    Graph,
    Linear,
    MaxPool,
    Operation,
    QuantParams,
    Reshape,
    Transpose,
)
from mgq.graph.network_reader import graph_of
from mgq.ptq.exact_scales import POSITIONS, SUM_PARTS, find_odd_near, scale_behind, set_exact_scales, settle_scales
from mgq.ptq.presets import PLAIN, data_free_steps, with_exact_scales
from mgq.ptq.range_measurement import as_input
from mgq.ptq.steps import NO_IMAGES, ClearDeadChannels, RoundWeights
from mgq.quantization.half_to_even import bias_steps, round_half_to_even
from mgq.quantization.modes import Mode, to_mode
from mgq.quantization.qat import prepare_qat
from mgq.quantization.qat_layers import find_quantized_layers, fold_bias, set_range
from mgq.quantization.relu6 import QatConvBnRelu6
from mgq.quantization.targets import ONNX, ONNX_AVX2, ChannelFakeQuantize, Target, avoid_ties, channel_scales
from mgq.runtime.registry import BACKENDS, Backend, load
from mgq.zoo.network_state import state_of
from mgq.zoo.registry import spec_of
from mgq.zoo.weight_loading import load_state
from tests.conftest import logits_of, slow, smooth_images
from tests.fakes.measured_ranges import simulate

SIZE = 64
IMAGES = smooth_images(2, SIZE, SIZE)
FAMILIES: list[tuple[str, dict[str, Any]]] = [
    ("resnet18", {}),
    ("shufflenet_v1_x0_5_g3", {}),
    ("mobilenet_v2", {}),
    ("mobilenet_v2", {"activation": "relu6"}),
    ("efficientnet_lite0", {}),
]
OF_FILES = [engine for engine in BACKENDS if engine.suffix == ".onnx"]
"""OpenVINO, ONNX Runtime and the native engine."""
SHOWING = [engine for engine in OF_FILES if engine.shows_layers]
Integers = npt.NDArray[np.int64]


def float_network(arch: str, options: dict[str, Any]) -> M.Module:
    megengine.random.seed(7)
    network = spec_of(arch).build(10, **options)
    network.eval()
    # OpenVINO puts the scales of a convolution without any bias into the limits of its rounding, which is not exact.
    for number, module in enumerate(network.modules()):
        if isinstance(module, M.BatchNorm2d):
            shape = module.bias.numpy().shape
            module.bias[...] = Tensor(np.random.default_rng(number).normal(0, 0.1, shape).astype(np.float32))
    return network


@cache
def calibrated(number: int, target: Target = ONNX) -> M.Module:
    arch, options = FAMILIES[number]
    rounding = RoundWeights(refit=not target.per_channel)
    steps = (ClearDeadChannels(), *with_exact_scales(PLAIN, target), rounding)
    return simulate(float_network(arch, options), IMAGES, steps, target)


def written(network: M.Module, folder: Path) -> Path:
    path = folder / "net.onnx"
    write_onnx(network, path, image_size=SIZE, batch=None, provenance={})
    return path


def shown_in_numpy(
    _: Backend, path: Path, layers: list[str], images: npt.NDArray[np.uint8]
) -> dict[str, npt.NDArray[np.uint8]]:
    """What the native engine's specification gives behind each of ``layers``."""
    values = run_reference(read_program(onnx.load(str(path))), images)[1]
    found = {layer: values[f"{layer}/q"] for layer in layers if f"{layer}/q" in values}
    assert len(found) > 5
    return found


def is_tie_free(ratio: float, largest: int = 8191) -> bool:
    """Whether ``ratio`` is, to float32, a fraction whose denominator is odd and at most ``largest``."""
    found = Fraction(ratio).limit_denominator(largest)
    return found.denominator % 2 == 1 and abs(float(found) / ratio - 1) < 1e-6


def name_of(number: int) -> str:
    return "-".join(map(str, FAMILIES[number]))


RESNET, SHUFFLE, MOBILE, *OTHERS = range(len(FAMILIES))
NUMBERS = [MOBILE, *(slow(number) for number in (SHUFFLE, RESNET, *OTHERS))]


@pytest.mark.parametrize("number", NUMBERS, ids=name_of)
class TestOneTruth:
    def test_logits_are_the_same_to_the_bit_everywhere(self, number: int, tmp_path: Path) -> None:
        network = calibrated(number)
        wanted = counted_logits(graph_of(network, SIZE), IMAGES)
        np.testing.assert_allclose(logits_of(network, IMAGES), wanted, rtol=1e-6, atol=2e-6)
        path = written(network, tmp_path)
        for engine in OF_FILES:
            # Of a sum above 2**20 the logit is exact but for float32's last digit; integers are exact always.
            np.testing.assert_allclose(load(path, engine.key).run(IMAGES), wanted, rtol=1e-6, atol=2e-6)

    def test_every_integer_is_the_same(self, number: int, tmp_path: Path) -> None:
        network = calibrated(number)
        path = written(network, tmp_path)
        for engine in SHOWING:
            for layer in measure_layer_parity(engine, path, network, IMAGES):
                assert layer.share == 0, layer

    def test_every_integer_is_that_of_the_integers_in_numpy(
        self, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(parity, "read_layers", shown_in_numpy)
        network = calibrated(number)
        for layer in measure_layer_parity(SHOWING[0], written(network, tmp_path), network, IMAGES):
            assert layer.share == 0, layer

    @pytest.mark.slow
    def test_without_images_too(self, number: int, tmp_path: Path) -> None:
        arch, options = FAMILIES[number]
        network = simulate(float_network(arch, options), NO_IMAGES, data_free_steps(ONNX), ONNX)
        wanted = logits_of(network, IMAGES)
        path = written(network, tmp_path)
        for engine in OF_FILES:
            np.testing.assert_allclose(load(path, engine.key).run(IMAGES), wanted, rtol=1e-6, atol=2e-6)

    def test_no_value_can_be_half_way_between_two_integers(self, number: int) -> None:
        graph = graph_of(calibrated(number), SIZE)
        seen = set()
        for node in graph.nodes:
            grid = graph.grids.get(node.output)
            ratios = [graph.grids[name].scale / grid.scale for name in node.inputs] if grid else []
            if isinstance(node, Convolution):
                assert node.scales is not None
                assert all(is_tie_free(float(scale) * ratios[0]) for scale in node.scales), node.output
            elif isinstance(node, Add):
                assert all(is_tie_free(ratio, SUM_PARTS) for ratio in ratios), node.output
            elif isinstance(node, GlobalAverage):
                assert is_tie_free(ratios[0] / POSITIONS), node.output
            seen.add(type(node))
        assert {Convolution, GlobalAverage} <= seen


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["resnet50", "shufflenet_v1_x1_5_g3"])
def test_every_integer_of_larger_networks_is_the_same(
    arch: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parity, "read_layers", shown_in_numpy)
    network = with_ranges(float_network(arch, {}))
    set_exact_scales(network)  # weights rounded by GPTQ, which take much longer here, are those of TestOneTruth
    path = written(network, tmp_path)
    for layer in measure_layer_parity(SHOWING[0], path, network, IMAGES):
        assert layer.share == 0, layer
    native = load(path, "native").run(IMAGES)
    np.testing.assert_allclose(logits_of(network, IMAGES), native, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize(
    "target", [pytest.param(ONNX, marks=pytest.mark.slow), ONNX_AVX2], ids=lambda target: target.name
)
def test_constant_channels_and_tiny_and_huge_weights_are_the_same_in_every_layer(
    target: Target, tmp_path: Path
) -> None:
    """Dead channels with a constant output, and weights of 1e-12, 0 and 1e4 beside ordinary ones."""
    network = float_network("resnet18", {})
    modules = dict(network.named_modules())
    for name in ("layer1.0.conv_bn_relu1", "layer2.1.conv_bn_relu1", "layer3.0.conv_bn2"):
        bn = modules[name].bn
        for parameter, value in ((bn.weight, 0.0), (bn.bias, 0.8)):
            values = parameter.numpy().copy()
            values[:, :7] = value
            parameter[...] = Tensor(values)
    conv = modules["layer4.0.conv_bn_relu1"].conv
    weight = conv.weight.numpy().copy()
    weight[0], weight[1], weight[2] = weight[0] * 1e-12, 0, weight[2] * 1e4
    conv.weight[...] = Tensor(weight)
    found = simulate(network, NO_IMAGES, data_free_steps(target), target)
    path = written(found, tmp_path)
    for engine in SHOWING:
        for layer in measure_layer_parity(engine, path, found, IMAGES):
            assert layer.largest <= 1 and layer.share < 1e-4, layer


@pytest.mark.parametrize("number", range(len(FAMILIES)))
def test_exact_scales_cost_little(number: int) -> None:
    network = with_ranges(float_network(*FAMILIES[number]))
    before = {name: scale_behind(layer) for name, layer in find_quantized_layers(network).items()}
    set_exact_scales(network)
    for name, layer in find_quantized_layers(network).items():
        assert scale_behind(layer) == pytest.approx(before[name], rel=0.03), name
        if isinstance(layer, QatConvBnRelu6):
            assert 255 * scale_behind(layer) <= 6 * (1 + 1e-6)


def test_exact_scales_are_what_they_were_when_set_again() -> None:
    network = with_ranges(float_network("mobilenet_v2", {}))
    first = set_exact_scales(network)
    state = state_of(network)
    second = set_exact_scales(network)
    assert {name: pytest.approx(limits, rel=1e-6) for name, limits in first.items()} == second
    for name, value in state_of(network).items():
        np.testing.assert_allclose(value, state[name], rtol=1e-6, err_msg=name)


@pytest.mark.parametrize(("scale", "parts"), [(1 / 255, 254), (1 / 268, 268), (0.0013, 768)])
def test_half_of_a_gate_is_an_integer(scale: float, parts: int) -> None:
    nodes = (Operation(("in",), "gate", "hard_sigmoid", {}), Operation(("gate", "in"), "out", "mul", {}))
    graph = Graph(nodes, "in", "out", dict.fromkeys(("in", "gate", "out"), QuantParams(scale, 0, 255)), {})
    layers: dict[str, Any] = dict.fromkeys(("in", "gate", "out"))
    found = settle_scales(graph, layers)
    assert found == {"in": scale, "gate": pytest.approx(1 / parts), "out": scale}
    again = replace(graph, grids={**graph.grids, "gate": QuantParams(float(np.float32(found["gate"])), 0, 255)})
    assert settle_scales(again, layers) == found


@pytest.mark.slow
def test_the_other_onnx_target_is_as_exact(tmp_path: Path) -> None:
    network = calibrated(2, ONNX_AVX2)
    path = written(network, tmp_path)
    for engine in OF_FILES:
        wanted = logits_of(network, IMAGES)
        np.testing.assert_allclose(load(path, engine.key).run(IMAGES), wanted, rtol=1e-6, atol=2e-6)


def test_steps_of_weights_that_are_all_0_let_the_bias_fit_into_int32() -> None:
    scales = channel_scales(Tensor(np.zeros((4, 8), np.float32))).numpy()
    bias = np.linspace(-3, 3, 4, dtype=np.float32).reshape(scales.shape)
    np.testing.assert_allclose(bias_steps(bias, scales * 1e-4) * (scales * 1e-4), bias, atol=1e-5)


def test_a_bias_of_many_steps_is_that_of_the_file(tmp_path: Path) -> None:
    network = with_ranges(float_network("resnet18", {}))
    layer = network.layer1[0].conv_bn_relu1
    weight, bias = layer.conv.weight.numpy().copy(), layer.bn.bias.numpy().copy()
    weight[3] *= 1e-5
    bias.reshape(-1)[3] = float(layer.act_observer.max_val.numpy()) / 2
    layer.conv.weight[...], layer.bn.bias[...] = Tensor(weight), Tensor(bias)
    layer.act_fake_quant.enable()
    scales = channel_scales(layer.conv.weight).numpy().ravel() * float(
        network.conv_bn_relu1.act_observer.get_qparams().scale.numpy()
    )
    assert bias_steps(fold_bias(layer), scales)[3] > 2**24
    found = measure_layer_parity(SHOWING[0], written(network, tmp_path), network, IMAGES[:2])
    assert max(entry.largest for entry in found) <= 1


class TestRounding:
    def test_halves_go_to_the_even_neighbour(self) -> None:
        values = np.array([0.5, 1.5, 2.5, -0.5, -1.5, 126.5, 127.5, 300.0, -300.0, 0.49999997], np.float32)
        assert np.array_equal(
            round_half_to_even(Tensor(values), -128, 127).numpy(), np.clip(np.rint(values), -128, 127)
        )

    def test_its_gradient_is_that_of_clipping(self) -> None:
        values = Tensor(np.array([-200, -1.3, 0.5, 126.9, 200], np.float32))
        with megengine.autodiff.GradManager() as manager:
            manager.attach(values)
            manager.backward(round_half_to_even(values, -128, 127).sum())
        assert values.grad.numpy().tolist() == [0, 1, 1, 1, 0]

    def test_biases_stop_at_int32(self) -> None:
        found = bias_steps(np.array([1e10, -1e10, 2.5, 3.5], np.float32), np.ones(4, np.float32))
        assert found.tolist() == [2**31 - 1, -(2**31), 2, 4]


class TestScalesOfWeights:
    @pytest.mark.parametrize("levels", [127, 64])
    @pytest.mark.parametrize("shape", [(64, 3, 1, 3, 3), (500, 27), (1000, 1), (40, 16, 3, 3)])
    def test_the_scale_of_rounded_weights_is_the_same(self, shape: tuple[int, ...], levels: int) -> None:
        weight = np.random.default_rng(1).normal(0, 1, shape).astype(np.float32)
        scales = channel_scales(Tensor(weight), levels).numpy()
        steps = np.rint(weight / scales)
        assert np.abs(steps).max() <= levels
        again = channel_scales(Tensor((steps * scales).astype(np.float32)), levels).numpy()
        exact = steps * scales / again
        assert np.array_equal(np.rint(exact), exact.astype(np.float32))
        if weight[0].size > 4:
            assert np.array_equal(again, scales)

    def test_they_lose_little(self) -> None:
        weight = np.random.default_rng(2).normal(0, 1, (1000, 9)).astype(np.float32)
        ratio = channel_scales(Tensor(weight)).numpy()[:, 0] / (np.abs(weight).max(1) / 127)
        assert ratio.min() > 0.995 and ratio.max() < 1.13 and ratio.mean() < 1.06

    def test_a_channel_of_zeros_has_steps_as_coarse_as_others(self) -> None:
        weight = np.array([[0.0, 0.0], [1.0, -2.0]], np.float32)
        assert np.unique(channel_scales(Tensor(weight)).numpy()).size == 1


class TestFixedScales:
    def test_ratios_without_ties_are_the_least_that_serve(self) -> None:
        wanted = np.geomspace(2e-4, 30, 4000)
        found = avoid_ties(wanted)
        assert (found >= wanted * (1 - 1e-6)).all() and (found <= wanted * 1.035).all()
        assert all(is_tie_free(float(value)) for value in found)

    def test_none_is_so_small_that_float32_no_longer_tells(self) -> None:
        assert avoid_ties(np.array([1e-9, 1e-30])).tolist() == [1 / 8191] * 2

    def test_an_odd_number_near(self) -> None:
        assert [find_odd_near(v, 0) for v in (0.2, 1.9, 2.1, 100.0, 101.2)] == [1, 1, 3, 101, 101]
        assert find_odd_near(99.0, 100.0) == 101 and find_odd_near(99.0, 99.0) == 99

    def test_they_travel_with_a_checkpoint_and_without_them_weights_have_their_own(self) -> None:
        network = calibrated(2)
        state = state_of(network)
        assert any(name.endswith("weight_fake_quant.scales") for name in state)
        other = to_mode(float_network("mobilenet_v2", {}), Mode.QAT, ONNX)
        load_state(other, state, "the checkpoint")
        other.eval()
        disable_observer(other)
        assert np.array_equal(logits_of(other, IMAGES), logits_of(network, IMAGES))
        load_state(other, {name: value for name, value in state.items() if not name.endswith(".scales")}, "it")
        assert not any(name.endswith(".scales") for name in state_of(other))

    @pytest.mark.parametrize("damage", [np.zeros(3, np.float32), np.full(16, np.nan, np.float32)], ids=["few", "nan"])
    def test_scales_that_are_none_are_refused_and_nothing_changes(self, damage: npt.NDArray[Any]) -> None:
        state = dict(state_of(calibrated(2)))
        name = next(name for name in state if name.endswith("weight_fake_quant.scales"))
        other = to_mode(float_network("mobilenet_v2", {}), Mode.QAT, ONNX)
        before = state_of(other)
        with pytest.raises(InputError, match="no scale for each output"):
            load_state(other, {**state, name: damage}, "it")
        assert state_of(other).keys() == before.keys()

    def test_training_sets_them_free(self) -> None:
        trained = prepare_qat(calibrated(2), target=ONNX)
        assert not any(name.endswith(".scales") for name in state_of(trained))


def with_ranges(network: M.Module) -> M.Module:
    """In mode ``qat`` with ranges of the right size; quantization is on."""
    watched = simulate(network, IMAGES, PLAIN, ONNX)
    for layer in find_quantized_layers(watched).values():
        observer = layer.act_observer
        set_range(observer, float(observer.min_val.numpy()) * 0.93, float(observer.max_val.numpy()) * 0.93)
    return watched


def counted_logits(graph: Graph, images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """What ``graph`` gives in integers, with but one rounding behind each sum: float32 (N, classes)."""
    values: dict[str, Integers] = {graph.input: as_input(images).astype(np.int64)}
    for node in graph.nodes:
        sources = [values[name] for name in node.inputs]
        scales = [graph.grids[name].scale for name in node.inputs]
        if isinstance(node, MaxPool):
            lowest = np.iinfo(np.int64).min
            values[node.output] = windows(sources[0], node.kernel, node.stride, node.padding, lowest).max((-2, -1))
        elif isinstance(node, Reshape):
            values[node.output] = sources[0].reshape(len(images), *node.shape[1:])
        elif isinstance(node, Transpose):
            values[node.output] = sources[0].transpose(node.axes)
        elif isinstance(node, Add):
            values[node.output] = on_grid(graph, node.output, sum(v * s for v, s in zip(sources, scales, strict=True)))
        elif isinstance(node, GlobalAverage):
            values[node.output] = on_grid(graph, node.output, sources[0].mean((2, 3), keepdims=True) * scales[0])
        else:
            assert isinstance(node, Convolution | Linear) and node.integers is not None and node.scales is not None
            step = (node.scales * np.float32(scales[0])).astype(np.float64)
            sums = convolved(node, sources[0]) if isinstance(node, Convolution) else product(node, sources[0])
            if node.bias is not None:
                sums = sums + bias_steps(node.bias, step.astype(np.float32)).reshape(-1, *(1,) * (sums.ndim - 2))
            scaled = sums * step.reshape(-1, *(1,) * (sums.ndim - 2))
            if node.output == graph.output:
                return scaled.astype(np.float32)
            values[node.output] = on_grid(graph, node.output, scaled)
    raise AssertionError("a network ends with its classifier")


def on_grid(graph: Graph, tensor: str, values: Any) -> Integers:
    grid = graph.grids[tensor]
    found: Integers = np.clip(np.rint(values / grid.scale), grid.qmin, grid.qmax).astype(np.int64)
    return found


def windows(
    source: Integers, kernel: tuple[int, ...], stride: tuple[int, int], padding: tuple[int, int], fill: int
) -> Integers:
    """(N, C, H, W) -> (N, C, H', W', *kernel)."""
    sides = [(0, 0), (0, 0), (padding[0],) * 2, (padding[1],) * 2]
    padded = np.pad(source, sides, constant_values=fill)
    found: Integers = np.lib.stride_tricks.sliding_window_view(padded, kernel, axis=(2, 3))  # type: ignore[call-overload]
    return found[:, :, :: stride[0], :: stride[1]]


def convolved(node: Convolution, source: Integers) -> Integers:
    assert node.integers is not None
    kernel = node.integers.shape[2:]
    seen = windows(source, kernel, node.stride, node.padding, 0)
    images, channels, height, width = seen.shape[:4]
    grouped = seen.reshape(images, node.groups, channels // node.groups, height, width, -1)
    weight = node.integers.astype(np.float64).reshape(node.groups, -1, channels // node.groups, grouped.shape[-1])
    sums = np.einsum("ngchwk,gock->ngohw", grouped.astype(np.float64), weight, optimize=True)
    found: Integers = np.rint(sums).astype(np.int64).reshape(images, -1, height, width)
    return found


def product(node: Linear, source: Integers) -> Integers:
    assert node.integers is not None
    sums: Integers = source.reshape(len(source), -1) @ node.integers.astype(np.int64).T
    return sums


def test_every_layer_of_the_simulation_knows_its_target() -> None:
    network = to_mode(float_network("mobilenet_v2", {}), Mode.QAT, ONNX)
    assert sum(isinstance(module, ChannelFakeQuantize) for module in network.modules()) > 50

"""ONNX files: what the writer makes of each family, and that engines answer as the fake-quantized network does."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import cv2
import megengine
import megengine.functional as F
import megengine.module as M
import numpy as np
import numpy.typing as npt
import onnx
import pytest
from megengine import Tensor
from onnx import numpy_helper

from mgq.engine.classifier.deployed_files import attach_backend
from mgq.engine.classifier.open import make_random_classifier
from mgq.engine.classifier.parity import measure_layer_parity
from mgq.engine.classifier.runtime_module import RuntimeModule, int8_of
from mgq.errors import FailureError, InputError
from mgq.export.native.cpu import LEVELS
from mgq.export.onnx.onnx_file import read_onnx
from mgq.export.onnx.writer import write_onnx
from mgq.graph.layer_graph import Convolution, Linear
from mgq.graph.network_reader import graph_of
from mgq.ptq.steps import CorrectBias, ExactScales, RangesFromImages, RoundWeights, Step
from mgq.quantization.modes import Mode, mode_of, to_mode
from mgq.quantization.option_names import MSE
from mgq.quantization.qat_layers import find_quantized_layers
from mgq.quantization.targets import (
    MEGENGINE,
    ONNX,
    ONNX_AVX2,
    UNSIGNED,
    Target,
    channel_scales,
    is_never_negative,
    target_of,
)
from mgq.quantization.targets import TARGETS as TARGETS_BY_NAME
from mgq.runtime.registry import AUTO, BACKENDS, Backend, choose_backend, load
from mgq.zoo.layers import global_average
from mgq.zoo.registry import spec_of
from tests.conftest import logits_of, slow
from tests.fakes.measured_ranges import simulate

FAMILIES = (slow("resnet18"), slow("resnet50"), "shufflenet_v1_x1_5_g3", "mobilenet_v2", slow("efficientnet_lite0"))
TARGETS = (MEGENGINE, ONNX)
SIZE = 64
Images = npt.NDArray[np.uint8]


def images(number: int) -> Images:
    """Noise without its finest part: uint8 (number, 3, SIZE, SIZE)."""
    noise = np.random.default_rng(3).integers(0, 256, (number, SIZE, SIZE, 3), np.uint8)
    smooth = np.stack([cv2.GaussianBlur(image, (0, 0), 3) for image in noise]).astype(np.float32)
    strong = np.clip((smooth - 128) * 4 + 128, 0, 255).astype(np.uint8)
    return np.ascontiguousarray(strong.transpose(0, 3, 1, 2))


IMAGES = images(4)
SHOWING = [engine for engine in BACKENDS if engine.suffix == ".onnx" and engine.shows_layers]


@cache
def float_network(arch: str) -> M.Module:
    megengine.random.seed(7)
    network = spec_of(arch).build()
    network.eval()
    return network


@cache
def simulated(arch: str, target: Target) -> M.Module:
    return simulate(float_network(arch), IMAGES, (RangesFromImages(MSE), CorrectBias()), target)


@cache
def written(arch: str, target: Target | None, folder: Path, batch: int | None = None) -> Path:
    """The file of an int8 network, or of the float one."""
    path = folder / f"{arch}.{target.name if target else 'float'}.{batch}.onnx"
    network = simulated(arch, target) if target else float_network(arch)
    write_onnx(network, path, image_size=SIZE, batch=batch, provenance={"arch": arch})
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("onnx")


def signal_to_noise(found: npt.NDArray[Any], wanted: npt.NDArray[Any]) -> float:
    """In decibels."""
    return float(10 * np.log10(np.square(wanted).sum() / np.square(found - wanted).sum()))


@pytest.mark.parametrize("arch", FAMILIES)
@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_a_float_file_answers_as_the_network(arch: str, engine: str, folder: Path) -> None:
    found = load(written(arch, None, folder), engine).run(IMAGES)
    assert signal_to_noise(found, logits_of(float_network(arch), IMAGES)) > 80


@pytest.mark.parametrize("arch", FAMILIES)
@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
@pytest.mark.parametrize("engine", SHOWING, ids=lambda engine: engine.key)
def test_given_the_same_integers_each_layer_gives_those_of_fake_quantization(
    arch: str, target: Target, engine: Backend, folder: Path
) -> None:
    network = simulated(arch, target)
    found = measure_layer_parity(engine, written(arch, target, folder), network, IMAGES[:2])
    convolutions = [name for name, layer in find_quantized_layers(network).items() if layer.weight_observer is not None]
    # Folded into a dense convolution, the first shuffle of ShuffleNet leaves these outputs in another order.
    folded = {"features.0.branch_main_1.0", "features.0.branch_main_1.1"} if "shuffle" in arch else set()
    assert {entry.layer for entry in found} >= set(convolutions) - folded
    assert max(entry.largest for entry in found) <= 1
    values = sum(entry.values for entry in found)
    assert sum(entry.share * entry.values for entry in found) <= 1e-3 * values


class Branch(M.Module):  # type: ignore[misc]
    """A convolution that is read by another one and by the sum of both."""

    def __init__(self) -> None:
        super().__init__()
        self.quant, self.dequant = M.QuantStub(), M.DequantStub()
        self.stem = M.ConvBnRelu2d(3, 16, 3, 2, 1, bias=False)
        self.branch = M.ConvBn2d(16, 16, 3, 1, 1, bias=False)
        self.add = M.Elemwise("FUSE_ADD_RELU")
        self.fc = M.Linear(16, 5)
        self.fc.disable_quantize()

    def forward(self, x: Tensor) -> Tensor:
        stem = self.stem(self.quant(x))
        return self.fc(self.dequant(global_average(self.add(self.branch(stem), stem))))


@pytest.mark.parametrize("engine", SHOWING, ids=lambda engine: engine.key)
def test_a_layer_that_an_engine_merges_with_its_reader_is_shown(engine: Backend, tmp_path: Path) -> None:
    """OpenVINO gives one tensor for two names where a sum takes its summand's integers as they are."""
    megengine.random.seed(7)
    network = Branch()
    network.eval()
    quantized = simulate(network, IMAGES, (RangesFromImages(MSE), ExactScales(), RoundWeights()), ONNX)
    path = tmp_path / "branch.onnx"
    write_onnx(quantized, path, image_size=SIZE, batch=1, provenance={"arch": "branch"})
    found = measure_layer_parity(engine, path, quantized, IMAGES[:2])
    assert [entry.layer for entry in found] == ["stem", "branch", "add"]
    assert max(entry.largest for entry in found) <= 1


@pytest.mark.parametrize("arch", [slow("resnet18"), "mobilenet_v2"])
@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_logits_are_near_those_of_fake_quantization(arch: str, target: Target, engine: str, folder: Path) -> None:
    wanted = logits_of(simulated(arch, target), IMAGES)
    assert signal_to_noise(load(written(arch, target, folder), engine).run(IMAGES), wanted) > 18


@pytest.mark.parametrize("arch", FAMILIES)
@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_a_file_holds_little_more_than_its_integers(arch: str, target: Target, folder: Path) -> None:
    path = written(arch, target, folder)
    nodes = graph_of(simulated(arch, target), SIZE).nodes
    integers = [n.integers for n in nodes if isinstance(n, Convolution | Linear)]
    assert all(found is not None and found.dtype == np.int8 for found in integers)
    assert path.stat().st_size <= 1.1 * sum(found.size for found in integers if found is not None)


@pytest.mark.parametrize("arch", ["resnet18", "shufflenet_v1_x1_5_g3", "mobilenet_v2"])
def test_everything_between_pixels_and_logits_is_integer(arch: str, folder: Path) -> None:
    model = onnx.load(written(arch, ONNX, folder))
    operators = {node.op_type for node in model.graph.node}
    assert not operators & {"Relu", "Cast", "Sub", "Mul", "BatchNormalization"}
    producers = {output: node for node in model.graph.node for output in node.output}
    for node in model.graph.node:
        if node.op_type in ("Conv", "Gemm", "Add", "GlobalAveragePool"):
            assert all(producers[name].op_type == "DequantizeLinear" for name in node.input), node.name
        if node.op_type in ("Reshape", "Transpose", "MaxPool"):
            assert node.input[0] == "data" or producers[node.input[0]].op_type != "DequantizeLinear", node.name
    consumers = [node.op_type for node in model.graph.node if "data" in node.input]
    assert consumers == ["DequantizeLinear"]
    (entry,) = [node for node in model.graph.node if "data" in node.input]
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    assert constants[entry.input[1]] == 1 and constants[entry.input[2]] == 128


def test_a_file_of_one_batch_size_takes_no_other(folder: Path) -> None:
    path = written("resnet18", ONNX, folder, 2)
    for engine in ("onnxruntime", "openvino"):
        runtime = load(path, engine)
        assert runtime.run(IMAGES[:2]).shape == (2, 1000)
        with pytest.raises(InputError, match="2x3x64x64, not 4x3x64x64"):
            runtime.run(IMAGES)


def test_provenance_is_in_the_metadata(folder: Path) -> None:
    found = read_onnx(written("resnet18", ONNX, folder))
    assert found.about["arch"] == "resnet18" and found.shape == (None, 3, SIZE, SIZE) and found.type == "uint8"
    (entry,) = onnx.load(written("resnet18", ONNX, folder)).metadata_props
    assert entry.key == "mgq" and json.loads(entry.value) == found.about


@pytest.mark.parametrize("damage", ["truncated", "text", "empty", "missing"])
def test_what_is_no_onnx_file_is_named(damage: str, folder: Path, tmp_path: Path) -> None:
    content = {"truncated": written("resnet18", ONNX, folder).read_bytes()[:100_000], "text": b"hello", "empty": b""}
    path = tmp_path / "net.onnx"
    if damage != "missing":
        path.write_bytes(content[damage])
    for engine in ("onnxruntime", "openvino"):
        with pytest.raises(InputError, match=r"net\.onnx"):
            load(path, engine)


class Odd(M.Module):  # type: ignore[misc]
    def forward(self, x: Tensor) -> Tensor:
        return F.softmax(x.mean(axis=(2, 3)))


def test_what_cannot_be_exported_is_named(tmp_path: Path) -> None:
    with pytest.raises(FailureError, match="cannot be exported"):
        write_onnx(Odd(), tmp_path / "net.onnx", image_size=SIZE, batch=1, provenance={})
    assert not list(tmp_path.iterdir())


class TestTarget:
    def test_onnx_has_unsigned_grids_behind_a_relu_and_an_int8_head(self) -> None:
        network = simulated("resnet18", ONNX)
        assert target_of(network) is ONNX and target_of(simulated("resnet18", MEGENGINE)) is MEGENGINE
        for name, layer in find_quantized_layers(network).items():
            assert (layer.act_observer.dtype is UNSIGNED) == is_never_negative(layer), name
        assert network.fc.weight_fake_quant is not None and network.fc.act_fake_quant is None
        assert simulated("resnet18", MEGENGINE).fc.__class__ is M.Linear

    def test_weights_have_a_grid_for_each_output(self) -> None:
        weight = np.random.default_rng(0).normal(0, 1, (3, 50)).astype(np.float32) * np.array(
            [[1], [10], [0.01]], np.float32
        )
        scales = channel_scales(Tensor(weight)).numpy()
        wanted = np.abs(weight).max(1) / 127
        assert (scales[:, 0] > 0.99 * wanted).all() and (scales[:, 0] < 1.13 * wanted).all()

    @pytest.mark.parametrize("finish", [CorrectBias(), slow(RoundWeights())], ids=lambda step: step.name)
    def test_without_vnni_weights_stay_where_no_sum_saturates(self, finish: Step, tmp_path: Path) -> None:
        arch = "shufflenet_v1_x0_5_g3"
        network = simulate(float_network(arch), IMAGES, (RangesFromImages(MSE), finish), ONNX_AVX2)
        assert target_of(network) is ONNX_AVX2
        found = [n.integers for n in graph_of(network, SIZE).nodes if isinstance(n, Convolution | Linear)]
        assert max(int(np.abs(integers.astype(int)).max()) for integers in found if integers is not None) == 64
        # Two products of uint8 and such a weight, as vpmaddubsw adds them in 16 bits with a sign.
        assert 2 * 255 * 64 <= np.iinfo(np.int16).max < 2 * 255 * 65
        path = tmp_path / "net.onnx"
        write_onnx(network, path, image_size=SIZE, batch=None, provenance={})
        for engine in SHOWING:
            logits = load(path, engine.key).run(IMAGES)
            assert signal_to_noise(logits, logits_of(network, IMAGES)) > 18

    def test_a_channel_of_zeros_has_a_scale(self) -> None:
        assert (channel_scales(Tensor(np.zeros((2, 3), np.float32))).numpy() > 0).all()

    def test_it_is_nearer_to_float_than_megengine(self) -> None:
        wanted = logits_of(float_network("mobilenet_v2"), IMAGES)
        near = [signal_to_noise(logits_of(simulated("mobilenet_v2", t), IMAGES), wanted) for t in (ONNX, MEGENGINE)]
        assert near[0] > near[1] + 1

    def test_megengine_does_not_run_it_but_an_engine_does(self) -> None:
        network = simulated("resnet18", ONNX)
        with pytest.raises(InputError, match="write an ONNX file"):
            to_mode(network, Mode.QUANTIZED)
        int8 = int8_of(network, SIZE)
        assert isinstance(int8, RuntimeModule) and mode_of(int8) is Mode.QUANTIZED
        assert signal_to_noise(logits_of(int8, IMAGES), logits_of(network, IMAGES)) > 18


class TestEngines:
    @pytest.mark.parametrize("name", ["megengine", "onnx", slow("onnx-avx2")])
    def test_every_target_runs_in_the_engine_that_is_chosen_for_it(self, name: str) -> None:
        target = TARGETS_BY_NAME[name]
        classifier = make_random_classifier("shufflenet_v1_x0_5_g3", Mode.QUANTIZED, image_size=SIZE, target=target)
        chosen = attach_backend(classifier, AUTO, threads=1)
        wanted = "MegEngine Lite" if target is MEGENGINE else "native" if LEVELS[0].runs_here() else "OpenVINO"
        assert chosen.origin.rpartition("; in ")[2].startswith(wanted)
        assert chosen.logits(IMAGES).shape == (len(IMAGES), 1000)

    def test_each_reads_its_files(self) -> None:
        assert choose_backend(Path("a.onnx")).key == "openvino"
        assert choose_backend(Path("a.megengine")).key == "lite"
        with pytest.raises(InputError, match="choose auto, native, openvino, onnxruntime, library, lite"):
            choose_backend(Path("a.onnx"), "tensorrt")
        with pytest.raises(InputError, match=r"does not read \.onnx"):
            choose_backend(Path("a.onnx"), "lite")
        with pytest.raises(InputError, match=r"\.onnx or \.so or \.megengine"):
            choose_backend(Path("a.tflite"))

    def test_the_native_engine_is_chosen_where_it_is_the_fastest_and_nothing_is_compiled_for_that(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("MGQ_NATIVE_CACHE", str(folder / "cache"))
        monkeypatch.setattr("mgq.runtime.native.compile_program", lambda *_: pytest.fail("compiled"))
        path = written("resnet18", ONNX, folder)
        for level in LEVELS:
            monkeypatch.setattr("mgq.export.native.cpu.get_level", lambda _, level=level: level)
            assert choose_backend(path).key == ("native" if level is LEVELS[0] else "openvino")

    def test_what_the_native_engine_does_not_run_goes_to_the_next(self, folder: Path) -> None:
        assert choose_backend(written("resnet18", None, folder)).key == "openvino"

    def test_without_the_others_the_native_engine_runs_what_it_can_on_any_processor(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("mgq.export.native.cpu.get_level", lambda _: LEVELS[-1])
        absent = ("openvino", "onnxruntime")
        monkeypatch.setattr("mgq.runtime.registry.find_spec", lambda name: None if name in absent else object())
        assert choose_backend(written("resnet18", ONNX, folder)).key == "native"
        with pytest.raises(InputError, match=r"OpenVINO is not installed: pip install 'mgq\[deploy\]'"):
            choose_backend(written("resnet18", None, folder))

    def test_what_is_not_installed_says_how_to_get_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("mgq.runtime.registry.find_spec", lambda name: None if name == "openvino" else object())
        assert choose_backend(Path("a.onnx")).key == "onnxruntime"
        with pytest.raises(InputError, match=r"pip install 'mgq\[deploy\]'"):
            choose_backend(Path("a.onnx"), "openvino")

    def test_more_threads_than_cores_are_refused(self, folder: Path) -> None:
        for engine in BACKENDS:
            if engine.suffix == ".onnx":
                with pytest.raises(InputError, match="cores"):
                    engine.load(written("resnet18", ONNX, folder), 10_000)

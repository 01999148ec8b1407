"""Layers kept in float among int8 ones: their weights are exact, wherever the network goes."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

import megengine.module as M
import numpy as np
import onnx
import pytest
from megengine import Tensor
from megengine.autodiff import GradManager
from megengine.core.tensor.dtype import qint8
from megengine.module.conv_bn import _ConvBnActivation2d
from megengine.module.qat import QATModule
from megengine.quantization.quantize import disable_fake_quant, enable_fake_quant
from onnx import numpy_helper

from mgq.engine.classifier.dump import dump_classifier
from mgq.engine.classifier.open import Classifier, classifier_from
from mgq.engine.classifier.parity import measure_layer_parity
from mgq.errors import InputError
from mgq.export.onnx.writer import write_onnx
from mgq.graph.layer_graph import Convolution
from mgq.graph.network_reader import graph_of
from mgq.graph.rewrites import REWRITES
from mgq.ptq.calibrate import calibrate_network
from mgq.ptq.quantize import quantize, refuse_without_ranges
from mgq.ptq.steps import CorrectBias, RangesFromImages
from mgq.quantization.float_layers import FloatWeights, keep_in_float, list_float_layers
from mgq.quantization.modes import Mode, mode_of, to_mode
from mgq.quantization.option_names import MSE
from mgq.quantization.qat import Phase, plain_qat, prepare_qat, set_phase
from mgq.quantization.qat_layers import (
    find_quantized_layers,
    fold_weight,
    is_float_layer,
    observe_weights,
    quantize_weight,
)
from mgq.quantization.targets import MEGENGINE, ONNX, TARGETS, Target, target_of
from mgq.runtime.megengine import EagerRuntime, TracedRuntime
from mgq.runtime.megengine_lite import LiteRuntime
from mgq.runtime.registry import BACKENDS
from mgq.weights.checkpoint import FORMAT, KEY, CheckpointInfo, info_of
from mgq.zoo.network_state import state_of
from mgq.zoo.weight_loading import read_weights
from tests.conftest import (
    EACH_FAMILY,
    SIZE,
    classifier_of,
    logits_of,
    one_line_about,
    same_state,
    smooth_images,
    trio_of,
)
from tests.fakes.measured_ranges import simulate, steps_by

IMAGES = smooth_images(2, seed=5)


def convolutions_of(network: M.Module) -> list[str]:
    return [name for name, layer in find_quantized_layers(network).items() if isinstance(layer, _ConvBnActivation2d)]


def every_third(network: M.Module) -> list[str]:
    """The stem among them, dense and depthwise convolutions, with a ReLU and without."""
    return convolutions_of(network)[::3]


@cache
def simulated(arch: str, target: Target) -> M.Module:
    network = trio_of(arch).normal
    return simulate(network, smooth_images(4), (RangesFromImages(MSE), CorrectBias()), target)


def keeping(network: M.Module, names: Iterable[str]) -> M.Module:
    """A copy of ``network``, mode ``qat``, in evaluation state."""
    mixed = to_mode(network, Mode.QAT)
    keep_in_float(mixed, names)
    mixed.eval()
    return mixed


@cache
def mixed_classifier(arch: str, mode: Mode = Mode.QUANTIZED) -> Classifier:
    fake = keeping(trio_of(arch).qat, every_third(trio_of(arch).qat))
    network = to_mode(fake, Mode.QUANTIZED) if mode is Mode.QUANTIZED else fake
    return replace(classifier_of(arch, mode), network=network, fake_quantized=fake)


def quantized_weights_alone(network: M.Module) -> M.Module:
    """``network`` itself, whose activations are no longer rounded."""
    for layer in find_quantized_layers(network).values():
        layer.act_fake_quant.disable()
    return network


@pytest.mark.parametrize("arch", EACH_FAMILY)
def test_with_all_convolutions_kept_weights_are_those_of_float(arch: str) -> None:
    trio = trio_of(arch)
    wanted = logits_of(trio.normal, IMAGES)
    int8 = logits_of(quantized_weights_alone(to_mode(trio.qat, Mode.QAT)), IMAGES)
    mixed = quantized_weights_alone(keeping(trio.qat, convolutions_of(trio.qat)))
    found = logits_of(mixed, IMAGES)
    assert np.abs(found - wanted).max() < 1e-4 * np.abs(wanted).max()
    assert np.abs(int8 - wanted).max() > 1e-2 * np.abs(wanted).max()


@pytest.mark.parametrize("arch", ["resnet18", "efficientnet_lite0"])
def test_with_all_convolutions_kept_answers_are_nearer_to_float(arch: str) -> None:
    trio = trio_of(arch)
    wanted = logits_of(trio.normal, smooth_images(4))
    mixed = keeping(trio.qat, convolutions_of(trio.qat))
    errors = [np.abs(logits_of(network, smooth_images(4)) - wanted).mean() for network in (mixed, trio.qat)]
    assert errors[0] < errors[1]


@pytest.mark.parametrize("arch", EACH_FAMILY)
@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_kept_layers_are_known_and_so_is_the_target(arch: str, target: Target) -> None:
    network = to_mode(trio_of(arch).normal, Mode.QAT, target)
    assert list_float_layers(network) == ()
    names = convolutions_of(network)
    keep_in_float(network, reversed(names[1:4]))
    keep_in_float(network, [names[1]])
    assert list_float_layers(network) == tuple(names[1:4])
    assert {name for name, layer in network.named_modules() if is_float_layer(layer)} == set(names[1:4])
    keep_in_float(network, names)
    assert list_float_layers(network) == tuple(names)
    assert target_of(network) is target


def test_nothing_that_is_switched_quantizes_a_kept_layer() -> None:
    network = keeping(trio_of("resnet18").qat, every_third(trio_of("resnet18").qat))
    name = every_third(network)[1]
    layer = find_quantized_layers(network)[name]
    before = logits_of(network, IMAGES)
    disable_fake_quant(network)
    observe_weights(network)
    set_phase(network, Phase.OBSERVE)
    enable_fake_quant(network)
    refuse_without_ranges(network)
    assert np.array_equal(quantize_weight(layer).numpy(), fold_weight(layer).numpy())
    plain = plain_qat(network)
    assert np.array_equal(logits_of(plain, IMAGES), before)
    assert list_float_layers(plain) == list_float_layers(network) == tuple(every_third(network))


@pytest.mark.parametrize("observer", ["ema", "lsq"])
def test_a_kept_layer_is_trained_in_float(observer: str) -> None:
    network = prepare_qat(trio_of("resnet18").qat, observer)
    names = every_third(network)
    keep_in_float(network, names)
    network = prepare_qat(network, observer)
    for phase in (Phase.QUANTIZE, Phase.FREEZE_OBSERVERS):
        set_phase(network, phase)
        layer = find_quantized_layers(network)[names[1]]
        with GradManager().attach(network.parameters()) as gradients:
            logits = network(Tensor(IMAGES.astype(np.float32) - 128))
            gradients.backward((logits * logits).mean())
        assert np.abs(layer.conv.weight.grad.numpy()).max() > 0
        for parameter in network.parameters():
            parameter.grad = None
    assert list_float_layers(plain_qat(network)) == tuple(names)


@pytest.mark.parametrize("arch", EACH_FAMILY)
def test_a_mixed_int8_network_runs_its_kept_layers_in_float(arch: str) -> None:
    classifier = mixed_classifier(arch)
    kept = [name for name, module in classifier.network.named_modules() if isinstance(module, FloatWeights)]
    assert kept == every_third(trio_of(arch).qat)
    assert mode_of(classifier.network) is Mode.QUANTIZED
    assert classifier.fake_quantized is not None
    differing = steps_between(classifier.fake_quantized, kept)
    assert max(steps for steps, _ in differing) <= 1
    assert sum(share for _, share in differing) / len(differing) < 1e-4


def steps_between(fake: M.Module, names: list[str]) -> list[tuple[float, float]]:
    """How far the layers ``names`` in int8 are from fake quantization, given the same input: steps, and share."""
    found = []

    def hook(layer: QATModule, inputs: tuple[Tensor], output: Tensor) -> None:
        (source,) = inputs
        integers = source.astype(qint8(float(source.qparams.scale.numpy())))
        real = FloatWeights.from_qat_module(layer)(integers).astype("float32").numpy()
        scale = layer.act_observer.get_qparams().scale.numpy()
        steps = np.abs(np.rint(real / scale) - np.rint(output.numpy() / scale))
        found.append((float(steps.max()), float((steps > 0).mean())))

    layers = find_quantized_layers(fake)
    hooks = [layers[name].register_forward_hook(hook) for name in names]
    try:
        logits_of(fake, IMAGES)
    finally:
        for handle in hooks:
            handle.remove()
    return found


@pytest.mark.parametrize("arch", EACH_FAMILY)
def test_a_megengine_file_of_it_answers_as_the_network_in_memory(arch: str, tmp_path: Path) -> None:
    classifier = mixed_classifier(arch)
    path = tmp_path / "net.megengine"
    dumped = dump_classifier(classifier, path)
    assert "to the bit" in dumped.checked
    wanted = EagerRuntime(classifier.network).run(IMAGES[:1])
    # Where float sums are rounded otherwise, a step in one layer is seen behind it.
    allowed = 0.1 * np.abs(wanted).max()
    for runtime in (TracedRuntime(classifier.network), LiteRuntime(path)):
        assert np.abs(runtime.run(IMAGES[:1]) - wanted).max() <= allowed
    full = dump_classifier(classifier_of(arch, Mode.QUANTIZED), tmp_path / "int8.megengine")
    layers = find_quantized_layers(trio_of(arch).qat)
    kept = [layers[name] for name in every_third(trio_of(arch).qat)]
    assert dumped.size - full.size > 2.5 * sum(fold_weight(layer).numpy().size for layer in kept)


@pytest.mark.parametrize("arch", EACH_FAMILY)
@pytest.mark.parametrize("target", [MEGENGINE, ONNX], ids=lambda target: target.name)
def test_an_onnx_file_of_it_gives_each_layer_the_integers_of_fake_quantization(
    arch: str, target: Target, tmp_path: Path
) -> None:
    network = simulated(arch, target)
    network = keeping(network, every_third(network))
    path = tmp_path / "net.onnx"
    write_onnx(network, path, image_size=SIZE, batch=None, provenance={}, rewrites=tuple(REWRITES))
    for engine in BACKENDS:
        if engine.suffix == ".onnx" and engine.is_installed and engine.shows_layers:
            found = measure_layer_parity(engine, path, network, IMAGES)
            assert len(found) > len(every_third(network))
            assert max(entry.largest for entry in found) <= 1
            assert sum(entry.share * entry.values for entry in found) <= 1e-3 * sum(entry.values for entry in found)


def test_the_graph_and_the_onnx_file_have_float_weights_of_kept_layers_alone(tmp_path: Path) -> None:
    network = simulated("mobilenet_v2", ONNX)
    names = every_third(network)
    network = keeping(network, names)
    nodes = [node for node in graph_of(network, SIZE).nodes if isinstance(node, Convolution)]
    assert {node.output for node in nodes if node.integers is None and node.scales is None} == set(names)
    path = tmp_path / "net.onnx"
    report = write_onnx(network, path, image_size=SIZE, batch=1, provenance={})
    model = onnx.load(str(path))
    types = {entry.name: numpy_helper.to_array(entry).dtype for entry in model.graph.initializer}
    weights = {name: kind for name, kind in types.items() if name.endswith("/weight")}
    assert weights == {f"{name}/weight": np.float32 for name in names}
    makers = {output: node.op_type for node in model.graph.node for output in node.output}
    # Behind a DequantizeLinear ONNX Runtime would make int8 of float weights by itself.
    sources = {makers[node.input[0]] for node in model.graph.node if node.output[0] in {f"{n}/sum" for n in names}}
    assert sources <= {"Cast", "Sub"}
    sizes = {node.output: node.weight.size for node in nodes}
    head = quantized_head_size(network)
    assert report.parameters == sum(sizes.values()) - sum(sizes[name] for name in names) + head


def quantized_head_size(network: M.Module) -> int:
    return next(int(np.prod(module.weight.shape)) for module in network.modules() if isinstance(module, M.Linear))


@pytest.mark.parametrize("arch", EACH_FAMILY)
@pytest.mark.parametrize("mode", [Mode.QAT, Mode.QUANTIZED])
def test_a_checkpoint_brings_the_same_network_back_to_the_bit(arch: str, mode: Mode, tmp_path: Path) -> None:
    classifier = mixed_classifier(arch, mode)
    path = tmp_path / "net.safetensors"
    classifier.write_checkpoint(path)
    weights = read_weights(path)
    assert weights.info is not None and weights.info.float_layers == tuple(every_third(trio_of(arch).qat))
    read = classifier_from(weights, mode)
    assert classifier.fake_quantized is not None and read.fake_quantized is not None
    assert read.info().float_layers == weights.info.float_layers
    assert same_state(state_of(read.fake_quantized), state_of(classifier.fake_quantized))
    assert read.logits(IMAGES).tobytes() == classifier.logits(IMAGES).tobytes()


def test_a_checkpoint_of_the_other_target_keeps_them_too(tmp_path: Path) -> None:
    network = keeping(simulated("resnet18", ONNX), convolutions_of(simulated("resnet18", ONNX)))
    classifier = replace(classifier_of("resnet18", Mode.QAT), network=network, fake_quantized=network)
    path = tmp_path / "net.safetensors"
    classifier.write_checkpoint(path)
    read = classifier_from(read_weights(path), Mode.QAT)
    assert read.target is ONNX and read.info().float_layers == tuple(convolutions_of(network))
    assert read.logits(IMAGES).tobytes() == classifier.logits(IMAGES).tobytes()


def test_a_checkpoint_without_the_entry_has_none() -> None:
    body = described()
    del body["float_layers"]
    info = info_of({KEY: json.dumps(body)}, "net")
    assert info is not None and info.float_layers == ()


@pytest.mark.parametrize("value", ["conv1", None, 3, ["conv1", 3], {"conv1": 1}])
def test_damaged_names_in_a_checkpoint_are_refused(value: object) -> None:
    with pytest.raises(InputError, match="damaged metadata"):
        info_of({KEY: json.dumps({**described(), "float_layers": value})}, "net")


def described() -> dict[str, Any]:
    info = CheckpointInfo("resnet18", "qat", ("a", "b"), SIZE, "test", float_layers=("conv1",))
    return {"format": FORMAT, **asdict(info)}


@pytest.mark.parametrize("name", ["nothing", "fc", "quant", "layer1.0.add", ""])
def test_what_cannot_be_kept_is_refused_in_one_line(name: str) -> None:
    network = to_mode(trio_of("resnet18").qat, Mode.QAT)
    with pytest.raises(InputError) as caught:
        keep_in_float(network, [convolutions_of(network)[0], name])
    assert one_line_about(str(caught.value), f"'{name}'")
    assert list_float_layers(network) == ()


def test_only_a_fake_quantized_network_keeps_layers() -> None:
    name = convolutions_of(trio_of("resnet18").qat)[0]
    for network in (trio_of("resnet18").normal, trio_of("resnet18").quantized):
        with pytest.raises(InputError):
            keep_in_float(network, [name])


@pytest.mark.parametrize("method", ["min-max", "easyquant"])
def test_layers_are_calibrated_and_quantized_in_one_go_around_kept_ones(method: str) -> None:
    network = trio_of("shufflenet_v1_x0_5_g3").normal
    names, steps = every_third(to_mode(network, Mode.QAT)), (*steps_by(method), CorrectBias())
    found, ranges = calibrate_network(network, smooth_images(4), "", "", steps, float_layers=names)
    assert set(ranges.ranges) >= set(names) and not set(ranges.weight_ranges) & set(names)
    assert list_float_layers(found) == tuple(names)
    assert logits_of(quantize(found), IMAGES).shape == (2, 10)

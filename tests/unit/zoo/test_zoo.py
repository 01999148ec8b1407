"""The zoo's networks: their names, figures, input sizes and ReLU6, in the three modes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import megengine as mge
import megengine.functional as F
import megengine.jit as jit
import megengine.module as M
import numpy as np
import numpy.typing as npt
import pytest
from megengine import Tensor
from megengine.core.tensor import dtype as quantized_dtypes
from megengine.module.conv import _ConvNd
from megengine.utils.network import Network

import mgq
from mgq.errors import FailureError, InputError
from mgq.quantization.modes import Mode, mode_of, to_mode
from mgq.quantization.relu6 import QatConvBnRelu6, QuantizedConvBnRelu6
from mgq.zoo.layers import ConvBnRelu6, scale_channels, without_initialization
from mgq.zoo.network_state import state_of
from mgq.zoo.registry import create_model, spec_of, specs
from tests.conftest import CLASSES, EACH_FAMILY, Trio, blank, filled, logits_of, one_line_about, smooth_images, trio_of
from tests.fakes.places import ROOT

# The public example's checkpoints: number of entries, and SHA-256 of the sorted compact JSON of {name: shape}.
CHECKPOINT_NAMES = {
    ("mobilenet_v2", "normal"): (262, "d2865ca857dbc7fea7513c61224b7b781ccf2971cb4727e4c62592d69adb58f1"),
    ("mobilenet_v2", "qat"): (646, "5cc16fa5fe9ac4b149d0913d423a2cce5913282ccff862b2b932f47f0a14d384"),
    ("resnet18", "normal"): (102, "12108189fbfbe50b55520e76d4ddd32ec9852a9ced4bbb477aca6a53d061c7a1"),
    ("resnet18", "qat"): (258, "df02c4544957aba36e0f5e729823975840be7cf5ebcab0bd1d1ffd5723af131c"),
    ("resnet50", "normal"): (267, "6bbb7cb0cc0e6a9350452145c132cc26a6e0b5d1e43340efcf9d0706630112f3"),
    ("resnet50", "qat"): (653, "2c38078eb88add55377c00f6e3410308232fabe87910b50e0643146b2d4d2a80"),
    ("shufflenet_v1_x0_5_g3", "normal"): (261, "9d33a0ec95031db06adf6918a66dbe70e1c332ed2fd2c446e10ad145e3bff83a"),
    ("shufflenet_v1_x0_5_g3", "qat"): (641, "23e338ca2a4020e218cb427ef2e2fdf079916769144bfb178c0b3982257500d0"),
    ("shufflenet_v1_x1_0_g3", "normal"): (261, "3bf575928ffc34873e4dfa7d5ffe200426047e9e0abea7fc6e1ecc5eb1deee28"),
    ("shufflenet_v1_x1_0_g3", "qat"): (641, "5bccadde726ef36e1353cebf7bcb0111e917b0579a6d81c7ed47653d0ad008f3"),
    ("shufflenet_v1_x1_5_g3", "normal"): (261, "f7b869c1264d11ddbd0b1f140464bba2dab4fb4bbb5cb04b388502068c8d6797"),
    ("shufflenet_v1_x1_5_g3", "qat"): (641, "760c85e43914acdeb9782369893602c928642ded643008a8a586e472c1d84510"),
    ("shufflenet_v1_x2_0_g3", "normal"): (261, "87af2cbd6db25df3134a31edc3434d98479e5008dbbd58037caef26f59e5391c"),
    ("shufflenet_v1_x2_0_g3", "qat"): (641, "e0221a0cf08eb3d74d49d7c2c9118de89e554352c160ff31f9c8723fbafafe27"),
}
OTHERS_NAMES = ROOT.parent / "shared" / "checkpoints" / "names.json"


@dataclass(frozen=True)
class Facts:
    """What is read off a network with 1,000 classes; built once for all tests."""

    shapes: dict[str, dict[str, tuple[int, ...]]]  # by mode
    parameters: int
    convolution_macs: int  # for a picture of 32x32
    classifier_macs: int


@cache
def facts_of(arch: str) -> Facts:
    network = blank(arch, 1000)
    counted = macs(network, 32)
    shapes = {"normal": shapes_in(network)}
    parameters = sum(int(np.prod(p.shape)) for p in network.parameters())
    if (arch, "qat") in CHECKPOINT_NAMES:
        shapes["qat"] = shapes_in(to_mode(network, Mode.QAT, in_place=True))
    return Facts(shapes, parameters, *counted)


def macs(network: M.Module, size: int) -> tuple[int, int]:
    """Multiply-accumulates of all convolutions, and of all classifiers, counted while one picture runs."""
    counts = {M.Conv2d: 0, M.Linear: 0}

    def count(module: M.Module, _: Any, output: Tensor) -> None:
        kind = M.Conv2d if isinstance(module, M.Conv2d) else M.Linear
        counts[kind] += int(np.prod(output.shape)) * int(np.prod(module.weight.shape[-3 if kind is M.Conv2d else -1 :]))

    hooks = [m.register_forward_hook(count) for m in network.modules() if isinstance(m, M.Conv2d | M.Linear)]
    network(Tensor(np.zeros((1, 3, size, size), np.float32))).numpy()
    for hook in hooks:
        hook.remove()
    return counts[M.Conv2d], counts[M.Linear]


def shapes_in(network: M.Module) -> dict[str, tuple[int, ...]]:
    return {name: value.shape for name, value in state_of(network).items()}


def shapes_of(arch: str, mode: str) -> dict[str, tuple[int, ...]]:
    return facts_of(arch).shapes[mode]


def digest(shapes: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(shapes, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


class TestNames:
    @pytest.mark.parametrize(("arch", "mode"), CHECKPOINT_NAMES)
    def test_names_and_shapes_are_those_of_the_public_example_s_checkpoints(self, arch: str, mode: str) -> None:
        shapes = shapes_of(arch, mode)
        assert (len(shapes), digest(shapes)) == CHECKPOINT_NAMES[arch, mode]

    @pytest.mark.parametrize(
        ("arch", "mode", "name", "shape"),
        [
            ("resnet18", "normal", "conv_bn_relu1.conv.weight", (64, 3, 7, 7)),
            ("resnet18", "normal", "layer1.0.conv_bn_relu1.conv.weight", (64, 64, 3, 3)),
            ("resnet18", "normal", "layer2.0.downsample.conv.weight", (128, 64, 1, 1)),
            ("resnet18", "normal", "layer1.0.conv_bn2.bn.running_mean", (64,)),
            ("resnet18", "qat", "quant.act_observer.min_val", ()),
            ("resnet18", "qat", "layer1.0.add.act_observer.runtime_momentum", ()),
            ("resnet50", "normal", "layer1.0.conv_bn3.conv.weight", (256, 64, 1, 1)),
            ("resnet50", "normal", "fc.bias", (1000,)),
            ("mobilenet_v2", "normal", "features.1.conv.0.conv.weight", (32, 1, 1, 3, 3)),
            ("mobilenet_v2", "normal", "features.18.bn.bias", (1280,)),
            ("mobilenet_v2", "normal", "classifier.1.weight", (1000, 1280)),
            ("mobilenet_v2", "qat", "features.1.add.act_observer.max_val", ()),
            ("shufflenet_v1_x1_5_g3", "normal", "first_conv.0.conv.weight", (24, 3, 3, 3)),
            ("shufflenet_v1_x1_5_g3", "normal", "features.1.branch_main_1.0.conv.weight", (3, 30, 120, 1, 1)),
            ("shufflenet_v1_x1_5_g3", "normal", "features.4.branch_proj.conv.weight", (720, 360, 1, 1)),
            ("shufflenet_v1_x1_5_g3", "normal", "classifier.0.weight", (1000, 1440)),
        ],
    )
    def test_a_name_of_the_example_stands_for_the_same_shape(
        self, arch: str, mode: str, name: str, shape: tuple[int, ...]
    ) -> None:
        assert shapes_of(arch, mode)[name] == shape

    def test_shufflenet_s_classifier_has_no_bias(self) -> None:
        assert "classifier.0.bias" not in shapes_of("shufflenet_v1_x1_5_g3", "normal")

    @pytest.mark.parametrize(
        ("arch", "mode"), [("resnet18", "qat"), ("mobilenet_v2", "normal"), ("shufflenet_v1_x0_5_g3", "normal")]
    )
    def test_a_pickle_of_exactly_these_names_loads_strictly(self, arch: str, mode: str, tmp_path: Path) -> None:
        shapes = shapes_of(arch, mode)
        assert digest(shapes) == CHECKPOINT_NAMES[arch, mode][1]
        path = tmp_path / "zeros.pkl"
        mge.save({name: np.zeros(shape, np.float32) for name, shape in shapes.items()}, str(path))

        network = to_mode(blank(arch, 1000), Mode(mode), in_place=True)
        weights = mgq.load_weights(network, path)

        assert (weights.arch, weights.mode, weights.classes) == (arch, mode, 1000)
        assert all(not value.any() for value in state_of(network).values())

    @pytest.mark.skipif(not OTHERS_NAMES.is_file(), reason="the list of the example's names is not beside the project")
    def test_the_list_itself_agrees(self) -> None:
        listed = json.loads(OTHERS_NAMES.read_text())
        found = {(arch, mode) for arch, modes in listed.items() for mode in modes}
        assert found == set(CHECKPOINT_NAMES)
        for arch, mode in found:
            ours = {name: list(shape) for name, shape in shapes_of(arch, mode).items()}
            assert ours == listed[arch][mode]


class TestFigures:
    def test_the_zoo_has_the_fifteen_networks_each_once(self) -> None:
        shuffle = [f"shufflenet_v1_x{w}_g{g}" for g in (3, 8) for w in ("0_5", "1_0", "1_5", "2_0")]
        lite = [f"efficientnet_lite{i}" for i in range(3)]
        own = [name for name, spec in specs().items() if not spec.is_described]  # imported ones are known, too
        assert own == ["resnet18", "resnet34", "resnet50", "mobilenet_v2", *shuffle, *lite]

    @pytest.mark.parametrize("arch", specs())
    def test_registered_figures_are_those_of_the_network(self, arch: str) -> None:
        facts, spec = facts_of(arch), spec_of(arch)
        # Every map of a 224-pixel picture is 7 times as wide and as high as that of a 32-pixel one.
        assert 49 * facts.convolution_macs + facts.classifier_macs == spec.macs
        assert facts.parameters == spec.parameters
        assert spec.marker in shapes_of(arch, "normal")
        assert shapes_of(arch, "normal")[spec.head][0] == 1000

    @pytest.mark.parametrize("arch", ["resnet18", "efficientnet_lite0"])
    def test_registered_macs_are_counted_at_224_pixels(self, arch: str) -> None:
        assert sum(macs(blank(arch, 1000), 224)) == spec_of(arch).macs

    def test_resnet18_has_the_published_figures(self) -> None:
        spec = spec_of("resnet18")
        assert round(spec.macs / 1e9, 2) == 1.81
        assert spec.parameters == 11_689_512  # torchvision's

    @pytest.mark.parametrize(
        ("arch", "parameters"),
        # As torchvision and the EfficientNet-Lite packages have them; the stride-2 kernels of ours are two larger.
        [("resnet34", 21_797_672), ("resnet50", 25_557_032), ("mobilenet_v2", 3_504_872)],
    )
    def test_parameters_are_torchvision_s(self, arch: str, parameters: int) -> None:
        assert spec_of(arch).parameters == parameters

    def test_every_pretrained_file_has_a_mode_and_every_figure_a_source(self) -> None:
        for spec in specs().values():
            assert {c.mode for c in spec.checkpoints} in (set(), {"normal"}, {"normal", "qat"})
            assert spec.published is None or spec.published.source
            assert spec.image_size % 32 == 0


class TestSizes:
    @pytest.mark.parametrize(("height", "width"), [(32, 32), (64, 64), (96, 160)])
    def test_any_multiple_of_32_goes_in_in_every_mode(self, trio: Trio, height: int, width: int) -> None:
        images = smooth_images(2, height, width)
        for network in (trio.normal, trio.qat, trio.quantized):
            logits = logits_of(network, images)
            assert logits.shape == (2, CLASSES)
            assert logits.dtype == np.float32
            assert np.isfinite(logits).all()
            assert np.ptp(logits, axis=0).max() > 0  # the picture matters

    @pytest.mark.parametrize("arch", EACH_FAMILY)
    def test_any_number_of_classes_comes_out(self, arch: str) -> None:
        # The tests above have 10 of them.
        network = blank(arch, classes=2)
        assert logits_of(network, smooth_images(1, 32, 32)).shape == (1, 2)
        to_mode(network, Mode.QUANTIZED, in_place=True)
        assert mode_of(network) is Mode.QUANTIZED
        assert logits_of(network, smooth_images(1, 32, 32)).shape == (1, 2)

    def test_an_image_has_the_same_answer_alone_and_in_a_batch(self, trio: Trio) -> None:
        images = smooth_images(3)
        together, alone = logits_of(trio.quantized, images), logits_of(trio.quantized, images[1:2])
        np.testing.assert_allclose(together[1], alone[0], rtol=1e-4, atol=1e-5 * np.abs(alone).max())


class TestCreateModel:
    def test_makes_a_float_network_in_training_state(self) -> None:
        network = mgq.create_model("shufflenet_v1_x0_5_g3", classes=7)
        assert mode_of(network) is Mode.NORMAL
        assert network.training
        assert state_of(network)["classifier.0.weight"].shape == (7, 480)

    def test_draws_weights_of_the_size_that_keeps_activations_even(self) -> None:
        state = state_of(create_model("resnet18", 10))
        weight = state["layer3.0.conv_bn2.conv.weight"]
        assert np.isclose(weight.std(), np.sqrt(2 / (256 * 9)), rtol=0.02)  # fan out
        assert np.isclose(state["fc.weight"].std(), 0.01, rtol=0.1)
        assert not state["fc.bias"].any()

    @pytest.mark.parametrize(
        ("written", "meant"),
        [("resnet_18", "resnet18"), ("mobilenetv2", "mobilenet_v2"), ("efficientnet-lite0", "efficientnet_lite0")],
    )
    def test_an_unknown_architecture_suggests_the_nearest(self, written: str, meant: str) -> None:
        with pytest.raises(InputError) as error:
            create_model(written)
        assert one_line_about(str(error.value), f"'{written}'", f"did you mean {meant}?", "mgq models")

    def test_a_name_like_no_other_suggests_nothing(self) -> None:
        with pytest.raises(InputError) as error:
            create_model("qqq")
        assert one_line_about(str(error.value), "'qqq'", "mgq models")
        assert "did you mean" not in str(error.value)

    @pytest.mark.parametrize(
        ("arch", "known"), [("resnet18", "its options: none"), ("mobilenet_v2", "its options: width, activation")]
    )
    def test_an_unknown_option_is_refused_with_the_known_ones(self, arch: str, known: str) -> None:
        with pytest.raises(InputError) as error:
            create_model(arch, colour="red")
        assert one_line_about(str(error.value), arch, "'colour'", known)

    def test_an_activation_that_there_is_not_is_refused_with_those_that_there_are(self) -> None:
        with pytest.raises(InputError) as error:
            create_model("mobilenet_v2", activation="gelu")
        assert one_line_about(str(error.value), "gelu", "relu, relu6")

    @pytest.mark.parametrize("classes", [1, 0, -3])
    def test_fewer_than_two_classes_are_refused(self, classes: int) -> None:
        with pytest.raises(InputError) as error:
            create_model("resnet18", classes)
        assert one_line_about(str(error.value), "at least 2 classes", str(classes))

    @pytest.mark.parametrize(("width", "stem", "first", "last"), [(0.35, 16, 8, 1280), (1.4, 48, 24, 1792)])
    def test_mobilenet_s_width_scales_its_channels_as_the_paper_does(
        self, width: float, stem: int, first: int, last: int
    ) -> None:
        state = state_of(blank("mobilenet_v2", width=width))
        assert state["features.0.conv.weight"].shape[0] == stem
        assert state["features.1.conv.1.conv.weight"].shape[0] == first
        assert state["features.18.conv.weight"].shape[0] == last

    @pytest.mark.parametrize(
        ("channels", "scaled"), [(11.2, 16), (16, 16), (8.4, 8), (1, 8), (26.4, 24), (44.8, 48), (123.2, 120)]
    )
    def test_scaled_channels_are_multiples_of_8_never_a_tenth_below(self, channels: float, scaled: int) -> None:
        assert scale_channels(channels) == scaled

    def test_initialization_comes_back_even_after_an_error(self) -> None:
        before = M.Linear.reset_parameters, _ConvNd.reset_parameters
        with pytest.raises(InputError), without_initialization():
            assert not state_of(create_model("resnet18", 10))["fc.weight"].any()
            create_model("none")
        assert (M.Linear.reset_parameters, _ConvNd.reset_parameters) == before
        assert M.Linear(4, 3).weight.numpy().any()


class Clamped(M.Module):  # type: ignore[misc]
    """Input stub, one convolution of a ``kind``, output stub."""

    def __init__(self, kind: type[M.Module]) -> None:
        super().__init__()
        self.quant = M.QuantStub()
        self.layer = kind(3, 8, 3, 1, 1, bias=False)
        self.dequant = M.DequantStub()

    def forward(self, x: Tensor) -> Tensor:
        return self.dequant(self.layer(self.quant(x)))


def clamped(kind: type[M.Module] = ConvBnRelu6, gain: float = 1.0) -> M.Module:
    network = filled(Clamped(kind))
    network.layer.conv.weight *= gain
    network.eval()
    return network


def in_qat(network: M.Module, highest: float = 6.0) -> M.Module:
    """``network`` in mode ``qat``, ready for int8, with the range 0..``highest`` behind its layer."""
    qat = to_mode(network, Mode.QAT)
    for observer, low, high in (
        (qat.layer.act_observer, 0.0, highest),
        (qat.layer.weight_observer, -1.0, 1.0),
    ):
        observer.min_val[...] = low
        observer.max_val[...] = high
    return qat


def outputs_behind_relu6(network: M.Module, images: npt.NDArray[np.uint8]) -> Iterator[npt.NDArray[np.float32]]:
    kinds = (ConvBnRelu6, QatConvBnRelu6, QuantizedConvBnRelu6)
    seen: list[Tensor] = []
    hooks = [
        module.register_forward_hook(lambda _, __, output: seen.append(output))
        for module in network.modules()
        if isinstance(module, kinds)
    ]
    logits_of(network, images)
    for hook in hooks:
        hook.remove()
    for output in seen:
        yield output.astype("float32").numpy()


def operators(network: M.Module, path: Path) -> list[str]:
    """The kinds of operators in the dumped graph of ``network``, in order."""
    traced = jit.trace(lambda x: network(x), symbolic=True, capture_as_const=True)
    traced(Tensor(np.zeros((1, 3, 32, 32), np.float32)))
    traced.dump(str(path), optimize_for_inference=False)
    return [type(operator).__name__ for operator in Network.load(str(path)).all_oprs]


class TestRelu6:
    @pytest.mark.parametrize("mode", Mode)
    def test_no_value_behind_a_relu6_is_ever_above_6(self, mode: Mode) -> None:
        trio = trio_of("efficientnet_lite0")
        network = {Mode.NORMAL: trio.normal, Mode.QAT: trio.qat, Mode.QUANTIZED: trio.quantized}[mode]
        # Hard black and white, such as the calibration never saw.
        images = np.random.default_rng(0).choice(np.array([0, 255], np.uint8), (2, 3, 64, 64))
        outputs = list(outputs_behind_relu6(network, images))
        assert len(outputs) == 1 + 1 + 15 * 2 + 1  # stem, first block, the others, head
        assert all(output.min() >= 0 and output.max() <= 6 for output in outputs)
        assert max(output.max() for output in outputs) > 5.9

    def test_mobilenet_has_relu6_where_it_is_asked_for_and_only_there(self) -> None:
        kinds = {a: [type(m) for m in blank("mobilenet_v2", activation=a).modules()] for a in ("relu", "relu6")}
        assert (kinds["relu"].count(ConvBnRelu6), kinds["relu"].count(M.ConvBnRelu2d)) == (0, 35)
        assert (kinds["relu6"].count(ConvBnRelu6), kinds["relu6"].count(M.ConvBnRelu2d)) == (35, 0)

    def test_int8_is_relu6_by_saturation(self) -> None:
        network = clamped(gain=8)
        quantized = to_mode(in_qat(network), Mode.QUANTIZED)
        images = smooth_images(2)
        ours = logits_of(quantized, images)

        # The same convolution on the same integers, its sum clamped in float and rounded to the step of 6 / 127.5.
        layer, step = quantized.layer, 6 / 127.5
        weight_step = quantized_dtypes.get_scale(layer.weight.dtype)
        weight = Tensor(layer.weight.astype("float32").numpy())
        bias = np.rint(layer.bias.numpy() / weight_step) * weight_step
        sums = F.conv2d(Tensor(images.astype(np.float32) - 128), weight, Tensor(bias), 1, 1)
        expected = np.floor(np.clip(sums.numpy(), 0, 6) / step + 0.5)
        expected = np.minimum(expected, 127) * step

        assert (sums.numpy() > 6).mean() > 0.1
        assert np.abs(ours - expected).max() <= 1.01 * step
        assert (np.abs(ours - expected) > 0.5 * step).mean() < 1e-3  # ties alone
        assert np.isclose(ours.max(), 127 * step)

    def test_int8_has_no_operator_more_than_with_relu(self, tmp_path: Path) -> None:
        with_relu6 = to_mode(in_qat(clamped()), Mode.QUANTIZED)
        with_relu = to_mode(in_qat(clamped(M.ConvBnRelu2d)), Mode.QUANTIZED)
        found = operators(with_relu6, tmp_path / "6.mge")
        assert found == operators(with_relu, tmp_path / "r.mge")
        assert "ConvBiasForward" in found
        assert not any("Elemwise" in operator for operator in found)

    def test_conversion_refuses_a_scale_that_lets_more_than_6_through(self) -> None:
        with pytest.raises(FailureError) as error:
            to_mode(in_qat(clamped(), highest=6.5), Mode.QUANTIZED)
        assert one_line_about(str(error.value), "6.475", "ReLU6", "calibrate again")

    def test_conversion_takes_a_range_of_6_or_less(self) -> None:
        for highest in (6.0, 2.5):
            quantized = to_mode(in_qat(clamped(), highest), Mode.QUANTIZED)
            assert isinstance(quantized.layer, QuantizedConvBnRelu6)

    def test_a_plain_relu_may_go_beyond_6(self) -> None:
        quantized = to_mode(in_qat(clamped(M.ConvBnRelu2d, gain=8), highest=20.0), Mode.QUANTIZED)
        assert logits_of(quantized, smooth_images(1)).max() > 6

"""From float to int8: modes, the input's scale, ranges, and int8 layers that compute what fake quantization says."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import megengine.functional as F
import megengine.module as M
import megengine.module.qat as Q
import megengine.module.quantized as QD
import numpy as np
import numpy.typing as npt
import pytest
from megengine import Tensor
from megengine.core.tensor.dtype import get_scale, qint8
from megengine.quantization.observer import ExponentialMovingAverageObserver

import mgq
from mgq.errors import InputError
from mgq.ptq.calibrate import find_best_network
from mgq.ptq.presets import DEFAULT_PRESET, get_preset
from mgq.quantization import activation_ranges as ranges_module
from mgq.quantization.activation_ranges import FORMAT, ActivationRanges, apply_ranges, read_packaged_ranges, read_ranges
from mgq.quantization.batch_norm_folding import fold_batch_norms
from mgq.quantization.modes import Mode, mode_of, parse_mode, to_mode
from mgq.quantization.qat_layers import find_quantized_layers
from mgq.quantization.targets import MEGENGINE, UnitScaleObserver, get_target
from mgq.zoo.layers import ConvBnRelu6
from mgq.zoo.network_state import state_of
from mgq.zoo.registry import spec_of, specs
from mgq.zoo.weight_loading import load_state
from tests.conftest import (
    CLASSES,
    State,
    Trio,
    blank,
    logits_of,
    one_line_about,
    same_state,
    smooth_images,
    trio_of,
)
from tests.fakes.measured_ranges import measure_ranges

SHUFFLE = "shufflenet_v1_x0_5_g3"
Activations = dict[str, tuple[tuple[Tensor, ...], Tensor]]


def activations(network: M.Module, kind: type[M.Module], images: npt.NDArray[np.uint8]) -> Activations:
    """Name -> inputs and output, for the layers of a ``kind`` that ran."""
    seen: Activations = {}

    def keep(name: str) -> Any:
        return lambda _, inputs, output: seen.update({name: (inputs, output)})

    layers = [(n, m) for n, m in network.named_modules() if isinstance(m, kind)]
    hooks = [layer.register_forward_hook(keep(name)) for name, layer in layers]
    logits_of(network, images)
    for hook in hooks:
        hook.remove()
    return seen


def floats(tensor: Tensor) -> npt.NDArray[np.float32]:
    result: npt.NDArray[np.float32] = tensor.astype("float32").numpy()
    return result


class TestModes:
    def test_each_network_knows_its_mode(self, trio: Trio) -> None:
        assert [mode_of(n) for n in (trio.normal, trio.qat, trio.quantized)] == list(Mode)

    @pytest.mark.parametrize("word", ["normal", "qat", "quantized"])
    def test_a_mode_is_called_by_its_name(self, word: str) -> None:
        assert parse_mode(word).value == word

    def test_an_unknown_mode_is_refused_with_the_three(self) -> None:
        with pytest.raises(InputError) as error:
            parse_mode("int8")
        assert one_line_about(str(error.value), "'int8'", "normal, qat, quantized")

    def test_a_copy_goes_forward_and_the_network_stays(self) -> None:
        network = Small()
        network.eval()
        before = state_of(network)
        qat = to_mode(network, Mode.QAT)
        quantized = to_mode(qat, Mode.QUANTIZED)
        direct = to_mode(network, Mode.QUANTIZED)
        assert [mode_of(n) for n in (network, qat, quantized, direct)] == [
            Mode.NORMAL,
            Mode.QAT,
            Mode.QUANTIZED,
            Mode.QUANTIZED,
        ]
        assert same_state(state_of(network), before)
        qat.first.conv.weight *= 0
        assert network.first.conv.weight.numpy().any()

    def test_in_place_is_the_network_itself(self) -> None:
        network = Small()
        for mode in (Mode.QAT, Mode.QUANTIZED):
            assert to_mode(network, mode, in_place=True) is network
            assert mode_of(network) is mode

    @pytest.mark.parametrize("mode", Mode)
    def test_to_the_mode_it_is_in_is_a_copy(self, mode: Mode) -> None:
        network = to_mode(small(), mode)
        again = to_mode(network, mode)
        assert again is not network
        assert mode_of(again) is mode
        assert np.array_equal(logits_of(again, IMAGES), logits_of(network, IMAGES))

    @pytest.mark.parametrize(
        ("there", "back"), [(Mode.QAT, Mode.NORMAL), (Mode.QUANTIZED, Mode.QAT), (Mode.QUANTIZED, Mode.NORMAL)]
    )
    def test_no_way_leads_back(self, there: Mode, back: Mode) -> None:
        network = to_mode(small(), there)
        with pytest.raises(InputError) as error:
            to_mode(network, back)
        assert one_line_about(str(error.value), there.value, f"cannot go back to {back.value}")
        with pytest.raises(InputError, match=f"cannot go back to {back.value}"):
            mgq.quantize(network, IMAGES, mode=back)

    @pytest.mark.parametrize("training", [True, False])
    def test_training_state_is_kept_until_int8(self, training: bool) -> None:
        network = Small()
        network.train(training)
        qat = to_mode(network, Mode.QAT)
        assert qat.training is training
        assert all(module.training is training for module in qat.modules())
        assert not to_mode(qat, Mode.QUANTIZED).training

    def test_the_classifier_stays_in_float(self, trio: Trio) -> None:
        linear = [m for m in trio.quantized.modules() if isinstance(m, M.Linear)]
        assert [type(m) for m in linear] == [M.Linear]
        assert linear[0].weight.dtype == np.float32

    def test_weights_are_int8_without_minus_128_and_one_scale_a_layer(self, trio: Trio) -> None:
        layers = [m for m in trio.quantized.modules() if isinstance(m, QD.Conv2d)]
        assert layers
        for layer in layers:
            weight = layer.weight.numpy()
            assert weight.dtype == np.int8
            assert np.abs(weight.astype(int)).max() == 127
            assert isinstance(get_scale(layer.weight.dtype), float)
        assert "127" in MEGENGINE.weights


class Small(M.Module):  # type: ignore[misc]
    """Two convolutions, the second with ReLU6, a shortcut, and a classifier in float."""

    def __init__(self) -> None:
        super().__init__()
        self.quant = M.QuantStub()
        self.first = M.ConvBnRelu2d(3, 8, 3, 2, 1, bias=False)
        self.second = ConvBnRelu6(8, 8, 3, 1, 1, groups=8, bias=False)
        self.add = M.Elemwise("ADD")
        self.unused = M.Elemwise("ADD")
        self.dequant = M.DequantStub()
        self.fc = M.Linear(8, 3)
        self.fc.disable_quantize()

    def forward(self, x: Tensor) -> Tensor:
        first = self.first(self.quant(x))
        return self.fc(F.mean(self.dequant(self.add(first, self.second(first))), (2, 3)))


IMAGES = smooth_images(2, 32, 32)
LAYERS = ("first", "second", "add")  # of Small, whose output is quantized and that run


def small(seed: int = 0) -> M.Module:
    """A :class:`Small` whose weights are always the same, in evaluation state."""
    network = Small()
    rng = np.random.default_rng(seed)
    for name, value in network.named_tensors():
        if name.endswith("running_var"):
            continue
        value[...] = rng.normal(0, 0.1, value.shape).astype(np.float32)
    for layer in (network.first, network.second):
        layer.bn.weight[...] = rng.uniform(0.2, 2, layer.bn.weight.shape).astype(np.float32)
    network.eval()
    return network


def ranges_of(network: M.Module, images: npt.NDArray[np.uint8] = IMAGES) -> ActivationRanges:
    return measure_ranges(network, [images], "small", "", {})


class TestInputScale:
    def test_pixels_minus_128_are_the_int8_input(self, trio: Trio) -> None:
        assert get_scale(trio.quantized.quant.output_dtype) == 1.0
        images = np.arange(256, dtype=np.uint8).repeat(12).reshape(1, 3, 32, 32)
        (_, output) = activations(trio.quantized, QD.QuantStub, images)["quant"]
        assert output.dtype == qint8(1.0)
        assert np.array_equal(output.numpy(), images.astype(int) - 128)

    def test_a_loaded_observer_that_saw_black_does_not_change_it(self) -> None:
        state: State = {
            **trio_of(SHUFFLE).qat_state,
            "quant.act_observer.min_val": np.array(-128, np.float32),
            "quant.act_observer.max_val": np.array(127, np.float32),
        }
        stock = ExponentialMovingAverageObserver(dtype="qint8")
        stock.min_val[...], stock.max_val[...] = -128, 127
        assert np.isclose(stock.get_qparams().scale.numpy(), 256 / 255)

        qat = to_mode(blank(SHUFFLE), Mode.QAT, in_place=True)
        load_state(qat, state, "state")
        quantized = to_mode(qat, Mode.QUANTIZED)
        assert get_scale(quantized.quant.output_dtype) == 1.0
        images = smooth_images(1, seed=4)
        assert np.array_equal(logits_of(quantized, images), logits_of(trio_of(SHUFFLE).quantized, images))

    def test_it_is_1_after_training_on_other_inputs(self) -> None:
        qat = to_mode(small(), Mode.QAT)
        qat.train()
        qat(Tensor(np.full((2, 3, 32, 32), 500, np.float32)))
        qat.eval()
        assert get_scale(to_mode(qat, Mode.QUANTIZED).quant.output_dtype) == 1.0

    def test_the_unit_observer_has_the_state_of_the_one_it_stands_for(self) -> None:
        ours, stock = UnitScaleObserver(dtype="qint8"), ExponentialMovingAverageObserver(dtype="qint8")
        names = {"min_val", "max_val", "momentum", "runtime_momentum"}
        assert set(state_of(ours)) == set(state_of(stock)) == names
        assert ours.get_qparams().scale.numpy() == 1.0
        ours(Tensor([-1000.0, 1000.0]))
        assert ours.get_qparams().scale.numpy() == 1.0


class TestCalibration:
    def test_ranges_are_the_smallest_and_largest_values_of_the_float_network(self) -> None:
        network = small()
        batches = [IMAGES, smooth_images(3, 32, 32, seed=7)]
        found = measure_ranges(network, iter(batches), "small", "abc", {"by": "test"})
        assert (found.arch, found.observer, found.weights, found.provenance) == (
            "small",
            "min-max",
            "abc",
            {"by": "test"},
        )
        assert sorted(found.ranges) == sorted(LAYERS)  # neither the input nor what never ran
        outputs = [activations(network, M.Module, batch) for batch in batches]
        for name, (low, high) in found.ranges.items():
            values = [floats(seen[name][1]) for seen in outputs]
            np.testing.assert_allclose(low, min(v.min() for v in values), rtol=1e-4, atol=1e-6)
            np.testing.assert_allclose(high, max(v.max() for v in values), rtol=1e-4, atol=1e-6)

    def test_the_network_itself_stays_as_it_was(self) -> None:
        network = small()
        network.train()
        before = state_of(network)
        ranges_of(network)
        assert mode_of(network) is Mode.NORMAL
        assert network.training
        assert same_state(state_of(network), before)

    def test_a_range_behind_a_relu6_is_at_most_6(self) -> None:
        network = small()
        network.second.bn.weight *= 50
        low, high = ranges_of(network).ranges["second"]
        assert (low, high) == (0.0, 6.0)
        assert mode_of(mgq.quantize(network, IMAGES)) is Mode.QUANTIZED

    def test_ranges_set_the_scales_and_the_weights_their_own(self) -> None:
        network = small()
        found = replace(ranges_of(network), ranges={"first": (0.0, 3.0), "second": (0.0, 2.5), "add": (-5.0, 4.0)})
        qat = to_mode(network, Mode.QAT)
        apply_ranges(qat, found)
        quantized = to_mode(qat, Mode.QUANTIZED)
        for name in LAYERS:
            low, high = found.ranges[name]
            scale = get_scale(getattr(quantized, name).output_dtype)
            assert np.isclose(scale, max(-low, high) / 127.5, rtol=1e-6)
        for name in ("first", "second"):
            layer = getattr(network, name)
            gain = layer.bn.weight.numpy().reshape(-1) / np.sqrt(layer.bn.running_var.numpy().reshape(-1) + 1e-5)
            folded = layer.conv.weight.numpy().reshape(8, -1) * gain[:, None]
            scale = get_scale(getattr(quantized, name).weight.dtype)
            assert np.isclose(scale, np.abs(folded).max() / 127, rtol=1e-5)

    def test_a_layer_without_a_batch_norm_has_the_scale_of_its_weights(self) -> None:
        network = small()
        network.first = M.ConvRelu2d(3, 8, 3, 2, 1)
        network.first.weight *= 3
        quantized = mgq.quantize(network, IMAGES)
        largest = np.abs(network.first.weight.numpy()).max()
        assert np.isclose(get_scale(quantized.first.weight.dtype), largest / 127, rtol=1e-5)

    def test_ranges_of_another_network_are_refused_by_the_layer(self) -> None:
        found = replace(ranges_of(small()), ranges={"third": (0.0, 1.0)})
        with pytest.raises(InputError) as error:
            apply_ranges(to_mode(small(), Mode.QAT), found)
        assert one_line_about(str(error.value), "small", "'third'")

    def test_quantized_layers_are_those_with_an_output_observer(self) -> None:
        layers = find_quantized_layers(to_mode(small(), Mode.QAT))
        assert set(layers) == {"quant", "unused", *LAYERS}
        assert all(isinstance(layer, Q.QATModule) for layer in layers.values())


class TestInt8IsFakeQuantization:
    """Layer by layer, as a whole network with made-up weights amplifies single steps."""

    def test_each_layer_gives_the_same_integers_but_for_ties(self, trio: Trio) -> None:
        images = smooth_images(2, seed=11)
        fake = activations(trio.qat, Q.QATModule, images)
        real = activations(trio.quantized, QD.QuantizedModule, images)
        assert set(fake) == set(real)
        compared = 0
        for name, (inputs, output) in fake.items():
            layer = dict(trio.quantized.named_modules())[name]
            if isinstance(layer, QD.QuantStub | QD.DequantStub):
                continue
            scales = [get_scale(x.dtype) for x in real[name][0]]
            integers = [x.detach().astype(qint8(scale)) for x, scale in zip(inputs, scales, strict=True)]
            step = get_scale(layer.output_dtype)
            difference = np.abs(floats(layer(*integers)) - floats(output)) / step
            # Float sums come down on either side of a tie: one step then, and seldom. Behind a channel shuffle the
            # tensor has lost its scale, so fake quantization leaves the bias unrounded: up to 0.4 % of the values.
            assert difference.max() < 1.01, name
            assert (difference > 0.01).mean() < 0.01, name
            compared += difference.size
        assert compared > 100_000

    def test_answers_of_the_whole_network_agree(self, trio: Trio) -> None:
        images = smooth_images(16, seed=5)
        fake, real = logits_of(trio.qat, images), logits_of(trio.quantized, images)
        # The layers differ by single steps (above), the pooling at the end by half a step. A correlation of 0.99
        # lets that grow to sqrt(2 * 0.01) = 14 % of the logits' spread; found were 2 % (MobileNetV2) to 9 %
        # (ShuffleNetV1). A wrong scale or a missing operator leaves far less.
        assert np.corrcoef(fake.ravel(), real.ravel())[0, 1] > 0.99
        assert (fake.argmax(1) == real.argmax(1)).mean() >= 0.75

    def test_int8_is_near_float(self, trio: Trio) -> None:
        images = smooth_images(4)  # those of the calibration
        exact, real = logits_of(trio.normal, images), logits_of(trio.quantized, images)
        assert np.corrcoef(exact.ravel(), real.ravel())[0, 1] > 0.95


class TestFolding:
    def test_a_folded_network_has_no_batch_norm_and_the_same_logits(self, trio: Trio) -> None:
        without = fold_batch_norms(trio.normal)
        kinds = {type(module) for module in without.modules()}
        assert not any(issubclass(kind, M.BatchNorm2d) for kind in kinds)
        images = smooth_images(2, seed=3)
        expected = logits_of(trio.normal, images)
        assert np.abs(logits_of(without, images) - expected).max() < 1e-4 * np.abs(expected).max()
        assert any(isinstance(module, M.BatchNorm2d) for module in trio.normal.modules())


class TestRangesFile:
    @pytest.fixture
    def found(self) -> ActivationRanges:
        ranges = {"a.b": (-1.5, 0.1 + 0.2), "c": (0.0, math.pi), "\u00fc": (-0.0, 0.0)}
        return ActivationRanges("net", "min-max", "f" * 64, {"images": 3, "nested": {"v": "1"}}, ranges)

    def test_what_is_written_is_read_back_to_the_bit(self, found: ActivationRanges, tmp_path: Path) -> None:
        path = tmp_path / "ranges.json"
        path.write_text(found.to_json(), encoding="utf-8")
        assert read_ranges(path) == found
        assert found.to_json().endswith("}\n")

    def test_one_layer_is_one_line_so_that_changes_can_be_read(self, found: ActivationRanges) -> None:
        assert '\n  "c": [0.0, 3.141592653589793],\n' in found.to_json()

    def test_ranges_of_nothing_are_still_a_file(self, found: ActivationRanges, tmp_path: Path) -> None:
        path = tmp_path / "ranges.json"
        path.write_text(replace(found, ranges={}).to_json())
        assert read_ranges(path).ranges == {}

    @pytest.mark.parametrize(
        "text",
        ["", "not json", "[]", "null", "{}", '{"format": "other"}', "[" * 100_000, '{"format": ["x"]}', "\xff\xfe"],
    )
    def test_other_files_are_refused(self, text: str, tmp_path: Path) -> None:
        path = tmp_path / "ranges.json"
        path.write_bytes(text.encode("latin-1"))
        with pytest.raises(InputError) as error:
            read_ranges(path)
        assert one_line_about(str(error.value), str(path), "not a file of activation ranges", "mgq calibrate")

    @pytest.mark.parametrize(
        ("change", "about"),
        [
            ({"ranges": None}, "damaged"),
            ({"ranges": [1, 2]}, "damaged"),
            ({"ranges": {"a": 1}}, "damaged"),
            ({"ranges": {"a": [1]}}, "damaged"),
            ({"ranges": {"a": ["x", "y"]}}, "damaged"),
            ({"extra": 1}, "damaged"),
            ({"ranges": {"a": [1, 0]}}, "not a range"),
            ({"ranges": {"a": [0, math.nan]}}, "not a range"),
            ({"ranges": {"a": [-math.inf, 0]}}, "not a range"),
        ],
    )
    def test_damaged_ones_are_refused(
        self, change: Mapping[str, Any], about: str, found: ActivationRanges, tmp_path: Path
    ) -> None:
        path = tmp_path / "ranges.json"
        path.write_text(json.dumps({**json.loads(found.to_json()), **change}))
        with pytest.raises(InputError) as error:
            read_ranges(path)
        assert one_line_about(str(error.value), str(path), about, "make it again by `mgq calibrate`")

    @pytest.mark.parametrize("missing", ["arch", "weights", "provenance", "ranges"])
    def test_one_without_a_part_is_refused(self, missing: str, found: ActivationRanges, tmp_path: Path) -> None:
        body = json.loads(found.to_json())
        assert body.pop("format") == FORMAT
        del body[missing]
        path = tmp_path / "ranges.json"
        path.write_text(json.dumps({"format": FORMAT, **body}))
        with pytest.raises(InputError) as error:
            read_ranges(path)
        assert one_line_about(str(error.value), "damaged")

    def test_a_path_that_cannot_be_read_says_why(self, tmp_path: Path) -> None:
        for path, why in ((tmp_path / "none.json", "No such file"), (tmp_path, "directory")):
            with pytest.raises(InputError) as error:
                read_ranges(path)
            assert one_line_about(str(error.value), str(path), why)


class TestPackagedRanges:
    def test_each_file_belongs_to_a_network_of_the_zoo_and_fits_it(self) -> None:
        files = list((Path(ranges_module.__file__).parent / "default_ranges").glob("*.json"))
        archs = ("efficientnet_lite0", "mobilenet_v2")
        assert {*archs, *(f"{arch}.onnx" for arch in archs)} == {file.stem for file in files}
        for file in files:
            found = read_ranges(file)
            assert file.stem == found.arch + ("" if found.target == "megengine" else f".{found.target}")
            assert found.arch in specs()
            network = to_mode(blank(found.arch, 1000), Mode.QAT, get_target(found.target), in_place=True)
            apply_ranges(network, found)
            assert read_packaged_ranges(found.arch, found.weights, found.target) == found

    def test_they_serve_no_other_weights(self) -> None:
        assert read_packaged_ranges("efficientnet_lite0", "0" * 64) is None
        assert read_packaged_ranges("resnet50", "0" * 64) is None
        assert spec_of("resnet50")


class TestQuantize:
    def test_an_array_an_iterable_and_ranges_are_the_same(self) -> None:
        network = small()
        from_array = mgq.quantize(network, IMAGES)
        # ``iter``: it is read once.
        from_batches = mgq.quantize(network, iter([IMAGES[:1], IMAGES[1:]]))
        found, ranges = find_best_network(network, IMAGES, "small", "", get_preset(DEFAULT_PRESET))
        weights = to_mode(network, Mode.NORMAL)
        # Where it changed the weights, the ranges are those of the new ones; else they have corrections of biases.
        if found.draft.rounded or found.draft.network is not network:
            for name, value in found.network.named_parameters():
                dict(weights.named_parameters())[name][...] = value
        from_ranges = mgq.quantize(weights, ranges=ranges)
        others = smooth_images(3, 32, 32, seed=6)
        expected = logits_of(from_array, others)
        assert mode_of(from_array) is Mode.QUANTIZED
        assert expected.shape == (3, 3)
        assert np.array_equal(logits_of(from_batches, others), expected)
        assert np.array_equal(logits_of(from_ranges, others), expected)

    def test_the_result_is_near_what_it_was(self) -> None:
        network = small()
        exact, real = logits_of(network, IMAGES), logits_of(mgq.quantize(network, IMAGES), IMAGES)
        assert np.abs(exact - real).max() < 0.05 * np.ptp(exact)

    @pytest.mark.parametrize("mode", ["qat", Mode.QAT])
    def test_qat_is_fake_quantization_in_evaluation_state(self, mode: Mode | str) -> None:
        network = small()
        qat = mgq.quantize(network, IMAGES, mode=mode)
        assert mode_of(qat) is Mode.QAT
        assert not qat.training
        through_qat = mgq.quantize(qat)
        assert np.array_equal(logits_of(through_qat, IMAGES), logits_of(mgq.quantize(network, IMAGES), IMAGES))

    def test_a_copy_unless_in_place(self) -> None:
        network = small()
        before = state_of(network)
        assert mgq.quantize(network, IMAGES) is not network
        assert mode_of(network) is Mode.NORMAL
        assert same_state(state_of(network), before)
        assert mgq.quantize(network, IMAGES, in_place=True) is network
        assert mode_of(network) is Mode.QUANTIZED

    def test_a_network_in_training_state_is_measured_as_in_use_and_stays_as_it_was(self) -> None:
        """As `mgq.create_model` gives it: run as it trains, its batch norms would take the pictures' statistics."""
        network, same = small(), small()
        network.train()
        network.second.eval()
        before = state_of(network)
        quantized = mgq.quantize(network, IMAGES)
        assert same_state(state_of(network), before)
        assert network.training and network.first.training and not network.second.training
        assert not quantized.training
        assert np.array_equal(logits_of(quantized, IMAGES), logits_of(mgq.quantize(same, IMAGES), IMAGES))

    def test_normal_is_a_copy_as_it_is(self) -> None:
        network = small()
        copy = mgq.quantize(network, mode="normal")
        assert copy is not network
        assert np.array_equal(logits_of(copy, IMAGES), logits_of(network, IMAGES))

    def test_a_float_network_without_images_or_ranges_is_refused(self) -> None:
        with pytest.raises(InputError) as error:
            mgq.quantize(small())
        assert one_line_about(str(error.value), "needs pictures or ranges")

    def test_no_images_are_refused(self) -> None:
        def nothing() -> Iterator[npt.NDArray[np.uint8]]:
            yield from ()

        none: list[npt.NDArray[np.uint8]] = []
        for images in (none, nothing()):
            with pytest.raises(InputError) as error:
                mgq.quantize(small(), images)
            assert one_line_about(str(error.value), "no pictures")

    def test_an_unknown_mode_is_refused(self) -> None:
        with pytest.raises(InputError, match="'int4'"):
            mgq.quantize(small(), IMAGES, mode="int4")

    @pytest.mark.usefixtures("short_shufflenet_here")
    def test_a_network_of_the_zoo_is_quantized_in_one_call(self) -> None:
        network = trio_of(SHUFFLE).normal
        quantized = mgq.quantize(network, smooth_images(4))
        found, _ = find_best_network(network, smooth_images(4), SHUFFLE, "", get_preset(DEFAULT_PRESET))
        images = smooth_images(2, seed=8)
        logits = logits_of(quantized, images)
        assert logits.shape == (2, CLASSES)
        assert np.array_equal(logits, logits_of(to_mode(found.network, Mode.QUANTIZED), images))

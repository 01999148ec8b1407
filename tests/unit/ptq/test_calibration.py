"""Calibration by each method: ranges of a network, of its weights too, and the file they are kept in."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import megengine.module as M
import numpy as np
import numpy.typing as npt
import pytest
from megengine import Tensor

from mgq.data.datasets import list_sources
from mgq.data.synthetic import SyntheticImages
from mgq.engine.calibration.calibration_run import calibrate
from mgq.errors import InputError
from mgq.ptq.bias_correction import BiasCorrection
from mgq.ptq.easyquant import SampledConvolution, cosine
from mgq.ptq.layerwise import visit_beside_float
from mgq.ptq.patches import pick_positions, sample_positions
from mgq.ptq.presets import CalibrationConfig
from mgq.ptq.range_measurement import as_input
from mgq.quantization.activation_ranges import ActivationRanges, apply_ranges, read_ranges
from mgq.quantization.modes import Mode, mode_of, to_mode
from mgq.quantization.option_names import EASYQUANT, METHODS
from mgq.quantization.qat_layers import fold_weight, observe_weights, set_range
from mgq.zoo.network_state import state_of
from tests.conftest import (
    classifier_of,
    logits_of,
    one_line_about,
    same_state,
    smooth_images,
    trio_of,
)
from tests.fakes.measured_ranges import measure_ranges, simulate, steps_by
from tests.fakes.small_network import IMAGES, net

pytestmark = pytest.mark.usefixtures("short_shufflenet")
SHUFFLE = "shufflenet_v1_x0_5_g3"
LAYERS = {"first", "second", "third", "add"}


def ranges_by(method: str, network: M.Module | None = None) -> ActivationRanges:
    return measure_ranges(network or net(), iter([IMAGES[:4], IMAGES[4:]]), "net", "", {}, method)


@pytest.mark.parametrize("method", METHODS)
class TestEachMethod:
    def test_every_layer_that_ran_has_a_range_and_the_network_stays(self, method: str) -> None:
        network = net()
        before = state_of(network)
        found = ranges_by(method, network)
        assert found.observer == method
        assert {name for name, ends in found.ranges.items() if ends != (0, 0)} == LAYERS
        assert mode_of(network) is Mode.NORMAL
        assert same_state(state_of(network), before)

    def test_ranges_are_near_those_of_the_values(self, method: str) -> None:
        exact, found = ranges_by("min-max").ranges, ranges_by(method).ranges
        for name in LAYERS:
            low, high = exact[name]
            limits = max(-low, high), max(-found[name][0], found[name][1])
            assert 0.3 * limits[0] <= limits[1] <= 1.25 * limits[0], name
            assert (found[name][0] == 0) == (low == 0), name

    def test_the_same_images_give_the_same_ranges(self, method: str) -> None:
        assert ranges_by(method) == ranges_by(method)

    def test_a_range_behind_a_relu6_is_at_most_6(self, method: str) -> None:
        network = net()
        network.second.bn.weight *= 50
        found = ranges_by(method, network)
        assert 3 < found.ranges["second"][1] <= 6
        qat = to_mode(network, Mode.QAT)
        apply_ranges(qat, found)
        assert mode_of(to_mode(qat, Mode.QUANTIZED)) is Mode.QUANTIZED

    def test_int8_is_near_float(self, method: str) -> None:
        network = net()
        qat = to_mode(network, Mode.QAT)
        apply_ranges(qat, ranges_by(method, network))
        exact, real = logits_of(network, IMAGES), logits_of(to_mode(qat, Mode.QUANTIZED), IMAGES)
        assert np.corrcoef(exact.ravel(), real.ravel())[0, 1] > 0.995

    @pytest.mark.usefixtures("short_shufflenet_here")
    def test_a_run_says_by_which_method(self, method: str, tmp_path: Path) -> None:
        own = replace(classifier_of(SHUFFLE), network=to_mode(trio_of(SHUFFLE).normal, Mode.NORMAL))
        found = calibrate(own, list_sources(Images()), 3, config=CalibrationConfig(method=method))
        assert found.used == 3
        assert found.ranges.provenance["method"] == found.ranges.observer == method
        assert f"--method {method}" in found.ranges.provenance["made_by"]
        assert mode_of(found.classifier.network) is Mode.QAT
        found.write_ranges(tmp_path / "ranges.json")
        assert read_ranges(tmp_path / "ranges.json") == found.ranges


class Images:
    """A data set in memory."""

    name = "pictures"
    classes = ("a", "b")
    labels = None

    def __len__(self) -> int:
        return 5

    def image(self, index: int) -> npt.NDArray[np.uint8]:
        return np.ascontiguousarray(smooth_images(1, 80, 96, index)[0].transpose(1, 2, 0))


class TestMethods:
    def test_an_unknown_one_is_refused_with_those_there_are(self) -> None:
        for call in (
            lambda: ranges_by("best"),
            lambda: calibrate(
                classifier_of(SHUFFLE), list_sources(Images()), 1, config=CalibrationConfig(method="best")
            ),
        ):
            with pytest.raises(InputError) as error:
                call()
            assert one_line_about(str(error.value), "'best'", *METHODS)

    @pytest.mark.usefixtures("short_shufflenet_here")
    def test_no_more_images_are_read_than_are_looked_at(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("mgq.ptq.presets.LAYERWISE_IMAGES", 2)
        for method, used in (("easyquant", 2), ("min-max", 4)):
            own = replace(classifier_of(SHUFFLE), network=to_mode(trio_of(SHUFFLE).normal, Mode.NORMAL))
            found = calibrate(own, Images(), 4, config=CalibrationConfig(method=method))
            assert found.used == found.ranges.provenance["images"] == used

    @pytest.mark.usefixtures("short_shufflenet_here")
    def test_a_data_set_is_as_good_as_files(self) -> None:
        found = []
        for sources in (Images(), list_sources(Images())):
            own = replace(classifier_of(SHUFFLE), network=to_mode(trio_of(SHUFFLE).normal, Mode.NORMAL))
            found.append(calibrate(own, sources, 4, config=CalibrationConfig(method="min-max")))
        assert found[0].ranges == found[1].ranges
        assert found[0].used == 4

    def test_synthetic_images_serve_too(self) -> None:
        assert list_sources(SyntheticImages(3, 64))[2].read().shape == (64, 64, 3)


def output_of_sum(network: M.Module) -> npt.NDArray[np.float32]:
    seen: list[Tensor] = []
    hook = network.add.register_forward_hook(lambda _, __, output: seen.append(output))
    logits_of(network, IMAGES)
    hook.remove()
    return np.asarray(seen[0].numpy())


class TestEasyQuant:
    def test_it_chooses_ranges_of_the_weights(self) -> None:
        found = ranges_by(EASYQUANT)
        assert set(found.weight_ranges) == {"first", "second", "third"}
        qat = to_mode(net(), Mode.QAT)
        apply_ranges(qat, found)
        for name, (low, high) in found.weight_ranges.items():
            layer = getattr(qat, name)
            largest = np.abs(fold_weight(layer).numpy()).max()
            assert 0.75 * largest < high == -low < 1.25 * largest
            assert np.isclose(layer.weight_observer.get_qparams().scale.numpy(), high / 127, rtol=1e-6)

    def test_layers_point_more_nearly_where_float_does_than_by_min_max(self) -> None:
        similarities = []
        for method in ("min-max", EASYQUANT):
            network = net()
            qat = to_mode(network, Mode.QAT)
            apply_ranges(qat, measure_ranges(network, [IMAGES], "net", "", {}, method, correct_bias=False))
            similarities.append(cosine(output_of_sum(network), output_of_sum(qat)))
        assert 1 - similarities[1] < 0.95 * (1 - similarities[0])

    @pytest.mark.parametrize("name", ["first", "second", "third"])
    def test_sampled_positions_are_those_of_the_whole_convolution(self, name: str) -> None:
        qat = to_mode(net(), Mode.QAT)
        layer = getattr(qat, name)
        observe_weights(qat)
        source = np.random.default_rng(0).normal(0, 10, (2, 3 if name == "first" else 8, 16, 16)).astype(np.float32)
        layer.eval()
        limit = 0.7 * float(np.abs(fold_weight(layer).numpy()).max())
        set_range(layer.weight_observer, -limit, limit)
        layer.act_fake_quant.disable()
        whole = layer(Tensor(source)).numpy()
        at = sample_positions(whole.shape, np.random.default_rng(0))
        sampled = SampledConvolution(layer, source, at).output(limit)
        np.testing.assert_allclose(sampled, pick_positions(whole, at), rtol=1e-3, atol=1e-3)


def means_before_activation(network: M.Module) -> dict[str, npt.NDArray[np.float32]]:
    """Each convolution's mean output by channel, without what follows it."""
    found: dict[str, npt.NDArray[np.float32]] = {}

    def hook(name: str) -> Any:
        def note(_: M.Module, __: Any, output: Tensor) -> None:
            found[name] = output.numpy().mean((0, 2, 3))

        return note

    handles = [getattr(network, name).register_forward_hook(hook(name)) for name in ("third", "add")]
    logits_of(network, IMAGES)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("method", ["min-max", EASYQUANT])
class TestBiasCorrection:
    def test_means_are_nearer_to_those_of_float(self, method: str) -> None:
        exact, simulated = means_before_activation(net()), simulate(net(), IMAGES, steps_by(method))
        errors = []
        for correction in (None, BiasCorrection()):
            if correction is not None:
                visit_beside_float(simulated, as_input(IMAGES), correction)
            means = means_before_activation(simulated)
            errors.append({name: np.abs(means[name] - exact[name]).mean() for name in exact})
        assert errors[1]["third"] < 0.5 * errors[0]["third"] and errors[1]["add"] < errors[0]["add"]

    def test_every_convolution_is_corrected_by_channel_and_int8_follows(self, method: str) -> None:
        found = ranges_by(method)
        assert not measure_ranges(net(), [IMAGES], "net", "", {}, method, correct_bias=False).bias_corrections
        assert {name: len(values) for name, values in found.bias_corrections.items()} == dict.fromkeys(
            ("first", "second", "third"), 8
        )
        qat = to_mode(net(), Mode.QAT)
        apply_ranges(qat, found)
        added = qat.third.bias.numpy() - net().third.bias.numpy()
        np.testing.assert_allclose(added.ravel(), found.bias_corrections["third"], rtol=1e-4, atol=1e-6)
        qat.eval()
        real = logits_of(to_mode(qat, Mode.QUANTIZED), IMAGES)
        np.testing.assert_allclose(logits_of(qat, IMAGES), real, rtol=0.02, atol=0.02)


class TestFile:
    def test_weight_ranges_are_read_back_and_a_file_without_them_is_as_before(self, tmp_path: Path) -> None:
        found = ranges_by(EASYQUANT)
        path = tmp_path / "ranges.json"
        path.write_text(found.to_json())
        assert read_ranges(path) == found
        path.write_text(replace(found, weight_ranges={}).to_json())
        assert "weight_ranges" not in json.loads(path.read_text())
        assert read_ranges(path).weight_ranges == {}

    @pytest.mark.parametrize("damage", [{"first": [1, 0]}, {"first": 3}, [1], {"first": [0, "x"]}])
    def test_damaged_weight_ranges_are_refused(self, damage: Any, tmp_path: Path) -> None:
        path = tmp_path / "ranges.json"
        path.write_text(json.dumps({**json.loads(ranges_by("min-max").to_json()), "weight_ranges": damage}))
        with pytest.raises(InputError) as error:
            read_ranges(path)
        assert one_line_about(str(error.value), str(path), "make it again by `mgq calibrate`")

    @pytest.mark.parametrize("damage", [{"first": 3}, [1], {"first": ["x"]}, {"first": [float("nan")] * 8}])
    def test_damaged_bias_corrections_are_refused(self, damage: Any, tmp_path: Path) -> None:
        path = tmp_path / "ranges.json"
        path.write_text(json.dumps({**json.loads(ranges_by("min-max").to_json()), "bias_corrections": damage}))
        with pytest.raises(InputError) as error:
            read_ranges(path)
        assert one_line_about(str(error.value), str(path), "make it again by `mgq calibrate`")

    @pytest.mark.parametrize("name", ["fourth", "add", "first"])
    def test_biases_that_the_network_does_not_have_are_refused(self, name: str) -> None:
        found = replace(ranges_by("min-max"), bias_corrections={name: (1.0, 2.0)})
        with pytest.raises(InputError) as error:
            apply_ranges(to_mode(net(), Mode.QAT), found)
        assert one_line_about(str(error.value), f"'{name}'")

    @pytest.mark.parametrize("name", ["fourth", "add"])
    def test_weights_that_the_network_does_not_have_are_refused(self, name: str) -> None:
        found = replace(ranges_by("min-max"), weight_ranges={name: (-1.0, 1.0)})
        with pytest.raises(InputError) as error:
            apply_ranges(to_mode(net(), Mode.QAT), found)
        assert one_line_about(str(error.value), f"'{name}'")

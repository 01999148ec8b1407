"""Grids that begin where what reads a tensor begins to tell its values apart."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from megengine import Tensor

from mgq.engine.classifier.import_wish import ImportWish
from mgq.engine.classifier.onnx_import import import_classifier
from mgq.engine.classifier.parity import measure_layer_parity
from mgq.export.onnx.writer import model_of, plain_graph
from mgq.ptq.pipeline import snr_of
from mgq.ptq.quantize import quantize
from mgq.ptq.sensitivity import activation_tally
from mgq.quantization.activation_ranges import ActivationRanges
from mgq.quantization.floors import LEVELS, steps_below
from mgq.quantization.modes import Mode
from mgq.quantization.qat import Phase, prepare_qat, set_phase
from mgq.quantization.qat_layers import Range, extend_to_grid, find_quantized_layers
from mgq.quantization.targets import FINEST, ONNX
from mgq.runtime.registry import BACKENDS, load
from mgq.zoo.blueprint import INPUT, Blueprint, LayerPlan
from tests.fakes.foreign_models import Model
from tests.fakes.measured_ranges import measure_ranges

ENGINES = ("openvino", "onnxruntime")
IMAGES = np.random.default_rng(0).integers(0, 256, (8, 3, 32, 32), dtype=np.uint8)


def imported(folder: Path) -> Any:
    """A convolution with a hard swish behind it, whose values reach twice as far as -3 on both sides."""
    model = Model()
    curve = model.add("HardSwish", model.conv("image", 3, 8, pads=[1] * 4))
    path = model.save(folder / "model.onnx", model.classify(curve, 8))
    return import_classifier(path, ImportWish(preprocess="torch"), "")[0].network


def float_input(images: Any) -> Tensor:
    return Tensor(images.astype(np.float32) - 128)


def ranges_of(network: Any, method: str = "min-max") -> ActivationRanges:
    return measure_ranges(network, [IMAGES], "", "", {}, method, correct_bias=False, target=ONNX)


def without_floors(network: Any) -> Any:
    """The same network as it was imported before there were floors."""
    layers = tuple(
        replace(layer, options={key: value for key, value in layer.options.items() if key != "floor"})
        for layer in network.blueprint.layers
    )
    network.blueprint = replace(network.blueprint, layers=layers)
    return network


def test_a_convolution_knows_from_where_on_its_values_matter() -> None:
    conv = {"activation": ""}
    layers = [LayerPlan("conv", "conv_1", (INPUT,), conv), LayerPlan("hard_swish", "hard_swish_1", ("conv_1",))]
    layers += [LayerPlan("conv", "conv_2", ("hard_swish_1",), conv), LayerPlan("max_pool", "max_pool_1", ("conv_2",))]
    layers += [LayerPlan("silu", "silu_1", ("max_pool_1",)), LayerPlan("gelu", "gelu_1", ("conv_2",))]
    layers += [LayerPlan("conv", "conv_3", ("silu_1",), conv), LayerPlan("silu", "silu_2", ("conv_3",))]
    gate = LayerPlan("hard_sigmoid", "hard_sigmoid_1", ("conv_4",), {"alpha": 0.2, "beta": 0.5})
    layers += [LayerPlan("add", "add_1", ("conv_3", "gelu_1")), LayerPlan("conv", "conv_4", ("add_1",), conv), gate]
    layers += [LayerPlan("add", "add_2", ("hard_swish_1", "silu_1")), LayerPlan("conv", "conv_6", ("add_2",), conv)]
    layers += [LayerPlan("conv", "conv_5", ("hard_sigmoid_1",), conv)]
    found = Blueprint(tuple(layers), "conv_5", (3, 32, 32), 10).with_floors().layers
    floors = {layer.name: layer.options.get("floor") for layer in found if layer.kind == "conv"}
    behind = {
        layer.name: layer.options["floor"] for layer in found if layer.kind != "conv" and "floor" in layer.options
    }
    # A pool moves conv_2 before the SiLU, and a GELU reads it, too; a sum reads conv_3; conv_5 is the answer.
    assert floors == {"conv_1": -3.0, "conv_2": -6.0, "conv_4": -2.5} | dict.fromkeys(("conv_3", "conv_5", "conv_6"))
    assert behind == {"hard_swish_1": -0.375, "silu_1": -0.2785, "gelu_1": -0.1701}  # only the answer reads silu_2


def test_a_grid_before_a_hard_swish_spends_no_levels_below_its_floor(tmp_path: Path) -> None:
    network = imported(tmp_path)
    simulated = quantize(network, ranges=ranges_of(network), mode=Mode.QAT, in_place=True)
    grid = plain_graph(simulated, 0).grids["conv_1"]
    values = imported(tmp_path).conv_1(float_input(IMAGES)).numpy()
    assert values.min() < -5  # there is something to leave out
    assert -3 - grid.scale <= grid.qmin * grid.scale <= -3
    assert grid.qmax * grid.scale == pytest.approx(values.max(), abs=1.5 * grid.scale)
    assert grid.qmax - grid.qmin == LEVELS


def test_int8_before_a_hard_swish_is_nearer_to_float_with_a_floor(tmp_path: Path) -> None:
    values, noise = imported(tmp_path).conv_1(float_input(IMAGES)), []
    for change in (without_floors, lambda network: network):
        network = change(imported(tmp_path))
        curve = network.hard_swish_1
        wanted = curve(values).numpy()
        simulated = quantize(network, ranges=ranges_of(network), mode=Mode.QAT, in_place=True)
        rounded = find_quantized_layers(simulated)["conv_1"].apply_quant_activation(values)
        noise.append(np.square(curve(rounded).numpy() - wanted).sum())
    assert noise[1] < 0.5 * noise[0]


@pytest.mark.parametrize(("factor", "zero"), [(1e-3, 127), (1.0, 9), (30.0, 1)])
def test_a_grid_behind_an_activation_has_as_many_levels_below_0_as_its_values_need(
    tmp_path: Path, factor: float, zero: int
) -> None:
    """Small values of a SiLU are halves of what it reads, on both sides of 0; large ones are nearly all above."""
    model = Model()
    scaled = model.add("Mul", model.conv("image", 3, 8, pads=[1] * 4), model.constant(factor))
    curve = model.add("Mul", scaled, model.add("Sigmoid", scaled))
    path = model.save(tmp_path / "model.onnx", model.classify(model.conv(curve, 8, 8), 8))
    network = import_classifier(path, ImportWish(preprocess="torch"), "")[0].network
    values = network.silu_1(network.conv_1(float_input(IMAGES))).numpy()
    simulated = quantize(network, ranges=ranges_of(network), mode=Mode.QAT, in_place=True)
    grid = plain_graph(simulated, 0).grids["silu_1"]
    assert grid.zero_point == pytest.approx(zero, abs=2 if zero < 100 else 0)
    reach = np.array([values.min(), values.max()])
    assert np.clip(reach, grid.qmin * grid.scale, grid.qmax * grid.scale) == pytest.approx(reach, rel=0.02)
    assert grid.scale <= 1.02 * max(2 * np.abs(reach).max(), 0) / LEVELS


@pytest.mark.parametrize("engine", ENGINES)
def test_numbers_below_a_hundred_thousandth_have_steps_of_their_own(tmp_path: Path, engine: str) -> None:
    """As before the first layer norm of a network that was initialized and not trained."""
    model = Model()
    small = model.add("Mul", model.conv("image", 3, 8, pads=[1] * 4), model.constant(1e-6))
    sums = model.conv(small, 8, 8)
    model.constants[-1] = onnx.numpy_helper.from_array(np.zeros(8, np.float32), model.constants[-1].name)
    path = model.save(tmp_path / "model.onnx", model.classify(model.add("Mul", sums, model.constant(1e6)), 8))
    network = import_classifier(path, ImportWish(preprocess="torch"), "")[0].network
    exact = network(float_input(IMAGES)).numpy()
    simulated = quantize(network, ranges=ranges_of(network), mode=Mode.QAT, in_place=True)
    model = model_of(plain_graph(simulated, 0), 0, None, {})
    (tmp_path / "int8.onnx").write_bytes(model.SerializeToString())
    found = load(tmp_path / "int8.onnx", engine).run(IMAGES)
    assert snr_of(found.astype(np.float64), exact.astype(np.float64)) > 25


@pytest.mark.parametrize("method", ["min-max", "logits"])
@pytest.mark.parametrize("engine", ENGINES)
def test_engines_give_the_integers_of_the_simulation(tmp_path: Path, engine: str, method: str) -> None:
    network = imported(tmp_path)
    simulated = quantize(network, ranges=ranges_of(network, method), mode=Mode.QAT, in_place=True)
    model = model_of(plain_graph(simulated, 0), 0, None, {})
    onnx.checker.check_model(model, full_check=True)
    (tmp_path / "int8.onnx").write_bytes(model.SerializeToString())
    wanted = simulated(float_input(IMAGES)).numpy()
    assert load(tmp_path / "int8.onnx", engine).run(IMAGES) == pytest.approx(wanted, abs=1e-4 * np.abs(wanted).max())
    backend = next(known for known in BACKENDS if known.key == engine)
    for layer in measure_layer_parity(backend, tmp_path / "int8.onnx", simulated, IMAGES):
        assert layer.largest <= 1, layer


@pytest.mark.parametrize(("low", "high", "floor", "span"), [(-9, 6, -3, 9), (-2, 1, -3, 4), (-9, 2, -3, 6)])
def test_a_grid_is_never_wider_than_one_around_0(
    tmp_path: Path, low: float, high: float, floor: float, span: float
) -> None:
    layer = find_quantized_layers(prepare_qat(imported(tmp_path), target=ONNX))["conv_1"]
    assert extend_to_grid(layer, Range(low, high)) == (0.0, span)
    steps = steps_below(floor, span / LEVELS)
    assert steps * span / LEVELS >= min(-floor, -low, 127 / LEVELS * span) - 1e-6


@pytest.mark.parametrize(("name", "floor"), [("conv_1", -3), ("hard_swish_1", -0.375)])
def test_training_observes_the_span_above_the_floor(tmp_path: Path, name: str, floor: float) -> None:
    network = prepare_qat(imported(tmp_path), "min-max", ONNX)
    set_phase(network, Phase.OBSERVE)
    network(float_input(IMAGES))
    set_phase(network, Phase.QUANTIZE)
    values = network.conv_1(network.quant(float_input(IMAGES)))
    values = values if name == "conv_1" else network.hard_swish_1(values)
    layer = find_quantized_layers(network)[name]
    assert float(layer.act_observer.max_val.numpy()) > -floor + float(values.numpy().max()) - 1e-3
    assert float(values.numpy().min()) == pytest.approx(floor, abs=float(values.qparams.scale.numpy()))
    assert layer.act_observer.enabled
    assert layer.act_observer.scale_limit == FINEST


def test_analysis_counts_what_is_below_the_floor_as_kept(tmp_path: Path) -> None:
    network = imported(tmp_path)
    simulated = quantize(network, ranges=ranges_of(network), mode=Mode.QAT, in_place=True)
    tally = activation_tally(find_quantized_layers(simulated)["conv_1"])
    assert tally is not None
    assert tally.lowest == pytest.approx(-3, abs=0.1)
    assert tally.limit == pytest.approx(float(imported(tmp_path).conv_1(float_input(IMAGES)).numpy().max()), rel=0.02)


@pytest.mark.parametrize("method", ["ema", "histogram", "mse", "easyquant", "logits"])
def test_every_method_reaches_what_matters(tmp_path: Path, method: str) -> None:
    network = imported(tmp_path)
    values = network.conv_1(float_input(IMAGES)).numpy()
    simulated = quantize(network, ranges=ranges_of(network, method), mode=Mode.QAT, in_place=True)
    grid = plain_graph(simulated, 0).grids["conv_1"]
    assert grid.qmin * grid.scale <= -3
    assert (values <= grid.qmax * grid.scale).mean() > 0.999

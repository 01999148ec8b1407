"""Imported networks in the native engine: the bits of the integers, and one line for what it has no kernels for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

from mgq.engine.classifier.import_wish import ImportWish
from mgq.engine.classifier.onnx_import import import_classifier
from mgq.errors import InputError
from mgq.export.native.compiler import compile_program
from mgq.export.native.cpu import Level
from mgq.export.native.library import Library
from mgq.export.native.planner import make_plan
from mgq.export.native.program import Conv, MaxPool, Program, read_program
from mgq.export.native.reference import run_reference
from mgq.export.onnx.writer import model_of, plain_graph
from mgq.ptq.quantize import quantize
from mgq.quantization.modes import Mode
from mgq.quantization.targets import ONNX
from tests.fakes.foreign_models import BODIES, write
from tests.fakes.measured_ranges import measure_ranges
from tests.fakes.native_programs import BEST, HERE, noise

COVERED = ("plain", "keras_without_gate", "pools")


def int8_model(folder: Path, body: str, preprocess: str = "tf") -> onnx.ModelProto:
    """The int8 ONNX model of an imported network of 32x32 pixels, calibrated on noise."""
    network = import_classifier(write(folder / "model.onnx", body), ImportWish(preprocess=preprocess), "")[0].network
    ranges = measure_ranges(network, [noise(32, 4)], "model", "", {}, correct_bias=False, target=ONNX)
    fake = quantize(network, ranges=ranges, mode=Mode.QAT, in_place=True)
    model: onnx.ModelProto = model_of(plain_graph(fake, 32), 32, None, {})
    return model


@pytest.mark.parametrize("level", HERE, ids=lambda level: str(level.key))
@pytest.mark.parametrize("body", COVERED)
def test_imported_networks_give_the_bits_of_the_integers(tmp_path: Path, body: str, level: Level) -> None:
    program = read_program(int8_model(tmp_path, body))
    images = noise(32, 3, 7)
    found = Library(compile_program(program, level), program.classes).run(images)
    assert np.array_equal(found, run_reference(program, images)[0])


@pytest.mark.parametrize("body", COVERED)
def test_the_integers_of_imported_networks_answer_as_onnx_runtime(tmp_path: Path, body: str) -> None:
    runtime = pytest.importorskip("onnxruntime")
    options = runtime.SessionOptions()
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
    model = int8_model(tmp_path, body)
    images = noise(32, 3, 7)
    wanted = runtime.InferenceSession(model.SerializeToString(), options).run(None, {"data": images})[0]
    found = run_reference(read_program(model), images)[0]
    assert np.abs(found - wanted).max() <= 0.02 * np.abs(wanted).max()


@pytest.mark.parametrize("level", HERE, ids=lambda level: str(level.key))
@pytest.mark.parametrize(("preprocess", "colour"), [("torch", (104, 116, 124)), ("raw", (0, 0, 0))])
def test_images_lie_in_a_border_of_the_colour_that_zero_was(
    tmp_path: Path, preprocess: str, colour: tuple[int, ...], level: Level
) -> None:
    model = int8_model(tmp_path, "plain", preprocess)
    program = read_program(model)
    assert [layer.colour for layer in program.layers if isinstance(layer, Conv)][:2] == [colour, None]
    images = np.concatenate([noise(32, 2, 7), np.full((1, 3, 32, 32), 255, np.uint8)])
    found = Library(compile_program(program, level), program.classes).run(images)
    assert np.array_equal(found, run_reference(program, images)[0])
    runtime = pytest.importorskip("onnxruntime")
    options = runtime.SessionOptions()
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
    wanted = runtime.InferenceSession(model.SerializeToString(), options).run(None, {"data": images})[0]
    assert np.abs(found - wanted).max() <= 0.02 * np.abs(wanted).max()


def test_convolutions_of_pixels_with_unlike_borders_are_refused(tmp_path: Path) -> None:
    program = read_program(int8_model(tmp_path, "plain", "torch"))
    first = program.layers[0]
    assert isinstance(first, Conv)
    other = replace(first, output="other", colour=(1, 2, 3))
    tensors = {**program.tensors, "other": replace(program.tensors[first.output], name="other")}
    changed = replace(program, layers=(first, other, *program.layers[1:]), tensors=tensors)
    with pytest.raises(InputError, match="native engine does not run convolutions of pixels with unlike borders"):
        make_plan(changed)


@pytest.mark.parametrize("body", sorted(set(BODIES) - set(COVERED)))
def test_no_imported_network_gets_other_bits(tmp_path: Path, body: str) -> None:
    """What has no kernel is refused; what is not refused is right."""
    images = noise(32, 1, 7)
    try:
        program = read_program(int8_model(tmp_path, body))
        found = Library(compile_program(program, BEST), program.classes).run(images)
    except InputError as error:
        assert "native engine does not run" in str(error)
    else:
        assert np.array_equal(found, run_reference(program, images)[0])


def windows_in(program: Program) -> list[tuple[int, int, int, int]]:
    return [layer.padding for layer in program.layers if isinstance(layer, Conv | MaxPool)]


def test_pads_join_the_windows_behind_them(tmp_path: Path) -> None:
    program = read_program(int8_model(tmp_path, "keras_without_gate"))
    assert windows_in(program).count((0, 0, 1, 1)) == 2
    assert windows_in(read_program(int8_model(tmp_path, "pools")))[1] == (1, 1, 1, 1)


@pytest.mark.parametrize(("body", "operator"), [("squeeze_and_excite", "Hard"), ("channels_last", "Transpose")])
def test_other_operators_are_refused_in_one_line_that_says_what_runs_them(
    tmp_path: Path, body: str, operator: str
) -> None:
    with pytest.raises(InputError, match=rf"{operator}.*OpenVINO or ONNX Runtime") as refused:
        read_program(int8_model(tmp_path, body))
    assert "\n" not in str(refused.value)

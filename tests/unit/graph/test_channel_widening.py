"""Channels in whole vectors: the same integers in ONNX Runtime, with zeros that nothing reads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mgq.export.onnx.writer import model_of, plain_graph
from mgq.graph.channel_widening import widen_channels
from mgq.graph.engine_forms import adapt_to_engine, leave_small_layers_in_float
from mgq.graph.layer_graph import Convolution, Graph
from mgq.runtime.registry import load
from tests.fakes.foreign_int8 import int8_of
from tests.fakes.foreign_models import Model

WIDE = 24


def graph_behind(folder: Path, body: Callable[[Model, str], str], channels: int) -> Graph:
    """The int8 graph of a network with ``body``, which gives so many channels, behind a stem of 16."""
    model = Model()
    stem = model.add("Relu", model.conv("image", 3, 16, pads=[1] * 4, strides=[2, 2]))
    path = model.save(folder / "narrow.onnx", model.classify(body(model, stem), channels))
    network = int8_of(path, "raw").fake_quantized
    assert network is not None
    return plain_graph(network, 0)


def inverted(model: Model, source: str) -> str:
    """A point-wise convolution to 24 channels, a depthwise one, a gate, and back."""
    wide = model.add("HardSwish", model.conv(source, 16, WIDE, 1))
    deep = model.add("HardSwish", model.conv(wide, WIDE, WIDE, 3, WIDE, pads=[1] * 4, strides=[2, 2]))
    squeezed = model.add("Relu", model.conv(model.add("GlobalAveragePool", deep), WIDE, 8, 1))
    gate = model.add("HardSigmoid", model.conv(squeezed, 8, WIDE, 1), alpha=1 / 6, beta=0.5)
    return model.conv(model.add("Mul", deep, gate), WIDE, 16, 1)


def to_the_end(model: Model, source: str) -> str:
    """Narrow channels that the classifier itself reads."""
    narrow = model.conv(source, 16, 12, 1)
    return model.add("Relu", model.add("Add", model.conv(narrow, 12, 12, 3, 12, pads=[1] * 4), narrow))


def joined(model: Model, source: str) -> str:
    """A join of narrow parts: it has a place for each of their channels alone."""
    parts = [model.add("Relu", model.conv(source, 16, 12, 1)) for _ in range(2)]
    return model.add("Relu", model.conv(model.add("Concat", *parts, axis=1), 24, 16, 1))


def whole(model: Model, source: str) -> str:
    """16 channels everywhere."""
    return model.add("Relu", model.conv(source, 16, 16, 3, 16, pads=[1] * 4))


def widths_of(graph: Graph) -> list[int]:
    return [len(node.weight) for node in graph.nodes if isinstance(node, Convolution)]


def answers_of(graph: Graph, path: Path, engine: str) -> Any:
    path.write_bytes(model_of(graph, 0, None, {}).SerializeToString())
    images = np.random.default_rng(1).integers(0, 256, (4, 3, 32, 32), np.uint8)
    return load(path, engine).run(images)


@pytest.mark.parametrize("engine", ["openvino", "onnxruntime"])
@pytest.mark.parametrize(
    ("body", "channels", "widths"), [(inverted, 16, [16, 32, 32, 8, 32, 16]), (to_the_end, 12, [16, 16, 16])]
)
def test_channels_are_widened_with_the_same_answers(
    tmp_path: Path, body: Callable[[Model, str], str], channels: int, widths: list[int], engine: str
) -> None:
    graph = graph_behind(tmp_path, body, channels)
    wide = widen_channels(graph)
    assert widths_of(wide) == widths
    plain, widened = (answers_of(own, tmp_path / f"{name}.onnx", engine) for name, own in (("a", graph), ("b", wide)))
    np.testing.assert_array_equal(widened, plain)


@pytest.mark.parametrize(("body", "channels"), [(joined, 16), (whole, 16)])
def test_other_channels_stay_as_many_as_they_are(
    tmp_path: Path, body: Callable[[Model, str], str], channels: int
) -> None:
    graph = graph_behind(tmp_path, body, channels)
    assert widen_channels(graph) is graph


def test_only_the_form_for_onnx_runtime_is_widened(tmp_path: Path) -> None:
    graph = graph_behind(tmp_path, inverted, 16)
    widened = {engine: 32 in widths_of(adapt_to_engine(graph, engine)) for engine in ("any", "openvino", "onnxruntime")}
    assert widened == {"any": False, "openvino": False, "onnxruntime": True}


def test_float_layers_are_not_widened(tmp_path: Path) -> None:
    graph = leave_small_layers_in_float(graph_behind(tmp_path, inverted, 16), 0.9)
    assert widths_of(widen_channels(graph)) == widths_of(graph)

"""Sums of convolutions of one tensor, as exporters leave those of RepVGG, MobileOne and RepGhostNet."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mgq.engine.classifier.import_wish import ImportWish
from mgq.engine.classifier.onnx_import import import_classifier
from mgq.graph.layer_graph import Add, Convolution, Graph
from mgq.graph.network_reader import graph_of
from tests.fakes.foreign_models import Model

CHANNELS = 16


def graph_behind(folder: Path, body: Callable[[Model, str], str]) -> Graph:
    """The graph of the import of a network with ``body`` behind its stem; its float answers are ONNX Runtime's."""
    model = Model()
    stem = model.add("Relu", model.conv("image", 3, CHANNELS, pads=[1] * 4, strides=[2, 2]))
    path = model.save(folder / "branches.onnx", model.classify(body(model, stem), CHANNELS))
    network = import_classifier(path, ImportWish(preprocess="raw"), "")[0].network
    return graph_of(network, 32)


def sum_of(model: Model, *branches: str) -> str:
    total = branches[0]
    for branch in branches[1:]:
        total = model.add("Add", total, branch)
    return model.add("Relu", total)


def depthwise(model: Model, source: str, kernel: int = 3, **attributes: Any) -> str:
    sides = {"pads": [kernel // 2] * 4, **attributes}
    return model.norm(model.conv(source, CHANNELS, CHANNELS, kernel, CHANNELS, **sides), CHANNELS)


def dense(model: Model, source: str, kernel: int, **attributes: Any) -> str:
    return model.norm(model.conv(source, CHANNELS, CHANNELS, kernel, pads=[kernel // 2] * 4, **attributes), CHANNELS)


JOINED: dict[str, Callable[[Model, str], str]] = {
    "a depthwise convolution and a norm": lambda model, x: sum_of(model, depthwise(model, x), model.norm(x, CHANNELS)),
    "a norm and a depthwise convolution": lambda model, x: sum_of(model, model.norm(x, CHANNELS), depthwise(model, x)),
    "a depthwise convolution and what it reads": lambda model, x: sum_of(model, depthwise(model, x), x),
    "dense convolutions of two sizes": lambda model, x: sum_of(model, dense(model, x, 3), dense(model, x, 1)),
    "dense convolutions with strides": lambda model, x: sum_of(
        model, dense(model, x, 1, strides=[2, 2]), dense(model, x, 3, strides=[2, 2])
    ),
    "three branches": lambda model, x: sum_of(
        model, depthwise(model, x, 5), depthwise(model, x), model.norm(x, CHANNELS)
    ),
    "gaps and a single position": lambda model, x: sum_of(
        model, depthwise(model, x, pads=[2] * 4, dilations=[2, 2]), depthwise(model, x, 1)
    ),
}
APART: dict[str, Callable[[Model, str], str]] = {
    "a dense convolution and what it reads": lambda model, x: sum_of(model, dense(model, x, 3), x),
    "other gaps": lambda model, x: sum_of(
        model, depthwise(model, x, pads=[2] * 4, dilations=[2, 2]), depthwise(model, x)
    ),
    "another source": lambda model, x: sum_of(model, dense(model, x, 3), dense(model, dense(model, x, 3), 1)),
    "a branch that is read twice": lambda model, x: sum_of(
        model, dense(model, x, 3), model.add("Relu", twice := dense(model, x, 1)), twice
    ),
    "an activation between": lambda model, x: sum_of(
        model, depthwise(model, x), model.add("Relu", depthwise(model, x))
    ),
    "many small weights and one large": lambda model, x: sum_of(
        model, depthwise(model, x, 9), model.add("Mul", x, model.constant(100.0))
    ),
}


@pytest.mark.parametrize("body", JOINED.values(), ids=JOINED)
def test_branches_of_one_tensor_are_one_convolution(tmp_path: Path, body: Callable[[Model, str], str]) -> None:
    graph = graph_behind(tmp_path, body)
    assert [type(node) for node in graph.nodes].count(Convolution) == 2
    assert not any(isinstance(node, Add) for node in graph.nodes)


@pytest.mark.parametrize("body", APART.values(), ids=APART)
def test_other_sums_stay_sums(tmp_path: Path, body: Callable[[Model, str], str]) -> None:
    assert any(isinstance(node, Add) for node in graph_behind(tmp_path, body).nodes)


def test_branches_of_the_picture_itself_are_joined_before_its_preprocessing_is_folded(tmp_path: Path) -> None:
    model = Model()
    stems = [model.conv("image", 3, CHANNELS, kernel, pads=[kernel // 2] * 4) for kernel in (3, 1)]
    path = model.save(tmp_path / "stems.onnx", model.classify(sum_of(model, *stems), CHANNELS))
    graph = graph_of(import_classifier(path, ImportWish(preprocess="torch"), "")[0].network, 32)
    (stem,) = (node for node in graph.nodes if isinstance(node, Convolution))
    assert stem.weight.shape == (CHANNELS, 3, 3, 3)
    assert np.isfinite(stem.weight).all()

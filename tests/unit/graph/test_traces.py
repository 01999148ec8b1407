"""Traces that are kept: networks that differ in their numbers alone are traced once, and read as before."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import numpy as np
import pytest

from mgq.graph import network_reader
from mgq.graph.layer_graph import Graph
from mgq.graph.network_reader import graph_of, keep_traces
from mgq.quantization.modes import Mode, to_mode
from tests.conftest import SIZE, blank, filled

SHUFFLE = "shufflenet_v1_x0_5_g3"


@pytest.fixture(scope="module")
def networks() -> list[Any]:
    """Two of one architecture with other weights, the second in mode ``qat``, too, and one of another width."""
    first, second = (filled(blank(SHUFFLE), seed) for seed in (0, 1))
    return [first, second, to_mode(second, Mode.QAT), filled(blank("shufflenet_v1_x1_0_g3"))]


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The networks that are traced, as they come."""
    seen: list[Any] = []
    trace = network_reader.trace

    def noted(network: Any, size: int) -> Any:
        seen.append(network)
        return trace(network, size)

    monkeypatch.setattr(network_reader, "trace", noted)
    return seen


def assert_same(left: Graph, right: Graph) -> None:
    assert [type(node) for node in left.nodes] == [type(node) for node in right.nodes]
    for one, other in zip(left.nodes, right.nodes, strict=True):
        for name in (field.name for field in fields(one)):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name), err_msg=f"{one.output}: {name}")
    assert (left.input, left.output, left.grids, left.shapes) == (right.input, right.output, right.grids, right.shapes)


def test_graphs_are_the_same_by_a_kept_trace(networks: list[Any], traced: list[Any]) -> None:
    alone = [graph_of(network, SIZE) for network in networks[:3]]
    traced.clear()
    with keep_traces():
        kept = [graph_of(network, SIZE) for network in networks[:3]]
    assert traced == [networks[0], networks[2]]  # the second is traced as the first, in mode qat it is another
    for one, other in zip(alone, kept, strict=True):
        assert_same(one, other)


def test_traces_of_another_size_or_width_are_not_taken(networks: list[Any]) -> None:
    with keep_traces():
        small, large = graph_of(networks[0], SIZE), graph_of(networks[0], 2 * SIZE)
        wide = graph_of(networks[3], SIZE)
    assert small.shapes[small.input] != large.shapes[large.input]
    assert_same(wide, graph_of(networks[3], SIZE))


def test_nothing_is_kept_behind_the_end(networks: list[Any], traced: list[Any]) -> None:
    with keep_traces():
        graph_of(networks[0], SIZE)
    graph_of(networks[0], SIZE)
    assert len(traced) == 2

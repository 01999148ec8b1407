"""Attention and norms over joined axes: the same numbers, with four axes and with three at most."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from mgq.export.onnx.writer import model_of
from mgq.graph.engine_forms import FORMS, adapt_to_engine
from mgq.graph.joined_axes import join_leading_axes
from mgq.graph.layer_graph import Graph, Linear, Operation, QuantParams, Reshape, Transpose
from mgq.runtime.registry import load

TOKENS = (1, 3, 2, 4, 8)
"""One picture as three windows of two heads, with four tokens of eight numbers each."""
SCORES = (1, 3, 2, 4, 4)
GRIDS = {"norm": QuantParams(0.03), "shares": QuantParams(1 / 255, 0, 255), "attended": QuantParams(0.03)}
RANDOM = np.random.default_rng(0)
HEAD = RANDOM.normal(size=(5, 192)).astype(np.float32)
FACTOR = {"scale": np.full((1, 1, 1, 1, 1), 0.3, np.float32), "shift": np.zeros((), np.float32)}


def attention(grids: Mapping[str, QuantParams], bias: tuple[int, ...] = ()) -> Graph:
    """A norm and an attention of it over ``TOKENS``; ``bias``: the shape of what is added to the scores."""
    shift = RANDOM.normal(size=bias).astype(np.float32)
    nodes = (
        Reshape(("pixels",), "tokens", TOKENS),
        Operation(("tokens",), "norm", "layer_norm", {"eps": 1e-5}, {"scale": np.ones(8, np.float32)}),
        Transpose(("norm",), "keys", (0, 1, 2, 4, 3)),
        Operation(("norm", "keys"), "products", "matmul", {}),
        Operation(("products",), "scores", "affine", {}, {**FACTOR, "shift": shift}),
        Operation(("scores",), "shares", "softmax", {"axis": -1}),
        Operation(("shares", "norm"), "attended", "matmul", {}),
        Reshape(("attended",), "row", (1, 192)),
        Linear(("row",), "answer", HEAD, None, None, None),
    )
    names = ("tokens", "norm", "keys", "products", "scores", "shares", "attended", "row", "answer")
    sizes = (TOKENS, TOKENS, (1, 3, 2, 8, 4), SCORES, SCORES, SCORES, TOKENS, (1, 192), (1, 5))
    moved = {name: grids[source] for name, source in (("keys", "norm"), ("row", "attended")) if source in grids}
    shapes = {"pixels": (1, 3, 8, 8), **dict(zip(names, sizes, strict=True))}
    return Graph(nodes, "pixels", "answer", {**grids, **moved}, shapes)


def saved(graph: Graph, path: Path) -> Any:
    model = model_of(graph, 0, None, {})
    onnx.checker.check_model(model, full_check=True)
    path.write_bytes(model.SerializeToString())
    return onnx.shape_inference.infer_shapes(model)


def ranks_of(model: Any, operator: str) -> list[int]:
    """The number of axes of all that the nodes of ``operator`` make."""
    ranks = {value.name: len(value.type.tensor_type.shape.dim) for value in model.graph.value_info}
    return [ranks[node.output[0]] for node in model.graph.node if node.op_type == operator]


@pytest.mark.parametrize("engine", ["openvino", "onnxruntime"])
@pytest.mark.parametrize("grids", [{}, GRIDS], ids=["float", "rounded"])
def test_joined_axes_leave_the_answers_as_they_are(
    tmp_path: Path, grids: Mapping[str, QuantParams], engine: str
) -> None:
    graph = attention(grids)
    apart = saved(graph, tmp_path / "apart.onnx")
    joined = saved(join_leading_axes(graph), tmp_path / "joined.onnx")
    assert ranks_of(apart, "MatMul") == [5, 5] and ranks_of(apart, "LayerNormalization") == [5]
    assert ranks_of(joined, "MatMul") == [4, 4] and ranks_of(joined, "LayerNormalization") == [3]
    assert ranks_of(joined, "Softmax") == ranks_of(joined, "Mul") == [4]
    images = RANDOM.integers(0, 256, (2, 3, 8, 8), dtype=np.uint8)
    wanted, found = (load(tmp_path / name, engine).run(images) for name in ("apart.onnx", "joined.onnx"))
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


def test_between_product_softmax_and_product_nothing_is_reshaped() -> None:
    kinds = [getattr(node, "kind", type(node).__name__) for node in join_leading_axes(attention({})).nodes]
    first = kinds.index("matmul")
    assert [kind for kind in kinds[first:] if kind != "Reshape"][:4] == ["matmul", "affine", "softmax", "matmul"]
    assert kinds[first : first + 3] == ["matmul", "affine", "softmax"]


def test_what_has_a_number_for_each_place_keeps_its_axes(tmp_path: Path) -> None:
    graph = attention({}, bias=(3, 1, 4, 4))
    joined = saved(join_leading_axes(graph), tmp_path / "joined.onnx")
    saved(graph, tmp_path / "apart.onnx")
    assert ranks_of(joined, "Mul") == [5] and ranks_of(joined, "MatMul") == [4, 4]
    images = RANDOM.integers(0, 256, (1, 3, 8, 8), dtype=np.uint8)
    wanted, found = (load(tmp_path / name, "onnxruntime").run(images) for name in ("apart.onnx", "joined.onnx"))
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("engine", FORMS)
def test_every_form_has_joined_axes_and_no_more_to_join(engine: str) -> None:
    formed = adapt_to_engine(attention(GRIDS), engine)
    assert any(name.endswith("/joined2") for name in formed.shapes)
    assert join_leading_axes(formed) is formed
    made = {formed.input, *(node.output for node in formed.nodes)}
    assert formed.grids.keys() <= made

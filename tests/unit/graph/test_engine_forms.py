"""The form in which an engine gets a graph: the same answers, in operators that the engine has int8 kernels for."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from mgq.engine.classifier.import_wish import ImportWish
from mgq.engine.classifier.onnx_import import import_classifier
from mgq.export.onnx.writer import model_of, plain_graph
from mgq.graph.engine_forms import FORMS, adapt_to_engine, has_own_form, leave_small_layers_in_float, moves
from mgq.graph.layer_graph import Graph, JoinedNorm, Node, Operation, QuantParams, WeightedNode, products_per_number
from mgq.ptq.quantize import quantize
from mgq.quantization.modes import Mode
from mgq.quantization.targets import ONNX
from mgq.runtime.registry import load
from tests.fakes.foreign_models import BODIES, write
from tests.fakes.measured_ranges import measure_ranges

ENGINES = ("openvino", "onnxruntime")


@pytest.fixture(scope="module")
def graph_of_body(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("bodies")

    @cache
    def made(body: str) -> tuple[Graph, Any]:
        images = np.random.default_rng(0).integers(0, 256, (8, 3, 32, 32), dtype=np.uint8)
        path = write(folder / f"{body}.onnx", body)
        network = import_classifier(path, ImportWish(preprocess="torch"), "")[0].network
        ranges = measure_ranges(network, [images], "", "", {}, correct_bias=False, target=ONNX)
        wanted = network(onnx_input(images)).numpy()
        simulated = quantize(network, ranges=ranges, mode=Mode.QAT, in_place=True)
        return plain_graph(simulated, 0), (images, wanted)

    return made


def onnx_input(images: Any) -> Any:
    from megengine import Tensor

    return Tensor(images.astype(np.float32) - 128)


def saved(graph: Graph, path: Path) -> Any:
    model = model_of(graph, 0, None, {})
    onnx.checker.check_model(model, full_check=True)
    path.write_bytes(model.SerializeToString())
    return model


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("body", BODIES)
def test_int8_in_the_form_for_an_engine_answers_nearly_as_float(
    tmp_path: Path, graph_of_body: Any, body: str, engine: str
) -> None:
    graph, (images, wanted) = graph_of_body(body)
    saved(adapt_to_engine(graph, engine), tmp_path / "int8.onnx")
    found = load(tmp_path / "int8.onnx", engine).run(images)
    assert 10 * np.log10((wanted**2).sum() / ((found - wanted) ** 2).sum()) > 20


def test_for_openvino_nothing_is_rounded_between_a_convolution_and_its_activation(
    tmp_path: Path, graph_of_body: Any
) -> None:
    model = saved(adapt_to_engine(graph_of_body("swishes")[0], "openvino"), tmp_path / "int8.onnx")
    readers = {name: node.op_type for node in model.graph.node for name in node.input}
    behind = [readers[node.output[0]] for node in model.graph.node if node.op_type == "Conv"]
    assert sorted(set(behind) - {"Mul", "Sigmoid"}) == ["HardSwish", "QuantizeLinear"]
    assert behind.count("QuantizeLinear") == 1  # behind the one that no activation follows


def test_for_onnx_runtime_every_gate_is_made_of_integers(tmp_path: Path, graph_of_body: Any) -> None:
    model = saved(adapt_to_engine(graph_of_body("swishes")[0], "onnxruntime"), tmp_path / "int8.onnx")
    operators = {node.op_type for node in model.graph.node}
    assert "HardSwish" not in operators
    made = {name: node.op_type for node in model.graph.node for name in node.output}
    read = {name: node.op_type for node in model.graph.node for name in node.input}
    for node in model.graph.node:
        if node.op_type in ("Sigmoid", "Mul"):
            assert {made[name] for name in node.input} == {"DequantizeLinear"}
            assert read[node.output[0]] == "QuantizeLinear"


def test_a_graph_without_swishes_is_the_same_for_every_engine(graph_of_body: Any) -> None:
    graph = graph_of_body("plain")[0]
    assert all(adapt_to_engine(graph, engine) is graph for engine in ("any", "openvino"))
    widened = adapt_to_engine(graph, "onnxruntime")  # of 8 channels
    assert [type(node) for node in widened.nodes] == [type(node) for node in graph.nodes]


def test_joined_tensors_are_joined_as_integers_with_the_same_answers(tmp_path: Path, graph_of_body: Any) -> None:
    graph, (images, _) = graph_of_body("branches")
    paths = tmp_path / "before.onnx", tmp_path / "formed.onnx"
    before, formed = (saved(*pair) for pair in zip((graph, adapt_to_engine(graph, "any")), paths, strict=True))
    assert kinds_behind(before, "Concat") == ["QuantizeLinear"]
    assert kinds_behind(formed, "Concat") != ["QuantizeLinear"]
    for engine in ENGINES:
        plain, joined = (load(path, engine).run(images) for path in paths)
        np.testing.assert_array_equal(joined, plain)


def test_onnx_runtime_joins_grids_in_one_kernel(tmp_path: Path, graph_of_body: Any) -> None:
    graph, (images, _) = graph_of_body("branches")
    paths = {engine: tmp_path / f"{engine}.onnx" for engine in ("any", "onnxruntime")}
    models = {engine: saved(adapt_to_engine(graph, engine), path) for engine, path in paths.items()}
    assert kinds_behind(models["onnxruntime"], "Concat") == ["QuantizeLinear"]
    kernels = [kernels_of(path, tmp_path / "run.onnx") for path in paths.values()]
    assert [names.count("QLinearConcat") for names in kernels] == [0, 1]
    plain, joined = (load(path, "onnxruntime").run(images) for path in paths.values())
    np.testing.assert_array_equal(joined, plain)


def kernels_of(path: Path, run: Path) -> list[str]:
    """The operators that ONNX Runtime makes of the file ``path``, which it writes to ``run``."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(run), 4
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return [node.op_type for node in onnx.load(str(run)).graph.node]


def kinds_behind(model: Any, operator: str) -> list[str]:
    """Operators that read what ``operator`` makes; what puts a border around the image does not count."""
    pads = {node.output[0] for node in model.graph.node if node.op_type == "Pad"}
    makers = [node for node in model.graph.node if node.op_type == operator and not pads & set(node.input)]
    made = {name for node in makers for name in node.output}
    return [node.op_type for node in model.graph.node if made & set(node.input)]


@pytest.mark.parametrize(("engine", "rounded"), [("any", []), ("openvino", ["relu_1"]), ("onnxruntime", [])])
def test_what_others_read_besides_is_rounded_for_a_join_in_openvino_alone(engine: str, rounded: list[str]) -> None:
    nodes: tuple[Node, ...] = (
        Operation(("pixels",), "relu_1", "relu", {}),
        Operation(("relu_1",), "relu_2", "relu", {}),
        Operation(("relu_1", "relu_2"), "concat_1", "concat", {"axis": 1}),
    )
    grids = {
        "relu_1": QuantParams(0.5, 0, 255),
        "relu_2": QuantParams(1.0, 0, 255),
        "concat_1": QuantParams(1.0, 0, 255),
    }
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(("pixels", *grids), (1, 4, 2, 2))
    formed = adapt_to_engine(Graph(nodes, "pixels", "concat_1", grids, shapes), engine)
    assert [node.inputs[0] for node in formed.nodes if isinstance(node, Operation) and node.kind == "round"] == rounded


def list_rounded(reading: str, grid: QuantParams, engine: str) -> list[str]:
    """What is rounded for a whole on ``grid``, which a layer of the kind ``reading`` reads, and for a part of it."""
    nodes: tuple[Node, ...] = (
        Operation(("pixels",), "erf_1", "erf", {}),
        Operation(("pixels",), "add_1", "add", {}),
        Operation(("erf_1", "add_1"), "inner", "concat", {"axis": 1}),
        Operation(("inner", "add_1"), "whole", "concat", {"axis": 1}),
        Operation(("whole",), "read", reading, {}),
    )
    grids = {"add_1": QuantParams(0.5, -128, 127), "inner": QuantParams(1.0, -128, 127), "whole": grid}
    grids["read"] = QuantParams(0.5, 0, 255)
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(("pixels", "erf_1", *grids), (1, 4, 2, 2))
    formed = adapt_to_engine(Graph(nodes, "pixels", "read", grids, shapes), engine)
    return [node.inputs[0] for node in formed.nodes if isinstance(node, Operation) and node.kind == "round"]


@pytest.mark.parametrize("engine", ["any", "onnxruntime"])
def test_parts_of_a_whole_that_is_rounded_next_are_rounded_themselves(engine: str) -> None:
    signed, unsigned = QuantParams(2.0, -128, 127), QuantParams(2.0, 0, 255)
    assert list_rounded("relu", signed, engine) == ["erf_1", "add_1", "inner", "add_1"]
    assert list_rounded("sigmoid", signed, engine) == []
    assert list_rounded("relu", unsigned, engine) == []


@pytest.mark.parametrize("engine", ["any", "openvino"])
def test_layer_norms_are_rounded_behind_the_transposition(tmp_path: Path, graph_of_body: Any, engine: str) -> None:
    model = saved(adapt_to_engine(graph_of_body("channels_last")[0], engine), tmp_path / "int8.onnx")
    readers = {name: node for node in model.graph.node for name in node.input}
    norm = next(node for node in model.graph.node if node.op_type == "LayerNormalization")
    behind = readers[norm.output[0]]
    assert [behind.op_type, readers[behind.output[0]].op_type] == ["Reshape", "Transpose"]


def test_linear_layers_with_channels_last_are_convolutions_without_transpositions(graph_of_body: Any) -> None:
    kinds = [type(node).__name__ for node in graph_of_body("channels_last")[0].nodes]
    assert kinds.count("Transpose") == 2  # around the layer norm alone
    assert kinds.count("Convolution") > 5


@pytest.mark.parametrize("engine", FORMS)
@pytest.mark.parametrize("body", BODIES)
def test_with_some_layers_in_float_the_answers_are_nearer_to_float(
    tmp_path: Path, graph_of_body: Any, body: str, engine: str
) -> None:
    graph, (images, wanted) = graph_of_body(body)
    noises = []
    for share in (0.0, 0.5):
        saved(adapt_to_engine(graph, engine, share), tmp_path / "int8.onnx")
        found = load(tmp_path / "int8.onnx", "onnxruntime").run(images)
        noises.append(float(np.square(found - wanted).sum()))
    assert noises[1] < noises[0]


def test_the_layers_in_float_are_those_that_multiply_least_for_each_number(graph_of_body: Any) -> None:
    graph = graph_of_body("plain")[0]
    weighted = [node for node in graph.nodes if isinstance(node, WeightedNode)]
    whole = {node.output for node in weighted}
    for share in (0.25, 0.5, 0.75):
        left = {
            node.output
            for node in leave_small_layers_in_float(graph, share).nodes
            if isinstance(node, WeightedNode) and node.integers is not None
        }
        work = {node.output: products_per_number(node, graph) for node in weighted}
        assert len(left) == len(weighted) - int(share * len(weighted))
        assert min(work[name] for name in left) >= max(work[name] for name in whole - left)


def test_only_what_an_int8_layer_reads_is_rounded(graph_of_body: Any) -> None:
    graph = leave_small_layers_in_float(graph_of_body("squeeze_and_excite")[0], 0.5)
    read = {name for node in graph.nodes for name in node.inputs if reads_integers(node, graph)}
    assert {graph.input} < set(graph.grids) == read | {graph.input}


def reads_integers(node: Node, graph: Graph) -> bool:
    return node.output in graph.grids if moves(node) else isinstance(node, WeightedNode) and node.integers is not None


@pytest.mark.parametrize("engine", ["any", "openvino"])
def test_linear_layers_over_tokens_are_products_of_matrices(tmp_path: Path, graph_of_body: Any, engine: str) -> None:
    graph, (images, _) = graph_of_body("attention")
    before = [node.op_type for node in saved(graph, tmp_path / "convolutions.onnx").graph.node]
    model = saved(adapt_to_engine(graph, engine), tmp_path / "int8.onnx")
    makers = {name: node for node in model.graph.node for name in node.output}
    products = [node for node in model.graph.node if node.op_type == "MatMul"]
    read = [[makers[name].op_type for name in node.input if name in makers] for node in products]
    assert read.count(["DequantizeLinear", "DequantizeLinear"]) == 2  # attention itself multiplies floats
    after = [node.op_type for node in model.graph.node]
    assert after.count("Conv") == before.count("Conv") - 2
    assert after.count("Transpose") == before.count("Transpose") - 4
    whole, alone = (load(tmp_path / name, "openvino").run(images) for name in ("convolutions.onnx", "int8.onnx"))
    assert ((alone - whole) ** 2).sum() < (whole**2).sum() / 100


@pytest.mark.parametrize("engine", ["any", "openvino"])
def test_activations_between_linear_layers_over_tokens_are_of_rows_too(
    tmp_path: Path, graph_of_body: Any, engine: str
) -> None:
    """MobileViT's tokens lie along two axes, and no transposition is between its layers."""
    graph, (images, _) = graph_of_body("unfolded")
    before = [type(node).__name__ for node in graph.nodes]
    formed = adapt_to_engine(graph, engine)
    after = [type(node).__name__ for node in formed.nodes]
    assert (before.count("Convolution"), after.count("Convolution"), after.count("RowProduct")) == (3, 1, 2)
    assert after.count("Transpose") == before.count("Transpose") - 2
    (inner,) = (node for node in formed.nodes if isinstance(node, Operation) and node.kind == "silu")
    assert formed.shapes[inner.output] == (1, 4, 16, 16)
    saved(graph, tmp_path / "convolutions.onnx")
    saved(adapt_to_engine(graph, "any"), tmp_path / "products.onnx")
    whole, rows = (load(tmp_path / f"{name}.onnx", "onnxruntime").run(images) for name in ("convolutions", "products"))
    np.testing.assert_allclose(rows, whole, rtol=1e-5, atol=1e-5)


def test_for_openvino_norms_read_the_integers_of_what_is_joined(tmp_path: Path, graph_of_body: Any) -> None:
    """DenseNet's parts were rounded anew for each join."""
    graph, (images, wanted) = graph_of_body("dense")
    joins = {node.output for node in graph.nodes if isinstance(node, Operation) and node.kind == "concat"}
    formed = adapt_to_engine(graph, "openvino")
    assert len(joins) == 2 and not joins & formed.grids.keys()
    assert sum(isinstance(node, JoinedNorm) for node in formed.nodes) == 2
    model = saved(formed, tmp_path / "openvino.onnx")
    made = [node.input[0] for node in model.graph.node if node.op_type == "QuantizeLinear"]
    assert len(made) == len(set(made))  # each tensor is rounded once
    saved(adapt_to_engine(graph, "any"), tmp_path / "any.onnx")
    own = {engine: load(tmp_path / "openvino.onnx", engine).run(images) for engine in ENGINES}
    noises = [
        float(((found - wanted) ** 2).sum())
        for found in (own["openvino"], load(tmp_path / "any.onnx", "openvino").run(images))
    ]
    assert noises[0] < noises[1]
    assert ((own["openvino"] - own["onnxruntime"]) ** 2).sum() < noises[0] / 100


def test_for_openvino_products_read_integers_without_their_zero_point(tmp_path: Path, graph_of_body: Any) -> None:
    graph, (images, _) = graph_of_body("unfolded")
    zero_points, answers = [], []
    for engine in ("any", "openvino"):
        model = saved(adapt_to_engine(graph, engine), tmp_path / f"{engine}.onnx")
        values = {value.name: onnx.numpy_helper.to_array(value) for value in model.graph.initializer}
        makers = {name: node for node in model.graph.node for name in node.output}
        products = [node for node in model.graph.node if node.op_type == "MatMul"]
        zero_points.append([int(values[makers[node.input[0]].input[2]]) for node in products])
        answers.append(load(tmp_path / f"{engine}.onnx", "onnxruntime").run(images))
    assert all(zero_points[0]) and zero_points[1] == [0, 0]
    assert ((answers[1] - answers[0]) ** 2).sum() < (answers[0] ** 2).sum() / 1000  # OpenVINO's form rounds less, too


def test_onnx_runtime_has_convolutions_over_tokens_in_a_form_of_its_own(tmp_path: Path, graph_of_body: Any) -> None:
    graph, (images, _) = graph_of_body("attention")
    assert has_own_form(graph, "onnxruntime")
    assert not has_own_form(graph_of_body("plain")[0], "openvino")
    models = [saved(adapt_to_engine(graph, engine), tmp_path / f"{engine}.onnx") for engine in ("any", "onnxruntime")]
    products, convolutions = ([node.op_type for node in model.graph.node].count("Conv") for model in models)
    assert convolutions == products + 2
    first, second = (load(tmp_path / f"{engine}.onnx", "onnxruntime").run(images) for engine in ("any", "onnxruntime"))
    np.testing.assert_allclose(first, second, rtol=1e-5, atol=1e-5)  # the same integers

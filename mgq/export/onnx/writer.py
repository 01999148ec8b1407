"""The writer of ONNX files: standard operators only, integers between QuantizeLinear and DequantizeLinear (QDQ).

The form is the one that engines turn into integer kernels throughout: pixels are the integers that the first
convolution reads; what lies behind a ReLU is uint8 with zero point 0, so that its saturation is the ReLU; what has a
sign is uint8 with zero point 128, which ONNX Runtime runs faster than int8; shuffles and max pooling move integers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import megengine.module as M
import numpy as np
import numpy.typing as npt

from mgq.errors import FailureError
from mgq.export.onnx.float_input import FloatInput, write_entry
from mgq.export.onnx.onnx_file import METADATA, import_package
from mgq.export.onnx.operations import MOVES, border_values_of, pads_of, write_operation
from mgq.graph.engine_forms import adapt_to_engine
from mgq.graph.layer_graph import (
    Add,
    Convolution,
    GlobalAverage,
    Graph,
    JoinedNorm,
    Linear,
    MaxPool,
    Node,
    Operation,
    QuantParams,
    Reshape,
    RowProduct,
    Transpose,
    WeightedNode,
)
from mgq.graph.network_reader import graph_of
from mgq.graph.rewrites import REWRITES, merge_narrow_groups, without_shuffles
from mgq.io.atomic import atomic_write
from mgq.quantization.activations import IDENTITY, RELU, Activation
from mgq.quantization.half_to_even import bias_steps
from mgq.quantization.option_names import ANY_ENGINE

OPSET = 17
IR_VERSION = 8
"""The oldest that has the opset: the more engines read it."""
INPUT, OUTPUT = "data", "logits"


@dataclass(frozen=True)
class OnnxReport:
    """What was written: bytes of the file, and of the integers in it (0 in a float network)."""

    path: Path
    size: int
    parameters: int


def write_onnx(
    network: M.Module,
    path: Path,
    *,
    image_size: int,
    batch: int | None,
    provenance: Mapping[str, Any],
    rewrites: Sequence[str] = (),
    engine: str = ANY_ENGINE,
    float_share: float = 0.0,
    kept: FloatInput | None = None,
) -> OnnxReport:
    """Write ``network``, mode ``normal`` or ``qat``, to ``path``: in float32, or in int8 with the grids of ``qat``.

    The file takes uint8 (``batch``, 3, S, S) pixels in BGR, of any number where ``batch`` is None, and gives float32
    logits; with ``kept`` it takes, and calls its answer, what that says. ``rewrites`` are names of
    :data:`mgq.graph.rewrites.REWRITES`, ``engine`` is that of :data:`mgq.graph.engine_forms.FORMS` which is to run the
    file soonest, and ``float_share`` is as in :func:`mgq.graph.engine_forms.adapt_to_engine`. ``provenance`` lies as
    JSON in its metadata. ONNX's own checker has to accept the file, shapes of all tensors included. Raises FailureError
    where a layer cannot be exported, InputError where ONNX is not installed; nothing is left at ``path`` then.
    """
    graph = plain_graph(network, image_size)
    for name in rewrites:
        graph = REWRITES[name](graph)
    graph = adapt_to_engine(graph, engine, float_share)
    onnx = import_package("onnx")
    model = model_of(graph, image_size, batch, provenance, kept)
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise FailureError(f"{path} is not written: ONNX refuses it: {error}") from None
    content = model.SerializeToString()
    with atomic_write(path) as temporary:
        temporary.write_bytes(content)
    integers = [
        node.integers.size for node in graph.nodes if isinstance(node, WeightedNode) and node.integers is not None
    ]
    return OnnxReport(path, len(content), sum(integers))


def plain_graph(network: M.Module, image_size: int) -> Graph:
    """What is written without ``rewrites``: shuffles behind a dense convolution are in it already, for nothing, and
    narrow groups are merged."""
    return merge_narrow_groups(without_shuffles(graph_of(network, image_size), most=0))


def model_of(
    graph: Graph, image_size: int, batch: int | None, provenance: Mapping[str, Any], kept: FloatInput | None = None
) -> Any:
    """``graph`` as an ONNX model."""
    onnx = import_package("onnx")
    helper, types = onnx.helper, onnx.TensorProto

    writer = Writer(graph)
    writer.write()
    shape: list[int | str] = [batch or "N", *graph.shapes[graph.input][1:]]
    classes = graph.shapes[graph.output][-1]
    body = helper.make_graph(
        writer.nodes,
        "mgq",
        [helper.make_tensor_value_info(INPUT, types.UINT8, shape)],
        [helper.make_tensor_value_info(OUTPUT, types.FLOAT, [batch or "N", classes])],
        [onnx.numpy_helper.from_array(value, name) for name, value in writer.constants.items()],
    )
    model = helper.make_model(
        body, producer_name="mgq", opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION
    )
    entry = model.metadata_props.add()
    entry.key = METADATA
    entry.value = json.dumps({**provenance, "input": kept.to_json() if kept else input_of(shape)}, sort_keys=True)
    if kept is not None:
        write_entry(model, kept)
    return model


def input_of(shape: list[int | str]) -> dict[str, Any]:
    return {"name": INPUT, "type": "uint8", "shape": shape, "order": "BGR"}


class Writer:
    """Turns the nodes of a graph into those of ONNX, in ``nodes`` and ``constants``.

    A tensor with a grid has two names: as integers, and behind its DequantizeLinear as floats.
    """

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.make_node = import_package("onnx.helper").make_node
        self.nodes: list[Any] = []
        self.constants: dict[str, npt.NDArray[Any]] = {}
        self.floats: dict[str, str] = {}
        self.integers: dict[str, str] = {}
        self.counts: dict[str, str] = {}
        self.from_zero: dict[str, str] = {}

    def write(self) -> None:
        grid = self.graph.grids.get(self.graph.input, QuantParams(1.0))
        assert grid.scale == 1.0
        self.integers[self.graph.input] = INPUT
        if self.graph.input not in self.graph.grids:
            self.floats[self.graph.input] = self.dequantize(INPUT, self.graph.input, grid)
        for node in self.graph.nodes:
            self.write_node(node)
        if not any(OUTPUT in node.output for node in self.nodes):
            self.nodes.append(self.make_node("Identity", [self.float_of(self.graph.output)], [OUTPUT], name=OUTPUT))

    def write_node(self, node: Node) -> None:
        kinds = {
            Convolution: self.write_convolution,
            Linear: self.write_linear,
            RowProduct: self.write_row_product,
            JoinedNorm: self.write_joined_norm,
            Add: self.write_add,
            MaxPool: self.write_max_pool,
            GlobalAverage: self.write_average,
            Reshape: self.write_reshape,
            Transpose: self.write_transpose,
            Operation: self.write_operation,
        }
        write: Any = kinds[type(node)]
        write(node)

    def add(self, operator: str, inputs: list[str], output: str, **attributes: Any) -> str:
        self.nodes.append(self.make_node(operator, inputs, [output], name=f"{output}/{operator}", **attributes))
        return output

    def constant(self, name: str, value: npt.NDArray[Any]) -> str:
        known = self.constants.setdefault(name, value)
        assert known is value or np.array_equal(known, value), f"two constants are called {name}"
        return name

    def float_of(self, tensor: str) -> str:
        """The name of ``tensor`` as floats."""
        if tensor not in self.floats:
            self.floats[tensor] = self.dequantize(self.integers[tensor], tensor, self.graph.grids[tensor])
        return self.floats[tensor]

    def float_from_zero(self, tensor: str) -> str:
        """The name of ``tensor`` as floats that begin at 0, which its zero point stands above."""
        if self.graph.grids[tensor].zero_point == 0:
            return self.float_of(tensor)
        if tensor not in self.from_zero:
            scale, _ = self.grid_constants(tensor, self.graph.grids[tensor])
            inputs = [self.integers[tensor], scale, self.constant(f"{tensor}/from_zero", np.array(0, np.uint8))]
            self.from_zero[tensor] = self.add("DequantizeLinear", inputs, f"{tensor}/counted")
        return self.from_zero[tensor]

    def counts_of(self, tensor: str) -> str:
        """The name of the integers of ``tensor`` as floats, without their scale."""
        if tensor not in self.counts:
            value = self.add(
                "Cast", [self.integers[tensor]], f"{tensor}/cast", to=import_package("onnx").TensorProto.FLOAT
            )
            zero_point = self.graph.grids[tensor].zero_point
            if zero_point:
                zero = self.constant(f"{tensor}/zero", np.array(zero_point, np.float32))
                value = self.add("Sub", [value, zero], f"{tensor}/counts")
            self.counts[tensor] = value
        return self.counts[tensor]

    def grid_constants(self, tensor: str, grid: QuantParams) -> list[str]:
        zero_point = grid.zero_point
        return [
            self.constant(f"{tensor}/scale", np.array(grid.scale, np.float32)),
            self.constant(f"{tensor}/zero_point", np.array(zero_point, np.uint8)),
        ]

    def dequantize(self, integers: str, tensor: str, grid: QuantParams) -> str:
        return self.add("DequantizeLinear", [integers, *self.grid_constants(tensor, grid)], f"{tensor}/float")

    def finish(self, node: Node, value: str) -> None:
        """``value``, what ``node`` computes in floats, becomes its output: rounded to the grid where it has one."""
        grid = self.graph.grids.get(node.output)
        if grid is None:
            self.floats[node.output] = value
            return
        quantized = self.add("QuantizeLinear", [value, *self.grid_constants(node.output, grid)], f"{node.output}/q")
        qmin, qmax = (limit + grid.zero_point for limit in (grid.qmin, grid.qmax))
        if (qmin, qmax) != (0, 255):
            quantized = self.limit(node.output, quantized, qmin, qmax)
        self.integers[node.output] = quantized

    def limit(self, name: str, integers: str, lowest: int, highest: int) -> str:
        """``integers`` within limits, uint8."""
        limits = [
            self.constant(f"{name}/{what}", np.array(limit, np.uint8))
            for what, limit in (("lowest", lowest), ("highest", highest))
        ]
        return self.add("Clip", [integers, *limits], f"{name}/clipped")

    def move(self, node: Node, operator: str, more: list[str], **attributes: Any) -> None:
        """An operator that only moves or chooses values: it is done with the integers where there are any."""
        (source,) = node.inputs
        table = self.integers if source in self.graph.grids else self.floats
        value = self.add(operator, [table[source], *more], f"{node.output}/{operator}", **attributes)
        if table is self.floats:
            self.finish(node, value)
        else:
            table[node.output] = value

    def parameters(self, node: WeightedNode) -> list[str]:
        """Names of the weights of ``node`` as floats, and of its bias where it has one."""
        name = node.output
        grid = self.graph.grids.get(node.inputs[0])
        if node.integers is None or node.scales is None or grid is None:
            names = [self.constant(f"{name}/weight", node.weight)]
            return names + ([self.constant(f"{name}/bias", node.bias)] if node.bias is not None else [])
        names = [self.dequantize_constant(f"{name}/weight", node.integers, node.scales)]
        if node.bias is not None:
            scales = (node.scales * np.float32(grid.scale)).astype(np.float32)
            names.append(self.dequantize_constant(f"{name}/bias", bias_steps(node.bias, scales), scales))
        return names

    def dequantize_constant(
        self, name: str, integers: npt.NDArray[Any], scales: npt.NDArray[np.float32], axis: int = 0
    ) -> str:
        """One scale for all, or one for each output, which lie along ``axis``."""
        if scales.size == 1:
            scales = scales.reshape(())
        inputs = [self.constant(f"{name}/integers", integers), self.constant(f"{name}/scale", scales)]
        if integers.dtype == np.int8:  # a zero point is optional, but engines look for that of weights
            inputs.append(self.constant(f"{name}/zero_point", np.zeros(scales.shape, np.int8)))
        attributes = {"axis": axis} if scales.ndim else {}
        return self.add("DequantizeLinear", inputs, f"{name}/float", **attributes)

    def write_convolution_inputs(self, node: Convolution) -> list[str]:
        """What a Conv reads: the source of ``node`` as floats, weights and bias.

        Float weights that stand between DequantizeLinear and QuantizeLinear ONNX Runtime would quantize by itself. So
        their source is cast instead, and its scale is theirs.
        """
        (source,) = node.inputs
        if node.integers is None and source in self.graph.grids:
            scaled = replace(node, weight=node.weight * np.float32(self.graph.grids[source].scale))
            return [self.counts_of(source), *self.parameters(scaled)]
        return [self.float_of(source), *self.parameters(node)]

    def write_convolution(self, node: Convolution) -> None:
        value = self.add(
            "Conv",
            self.write_convolution_inputs(node),
            f"{node.output}/sum",
            kernel_shape=list(node.weight.shape[2:]),
            strides=list(node.stride),
            pads=[*node.padding, *(node.padding_end or node.padding)],
            dilations=list(node.dilation),
            group=node.groups,
        )
        self.finish(node, self.activate(node.output, node.activation, value))

    def activate(self, name: str, activation: Activation, value: str) -> str:
        """Behind a grid that begins at 0 the ReLU is its saturation, and there is no operator of it."""
        grid = self.graph.grids.get(name)
        if activation is RELU and grid is None:
            return self.add("Relu", [value], f"{name}/relu")
        if activation.clips and grid is None:
            bounds = (activation.low, activation.high)
            limits = [self.constant(f"{name}/{bound:g}", np.array(bound, np.float32)) for bound in bounds]
            return self.add("Clip", [value, *limits], f"{name}/{activation.name}")
        return value

    def write_linear(self, node: Linear) -> None:
        inputs = [self.float_of(node.inputs[0]), *self.parameters(node)]
        self.finish(node, self.add("Gemm", inputs, self.result(node), transB=1))

    def write_row_product(self, node: RowProduct) -> None:
        """A MatMul by (I, O), and the bias in the steps that an integer kernel adds."""
        name, source = node.output, node.inputs[0]
        grid, bias, read = self.graph.grids.get(source), node.bias, self.float_of
        if node.integers is None or node.scales is None or grid is None:
            factor, read = (1.0, read) if grid is None else (grid.scale, self.counts_of)  # as for a convolution
            weight = self.constant(f"{name}/weight", np.ascontiguousarray(node.weight.T * np.float32(factor)))
        else:
            integers = np.ascontiguousarray(node.integers.T)
            weight = self.dequantize_constant(f"{name}/weight", integers, node.scales, axis=1)
            scales = (node.scales * np.float32(grid.scale)).astype(np.float32)
            steps = np.zeros(1, np.int64) if bias is None else bias_steps(bias, scales).astype(np.int64)
            if node.counts_from_zero:
                read, steps = self.float_from_zero, steps - grid.zero_point * integers.sum(axis=0, dtype=np.int64)
            bias = (steps * scales).astype(np.float32) if steps.any() else None
        value = self.add("MatMul", [read(source), weight], f"{name}/product")
        if bias is not None:
            value = self.add("Add", [value, self.constant(f"{name}/bias", bias)], f"{name}/sum")
        self.finish(node, value)

    def write_joined_norm(self, node: JoinedNorm) -> None:
        name, kind = node.output, import_package("onnx").TensorProto.FLOAT
        whole = self.add("Concat", [self.integers[source] for source in node.inputs], f"{name}/whole", axis=1)
        value = self.add("Cast", [whole], f"{name}/counts", to=kind)
        for operator, values in (("Mul", node.scale), ("Add", node.shift)):
            constant = self.constant(f"{name}/{operator}/values", values.reshape(1, -1, 1, 1))
            value = self.add(operator, [value, constant], f"{name}/{operator}")
        self.finish(node, value)

    def result(self, node: Node) -> str:
        return OUTPUT if node.output == self.graph.output else f"{node.output}/sum"

    def write_add(self, node: Add) -> None:
        value = self.add("Add", [self.summand(tensor) for tensor in node.inputs], f"{node.output}/sum")
        self.finish(node, self.activate(node.output, RELU if node.relu else IDENTITY, value))

    def summand(self, tensor: str) -> str:
        """The name of ``tensor`` as floats for a sum: what a convolution made is put on its grid once more.

        OpenVINO leaves out the first rounding behind a convolution where a sum and another follow (2025.4), so that its
        integers are not those of others. It keeps the second, all in the kernel of the convolution as before, and ONNX
        Runtime drops it.
        """
        makers = [node for node in self.graph.nodes if node.output == tensor]
        if tensor not in self.graph.grids or not any(isinstance(node, Convolution) for node in makers):
            return self.float_of(tensor)
        constants = self.grid_constants(tensor, self.graph.grids[tensor])
        again = self.add("QuantizeLinear", [self.float_of(tensor), *constants], f"{tensor}/again")
        return self.add("DequantizeLinear", [again, *constants], f"{tensor}/summand")

    def write_max_pool(self, node: MaxPool) -> None:
        shape = {"kernel_shape": list(node.kernel), "strides": list(node.stride)}
        self.move(node, "MaxPool", [], **shape, pads=[*node.padding, *node.padding])

    def write_average(self, node: GlobalAverage) -> None:
        value = self.add("GlobalAveragePool", [self.float_of(node.inputs[0])], f"{node.output}/mean")
        self.finish(node, value)
        table = self.integers if node.output in self.graph.grids else self.floats
        table[node.output] = self.add("Flatten", [table[node.output]], f"{node.output}/flat", axis=1)

    def write_reshape(self, node: Reshape) -> None:
        # 0 keeps the batch, whatever it is.
        shape = self.constant(f"{node.output}/shape", np.array([0, *node.shape[1:]], np.int64))
        self.move(node, "Reshape", [shape])

    def write_transpose(self, node: Transpose) -> None:
        self.move(node, "Transpose", [], perm=list(node.axes))

    def write_operation(self, node: Operation) -> None:
        if node.kind == "round":
            self.finish(node, self.float_of(node.inputs[0]))
        elif node.kind == "concat" and self.is_on_one_grid(node):
            self.write_joined_integers(node)
        elif not node.moves and node.kind != "limit":
            self.finish(node, write_operation(node, self.list_sources(node), self))
        elif node.kind == "pad":
            self.write_pad(node)
        elif node.kind == "limit":
            self.write_limit(node)
        else:
            table = self.integers if node.inputs[0] in self.graph.grids else self.floats
            operator, sources, attributes = MOVES[node.kind](node, table[node.inputs[0]], self)
            table[node.output] = self.add(operator, sources, f"{node.output}/{operator}", **attributes)

    def list_sources(self, node: Operation) -> list[str]:
        """What ``node`` reads as floats.

        ONNX Runtime 1.20 joins a Softmax with the integers on both sides of it, and what is too large for its grid
        begins at 0 again. So its integers are cast and scaled instead.
        """
        if node.kind == "softmax" and {*node.inputs, node.output} <= self.graph.grids.keys():
            (source,) = node.inputs
            scale, _ = self.grid_constants(source, self.graph.grids[source])
            return [self.add("Mul", [self.counts_of(source), scale], f"{node.output}/scaled")]
        return [self.float_of(source) for source in node.inputs]

    def is_on_one_grid(self, node: Node) -> bool:
        """Whether all that ``node`` reads lies on the grid of what it gives."""
        grid = self.graph.grids.get(node.output)
        return grid is not None and all(self.graph.grids.get(name) == grid for name in node.inputs)

    def write_joined_integers(self, node: Operation) -> None:
        parts = [self.integers[name] for name in node.inputs]
        self.integers[node.output] = self.add("Concat", parts, f"{node.output}/Concat", axis=node.options["axis"])

    def write_pad(self, node: Operation) -> None:
        """Around integers there are integers: the values in terms of their scale."""
        grid, pads = self.graph.grids.get(node.inputs[0]), pads_of(node)
        values = border_values_of(node, grid)
        if len(values) == 1:
            self.move(node, "Pad", self.pad_constants(node.output, pads, values[0]))
            return
        table = self.floats if grid is None else self.integers
        parts = []
        for channel, value in enumerate(values):  # less than no border before and behind it leaves one channel
            pads[1], pads[5] = -channel, channel + 1 - len(values)
            name = f"{node.output}/{channel}"
            parts.append(
                self.add("Pad", [table[node.inputs[0]], *self.pad_constants(name, pads, value)], f"{name}/Pad")
            )
        whole = self.add("Concat", parts, f"{node.output}/Concat", axis=1)
        if grid is None:
            self.finish(node, whole)
        else:
            self.integers[node.output] = whole

    def pad_constants(self, name: str, pads: list[int], value: Any) -> list[str]:
        return [
            self.constant(f"{name}/pads", np.array(pads, np.int64)),
            self.constant(f"{name}/value", np.array(value)),
        ]

    def write_limit(self, node: Operation) -> None:
        """Integers within limits, which from there on lie on another grid."""
        options, source = node.options, self.integers[node.inputs[0]]
        self.integers[node.output] = self.limit(node.output, source, options["low"], options["high"])

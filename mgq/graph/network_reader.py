"""Reads a network as a graph of plain layers (:mod:`mgq.graph.layer_graph`).

It is read from the traced network, whose layers are not split, so that scales and parameters are those of the layers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from copy import deepcopy
from typing import Any

import megengine.functional as F
import megengine.module as M
import megengine.module.qat as Q
import numpy as np
from megengine import Tensor
from megengine.module.conv_bn import _ConvBnActivation2d
from megengine.quantization.quantize import disable_fake_quant, disable_observer
from megengine.traced_module import register_as_builtin, trace_module
from megengine.traced_module.expr import CallFunction, CallMethod, Expr

from mgq.errors import FailureError
from mgq.graph.layer_graph import (
    Add,
    Array,
    Convolution,
    GlobalAverage,
    Graph,
    Integers,
    Linear,
    MaxPool,
    Node,
    Operation,
    QuantParams,
    Reshape,
    Transpose,
    pair,
)
from mgq.quantization.batch_norm_folding import activation_of, fold_layer
from mgq.quantization.half_to_even import EvenFakeQuantize, ends_of
from mgq.quantization.learned_scales import round_in_place
from mgq.quantization.modes import Mode, mode_of
from mgq.quantization.qat_layers import fold_bias, fold_weight, is_float_layer
from mgq.quantization.relu6 import QAT_TO_QUANTIZED
from mgq.quantization.targets import (
    WEIGHT_LEVELS,
    ChannelFakeQuantize,
    QuantizedFeatures,
    channel_scales,
    is_never_negative,
    target_of,
)
from mgq.zoo.blueprint import INPUT, MOVES, LayerPlan
from mgq.zoo.blueprint_network import BlueprintNetwork
from mgq.zoo.layers import ConvBnRelu6


def graph_of(network: M.Module, image_size: int, with_integers: bool = True) -> Graph:
    """The graph of ``network``, mode ``normal`` or ``qat``. Raises FailureError that names a layer that is not
    supported. A network built from a blueprint has its own image size. The weights of a network in mode ``qat`` are
    there as integers, too, unless nobody wants them.
    """
    if isinstance(network, BlueprintNetwork):
        return BlueprintReader(network, with_integers).graph()
    return Reader(network, image_size, with_integers).graph()


_kept_traces: ContextVar[dict[Any, Any] | None] = ContextVar("kept_traces", default=None)


@contextlib.contextmanager
def keep_traces() -> Iterator[None]:
    """Within it, networks that are copies of one are traced once in each mode: for a caller that changes numbers alone.

    Networks count as copies where their layers have the same names and classes and their parameters the same shapes.
    """
    token = _kept_traces.set({})
    try:
        yield
    finally:
        _kept_traces.reset(token)


def trace(network: M.Module, image_size: int) -> Any:
    """MegEngine's own graph of ``network``, flat; its layers stay whole."""
    copy = deepcopy(network)
    copy.eval()
    if mode_of(copy) is Mode.QAT:
        disable_fake_quant(copy)
        disable_observer(copy)
    for kind in (*QAT_TO_QUANTIZED, ConvBnRelu6, EvenFakeQuantize):
        register_as_builtin(kind)
    return trace_module(copy, Tensor(np.zeros((1, 3, image_size, image_size), np.float32))).flatten().graph


class Reader:
    """Reads the traced network, expression by expression."""

    def __init__(self, network: M.Module, image_size: int, with_integers: bool) -> None:
        self.quantized = mode_of(network) is Mode.QAT
        self.with_integers = with_integers
        self.levels = target_of(network).levels
        self.network = network
        self.modules = dict(network.named_modules())
        self.image_size = image_size
        self.nodes: list[Node] = []
        self.grids: dict[str, QuantParams] = {}
        self.layers: dict[str, str] = {}  # name of a tensor when traced -> the layer that makes it
        self.same_as: dict[str, str] = {}  # tensors that are others unchanged
        self.exits: set[str] = set()  # layers behind which an int8 network is in float

    def graph(self) -> Graph:
        flat = self.trace()
        shapes: dict[str, tuple[int, ...]] = {}
        for expression in flat._exprs:
            self.read(expression)
        source = flat.inputs[1]
        output = self.name(flat.outputs[0])
        for node in flat.nodes(recursive=True):
            if getattr(node, "shape", None) is not None:
                shapes[self.name(node)] = tuple(int(axis) for axis in node.shape)
        return Graph(tuple(self.nodes), source._name, output, self.grids, shapes)

    def trace(self) -> Any:
        """The operations of the network in MegEngine's own graph, or those of one before that is of the same layers."""
        kept = _kept_traces.get()
        if kept is None:
            return trace(self.network, self.image_size)
        shapes = tuple(tuple(value.shape) for value in self.network.parameters())
        key = self.image_size, shapes, *((name, type(module)) for name, module in self.modules.items())
        if key not in kept:
            kept[key] = trace(self.network, self.image_size)
        return kept[key]

    def name(self, node: Any) -> str:
        name: str = self.layers.get(node._name, node._name)
        return self.same_as.get(name, name)

    def read(self, expression: Expr) -> None:
        if isinstance(expression, CallFunction):
            self.read_function(expression)
        elif isinstance(expression, CallMethod) and expression.method == "__call__":
            called, *sources = expression.inputs
            layer = called.qualname.partition(".")[2]
            self.layers[expression.outputs[0]._name] = layer
            self.read_module(self.modules[layer], [self.name(source) for source in sources], layer)
        elif type(expression).__name__ not in ("GetAttr", "Input"):
            raise FailureError(f"the network does {expression}, which cannot be exported")

    def read_module(self, module: M.Module, inputs: list[str], output: str) -> None:
        for kind, read in self.readers():
            if isinstance(module, kind):
                read(module, tuple(inputs), output)
                return
        raise FailureError(f"a layer of type {type(module).__name__} cannot be exported")

    def readers(self) -> tuple[tuple[Any, Callable[[Any, tuple[str, ...], str], None]], ...]:
        return (
            (M.Identity, self.read_nothing),
            (M.Dropout, self.read_nothing),
            (M.QuantStub | Q.QuantStub, self.read_stub),
            (M.DequantStub | Q.DequantStub, self.read_stub),
            (M.MaxPool2d, self.read_max_pool),
            (M.Elemwise, self.read_sum),
            (M.Linear, self.read_linear),
            (_ConvBnActivation2d, self.read_convolution),
        )

    def read_nothing(self, _: M.Module, inputs: tuple[str, ...], output: str) -> None:
        self.same_as[output] = inputs[0]

    def read_stub(self, module: M.Module, inputs: tuple[str, ...], output: str) -> None:
        """The entry to the int8 network, or the exit; nothing to be done in either but to note the grid."""
        self.same_as[output] = inputs[0]
        if isinstance(module, M.DequantStub | Q.DequantStub):
            self.exits.add(output)
        if isinstance(module, Q.QuantStub | QuantizedFeatures):
            self.grids[inputs[0]] = find_quant_params(module)

    def read_max_pool(self, module: M.MaxPool2d, inputs: tuple[str, ...], output: str) -> None:
        self.nodes.append(MaxPool(inputs, output, pair(module.kernel_size), pair(module.stride), pair(module.padding)))
        self.pass_grid(inputs[0], output)

    def read_sum(self, module: M.Elemwise, inputs: tuple[str, ...], output: str) -> None:
        method = str(module.method).upper().rpartition(".")[2]
        if method not in ("ADD", "FUSE_ADD_RELU"):
            raise FailureError(f"an element-wise {method} cannot be exported")
        self.nodes.append(Add(inputs, output, method == "FUSE_ADD_RELU"))
        if isinstance(module, Q.QATModule):
            self.grids[output] = find_quant_params(module)

    def read_linear(self, module: M.Linear, inputs: tuple[str, ...], output: str) -> None:
        bias = None if module.bias is None else np.ravel(module.bias.numpy())
        weight = module.weight.numpy()
        # Whatever the network is quantized for, a classifier behind integers is best integers, too.
        integers, scales = quantize_channels(weight, self.levels) if inputs[0] in self.grids else (None, None)
        self.nodes.append(Linear(inputs, output, weight, bias, integers, scales))

    def read_convolution(self, module: Any, inputs: tuple[str, ...], output: str) -> None:
        conv = module.conv
        if conv.padding_mode != "zeros":
            raise FailureError("a convolution with padding other than zeros cannot be exported")
        activation = activation_of(module)
        weight, bias = fold_parameters(module)
        is_int8 = self.quantized and self.with_integers and not is_float_layer(module)
        integers, scales = quantize_weights(module, weight) if is_int8 else (None, None)
        self.nodes.append(
            Convolution(
                inputs,
                output,
                weight,
                bias,
                integers,
                scales,
                pair(conv.stride),
                pair(conv.padding),
                conv.groups,
                activation,
                dilation=pair(conv.dilation),
            )
        )
        if self.quantized:
            self.grids[output] = find_quant_params(module)

    def read_function(self, expression: CallFunction) -> None:
        function = expression.func
        source, output = self.name(expression.inputs[0]), expression.outputs[0]._name
        arguments = [value for value in expression.args[1:] if not hasattr(value, "_name")]
        if function is F.reshape:
            self.nodes.append(Reshape((source,), output, numbers(arguments[0])))
        elif function is F.transpose:
            self.nodes.append(Transpose((source,), output, numbers(arguments[0])))
        elif function is F.flatten:
            self.same_as[output] = source  # the classifier reads (N, C, 1, 1) as (N, C)
            return
        elif function is F.avg_pool2d and pair(arguments[0]) == tuple(expression.inputs[0].shape[2:]):
            self.nodes.append(GlobalAverage((source,), output))
            is_float = self.layers.get(expression.inputs[0]._name) in self.exits
            if source in self.grids and not is_float:
                self.grids[output] = self.grids[source].refine()
            return
        else:
            raise FailureError(f"the function {function.__name__} of the network cannot be exported")
        self.pass_grid(source, output)

    def pass_grid(self, source: str, output: str) -> None:
        if source in self.grids:
            self.grids[output] = self.grids[source]


class BlueprintReader(Reader):
    """Reads a network that is described by data, layer by layer."""

    def __init__(self, network: BlueprintNetwork, with_integers: bool) -> None:
        super().__init__(network, 0, with_integers)
        self.blueprint = network.blueprint
        self.shapes: dict[str, tuple[int, ...]] = network.shapes()

    def graph(self) -> Graph:
        if self.quantized:
            self.grids[INPUT] = QuantParams(1.0)
        for plan in self.blueprint.layers:
            self.read_plan(plan)
        return Graph(tuple(self.nodes), INPUT, self.blueprint.output, self.grids, self.shapes)

    def read_plan(self, plan: LayerPlan) -> None:
        module = self.modules[plan.name]
        if plan.kind == "conv":
            self.read_convolution(module, plan.inputs, plan.name)
        elif plan.kind == "linear":
            self.read_linear(module, plan.inputs, plan.name)
        elif isinstance(module, M.Elemwise):
            self.read_sum(module, plan.inputs, plan.name)
        else:
            self.read_operation(plan, module)

    def read_operation(self, plan: LayerPlan, module: Any) -> None:
        constants = {name: getattr(module, name).numpy() for name in getattr(module, "constants", ())}
        options = {name: value for name, value in plan.options.items() if name != "constants"}
        self.nodes.append(
            self.make_known_node(plan) or Operation(plan.inputs, plan.name, plan.kind, options, constants)
        )
        if plan.kind in MOVES:
            self.pass_grid(plan.inputs[0], plan.name)
        elif isinstance(module, Q.QATModule):
            self.grids[plan.name] = find_quant_params(module)

    def make_known_node(self, plan: LayerPlan) -> Node | None:
        """The node for ``plan`` where the zoo's networks have such a layer, too; else None."""
        options = plan.options
        is_plain = plan.kind == "max_pool" and not options["ceil"] and "dilation" not in options
        if is_plain and options["pads"][:2] == options["pads"][2:]:
            kernel, stride, padding = pair(options["kernel"]), pair(options["stride"]), pair(options["pads"][:2])
            return MaxPool(plan.inputs, plan.name, kernel, stride, padding)
        if plan.kind == "global_max":
            _, _, height, width = self.shapes[plan.inputs[0]]
            return MaxPool(plan.inputs, plan.name, (height, width), (height, width), (0, 0))
        if plan.kind == "reshape":
            return Reshape(plan.inputs, plan.name, (1, *numbers(options["shape"])))
        if plan.kind == "transpose":
            return Transpose(plan.inputs, plan.name, numbers(options["axes"]))
        return None


def numbers(values: Any) -> tuple[int, ...]:
    return tuple(int(value) for value in values)


def fold_parameters(module: Any) -> tuple[Array, Array]:
    """Weights (O, C / groups, H, W) and bias (O,) with batch norm folded in, float32."""
    if isinstance(module, Q.QATModule):
        weight, bias = fold_weight(module).numpy(), fold_bias(module)
    else:
        plain = fold_layer(module)
        weight, bias = plain.weight.numpy(), np.ravel(plain.bias.numpy())
    return weight.reshape(-1, *weight.shape[-3:]), bias


def find_quant_params(module: Q.QATModule) -> QuantParams:
    """The grid of the output of ``module``."""
    qparams = module.act_observer.get_qparams()
    meta = qparams.dtype_meta
    scale = float(qparams.scale.numpy())
    qmin, qmax = ends_of(meta, scale)
    return QuantParams(scale, 0 if is_never_negative(module) else int(qmin), int(qmax))


def quantize_weights(module: Q.QATModule, weight: Array) -> tuple[Integers, Array]:
    """``weight`` (O, ...) as int8, and the scale of all or of each output, float32 (1,) or (O,)."""
    if isinstance(module.weight_fake_quant, ChannelFakeQuantize):
        scales = np.ravel(module.weight_fake_quant.scales_of(Tensor(weight)).numpy())
        return to_steps(weight, scales), scales
    scale = np.ravel(module.weight_observer.get_qparams().scale.numpy()).astype(np.float32)
    return to_steps(weight, scale), scale


def quantize_channels(weight: Array, levels: int) -> tuple[Integers, Array]:
    """``weight`` (O, ...) as int8, each output on a grid of its own, and their scales, float32 (O,)."""
    scales = np.ravel(channel_scales(Tensor(weight), levels).numpy())
    return to_steps(weight, scales), scales


def to_steps(weight: Array, scales: Array) -> Integers:
    """``weight`` in terms of ``scales``, halves rounded away from zero as in MegEngine."""
    steps = weight / scales.reshape(-1, *(1,) * (weight.ndim - 1))
    integers: Integers = np.clip(round_in_place(steps), -WEIGHT_LEVELS, WEIGHT_LEVELS).astype(np.int8)
    return integers

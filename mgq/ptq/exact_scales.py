"""Chooses scales with which no value lies half way between two integers, so that every engine rounds alike.

One value that one engine rounds up and another down changes the rounding of all layers behind it; 1 answer in 30 was
then another. Engines differ where a value is half way between two integers, or so near to it that float32, in whatever
order an engine computes, does not know on which side. What is rounded here are integers times a ratio of scales. If all
such ratios are fractions with an odd denominator n, nothing is ever nearer to half an integer than 1 / 2n:

- a convolution: the scale of each output's weights is the output's over the input's scale, over n;
- a sum: both summands have scales of p / 127 of the sum's;
- a sigmoid, hard or not: its scale is one part of an even number, so that the half that it gives of 0 is an integer;
- a mean over positions: what is averaged has a scale of 256 / n of the mean's, for maps of up to 256 positions or an
  odd multiple of that.

Scales of activations change by half a percent or so for it, those of weights by up to 3 %; weights must not be rounded
yet.
"""

from __future__ import annotations

import megengine.module as M
import numpy as np
from megengine.module.qat import QATModule, QuantStub

from mgq.graph.layer_graph import Add, Convolution, GlobalAverage, Graph, MaxPool, Operation, Reshape, Transpose
from mgq.graph.network_reader import graph_of
from mgq.ptq.channel_statistics import IMAGE_SIZE
from mgq.quantization.batch_norm_folding import activation_of
from mgq.quantization.qat_layers import GridRange, find_quantized_layers, quant_levels, set_range
from mgq.quantization.targets import ChannelFakeQuantize, QuantizedFeatures, is_never_negative

SUM_PARTS = 127
"""Parts of a sum's scale of which those of its summands are multiples."""
POSITIONS = 256
"""The largest power of two that the number of positions of a mean may contain."""
NEARLY = 1e-3
"""So near below an integer, float32 meant it."""
GATES = ("sigmoid", "hard_sigmoid")
"""Layers that give 1/2 of 0, which every grid has."""


def set_exact_scales(network: M.Module) -> dict[str, GridRange]:
    """Change ranges of ``network``, mode ``qat`` with ranges, and fix scales of weights, until no value can be a tie.

    Returns the new range of each layer. Raises FailureError where the network cannot be followed; nothing is changed
    then.
    """
    graph = graph_of(network, IMAGE_SIZE, with_integers=False)
    named = find_quantized_layers(network)
    names = {tensor_of(graph, name, layer): name for name, layer in named.items()}
    layers = {tensor: named[name] for tensor, name in names.items() if tensor in graph.grids}
    scales = settle_scales(graph, layers)
    ranges = {}
    for tensor, layer in layers.items():
        if not isinstance(layer, QuantStub):
            limit = quant_levels(layer) * scales[tensor]
            found = (0.0 if is_never_negative(layer) else -limit), limit
            set_range(layer.act_observer, *found)
            ranges[names[tensor]] = found
    fix_scales_of_weights(network, graph, layers)
    return ranges


def settle_scales(graph: Graph, layers: dict[str, QATModule]) -> dict[str, float]:
    """The scale of each of the tensors that ``layers`` make, from the logits back."""
    made_by = makers(graph)
    scales = {tensor: graph.grids[tensor].scale for tensor in layers}
    settled: set[str] = set()

    def settle(tensor: str, scale: float) -> None:
        if tensor in scales and tensor not in settled:
            scales[tensor] = scale
            settled.add(tensor)

    for node in reversed(graph.nodes):
        sources = [made_by.get(name, name) for name in node.inputs]
        if node.output not in scales or any(source not in scales for source in sources):
            continue
        if isinstance(node, Operation) and node.kind in GATES:
            settle(node.output, 0.5 / max(1, int(0.5 / scales[node.output] + NEARLY)))
        own = scales[node.output]
        if isinstance(node, GlobalAverage):
            most = ceiling_of(layers[sources[0]])
            settle(
                sources[0],
                own * POSITIONS / find_odd_near(own * POSITIONS / scales[sources[0]], own * POSITIONS / most),
            )
        elif isinstance(node, Add):
            for source in sources:
                settle(source, own * max(1, round(SUM_PARTS * scales[source] / own)) / SUM_PARTS)
    return scales


def find_odd_near(value: float, least: float) -> int:
    """The odd number nearest to ``value`` that is not below ``least``, and at least 1."""
    odd = max(2 * round((value - 1) / 2) + 1, 1)
    return odd if odd >= least else 2 * int(np.ceil((least - 1) / 2)) + 1


def makers(graph: Graph) -> dict[str, str]:
    """Tensor name -> the tensor whose grid it has: layers that only move or choose values keep the integers."""
    found: dict[str, str] = {}
    for node in graph.nodes:
        if isinstance(node, MaxPool | Reshape | Transpose) or (isinstance(node, Operation) and node.moves):
            found[node.output] = found.get(node.inputs[0], node.inputs[0])
    return found


def tensor_of(graph: Graph, name: str, layer: QATModule) -> str:
    """The tensor that the layer ``name`` quantizes: its output, the pooled features or the pixels."""
    if isinstance(layer, QuantStub):
        return graph.input
    if not isinstance(layer, QuantizedFeatures):
        return name
    return next(node.inputs[0] for node in graph.nodes if node.output == graph.output)


def ceiling_of(layer: QATModule) -> float:
    """The largest scale that the grid behind ``layer`` may have: its end is not beyond that of a ReLU6."""
    return activation_of(layer).high / quant_levels(layer)


def fix_scales_of_weights(network: M.Module, graph: Graph, layers: dict[str, QATModule]) -> None:
    """Fix the scales of the weights of each convolution between two grids: the least ones without ties."""
    made_by = makers(graph)
    for node in graph.nodes:
        module = layers.get(node.output)
        source = layers.get(made_by.get(node.inputs[0], node.inputs[0]))
        quantizer = getattr(module, "weight_fake_quant", None)
        if not isinstance(node, Convolution) or not isinstance(quantizer, ChannelFakeQuantize) or source is None:
            continue
        assert module is not None
        quantizer.unit = scale_behind(module) / scale_behind(source)
        largest = np.abs(node.weight).reshape(len(node.weight), -1).max(axis=1)
        quantizer.fix_scales(quantizer.allowed_scales(quantizer.least_scales(largest)))


def scale_behind(layer: QATModule) -> float:
    """The scale of the grid behind ``layer``, as all compute it."""
    return float(layer.act_observer.get_qparams().scale.numpy())

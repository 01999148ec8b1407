"""Quantization without images (Nagel et al. 2019, arXiv:1906.04721): ranges and biases follow from the batch norms.

A batch norm holds mean and deviation of each channel on the training images. They give the ranges, and the mean shift
that rounded weights cause in an output, which is subtracted from the bias.
"""

from __future__ import annotations

import megengine.module as M
import numpy as np

from mgq.graph.layer_graph import Convolution, Graph
from mgq.ptq.channel_statistics import Statistics
from mgq.ptq.patches import is_convolution
from mgq.quantization.qat_layers import Range, add_to_bias, find_quantized_layers, fold_weight, quantize_weight


def expect_ranges(network: M.Module, graph: Graph, statistics: Statistics) -> dict[str, Range]:
    """The ranges of the layers of a ``qat`` network by ``statistics`` of its float form, by layer name."""
    pooled = {"dequant": next(node.inputs[0] for node in graph.nodes if node.output == graph.output)}
    found = {}
    for name in find_quantized_layers(network):
        tensor = pooled.get(name, name)
        if tensor in statistics:
            moments = statistics[tensor]
            found[name] = Range(float(min(moments.lowest.min(), 0.0)), float(moments.highest.max()))
    return found


def correct_expected_bias(network: M.Module, graph: Graph, statistics: Statistics) -> dict[str, tuple[float, ...]]:
    """Correct the biases of a ``qat`` network for rounded weights; return what was added, by layer name."""
    found = {}
    layers = find_quantized_layers(network)
    for node in graph.nodes:
        if not isinstance(node, Convolution) or not is_convolution(layers[node.output]):
            continue
        layer = layers[node.output]
        change = (quantize_weight(layer).numpy() - fold_weight(layer).numpy()).astype(np.float64)
        by_input = change.reshape(node.groups, -1, node.weight.shape[1], change.shape[-1] * change.shape[-2]).sum(3)
        means = statistics[node.inputs[0]].mean.reshape(node.groups, -1, 1)
        correction = tuple(float(f"{-value:.6g}") for value in (by_input @ means).ravel())
        add_to_bias(layer, correction)
        found[node.output] = correction
    return found

"""Scales with which float32 arithmetic between integers is exact: every engine gives the same integers then.

A single step that one engine rounds up and another down re-draws all rounding behind it, until 1 answer in 30 is
another. The scales of activations become powers of two here, those of weights have few digits
(:func:`mgq.quantization.targets.channel_scales`): then products, sums and quotients are exact in whatever order an
engine computes them, and only the rounding to the next integers is left, which all do alike.

A power of two may be up to twice the scale that a tensor wants. So first all channels of a tensor are scaled by the one
factor that makes its range end where such a grid ends, and the layers that read them by its inverse: the network's
answers stay. Tensors that share channels, those of a chain of sums, share the factor: the one with the least noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import megengine.module as M
import numpy as np
from megengine.module.qat import QATModule, QuantStub

from mgq.graph.layer_graph import Convolution, GlobalAverage, Graph, Linear, graph_of
from mgq.ptq.channel_statistics import IMAGE_SIZE, Statistics
from mgq.ptq.equalization import AVERAGED, Channels, Sets, scale, sets_of
from mgq.ptq.observers import Range
from mgq.quantization.activation_ranges import half_of, observe_weights, quantized_layers, set_range
from mgq.quantization.learned_scales import SMALLEST_SCALE
from mgq.quantization.relu6 import CEILING, QatConvBnRelu6
from mgq.quantization.targets import QuantizedFeatures, is_never_negative

LEAST = math.ceil(math.log2(SMALLEST_SCALE))
"""Exponent of the smallest scale that observers give."""
PARTS = 16
"""Of an octave, in which factors are tried for tensors that share one."""
Noise = Callable[[float], float]
EVEN = 1e-6
"""Of an exponent: so far above an integer it still is that integer."""


@dataclass(frozen=True)
class Moved:
    """What was done: the new ``ranges`` by layer, and by how much each tensor of the network is larger by name."""

    ranges: dict[str, Range]
    factors: dict[str, float]

    def statistics(self, before: Statistics) -> Statistics:
        """Those of the network as it is now."""
        return {tensor: moments.times(self.factors[tensor]) for tensor, moments in before.items()}


def move_to_exact_scales(network: M.Module, noises: Mapping[str, Noise] | None = None) -> Moved:
    """Scale channels of ``network``, mode ``qat`` with ranges, and change ranges, until all scales are powers of two.

    Its weights must not be rounded yet. ``noises`` tells for each layer what noise a scale makes, clipping included;
    without it a finer scale makes less, and ranges are only widened. What it gives in float stays the same but for
    float32 rounding; a ReLU6 saturates where its scaled channels do. Raises FailureError where the network cannot be
    followed; nothing is changed then.
    """
    graph = graph_of(network, IMAGE_SIZE)
    sets = sets_of(graph)
    whole = joined(sets)
    layers = {tensor_of(graph, name, layer): layer for name, layer in quantized_layers(network).items()}
    layers = {name: layer for name, layer in layers.items() if name in graph.grids and not isinstance(layer, QuantStub)}
    names = {id(layer): name for name, layer in quantized_layers(network).items()}
    families: dict[int, list[str]] = {}
    for tensor in layers:
        families.setdefault(whole[tensor], []).append(tensor)
    factors: dict[int, float] = {}
    exponents: dict[str, int] = {}
    for family, tensors in families.items():
        wanted = [graph.grids[tensor].scale for tensor in tensors]
        ceilings = [ceiling_of(layers[tensor]) for tensor in tensors]
        shares = [AVERAGED if is_averaged(graph, tensor) else 1.0 for tensor in tensors]
        if noises and all(names[id(layers[tensor])] in noises for tensor in tensors):
            costs = [noises[names[id(layers[tensor])]] for tensor in tensors]
            factors[family], found = fitting_by_noise(wanted, ceilings, costs)
        else:
            factors[family], found = fitting(wanted, ceilings, shares)
        exponents.update(zip(tensors, found, strict=True))
    by_tensor = {tensor: factors.get(family, 1.0) for tensor, family in whole.items()}
    scale_channels(network, graph, sets, by_tensor)
    keep_means_fine(graph, exponents)
    ranges = {names[id(layer)]: range_of(layer, exponents[tensor]) for tensor, layer in layers.items()}
    for tensor, layer in layers.items():
        set_range(layer.act_observer, *range_of(layer, exponents[tensor]))
    observe_weights(network)
    return Moved(ranges, by_tensor)


def joined(sets: Sets) -> dict[str, int]:
    """The family of each tensor: those whose channels, any of them, are scaled together have the same number."""
    channels = Channels(list(range(sets.number)))
    for slots in sets.of.values():
        channels.join(slots[:-1], slots[1:])
    return {tensor: channels.root(int(slots[0])) for tensor, slots in sets.of.items()}


def tensor_of(graph: Graph, name: str, layer: QATModule) -> str:
    """What the layer called ``name`` puts on a grid: its output, or the pooled features."""
    if not isinstance(layer, QuantizedFeatures):
        return name
    return next(node.inputs[0] for node in graph.nodes if node.output == graph.output)


def is_averaged(graph: Graph, tensor: str) -> bool:
    """Whether only the mean of ``tensor`` is read."""
    readers = [node for node in graph.nodes if tensor in node.inputs]
    return all(isinstance(node, GlobalAverage) for node in readers) and bool(readers)


def ceiling_of(layer: QATModule) -> float:
    """The largest scale that the grid behind ``layer`` may have: its end is not beyond that of a ReLU6."""
    return CEILING / half_of(layer) if isinstance(layer, QatConvBnRelu6) else math.inf


def fitting(wanted: Sequence[float], ceilings: Sequence[float], shares: Sequence[float]) -> tuple[float, list[int]]:
    """The factor for tensors that want these scales, and the exponent of the scale that each gets then.

    A scale is no less than the factor times that wanted, and no more than its ceiling, as it is and with the factor.
    The noise of all, weighted by ``shares``, is the least.
    """

    def exponents(factor: float) -> list[int]:
        least = [math.ceil(math.log2(value * factor) - EVEN) for value in wanted]
        return [int(min(e, below(most * factor))) for e, most in zip(least, ceilings, strict=True)]

    def noise(factor: float) -> float:
        return sum(s * 4.0**e for s, e in zip(shares, exponents(factor), strict=True)) / factor**2

    leading = [value for value, most in zip(wanted, ceilings, strict=True) if most < math.inf] or wanted
    factor = min((2.0 ** round(math.log2(value)) / value for value in leading), key=noise)
    return raised(factor, exponents(factor), ceilings)


def raised(factor: float, exponents: Sequence[int], ceilings: Sequence[float]) -> tuple[float, list[int]]:
    """Both, larger by one power of two where a scale would be smaller than observers give it."""
    room = min(below(most) - e for e, most in zip(exponents, ceilings, strict=True))
    shift = int(min(max(LEAST - min(exponents), 0), room))
    return factor * 2.0**shift, [exponent + shift for exponent in exponents]


def fitting_by_noise(
    wanted: Sequence[float], ceilings: Sequence[float], noises: Sequence[Noise]
) -> tuple[float, list[int]]:
    """The same, where each of ``noises`` tells what a scale of one of the tensors costs, as large as it is now.

    The scales may be finer than those wanted, so that more is clipped, if that costs less.
    """

    def exponents(factor: float) -> tuple[float, list[int]]:
        total, found = 0.0, []
        for value, most, noise in zip(wanted, ceilings, noises, strict=True):
            highest = below(most * factor)
            nearest = math.floor(math.log2(value * factor) + EVEN)
            choices = {int(min(e, highest)) for e in (nearest, nearest + 1)}
            cost, exponent = min((noise(2.0**e / factor), e) for e in choices)
            total += cost
            found.append(exponent)
        return total, found

    leading = [value for value, most in zip(wanted, ceilings, strict=True) if most < math.inf] or wanted
    base = [2.0 ** round(math.log2(value)) / value for value in leading]
    candidates = base if len(wanted) == 1 else [*base, *(base[0] * 2.0 ** (i / PARTS) for i in range(PARTS))]
    factor = min(candidates, key=lambda factor: exponents(factor)[0])
    return raised(factor, exponents(factor)[1], ceilings)


def below(value: float) -> float:
    """The largest exponent of a power of two not above ``value``."""
    return math.floor(math.log2(value) + EVEN) if value < math.inf else math.inf


def scale_channels(network: M.Module, graph: Graph, sets: Sets, factors: Mapping[str, float]) -> None:
    """Make each tensor of ``network`` so many times as large as it was."""
    modules = dict(network.named_modules())
    for node in graph.nodes:
        if not isinstance(node, Convolution | Linear):
            continue
        made, read = (np.full(sets.of[name].size, factors[name]) for name in (node.output, node.inputs[0]))
        module = modules[node.output]
        scale(module, made, read)
        if isinstance(module, QatConvBnRelu6):
            module.ceiling *= factors[node.output]


def keep_means_fine(graph: Graph, exponents: dict[str, int]) -> None:
    """A mean over 49 positions is never a half of a grid that is no coarser, so that float32 rounds it as integers."""
    for node in graph.nodes:
        if isinstance(node, GlobalAverage) and {node.output, node.inputs[0]} <= exponents.keys():
            exponents[node.output] = min(exponents[node.output], exponents[node.inputs[0]])


def range_of(layer: QATModule, exponent: int) -> Range:
    """The range behind ``layer`` whose scale is 2**``exponent``."""
    limit = half_of(layer) * 2.0**exponent
    return (0.0 if is_never_negative(layer) else -limit), limit

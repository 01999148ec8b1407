"""Finds channels that are 0 for every image, and sets the weights that make and that read them to 0.

This is exact. It matters where a layer has one scale: weights of dead channels can be the largest ones, and would set
it.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import megengine.module as M
import numpy as np
import numpy.typing as npt
from megengine import Tensor
from megengine.module.conv_bn import _ConvBnActivation2d

from mgq.quantization.batch_norm_folding import activation_of, fold_layer
from mgq.zoo.blueprint import border_values
from mgq.zoo.blueprint_layers import BlueprintLayer
from mgq.zoo.blueprint_network import sample_of
from mgq.zoo.layers import forward_hooks
from mgq.zoo.network_state import evaluation_state

Values = npt.NDArray[np.float64]
DARKEST, BRIGHTEST = -128.0, 127.0
"""The range of a pixel minus 128."""


@dataclass(frozen=True)
class Interval:
    """The lowest and the highest possible value of each channel of a tensor, float64 (C,)."""

    low: Values
    high: Values

    def with_padding(self) -> Interval:
        """The interval, widened to include the zeros of padding."""
        return Interval(np.minimum(self.low, 0), np.maximum(self.high, 0))


@dataclass
class Survey:
    """Follows one run of a network, and clears weights on the way.

    ``known`` are intervals by identity of tensors, which ``kept`` keeps alive. ``dead``: name of a layer -> how many of
    its channels are always 0. ``highest``: name of a layer -> what its channels are at most, before a ReLU6, (C,).
    """

    names: dict[int, str]
    known: dict[int, Interval] = field(default_factory=dict)
    kept: list[Tensor] = field(default_factory=list)
    dead: dict[str, int] = field(default_factory=dict)
    highest: dict[str, Values] = field(default_factory=dict)

    def note(self, tensor: Tensor, interval: Interval) -> None:
        self.known[id(tensor)] = interval
        self.kept.append(tensor)

    def see(self, module: M.Module, inputs: Any, output: Tensor) -> None:
        """A hook: follow ``module``, which made ``output`` of ``inputs``."""
        intervals = [self.known.get(id(tensor)) for tensor in inputs]
        if isinstance(module, _ConvBnActivation2d) and intervals[0] is not None:
            self.note(output, self.bound_outputs(module, intervals[0].with_padding()))
        elif isinstance(module, M.MaxPool2d | M.QuantStub | M.Identity) and intervals[0] is not None:
            self.note(output, intervals[0])
        elif isinstance(module, M.Elemwise) and all(interval is not None for interval in intervals):
            low = sum(interval.low for interval in intervals if interval is not None)
            high = sum(interval.high for interval in intervals if interval is not None)
            rectified = str(module.method).upper().endswith("RELU")
            floor = 0.0 if rectified else -np.inf
            self.note(output, Interval(np.maximum(low, floor), np.maximum(high, floor)))
        elif isinstance(module, BlueprintLayer) and intervals[0] is not None:
            found = bound_of(module, intervals[0])
            if found is not None:
                self.note(output, found)

    def bound_outputs(self, module: _ConvBnActivation2d, inputs: Interval) -> Interval:
        """The interval of the outputs of a convolution with batch norm. Sets its weights that cannot matter to 0."""
        conv, plain = module.conv, fold_layer(module)
        weight = plain.weight.numpy().astype(np.float64)
        own = conv.weight.numpy()
        shape = own.shape
        groups = conv.groups
        # (groups, outputs of one, inputs of one, positions)
        weight = weight.reshape(groups, -1, shape[-3], shape[-1] * shape[-2])
        own = own.reshape(weight.shape).copy()
        low, high = (side.reshape(groups, 1, -1, 1) for side in (inputs.low, inputs.high))
        own[np.broadcast_to((low == 0) & (high == 0), own.shape)] = 0
        positive, negative = np.maximum(weight, 0), np.minimum(weight, 0)
        bias = np.ravel(plain.bias.numpy()).astype(np.float64)
        highest = (positive * high + negative * low).sum(axis=(2, 3)).ravel() + bias
        lowest = (positive * low + negative * high).sum(axis=(2, 3)).ravel() + bias
        self.highest[self.names[id(module)]] = highest
        if isinstance(module, M.ConvBnRelu2d):  # ReLU6 included
            is_dead = highest <= 0
            own[is_dead.reshape(groups, -1)] = 0
            if is_dead.any():
                self.dead[self.names[id(module)]] = int(is_dead.sum())
            ceiling = activation_of(module).high
            lowest, highest = np.clip(lowest, 0, ceiling), np.clip(highest, 0, ceiling)
        conv.weight[...] = Tensor(own.reshape(shape))
        return Interval(lowest, highest)


def bound_of(layer: BlueprintLayer, inputs: Interval) -> Interval | None:
    """The interval of the output of ``layer`` of an imported network; None where it has no simple bound."""
    if layer.kind == "pad" and "channels" not in layer.options:
        values = np.array(border_values(layer.options))
        return Interval(np.minimum(inputs.low, values), np.maximum(inputs.high, values))
    if layer.kind in ("max_pool", "avg_pool", "global_max", "global_avg"):
        return inputs.with_padding()
    return None


def clear_dead_channels(network: M.Module, in_place: bool = False) -> tuple[M.Module, dict[str, int]]:
    """A copy of ``network`` (mode ``normal``), or itself, without weights that cannot matter, and the number of dead
    channels by layer.

    A channel behind a ReLU is dead where the largest sum that its inputs allow, bounded layer by layer from the pixels
    on, is not positive: its own weights, and those that read it, become 0. The answers stay. The second result tells
    how many channels of which layer are dead.
    """
    network = network if in_place else deepcopy(network)
    return network, survey_channels(network).dead


def highest_values(network: M.Module) -> dict[str, Values]:
    """Layer -> what each channel of it can be at most, before a ReLU6, whatever the picture shows: float64 (C,).

    A layer is missing where no bound is known of what it reads.
    """
    return survey_channels(deepcopy(network)).highest


def survey_channels(network: M.Module) -> Survey:
    """Run ``network`` once, clear its dead channels in place, and return the survey."""
    survey = Survey({id(module): name for name, module in network.named_modules()})
    image = sample_of(network, 64)  # only shapes of intervals follow from the picture: a small one serves
    channels = image._tuple_shape[1]
    survey.note(image, Interval(np.full(channels, DARKEST), np.full(channels, BRIGHTEST)))
    kinds = (_ConvBnActivation2d, M.MaxPool2d, M.QuantStub, M.Identity, M.Elemwise, BlueprintLayer)
    hooks = ((module, survey.see) for module in network.modules() if isinstance(module, kinds))
    with evaluation_state(network), forward_hooks(hooks):
        network(image)
    return survey

"""Cross-layer equalization: channels of one float network, scaled so that int8 makes the least noise in it.

A channel may be larger by any factor if what reads it is smaller by the same (Nagel et al. 2019, arXiv:1906.04721,
section 4.1): sums, ReLUs, pooling and shuffles keep the factor, so the answers stay. Channels are followed through the
whole network: one that passes a shortcut has one factor in all layers that make or read it, in groups, depthwise and
shuffled as well. A ReLU6 would not keep the factor, unless nothing can ever reach 6: else its channels stay.

The paper makes the ranges of weights equal, layer by layer. That can cost activations more than weights gain. Here the
factors of all channels together minimize the noise itself: what rounding adds to each tensor and to each weight, as far
as the layers that read it let it through, in terms of what they give. Where gradients of the logits were measured
(:mod:`mgq.ptq.logit_gradients`), these say what noise does, and how far each channel has to reach.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import cached_property

import megengine.module as M
import numpy as np
import numpy.typing as npt
from megengine import Tensor
from megengine.module.conv_bn import _ConvBnActivation2d

from mgq.graph.layer_graph import Add, Convolution, GlobalAverage, Graph, Linear, Node, channels_in, is_followed
from mgq.graph.network_reader import graph_of
from mgq.machine import one_blas_thread
from mgq.ptq.channel_statistics import (
    IMAGE_SIZE,
    Statistics,
    Survey,
    Values,
    move_channels,
    predict_statistics,
    stubs_of,
    survey_network,
    trace_expected_statistics,
)
from mgq.ptq.dead_channels import highest_values
from mgq.ptq.logit_gradients import Reaction, Reactions
from mgq.quantization.batch_norm_folding import fold_batch_norms
from mgq.quantization.targets import MEGENGINE, Target
from mgq.system.side_process import SideProcess
from mgq.zoo.network_state import evaluation_state

Slots = npt.NDArray[np.int64]

BATCH = 16
LARGEST_FACTOR = 64.0
ROUNDS, STEPS, SETTLED = 3, 70, 3e-6
"""A round ends where a step changes the logarithm of the noise by less than this part of it: what is left is below 0.05
dB for MobileNetV2 and EfficientNet-Lite0, for less than half of the steps."""
LARGEST_KERNELS = 16
SHARPNESS = 24.0
"""Power of the mean that stands for a maximum, so that there is a gradient."""
SIGNED_HALF, UNSIGNED_HALF = 127.5, 255.0
COMPENSATED, DEPTHWISE_COMPENSATED = 0.1, 0.6
"""Part of the weights' noise that is left where its errors make up for each other: many inputs allow for more."""
AVERAGED = 0.05
"""Part of a tensor's noise that is left in its mean over the positions."""
HEADROOM = 1.25
"""How much larger than on the pictures seen a channel may become on others."""


@dataclass
class Channels:
    """Sets of channels that can only be scaled together: union-find over all channels of all layers."""

    parent: list[int] = field(default_factory=list)

    def new(self, number: int) -> Slots:
        first = len(self.parent)
        self.parent += range(first, first + number)
        return np.arange(first, first + number)

    def root(self, slot: int) -> int:
        while self.parent[slot] != slot:
            self.parent[slot] = self.parent[self.parent[slot]]
            slot = self.parent[slot]
        return slot

    def roots(self, slots: Slots) -> Slots:
        return np.array([self.root(int(slot)) for slot in slots])

    def join(self, one: Slots, other: Slots) -> None:
        for a, b in zip(one, other, strict=True):
            self.parent[self.root(int(a))] = self.root(int(b))


@dataclass(frozen=True)
class Sets:
    """Which set each channel of each tensor belongs to, by the tensor's name; those that cannot be scaled."""

    number: int
    of: dict[str, Slots]
    fixed: Slots


@dataclass(frozen=True)
class RoundedTensor:
    """A tensor on a grid: the set of each channel, its largest value, and what its noise does, float64 (C,)."""

    sets: Slots
    largest: Values
    harm: Values

    @cached_property
    def logs(self) -> Values:
        """(C,): the logarithms of the largest values."""
        found: Values = np.log(self.largest)
        return found

    def with_reactions(self, reaction: Reaction | None, half: float) -> RoundedTensor:
        """This tensor, judged by the gradients of the logits: each channel reaches as far as clipping would cost more
        than it gains."""
        if reaction is None:
            return self
        harm = reaction.squares.sum(axis=1) / (12 * half**2)
        reach = np.minimum(self.largest, reaction.channel_limits(half) + 1e-9)
        return replace(self, largest=reach, harm=harm + 1e-12 * harm.max())


@dataclass(frozen=True)
class Layer:
    """Weights on a grid. ``kernels`` (groups, outputs, inputs): the largest absolute weight of each kernel.

    ``outputs`` and ``inputs``, (groups, outputs) and (groups, inputs), are sets of channels; ``energy``, like
    ``inputs``: mean square of what is read; ``harm``, like ``outputs``: what noise of the output does.

    Only large kernels can set a range: ``logs`` (groups, outputs, few) are those of each output's largest, as the
    factors are by now, and ``readers`` the sets that they read.
    """

    kernels: Values
    outputs: Slots
    inputs: Slots
    energy: Values
    harm: Values
    logs: Values = field(default_factory=lambda: np.empty(0))
    readers: Slots = field(default_factory=lambda: np.empty(0, np.int64))

    def with_factors(self, logs: Values) -> Layer:
        """The same with the largest kernels where the logarithms of the factors are ``logs``."""
        scaled = self.kernels * np.exp(-logs[self.inputs])[:, None, :]
        few = min(LARGEST_KERNELS, scaled.shape[2])
        chosen = np.argpartition(scaled, -few, axis=2)[:, :, -few:]
        readers = np.take_along_axis(self.inputs[:, None, :], chosen, axis=2)
        return replace(self, logs=np.log(np.take_along_axis(self.kernels, chosen, axis=2)), readers=readers)


def equalize_channels(
    network: M.Module,
    images: npt.NDArray[np.uint8] | None = None,
    target: Target = MEGENGINE,
    in_place: bool = False,
    reactions: Reactions | None = None,
    to_ceilings: bool = False,
    statistics: Statistics | None = None,
) -> tuple[M.Module, dict[str, Values]]:
    """A copy of ``network`` (mode ``normal``), or itself, with equalized channels, and each tensor's factors, (C,).

    ``images``, uint8 (N, 3, H, W), tell how large channels are, or the ``statistics`` that
    :func:`survey_images` took of them; without any, the batch norms do. ``target`` is what
    the network will be quantized for. ``reactions`` are those of this network's logits, where they were measured. The
    answers stay but for float32 rounding; ``to_ceilings`` lets a channel grow until the largest value that the pictures
    show, and a quarter more, reaches the ceiling of its ReLU6: then answers to other pictures may change a little.
    """
    network = network if in_place else deepcopy(network)
    with evaluation_state(network):
        graph = graph_of(network, IMAGE_SIZE)
        sets = sets_of(graph)
        if statistics is None and images is not None:
            statistics = survey_images(network, images, graph).statistics
        elif statistics is None:
            statistics = predict_statistics(network, graph)
        problem = Problem.of(graph, sets, statistics, target)
        if reactions:
            problem = problem.with_reactions(reactions, graph, target)
        of_sets = problem.solve(limits(network, graph, sets, statistics if to_ceilings else None))
        factors = {name: of_sets[slots] for name, slots in sets.of.items()}
        modules = dict(network.named_modules())
        for node in graph.nodes:
            if isinstance(node, Convolution | Linear):
                scale(modules[node.output], factors[node.output], factors[node.inputs[0]])
                if isinstance(node, Linear):  # what it reads has passed a layer that is none of the graph's
                    factors |= dict.fromkeys(stubs_of(network), factors[node.inputs[0]])
    return network, factors


def survey_images(
    network: M.Module, images: npt.NDArray[np.uint8], graph: Graph | None = None, side: SideProcess | None = None
) -> Survey:
    """What ``network`` (mode ``normal``) makes of ``images``, uint8 (N, 3, H, W); of half of them in the ``side``
    process, where there is one."""
    batches = [images[start : start + BATCH].astype(np.float32) - 128 for start in range(0, len(images), BATCH)]
    return survey_network(fold_batch_norms(network), graph or graph_of(network, IMAGE_SIZE), batches, side)


def noise_of_weights(network: M.Module, target: Target = MEGENGINE) -> dict[str, float]:
    """Estimate the noise in the answers from rounding the weights of each convolution of ``network`` (mode ``normal``),
    by name. It follows from the batch norms and has arbitrary units: it ranks layers.
    """
    graph, statistics = trace_expected_statistics(network)
    sets = sets_of(graph)
    problem = Problem.of(graph, sets, statistics, target)
    zeros = np.zeros(sets.number)
    names = [node.output for node in graph.nodes if isinstance(node, Convolution)]
    layers = problem.with_factors(zeros).layers
    return {
        name: weight_noise(layer, zeros, zeros.copy(), problem.per_channel)
        for name, layer in zip(names, layers, strict=True)
    }


def sets_of(graph: Graph) -> Sets:
    """Follow the channels through ``graph``: pixels, logits, and what other layers read or give, keep their size."""
    channels = Channels()
    of = {graph.input: channels.new(graph.shapes[graph.input][1])}
    fixed = [graph.input, graph.output]
    for node in graph.nodes:
        source = of[node.inputs[0]]
        if isinstance(node, Convolution | Linear):
            of[node.output] = channels.new(len(node.weight))
        elif isinstance(node, Add):
            channels.join(source, of[node.inputs[1]])
            of[node.output] = source
        elif not is_followed(graph, node):
            of[node.output] = channels.new(channels_in(graph.shapes[node.output]))
            fixed += [*node.inputs, node.output]
        else:
            of[node.output] = move_channels(graph, node, source)
    roots = {name: channels.roots(slots) for name, slots in of.items()}
    return Sets(len(channels.parent), roots, np.concatenate([roots[name] for name in fixed]))


def limits(network: M.Module, graph: Graph, sets: Sets, seen: Statistics | None = None) -> tuple[Values, Values]:
    """The least and the largest logarithm of the factor of each set of channels.

    A channel below a ceiling stays below it: for every possible image, or, with ``seen``, for images like those.
    """
    upper = np.full(sets.number, np.log(LARGEST_FACTOR))
    lower = -upper
    clipped = [node for node in graph.nodes if isinstance(node, Convolution) and node.activation.clips]
    if clipped:
        highest = highest_values(network)
        for node in clipped:
            slots, most = sets.of[node.output], np.maximum(highest.get(node.output, np.inf), 1e-6)
            if seen is not None:
                most = np.clip(seen[node.output].highest * HEADROOM, 1e-6, most)
            ceiling = node.activation.high
            upper[slots] = np.minimum(upper[slots], np.log(np.maximum(ceiling / most, 1.0)))
            lower[slots] = np.where(most < ceiling, lower[slots], 0.0)
    lower[sets.fixed] = upper[sets.fixed] = 0.0
    return lower, upper


@dataclass(frozen=True)
class Problem:
    """The noise of an int8 network as a function of the logarithms of the factors of its channel sets."""

    number: int
    tensors: tuple[RoundedTensor, ...]
    layers: tuple[Layer, ...]
    per_channel: bool

    @classmethod
    def of(cls, graph: Graph, sets: Sets, statistics: Statistics, target: Target) -> Problem:
        harm = {name: found + np.zeros(len(sets.of[name])) for name, found in harms(graph, statistics).items()}
        tensors, layers = [], []
        for node in graph.nodes:
            if isinstance(node, Convolution | Add):
                half = find_half_levels(node, target)
                tensors.append(
                    RoundedTensor(
                        sets.of[node.output],
                        statistics[node.output].largest + 1e-9,
                        harm[node.output] / (12 * half**2),
                    )
                )
            if isinstance(node, Convolution):
                shape, groups = node.weight.shape, node.groups
                noise = noise_of_a_weight(node, target)
                layers.append(
                    Layer(
                        np.abs(node.weight).reshape(groups, -1, shape[1], shape[2] * shape[3]).max(3) + 1e-12,
                        sets.of[node.output].reshape(groups, -1),
                        sets.of[node.inputs[0]].reshape(groups, -1),
                        statistics[node.inputs[0]].mean_square.reshape(groups, -1),
                        (harm[node.output] * noise).reshape(groups, -1),
                    )
                )
        return cls(sets.number, tuple(tensors), tuple(layers), target.per_channel)

    def with_reactions(self, reactions: Reactions, graph: Graph, target: Target) -> Problem:
        """This problem, with noise and reach of channels taken from the gradients of the logits."""
        made = [node for node in graph.nodes if isinstance(node, Convolution | Add)]
        convolutions = [node for node in graph.nodes if isinstance(node, Convolution)]
        tensors = [
            tensor.with_reactions(reactions.get(node.output), find_half_levels(node, target))
            for node, tensor in zip(made, self.tensors, strict=True)
        ]
        layers = []
        for node, layer in zip(convolutions, self.layers, strict=True):
            if node.output in reactions:
                harm = reactions[node.output].squares.sum(axis=1) * noise_of_a_weight(node, target)
                layer = replace(layer, harm=harm.reshape(layer.harm.shape))
            layers.append(layer)
        return replace(self, tensors=tuple(tensors), layers=tuple(layers))

    def solve(self, bounds: tuple[Values, Values]) -> Values:
        """The factors with the least noise, (number,)."""
        from scipy.optimize import Bounds, minimize

        logs = np.zeros(self.number)
        with one_blas_thread():
            for _ in range(ROUNDS):
                found = minimize(
                    self.with_factors(logs).noise,
                    logs,
                    jac=True,
                    method="L-BFGS-B",
                    bounds=Bounds(*bounds),
                    options={"maxiter": STEPS, "maxcor": 20, "ftol": SETTLED},
                )
                logs = found.x
        factors: Values = np.exp(logs)
        return factors

    def with_factors(self, logs: Values) -> Problem:
        """The same with the kernels that matter where the logarithms of the factors are ``logs``."""
        return replace(self, layers=tuple(layer.with_factors(logs) for layer in self.layers))

    def noise(self, logs: Values) -> tuple[float, Values]:
        """The logarithm of the noise and its gradient."""
        gradient = np.zeros(self.number)
        total = sum(tensor_noise(tensor, logs, gradient) for tensor in self.tensors)
        total += sum(weight_noise(layer, logs, gradient, self.per_channel) for layer in self.layers)
        if total == 0:  # nothing reaches the logits
            return 0.0, np.zeros(self.number)
        return float(np.log(total)), gradient / total


def find_half_levels(node: Convolution | Add, target: Target) -> float:
    """Largest value / step of the grid behind ``node``."""
    never_negative = node.relu if isinstance(node, Add) else node.activation.low >= 0
    return UNSIGNED_HALF if target.unsigned and never_negative else SIGNED_HALF


def noise_of_a_weight(node: Convolution, target: Target) -> float:
    """Variance of the error of an output, for a largest weight of 1 and inputs of mean square 1."""
    height, width = node.weight.shape[2:]
    left = DEPTHWISE_COMPENSATED if node.groups == len(node.weight) else COMPENSATED
    return height * width * left / (12 * target.levels**2)


def harms(graph: Graph, statistics: Statistics) -> dict[str, Values]:
    """For each tensor (C,): the noise in its readers' outputs for noise of variance 1 in a channel. It is relative to
    the variance of these outputs, and summed over all readers, those behind a shortcut included.
    """
    found: dict[str, Values] = {node.output: np.zeros(1) for node in graph.nodes}
    found[graph.input] = np.zeros(1)
    for node in reversed(graph.nodes):
        for source in node.inputs:
            found[source] = found[source] + pass_back(node, graph, found[node.output], statistics)
    return found


def pass_back(node: Node, graph: Graph, behind: Values, statistics: Statistics) -> Values:
    """The contribution of ``node`` to ``harms`` of its source, given the harm ``behind`` it."""
    if isinstance(node, Convolution | Linear):
        groups = node.groups if isinstance(node, Convolution) else 1
        squares = np.square(node.weight, dtype=np.float64).reshape(groups, -1, node.weight.shape[1], kernel(node))
        total = max(float(statistics[node.output].variance.sum()), 1e-12)
        result: Values = squares.sum(axis=(1, 3)).ravel() / total
        return result
    if not is_followed(graph, node):
        return behind if isinstance(node, Add) else np.full(1, behind.mean())  # their channels keep their size
    if behind.size > 1:
        result = np.empty_like(behind)
        result[move_channels(graph, node, np.arange(behind.size))] = behind
        behind = result
    return behind * AVERAGED if isinstance(node, GlobalAverage) else behind


def kernel(node: Convolution | Linear) -> int:
    return int(np.prod(node.weight.shape[2:]))


def tensor_noise(tensor: RoundedTensor, logs: Values, gradient: Values) -> float:
    """The noise of a tensor's grid, whose range is that of its largest channel. Adds to ``gradient`` in place."""
    sets = tensor.sets
    squared_range, share = soft_maximum(tensor.logs + logs[sets])
    harm = tensor.harm * np.exp(-2 * logs[sets])
    np.add.at(gradient, sets, 2 * squared_range * (harm.sum() * share - harm))
    return float(squared_range * harm.sum())


def weight_noise(layer: Layer, logs: Values, gradient: Values, per_channel: bool) -> float:
    """The noise of the grid of a layer's weights, or of each output's. Adds to ``gradient`` in place."""
    made, read = logs[layer.outputs], logs[layer.inputs]
    scaled = layer.logs + made[:, :, None] - logs[layer.readers]
    energy, harm = layer.energy * np.exp(2 * read), layer.harm * np.exp(-2 * made)
    if per_channel:
        squared_range, share = soft_maximum(scaled, axis=2)
        noise = squared_range[:, :, 0] * harm * energy.sum(axis=1, keepdims=True)
        towards = (squared_range[:, :, 0] * harm).sum(axis=1, keepdims=True) * energy
        np.add.at(gradient, layer.inputs, 2 * towards)
        np.add.at(gradient, layer.readers, -2 * noise[:, :, None] * share)
        return float(noise.sum())
    squared_range, share = soft_maximum(scaled)
    of_groups = harm.sum(axis=1) * energy.sum(axis=1)
    total = float(squared_range * of_groups.sum())
    own = squared_range * harm * energy.sum(axis=1, keepdims=True)
    np.add.at(gradient, layer.outputs, 2 * (total * share.sum(axis=2) - own))
    towards = squared_range * energy * harm.sum(axis=1, keepdims=True)
    np.add.at(gradient, layer.inputs, 2 * towards)
    np.add.at(gradient, layer.readers, -2 * total * share)
    return total


def soft_maximum(logs: Values, axis: int | None = None) -> tuple[Values, Values]:
    """A smooth maximum of the squares of the values with these ``logs``, and its derivatives."""
    largest = logs.max(axis=axis, keepdims=True)
    parts = np.exp(SHARPNESS * (logs - largest))
    total = parts.sum(axis=axis, keepdims=True)
    square: Values = np.exp(2 * (largest + np.log(total) / SHARPNESS))
    return (square if axis is not None else square.reshape(())), parts / total


def scale(module: M.Module, made: Values, read: Values) -> None:
    """Make the outputs of a layer ``made`` times as large, (O,), given inputs ``read`` times as large, (I,)."""
    layer = module.conv if isinstance(module, _ConvBnActivation2d) else module
    weight = layer.weight.numpy()
    groups = getattr(layer, "groups", 1)
    grouped = weight.reshape(groups, made.size // groups, read.size // groups, -1).astype(np.float64)
    grouped /= read.reshape(groups, 1, -1, 1)
    layer.weight[...] = Tensor(grouped.reshape(weight.shape).astype(np.float32))
    if isinstance(module, _ConvBnActivation2d):
        for parameter in (module.bn.weight, module.bn.bias):
            values = parameter.numpy()
            parameter[...] = Tensor((values * made.reshape(values.shape)).astype(np.float32))

"""Statistics of the channels of a float network: measured on images, or expected from its batch norms."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, TypeVar

import megengine.module as M
import numpy as np
import numpy.typing as npt
from megengine import Tensor

from mgq.cpu_kernels.elementwise import find_moments
from mgq.errors import FailureError
from mgq.graph.layer_graph import (
    Add,
    Convolution,
    GlobalAverage,
    Graph,
    Linear,
    Node,
    Transpose,
    channels_in,
    is_followed,
)
from mgq.graph.network_reader import graph_of
from mgq.quantization.activations import IDENTITY, RELU, Activation
from mgq.system.side_process import SideProcess, share_halves
from mgq.zoo.layers import forward_hooks
from mgq.zoo.overflow import describe_not_finite

Values = npt.NDArray[np.float64]
Kind = TypeVar("Kind", bound=np.generic)

DEVIATIONS = 6.0
"""The output of a batch norm is expected within this many standard deviations of its mean."""
PIXEL_DEVIATION = 60.0
"""Standard deviation of pixels minus 128 in photographs."""
POOLED = 0.25
"""Variance of a channel's mean over an image / variance of the channel."""
IMAGE_SIZE = 64
"""Pixels on a side of the image with which the graph is traced; any size serves."""


@dataclass(frozen=True)
class Moments:
    """Each channel of a tensor: float64 (C,). ``lowest`` and ``highest`` are its range."""

    lowest: Values
    highest: Values
    mean: Values
    variance: Values

    @property
    def largest(self) -> Values:
        found: Values = np.maximum(-self.lowest, self.highest)
        return found

    @property
    def mean_square(self) -> Values:
        return self.variance + self.mean**2

    def move(self, move: Callable[[Values], Values]) -> Moments:
        """The moments of the channels in another order, which ``move`` makes."""
        return Moments(*(move(values) for values in (self.lowest, self.highest, self.mean, self.variance)))


Statistics = dict[str, Moments]
"""Name of a tensor of a network's graph -> its channels."""


@dataclass(frozen=True)
class Sums:
    """Of each channel of a tensor, float64 (C,): its range, the sum of its ``count`` values and of their squares."""

    lowest: Values
    highest: Values
    total: Values
    squares: Values
    count: int

    @classmethod
    def of(cls, values: npt.NDArray[np.float32]) -> Sums:
        """Of ``values``: float32 (N, C, ...), or (N, groups, channels, H, W)."""
        shape = len(values), channels_in(values.shape), -1
        rows = values.reshape(shape)
        found = (part.reshape(shape[:2]) for part in find_moments(rows.reshape(shape[0] * shape[1], -1)))
        low, high, total, squares = found
        ends = low.min(0).astype(np.float64), high.max(0).astype(np.float64)
        return cls(*ends, total.sum(0), squares.sum(0), rows.shape[0] * rows.shape[2])

    def unite(self, other: Sums | None) -> Sums:
        """Those of the values of both."""
        if other is None:
            return self
        ends = np.minimum(self.lowest, other.lowest), np.maximum(self.highest, other.highest)
        return Sums(*ends, self.total + other.total, self.squares + other.squares, self.count + other.count)

    @property
    def is_finite(self) -> bool:
        """Whether all values are, even where their sum is too large for float32."""
        ends = np.isfinite([self.lowest, self.highest])
        return bool(ends.all() and not np.isnan(self.total).any())

    @property
    def moments(self) -> Moments:
        mean = self.total / self.count
        return Moments(self.lowest, self.highest, mean, np.maximum(self.squares / self.count - mean**2, 0))


class Survey(NamedTuple):
    """What a float network makes of images: ``statistics`` of its tensors, and its ``logits``, float64 (N, classes)."""

    statistics: Statistics
    logits: Values


def survey_network(
    network: M.Module, graph: Graph, batches: Sequence[npt.NDArray[np.float32]], side: SideProcess | None = None
) -> Survey:
    """Measure the channels of ``network`` (mode ``normal``, evaluation state) on ``batches``: float32 (N, 3, H, W),
    pixels minus 128; the features, too. The ``side`` process, where there is one, takes half of them.

    Raises FailureError that names a layer whose values are not finite.
    """
    made = [node.output for node in graph.nodes if not is_followed(graph, node)] + stubs_of(network)
    (sums, logits), (later, others) = share_halves(side, sum_channels, batches, network, made)
    known = {name: each.unite(later.get(name)).moments for name, each in sums.items()}
    return Survey(complete_statistics(graph, known), np.concatenate([*logits, *others]).astype(np.float64))


def stubs_of(network: M.Module) -> list[str]:
    """Names of the layers of ``network``, none of the graph's, behind which the features are on a grid."""
    return [name for name, module in network.named_modules() if isinstance(module, M.DequantStub)]


def sum_channels(
    network: M.Module, names: Iterable[str], batches: Iterable[npt.NDArray[np.float32]]
) -> tuple[dict[str, Sums], list[npt.NDArray[np.float32]]]:
    """Of what each of the layers ``names`` of ``network`` gives on all ``batches``; and the logits of each."""
    modules = dict(network.named_modules())
    found: dict[str, Sums] = {}

    def hook_of(name: str) -> Callable[[M.Module, object, Tensor], None]:
        def see(_: M.Module, __: object, output: Tensor) -> None:
            sums = Sums.of(output.numpy())
            if not sums.is_finite:
                raise FailureError(describe_not_finite(name))
            found[name] = sums.unite(found.get(name))

        return see

    with forward_hooks((modules[name], hook_of(name)) for name in names):
        logits = [network(Tensor(batch)).numpy() for batch in batches]
    return found, logits


def trace_expected_statistics(network: M.Module) -> tuple[Graph, Statistics]:
    """Trace ``network`` (mode ``normal``); return its graph and the statistics that its batch norms predict."""
    graph = graph_of(network, IMAGE_SIZE)
    return graph, predict_statistics(network, graph)


def predict_statistics(network: M.Module, graph: Graph) -> Statistics:
    """Predict the statistics of each tensor of ``network`` (mode ``normal``) on its training images, from its batch
    norms.

    A batch norm's output is taken as normally distributed, with its shift as mean and its scale as deviation; the
    addends of a sum as independent.
    """
    modules = dict(network.named_modules())
    refuse_unknown_statistics(graph, modules)
    known: Statistics = {graph.input: pixels()}
    for node in graph.nodes:
        sources = [known[name] for name in node.inputs]
        if isinstance(node, Convolution):
            bn = modules[node.output].bn
            shift, scale = (np.ravel(value.numpy()).astype(np.float64) for value in (bn.bias, bn.weight))
            known[node.output] = rectify(shift, scale**2, node.activation)
        elif isinstance(node, Add):
            mean, variance = sources[0].mean + sources[1].mean, sources[0].variance + sources[1].variance
            known[node.output] = rectify(mean, variance, RELU if node.relu else IDENTITY)
        elif isinstance(node, Linear):
            weight = node.weight.astype(np.float64)
            offset = 0.0 if node.bias is None else node.bias.astype(np.float64)
            known[node.output] = rectify(weight @ sources[0].mean + offset, weight**2 @ sources[0].variance, IDENTITY)
        elif isinstance(node, GlobalAverage):
            known[node.output] = average_positions(sources[0])
        else:
            known = complete_statistics(graph, known)
    return known


def refuse_unknown_statistics(graph: Graph, modules: dict[str, M.Module]) -> None:
    """Raise FailureError where a layer of ``graph``, found in ``modules``, has no statistics to predict from."""
    for node in graph.nodes:
        silent = isinstance(node, Convolution) and getattr(modules[node.output].bn, "freeze", False)
        if silent or not (has_weights(node) or is_followed(graph, node)):
            raise FailureError(
                f"no batch norm says what the layer {node.output} gives: calibrate on pictures, without --data-free"
            )


def has_weights(node: Node) -> bool:
    return isinstance(node, Convolution | Linear | Add)


def average_positions(source: Moments) -> Moments:
    """Means over all positions of a picture, neighbours of which are alike."""
    variance = source.variance * POOLED
    reach = DEVIATIONS * np.sqrt(variance)
    low, high = (np.clip(source.mean + side, source.lowest, source.highest) for side in (-reach, reach))
    return Moments(low, high, source.mean, variance)


def pixels() -> Moments:
    return Moments(np.full(3, -128.0), np.full(3, 127.0), np.zeros(3), np.full(3, PIXEL_DEVIATION**2))


def rectify(mean: Values, variance: Values, activation: Activation) -> Moments:
    """A normal distribution with that ``mean`` and ``variance`` behind an activation.

    The moments are those of a normal distribution censored at 0 and at the ceiling.
    """
    deviation = np.sqrt(variance)
    low, high = mean - DEVIATIONS * deviation, mean + DEVIATIONS * deviation
    if activation is IDENTITY:
        return Moments(low, high, mean, variance)
    ceiling = activation.high
    safe = np.maximum(deviation, 1e-12)
    first, second = censor(mean, safe, 0.0), censor(mean, safe, ceiling) if np.isfinite(ceiling) else None
    # min(max(x, 0), c) = max(x, 0) - max(x - c, 0)
    new_mean = first[0] - (second[0] if second else 0.0)
    square = first[1] - (second[1] + 2 * ceiling * second[0] if second else 0.0)
    return Moments(np.clip(low, 0, ceiling), np.clip(high, 0, ceiling), new_mean, np.maximum(square - new_mean**2, 0))


def censor(mean: Values, deviation: Values, at: float) -> tuple[Values, Values]:
    """Mean and mean square of max(x - ``at``, 0) for a normally distributed x."""
    from scipy.special import ndtr  # most commands need none of scipy, which takes as long to import as MegEngine

    z = (mean - at) / deviation
    density, below = np.exp(-0.5 * z**2) / np.sqrt(2 * np.pi), ndtr(z)
    first: Values = (mean - at) * below + deviation * density
    second: Values = ((mean - at) ** 2 + deviation**2) * below + (mean - at) * deviation * density
    return first, second


def complete_statistics(graph: Graph, known: Statistics) -> Statistics:
    """``known`` and what follows from it: pixels, and tensors whose channels were only pooled or moved."""
    found = {graph.input: pixels(), **known}
    for node in graph.nodes:
        source = node.inputs[0]
        if is_followed(graph, node) and source in found:
            found.setdefault(node.output, found[source].move(partial(move_channels, graph, node)))
    return found


def move_channels(graph: Graph, node: Node, channels: npt.NDArray[Kind]) -> npt.NDArray[Kind]:
    """Flat ``channels`` in the order in which ``node``, through which they are followed, leaves them."""
    if not isinstance(node, Transpose):
        return channels
    axes = [axis - 1 for axis in node.axes[1:-2]]
    return channels.reshape(graph.shapes[node.inputs[0]][1:-2]).transpose(axes).ravel()

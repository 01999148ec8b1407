"""Measures by gradients what errors behind each layer do to the logits, to first order.

Rounding and clipping are judged by their effect on the logits, not by their size: a clipped outlier that later layers
ignore costs nothing, a small shift that they pass on costs much. The gradient of a random combination of the logits
with respect to what a layer gives tells both. If r is random with independent entries of variance 1, and g is the
gradient of r . logits, then (g . e)^2 is on average over r the squared change of the logits that an error e of the
layer causes: the Gauss-Newton approximation from which BRECQ starts (Li et al. 2021, arXiv:2102.05426). Each image has
an r of its own.

On MobileNetV2 (ImageNet weights of torchvision) the noise that is estimated so for a layer's grid was within about 2 dB
of what was measured in the logits, for every layer and limit tried; the signal to noise ratio in the layer itself was
off by up to 30 dB, and chose limits far too wide.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import megengine.module as M
import numpy as np
import numpy.typing as npt
from megengine import Tensor
from megengine.autodiff import Function, GradManager

from mgq.cpu_kernels.depthwise_gradients import fast_depthwise_gradients
from mgq.cpu_kernels.elementwise import add_to_histograms
from mgq.graph.layer_graph import channels_in
from mgq.ptq.channel_statistics import sum_channels
from mgq.quantization.floors import span_up_to
from mgq.system.side_process import SideProcess, begin, halve, share_halves
from mgq.zoo.layers import forward_hooks

Array = npt.NDArray[np.float32]
Values = npt.NDArray[np.float64]

ChannelRanges: TypeAlias = dict[str, tuple[Values, Values]]
"""Name of a layer -> the smallest and the largest value of each channel, (C,), behind it."""

TINY = 1e-12
BINS = 256
"""Of the values of each channel, evenly over its own range."""
FEW_BINS = 32
"""The same where images are kept apart."""
LIMITS = np.concatenate([np.geomspace(0.06, 1.0, 36), np.geomspace(1.0, 1.6, 9)[1:]])
"""Limits that are tried for a tensor, in terms of its largest absolute value seen: other images have larger ones."""
SPARE = 0.001
"""Of the noise of all tensors together, what each may add for a wider range: where rounding costs next to nothing, room
is left for images with stronger values. In the last depthwise convolution of MobileNetV2 the best limit for 80 images
was 0.78 of the largest value, and gave 31 dB on others; 1.25 times the largest value gave 36 dB."""
HEADROOM_SHARE, HEADROOM = 0.1, 1.25
"""Share of the images that are assumed to be this many times as strong, where ranges leave room for others."""
MOST_NUMBERS = 1 << 27
"""That layers give for the images whose gradients are measured at once; gradients take three to four times as much."""
CHANNEL_LIMITS = np.geomspace(1 / 64, 1.0, 49)
"""The same for each channel, in terms of its own."""


@dataclass
class Pairs:
    """Products of pairs of channels of a tensor, summed over all positions: of their values and of their gradients,
    float64 (C, C)."""

    values: Values
    gradients: Values

    @classmethod
    def of(cls, channels: int) -> Pairs:
        """Nothing seen yet."""
        return cls(np.zeros((channels, channels)), np.zeros((channels, channels)))

    @property
    def matters(self) -> bool:
        """Whether values were seen, and some logit depends on them."""
        return bool(np.trace(self.values) > 0 and np.trace(self.gradients) > 0)

    def add(self, values: Array, gradients: Array) -> None:
        """Both (N, C, ...)."""
        for sums, array in ((self.values, values), (self.gradients, gradients)):
            rows = np.moveaxis(array, 1, 0).reshape(len(sums), -1)
            sums += rows @ rows.T

    def unite(self, other: Pairs) -> Pairs:
        """The products over the positions of both."""
        return Pairs(self.values + other.values, self.gradients + other.gradients)

    def scale(self, factors: Values) -> Pairs:
        """The products for channels ``factors`` (C,) times as large."""
        products = np.outer(factors, factors)
        return Pairs(self.values * products, self.gradients / products)


@dataclass
class Reaction:
    """How the logits react to errors of one tensor, channel by channel and by its values.

    ``lowest`` and ``highest`` (C,): the range of each channel, cut into even bins. ``squares`` (C, BINS): sum of
    squared gradients. ``pulls``, float32 (C, FEW_BINS) for each image: sum of gradients. Values that are exactly 0 have
    no error, and are left out. ``pairs`` are known where they were asked for.
    """

    lowest: Values
    highest: Values
    squares: Values
    pulls: list[Array] = field(default_factory=list)
    pairs: Pairs | None = None

    @classmethod
    def from_bounds(cls, lowest: Values, highest: Values, in_pairs: bool = False) -> Reaction:
        """Nothing seen yet of channels that reach from ``lowest`` to ``highest``."""
        pairs = Pairs.of(len(lowest)) if in_pairs else None
        return cls(lowest, highest, np.zeros((len(lowest), BINS)), pairs=pairs)

    def unite(self, other: Reaction) -> Reaction:
        """The reaction to the images of both, ``other``'s being the later ones; the ranges are the same."""
        pairs = self.pairs and other.pairs and self.pairs.unite(other.pairs)
        return replace(self, squares=self.squares + other.squares, pulls=[*self.pulls, *other.pulls], pairs=pairs)

    @property
    def reach(self) -> Values:
        """(C,): the largest absolute value of each channel."""
        found: Values = np.maximum(-self.lowest, self.highest)
        return found

    @property
    def largest(self) -> float:
        return float(self.reach.max())

    def add(self, values: Array, gradients: Array) -> None:
        """Both (N, C, ...)."""
        images, channels = len(values), channels_in(values.shape)
        rows = values.reshape(images, channels, -1), gradients.reshape(images, channels, -1)
        for own_values, own_gradients in zip(*rows, strict=True):
            pull = np.zeros((channels, FEW_BINS), np.float32)
            add_to_histograms(own_values, own_gradients, self.lowest, self.highest, self.squares, pull)
            self.pulls.append(pull)
        if self.pairs is not None:
            self.pairs.add(values, gradients)

    def scale(self, factors: Values) -> Reaction:
        """The reaction for channels ``factors`` (C,), above 0, times as large, whose readers are scaled by the
        inverse."""
        pulls = [(pull / factors[:, None]).astype(np.float32) for pull in self.pulls]
        squares = self.squares / np.square(factors)[:, None]
        pairs = self.pairs and self.pairs.scale(factors)
        return Reaction(self.lowest * factors, self.highest * factors, squares, pulls, pairs)

    def centres(self, bins: int) -> Values:
        """(C, ``bins``): the middle of each bin."""
        steps: Values = (np.arange(bins) + 0.5) / bins
        return self.lowest[:, None] + steps * (self.highest - self.lowest)[:, None]

    def largest_above(self, floor: float | None) -> float:
        """The largest absolute value, of those not below ``floor``."""
        return self.largest if floor is None else max(float(self.highest.max()), min(self.largest, -floor))

    def noises(self, limits: Values, half: float, headroom: bool = False, floor: float | None = None) -> Values:
        """Squared change of the logits, of all images together, where values saturate at each of ``limits``, ascending,
        ``half`` steps; of a grid that begins at ``floor``, ``half`` steps are its span. With ``headroom`` as if some of
        the images were stronger (:data:`HEADROOM`)."""
        clipping = self.clipping(limits)
        if headroom:
            others = self.clipping(limits / HEADROOM) * HEADROOM**2
            clipping = (1 - HEADROOM_SHARE) * clipping + HEADROOM_SHARE * others
        [clipped] = moments_beyond(limits, np.abs(self.centres(BINS)), self.squares, 0)
        kept = self.squares.sum() - clipped.sum(axis=0)
        spans = limits if floor is None else span_up_to(limits, floor)
        noises: Values = clipping + kept * np.square(spans / half) / 12
        return noises

    def clipping(self, limits: Values) -> Values:
        """The part of it that clipping causes at each of ``limits``, ascending.

        Rounding errors are independent of each other. Those of clipping add up in a tensor, or make up for each other;
        the larger estimate counts.
        """
        few = self.centres(FEW_BINS).astype(np.float32).ravel()
        clipped = np.stack([few - np.clip(few, -limit, limit) for limit in limits.astype(np.float32)], axis=1)
        pulls = np.stack([pull.ravel() for pull in self.pulls]) if self.pulls else np.zeros((1, few.size), np.float32)
        together: Values = np.square((pulls @ clipped).astype(np.float64)).sum(axis=0)
        return np.maximum(self.clipping_of_channels(limits, np.abs(self.centres(BINS))).sum(axis=0), together)

    def clipping_of_channels(self, limits: Values, magnitudes: Values) -> Values:
        """(C, L): the same of each channel whose bins have these ``magnitudes``, (C, BINS), where errors are
        independent."""
        count, first, second = moments_beyond(limits, magnitudes, self.squares, 2)
        found: Values = second - 2 * limits * first + np.square(limits) * count
        return found

    def range_within(self, limit: float, floor: float | None = None) -> tuple[float, float]:
        """The range of the values seen, cut at ``limit``, or widened to it on the side of the largest; above where
        those below ``floor`` do not matter."""
        lowest, highest = float(self.lowest.min()), float(self.highest.max())
        if floor is not None or highest >= -lowest:
            return max(lowest, -limit), limit
        return -limit, min(highest, limit)

    def noises_at_limits(self, half: float, headroom: bool = False, floor: float | None = None) -> Values:
        """:meth:`noises` at each of :data:`LIMITS`; ``half`` is limit / step, or span / step of a grid that begins at
        ``floor``."""
        return self.noises(self.largest_above(floor) * LIMITS, half, headroom, floor)

    def largest_limit(self, noises: Values, spare: float, floor: float | None = None) -> float:
        """The largest limit up to which none of ``noises``, at :data:`LIMITS`, is ``spare`` above the least."""
        least = int(noises.argmin())
        beyond = np.flatnonzero(noises[least:] > noises[least] + spare)
        place = least + int(beyond[0]) - 1 if beyond.size else len(noises) - 1
        return self.largest_above(floor) * float(LIMITS[place])

    def channel_limits(self, half: float) -> Values:
        """(C,): the limit of least noise of each channel, if it had a grid of its own."""
        reach = np.maximum(self.reach, TINY)
        magnitudes = np.abs(self.centres(BINS)) / reach[:, None]
        [clipped] = moments_beyond(CHANNEL_LIMITS, magnitudes, self.squares, 0)
        rounding = (self.squares.sum(axis=1, keepdims=True) - clipped) * np.square(CHANNEL_LIMITS / half) / 12
        noises = self.clipping_of_channels(CHANNEL_LIMITS, magnitudes) + rounding
        best: Values = CHANNEL_LIMITS[np.argmin(noises, axis=1)] * reach
        return best


def moments_beyond(limits: Values, magnitudes: Values, weights: Values, highest: int) -> list[Values]:
    """(C, L) each: the sums of ``weights`` times powers 0 to ``highest`` of the ``magnitudes``, both (C, B), above each
    of ``limits``, (L,), ascending."""
    channels, ends = len(weights), len(limits) + 1
    places = (np.searchsorted(limits, magnitudes) + ends * np.arange(channels)[:, None]).ravel()
    found, terms = [], weights
    for _ in range(highest + 1):
        parts = np.bincount(places, terms.ravel(), channels * ends).reshape(channels, ends)
        found.append(parts[:, :0:-1].cumsum(axis=1)[:, ::-1])
        terms = terms * magnitudes
    return found


Reactions = dict[str, Reaction]
"""Name of a layer -> how the logits react to errors behind it."""


class Watch(Function):  # type: ignore[misc]
    """The identity, which hands its tensor to a callback together with the gradient once that is known."""

    def __init__(self, see: Callable[[Array, Array], None]) -> None:
        super().__init__()
        self.see = see

    def forward(self, values: Tensor) -> Tensor:
        self.values = values
        return values + 0

    def backward(self, gradient: Tensor) -> Tensor:
        self.see(self.values.numpy(), gradient.numpy())
        del self.values
        return gradient


def measure_reactions(
    network: M.Module,
    names: Iterable[str],
    batches: Iterable[Array],
    seed: int = 0,
    in_pairs: Collection[str] = (),
    side: SideProcess | None = None,
    known: ChannelRanges | None = None,
) -> Reactions:
    """How the logits of ``network``, in evaluation state, react to errors behind each of the layers ``names``.

    ``batches``: float32 (N, 3, H, W), pixels minus 128; the second half of them is for the ``side`` process, where
    there is one. They are gone through twice, unless the ranges on them are ``known`` for all layers. Layers that never
    run, or give nothing but 0, are left out. Of those that are ``in_pairs``, channels are compared with each other,
    too.
    """
    names, batches, known = list(names), list(batches), known or {}
    unknown = [name for name in names if name not in known]
    found_ranges = unite_ranges(*share_halves(side, value_ranges, batches, network, unknown)) if unknown else {}
    seen = {name: found_ranges.get(name) or known.get(name) for name in names}
    ranges = {name: ends for name, ends in seen.items() if ends is not None and any(end.any() for end in ends)}
    own, others = halve(batches)
    later = begin(side if others else None, measure_part, network, ranges, others, seed, sum(map(len, own)), in_pairs)
    found = measure_part(network, ranges, own, seed, 0, in_pairs)
    return {name: found[name].unite(reaction) for name, reaction in later.result().items()}


def measure_part(
    network: M.Module,
    ranges: ChannelRanges,
    batches: Sequence[Array],
    seed: int,
    before: int,
    in_pairs: Collection[str],
) -> Reactions:
    """:func:`measure_reactions` on some of the images, behind layers whose channels have the ``ranges`` on all of them.

    ``before`` is the number of images that come before these: each image has its own combination of the logits.
    """
    found = {name: Reaction.from_bounds(*ends, name in in_pairs) for name, ends in ranges.items()}
    modules = dict(network.named_modules())
    random = np.random.default_rng(seed)

    def hook_of(name: str) -> Callable[[M.Module, object, Tensor], Tensor]:
        return lambda _, __, output: Watch(found[name].add)(output)

    hooks = ((modules[name], hook_of(name)) for name in found)
    with forward_hooks(hooks), fast_depthwise_gradients():
        for batch in split_for_memory(network, batches):
            manager, pixels = GradManager(), Tensor(batch)
            manager.attach([pixels])
            with manager:
                logits = network(pixels)
                images, *classes = logits._tuple_shape
                combinations = random.standard_normal((before + images, *classes))[before:].astype(np.float32)
                before = 0
                manager.backward((logits * Tensor(combinations)).sum())
    return found


def split_for_memory(network: M.Module, batches: Sequence[Array]) -> Iterator[Array]:
    """``batches`` in parts for which ``network`` gives no more than :data:`MOST_NUMBERS` on the way; of one image at
    least."""
    size = max(MOST_NUMBERS // count_numbers(network, batches[0][:1]), 1) if batches else 1
    for batch in batches:
        yield from (batch[start : start + size] for start in range(0, len(batch), size))


def count_numbers(network: M.Module, images: Array) -> int:
    """In all that the modules of ``network`` give for ``images``."""
    sizes: list[int] = [1]

    def see(_: M.Module, __: object, output: object) -> None:
        sizes.append(math.prod(output._tuple_shape) if isinstance(output, Tensor) else 0)

    leaves = [module for name, module in network.named_modules() if name and not any(module.children())]
    with forward_hooks((module, see) for module in leaves):
        network(Tensor(images)).numpy()
    return sum(sizes)


def unite_ranges(some: ChannelRanges, others: ChannelRanges) -> ChannelRanges:
    """Those that hold for both."""
    both = {
        name: (np.minimum(some[name][0], others[name][0]), np.maximum(some[name][1], others[name][1]))
        for name in some.keys() & others.keys()
    }
    return {**some, **others, **both}


def value_ranges(network: M.Module, names: Iterable[str], batches: Iterable[Array]) -> ChannelRanges:
    """Smallest and largest value of each channel, (C,), that each of the layers ``names`` gives on ``batches``.

    Raises FailureError that names a layer whose values are not finite.
    """
    found, _ = sum_channels(network, names, batches)
    return {name: (sums.lowest, sums.highest) for name, sums in found.items()}

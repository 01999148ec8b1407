"""The steps of post-training quantization: each turns a draft of the int8 network into another one.

A step has a name and one method. Which of them help is not known beforehand; :mod:`mgq.ptq.pipeline` tries them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Protocol

import megengine.module as M
import numpy as np
import numpy.typing as npt
from megengine import Tensor
from megengine.quantization.quantize import disable_fake_quant, disable_observer, enable_fake_quant

from mgq.errors import FailureError, plural
from mgq.graph.network_reader import graph_of
from mgq.ptq.bias_correction import BiasCorrection, correct_rounding_shifts, find_last_linear, shift_bias
from mgq.ptq.channel_mixing import find_linear_tensors, mix_channels
from mgq.ptq.channel_statistics import IMAGE_SIZE, Statistics, trace_expected_statistics
from mgq.ptq.data_free import correct_expected_bias, expect_ranges
from mgq.ptq.dead_channels import clear_dead_channels
from mgq.ptq.easyquant import Search
from mgq.ptq.equalization import equalize_channels, survey_images
from mgq.ptq.exact_scales import set_exact_scales
from mgq.ptq.gptq import GPTQ
from mgq.ptq.layerwise import Visitor, visit_beside_float, visit_layers
from mgq.ptq.logit_gradients import SPARE, ChannelRanges, Reactions, measure_mixtures, measure_reactions
from mgq.ptq.observers import RANGE_OBSERVERS
from mgq.ptq.range_measurement import as_input, estimate_ranges
from mgq.ptq.second_process import find_idle_process
from mgq.quantization.batch_norm_folding import activation_of, fold_batch_norms
from mgq.quantization.float_layers import keep_in_float
from mgq.quantization.floors import floor_of
from mgq.quantization.modes import Mode, to_mode
from mgq.quantization.option_names import EASYQUANT, LOGITS, MIN_MAX
from mgq.quantization.qat_layers import (
    GridRange,
    Range,
    find_quantized_layers,
    names_that_run,
    observe_weights,
    quant_levels,
    set_grids,
)
from mgq.quantization.targets import Target
from mgq.system.side_process import share_halves
from mgq.zoo.layers import ConvBnRelu6

Images = npt.NDArray[np.uint8]
Corrections = Mapping[str, tuple[float, ...]]
LAYERWISE_IMAGES = 64
"""The most images for steps that go layer by layer: they keep all in memory, in float and quantized, and gain little
from more."""
SHIFT_IMAGES = 32
"""Images on which the mean errors of rounded activations are measured."""
REACTION_IMAGES = 128
"""Images on which gradients are measured at most, evenly spread."""
BATCH = 8
MOST_AT_ONCE = 16
"""Images whose logits are found in one pass. Beside them a pass of a network in mode ``qat`` folds and rounds weights:
0.1 s for EfficientNet-Lite1, as long as two images take."""
NO_IMAGES: Images = np.empty((0, 3, 0, 0), np.uint8)
BATCH_NORMS = "batch norms"
"""The method's name where there were no images."""


def split_uint8(images: Images) -> list[Images]:
    return [images[start : start + BATCH] for start in range(0, len(images), BATCH)]


def split_evenly(images: Images) -> list[Images]:
    """Two parts, or 4, 6, ...: of :data:`MOST_AT_ONCE` images at most."""
    parts = 2 * -(-len(images) // (2 * MOST_AT_ONCE))
    return np.array_split(images, min(parts, len(images)))


def split_float(images: Images) -> list[npt.NDArray[np.float32]]:
    return [as_input(batch) for batch in split_uint8(images)]


def prepare(network: M.Module, target: Target, float_layers: Sequence[str] = (), in_place: bool = False) -> M.Module:
    """``network``, or a copy, in mode ``qat`` and evaluation state, its fake quantization off, weights observed.

    The weights of the layers ``float_layers`` stay float32. Raises InputError for a layer that cannot.
    """
    watched = to_mode(network, Mode.QAT, target, in_place)
    watched.eval()
    disable_fake_quant(watched)
    observe_weights(watched)
    keep_in_float(watched, float_layers)
    return watched


@dataclass(frozen=True)
class Knowledge:
    """What is known of a draft, so that it is not measured again: its ``reactions`` and ``statistics``, or a draft
    ``before`` it whose reactions and statistics are its own, too. ``answers``: logits of its ``watched`` network for
    the first of its images.
    """

    reactions: Reactions | None = None
    statistics: Statistics | None = None
    before: Draft | None = None
    answers: npt.NDArray[np.floating[Any]] | None = None


NOTHING_KNOWN = Knowledge()


@dataclass(frozen=True)
class Draft:
    """A network on its way to int8: ``network`` in mode ``normal``, and ``watched``, the same network in mode ``qat``.

    ``images``, uint8 (N, 3, H, W), are those to fit to. ``method`` says how the ranges of ``activations`` were chosen.
    ``weights``: ranges of the grids of weights, where they are not those of their values; ``rounded``: the weights are
    on their grids already. ``corrections``: what was added to biases, by layer. ``exact``: the logits of the float
    network for the ``images``, (N, classes), where they are known.
    """

    network: M.Module
    images: Images
    target: Target
    float_layers: tuple[str, ...] = ()
    watched: M.Module | None = None
    method: str = ""
    activations: Mapping[str, GridRange] = field(default_factory=dict)
    weights: Mapping[str, GridRange] = field(default_factory=dict)
    rounded: bool = False
    corrections: Corrections = field(default_factory=dict)
    exact: npt.NDArray[np.float64] | None = None
    known: Knowledge = NOTHING_KNOWN

    def see_images(self) -> Draft:
        """The same, which knows what its network makes of its images, as far as it can be followed."""
        try:
            found = survey_images(self.network, self.images, side=find_idle_process())
        except FailureError:
            return self
        return replace(self, exact=found.logits, known=replace(self.known, statistics=found.statistics))

    def with_network(self, network: M.Module, known: Knowledge = NOTHING_KNOWN) -> Draft:
        """A draft of another float network, which gives the same answers, and what is ``known`` of it."""
        return replace(self, network=network, known=known)

    def forget(self) -> Draft:
        """The same, of which nothing is known: small enough to be sent to another process."""
        return replace(self, known=NOTHING_KNOWN)

    def copy_watched(self) -> M.Module:
        """A copy of ``watched``, to be changed."""
        assert self.watched is not None
        return deepcopy(self.watched)

    def prepare(self) -> M.Module:
        return prepare(self.network, self.target, self.float_layers)

    def with_ranges(self, watched: M.Module, outputs: Mapping[str, Range], method: str) -> Draft:
        """``watched`` with grids for these ranges of its layers' ``outputs``, ready to be used."""
        activations = set_grids(watched, outputs)
        switch_on(watched)
        return replace(self, watched=watched, activations=activations, method=method)

    @cached_property
    def reactions(self) -> Reactions:
        """How the logits of ``network`` react to errors behind its layers."""
        if self.known.reactions is not None:
            return self.known.reactions
        if self.known.before is not None:
            return self.known.before.reactions
        folded, linear = fold_batch_norms(self.network), linear_names(self.network)
        return reactions_of(folded, self.prepare(), self.images, linear, self.find_channel_ranges())

    @property
    def known_reactions(self) -> Reactions | None:
        """The ``reactions``, where they were measured already."""
        if "reactions" in vars(self):
            return self.reactions
        return self.known.reactions if self.known.before is None else self.known.before.known_reactions

    @cached_property
    def statistics(self) -> Statistics:
        """Of the channels of ``network`` on ``images``. Raises FailureError where it cannot be followed."""
        if self.known.statistics is not None:
            return self.known.statistics
        if self.known.before is not None:
            return self.known.before.statistics
        return survey_images(self.network, self.images).statistics

    def find_channel_ranges(self) -> ChannelRanges:
        """What the channels of ``network`` give for ``images``, as far as it can be followed."""
        try:
            return {name: (each.lowest, each.highest) for name, each in self.statistics.items()}
        except FailureError:
            return {}

    @cached_property
    def logits(self) -> npt.NDArray[np.float64]:
        """Of the float network, for the images that biases are corrected by."""
        return self.find_logits(LAYERWISE_IMAGES)

    def find_logits(self, most: int | None = None) -> npt.NDArray[np.float64]:
        """Of the float network, for all images, or for the first ones."""
        if self.exact is not None:
            return self.exact[:most]
        return logits_of(fold_batch_norms(self.network), self.images[:most])


def reactions_of(
    network: M.Module,
    watched: M.Module,
    images: Images,
    in_pairs: Collection[str] = (),
    known: ChannelRanges | None = None,
) -> Reactions:
    """Measure how the logits of ``network`` (in float) react to errors in the tensors that ``watched`` quantizes.

    The channels of those ``in_pairs`` are compared with each other, too. What is ``known`` of the ranges on the
    ``images`` is not measured again.
    """
    names, side = names_that_run(watched), find_idle_process()
    return measure_reactions(network, names, split_float(select_few(images)), in_pairs=in_pairs, side=side, known=known)


def select_few(images: Images) -> Images:
    """Those on which gradients are measured."""
    return images[:: -(-len(images) // REACTION_IMAGES)]


def linear_names(network: M.Module) -> set[str]:
    """The tensors of ``network`` whose channels can be mixed; none where it cannot be followed."""
    with contextlib.suppress(FailureError):
        return {name for linear in find_linear_tensors(graph_of(network, IMAGE_SIZE)) for name in linear.tensors}
    return set()


def ranges_by_logits(watched: M.Module, reactions: Reactions, headroom: bool = False) -> dict[str, Range]:
    """The range of each layer of ``watched`` for which rounding and clipping change the logits least, and wider where
    that costs next to nothing (:data:`mgq.ptq.logit_gradients.SPARE`)."""
    layers, found = find_quantized_layers(watched), {}
    floors = {name: floor_of(layers[name].act_observer.dtype) for name in reactions}
    noises = {
        name: each.noises_at_limits(quant_levels(layers[name]), headroom, floors[name])
        for name, each in reactions.items()
    }
    spare = SPARE * sum(each.min() for each in noises.values())
    for name, reaction in reactions.items():
        floor = floors[name]
        low, high = reaction.range_within(reaction.largest_limit(noises[name], spare, floor), floor)
        found[name] = Range(low, min(high, activation_of(layers[name]).high))
    return found


def zero_ranges(watched: M.Module) -> dict[str, Range]:
    """A range of zeros for each layer that runs: a layer that only gives 0 has no reaction, but needs a range."""
    return dict.fromkeys(names_that_run(watched), Range(0.0, 0.0))


def whole_ranges(reactions: Reactions) -> dict[str, Range]:
    """The smallest and the largest value seen behind each layer."""
    return {name: Range(float(each.lowest.min()), float(each.highest.max())) for name, each in reactions.items()}


def switch_on(watched: M.Module) -> None:
    enable_fake_quant(watched)
    disable_observer(watched)


class Step(Protocol):
    """One step. ``name`` says what it does, as the program tells it."""

    @property
    def name(self) -> str: ...

    def apply(self, draft: Draft) -> Draft:
        """Another draft; the network of ``draft`` itself stays as it is."""
        ...


@dataclass(frozen=True)
class ClearDeadChannels:
    """Weights of channels that are 0 for every image become 0 (:mod:`mgq.ptq.dead_channels`)."""

    name: str = "dead channels cleared"

    def apply(self, draft: Draft) -> Draft:
        return draft.with_network(clear_dead_channels(draft.network)[0], Knowledge(before=draft))


@dataclass(frozen=True)
class Equalize:
    """Channels are scaled so that int8 makes the least noise (:mod:`mgq.ptq.equalization`).

    By what the pictures and the gradients of the logits tell, or, with ``data_free``, by the batch norms alone. A
    network that is not of the zoo, and cannot be followed, stays as it is. ``to_ceilings`` is for networks with ReLU6:
    FailureError is raised for others.
    """

    to_ceilings: bool = False
    data_free: bool = False

    @property
    def name(self) -> str:
        if self.data_free:
            return "channels equalized by batch norms"
        return "channels equalized up to the ceilings seen" if self.to_ceilings else "channels equalized"

    def apply(self, draft: Draft) -> Draft:
        if self.to_ceilings and not any(isinstance(module, ConvBnRelu6) for module in draft.network.modules()):
            raise FailureError("no layer of the network has a ceiling")
        with contextlib.suppress(FailureError):
            if self.data_free:
                return draft.with_network(equalize_channels(draft.network, None, draft.target)[0])
            network, factors = equalize_channels(
                draft.network,
                target=draft.target,
                reactions=draft.reactions,
                to_ceilings=self.to_ceilings,
                statistics=draft.statistics,
            )
            scaled = {name: reaction.scale(factors[name]) for name, reaction in draft.reactions.items()}
            return draft.with_network(network, Knowledge(scaled))
        return draft


@dataclass(frozen=True)
class MixChannels:
    """Channels of tensors without an activation are mixed, so that one grid fits them all
    (:mod:`mgq.ptq.channel_mixing`). FailureError is raised where there are none."""

    name: str = "channels mixed"

    def apply(self, draft: Draft) -> Draft:
        graph = graph_of(draft.network, IMAGE_SIZE)
        network, mixings = mix_channels(draft.network, graph, draft.reactions)
        if not mixings:
            raise FailureError("no channels of the network can be mixed")
        side, before = find_idle_process(), [draft.reactions[name] for name in mixings]
        of_samples = {name: mixing * old.factors for (name, mixing), old in zip(mixings.items(), before, strict=True)}
        measured = measure_mixtures(of_samples, before[0].run, side)
        if measured is None:
            batches = split_float(select_few(draft.images))
            measured = measure_reactions(fold_batch_norms(network), mixings, batches, side=side)
        return draft.with_network(network, Knowledge({**draft.reactions, **measured}))


@dataclass(frozen=True)
class RangesFromLogits:
    """Ranges for which rounding and clipping change the logits least (:mod:`mgq.ptq.logit_gradients`).

    With ``headroom`` they leave room for images that are stronger than those seen. Where the network was trained on the
    images seen, other images clip more: one of 83 caused half of the noise.
    """

    headroom: bool = False

    @property
    def name(self) -> str:
        return "ranges by the logits with headroom" if self.headroom else "ranges by the logits"

    def apply(self, draft: Draft) -> Draft:
        watched = draft.prepare()
        ranges = zero_ranges(watched) | ranges_by_logits(watched, draft.reactions, self.headroom)
        return draft.with_ranges(watched, ranges, LOGITS)


@dataclass(frozen=True)
class ExpectedRanges:
    """Ranges by what the batch norms expect (:mod:`mgq.ptq.data_free`)."""

    name: str = "ranges by batch norms"

    def apply(self, draft: Draft) -> Draft:
        graph, statistics = trace_expected_statistics(draft.network)
        watched = draft.prepare()
        return draft.with_ranges(watched, expect_ranges(watched, graph, statistics), BATCH_NORMS)


@dataclass(frozen=True)
class RangesFromImages:
    """Ranges that one method of :data:`mgq.quantization.option_names.METHODS` takes from the values behind each layer
    alone."""

    method: str = MIN_MAX

    @property
    def name(self) -> str:
        return f"ranges by {self.method}"

    def apply(self, draft: Draft) -> Draft:
        watched = draft.prepare()
        if self.method == EASYQUANT:
            search = Search()
            visit_beside_float(watched, as_input(draft.images[:LAYERWISE_IMAGES]), search)
            return replace(draft.with_ranges(watched, search.activations, self.method), weights=search.weights)
        known = draft.known_reactions
        if self.method == MIN_MAX and known is not None and len(draft.images) <= REACTION_IMAGES:
            return draft.with_ranges(watched, zero_ranges(watched) | whole_ranges(known), self.method)
        found = estimate_ranges(deepcopy(watched), split_uint8(draft.images), RANGE_OBSERVERS[self.method])
        return draft.with_ranges(watched, found, self.method)


@dataclass(frozen=True)
class ExactScales:
    """Scales with which every engine gives the same integers as the simulation (:mod:`mgq.ptq.exact_scales`).

    A network that is not of the zoo, and cannot be followed, stays as it is.
    """

    name: str = "exact scales"

    def apply(self, draft: Draft) -> Draft:
        watched = draft.copy_watched()
        try:
            ranges = set_exact_scales(watched)
        except FailureError:
            return draft
        switch_on(watched)
        return replace(draft, watched=watched, activations=ranges)


@dataclass(frozen=True)
class CorrectBias:
    """The mean shift of rounded weights is subtracted from the biases of the convolutions
    (:mod:`mgq.ptq.bias_correction`)."""

    images: int = LAYERWISE_IMAGES

    @property
    def name(self) -> str:
        quickly = "" if self.images >= LAYERWISE_IMAGES else f" on {plural(self.images, 'image')}"
        return f"biases corrected for rounded weights{quickly}"

    def apply(self, draft: Draft) -> Draft:
        correction = BiasCorrection(of_weights=True)
        found = visit_with(draft, self.images, correction, beside_float=False)
        return replace(found, corrections=correction.found)


@dataclass(frozen=True)
class CorrectExpectedBias:
    """The mean shift of rounded weights is subtracted, as the batch norms expect it (:mod:`mgq.ptq.data_free`)."""

    name: str = "biases corrected by batch norms"

    def apply(self, draft: Draft) -> Draft:
        graph, statistics = trace_expected_statistics(draft.network)
        watched = draft.copy_watched()
        found = correct_expected_bias(watched, graph, statistics)
        return replace(draft, watched=watched, corrections=found)


@dataclass(frozen=True)
class RoundWeights:
    """Weights are rounded so that their errors make up for each other, biases corrected (:mod:`mgq.ptq.gptq`).

    With ``refit`` weights are also fitted to the inputs that the int8 layers before give.
    """

    refit: bool = False
    correct_bias: bool = True

    @property
    def name(self) -> str:
        return "weights fitted and rounded" if self.refit else "weights rounded together"

    def apply(self, draft: Draft) -> Draft:
        rounding, correction = GPTQ(self.refit), BiasCorrection(of_weights=not self.refit)
        visitors: list[Visitor] = [rounding]
        if self.correct_bias:
            visitors = [rounding, correction] if self.refit else [correction.remember_weights, rounding, correction]
        found = visit_with(draft, LAYERWISE_IMAGES, *visitors, beside_float=self.refit)
        return replace(found, weights=rounding.weights, rounded=True, corrections={})


@dataclass(frozen=True)
class CorrectShifts:
    """The mean shift that rounding of activations causes is subtracted from the biases of the convolutions that read
    them.

    A network that is not of the zoo, and cannot be followed, stays as it is.
    """

    name: str = "biases corrected for rounded activations"

    def apply(self, draft: Draft) -> Draft:
        try:
            graph = graph_of(draft.network, IMAGE_SIZE)
        except FailureError:
            return draft
        watched = draft.copy_watched()
        batches = split_float(draft.images[:SHIFT_IMAGES])
        found = correct_rounding_shifts(watched, draft.network, graph, batches, find_idle_process())
        corrections = {} if draft.rounded else add_corrections(draft.corrections, found)
        return replace(draft, watched=watched, corrections=corrections, known=replace(draft.known, answers=None))


def add_corrections(some: Corrections, others: Corrections) -> Corrections:
    """Both together, by layer."""
    both = {name: tuple(np.add(some[name], others[name]).tolist()) for name in some.keys() & others.keys()}
    return {**some, **others, **both}


@dataclass(frozen=True)
class CorrectLogits:
    """The remaining mean shift of the logits, which clipping causes, is subtracted from the classifier's bias.

    A network that does not end in a linear layer with a bias stays as it is.
    """

    name: str = "logits right on average"

    def apply(self, draft: Draft) -> Draft:
        watched = draft.copy_watched()
        linear = find_last_linear(watched)
        if linear is None:
            return draft
        name, classifier = linear
        images = draft.images[:LAYERWISE_IMAGES]
        answers = logits_of(watched, images) if draft.known.answers is None else draft.known.answers
        shift = (draft.logits[: len(answers)] - answers).mean(axis=0)
        correction = shift_bias(classifier, shift)
        corrections = {} if draft.rounded else {**draft.corrections, name: correction}
        return replace(draft, watched=watched, corrections=corrections)


def visit_with(draft: Draft, number: int, *visitors: Visitor, beside_float: bool) -> Draft:
    """``draft`` with a copy of its ``qat`` network, whose layers were shown to ``visitors`` one by one."""
    watched = draft.copy_watched()
    visit = visit_beside_float if beside_float else visit_layers
    answers = visit(watched, as_input(draft.images[:number]), *visitors)
    switch_on(watched)
    return replace(draft, watched=watched, known=replace(draft.known, answers=answers))


def logits_of(network: M.Module, images: Images) -> npt.NDArray[np.float64]:
    """float64 (N, classes). A second process that has nothing to do takes half of the batches."""
    here, later = share_halves(find_idle_process(), logits_of_batches, split_evenly(images), network)
    return np.concatenate([*here, *later])


def logits_of_batches(network: M.Module, batches: Sequence[Images]) -> list[npt.NDArray[np.float64]]:
    """float64 (N, classes), of each."""
    return [network(Tensor(as_input(batch))).numpy().astype(np.float64) for batch in batches]

"""Calibration: run a float network over pictures and choose the ranges that int8 covers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import megengine.module as M
import numpy as np
import numpy.typing as npt
from megengine.quantization.quantize import disable_observer, enable_fake_quant

from mgq.cpu_kernels.simulation import fast_simulation
from mgq.errors import FailureError
from mgq.events import OnProgress, log_progress
from mgq.graph.network_reader import keep_traces
from mgq.machine import one_blas_thread
from mgq.ptq.bias_correction import BiasCorrection
from mgq.ptq.channel_statistics import trace_expected_statistics
from mgq.ptq.data_free import correct_expected_bias, expect_ranges
from mgq.ptq.dead_channels import clear_dead_channels
from mgq.ptq.easyquant import Search
from mgq.ptq.equalization import equalize_channels
from mgq.ptq.exact_scales import set_exact_scales
from mgq.ptq.gptq import GPTQ
from mgq.ptq.layerwise import Visitor, visit_beside_float
from mgq.ptq.observers import RANGE_OBSERVERS
from mgq.ptq.pipeline import SearchResult, find_best
from mgq.ptq.presets import Preset, check_method, check_rounding
from mgq.ptq.range_measurement import as_input, estimate_ranges
from mgq.ptq.steps import BATCH_NORMS, LAYERWISE_IMAGES, Draft, prepare, ranges_by_logits, reactions_of
from mgq.quantization.activation_ranges import ActivationRanges
from mgq.quantization.modes import Mode, mode_of, to_mode
from mgq.quantization.option_names import BY_GPTQ, EASYQUANT, LOGITS, MSE
from mgq.quantization.qat_layers import GridRange, Range, set_grids
from mgq.quantization.targets import MEGENGINE, Target, target_of
from mgq.zoo.network_state import evaluation_state, state_of
from mgq.zoo.weight_loading import fingerprint

DEFAULT_METHOD = MSE
EQUALIZATION_IMAGES = 64
MOST_LAYERWISE_IMAGES = LAYERWISE_IMAGES


def count_images_used(method: str, images: int) -> int:
    """How many of ``images`` pictures ``method`` looks at."""
    return min(images, MOST_LAYERWISE_IMAGES) if method == EASYQUANT else images


def calibrate_network(
    network: M.Module,
    batches: Iterable[npt.NDArray[np.uint8]],
    arch: str,
    weights: str,
    provenance: Mapping[str, Any],
    method: str = DEFAULT_METHOD,
    correct_bias: bool = True,
    weight_rounding: str = BY_GPTQ,
    in_place: bool = False,
    target: Target = MEGENGINE,
    equalize: bool = True,
    float_layers: Sequence[str] = (),
) -> tuple[M.Module, ActivationRanges]:
    """A copy of ``network``, or itself, in mode ``qat`` with ranges over ``batches`` chosen by ``method``, and these.

    ``logits``: the least change of the logits; ``min-max``: smallest and largest value; ``ema``: moving average of each
    batch's; ``histogram``: all but one value in 10,000; ``mse``: smallest squared error of rounding and clipping;
    ``easyquant``: largest cosine similarity of each layer's float and int8 outputs, searched on at most 64 of the
    pictures, for ranges of the weights, too. With ``correct_bias`` the mean shift of int8 is measured on at most 64
    images; it is to be subtracted from the biases.

    With ``weight_rounding`` ``gptq`` weights of a float network that cannot change any output become 0
    (:mod:`mgq.ptq.dead_channels`), its channels are scaled so that rounding costs least (:mod:`mgq.ptq.equalization`,
    unless ``equalize`` is False), and the weights are rounded so that their errors make up for each other
    (:mod:`mgq.ptq.gptq`). Then the ranges hold for these weights with corrected biases only. ``target`` is what a float
    network is quantized for. The weights of the layers ``float_layers`` stay float32.

    A batch is uint8 (N, 3, H, W), BGR. Layers that never ran have no range and are left out. Raises InputError for
    another ``method``, and for a layer that cannot stay in float.
    """
    check_method(method)
    compensate = check_rounding(weight_rounding) == BY_GPTQ
    if compensate and mode_of(network) is Mode.NORMAL:
        network, in_place = clear_dead_channels(network, in_place)[0], True
        if equalize:
            batches = list(batches)
            equalize_by_images(network, batches, target)
    watched = prepare(network, target, float_layers, in_place)
    found = calibrate_layers(watched, batches, method, compensate, correct_bias)
    return watched, ActivationRanges(
        arch=arch,
        observer=method,
        weights=weights,
        provenance=provenance,
        ranges=found.activations,
        weight_ranges=found.weights,
        bias_corrections=found.corrections,
        target=target_of(watched).name,
    )


class LayerRanges(NamedTuple):
    """Ranges of the grids of activations and of weights, and corrections of biases, by the layers' names."""

    activations: Mapping[str, GridRange]
    weights: Mapping[str, GridRange]
    corrections: Mapping[str, tuple[float, ...]]


def equalize_by_images(network: M.Module, batches: Sequence[npt.NDArray[np.uint8]], target: Target) -> None:
    """Equalize the channels of the float ``network`` in place, by the first images. Does nothing without images, or
    where the network cannot be traced."""
    if batches:
        with contextlib.suppress(FailureError):  # a network that is not of the zoo, and cannot be traced
            equalize_channels(network, np.concatenate(batches)[:EQUALIZATION_IMAGES], target, in_place=True)


def calibrate_layers(
    watched: M.Module, batches: Iterable[npt.NDArray[np.uint8]], method: str, compensate: bool, correct_bias: bool
) -> LayerRanges:
    """Set ranges of all layers of ``watched``, then visit the layers one after the other to round their weights
    (``compensate``) and to correct their biases. Fake quantization is on afterwards."""
    # With a scale for each output channel GPTQ gains little, and weights fitted to few images lose by it.
    rounding = GPTQ(refit=not target_of(watched).per_channel)
    search, correction, sample = Search(), BiasCorrection(), Sample(LAYERWISE_IMAGES)
    activations: dict[str, GridRange] = {}
    visitors: list[Visitor] = []
    if method == EASYQUANT:
        sample.add_all(batches)
        visitors.append(search)
    else:
        activations = set_activation_ranges(watched, batches, method, sample, exact=compensate)
    visitors += [rounding] if compensate else []
    visitors += [correction] if correct_bias else []
    if sample.images and visitors:
        with one_blas_thread():
            visit_beside_float(watched, as_input(np.stack(sample.images)), *visitors)
    enable_fake_quant(watched)
    disable_observer(watched)
    if method == EASYQUANT:
        activations = set_grids(watched, search.activations)
    if compensate:
        return LayerRanges(activations, rounding.weights, {})
    return LayerRanges(activations, search.weights, correction.found)


def set_activation_ranges(
    watched: M.Module, batches: Iterable[npt.NDArray[np.uint8]], method: str, sample: Sample, exact: bool
) -> dict[str, GridRange]:
    """Set the grid of each layer by ``method``, any but ``easyquant``, and return the ranges of the grids by name.
    ``sample`` is shown all images. With ``exact`` the scales are those that the engines of an ONNX target compute
    with."""
    found: dict[str, Range] = {}
    if method == LOGITS:
        sample.add_all(batches)
        if sample.images:
            found.update(ranges_by_logits(watched, reactions_of(watched, watched, np.stack(sample.images))))
    else:
        found.update(estimate_ranges(to_mode(watched, Mode.QAT), sample.watch(batches), RANGE_OBSERVERS[method]))
    grids = set_grids(watched, found)
    if exact and target_of(watched) is not MEGENGINE:
        with contextlib.suppress(FailureError):
            grids.update(set_exact_scales(watched))
    return grids


def find_best_network(
    network: M.Module,
    images: npt.NDArray[np.uint8],
    arch: str,
    weights: str,
    preset: Preset,
    target: Target = MEGENGINE,
    float_layers: Sequence[str] = (),
    on_progress: OnProgress = log_progress,
) -> tuple[SearchResult, ActivationRanges]:
    """Run :func:`mgq.ptq.pipeline.find_best` on ``network`` (mode ``normal``); return the result and its ranges.

    ``images``: uint8 (N, 3, H, W). Where the weights themselves were changed, the ranges fit the new ones alone, and
    ``weights``, the fingerprint of the old ones, is replaced.
    """
    with evaluation_state(network), fast_simulation(), keep_traces(), one_blas_thread():
        found = find_best(
            network, images, preset, lambda fit: Draft(network, fit, target, tuple(float_layers)), on_progress
        )
    draft = found.draft
    assert draft.watched is not None
    own = draft.network is not network or draft.rounded
    state = fingerprint(state_of(draft.watched)) if own else weights
    return found, ActivationRanges(
        arch=arch,
        observer=draft.method,
        weights=state,
        provenance={},
        ranges=draft.activations,
        weight_ranges=draft.weights,
        bias_corrections={} if own else draft.corrections,
        target=target.name,
    )


def calibrate_data_free_network(
    network: M.Module,
    arch: str,
    weights: str,
    provenance: Mapping[str, Any],
    target: Target = MEGENGINE,
    in_place: bool = False,
) -> tuple[M.Module, ActivationRanges]:
    """As :func:`calibrate_network` of a float ``network``, without images, from the statistics of its batch norms.

    Dead channels are cleared, channels equalized, ranges set and biases corrected; weights are rounded to the nearest
    (:mod:`mgq.ptq.data_free`).
    """
    network, _ = clear_dead_channels(network, in_place)
    equalize_channels(network, None, target, in_place=True)
    graph, statistics = trace_expected_statistics(network)
    watched = prepare(network, target, in_place=True)
    activations = set_grids(watched, expect_ranges(watched, graph, statistics))
    if target is not MEGENGINE:
        activations = set_exact_scales(watched)
    correct_expected_bias(watched, graph, statistics)
    enable_fake_quant(watched)
    disable_observer(watched)
    return watched, ActivationRanges(arch, BATCH_NORMS, weights, provenance, activations, target=target.name)


class Sample:
    """An even sample of at most ``number`` images of a stream."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.images: list[npt.NDArray[np.uint8]] = []
        self._every, self._seen = 1, 0

    def add(self, batch: npt.NDArray[np.uint8]) -> None:
        for image in batch:
            if self._seen % self._every == 0:
                self.images.append(image.copy())  # a view would keep the whole batch
            self._seen += 1
            if len(self.images) > self.number:
                self.images, self._every = self.images[::2], self._every * 2

    def add_all(self, batches: Iterable[npt.NDArray[np.uint8]]) -> None:
        for batch in batches:
            self.add(batch)

    def watch(self, batches: Iterable[npt.NDArray[np.uint8]]) -> Iterator[npt.NDArray[np.uint8]]:
        """Yield ``batches`` unchanged, and sample from each one."""
        for batch in batches:
            self.add(batch)
            yield batch

"""Calibration: run a float network over pictures and choose the ranges that int8 covers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import megengine.module as M
import numpy as np
import numpy.typing as npt
from megengine import Tensor
from megengine.module.qat import QuantStub
from megengine.quantization.observer import Observer
from megengine.quantization.quantize import disable_fake_quant, disable_observer, enable_fake_quant
from megengine.quantization.utils import QParams

from mgq.errors import FailureError, no_such
from mgq.quant.bias_correction import BiasCorrection
from mgq.quant.data_free import correct_expected_bias, set_expected_ranges
from mgq.quant.dead_channels import without_dead_channels
from mgq.quant.easyquant import Search
from mgq.quant.equalization import equalized
from mgq.quant.estimators import ESTIMATORS, Range, RangeEstimator
from mgq.quant.exact_scales import move_to_exact_scales
from mgq.quant.layerwise import Visitor, visit_layers
from mgq.quant.mixed import keep_in_float
from mgq.quant.modes import Mode, mode_of, to_mode
from mgq.quant.names import EASYQUANT, METHODS, MSE
from mgq.quant.ranges import ActivationRanges, half_of, observe_weights, quantized_layers, set_range
from mgq.quant.rounding import CompensatedRounding
from mgq.quant.statistics import expected_of
from mgq.quant.targets import MEGENGINE, Target, target_of

DEFAULT_METHOD = MSE
DATA_FREE = "batch norms"
"""What stands for the method where there were no pictures."""
EQUALIZATION_PICTURES = 64
LAYERWISE_PICTURES = 64
"""What is done layer by layer keeps all pictures in memory, in float and quantized, and more tell it no more."""


class EstimatingObserver(Observer):  # type: ignore[misc]
    """Shows what passes to a range estimator."""

    def __init__(self, observer: Observer, estimator: RangeEstimator) -> None:
        super().__init__(observer.dtype)
        self.estimator = estimator

    def forward(self, x: Tensor) -> Tensor:
        self.estimator.update(x.numpy())
        return x

    def get_qparams(self) -> QParams | None:
        return None


def checked_method(method: str) -> str:
    """``method`` itself. Raises InputError, which lists them, unless it is one of ``METHODS``."""
    if method not in METHODS:
        raise no_such("calibration method", method, METHODS)
    return method


def pictures_used(method: str, images: int) -> int:
    """How many of ``images`` pictures ``method`` looks at."""
    return min(images, LAYERWISE_PICTURES) if method == EASYQUANT else images


def measured_ranges(
    network: M.Module,
    batches: Iterable[npt.NDArray[np.uint8]],
    arch: str,
    weights: str,
    provenance: Mapping[str, Any],
    method: str = "min-max",
    correct_bias: bool = True,
) -> ActivationRanges:
    """The range of each layer of ``network`` (mode ``normal``) over ``batches``, chosen by ``method``.

    ``min-max``: smallest and largest value; ``ema``: moving average of each batch's; ``histogram``: all but one value
    in 10,000; ``mse``: smallest squared error of rounding and clipping; ``easyquant``: largest cosine similarity of
    each layer's float and int8 outputs, searched on at most 64 of the pictures, for ranges of the weights, too. With
    ``correct_bias`` what int8 then shifts on average is measured on at most 64 pictures, to be taken out of the biases.

    A batch is uint8 (N, 3, H, W), BGR. Layers that never ran have no range and are left out. Raises InputError for
    another ``method``.
    """
    return calibrated_network(network, batches, arch, weights, provenance, method, correct_bias, False)[1]


def calibrated_network(
    network: M.Module,
    batches: Iterable[npt.NDArray[np.uint8]],
    arch: str,
    weights: str,
    provenance: Mapping[str, Any],
    method: str = DEFAULT_METHOD,
    correct_bias: bool = True,
    compensate: bool = True,
    in_place: bool = False,
    target: Target = MEGENGINE,
    equalize: bool = True,
    kept: Sequence[str] = (),
) -> tuple[M.Module, ActivationRanges]:
    """A copy of ``network``, or itself, in mode ``qat`` with the ranges of :func:`measured_ranges`, and these.

    With ``compensate`` a float network's weights that can never matter become 0 (:mod:`mgq.quant.dead_channels`), its
    channels are scaled so that rounding costs least (:mod:`mgq.quant.equalization`, unless ``equalize`` is False), and
    the weights are rounded so that their errors make up for each other (:mod:`mgq.quant.rounding`). Then the ranges
    are those of these weights, biases corrected, and of no others.
    ``target`` is what a float network is quantized for. The weights of the layers ``kept`` stay float32. Raises
    InputError for a layer that cannot.
    """
    checked_method(method)
    batches = iter(batches)
    if compensate and mode_of(network) is Mode.NORMAL:
        network, in_place = without_dead_channels(network, in_place)[0], True
        if equalize:
            first = taken(batches, EQUALIZATION_PICTURES)
            if first:
                with contextlib.suppress(FailureError):  # a network that is not of the zoo, and cannot be followed
                    equalized(network, np.concatenate(first)[:EQUALIZATION_PICTURES], target, in_place=True)
            batches = chain(first, batches)
    watched = prepared(network, target, in_place)
    keep_in_float(watched, kept)
    sample = Sample(LAYERWISE_PICTURES)
    search, rounding, correction = Search(), CompensatedRounding(), BiasCorrection()
    visitors: list[Visitor] = []
    if method == EASYQUANT:
        for batch in batches:
            sample.add(batch)
        visitors.append(search)
    else:
        search.activations.update(estimated_ranges(to_mode(watched, Mode.QAT), sample.of(batches), ESTIMATORS[method]))
        layers = quantized_layers(watched)
        for name, found in search.activations.items():
            set_range(layers[name].act_observer, *found)
        if compensate and target_of(watched) is not MEGENGINE:
            with contextlib.suppress(FailureError):
                search.activations.update(move_to_exact_scales(watched).ranges)
    visitors += [rounding] if compensate else []
    visitors += [correction] if correct_bias else []
    if sample.pictures and visitors:
        visit_layers(watched, as_input(np.stack(sample.pictures)), *visitors)
    enable_fake_quant(watched)
    disable_observer(watched)
    weight_ranges = rounding.weights if compensate else search.weights
    corrections = {} if compensate else correction.found
    tables = search.activations, weight_ranges, corrections
    ranges = ActivationRanges(arch, method, weights, provenance, *tables, target_of(watched).name)
    return watched, ranges


def data_free_network(
    network: M.Module,
    arch: str,
    weights: str,
    provenance: Mapping[str, Any],
    target: Target = MEGENGINE,
    in_place: bool = False,
) -> tuple[M.Module, ActivationRanges]:
    """As :func:`calibrated_network` of a float ``network``, without a picture: by what its batch norms expect.

    Dead channels are cleared, channels equalized, ranges set and biases corrected; weights are rounded to the nearest
    (:mod:`mgq.quant.data_free`).
    """
    network, _ = without_dead_channels(network, in_place)
    equalized(network, None, target, in_place=True)
    graph, statistics = expected_of(network)
    watched = prepared(network, target, in_place=True)
    activations = set_expected_ranges(watched, graph, statistics)
    if target is not MEGENGINE:
        moved = move_to_exact_scales(watched)
        activations, statistics = moved.ranges, moved.statistics(statistics)
    correct_expected_bias(watched, graph, statistics)
    enable_fake_quant(watched)
    disable_observer(watched)
    return watched, ActivationRanges(arch, DATA_FREE, weights, provenance, activations, target=target.name)


def prepared(network: M.Module, target: Target, in_place: bool) -> M.Module:
    """``network``, or a copy, in mode ``qat`` and evaluation state, its fake quantization off, weights observed."""
    watched = to_mode(network, Mode.QAT, target, in_place)
    watched.eval()
    disable_fake_quant(watched)
    observe_weights(watched)
    return watched


def taken(batches: Iterator[npt.NDArray[np.uint8]], number: int) -> list[npt.NDArray[np.uint8]]:
    """The first of ``batches``, with ``number`` pictures together, or all."""
    found: list[npt.NDArray[np.uint8]] = []
    while sum(map(len, found)) < number and (batch := next(batches, None)) is not None:
        found.append(batch)
    return found


class Sample:
    """At most ``number`` pictures of all that it is shown, evenly spread."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.pictures: list[npt.NDArray[np.uint8]] = []
        self._every, self._seen = 1, 0

    def add(self, batch: npt.NDArray[np.uint8]) -> None:
        for picture in batch:
            if self._seen % self._every == 0:
                self.pictures.append(picture.copy())  # a view would keep the whole batch
            self._seen += 1
            if len(self.pictures) > self.number:
                self.pictures, self._every = self.pictures[::2], self._every * 2

    def of(self, batches: Iterable[npt.NDArray[np.uint8]]) -> Iterator[npt.NDArray[np.uint8]]:
        """``batches`` themselves, each shown on its way."""
        for batch in batches:
            self.add(batch)
            yield batch


def estimated_ranges(
    watched: M.Module, batches: Iterable[npt.NDArray[np.uint8]], kind: type[RangeEstimator]
) -> dict[str, Range]:
    estimators = with_estimators(watched, kind)
    for batch in batches:
        watched(Tensor(as_input(batch)))
    return {name: estimator.range() for name, estimator in estimators.items() if estimator.has_seen}


def with_estimators(watched: M.Module, kind: type[RangeEstimator]) -> dict[str, RangeEstimator]:
    """Put an estimator behind each layer of a ``qat`` network but its input, whose scale is fixed; by their names."""
    layers = {name: layer for name, layer in quantized_layers(watched).items() if not isinstance(layer, QuantStub)}
    estimators = {name: kind(half_of(layer)) for name, layer in layers.items()}
    for name, layer in layers.items():
        layer.act_observer = EstimatingObserver(layer.act_observer, estimators[name])
    return estimators


def as_input(batch: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """Pixels as networks take them: float32, minus 128."""
    return batch.astype(np.float32) - 128

"""Calibration of a float network: by the best of a preset's candidates, or by given steps alone."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import megengine.module as M

from mgq.cpu_kernels.simulation import fast_simulation
from mgq.events import OnProgress, log_progress
from mgq.graph.network_reader import keep_traces
from mgq.machine import one_blas_thread
from mgq.ptq.pipeline import SearchResult, apply_steps, find_best
from mgq.ptq.presets import Preset
from mgq.ptq.steps import Draft, Images, Step
from mgq.ptq.tensor_samples import keep_samples
from mgq.quantization.activation_ranges import ActivationRanges
from mgq.quantization.targets import MEGENGINE, Target
from mgq.zoo.layers import quick_walks
from mgq.zoo.network_state import evaluation_state, state_of
from mgq.zoo.weight_loading import fingerprint


def find_best_network(
    network: M.Module,
    images: Images,
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
    with calibration_of(network):
        found = find_best(
            network, images, preset, lambda fit: Draft(network, fit, target, tuple(float_layers)), on_progress
        )
    return found, ranges_of(found.draft, network, arch, weights)


def calibrate_network(
    network: M.Module,
    images: Images,
    arch: str,
    weights: str,
    steps: Sequence[Step],
    target: Target = MEGENGINE,
    float_layers: Sequence[str] = (),
) -> tuple[M.Module, ActivationRanges]:
    """What ``steps`` make of ``network`` (mode ``normal``) with ``images``: it in mode ``qat``, and its ranges.

    ``images`` and ``weights`` are as for :func:`find_best_network`; steps that need no images take
    :data:`mgq.ptq.steps.NO_IMAGES`. Raises FailureError where a step does not apply to the network.
    """
    with calibration_of(network):
        draft = apply_steps(steps, {(): Draft(network, images, target, tuple(float_layers))})
    assert draft.watched is not None
    return draft.watched, ranges_of(draft, network, arch, weights)


@contextlib.contextmanager
def calibration_of(network: M.Module) -> Iterator[None]:
    """Inside, ``network`` is in evaluation state, simulations are fast, and bits depend on no number of cores."""
    with evaluation_state(network), fast_simulation(), quick_walks(), keep_traces(), keep_samples(), one_blas_thread():
        yield


def ranges_of(draft: Draft, network: M.Module, arch: str, weights: str) -> ActivationRanges:
    """The ranges of ``draft``, which was made of ``network``, whose fingerprint ``weights`` is."""
    assert draft.watched is not None
    own = draft.network is not network or draft.rounded
    return ActivationRanges(
        arch=arch,
        observer=draft.method,
        weights=fingerprint(state_of(draft.watched)) if own else weights,
        provenance={},
        ranges=draft.activations,
        weight_ranges=draft.weights,
        bias_corrections={} if own else draft.corrections,
        target=draft.target.name,
    )

"""Quantizes in one call: a float network and images in, an int8 network out."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable

import megengine.module as M
import numpy as np
import numpy.typing as npt
from megengine.module.qat import QATModule
from megengine.quantization.observer import MinMaxObserver

from mgq.deprecation import accept_old_keywords
from mgq.errors import FailureError, InputError
from mgq.ptq.calibrate import find_best_network
from mgq.ptq.exact_scales import set_exact_scales
from mgq.ptq.presets import DEFAULT_PRESET, get_preset
from mgq.ptq.steps import prepare, switch_on
from mgq.quantization.activation_ranges import ActivationRanges, apply_ranges
from mgq.quantization.modes import Mode, mode_of, parse_mode, to_mode
from mgq.quantization.targets import MEGENGINE, get_target
from mgq.zoo.network_state import set_state, state_of


@accept_old_keywords(pictures="images")
def quantize(
    network: M.Module,
    images: npt.NDArray[np.uint8] | Iterable[npt.NDArray[np.uint8]] | None = None,
    ranges: ActivationRanges | None = None,
    mode: Mode | str = Mode.QUANTIZED,
    in_place: bool = False,
) -> M.Module:
    """Convert ``network`` to ``mode`` (``quantized`` is int8, ``qat`` simulates it in float32): a copy by default.

    A float network needs the ranges of its activations: from ``images``, uint8 (N, 3, H, W) in BGR or an iterable of
    such batches, as `mgq calibrate` finds them, or as ``ranges`` measured before. A network in mode ``qat`` has them
    already. The result takes what ``network`` took, pixels minus 128 in float32, and gives float32 logits. Raises
    InputError where ranges are missing, or ``mode`` comes before the network's own.
    """
    mode = mode if isinstance(mode, Mode) else parse_mode(mode)
    if mode_of(network) is Mode.QAT and mode is Mode.QUANTIZED:
        refuse_without_ranges(network)
    if mode_of(network) is not Mode.NORMAL or mode is Mode.NORMAL:
        return to_mode(network, mode, in_place=in_place)
    if ranges is None:
        if images is None:
            raise InputError("a float network needs pictures or ranges to be quantized; pass one of them")
        if isinstance(images, np.ndarray) and images.ndim != 4:
            raise InputError(f"pictures have shape (N, 3, H, W), not {images.shape}; stack them")
        batches = [images] if isinstance(images, np.ndarray) else list(images)
        if not sum(map(len, batches)):
            raise InputError("there are no pictures to measure ranges on; pass at least one")
        found, _ = find_best_network(network, np.concatenate(batches), "", "", get_preset(DEFAULT_PRESET))
        if not in_place:
            return to_mode(found.network, mode, in_place=True)
        # The network itself is wanted: it takes the ranges, weights and biases that were found.
        calibrated = prepare(network, MEGENGINE, in_place=True)
        set_state(calibrated, state_of(found.network))
        switch_on(calibrated)
        return to_mode(calibrated, mode, in_place=True)
    fake_quantized = to_mode(network, Mode.QAT, get_target(ranges.target), in_place)
    apply_ranges(fake_quantized, ranges)
    fake_quantized.eval()
    if ranges.target != MEGENGINE.name:
        with contextlib.suppress(FailureError):  # a network that is not of the zoo, and cannot be followed
            set_exact_scales(fake_quantized)
    return to_mode(fake_quantized, mode, in_place=True)


def refuse_without_ranges(network: M.Module) -> None:
    """Raises InputError where a convolution of a ``qat`` network has never observed what it gives."""
    for name, module in network.named_modules():
        if isinstance(module, QATModule) and module.with_weight and isinstance(module.act_observer, MinMaxObserver):
            low, high = module.act_observer.min_val.numpy(), module.act_observer.max_val.numpy()
            if low > high:
                raise InputError(f"layer '{name}' has no activation range; calibrate or train the network first")

"""Ranges of a network's layers, the quickest way: weights rounded to the nearest."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import megengine.module as M
import numpy as np
import numpy.typing as npt

from mgq.ptq.calibrate import calibrate_network
from mgq.quantization.activation_ranges import ActivationRanges
from mgq.quantization.option_names import MIN_MAX, TO_NEAREST


def measure_ranges(
    network: M.Module,
    batches: Iterable[npt.NDArray[np.uint8]],
    arch: str,
    weights: str,
    provenance: Mapping[str, Any],
    method: str = MIN_MAX,
    correct_bias: bool = True,
) -> ActivationRanges:
    """Those of ``network`` (mode ``normal``) over ``batches``, chosen by ``method``."""
    return calibrate_network(network, batches, arch, weights, provenance, method, correct_bias, TO_NEAREST)[1]

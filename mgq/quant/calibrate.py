"""Calibration: run a float network over pictures and note the range of every activation."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import megengine.module as M
import numpy as np
import numpy.typing as npt
from megengine import Tensor
from megengine.quantization import QConfig
from megengine.quantization.observer import MinMaxObserver
from megengine.quantization.quantize import disable_fake_quant, enable_observer, reset_qconfig

from mgq.quant.modes import Mode, fix_input_scale, to_mode
from mgq.quant.ranges import ActivationRanges, quantized_layers

WATCHING = QConfig(
    weight_observer=partial(MinMaxObserver, dtype="qint8_narrow"),
    act_observer=partial(MinMaxObserver, dtype="qint8"),
    weight_fake_quant=None,
    act_fake_quant=None,
)


def min_max_ranges(
    network: M.Module,
    batches: Iterable[npt.NDArray[np.uint8]],
    arch: str,
    weights: str,
    provenance: Mapping[str, Any],
) -> ActivationRanges:
    """The smallest and largest value behind each layer of ``network`` (mode ``normal``) over ``batches``.

    A batch is uint8 (N, 3, H, W), BGR. Layers that never ran have no range and are left out.
    """
    watched = to_mode(network, Mode.QAT)
    reset_qconfig(watched, WATCHING)
    fix_input_scale(watched)
    watched.eval()
    disable_fake_quant(watched)
    enable_observer(watched)
    for batch in batches:
        watched(Tensor(batch.astype(np.float32) - 128))
    seen = {
        name: (float(layer.act_observer.min_val.numpy()), float(layer.act_observer.max_val.numpy()))
        for name, layer in quantized_layers(watched).items()
    }
    ranges = {name: (low, high) for name, (low, high) in seen.items() if low <= high}
    return ActivationRanges(arch, "min-max", weights, provenance, ranges)

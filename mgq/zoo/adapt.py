"""What the adapters of foreign weights share: renamed states, and input normalization folded into the stem."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

State = dict[str, npt.NDArray[Any]]
"""Parameter name -> array, as a network's ``state_dict`` has it."""


@dataclass(frozen=True)
class Adapted:
    """Foreign weights under our names, and the options of the builder that they were trained with."""

    state: State
    layout: str
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class InputNormalization:
    """What a foreign network was fed: ``(pixel - mean) / std`` of RGB, pixel in 0..255."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]


IMAGENET_RGB = InputNormalization(
    mean=(0.485 * 255, 0.456 * 255, 0.406 * 255), std=(0.229 * 255, 0.224 * 255, 0.225 * 255)
)


def folded_input(state: State, stem: str, expects: InputNormalization) -> State:
    """``state`` changed so that its ``stem`` (a conv + batch norm) takes BGR pixels minus 128.

    With x the pixel minus 128, ``w * (x + 128 - mean) / std`` is a convolution by ``w / std`` plus the constant
    ``sum(w * (128 - mean) / std)`` per output channel, which the batch norm's running mean takes in. Exact but
    for the border: zero padding stood for ``mean`` in the foreign network and stands for 128 in ours.
    A state whose stem is of another shape is returned as it is, for the strict loading to name that.
    """
    weight, mean_name = state[f"{stem}.conv.weight"].astype(np.float64), f"{stem}.bn.running_mean"
    if weight.ndim != 4 or weight.shape[1] != 3 or mean_name not in state or state[mean_name].size != len(weight):
        return state
    mean, std = np.array(expects.mean), np.array(expects.std)
    scaled = weight / std[None, :, None, None]
    constant = (scaled * (128 - mean)[None, :, None, None]).sum(axis=(1, 2, 3))
    return {
        **state,
        f"{stem}.conv.weight": np.ascontiguousarray(scaled[:, ::-1], dtype=np.float32),
        mean_name: (state[mean_name].astype(np.float64) - constant).astype(np.float32),
    }


def without_counters(state: State) -> State:
    """``state`` without PyTorch's batch-norm step counters, which inference does not use."""
    return {name: value for name, value in state.items() if not name.endswith("num_batches_tracked")}


def depthwise_shaped(weight: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """A depthwise weight (C, 1, K, K) in MegEngine's shape for groups, (C, 1, 1, K, K)."""
    return weight[:, :, None]

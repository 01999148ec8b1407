"""Helpers of the adapters of foreign weights: rename states, fold input normalization into the stem."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from mgq.weights.preprocessing import Preprocessing

State = dict[str, npt.NDArray[Any]]
"""Parameter name -> array, as a network's ``state_dict`` has it."""


@dataclass(frozen=True)
class AdaptedState:
    """Foreign weights under our names, and the options of the builder that they were trained with.

    ``preprocessing`` is None where it is the architecture's. ``unclear`` names a property that neither names, shapes
    nor hints determine; such weights are refused, not guessed at.
    """

    state: State
    layout: str
    options: Mapping[str, Any] = field(default_factory=dict)
    preprocessing: Preprocessing | None = None
    unclear: str | None = None


@dataclass(frozen=True)
class InputNormalization:
    """The input normalization of a foreign network: ``(pixel - mean) / std`` of RGB, pixel in 0..255."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]


IMAGENET_RGB = InputNormalization(
    mean=(0.485 * 255, 0.456 * 255, 0.406 * 255), std=(0.229 * 255, 0.224 * 255, 0.225 * 255)
)
HALF_RGB = InputNormalization(mean=(127.5,) * 3, std=(127.5,) * 3)


@dataclass(frozen=True)
class Hints:
    """What is known of foreign weights besides their names and shapes.

    ``model`` is the name of the network they were trained in, as its publisher has it; ``told_by`` names the source of
    that knowledge. The others are None where they are those of the layout.
    """

    model: str = ""
    told_by: str = ""
    normalization: InputNormalization | None = None
    preprocessing: Preprocessing | None = None

    def layout(self, names: str) -> str:
        """The layout in words: whose ``names``, and as which network the weights are read."""
        return f"{names} names, read as {self.model} {self.told_by}" if self.model else f"{names} names"


NO_HINTS = Hints()


def fold_input(state: State, stem: str, expects: InputNormalization) -> State:
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


def shape_depthwise(weight: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """A depthwise weight (C, 1, K, K) in MegEngine's shape for groups, (C, 1, 1, K, K)."""
    return weight[:, :, None]


def with_epsilon(state: State, norm: str, theirs: float, ours: float) -> State:
    """``state`` changed so that its batch norm ``norm`` with ``ours`` as epsilon computes what it did with ``theirs``.

    The variance takes up the difference, as far as it stays at 0 or more, and the weight the rest: exact.
    """
    weight, variance = (state[f"{norm}.{part}"].astype(np.float64) for part in ("weight", "running_var"))
    shifted = np.maximum(variance + theirs - ours, 0)
    scale = np.sqrt((shifted + ours) / (variance + theirs))
    changed = {"weight": weight * scale, "running_var": shifted}
    return {**state, **{f"{norm}.{part}": value.astype(np.float32) for part, value in changed.items()}}


BLOCK = re.compile(r"^blocks\.(\d{1,3})\.(\d{1,3})\.(conv_pw|conv_dw|conv_pwl|bn1|bn2|bn3)\.(\w+)$")


def is_timm_mobile(state: State, kernel: int) -> bool:
    """Whether ``state`` has timm's names for MobileNetV2 and its kin, and ``kernel`` in the third stage."""
    third = state.get("blocks.2.0.conv_dw.weight")
    ends = all(name in state for name in ("conv_stem.weight", "conv_head.weight", "classifier.weight"))
    return ends and third is not None and third.ndim == 4 and third.shape[2] == kernel


def without_timm_names(state: State, outer: Mapping[str, str], block: Callable[[int], str]) -> State:
    """``state`` of one of timm's MobileNetV2-like networks under our names: ``outer`` layers, and ``block`` by number.

    A block is (``conv_pw``, ``conv_dw``, ``conv_pwl``) or, without expansion, (``conv_dw``, ``conv_pw``), each with
    the batch norm of its number. Depthwise weights get MegEngine's shape. Other names stay, for the strict loading.
    """
    matches = {name: match for name in state if (match := BLOCK.match(name))}
    places = sorted({(int(match[1]), int(match[2])) for match in matches.values()})
    ours: State = {}
    for name, value in without_counters(state).items():
        match = matches.get(name)
        if match is None:
            layer, _, parameter = name.rpartition(".")
            ours[f"{outer[layer]}.{parameter}" if layer in outer else name] = value
            continue
        is_expanded = f"blocks.{match[1]}.{match[2]}.conv_pwl.weight" in state
        kinds = ("conv_pw", "conv_dw", "conv_pwl") if is_expanded else ("conv_dw", "conv_pw")
        part = match[3]
        number, kind = (kinds.index(part), "conv") if part in kinds else (int(part[2]) - 1, "bn")
        prefix = block(places.index((int(match[1]), int(match[2]))))
        is_depthwise = part == "conv_dw" and value.ndim == 4
        ours[f"{prefix}.{number}.{kind}.{match[4]}"] = shape_depthwise(value) if is_depthwise else value
    return ours

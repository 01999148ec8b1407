"""Sums of convolutions of one tensor as one convolution: what networks such as RepVGG and RepGhostNet are trained with.

Their exporters may leave the branches apart, where each is a kernel of its own and each sum one more rounding.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from mgq.graph.onnx_import.draft import NetworkDraft, convolution_options, convolution_tensors, merge_groups
from mgq.graph.onnx_import.layer_queries import affine, layers, to_channel_values
from mgq.quantization.targets import WEIGHT_LEVELS

Array = npt.NDArray[Any]
Pair = tuple[int, int]
LEAST_WEIGHT_SNR = 36.0
"""dB of the weights of a joined convolution in int8 from which on branches are joined. Beside much larger ones, such as
the 1 of an identity, small weights have a few levels each."""


@dataclass(frozen=True)
class Branch:
    """A convolution of ``source``: ``weight`` float64 (O, C / groups, H, W), ``bias`` (O,)."""

    source: str
    weight: Array
    bias: Array
    groups: int
    stride: Pair
    padding: Pair
    dilation: Pair


def join_branches(draft: NetworkDraft) -> bool:
    """The sum of two convolutions of one tensor, or of one and a scale of each channel of it, is one convolution."""
    for plan in layers(draft, "add"):
        if len(set(plan.inputs)) != 2 or len({draft.shape(name) for name in (*plan.inputs, plan.name)}) != 1:
            continue
        if not any((own := draft.plan(name)) is not None and own.kind == "conv" for name in plan.inputs):
            continue
        joined = join(*(read_branch(draft, name) for name in plan.inputs))
        if joined is None or weight_snr(joined.weight) < LEAST_WEIGHT_SNR:
            continue
        options = convolution_options(
            joined.weight,
            joined.groups,
            stride=list(joined.stride),
            padding=list(joined.padding),
            dilation=list(joined.dilation),
            activation="relu" if plan.options.get("relu") else "",
        )
        tensors = convolution_tensors(joined.weight, joined.bias, joined.groups)
        draft.take_over(draft.insert_before(plan, "conv", [joined.source], options, tensors), plan)
        return True
    return False


def read_branch(draft: NetworkDraft, name: str) -> Branch:
    """The layer ``name`` as a convolution of what it reads; where it is none, or others read it, too, as that of ones
    of itself."""
    plan, channels = draft.plan(name), draft.shape(name)[1]
    own = identity_of(name, channels)
    if plan is None or not draft.is_read_once(name):
        return own
    if plan.kind == "affine" and draft.shape(plan.inputs[0]) == draft.shape(name):
        scale, shift = (to_channel_values(value, channels, 3) for value in affine(draft, name) or ())
        if scale is None or shift is None:
            return own
        return replace(own, source=plan.inputs[0], weight=scale[:, None, None, None], bias=shift)
    if plan.kind != "conv" or plan.options["activation"]:
        return own
    weight, bias = fold_norm(draft.tensors_of(name), plan.options["eps"])
    stride, padding, dilation = (to_pair(plan.options[key]) for key in ("stride", "padding", "dilation"))
    return Branch(plan.inputs[0], weight, bias, plan.options["groups"], stride, padding, dilation)


def identity_of(name: str, channels: int) -> Branch:
    return Branch(name, np.ones((channels, 1, 1, 1)), np.zeros(channels), channels, (1, 1), (0, 0), (1, 1))


def to_pair(values: Any) -> Pair:
    height, width = values
    return int(height), int(width)


def fold_norm(tensors: dict[str, Array], epsilon: float) -> tuple[Array, Array]:
    """Weights (O, C / groups, H, W) and bias (O,) of a convolution with its batch norm folded in, float64."""
    keys = ("weight", "bias", "running_mean", "running_var")
    scale, shift, mean, variance = (tensors[f"bn.{key}"].astype(np.float64).ravel() for key in keys)
    factor = scale / np.sqrt(variance + epsilon)
    weight = merge_groups(tensors["conv.weight"]).astype(np.float64) * factor[:, None, None, None]
    return weight, shift - mean * factor


def join(one: Branch, other: Branch) -> Branch | None:
    """The convolution that gives the sum of both; None where there is none of the larger one's size."""
    large, small = sorted((one, other), key=lambda branch: -math.prod(branch.weight.shape[2:]))
    if (large.source, large.stride, large.groups) != (small.source, small.stride, small.groups):
        return None
    if small.dilation != large.dilation and small.weight.shape[2:] != (1, 1):
        return None
    rims = np.subtract(large.padding, small.padding)
    (top, below), (left, right) = (divmod(int(rim), gap) for rim, gap in zip(rims, large.dilation, strict=True))
    height, width = small.weight.shape[2:]
    if below or right or top < 0 or left < 0:
        return None
    if top + height > large.weight.shape[2] or left + width > large.weight.shape[3]:
        return None
    weight = large.weight.copy()
    weight[:, :, top : top + height, left : left + width] += small.weight
    return replace(large, weight=weight, bias=large.bias + small.bias)


def weight_snr(weight: Array) -> float:
    """dB of signal to noise of ``weight`` (O, ...) rounded to int8, each output on its own grid: that of the middle
    one of the outputs."""
    rows = weight.reshape(len(weight), -1)
    steps = np.abs(rows).max(axis=1) / WEIGHT_LEVELS
    noise = rows.shape[1] * np.square(steps) / 12
    signal = np.square(rows).sum(axis=1)
    return float(np.median(10 * np.log10((signal + 1e-30) / (noise + 1e-30))))

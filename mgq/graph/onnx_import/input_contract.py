"""What a foreign network was fed, folded into its first layer: then pixels minus 128, in BGR, are its input."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from mgq.graph.onnx_import.draft import (
    NetworkDraft,
    convolution_options,
    convolution_tensors,
    merge_groups,
    split_groups,
)
from mgq.graph.onnx_import.simplify import simplify
from mgq.zoo.blueprint import INPUT, LayerPlan
from mgq.zoo.input_contract import InputContract

Values = npt.NDArray[np.float64]

NEAR = 32.0
"""Levels by which what stands around a picture may be another than in the foreign network."""


def fold_contract(draft: NetworkDraft, contract: InputContract) -> None:
    """Let ``draft`` take BGR pixels minus 128 in place of what ``contract`` makes of them.

    It is exact but around pictures: where the foreign network's zeros stood for a grey within 32 levels of 128, 128
    stands now, else the nearest integer.
    """
    channels, height, width = draft.shape(INPUT)[1:]
    weight, bias = contract.matrix(channels)
    draft.samples[INPUT] = np.zeros((1, 3, height, width), np.float32)
    kernels = weight[:, :, None, None]
    options = convolution_options(kernels, 1)
    readers = draft.readers(INPUT)
    first = draft.insert_before(readers[0], "conv", [INPUT], options, convolution_tensors(kernels, bias, 1))
    for plan in readers:
        draft.replace(plan, plan.with_inputs(first if name == INPUT else name for name in plan.inputs))
    simplify(draft)
    while join_first_convolutions(draft):
        simplify(draft)


def join_first_convolutions(draft: NetworkDraft) -> bool:
    """The convolution of single pixels goes into the one behind it; around the picture stands what 0 was."""
    first = draft.plans[0]
    if first.kind != "conv" or first.inputs != (INPUT,) or first.options["kernel"] != [1, 1]:
        return False
    if first.options["activation"] or first.options["normalized"] or not draft.is_read_once(first.name):
        return False
    (reader,) = draft.readers(first.name)
    pads = None
    if reader.kind == "pad" and draft.is_read_once(reader.name) and "channels" not in reader.options:
        pads, (conv,) = reader, draft.readers(reader.name)
    else:
        conv = reader
    if conv.kind != "conv" or conv.options["groups"] != 1:
        return False
    tensors = draft.tensors_of(first.name)
    own = tensors["bn.weight"].ravel() / np.sqrt(tensors["bn.running_var"].ravel() + first.options["eps"])
    weight = merge_groups(tensors["conv.weight"])[:, :, 0, 0].astype(np.float64) * own[:, None]
    shift = tensors["bn.bias"].ravel() - tensors["bn.running_mean"].ravel() * own
    stand_in_for_zero(draft, conv, pads, first, filling_of(weight, shift, pads))
    merge(draft, draft.find_layer(conv.name), weight, shift)
    draft.skip(draft.find_layer(first.name))
    return True


def filling_of(weight: Values, shift: Values, pads: LayerPlan | None) -> float:
    """The pixel minus 128 that the network's own value around the picture, 0 as a rule, stands for."""
    value = float(pads.options["value"]) if pads is not None else 0.0
    return float(np.clip(np.rint(((value - shift) / weight.sum(axis=1)).mean()), -128, 127))


def stand_in_for_zero(
    draft: NetworkDraft, conv: LayerPlan, pads: LayerPlan | None, first: LayerPlan, filling: float
) -> None:
    """Put ``filling`` around the picture, or 0 where that is near enough."""
    if pads is not None:
        draft.replace(pads, pads.with_options(value=0.0 if abs(filling) <= NEAR else filling))
        return
    top, left = conv.options["padding"]
    if abs(filling) <= NEAR or not (top or left):
        return
    options = {"pads": [top, left, top, left], "value": filling}
    name = draft.insert_before(conv, "pad", [first.name], options)
    draft.replace(conv, conv.with_options(padding=[0, 0]).with_inputs([name]))


def merge(draft: NetworkDraft, conv: LayerPlan, weight: Values, shift: Values) -> None:
    """Let ``conv`` read pixels, of which it read ``weight`` times them plus ``shift`` so far."""
    tensors = draft.tensors_of(conv.name)
    kernels = merge_groups(tensors["conv.weight"]).astype(np.float64)
    constant = np.einsum("ochw,c->o", kernels, shift)
    merged = np.einsum("ochw,ck->okhw", kernels, weight)
    mean = tensors["bn.running_mean"]
    changed: dict[str, Any] = {
        **tensors,
        "conv.weight": split_groups(merged, 1),
        "bn.running_mean": mean - constant.reshape(mean.shape),
    }
    draft.set_tensors(conv.name, changed)
    draft.replace(conv, conv.with_options(inputs=weight.shape[1]))

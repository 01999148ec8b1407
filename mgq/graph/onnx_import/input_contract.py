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
from mgq.zoo.blueprint import INPUT, LayerPlan, border_values
from mgq.zoo.input_contract import InputContract

Values = npt.NDArray[np.float64]


def fold_contract(draft: NetworkDraft, contract: InputContract) -> None:
    """Let ``draft`` take BGR pixels minus 128 in place of what ``contract`` makes of them.

    It is exact but around pictures: what the foreign network's zeros stood for, its mean as a rule, is rounded to whole
    levels there. Where no colour stands for all zeros, as in a network that reads grey, the nearest grey does.
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
    if first.options["activation"] or not draft.is_read_once(first.name):
        return False
    (reader,) = draft.readers(first.name)
    pads = None
    if reader.kind == "pad" and draft.is_read_once(reader.name) and "channels" not in reader.options:
        pads, (conv,) = reader, draft.readers(reader.name)
    else:
        conv = reader
    if conv.kind != "conv" or not (conv.options["groups"] == 1 or is_scale_of_channels(conv)):
        return False
    tensors = draft.tensors_of(first.name)
    own = tensors["bn.weight"].ravel() / np.sqrt(tensors["bn.running_var"].ravel() + first.options["eps"])
    weight = merge_groups(tensors["conv.weight"])[:, :, 0, 0].astype(np.float64) * own[:, None]
    shift = tensors["bn.bias"].ravel() - tensors["bn.running_mean"].ravel() * own
    stand_in_for_zero(draft, conv, pads, first, fillings_of(weight, shift, pads))
    merge(draft, draft.find_layer(conv.name), weight, shift)
    draft.skip(draft.find_layer(first.name))
    return True


def is_scale_of_channels(conv: LayerPlan) -> bool:
    """Whether ``conv`` multiplies each channel by a number of its own."""
    options = conv.options
    return bool(options["kernel"] == [1, 1] and options["groups"] == options["inputs"] == options["outputs"])


def fillings_of(weight: Values, shift: Values, pads: LayerPlan | None) -> list[float]:
    """Pixel minus 128, of each channel, for which the network's own values around the picture, 0 as a rule, stand."""
    wanted = (np.array(border_values(pads.options)) if pads is not None else 0.0) - shift
    if weight.shape == (3, 3) and np.linalg.matrix_rank(weight) == 3:
        colour = np.linalg.solve(weight, wanted)
    else:
        colour = np.full(3, (wanted / weight.sum(axis=1)).mean())
    return [float(value) for value in np.clip(np.rint(colour), -128, 127)]


def stand_in_for_zero(
    draft: NetworkDraft, conv: LayerPlan, pads: LayerPlan | None, first: LayerPlan, fillings: list[float]
) -> None:
    """Put ``fillings`` around the picture; nothing has to be done where they are 0."""
    value = fillings[0] if len(set(fillings)) == 1 else fillings
    top, left = conv.options["padding"]
    if pads is not None:
        around = list(pads.options["pads"])
        if not any(border_values(pads.options)):  # what the convolution adds is more of the same
            around = [sum(sides) for sides in zip(around, (top, left, top, left), strict=True)]
            draft.replace(conv, conv.with_options(padding=[0, 0]))
        draft.replace(pads, pads.with_options(value=value, pads=around))
        return
    if not any(fillings) or not (top or left):
        return
    options = {"pads": [top, left, top, left], "value": value}
    name = draft.insert_before(conv, "pad", [first.name], options)
    draft.replace(conv, conv.with_options(padding=[0, 0]).with_inputs([name]))


def merge(draft: NetworkDraft, conv: LayerPlan, weight: Values, shift: Values) -> None:
    """Let ``conv`` read pixels, of which it read ``weight`` times them plus ``shift`` so far."""
    tensors = draft.tensors_of(conv.name)
    kernels = merge_groups(tensors["conv.weight"]).astype(np.float64)
    if conv.options["groups"] > 1:
        kernels = np.diag(kernels.ravel())[:, :, None, None]
    constant = np.einsum("ochw,c->o", kernels, shift)
    merged = np.einsum("ochw,ck->okhw", kernels, weight)
    mean = tensors["bn.running_mean"]
    changed: dict[str, Any] = {
        **tensors,
        "conv.weight": split_groups(merged, 1),
        "bn.running_mean": mean - constant.reshape(mean.shape),
    }
    draft.set_tensors(conv.name, changed)
    draft.replace(conv, conv.with_options(inputs=weight.shape[1], groups=1))

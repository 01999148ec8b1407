"""What a foreign network was fed, folded into its first layer: then pixels minus 128, in BGR, are its input."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mgq.errors import InputError, no_such
from mgq.graph.onnx_import.draft import NetworkDraft, convolution_options, convolution_tensors, grouped, ungrouped
from mgq.graph.onnx_import.simplify import simplify
from mgq.weights.foreign_states import HALF_RGB, IMAGENET_RGB
from mgq.zoo.blueprint import INPUT, LayerPlan

Values = npt.NDArray[np.float64]

GREY_OF_BGR = (0.114, 0.587, 0.299)
"""ITU-R BT.601, as Pillow and OpenCV do it."""
NEAR = 32.0
"""Levels by which what stands around a picture may be another than in the foreign network."""


@dataclass(frozen=True)
class InputContract:
    """``(pixel - mean) / std`` of each channel in the order ``rgb`` or ``bgr``, pixels from 0 to 255."""

    name: str
    order: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def said(self) -> str:
        """The contract in words."""
        means, stds = (", ".join(f"{value:.4g}" for value in values) for values in (self.mean, self.std))
        return f"{self.name} ({self.order.upper()}, mean {means}, std {stds})"

    def matrix(self, channels: int) -> tuple[Values, Values]:
        """Of BGR pixels minus 128 the network's ``channels``: (channels, 3) to multiply by, (channels,) to add."""
        mean, std = np.array(self.mean), np.array(self.std)
        if channels == 1:
            row = np.array([GREY_OF_BGR]) / std.mean()
            return row, (128 - mean.mean(keepdims=True)) / std.mean()
        places = np.eye(3)[::-1] if self.order == "rgb" else np.eye(3)
        return places / std[:, None], (128 - mean) / std


CONTRACTS = {
    "torch": InputContract("torch", "rgb", IMAGENET_RGB.mean, IMAGENET_RGB.std),
    "tf": InputContract("tf", "rgb", HALF_RGB.mean, HALF_RGB.std),
    "caffe": InputContract("caffe", "bgr", (103.939, 116.779, 123.68), (1.0, 1.0, 1.0)),
    "raw": InputContract("raw", "rgb", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
}
"""As Keras names them: ImageNet's mean and deviation; -1 to 1; BGR minus the mean; pixels as they are."""


def contract_called(
    name: str | None, mean: tuple[float, ...] | None, std: tuple[float, ...] | None, order: str | None
) -> InputContract:
    """The contract ``name`` (``torch`` by default), changed by what else is given.

    ``mean`` and ``std`` have one number or three, in the order of the channels; where none is above 1 they are parts
    of 255. Raises InputError for an unknown name, and numbers that cannot be.
    """
    if name is not None and name not in CONTRACTS:
        raise no_such("preprocessing", name, CONTRACTS)
    base = CONTRACTS[name or "torch"]
    means = base.mean if mean is None else in_pixels(mean, "--mean")
    stds = base.std if std is None else in_pixels(std, "--std")
    if min(stds) <= 0:
        raise InputError("--std has to be above 0")
    is_own = mean is not None or std is not None or order is not None
    return InputContract("your own" if is_own else base.name, order or base.order, means, stds)


def in_pixels(values: tuple[float, ...], option: str) -> tuple[float, float, float]:
    if len(values) not in (1, 3) or not all(np.isfinite(values)) or max(map(abs, values)) > 1e4:
        raise InputError(f"{option} takes one number, or three with commas, such as 0.485,0.456,0.406")
    scale = 255.0 if max(values) <= 1 and any(values) else 1.0
    whole = [float(value) * scale for value in values] * (3 // len(values))
    return whole[0], whole[1], whole[2]


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
        draft.replace(plan, plan.reading(first if name == INPUT else name for name in plan.inputs))
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
    weight = ungrouped(tensors["conv.weight"])[:, :, 0, 0].astype(np.float64) * own[:, None]
    shift = tensors["bn.bias"].ravel() - tensors["bn.running_mean"].ravel() * own
    stand_in_for_zero(draft, conv, pads, first, filling_of(weight, shift, pads))
    merge(draft, draft.known(conv.name), weight, shift)
    draft.skip(draft.known(first.name))
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
        draft.replace(pads, pads.having(value=0.0 if abs(filling) <= NEAR else filling))
        return
    top, left = conv.options["padding"]
    if abs(filling) <= NEAR or not (top or left):
        return
    options = {"pads": [top, left, top, left], "value": filling}
    name = draft.insert_before(conv, "pad", [first.name], options)
    draft.replace(conv, conv.having(padding=[0, 0]).reading([name]))


def merge(draft: NetworkDraft, conv: LayerPlan, weight: Values, shift: Values) -> None:
    """Let ``conv`` read pixels, of which it read ``weight`` times them plus ``shift`` so far."""
    tensors = draft.tensors_of(conv.name)
    kernels = ungrouped(tensors["conv.weight"]).astype(np.float64)
    constant = np.einsum("ochw,c->o", kernels, shift)
    merged = np.einsum("ochw,ck->okhw", kernels, weight)
    mean = tensors["bn.running_mean"]
    changed: dict[str, Any] = {
        **tensors,
        "conv.weight": grouped(merged, 1),
        "bn.running_mean": mean - constant.reshape(mean.shape),
    }
    draft.set_tensors(conv.name, changed)
    draft.replace(conv, conv.having(inputs=weight.shape[1]))

"""Describes the input of foreign networks: order of channels, mean and standard deviation."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mgq.errors import InputError, no_such
from mgq.weights.foreign_states import HALF_RGB, IMAGENET_RGB
from mgq.weights.preprocessing import GREY_OF_BGR

RAW = "raw"
"""The contract of files that take pixels as they are."""

Values = npt.NDArray[np.float64]


@dataclass(frozen=True)
class InputContract:
    """``(pixel - mean) / std`` of each channel in the order ``rgb`` or ``bgr``, pixels from 0 to 255."""

    name: str
    order: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def describe(self, channels: int = 3) -> str:
        """The contract in words, for a network of so many ``channels``."""
        if channels == 1:
            return f"{self.name} (grey, mean {np.mean(self.mean):.4g}, std {np.mean(self.std):.4g})"
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
    RAW: InputContract(RAW, "rgb", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
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
    means = base.mean if mean is None else to_pixels(mean, "--mean")
    stds = base.std if std is None else to_pixels(std, "--std")
    if min(stds) <= 0:
        raise InputError("--std has to be above 0")
    is_own = mean is not None or std is not None or order is not None
    return InputContract("your own" if is_own else base.name, order or base.order, means, stds)


def to_pixels(values: tuple[float, ...], option: str) -> tuple[float, float, float]:
    if len(values) not in (1, 3) or not all(np.isfinite(values)) or max(map(abs, values)) > 1e4:
        raise InputError(f"{option} takes one number, or three with commas, such as 0.485,0.456,0.406")
    scale = 255.0 if max(values) <= 1 and any(values) else 1.0
    whole = [float(value) * scale for value in values] * (3 // len(values))
    return whole[0], whole[1], whole[2]

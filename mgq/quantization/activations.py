"""Activations as values: a name and two bounds, in one table that all readers share."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Activation:
    """The activation of a convolution or a sum, which clips values to ``low`` and ``high``."""

    name: str
    low: float
    high: float

    @property
    def clips(self) -> bool:
        """Whether large values are cut off."""
        return math.isfinite(self.high)


IDENTITY = Activation("", -math.inf, math.inf)
RELU = Activation("relu", 0.0, math.inf)
RELU6 = Activation("relu6", 0.0, 6.0)
ACTIVATIONS = {activation.name: activation for activation in (IDENTITY, RELU, RELU6)}

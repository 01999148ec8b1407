"""Grids for tensors whose low values do not matter, because of what reads them.

A hard swish makes 0 of all that is not above -3. A grid that is as wide below 0 as above spends half of its levels
there, and has to clip or to round coarsely above. These grids begin at a ``floor`` instead. So do grids behind
activations, at the lowest value that these give. In the state of a network they are the span from there to the largest
value: the number of steps below 0 follows from it.
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import numpy.typing as npt
from megengine.core.tensor.dtype import QuantDtypeMeta

PREFIX = "quint8_from_"
LEVELS = 255
"""Steps from the lowest to the highest value."""
MOST_BELOW = 127
"""Steps below 0: no more than a grid that is as wide below it as above."""
NEARLY = 1e-4
"""Part of a step by which float32 may miss an integer."""


@cache
def floored_dtype(floor: float) -> QuantDtypeMeta:
    """uint8 from ``floor``, at most 0. MegEngine's observers see a grid of 255 steps on each side."""
    return QuantDtypeMeta(f"{PREFIX}{floor!r}", "", "int8", -LEVELS, LEVELS)


def floor_of(dtype: QuantDtypeMeta) -> float | None:
    """Where the grids of ``dtype`` begin; None for those that are the same on both sides of 0, or have one alone."""
    return float(dtype.name[len(PREFIX) :]) if dtype.name.startswith(PREFIX) else None


def steps_below(floor: float, scale: float) -> int:
    """The steps below 0 of a grid of ``scale`` that begins at ``floor``."""
    return min(math.ceil(-floor / scale - NEARLY), MOST_BELOW)


def span_up_to(limit: npt.NDArray[np.float64] | float, floor: float) -> npt.NDArray[np.float64]:
    """From ``floor`` to ``limit``, above 0; a limit that is nearer to 0 than the floor ends the grid on both sides."""
    found: npt.NDArray[np.float64] = limit + np.minimum(-floor, limit)
    return found


def limit_of(low: float, high: float, floor: float) -> float:
    """How far from 0 a grid has to reach for values from ``low`` to ``high``, of which those below ``floor`` do not
    matter."""
    return max(high, min(-low, -floor))

"""Refuses weights with NaN or infinities."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from mgq.errors import printable

_LARGEST = float(np.finfo(np.float32).max)
VARIANCE = "running_var"
_MEND = "take an earlier checkpoint, or train again at a lower learning rate"


def unsound(tensors: Mapping[str, npt.NDArray[Any]]) -> str | None:
    """Name a tensor that cannot be a weight or a statistic, and why: the rest of a sentence. None if all can be. Zeros,
    tiny numbers and variances of 0 are valid.
    """
    for name, value in tensors.items():
        why = fault_of(value, is_variance=name.endswith(VARIANCE))
        if why:
            return f"has {why} in {printable(name)[:80]}: {_MEND}"
    return None


def fault_of(value: npt.NDArray[Any], is_variance: bool) -> str:
    """What is wrong with the numbers of ``value``, in words; '' if nothing is."""
    if value.dtype.kind != "f" or not value.size:
        return ""
    # Both are NaN where any value is.
    least, most = float(value.min()), float(value.max())
    if np.isnan(least):
        return "a value that is no number (NaN)"
    if np.isinf(least) or np.isinf(most):
        return "an infinite value"
    if max(-least, most) > _LARGEST:
        return f"a value beyond float32 ({max(-least, most):.2g})"
    if is_variance and least < 0:
        return f"a negative variance ({least:.3g})"
    return ""

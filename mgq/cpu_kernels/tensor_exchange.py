"""Arrays that pass between numpy and MegEngine on a CPU."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import megengine as mge
import numpy as np
import numpy.typing as npt
from megengine import Tensor

Array = npt.NDArray[np.float32]
Shape = tuple[int, ...]


def empty(shape: Shape) -> Array:
    return np.empty(shape, np.float32)


def tensors(arrays: Iterable[Array | None], device: Any) -> list[Tensor | None]:
    return [None if array is None else Tensor(array, device=device, no_cache=True) for array in arrays]


def values(*tensors: Tensor) -> list[Array]:
    """The values of CPU ``tensors``, read where they lie when they are contiguous. They must not be written to.

    MegEngine computes in a thread of its own, and DLPack does not wait for it: so this does.
    """
    mge._full_sync()
    return read(*tensors)


def read(*tensors: Tensor) -> list[Array]:
    """The same of tensors that nothing computes any more: parameters, once :func:`values` was called after a step."""
    return [np.ascontiguousarray(np.from_dlpack(tensor)) for tensor in tensors]

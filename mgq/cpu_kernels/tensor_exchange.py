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


# Of which tensors the memory may still be written to: given a new value since MegEngine was last waited for.
_fresh: set[int] = set()


def values(*tensors: Tensor) -> list[Array]:
    """The values of CPU ``tensors``, read where they lie when they are contiguous. They must not be written to.

    MegEngine computes in a thread of its own, and DLPack does not wait for it: so this does.
    """
    mge._full_sync()
    _fresh.clear()
    return read(*tensors)


def read(*tensors: Tensor) -> list[Array]:
    """The same of tensors that nothing computes any more: parameters, once :func:`values` was called after a step."""
    return [np.ascontiguousarray(np.from_dlpack(tensor)) for tensor in tensors]


def read_state(*tensors: Tensor) -> list[Array]:
    """The same of a layer's state: statistics and ranges. It waits only where :func:`write_state` was called since."""
    return read(*tensors) if _fresh.isdisjoint(map(id, tensors)) else values(*tensors)


def write_state(tensor: Tensor, array: Array) -> None:
    """Give ``tensor``, of a layer's state, a new value of the same size."""
    tensor._reset(Tensor(array.reshape(tensor._tuple_shape), device=tensor.device, no_cache=True))
    _fresh.add(id(tensor))

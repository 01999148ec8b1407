"""Arrays that pass between numpy and MegEngine on a CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterable
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


# Where a tensor of a layer's state keeps what it holds, and since when that is watched.
_STATE = "_mgq_state"
_watch = [0]


def values(*tensors: Tensor) -> list[Array]:
    """The values of CPU ``tensors``, read where they lie when they are contiguous. They must not be written to.

    MegEngine computes in a thread of its own, and DLPack does not wait for it: so this does.
    """
    mge._full_sync()
    return read(*tensors)


def read(*tensors: Tensor) -> list[Array]:
    """The same of tensors that nothing computes any more: parameters, once :func:`values` was called after a step."""
    return [np.ascontiguousarray(np.from_dlpack(tensor)) for tensor in tensors]


def read_state(*tensors: Tensor) -> list[Array]:
    """The same of a layer's state: statistics and ranges. What was read or written before is still at hand.

    Only within ``fast_gradients``, where :func:`forget_state` sees who else gives a tensor a new value.
    """
    found = [array for tensor in tensors if (array := _known_state(tensor)) is not None]
    if len(found) < len(tensors):
        found = values(*tensors)
        for tensor, array in zip(tensors, found, strict=True):
            _remember(tensor, array)
    return found


def write_state(tensor: Tensor, array: Array) -> None:
    """Give ``tensor``, of a layer's state, a new value of the same size."""
    shaped = array.reshape(tensor._tuple_shape)
    tensor._reset(Tensor(shaped, device=tensor.device, no_cache=True))
    _remember(tensor, shaped)


def _remember(tensor: Tensor, array: Array) -> None:
    setattr(tensor, _STATE, (_watch[0], array.copy()))


def _known_state(tensor: Tensor) -> Array | None:
    watch, array = getattr(tensor, _STATE, (-1, None))
    return array if watch == _watch[0] else None


def forget_state(stock: Callable[..., None]) -> Callable[..., None]:
    """``Tensor._reset``, which gives a tensor a new value, whoever calls it. What was known before counts no more."""
    _watch[0] += 1

    def _reset(self: Tensor, other: Any) -> None:
        self.__dict__.pop(_STATE, None)
        stock(self, other)

    return _reset

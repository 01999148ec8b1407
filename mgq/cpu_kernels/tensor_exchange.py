"""Arrays that pass between numpy and MegEngine on a CPU."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import megengine as mge
import numpy as np
import numpy.typing as npt
from megengine import Tensor
from megengine.core._imperative_rt.core2 import apply
from megengine.core.ops.builtin import ParamPackSplit, RemoveAxis

Array = npt.NDArray[np.float32]
Shape = tuple[int, ...]


def empty(shape: Shape) -> Array:
    return np.empty(shape, np.float32)


def tensors(arrays: Iterable[Array | None], device: Any) -> list[Tensor | None]:
    return [None if array is None else Tensor(array, device=device, no_cache=True) for array in arrays]


# Where a tensor of a layer's state keeps what it holds, and since when that is watched.
_STATE = "_mgq_state"
_watch = [0]
_UNKNOWN = -1, np.zeros(0, np.float32)
# Tensors of layers' state that have not been given their new values yet, by id; None where they get them at once.
_gathered: dict[int, Tensor] | None = None


def values(*tensors: Tensor) -> list[Array]:
    """The values of CPU ``tensors``, read where they lie when they are contiguous. They must not be written to.

    MegEngine computes in a thread of its own, and DLPack does not wait for it: so this does.
    """
    mge._full_sync()
    return read(*tensors)


def own_values(tensor: Tensor) -> Array:
    """The values of a CPU ``tensor``, float32, where they lie, to be written to.

    For what an operator with memory of its own has just given, that nobody else holds.
    """
    mge._full_sync()
    found = np.from_dlpack(tensor)
    assert found.flags.c_contiguous, "written to a copy, it would be lost"
    return np.ctypeslib.as_array((ctypes.c_float * found.size).from_address(found.ctypes.data)).reshape(found.shape)


def read(*tensors: Tensor) -> list[Array]:
    """The same of tensors that nothing computes any more: parameters, once :func:`values` was called after a step."""
    return [np.ascontiguousarray(np.from_dlpack(tensor)) for tensor in tensors]


def read_state(*tensors: Tensor) -> list[Array]:
    """The same of a layer's state: statistics and ranges. What was read or written before is still at hand.

    Only within ``fast_gradients``, where :func:`forget_state` sees who else gives a tensor a new value.
    """
    watch, known = _watch[0], []
    for tensor in tensors:
        since, array = tensor.__dict__.get(_STATE, _UNKNOWN)
        if since != watch:
            break
        known.append(array)
    else:
        return known
    found = values(*tensors)
    for tensor, array in zip(tensors, found, strict=True):
        _remember(tensor, array)
    return found


def write_state(tensor: Tensor, array: Array) -> None:
    """Give ``tensor``, of a layer's state, a new value of the same size."""
    shaped = array.reshape(tensor._tuple_shape)
    if _gathered is None:
        tensor._reset(Tensor(shaped, device=tensor.device, no_cache=True))
    else:
        _gathered[id(tensor)] = tensor
    _remember(tensor, shaped)


@contextlib.contextmanager
def gathering_state() -> Iterator[None]:
    """Within it nobody but :func:`read_state` reads a layer's state: what is written goes to MegEngine at its end.

    All at once, which takes a quarter of the time of one by one.
    """
    global _gathered
    if _gathered is not None:
        yield
        return
    _gathered = {}
    try:
        yield
    finally:
        tensors, _gathered = list(_gathered.values()), None
        known = [(tensor, tensor.__dict__.get(_STATE, _UNKNOWN)) for tensor in tensors]
        _write_all([(tensor, array) for tensor, (since, array) in known if since == _watch[0]])


def _write_all(state: list[tuple[Tensor, Array]]) -> None:
    if not state:
        return
    arrays = [array for _, array in state]
    split, place = ParamPackSplit(), 0
    offsets: list[int] = []
    for array in arrays:
        offsets += [place, place := place + array.size]
    split.offsets, split.shapes = offsets, [array.shape or (1,) for array in arrays]
    packed = np.concatenate([array.reshape(-1) for array in arrays])
    parts = apply(split, Tensor(packed, device=state[0][0].device, no_cache=True))
    for (tensor, array), part in zip(state, parts, strict=True):
        give(tensor, part if array.shape else apply(RemoveAxis(axis=[0]), part)[0])


def give(tensor: Tensor, value: Tensor) -> None:
    """Let ``tensor`` have the value of another: ``_reset`` unseen by :func:`forget_state`."""
    super(Tensor, tensor)._reset(value)


def _remember(tensor: Tensor, array: Array) -> None:
    tensor.__dict__[_STATE] = _watch[0], array.copy()


def forget_state(stock: Callable[..., None]) -> Callable[..., None]:
    """``Tensor._reset``, which gives a tensor a new value, whoever calls it. What was known before counts no more."""
    _watch[0] += 1

    def _reset(self: Tensor, other: Any) -> None:
        self.__dict__.pop(_STATE, None)
        stock(self, other)

    return _reset

"""The names that a pickle of weights may use, each with what it makes here. Any other is refused, and never looked up.

Those that make nothing are only passed to others.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from mgq.weights.inert_objects import InertObject
from mgq.weights.pickled_values import Dtype, LongText, MegTensor, Name, NumpyArray, PickledTensor, put_key
from mgq.weights.torch_files import (
    STORAGE_CODES,
    Allowance,
    UnreadableError,
    check_shape,
    damaged_error,
    torch_tensor,
)


class Budget(Protocol):
    """What may be spent on one file."""

    @property
    def allowance(self) -> Allowance:
        """Of memory."""
        ...

    def spend(self, steps: int) -> None:
        """Counts work. Raises UnreadableError when it is more than any honest file needs."""
        ...


Maker = Callable[[Budget, tuple[Any, ...]], object]


def _ordered_dict(budget: Budget, args: tuple[Any, ...]) -> object:
    (pairs,) = args or ([],)
    made: dict[object, object] = {}
    if type(pairs) is not list:
        raise damaged_error()
    budget.spend(len(pairs))
    for pair in pairs:
        if type(pair) not in (list, tuple) or len(pair) != 2:
            raise damaged_error()
        put_key(made, *pair)
    return made


def _size(budget: Budget, args: tuple[Any, ...]) -> object:
    (sizes,) = args
    return check_shape(sizes)


def _empty_bytes(budget: Budget, args: tuple[Any, ...]) -> object:
    if args:
        raise damaged_error()
    return memoryview(b"")


def _latin1_bytes(budget: Budget, args: tuple[Any, ...]) -> object:
    text, encoding = args
    if encoding != "latin1" or type(text) not in (str, LongText):
        raise damaged_error()
    budget.allowance.take(len(text) if type(text) is str else len(text.raw))
    if type(text) is str:
        return memoryview(text.encode("latin1"))
    # A letter beyond latin1 makes Python take four bytes for every letter.
    if np.frombuffer(text.raw, np.uint8).max() > 0xC3:
        raise damaged_error()
    return memoryview(str(text.raw, "utf-8").encode("latin1"))


def _dtype(budget: Budget, args: tuple[Any, ...]) -> object:
    code = args[0]
    if code == BFLOAT_NAME:
        return Dtype("bf16")
    if type(code) is not str:
        raise damaged_error()
    return Dtype(code)


def _new_array(budget: Budget, args: tuple[Any, ...]) -> object:
    kind, _, _ = args
    if kind != Name("numpy", "ndarray"):
        raise damaged_error()
    return NumpyArray()


def _array_from_buffer(budget: Budget, args: tuple[Any, ...]) -> object:
    raw, dtype, shape, order = args
    array = NumpyArray()
    array.set(shape, dtype, order == "F", raw)
    return array


def _numpy_scalar(budget: Budget, args: tuple[Any, ...]) -> object:
    dtype, raw = args
    array = NumpyArray()
    array.set((), dtype, False, raw)
    return array


def _torch_tensor(budget: Budget, args: tuple[Any, ...]) -> object:
    part, offset, size, stride, *_ = args  # then: needs a gradient, hooks, metadata
    return torch_tensor(part, offset, size, stride)


def _torch_typed(budget: Budget, args: tuple[Any, ...]) -> object:
    make, _, inner, _ = args  # a function and its arguments, between them the class, behind them attributes
    if type(make) is not Name or make not in REBUILDERS or type(inner) is not tuple:
        raise damaged_error()
    return CALLS[make](budget, inner)


def _torch_parameter(budget: Budget, args: tuple[Any, ...]) -> object:
    tensor, *_ = args  # then: needs a gradient, hooks, attributes
    if not isinstance(tensor, PickledTensor):
        raise damaged_error()
    return tensor


def _meg_tensor(budget: Budget, args: tuple[Any, ...]) -> object:
    contents = args[0] if args else None  # then: dtype, device
    if args and not isinstance(contents, NumpyArray):
        raise damaged_error()
    return MegTensor(contents)


BFLOAT_NAME = Name("megengine.core._imperative_rt", "pybfloat16")
CALLS: dict[Name, Maker] = {
    Name("collections", "OrderedDict"): _ordered_dict,
    Name("torch", "Size"): _size,
    Name("torch._utils", "_rebuild_tensor"): _torch_tensor,
    Name("torch._utils", "_rebuild_tensor_v2"): _torch_tensor,
    Name("torch._utils", "_rebuild_parameter"): _torch_parameter,
    Name("torch._utils", "_rebuild_parameter_with_state"): _torch_parameter,
    Name("torch._tensor", "_rebuild_from_type_v2"): _torch_typed,
    Name("numpy", "dtype"): _dtype,
    Name("_codecs", "encode"): _latin1_bytes,
    Name("__builtin__", "bytes"): _empty_bytes,
    **{Name(f"numpy.{core}.multiarray", "_reconstruct"): _new_array for core in ("core", "_core")},
    **{Name(f"numpy.{core}.multiarray", "scalar"): _numpy_scalar for core in ("core", "_core")},
    **{Name(f"numpy.{core}.numeric", "_frombuffer"): _array_from_buffer for core in ("core", "_core")},
}
CLASSES: dict[Name, Maker] = {
    Name("megengine.tensor", "Tensor"): _meg_tensor,
    Name("megengine.tensor", "Parameter"): _meg_tensor,
}
STORAGES = {Name("torch", name): code for name, code in STORAGE_CODES.items()}
REBUILDERS = {Name("torch._utils", "_rebuild_tensor"), Name("torch._utils", "_rebuild_tensor_v2")}
TENSOR_CLASSES = {Name("torch", "Tensor"), *(Name("torch.nn.parameter", name) for name in ("Parameter", "Buffer"))}
KNOWN = {Name("numpy", "ndarray"), BFLOAT_NAME, *CALLS, *CLASSES, *STORAGES, *TENSOR_CLASSES}


def wants_code(name: object, model: str | None = None) -> UnreadableError:
    asks = f"would run code: it asks for {str(name)[:120]!r}; "
    if model is not None:
        return UnreadableError(f"holds a whole pickled model, or layers of one, and {asks}{model}")
    return UnreadableError(
        f"{asks}only tensors and plain containers are read. "
        "Get the weights as .safetensors or from a source you trust, or save the state dict alone"
    )


def result_of(name: Name, args: tuple[Any, ...]) -> InertObject:
    """What one of ``OF_INERT`` makes of an inert value: that value. Raises UnreadableError where it is none."""
    if not args or type(args[0]) is not InertObject:
        raise wants_code(name)
    return args[0]

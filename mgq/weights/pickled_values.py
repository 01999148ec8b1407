"""What the unpickler makes of a foreign file: names that stay names, long texts, arrays, tensors and keys of mappings.

Nothing here is Python's own object of that kind: what a file says of it is checked when it is used.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from mgq.weights.inert_objects import InertObject
from mgq.weights.torch_files import (
    CODES,
    Allowance,
    Array,
    TorchTensor,
    UnreadableError,
    check_shape,
    copy_elements,
    damaged_error,
    element_view,
    packed_strides,
    stored_dtype,
)

LARGEST_KEY = 2**31


@dataclass(frozen=True)
class Name:
    """A name that a pickle asked for. It stays a name: nothing of Python's is looked up."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(frozen=True)
class LongText:
    """A text too long to be a name, as UTF-8. Protocol 2 writes arrays so."""

    raw: memoryview


@dataclass
class Dtype:
    """A numpy dtype of plain numbers, still without its byte order when it is made."""

    code: str
    order: str = "<"
    metadata: dict[str, Any] | None = None

    def set_state(self, state: object) -> None:
        """Takes numpy's (version, byte order, None, None, None, size, alignment, flags[, metadata])."""
        if type(state) is not tuple or len(state) not in (8, 9):
            raise damaged_error()
        if self.code not in CODES:
            return
        order, subdtype, names, fields = state[1:5]
        if subdtype is not None or names is not None or fields is not None:
            raise damaged_error()
        if type(order) is not str or order not in ("<", ">", "|", "="):
            raise damaged_error()
        self.order = ">" if order == ">" else "<"
        self.metadata = quantization_of(state[8]) if len(state) == 9 else None


@dataclass
class NumpyArray:
    """A numpy array, empty until its state is set."""

    dtype: Dtype | None = None
    shape: tuple[int, ...] = (0,)
    strides: tuple[int, ...] = (1,)
    raw: memoryview = field(default_factory=lambda: memoryview(b""))

    def set_state(self, state: object) -> None:
        """Takes numpy's (version, shape, dtype, is Fortran order, bytes). Raises UnreadableError."""
        if type(state) is not tuple or len(state) != 5:
            raise damaged_error()
        _, shape, dtype, fortran, raw = state
        self.set(shape, dtype, fortran is True, raw)

    def set(self, shape: object, dtype: object, fortran: bool, raw: object) -> None:
        """Takes the contents. Raises UnreadableError unless ``raw`` has as many bytes as the shape needs."""
        shape = check_shape(shape)
        if type(dtype) is Dtype and dtype.code not in CODES:
            self.dtype = dtype  # nothing of it is looked at, unless somebody wants it as weights
            return
        if type(dtype) is not Dtype or type(raw) is not memoryview:
            raise damaged_error()
        if len(raw) != math.prod(shape) * stored_dtype(dtype.code, dtype.order).itemsize:
            raise UnreadableError("announces an array of another size than it holds: get it again")
        self.dtype = Dtype(dtype.code, dtype.order, dtype.metadata)
        self.shape, self.raw = shape, raw
        self.strides = packed_strides(shape[::-1])[::-1] if fortran else packed_strides(shape)

    def array(self, allowance: Allowance) -> Array:
        """The contents as a new array. Raises UnreadableError where they are no plain numbers."""
        if self.dtype is None:
            raise damaged_error()
        if self.dtype.code not in CODES:
            code = self.dtype.code[:20]
            raise UnreadableError(f"has an array of dtype {code!r}, not of plain numbers: save it as float32")
        view = element_view(self.raw, self.dtype.code, self.dtype.order, self.shape, 0, self.strides)
        return copy_elements(view, self.dtype.code, allowance, self.dtype.metadata)


@dataclass
class MegTensor:
    """A MegEngine tensor or parameter: the numpy array it was saved from."""

    contents: NumpyArray | None

    def set_state(self, state: object) -> None:
        """Takes the attributes. Old files keep the array among them, under "data"."""
        if type(state) is not dict:
            raise damaged_error()
        contents = state.get("data")
        if isinstance(contents, NumpyArray):
            self.contents = contents

    def array(self, allowance: Allowance) -> Array:
        """The contents as a new array."""
        if self.contents is None:
            raise damaged_error()
        return self.contents.array(allowance)


PickledTensor: TypeAlias = NumpyArray | MegTensor | TorchTensor
KINDS: dict[type, str] = {
    type(None): "None",
    bool: "a number",
    int: "a number",
    float: "a number",
    str: "a text",
    LongText: "a text",
    list: "a list",
    tuple: "a tuple",
    dict: "a mapping",
    NumpyArray: "a tensor",
    MegTensor: "a tensor",
    TorchTensor: "a tensor",
}


def kind_of(value: object) -> str:
    """What a value is, in words."""
    if isinstance(value, InertObject):
        return f"a value of {value.name[:80]}"
    return KINDS.get(type(value), "an object")


def quantization_of(metadata: object) -> dict[str, Any] | None:
    """The part of a dtype's metadata that is MegEngine's: name, scale, zero point. Raises UnreadableError."""
    found = metadata.get("mgb_dtype") if type(metadata) is dict else None
    if found is None:
        return None
    if type(found) is not dict or not {"name", "scale"} <= set(found) <= {"name", "scale", "zero_point"}:
        raise damaged_error()
    name, scale, zero_point = found["name"], found["scale"], found.get("zero_point", 0)
    if type(name) is not str or type(scale) is not float or type(zero_point) is not int:
        raise damaged_error()
    if not (math.isfinite(scale) and scale > 0 and abs(zero_point) < 2**31):
        raise damaged_error()
    return {"mgb_dtype": dict(found)}


@dataclass(eq=False)
class OddKey:
    """A key that no weights have. It is equal to itself alone: the file has no say in its hash."""

    value: object


ODD_KEYS = (int, bool, float, type(None), InertObject, Dtype, TorchTensor)


def put_key(mapping: dict[object, object], key: object, value: object) -> None:
    # Other keys have hashes or comparisons that a file could make slow, or endless.
    if type(key) is str or (type(key) is int and abs(key) < LARGEST_KEY):
        mapping[key] = value
    elif type(key) in ODD_KEYS or (type(key) is tuple and all(type(part) in (str, *ODD_KEYS) for part in key)):
        mapping[OddKey(key)] = value
    else:
        raise damaged_error()

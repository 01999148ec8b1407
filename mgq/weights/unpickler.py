"""Reads weights from foreign files (MegEngine, PyTorch, safetensors) without running anything in them.

A pickle is a program for a small stack machine. The one of the standard library is unsafe for files of unknown origin,
even when it looks up no dangerous name: an index in the file makes it reserve gigabytes, a deep tuple used as a key
overflows its stack, and a state can be written into the functions that guard it. So this module has a stack machine of
its own, with only the instructions that weights need. A name in the file stays a name (:class:`_Name`, which cannot be
called), and each name that may be "called" stands for one function of this module that makes an array or a container.
What programs leave beside the weights (settings, paths, dates: :mod:`mgq.weights.inert_objects`) becomes one inert
value, whatever its arguments. Any other name is refused. Steps and memory are limited.

Format: the opcodes of Python's ``pickletools`` for protocols 2 to 5; ``megengine.save``; ``torch.save``.
"""

from __future__ import annotations

import math
import stat
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import safetensors

from mgq.errors import InputError, no_such_path, printable
from mgq.io.limited_io import LONGEST_JSON, identify_stand_in, object_in
from mgq.weights.checkpoint import KEY as CHECKPOINT_KEY
from mgq.weights.finite_values import unsound
from mgq.weights.foreign_formats import SAVED_MODEL, TENSORFLOW, identify_file, identify_model, identify_name
from mgq.weights.inert_objects import OF_INERT, InertObject, is_inert, is_mapping
from mgq.weights.state_selection import as_mapping, choose_state
from mgq.weights.torch_files import (
    CODES,
    LEGACY_MAGIC,
    LEGACY_PROTOCOL,
    STORAGE_CODES,
    Allowance,
    Archive,
    Array,
    DamagedError,
    LegacyStorages,
    Storages,
    TorchTensor,
    UnreadableError,
    check_shape,
    copy_elements,
    damaged_error,
    element_view,
    stored_dtype,
    torch_tensor,
)

_LARGEST_FILE = 2**30  # mobilenet_v2 at its greatest width has 212 MiB, and an average and momentum beside it
_MOST_MEMORY = 2**29  # of all arrays together
_MOST_STEPS = 500_000  # PyTorch needs about 40 for a tensor
_LONGEST_TEXT = 4096  # beyond it a text stays bytes
_LONGEST_NAME = 256
_LONGEST_PICKLE = 2**22  # without the data, as PyTorch writes it
_LARGEST_KEY = 2**31
LONGEST_HEADER = LONGEST_JSON
"""Bytes in the header of a .safetensors file."""
_SAFETENSORS_CODES = {
    "BOOL": "b1",
    "U8": "u1",
    "I8": "i1",
    "U16": "u2",
    "I16": "i2",
    "U32": "u4",
    "I32": "i4",
    "U64": "u8",
    "I64": "i8",
    "F16": "f2",
    "BF16": "bf16",
    "F32": "f4",
    "F64": "f8",
}


@dataclass(frozen=True)
class StateFile:
    """What a weights file holds.

    ``tensors`` maps flat names to new C-contiguous arrays in the machine's byte order. bf16 has become
    float32; numbers are arrays of no axes. The dtype of an array quantized by MegEngine carries its scale as
    ``dtype.metadata["mgb_dtype"]``, the form that MegEngine itself uses. ``step`` is the training step where
    the file tells it. ``format`` is "megengine pickle", "torch zip", "torch legacy" or "safetensors".
    ``metadata`` is the free text in the header of a ``.safetensors`` file, empty for the others. ``taken`` says in
    words which of several networks this is, or where it lay if that is unusual; '' otherwise. ``arch`` is the
    architecture as the file calls it, where it does.
    """

    tensors: dict[str, Array]
    step: int | None
    format: str
    metadata: dict[str, str]
    taken: str = ""
    arch: str | None = None


def read_state(path: Path, key: str | None = None) -> StateFile:
    """The weights in a file of MegEngine, PyTorch or safetensors, recognised by its content.

    Reads a state dict, alone or inside of other containers. Of several it takes the one under the dotted ``key``;
    without a key the one that the file's program prefers. Runs nothing that the file asks for, and takes at most a
    few times the file's size in memory.

    Raises InputError, one line, when the file is missing, cannot be read, is damaged, wants code to be run,
    holds something else than named tensors and numbers, or numbers that cannot be weights; where it has no such
    ``key``, or several networks of which none is preferred.
    """
    data = _content(path)
    try:
        found = _state(data, key)
        fault = unsound(found.tensors)
        if fault:
            raise UnreadableError(fault)
        return found
    except UnreadableError as error:
        why = identify_name(path.name) or error if isinstance(error, DamagedError) else error
        raise InputError(f"{printable(path)} {why}") from error


def _content(path: Path) -> bytes:
    """The bytes of the file ``path``. Raises InputError when it is no file, too large or not readable."""
    try:
        status = path.stat()
        if stat.S_ISDIR(status.st_mode) and (path / SAVED_MODEL).exists():
            raise InputError(f"{printable(path)} {TENSORFLOW}")
        if stat.S_ISDIR(status.st_mode):
            raise InputError(f"{printable(path)} is a folder: give a weights file")
        if not stat.S_ISREG(status.st_mode):
            raise InputError(f"{printable(path)} is a device, not a file: give a weights file")
        if status.st_size > _LARGEST_FILE:
            raise InputError(f"{printable(path)} is larger than {_LARGEST_FILE >> 20} MiB: give the weights alone")
        with path.open("rb") as file:
            data = file.read(status.st_size)
    except FileNotFoundError as error:
        raise no_such_path(path, "give the path of a weights file") from error
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise InputError(f"{printable(path)} cannot be read: {why}: check its path and permissions") from error
    if stand_in := identify_stand_in(data):
        raise InputError(f"{printable(path)} {stand_in}")
    return data


def _state(data: bytes, key: str | None) -> StateFile:
    allowance = Allowance(min(2 * len(data) + 2**26, _MOST_MEMORY))
    if _looks_like_safetensors(data):
        return _safetensors_state(data, key, allowance)
    if data.startswith(b"PK"):
        archive = Archive(data)
        machine = _Machine(archive.pickle(), allowance)
        return _pick_state(machine.load(archive), key, "torch zip", allowance)
    if data[257:262] == b"ustar":
        raise UnreadableError(
            "is a tar archive, PyTorch's oldest format, which is not read: load it in PyTorch and save it again"
        )
    what = identify_file(data)
    if what:
        raise UnreadableError(what)
    machine = _Machine(memoryview(data), allowance)
    root = machine.load()
    if type(root) is int and root == LEGACY_MAGIC:
        return _pick_state(_legacy_root(machine, memoryview(data)), key, "torch legacy", allowance)
    return _pick_state(root, key, "megengine pickle", allowance)


def _legacy_root(machine: _Machine, data: memoryview) -> object:
    """The object in PyTorch's older format: a version, the machine, the object, a list of keys, the data."""
    if machine.load() != LEGACY_PROTOCOL:
        raise damaged_error()
    machine.load()
    storages = LegacyStorages()
    root = machine.load(storages)
    keys = machine.load()
    storages.fill_all(data[machine.position :], keys)
    return root


def _looks_like_safetensors(data: bytes) -> bool:
    # A 64-bit header length, then JSON. Where that begins like a pickle it is told by the zeros of a length.
    return data[8:9] == b"{" and (data[4:8] == b"\0\0\0\0" or data[:1] != b"\x80")


def _safetensors_state(data: bytes, key: str | None, allowance: Allowance) -> StateFile:
    header = _safetensors_header(data)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise damaged_error()
    for name, entry in header.items():
        dtype = entry.get("dtype") if isinstance(entry, dict) else None
        if not isinstance(dtype, str):
            raise damaged_error()
        if dtype not in _SAFETENSORS_CODES:
            raise UnreadableError(f"has {name[:80]!r} in the dtype {dtype[:20]!r}: save it as float32")
    try:
        entries = safetensors.deserialize(data)  # type: ignore[no-untyped-call]
    except safetensors.SafetensorError as error:
        why = printable(error)[:120]
        raise UnreadableError(f"has a header that does not fit its data ({why}): get it again") from error
    if key is not None and CHECKPOINT_KEY in metadata:
        raise UnreadableError("is mgq's own checkpoint, which has one network: leave out --key")
    found = dict(entries)
    choice = choose_state({name: name for name in found}, key, lambda _: True)
    tensors = {}
    for name, whole_name in choice.state.items():
        entry = found[whole_name]
        code, shape = _SAFETENSORS_CODES[entry["dtype"]], check_shape(tuple(entry["shape"]))
        view = element_view(memoryview(entry["data"]), code, "<", shape, 0, _packed_strides(shape))
        tensors[name] = copy_elements(view, code, allowance)
    if not tensors:
        raise _no_tensors()
    return StateFile(tensors, None, "safetensors", metadata, choice.said)


def _safetensors_header(data: bytes) -> dict[str, Any]:
    """The header of a ``.safetensors`` file. Raises UnreadableError when it is not as long as announced."""
    length = int.from_bytes(data[:8], "little")
    if length > min(len(data) - 8, LONGEST_HEADER):
        raise UnreadableError(f"announces a header of {length} bytes, which it has not: get it again")
    try:
        return object_in(data[8 : 8 + length])
    except ValueError as error:
        raise damaged_error() from error


def _pick_state(root: object, key: str | None, format: str, allowance: Allowance) -> StateFile:
    """The state dict in what a pickle held, as arrays. Raises UnreadableError unless there is one."""
    whole = as_mapping(root, _is_tensor)
    if not isinstance(whole, dict):
        raise UnreadableError(f"holds {_kind(root)}, not a state dict: save the state dict of a network")
    choice = choose_state(whole, key, _is_tensor)
    if not any(map(_is_tensor, choice.state.values())):
        raise _no_tensors()
    tensors = {_text_key(name): _leaf(name, value, allowance) for name, value in choice.state.items()}
    step, arch = whole.get("step") if choice.key else None, whole.get("arch")
    step = step if type(step) is int and step >= 0 else None
    return StateFile(tensors, step, format, {}, choice.said, arch if type(arch) is str else None)


def _is_tensor(value: object) -> bool:
    return isinstance(value, _Tensor)


def _no_tensors() -> UnreadableError:
    return UnreadableError("holds no named tensors: save the state dict of a network")


def _text_key(name: object) -> str:
    if type(name) is not str:
        name = name.value if isinstance(name, _OddKey) else name
        raise UnreadableError(f"names a tensor by {_kind(name)}: save a state dict, whose names are texts")
    return name


def _leaf(name: str, value: object, allowance: Allowance) -> Array:
    if isinstance(value, _Tensor):
        return value.array(allowance)
    if type(value) is bool:
        return np.array(value, np.bool_)
    if type(value) is int and -(2**63) <= value < 2**63:
        return np.array(value, np.int64)
    if type(value) is float:
        return np.array(value, np.float64)
    raise UnreadableError(
        f"holds {_kind(value)} under {name[:80]!r}, not a tensor or a number: save the state dict alone"
    )


def _kind(value: object) -> str:
    """What a value is, in words."""
    if isinstance(value, InertObject):
        return f"a value of {value.name[:80]}"
    return _KINDS.get(type(value), "an object")


# What the machine makes.


@dataclass(frozen=True)
class _Name:
    """A name that a pickle asked for. It stays a name: nothing of Python's is looked up."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(frozen=True)
class _LongText:
    """A text too long to be a name, as UTF-8. Protocol 2 writes arrays so."""

    raw: memoryview


@dataclass
class _Dtype:
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
        self.metadata = _quantization(state[8]) if len(state) == 9 else None


@dataclass
class _NumpyArray:
    """A numpy array, empty until its state is set."""

    dtype: _Dtype | None = None
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
        if type(dtype) is _Dtype and dtype.code not in CODES:
            self.dtype = dtype  # nothing of it is looked at, unless somebody wants it as weights
            return
        if type(dtype) is not _Dtype or type(raw) is not memoryview:
            raise damaged_error()
        if len(raw) != math.prod(shape) * stored_dtype(dtype.code, dtype.order).itemsize:
            raise UnreadableError("announces an array of another size than it holds: get it again")
        self.dtype = _Dtype(dtype.code, dtype.order, dtype.metadata)
        self.shape, self.raw = shape, raw
        self.strides = _packed_strides(shape[::-1])[::-1] if fortran else _packed_strides(shape)

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
class _MegTensor:
    """A MegEngine tensor or parameter: the numpy array it was saved from."""

    contents: _NumpyArray | None

    def set_state(self, state: object) -> None:
        """Takes the attributes. Old files keep the array among them, under "data"."""
        if type(state) is not dict:
            raise damaged_error()
        contents = state.get("data")
        if isinstance(contents, _NumpyArray):
            self.contents = contents

    def array(self, allowance: Allowance) -> Array:
        """The contents as a new array."""
        if self.contents is None:
            raise damaged_error()
        return self.contents.array(allowance)


_Tensor: TypeAlias = _NumpyArray | _MegTensor | TorchTensor
_KINDS: dict[type, str] = {
    type(None): "None",
    bool: "a number",
    int: "a number",
    float: "a number",
    str: "a text",
    _LongText: "a text",
    list: "a list",
    tuple: "a tuple",
    dict: "a mapping",
    _NumpyArray: "a tensor",
    _MegTensor: "a tensor",
    TorchTensor: "a tensor",
}


def _packed_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The strides, in elements, of an array of ``shape`` in C order."""
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def _quantization(metadata: object) -> dict[str, Any] | None:
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


# The names a file may use, each with what it makes here. Those that make nothing are only passed to others.

_Make = Callable[["_Machine", tuple[Any, ...]], object]


def _ordered_dict(machine: _Machine, args: tuple[Any, ...]) -> object:
    (pairs,) = args or ([],)
    made: dict[object, object] = {}
    if type(pairs) is not list:
        raise damaged_error()
    machine.spend(len(pairs))
    for pair in pairs:
        if type(pair) not in (list, tuple) or len(pair) != 2:
            raise damaged_error()
        _put(made, *pair)
    return made


def _size(machine: _Machine, args: tuple[Any, ...]) -> object:
    (sizes,) = args
    return check_shape(sizes)


def _empty_bytes(machine: _Machine, args: tuple[Any, ...]) -> object:
    if args:
        raise damaged_error()
    return memoryview(b"")


def _latin1_bytes(machine: _Machine, args: tuple[Any, ...]) -> object:
    text, encoding = args
    if encoding != "latin1" or type(text) not in (str, _LongText):
        raise damaged_error()
    machine.allowance.take(len(text) if type(text) is str else len(text.raw))
    if type(text) is str:
        return memoryview(text.encode("latin1"))
    # A letter beyond latin1 makes Python take four bytes for every letter.
    if np.frombuffer(text.raw, np.uint8).max() > 0xC3:
        raise damaged_error()
    return memoryview(str(text.raw, "utf-8").encode("latin1"))


def _dtype(machine: _Machine, args: tuple[Any, ...]) -> object:
    code = args[0]
    if code == _BFLOAT_NAME:
        return _Dtype("bf16")
    if type(code) is not str:
        raise damaged_error()
    return _Dtype(code)


def _new_array(machine: _Machine, args: tuple[Any, ...]) -> object:
    kind, _, _ = args
    if kind != _Name("numpy", "ndarray"):
        raise damaged_error()
    return _NumpyArray()


def _array_from_buffer(machine: _Machine, args: tuple[Any, ...]) -> object:
    raw, dtype, shape, order = args
    array = _NumpyArray()
    array.set(shape, dtype, order == "F", raw)
    return array


def _numpy_scalar(machine: _Machine, args: tuple[Any, ...]) -> object:
    dtype, raw = args
    array = _NumpyArray()
    array.set((), dtype, False, raw)
    return array


def _torch_tensor(machine: _Machine, args: tuple[Any, ...]) -> object:
    part, offset, size, stride, *_ = args  # then: needs a gradient, hooks, metadata
    return torch_tensor(part, offset, size, stride)


def _torch_typed(machine: _Machine, args: tuple[Any, ...]) -> object:
    make, _, inner, _ = args  # a function and its arguments, between them the class, behind them attributes
    if type(make) is not _Name or make not in _REBUILDERS or type(inner) is not tuple:
        raise damaged_error()
    return _CALLS[make](machine, inner)


def _torch_parameter(machine: _Machine, args: tuple[Any, ...]) -> object:
    tensor, *_ = args  # then: needs a gradient, hooks, attributes
    if not isinstance(tensor, _Tensor):
        raise damaged_error()
    return tensor


def _meg_tensor(machine: _Machine, args: tuple[Any, ...]) -> object:
    contents = args[0] if args else None  # then: dtype, device
    if args and not isinstance(contents, _NumpyArray):
        raise damaged_error()
    return _MegTensor(contents)


_BFLOAT_NAME = _Name("megengine.core._imperative_rt", "pybfloat16")
_CALLS: dict[_Name, _Make] = {
    _Name("collections", "OrderedDict"): _ordered_dict,
    _Name("torch", "Size"): _size,
    _Name("torch._utils", "_rebuild_tensor"): _torch_tensor,
    _Name("torch._utils", "_rebuild_tensor_v2"): _torch_tensor,
    _Name("torch._utils", "_rebuild_parameter"): _torch_parameter,
    _Name("torch._utils", "_rebuild_parameter_with_state"): _torch_parameter,
    _Name("torch._tensor", "_rebuild_from_type_v2"): _torch_typed,
    _Name("numpy", "dtype"): _dtype,
    _Name("_codecs", "encode"): _latin1_bytes,
    _Name("__builtin__", "bytes"): _empty_bytes,
    **{_Name(f"numpy.{core}.multiarray", "_reconstruct"): _new_array for core in ("core", "_core")},
    **{_Name(f"numpy.{core}.multiarray", "scalar"): _numpy_scalar for core in ("core", "_core")},
    **{_Name(f"numpy.{core}.numeric", "_frombuffer"): _array_from_buffer for core in ("core", "_core")},
}
_CLASSES: dict[_Name, _Make] = {
    _Name("megengine.tensor", "Tensor"): _meg_tensor,
    _Name("megengine.tensor", "Parameter"): _meg_tensor,
}
_STORAGES = {_Name("torch", name): code for name, code in STORAGE_CODES.items()}
_REBUILDERS = {_Name("torch._utils", "_rebuild_tensor"), _Name("torch._utils", "_rebuild_tensor_v2")}
_TENSOR_CLASSES = {_Name("torch", "Tensor"), *(_Name("torch.nn.parameter", name) for name in ("Parameter", "Buffer"))}
_KNOWN = {_Name("numpy", "ndarray"), _BFLOAT_NAME, *_CALLS, *_CLASSES, *_STORAGES, *_TENSOR_CLASSES}


def _wants_code(name: object, model: str | None = None) -> UnreadableError:
    asks = f"would run code: it asks for {str(name)[:120]!r}; "
    if model is not None:
        return UnreadableError(f"holds a whole pickled model, or layers of one, and {asks}{model}")
    return UnreadableError(
        f"{asks}only tensors and plain containers are read. "
        "Get the weights as .safetensors or from a source you trust, or save the state dict alone"
    )


@dataclass(eq=False)
class _OddKey:
    """A key that no weights have. It is equal to itself alone: the file has no say in its hash."""

    value: object


_ODD_KEYS = (int, bool, float, type(None), InertObject, _Dtype, TorchTensor)


def _put(mapping: dict[object, object], key: object, value: object) -> None:
    # Other keys have hashes or comparisons that a file could make slow, or endless.
    if type(key) is str or (type(key) is int and abs(key) < _LARGEST_KEY):
        mapping[key] = value
    elif type(key) in _ODD_KEYS or (type(key) is tuple and all(type(part) in (str, *_ODD_KEYS) for part in key)):
        mapping[_OddKey(key)] = value
    else:
        raise damaged_error()


def _result_of(name: _Name, args: tuple[Any, ...]) -> InertObject:
    """What one of ``OF_INERT`` makes of an inert value: that value. Raises UnreadableError where it is none."""
    if not args or type(args[0]) is not InertObject:
        raise _wants_code(name)
    return args[0]


class _Machine:
    """Reads the pickles in ``data`` one after the other, from ``position`` on.

    Values are None, bool, int, float, str, memoryview (for bytes), list, tuple, dict and the classes above.
    """

    def __init__(self, data: memoryview, allowance: Allowance) -> None:
        self.position = 0
        self.allowance = allowance
        self._data = data
        self._steps = _MOST_STEPS
        self._storages: Storages | None = None
        self._stack: list[Any] = []
        self._below: list[list[Any]] = []  # the stacks set aside by each MARK
        self._memo: dict[int, object] = {}

    def load(self, storages: Storages | None = None) -> object:
        """The value of the next pickle, which may refer to ``storages``. Raises UnreadableError."""
        self._storages, self._stack, self._below, self._memo = storages, [], [], {}
        try:
            while (code := self.number(_U1)) != _STOP:
                self.spend(1)
                _STEPS[code](self)
            (value,) = self._stack
        except (IndexError, KeyError, ValueError) as error:
            raise damaged_error() from error
        return value

    def spend(self, steps: int) -> None:
        """Counts work. Raises UnreadableError when it is more than any honest file needs."""
        self._steps -= steps
        if self._steps < 0:
            raise UnreadableError("takes more steps than any weights file: get it from a source you trust")

    def take(self, size: int) -> memoryview:
        """The next ``size`` bytes."""
        if not 0 <= size <= len(self._data) - self.position:
            raise damaged_error()
        self.position += size
        return self._data[self.position - size : self.position]

    def number(self, kind: struct.Struct) -> Any:
        """The next number."""
        (value,) = kind.unpack(self.take(kind.size))
        return value

    def line(self) -> str:
        """The text up to the end of the line."""
        ahead = bytes(self._data[self.position : self.position + _LONGEST_NAME])
        text = ahead[: ahead.index(b"\n")]
        self.position += len(text) + 1
        return str(text, "utf-8")

    def text(self, size: int) -> str | _LongText:
        """The next ``size`` bytes as a text."""
        raw = self.take(size)
        if size > _LONGEST_TEXT:
            return _LongText(raw)
        self.spend(size // 32)
        return str(raw, "utf-8")

    def integer(self, size: int) -> int:
        """The next ``size`` bytes as a whole number."""
        return int.from_bytes(self.take(size), "little", signed=True)

    def push(self, value: object) -> None:
        """Puts a value on the stack."""
        self._stack.append(value)

    def pop(self) -> Any:
        """Takes the topmost value."""
        return self._stack.pop()

    def peek(self) -> Any:
        """The topmost value, which stays."""
        return self._stack[-1]

    def pop_many(self, count: int) -> tuple[Any, ...]:
        """Takes the topmost ``count`` values, the topmost last."""
        if len(self._stack) < count:
            raise damaged_error()
        values = tuple(self._stack[-count:])
        del self._stack[-count:]
        return values

    def mark(self) -> None:
        """Begins a new stack on top of the present one."""
        self._below.append(self._stack)
        self._stack = []

    def pop_mark(self) -> list[Any]:
        """Takes all values since the last mark."""
        values, self._stack = self._stack, self._below.pop()
        return values

    def remember(self, index: int) -> None:
        """Notes the topmost value under ``index``."""
        self._memo[index] = self._stack[-1]

    def memoize(self) -> None:
        """Notes the topmost value under the next index."""
        self.remember(len(self._memo))

    def recall(self, index: int) -> None:
        """Pushes what was noted under ``index``."""
        self.push(self._memo[index])

    def extend(self, values: list[Any]) -> None:
        """Adds to the topmost list."""
        if type(self.peek()) is InertObject:
            return
        if type(self.peek()) is not list:
            raise damaged_error()
        self.peek().extend(values)

    def update(self, values: list[Any]) -> None:
        """Adds keys and values, in turn, to the topmost mapping."""
        if type(self.peek()) is InertObject:
            return
        if type(self.peek()) is not dict:
            raise damaged_error()
        for key, value in zip(values[::2], values[1::2], strict=True):
            _put(self.peek(), key, value)

    def name(self, module: object, name: object) -> None:
        """Pushes a name, if weights need it or it is read past. Raises UnreadableError otherwise."""
        if type(module) is not str or type(name) is not str:
            raise damaged_error()
        asked = _Name(module, name)
        if asked in _KNOWN or is_mapping(module, name) or str(asked) in OF_INERT:
            self.push(asked)
        elif is_inert(module, name):
            self.push(InertObject(str(asked)))
        else:
            raise _wants_code(asked, identify_model(bytes(self._data[:_LONGEST_PICKLE])))

    def make(self, makers: dict[_Name, _Make]) -> None:
        """Pushes what the name and the arguments on the stack make. Raises UnreadableError."""
        name, args = self.pop_many(2)
        if type(args) is not tuple:
            raise damaged_error()
        if type(name) is InertObject:
            self.push(name)
        elif type(name) is not _Name:
            raise damaged_error()
        elif str(name) in OF_INERT:
            self.push(_result_of(name, args))
        elif is_mapping(name.module, name.name):
            self.push({})
        else:
            self.push(makers[name](self, args))

    def make_with_words(self) -> None:
        """As :meth:`make` of an inert class, whose arguments have names, too."""
        self.pop_many(1)
        if type(self._stack[-2]) is not InertObject:
            raise damaged_error()
        self.make({})

    def drop_mark(self) -> None:
        """Adds all values since the last mark to a set, which is nothing that weights need."""
        self.pop_mark()
        if self.peek() is not _SET:
            raise damaged_error()

    def freeze_mark(self) -> None:
        """Makes a set of all values since the last mark."""
        self.pop_mark()
        self.push(_SET)

    def build(self) -> None:
        """Gives the topmost object its state. A mapping drops it: there PyTorch keeps versions of layers."""
        state, target = self.pop(), self.peek()
        if type(target) is InertObject:
            return
        if isinstance(target, _Dtype | _NumpyArray | _MegTensor):
            target.set_state(state)
        elif type(target) is not dict or type(state) is not dict:
            raise damaged_error()

    def persistent(self) -> None:
        """Pushes the storage that PyTorch's ("storage", type, key, device, length[, view]) refers to."""
        if self._storages is None:
            raise UnreadableError("refers to data outside of itself, which is not read: save a state dict")
        reference = self.pop()
        if type(reference) is not tuple:
            raise damaged_error()
        kind, storage, key, _, length, *view = reference
        if kind != "storage" or type(storage) is not _Name or type(key) is not str or type(length) is not int:
            raise damaged_error()
        self.push(self._storages.part(_STORAGES[storage], key, length, view[0] if view else None))


_U1, _U2, _U4, _U8 = struct.Struct("<B"), struct.Struct("<H"), struct.Struct("<I"), struct.Struct("<Q")
_I4, _F8 = struct.Struct("<i"), struct.Struct(">d")
_STOP = ord(".")
_SET = InertObject("a set")


def _refuse_extension(machine: _Machine) -> None:
    raise _wants_code("an extension of copyreg")


def _refuse_instance(machine: _Machine) -> None:
    machine.name(machine.line(), machine.line())
    raise _wants_code(machine.pop())


_STEPS: dict[int, Callable[[_Machine], object]] = {
    0x80: lambda m: m.take(1),  # PROTO
    0x95: lambda m: m.take(8),  # FRAME
    # constants and numbers
    ord("N"): lambda m: m.push(None),
    0x88: lambda m: m.push(True),
    0x89: lambda m: m.push(False),
    ord("K"): lambda m: m.push(m.number(_U1)),
    ord("M"): lambda m: m.push(m.number(_U2)),
    ord("J"): lambda m: m.push(m.number(_I4)),
    0x8A: lambda m: m.push(m.integer(m.number(_U1))),
    ord("G"): lambda m: m.push(m.number(_F8)),
    # text, by Python 2 too, and bytes
    0x8C: lambda m: m.push(m.text(m.number(_U1))),
    ord("X"): lambda m: m.push(m.text(m.number(_U4))),
    0x8D: lambda m: m.push(m.text(m.number(_U8))),
    ord("U"): lambda m: m.push(m.text(m.number(_U1))),
    ord("T"): lambda m: m.push(m.text(m.number(_I4))),
    ord("C"): lambda m: m.push(m.take(m.number(_U1))),
    ord("B"): lambda m: m.push(m.take(m.number(_U4))),
    0x8E: lambda m: m.push(m.take(m.number(_U8))),
    0x96: lambda m: m.push(m.take(m.number(_U8))),
    # containers
    ord("]"): lambda m: m.push([]),
    ord("}"): lambda m: m.push({}),
    ord(")"): lambda m: m.push(()),
    0x85: lambda m: m.push(m.pop_many(1)),
    0x86: lambda m: m.push(m.pop_many(2)),
    0x87: lambda m: m.push(m.pop_many(3)),
    ord("t"): lambda m: m.push(tuple(m.pop_mark())),
    ord("a"): lambda m: m.extend([m.pop()]),
    ord("e"): lambda m: m.extend(m.pop_mark()),
    ord("s"): lambda m: m.update(list(m.pop_many(2))),
    ord("u"): lambda m: m.update(m.pop_mark()),
    0x8F: lambda m: m.push(_SET),
    0x90: lambda m: m.drop_mark(),
    0x91: lambda m: m.freeze_mark(),
    # the stack and the memo
    ord("("): lambda m: m.mark(),
    ord("0"): lambda m: m.pop(),
    ord("1"): lambda m: m.pop_mark(),
    ord("2"): lambda m: m.push(m.peek()),
    ord("q"): lambda m: m.remember(m.number(_U1)),
    ord("r"): lambda m: m.remember(m.number(_U4)),
    0x94: lambda m: m.memoize(),
    ord("h"): lambda m: m.recall(m.number(_U1)),
    ord("j"): lambda m: m.recall(m.number(_U4)),
    # names, and what they make
    ord("c"): lambda m: m.name(m.line(), m.line()),
    0x93: lambda m: m.name(*m.pop_many(2)),
    ord("R"): lambda m: m.make(_CALLS),
    0x81: lambda m: m.make(_CLASSES),
    0x92: lambda m: m.make_with_words(),
    ord("b"): lambda m: m.build(),
    ord("Q"): lambda m: m.persistent(),
    ord("i"): _refuse_instance,
    0x82: _refuse_extension,
    0x83: _refuse_extension,
    0x84: _refuse_extension,
}

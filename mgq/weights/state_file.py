"""Reads weights from foreign files (MegEngine, PyTorch, safetensors) without running anything in them.

Format: ``megengine.save``; ``torch.save``, old and new; ``.safetensors``. See :mod:`mgq.weights.unpickler` for what is
done about pickles.
"""

from __future__ import annotations

import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors

from mgq.errors import InputError, no_such_path, printable
from mgq.io.limited_io import LONGEST_JSON, identify_stand_in, object_in
from mgq.weights.checkpoint import KEY as CHECKPOINT_KEY
from mgq.weights.finite_values import unsound
from mgq.weights.foreign_formats import SAVED_MODEL, TENSORFLOW, identify_file, identify_name
from mgq.weights.pickled_values import OddKey, PickledTensor, kind_of
from mgq.weights.state_selection import as_mapping, choose_state
from mgq.weights.torch_files import (
    LEGACY_MAGIC,
    LEGACY_PROTOCOL,
    Allowance,
    Archive,
    Array,
    DamagedError,
    LegacyStorages,
    UnreadableError,
    check_shape,
    copy_elements,
    damaged_error,
    element_view,
    packed_strides,
)
from mgq.weights.unpickler import Unpickler

_LARGEST_FILE = 2**30  # mobilenet_v2 at its greatest width has 212 MiB, and an average and momentum beside it
_MOST_MEMORY = 2**29  # of all arrays together
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
        unpickler = Unpickler(archive.pickle(), allowance)
        return _pick_state(unpickler.load(archive), key, "torch zip", allowance)
    if data[257:262] == b"ustar":
        raise UnreadableError(
            "is a tar archive, PyTorch's oldest format, which is not read: load it in PyTorch and save it again"
        )
    what = identify_file(data)
    if what:
        raise UnreadableError(what)
    unpickler = Unpickler(memoryview(data), allowance)
    root = unpickler.load()
    if type(root) is int and root == LEGACY_MAGIC:
        return _pick_state(_legacy_root(unpickler, memoryview(data)), key, "torch legacy", allowance)
    return _pick_state(root, key, "megengine pickle", allowance)


def _legacy_root(unpickler: Unpickler, data: memoryview) -> object:
    """The object in PyTorch's older format: a version, the writer's machine, the object, a list of keys, the data."""
    if unpickler.load() != LEGACY_PROTOCOL:
        raise damaged_error()
    unpickler.load()
    storages = LegacyStorages()
    root = unpickler.load(storages)
    keys = unpickler.load()
    storages.fill_all(data[unpickler.position :], keys)
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
        view = element_view(memoryview(entry["data"]), code, "<", shape, 0, packed_strides(shape))
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
        raise UnreadableError(f"holds {kind_of(root)}, not a state dict: save the state dict of a network")
    choice = choose_state(whole, key, _is_tensor)
    if not any(map(_is_tensor, choice.state.values())):
        raise _no_tensors()
    tensors = {_text_key(name): _leaf(name, value, allowance) for name, value in choice.state.items()}
    step, arch = whole.get("step") if choice.key else None, whole.get("arch")
    step = step if type(step) is int and step >= 0 else None
    return StateFile(tensors, step, format, {}, choice.said, arch if type(arch) is str else None)


def _is_tensor(value: object) -> bool:
    return isinstance(value, PickledTensor)


def _no_tensors() -> UnreadableError:
    return UnreadableError("holds no named tensors: save the state dict of a network")


def _text_key(name: object) -> str:
    if type(name) is not str:
        name = name.value if isinstance(name, OddKey) else name
        raise UnreadableError(f"names a tensor by {kind_of(name)}: save a state dict, whose names are texts")
    return name


def _leaf(name: str, value: object, allowance: Allowance) -> Array:
    if isinstance(value, PickledTensor):
        return value.array(allowance)
    if type(value) is bool:
        return np.array(value, np.bool_)
    if type(value) is int and -(2**63) <= value < 2**63:
        return np.array(value, np.int64)
    if type(value) is float:
        return np.array(value, np.float64)
    raise UnreadableError(
        f"holds {kind_of(value)} under {name[:80]!r}, not a tensor or a number: save the state dict alone"
    )

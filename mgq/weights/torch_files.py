"""Turns bytes into arrays: dtypes, and PyTorch's storages, strided tensors, zip archives and older stream.

Nothing here reads a pickle or knows a Python object that a file could ask for: see :mod:`mgq.weights.unpickler`.
Whatever a file claims (sizes, strides, offsets, compression) is checked against the bytes that are there.

Layouts: ``torch/serialization.py`` and ``torch/_utils.py`` of PyTorch 2 (both formats), APPNOTE.TXT of zip.
"""

from __future__ import annotations

import io
import math
import struct
import zipfile
import zlib
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from mgq.weights.foreign_formats import identify_archive

Array = npt.NDArray[Any]

# bf16 is no numpy dtype: it is read as 16-bit integers and widened.
_BFLOAT = "bf16"
CODES = frozenset(
    {"b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8", _BFLOAT},
)
STORAGE_CODES = {
    "FloatStorage": "f4",
    "DoubleStorage": "f8",
    "HalfStorage": "f2",
    "BFloat16Storage": _BFLOAT,
    "LongStorage": "i8",
    "IntStorage": "i4",
    "ShortStorage": "i2",
    "CharStorage": "i1",
    "ByteStorage": "u1",
    "BoolStorage": "b1",
}
# The first pickle of the older format is this number, the second one its version.
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_PROTOCOL = 1001

_ARRAY_ITSELF = 2048  # bytes charged for an array beside its elements, generously, as it costs time too
_MOST_AXES = 32  # numpy's own limit
_MOST_ELEMENTS = 2**40
_MOST_ENTRIES = 20_000  # in a zip archive; each costs Python half a kilobyte
_ENTRY_MARK = b"PK\x01\x02"
_LOCAL_HEADER = struct.Struct("<4s22xHH")


class UnreadableError(Exception):
    """Raised for a file that cannot be read: the rest of a sentence that begins with its name, and the mend."""


class DamagedError(UnreadableError):
    """Raised for bytes that are damaged."""


def damaged_error() -> DamagedError:
    """The error for a file whose bytes make no sense as weights."""
    return DamagedError(
        "is truncated or not a weights file: get it again, or give a state dict of MegEngine or PyTorch "
        "or a .safetensors file"
    )


@dataclass
class Allowance:
    """The bytes of memory that one file may still take, so that a small file cannot allocate a large memory."""

    left: int

    def take(self, size: int) -> None:
        """Counts ``size`` bytes that are about to be made. Raises UnreadableError when there are too many."""
        self.left -= size
        if self.left < 0:
            raise UnreadableError("describes far more data than it holds: get it from a source you trust")


def check_shape(shape: object) -> tuple[int, ...]:
    """``shape`` if it is a tuple of sizes that an array can have. Raises UnreadableError otherwise."""
    if type(shape) is not tuple or len(shape) > _MOST_AXES:
        raise damaged_error()
    if not all(type(size) is int and size >= 0 for size in shape):
        raise damaged_error()
    if math.prod(max(size, 1) for size in shape) > _MOST_ELEMENTS:
        raise damaged_error()
    return shape


def packed_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The strides, in elements, of an array of ``shape`` in C order."""
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def stored_dtype(code: str, order: str) -> np.dtype[Any]:
    """The dtype to read elements of ``code`` with: bf16 as uint16, booleans as uint8. ``order`` is < or >."""
    return np.dtype(order + {_BFLOAT: "u2", "b1": "u1"}.get(code, code))


def element_view(
    raw: memoryview, code: str, order: str, shape: tuple[int, ...], offset: int, strides: tuple[int, ...]
) -> Array:
    """A view of ``raw`` as an array of ``shape``. ``offset`` and ``strides`` count elements.

    Raises UnreadableError when it would reach outside ``raw``.
    """
    dtype = stored_dtype(code, order)
    if len(strides) != len(shape) or not all(type(stride) is int and stride >= 0 for stride in strides):
        raise damaged_error()
    if type(offset) is not int or offset < 0:
        raise damaged_error()
    if 0 in shape:
        return np.empty(shape, dtype)
    last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    if last >= len(raw) // dtype.itemsize:
        raise UnreadableError("has a tensor that reaches outside its data: get it again from a source you trust")
    # An axis of length one may carry any stride, one that does not fit in 64 bits too.
    steps = [stride * dtype.itemsize if size > 1 else 0 for size, stride in zip(shape, strides, strict=True)]
    return np.ndarray(shape, dtype, raw, offset * dtype.itemsize, steps)


def copy_elements(view: Array, code: str, allowance: Allowance, metadata: dict[str, Any] | None = None) -> Array:
    """A new C-contiguous array of what ``view`` (of :func:`element_view`) shows, in the machine's byte order.

    bf16 becomes float32, exactly; any byte but 0 becomes True. ``metadata`` goes into the dtype.
    Raises UnreadableError when ``allowance`` is used up.
    """
    made = np.dtype({_BFLOAT: "f4"}.get(code, code))
    allowance.take(view.size * made.itemsize + _ARRAY_ITSELF)
    array = np.empty(view.shape, np.dtype(made, metadata=metadata) if metadata else made)
    if code == _BFLOAT:
        np.left_shift(view, 16, out=array.view(np.uint32), dtype=np.uint32)
    elif code == "b1":
        np.not_equal(view, 0, out=array)
    else:
        np.copyto(array, view)
    return array


@dataclass
class Storage:
    """A flat run of ``length`` elements that tensors show parts of. The older format brings ``raw`` last."""

    code: str
    length: int
    raw: memoryview | None = None
    order: str = "<"

    def fill(self, raw: memoryview) -> None:
        """Takes ``raw`` as the data. Raises UnreadableError when it has not the announced length."""
        if len(raw) != self.length * stored_dtype(self.code, self.order).itemsize:
            raise UnreadableError("announces a storage of another size than it holds: get it again")
        self.raw = raw


@dataclass(frozen=True)
class StoragePart:
    """``length`` elements of a storage from ``start`` on: old files can name a part as a storage."""

    whole: Storage
    start: int
    length: int


@dataclass(frozen=True)
class TorchTensor:
    """A tensor as PyTorch describes it: ``size`` and ``stride`` (in elements) over a part of a storage."""

    part: StoragePart
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    def array(self, allowance: Allowance) -> Array:
        """The tensor as a new array. Raises UnreadableError when it reaches outside its storage."""
        storage = self.part.whole
        if storage.raw is None:
            raise damaged_error()
        width = stored_dtype(storage.code, storage.order).itemsize
        raw = storage.raw[self.part.start * width : (self.part.start + self.part.length) * width]
        view = element_view(raw, storage.code, storage.order, self.size, self.offset, self.stride)
        return copy_elements(view, storage.code, allowance)


def torch_tensor(part: object, offset: object, size: object, stride: object) -> TorchTensor:
    """The tensor for the arguments of ``torch._utils._rebuild_tensor``. Raises UnreadableError."""
    shape = check_shape(size)
    if not isinstance(part, StoragePart) or type(offset) is not int or type(stride) is not tuple:
        raise damaged_error()
    return TorchTensor(part, offset, shape, stride)


@dataclass
class Storages:
    """The storages of one file by key; several tensors may share one."""

    by_key: dict[str, Storage] = field(default_factory=dict)

    def part(self, code: str, key: str, length: int, view: object) -> StoragePart:
        """The storage ``key``, or its part ``view``: (name, start, length). Raises UnreadableError."""
        if length < 0:
            raise damaged_error()
        storage = self.by_key.get(key)
        if storage is None:
            storage = self.by_key[key] = self.find_storage(code, key, length)
        if (storage.code, storage.length) != (code, length):
            raise damaged_error()
        if view is None:
            return StoragePart(storage, 0, length)
        if type(view) is not tuple or len(view) != 3:
            raise damaged_error()
        _, start, size = view
        if type(start) is not int or type(size) is not int or min(start, size) < 0 or start + size > length:
            raise damaged_error()
        return StoragePart(storage, start, size)

    def find_storage(self, code: str, key: str, length: int) -> Storage:
        """The storage ``key`` on its first use."""
        return Storage(code, length)


class LegacyStorages(Storages):
    """Storages whose data follow the pickles, in the order of a list of keys: 64-bit length, elements."""

    def fill_all(self, data: memoryview, keys: object) -> None:
        """Gives every storage in ``keys`` its data, which begin at 0 of ``data``. Raises UnreadableError."""
        if type(keys) is not list:
            raise damaged_error()
        position = 0
        for key in keys:
            storage = self.by_key.get(key) if type(key) is str else None
            if storage is None or position + 8 > len(data):
                raise damaged_error()
            size = storage.length * stored_dtype(storage.code, storage.order).itemsize
            (length,) = struct.unpack_from("<q", data, position)
            if length != storage.length or position + 8 + size > len(data):
                raise damaged_error()
            storage.fill(data[position + 8 : position + 8 + size])
            position += 8 + size


class Archive(Storages):
    """PyTorch's zip archive: ``NAME/data.pkl``, ``NAME/data/KEY`` for each storage, ``NAME/byteorder``.

    The entries read are stored as they are, so their sizes can be held against the file's.
    """

    def __init__(self, data: bytes) -> None:
        super().__init__()
        self._data = memoryview(data)
        self._entries = _entries(data)
        what = identify_archive(self._entries)
        if what:
            raise UnreadableError(what)
        tops = [name.removesuffix("data.pkl") for name in self._entries if name.endswith("/data.pkl")]
        if len(tops) != 1:
            raise UnreadableError(
                "is a zip archive but not a PyTorch weights file (it has no data.pkl): "
                "unpack it and give the weights inside"
            )
        self._top = tops[0]
        order = f"{self._top}byteorder"
        self._order = ">" if order in self._entries and bytes(self._content(order)) == b"big" else "<"

    def pickle(self) -> memoryview:
        """The pickle that describes the state dict."""
        return self._content(f"{self._top}data.pkl")

    def find_storage(self, code: str, key: str, length: int) -> Storage:
        """The storage ``key`` with its data. Raises UnreadableError when missing, or of another size."""
        storage = Storage(code, length, order=self._order)
        storage.fill(self._content(f"{self._top}data/{key}"))
        return storage

    def _content(self, name: str) -> memoryview:
        """The bytes of an entry, held against its checksum."""
        entry = self._entries.get(name)
        if entry is None or entry.header_offset < 0:
            raise damaged_error()
        if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
            raise UnreadableError(
                "is a zip archive with compressed weights, which PyTorch does not write: "
                "unpack it, and give the weights inside or save them again in PyTorch"
            )
        header = self._data[entry.header_offset :]
        if len(header) < _LOCAL_HEADER.size:
            raise damaged_error()
        mark, name_length, extra_length = _LOCAL_HEADER.unpack_from(header)
        start = _LOCAL_HEADER.size + name_length + extra_length
        content = header[start : start + entry.file_size]
        if mark != b"PK\x03\x04" or len(content) != entry.file_size:
            raise damaged_error()
        # PyTorch can be told to compute no checksums; it then writes 0.
        if entry.CRC not in (0, zlib.crc32(content)):
            raise UnreadableError(f"is damaged: its entry {name[:80]!r} does not match its checksum: get it again")
        return content


def _entries(data: bytes) -> dict[str, zipfile.ZipInfo]:
    """The entries of a zip archive by name.

    Raises UnreadableError unless they fit in the file one beside the other.
    """
    if data.count(_ENTRY_MARK) > _MOST_ENTRIES:
        raise UnreadableError(f"is a zip archive of more than {_MOST_ENTRIES} entries, which no weights file has")
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, struct.error, ValueError, OverflowError) as error:
        raise damaged_error() from error
    if sum(entry.compress_size for entry in entries) > len(data):
        raise damaged_error()
    return {entry.filename: entry for entry in entries}

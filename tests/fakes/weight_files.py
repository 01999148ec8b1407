"""Weight files forged opcode by opcode: PyTorch's two formats, as PyTorch is no dependency, and MegEngine's.

The writer of pickles can write what Python's own would not.
"""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save as safetensors_bytes

Tensors = dict[str, np.ndarray[Any, Any]]


@dataclass(frozen=True)
class Name:
    module: str
    name: str


@dataclass(frozen=True)
class Call:
    name: Name
    args: tuple[object, ...]
    state: object = None
    new: bool = False


@dataclass(frozen=True)
class Reference:
    id: object


@dataclass(frozen=True)
class Raw:
    code: bytes


def code(value: object) -> bytes:
    """The instructions that push ``value``."""
    match value:
        case None:
            return b"N"
        case bool():
            return b"\x88" if value else b"\x89"
        case int():
            if abs(value) < 2**31:
                return b"J" + struct.pack("<i", value)
            return b"\x8a\x0f" + value.to_bytes(15, "little", signed=True)
        case float():
            return b"G" + struct.pack(">d", value)
        case str():
            return b"X" + struct.pack("<I", len(value.encode())) + value.encode()
        case bytes():
            return b"B" + struct.pack("<I", len(value)) + value
        case tuple():
            return b"(" + b"".join(map(code, value)) + b"t"
        case list():
            return b"](" + b"".join(map(code, value)) + b"e"
        case dict():
            return b"}(" + b"".join(code(key) + code(entry) for key, entry in value.items()) + b"u"
        case Name():
            return f"c{value.module}\n{value.name}\n".encode()
        case Call():
            made = code(value.name) + code(value.args) + (b"\x81" if value.new else b"R")
            return made if value.state is None else made + code(value.state) + b"b"
        case Reference():
            return code(value.id) + b"Q"
        case Raw():
            return value.code
    raise TypeError(type(value))


def pickled(value: object) -> bytes:
    return b"\x80\x02" + code(value) + b"."


REBUILD = Name("torch._utils", "_rebuild_tensor_v2")
ORDERED = Name("collections", "OrderedDict")
KINDS = {
    "float32": "FloatStorage",
    "float64": "DoubleStorage",
    "float16": "HalfStorage",
    "int64": "LongStorage",
    "int32": "IntStorage",
    "int16": "ShortStorage",
    "int8": "CharStorage",
    "uint8": "ByteStorage",
    "bool": "BoolStorage",
}


@dataclass
class Forge:
    """Makes PyTorch files: storages are added, tensors refer to them, one of two writers writes all."""

    storages: dict[str, tuple[int, bytes]] = field(default_factory=dict)

    def storage(self, flat: np.ndarray[Any, Any], kind: str = "", *view: object) -> Reference:
        key = str(100 + len(self.storages))
        self.storages[key] = (flat.size, flat.tobytes())
        name = Name("torch", kind or KINDS[flat.dtype.name])
        return Reference(("storage", name, key, "cuda:0", flat.size, *view))

    def view(self, storage: object, size: tuple[int, ...], stride: tuple[int, ...], offset: int = 0) -> Call:
        return Call(REBUILD, (storage, offset, size, stride, False, Call(ORDERED, ())))

    def tensor(self, array: np.ndarray[Any, Any]) -> Call:
        steps = tuple(stride // array.itemsize for stride in np.array(array, order="C").strides)
        return self.view(self.storage(array.reshape(-1)), array.shape, steps)

    def zip(self, root: object, **changes: bytes) -> bytes:
        entries = {"data.pkl": pickled(root), "byteorder": b"little", "version": b"3\n", **changes}
        for key, (_, raw) in self.storages.items():
            entries.setdefault(f"data/{key}", raw)
        return zipped({f"weights/{name}": content for name, content in entries.items()})

    def legacy(self, root: object) -> bytes:
        system = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"int": 4}}
        pickles = [0x1950A86A20F9469CFC6C, 1001, system, root, list(self.storages)]
        data = b"".join(struct.pack("<q", size) + raw for size, raw in self.storages.values())
        return b"".join(map(pickled, pickles)) + data


Writer = Callable[[Forge, object], bytes]
both_formats = pytest.mark.parametrize("write", [Forge.zip, Forge.legacy], ids=["zip", "legacy"])


def zipped(entries: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return file.getvalue()


SMALL: Tensors = {
    "stem.weight": np.arange(24, dtype=np.float32).reshape(2, 3, 4),
    "stem.steps": np.array(7, np.int64),
    "head.bias": np.array([1.5, -2], np.float32),
}


def small_megengine() -> bytes:
    return pickle.dumps({"step": 3, "state_dict": SMALL}, protocol=4)


def small_zip() -> bytes:
    forge = Forge()
    return forge.zip({name: forge.tensor(array) for name, array in SMALL.items()})


def small_legacy() -> bytes:
    forge = Forge()
    return forge.legacy({name: forge.tensor(array) for name, array in SMALL.items()})


def small_safetensors() -> bytes:
    return safetensors_bytes(SMALL, {"made": "here"})

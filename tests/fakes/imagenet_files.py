"""ImageNet's archives, forged small."""

from __future__ import annotations

import hashlib
import io
import struct
import tarfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mgq.data.imagenet_classes import imagenet_classes

WNIDS = [entry.wnid for entry in imagenet_classes()]
# The development kit numbers the classes in an order of its own; any will do for a forgery.
BY_ID = dict(enumerate(reversed(WNIDS), 1))


def element(kind: int, data: bytes, order: str = "<") -> bytes:
    if 0 < len(data) <= 4:
        return struct.pack(f"{order}I", len(data) << 16 | kind) + data.ljust(4, b"\0")
    return struct.pack(f"{order}II", kind, len(data)) + data + b"\0" * (-len(data) % 8)


def matrix(class_: int, dimensions: Sequence[int], name: str, rest: bytes, order: str = "<") -> bytes:
    flags = element(6, struct.pack(f"{order}II", class_, 0), order)
    sizes = element(5, struct.pack(f"{order}{len(dimensions)}i", *dimensions), order)
    return element(14, flags + sizes + element(1, name.encode(), order) + rest, order)


def number(value: int, order: str = "<") -> bytes:
    """A double, packed as small as MATLAB packs it."""
    kind, code = (2, "B") if value < 256 else (4, "H")
    return matrix(6, (1, 1), "", element(kind, struct.pack(order + code, value), order), order)


def text(value: str, order: str = "<", kind: int = 4) -> bytes:
    codes = value.encode("utf-8") if kind == 16 else b"".join(struct.pack(f"{order}H", ord(c)) for c in value)
    return matrix(4, (1, len(value)), "", element(kind, codes, order), order)


def meta(
    entries: Sequence[tuple[int, str]],
    order: str = "<",
    compressed: bool = True,
    text_kind: int = 4,
    fields: Sequence[str] = ("ILSVRC2012_ID", "WNID", "words", "children"),
) -> bytes:
    """A meta.mat: an array of structures, some fields of which are of no interest."""
    values = b"".join(
        {
            "ILSVRC2012_ID": number(id_, order),
            "WNID": text(wnid, order, text_kind),
            "words": text("a word, or two", order),
            "children": matrix(6, (1, 0), "", element(9, b"", order), order),
        }[field]
        for id_, wnid in entries
        for field in fields
    )
    names = b"".join(field.encode().ljust(32, b"\0") for field in fields)
    rest = element(5, struct.pack(f"{order}i", 32), order) + element(1, names, order) + values
    variable = matrix(2, (len(entries), 1), "synsets", rest, order)
    if compressed:
        packed = zlib.compress(variable)
        variable = struct.pack(f"{order}II", 15, len(packed)) + packed
    mark = b"\x00\x01IM" if order == "<" else b"\x01\x00MI"
    return b"MATLAB 5.0 MAT-file".ljust(124) + mark + variable


INNER_NODES = [(1001, "n00001740"), (1860, "n00002137")]
META = meta([*BY_ID.items(), *INNER_NODES])
TRUTH = [3, 1000, 3, 1, 512, 77]
TRUTH_TEXT = "".join(f"{number}\n" for number in TRUTH)


def image(tag: str) -> bytes:
    """Not a JPEG: what is in the files does not matter here."""
    return hashlib.sha256(tag.encode()).digest() * 40


def tar(path: Path | io.BytesIO, members: Sequence[tuple[str | tarfile.TarInfo, bytes]], mode: str = "w") -> None:
    where: dict[str, Any] = {"name": path} if isinstance(path, Path) else {"fileobj": path}
    with tarfile.open(mode=mode, **where) as file:  # type: ignore[call-overload]
        for member, data in members:
            info = member if isinstance(member, tarfile.TarInfo) else tarfile.TarInfo(member)
            if info.isreg():
                info.size = len(data)
            file.addfile(info, io.BytesIO(data))


def inner_tar(members: Sequence[tuple[str | tarfile.TarInfo, bytes]]) -> bytes:
    packed = io.BytesIO()
    tar(packed, members)
    return packed.getvalue()


def train_members(wnids: Sequence[str] = WNIDS[:3]) -> list[tuple[str | tarfile.TarInfo, bytes]]:
    return [(f"{wnid}.tar", inner_tar([(f"{wnid}_{i}.JPEG", image(f"{wnid}{i}")) for i in range(4)])) for wnid in wnids]


def val_members() -> list[tuple[str | tarfile.TarInfo, bytes]]:
    # As in the original, the pictures do not come in their order.
    return [(f"ILSVRC2012_val_{i:08}.JPEG", image(f"val{i}")) for i in (2, 1, 3, 6, 5, 4)]


def devkit(path: Path, meta_mat: bytes = META, truth: str = TRUTH_TEXT) -> None:
    data = "ILSVRC2012_devkit_t12/data"
    members: list[tuple[str | tarfile.TarInfo, bytes]] = [
        ("ILSVRC2012_devkit_t12/readme.txt", b"read me"),
        (f"{data}/meta.mat", meta_mat),
        (f"{data}/ILSVRC2012_validation_ground_truth.txt", truth.encode()),
    ]
    tar(path, members, "w:gz")


def sums(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.md5(path.read_bytes()).hexdigest() for path in folder.iterdir() if path.is_file()}

"""Unpacks ImageNet (ILSVRC 2012) from its original archives: checked, and sorted into class folders.

The archives are those of image-net.org. The training archive holds one tar a class. The validation archive is
flat, and the development kit says which class each of its pictures shows.

Source: the readme of the development kit.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import json
import os
import re
import shutil
import tarfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Literal, TypeAlias

import numpy as np

from mgq.data.image_limits import MAX_BYTES
from mgq.data.imagenet_classes import imagenet_classes
from mgq.errors import FailureError, InputError, printable
from mgq.events import OnProgress, Progress, log_progress
from mgq.io.atomic import ensure_writable_folder, explain_write_errors, write_text_atomically
from mgq.io.locks import hold_lock

Split: TypeAlias = Literal["train", "val"]

TRAIN_ARCHIVE = "ILSVRC2012_img_train.tar"
VAL_ARCHIVE = "ILSVRC2012_img_val.tar"
DEVKIT = "ILSVRC2012_devkit_t12.tar.gz"
MD5: Mapping[str, str] = {
    TRAIN_ARCHIVE: "1d675b47d978889d74fa0da5fadfb00e",
    VAL_ARCHIVE: "29b22e2961454d5413ddabcf34fc5622",
    DEVKIT: "fa75699e90414af021442c21a62c3abf",
}
"""The MD5 sums that image-net.org publishes."""

_ARCHIVES: Mapping[Split, str] = {"train": TRAIN_ARCHIVE, "val": VAL_ARCHIVE}
_GROUND_TRUTH = "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt"
_META = "ILSVRC2012_devkit_t12/data/meta.mat"
_CLASS_TAR = re.compile(r"(n[0-9]{8})\.tar")
_TRAIN_IMAGE = re.compile(r"(n[0-9]{8})_[0-9]{1,9}\.JPEG")
_VAL_IMAGE = re.compile(r"ILSVRC2012_val_([0-9]{8})\.JPEG")
_MOST_UNPACKED = 64 << 20  # bytes, of the development kit, whose archive has 2.6 MB
_HASH_CHUNK = 8 << 20  # bytes
_AGAIN = "copy or download it again"


def has_archive(folder: Path, split: Split) -> bool:
    """Whether the original archive of ``split`` lies in ``folder``."""
    return (folder / _ARCHIVES[split]).is_file()


def unpack_split(
    folder: Path, split: Split, on_progress: OnProgress = log_progress, md5: Mapping[str, str] | None = None
) -> Path:
    """``folder/<split>``, made of the archives in ``folder`` unless it is there: ``<split>/<wnid>/*.JPEG``.

    ``val`` needs the development kit beside its archive. The archives are checked against ``md5`` (by default
    ``MD5``) first. The work grows in the hidden folder ``.<split>.part``, which becomes ``<split>`` when all is
    there. After an interruption the next call goes on: a file that has its full size is not written again, nor
    is an archive that was checked read again for that. When two processes want it, one works and the other
    waits. Progress is in bytes. Nothing but pictures with the names that ImageNet gives them is ever written.

    Raises InputError when an archive is missing, is not the original or holds anything unexpected, or the folder
    cannot be written; FailureError when the disk is full.
    """
    target = folder / split
    if target.is_dir():
        return target
    sums = MD5 if md5 is None else md5
    _archive(folder, _ARCHIVES[split])
    ensure_writable_folder(folder, "copy the archives to a folder that can be written")

    def report_other() -> None:
        on_progress(Progress(f"wait for another process that unpacks {_ARCHIVES[split]}", 0, None))

    with hold_lock(target, "choose another place", report_other):
        if not target.is_dir():
            part = folder / f".{split}.part"
            if split == "train":
                _unpack_train(folder, part, sums, on_progress)
            else:
                _unpack_val(folder, part, sums, on_progress)
            _finish(part, target)
    return target


def wnids_by_id(meta: bytes) -> dict[int, str]:
    """The WordNet id of each ``ILSVRC2012_ID``, 1 to 1000, from the bytes of the development kit's ``meta.mat``.

    Only for bytes of an archive whose sum was checked: scipy, which reads them, may crash on forged ones.
    Raises InputError when they do not name each of ImageNet's 1,000 classes once.
    """
    import scipy.io

    try:
        synsets = scipy.io.loadmat(io.BytesIO(meta), variable_names=["synsets"], squeeze_me=True)["synsets"]
        entries = [(int(entry["ILSVRC2012_ID"]), str(entry["WNID"])) for entry in np.atleast_1d(synsets)]
        found = {number: wnid for number, wnid in entries if 1 <= number <= 1000}
    except Exception as error:  # scipy raises a dozen kinds
        raise InputError(f"meta.mat of {DEVKIT} cannot be understood: {_AGAIN}") from error
    if sorted(found.values()) != [entry.wnid for entry in imagenet_classes()]:
        raise InputError(f"meta.mat of {DEVKIT} does not name the 1,000 classes of ImageNet: {_AGAIN}")
    return found


# ---- the two splits ----


def _unpack_train(folder: Path, part: Path, sums: Mapping[str, str], on_progress: OnProgress) -> None:
    archive = _archive(folder, TRAIN_ARCHIVE)
    known = {entry.wnid for entry in imagenet_classes()}
    _begin(part, archive, sums, on_progress)
    with _open_archive(archive) as outer:
        for member, classwise in _files_in(outer, archive, on_progress):
            named = _CLASS_TAR.fullmatch(member.name)
            if named is None or named[1] not in known:
                raise _unexpected_name(archive, member.name)
            class_folder = _make_folder(part / named[1])
            with tarfile.open(fileobj=classwise, mode="r:") as inner:
                for image, file in _files_in(inner, archive, log_progress):
                    image_of = _TRAIN_IMAGE.fullmatch(image.name)
                    if image_of is None or image_of[1] != named[1]:
                        raise _unexpected_name(archive, f"{member.name}/{image.name}")
                    _keep(class_folder / image.name, image, file, archive)


def _unpack_val(folder: Path, part: Path, sums: Mapping[str, str], on_progress: OnProgress) -> None:
    archive = _archive(folder, VAL_ARCHIVE)
    wnids = _wnids_of_val(_archive(folder, DEVKIT), sums, on_progress)
    _begin(part, archive, sums, on_progress)
    for wnid in sorted(set(wnids)):
        _make_folder(part / wnid)
    with _open_archive(archive) as tar:
        for member, file in _files_in(tar, archive, on_progress):
            named = _VAL_IMAGE.fullmatch(member.name)
            number = int(named[1]) if named else 0
            if not 1 <= number <= len(wnids):
                raise _unexpected_name(archive, member.name)
            _keep(part / wnids[number - 1] / member.name, member, file, archive)


def _wnids_of_val(devkit: Path, sums: Mapping[str, str], on_progress: OnProgress) -> list[str]:
    """The wnid of each validation picture: that of ``ILSVRC2012_val_00000001.JPEG`` is the first."""
    _refuse_other(devkit, sums, on_progress)  # at every use, as a note of an earlier check could be forged
    files = _devkit_files(devkit, (_META, _GROUND_TRUTH))
    by_id = wnids_by_id(files[_META])
    try:
        return [by_id[int(line)] for line in files[_GROUND_TRUTH].split()]
    except (ValueError, KeyError) as error:
        raise InputError(f"the ground truth in {printable(devkit)} has lines that are no class: {_AGAIN}") from error


def _devkit_files(devkit: Path, names: Sequence[str]) -> dict[str, bytes]:
    """The bytes of the files ``names``, read in memory: whatever else is in the archive is never looked at."""
    try:
        with gzip.open(devkit) as packed:
            data = packed.read(_MOST_UNPACKED + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{printable(devkit)} is damaged or cannot be read: {_AGAIN}") from error
    if len(data) > _MOST_UNPACKED:
        raise InputError(f"{printable(devkit)} unpacks to more than {_MOST_UNPACKED >> 20} MB: {_AGAIN}")
    found: dict[str, bytes] = {}
    with _reading(devkit), tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
        for member in tar:
            file = tar.extractfile(member) if member.isreg() and member.name in names else None
            if file is not None:
                found[member.name] = file.read()
    for name in names:
        if name not in found:
            raise InputError(f"{printable(devkit)} holds no {name}: {_AGAIN}")
    return found


# ---- reading archives ----


def _archive(folder: Path, name: str) -> Path:
    if not (folder / name).is_file():
        raise InputError(f"{printable(folder)} has no {name}: get it from image-net.org and put it there")
    return folder / name


@contextlib.contextmanager
def _reading(archive: Path) -> Iterator[None]:
    """Turns errors of reading into one line; those of writing have become such before."""
    try:
        yield
    except (tarfile.TarError, RecursionError, ValueError, OverflowError, MemoryError) as error:
        raise InputError(f"{printable(archive)} is damaged: {_AGAIN}") from error
    except OSError as error:
        raise InputError(f"{printable(archive)} cannot be read ({error.strerror}): check it and its disk") from error


@contextlib.contextmanager
def _open_archive(archive: Path) -> Iterator[tarfile.TarFile]:
    with _reading(archive), archive.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
        yield tar


def _files_in(
    tar: tarfile.TarFile, archive: Path, on_progress: OnProgress
) -> Iterator[tuple[tarfile.TarInfo, IO[bytes]]]:
    """The members, all of which must be plain files: no folders, links, devices or holes."""
    total = archive.stat().st_size
    for member in tar:
        if not member.isreg() or member.issparse():
            raise _unexpected_name(archive, member.name)
        file = tar.extractfile(member)
        assert file is not None  # as it is a regular file
        yield member, file
        on_progress(Progress(f"unpack {archive.name}", member.offset_data + member.size, total, "B"))
        tar.members = []  # type: ignore[attr-defined]  # tarfile would remember a million of them
    on_progress(Progress(f"unpack {archive.name}", total, total, "B"))


def _unexpected_name(archive: Path, name: str) -> InputError:
    return InputError(f"{printable(archive)} holds {printable(name)}, which ImageNet's does not: {_AGAIN}")


def _keep(path: Path, member: tarfile.TarInfo, file: IO[bytes], archive: Path) -> None:
    """Write the picture to ``path``, unless an earlier run did so: half a file is smaller than it should be."""
    if member.size > MAX_BYTES:
        raise _unexpected_name(archive, f"{member.name} of {member.size} bytes")
    if _size(path) == member.size:
        return
    data = file.read()  # All of it: tarfile raises an error where the archive ends before.
    with explain_write_errors(path):
        path.write_bytes(data)


def _size(path: Path) -> int:
    try:
        return path.lstat().st_size
    except FileNotFoundError:
        return -1


def _make_folder(folder: Path) -> Path:
    with explain_write_errors(folder):
        folder.mkdir(exist_ok=True)
    return folder


# ---- before and after ----


def _begin(part: Path, archive: Path, sums: Mapping[str, str], on_progress: OnProgress) -> None:
    _check_sum(archive, part, sums, on_progress)
    is_new = not any(entry.is_dir() for entry in part.iterdir())
    free, needed = shutil.disk_usage(part).free, archive.stat().st_size
    if is_new and free < needed:
        raise FailureError(
            f"unpacking {printable(archive)} needs {needed / 1e9:.1f} GB and {free / 1e9:.1f} GB are free: make room"
        )


def _check_sum(archive: Path, part: Path, sums: Mapping[str, str], on_progress: OnProgress) -> None:
    """Refuse an archive that is not the original. What was found is noted in ``part``: reading takes minutes."""
    _make_folder(part)
    note = part / f".{archive.name}.json"
    status = archive.stat()
    state = {"size": status.st_size, "changed_ns": status.st_mtime_ns, "md5": sums[archive.name]}
    with contextlib.suppress(OSError, ValueError):
        if json.loads(note.read_text(encoding="utf-8")) == state:
            return
    _refuse_other(archive, sums, on_progress)
    write_text_atomically(note, json.dumps(state))


def _refuse_other(archive: Path, sums: Mapping[str, str], on_progress: OnProgress) -> None:
    """Raises InputError where ``archive`` is not the original."""
    found = _md5(archive, on_progress)
    if found != sums[archive.name]:
        raise InputError(
            f"{printable(archive)} is not the original: its MD5 is {found}, not {sums[archive.name]}: {_AGAIN}"
        )


def _md5(archive: Path, on_progress: OnProgress) -> str:
    total = archive.stat().st_size
    digest = hashlib.md5(usedforsecurity=False)
    done = 0
    with _reading(archive), archive.open("rb") as file:
        while chunk := file.read(_HASH_CHUNK):
            digest.update(chunk)
            done += len(chunk)
            on_progress(Progress(f"check {archive.name}", done, total, "B"))
    return digest.hexdigest()


def _finish(part: Path, target: Path) -> None:
    with explain_write_errors(target):
        for note in part.glob(".*.json"):
            note.unlink()
        # Once for all files: a sync of each would take hours, and a name must not outlive what it names.
        os.sync()
        part.rename(target)

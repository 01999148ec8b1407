"""Sets of pictures: what the loader reads from, and folders of classes as such a set."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from mgq.data.classes import imagenet_classes
from mgq.data.imagenet import Split, has_archive, unpacked
from mgq.data.pictures import Pixels
from mgq.data.sources import PICTURE_SUFFIXES, entry_of
from mgq.data.synthetic import SyntheticPictures
from mgq.errors import InputError, printable
from mgq.events import OnProgress, Progress, silent


class Dataset(Protocol):
    """Pictures in a fixed order, each of a class.

    ``labels`` are int64 (pictures,), indices into ``classes``; None where no classes are known. ``picture`` gives
    a file to be read, or pixels, uint8 (H, W, 3) in BGR order. It is called from several threads at once.
    """

    @property
    def name(self) -> str: ...
    @property
    def classes(self) -> tuple[str, ...]: ...
    @property
    def labels(self) -> npt.NDArray[np.int64] | None: ...
    def __len__(self) -> int: ...
    def picture(self, index: int) -> Path | Pixels: ...


@dataclass(frozen=True, slots=True, eq=False)
class ImageFolder:
    """Pictures in folders named after their classes, in the order of class and name. No file is open.

    The paths lie end to end in one piece of memory: a picture of ImageNet takes less than 50 bytes. ``folder`` is
    what they are relative to. ``labels`` is read-only; for pictures that are in no class folders it is None and
    ``classes`` is empty.
    """

    folder: Path
    classes: tuple[str, ...]
    labels: npt.NDArray[np.int64] | None
    _paths: bytes
    _ends: npt.NDArray[np.int64]

    @property
    def name(self) -> str:
        """The folder, as messages call it."""
        return printable(self.folder)

    def __len__(self) -> int:
        return len(self._ends)

    def picture(self, index: int) -> Path:
        """The path of a picture, 0 <= ``index`` < len. Raises IndexError for another."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        start = int(self._ends[index - 1]) if index else 0
        return self.folder / os.fsdecode(self._paths[start : int(self._ends[index])])

    def counts(self) -> npt.NDArray[np.int64]:
        """How many pictures each class has, int64 (classes,)."""
        labels = np.zeros(0, np.int64) if self.labels is None else self.labels
        return np.bincount(labels, minlength=len(self.classes))


@dataclass(frozen=True, eq=False)
class Selection:
    """The pictures of another dataset whose numbers are in ``indices``, with labels and classes of its own.

    ``part`` says which part of it they are, where the name alone would mislead.
    """

    source: Dataset
    indices: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64] | None
    classes: tuple[str, ...]
    part: str = ""

    @property
    def name(self) -> str:
        return f"{self.source.name} ({self.part})" if self.part else self.source.name

    def __len__(self) -> int:
        return len(self.indices)

    def picture(self, index: int) -> Path | Pixels:
        """What the other dataset gives, 0 <= ``index`` < len. Raises IndexError for another."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self.source.picture(int(self.indices[index]))


def subset(dataset: Dataset, number: int) -> Dataset:
    """``number`` pictures of ``dataset``, evenly spread, with their labels; all where there are not so many.

    Of drawn pictures it is the first ones: their classes come in turn, and even steps would meet some only.

    Raises InputError for fewer than one.
    """
    if number < 1:
        raise InputError(f"a limit of {number} pictures is not possible: give at least 1")
    if number >= len(dataset):
        return dataset
    if isinstance(dataset, SyntheticPictures):
        return replace(dataset, count=number)
    return _selected(dataset, evenly(len(dataset), number))


def without_subset(dataset: Dataset, number: int) -> Dataset:
    """The pictures of ``dataset`` that ``subset`` leaves out."""
    total = len(dataset)
    drawn = isinstance(dataset, SyntheticPictures)
    taken = np.arange(min(number, total)) if drawn else evenly(total, number)
    return _selected(dataset, np.setdiff1d(np.arange(total), taken))


def evenly(total: int, number: int) -> npt.NDArray[np.int64]:
    """``number`` indices below ``total``, evenly spread, int64 (number,); all of them where there are not so many."""
    number = min(number, total)
    return np.arange(number) * total // max(1, number)


def _selected(dataset: Dataset, chosen: npt.NDArray[np.int64], part: str = "") -> Selection:
    labels = None if dataset.labels is None else dataset.labels[chosen]
    return Selection(dataset, chosen, labels, dataset.classes, part)


# ---- which folders are meant ----


KEPT = 5
"""Of a folder without ``train`` and ``val``, one picture in so many is kept to measure on."""


def training_folders(root: Path, on_progress: OnProgress = silent) -> tuple[Dataset, Dataset]:
    """The pictures to train on and those to measure on: ``root/train/<class>/*`` and ``root/val/<class>/*``.

    Where one is missing and the original archive of ImageNet lies in ``root``, it is unpacked first. Folders
    that are all named by wnids of ImageNet get its 1,000 classes, see ``evaluation_folder``. Where ``root`` is
    unsplit, see ``is_unsplit``, one picture in ``KEPT`` is to measure on, see ``held_apart``.

    Raises InputError for a missing folder, fewer than two classes, a class without pictures, or class names that
    are not the same in both. Of ImageNet's classes ``val`` may have fewer than ``train``.
    """
    if is_unsplit(root):
        return held_apart(evaluation_folder(root, on_progress))
    train, val = (_class_folders(_split(root, split, on_progress)) for split in ("train", "val"))
    _check_same_classes(root, train, val)
    return _labelled(root / "train", train, on_progress), _labelled(root / "val", val, on_progress)


def is_unsplit(root: Path) -> bool:
    """Whether ``root`` is a folder of class folders without ``train`` and ``val``."""
    return root.is_dir() and not _has_splits(root) and len(_class_folders(root)) > 1


def held_apart(pictures: ImageFolder) -> tuple[Dataset, Dataset]:
    """``pictures`` to train on and to measure on: the same ones whenever it is asked.

    Which is which follows from the picture's path in the folder alone, so that a picture stays on its side when others
    come. About one in ``KEPT`` is to measure on, and at least one on each side. Raises InputError for a class of one.
    """
    assert pictures.labels is not None
    ranks = np.array([_rank(pictures.picture(i).relative_to(pictures.folder)) for i in range(len(pictures))])
    measured = ranks < 1 / KEPT
    for label in np.unique(pictures.labels):
        mine = np.flatnonzero(pictures.labels == label)
        if len(mine) < 2:
            raise InputError(
                f"{printable(pictures.picture(int(mine[0])))} is alone in its class, and one picture of each has to be"
                " kept to measure on: add another"
            )
        order = mine[np.argsort(ranks[mine])]
        measured[order[0]], measured[order[-1]] = True, False
    kept = f"one in {KEPT}, kept to measure on"
    return _selected(pictures, np.flatnonzero(~measured)), _selected(pictures, np.flatnonzero(measured), kept)


def _rank(path: Path) -> float:
    """A number in 0..1 that follows from ``path`` and looks random."""
    return int.from_bytes(hashlib.blake2b(os.fsencode(path), digest_size=6).digest(), "big") / 2**48


def measuring_folder(root: Path, on_progress: OnProgress = silent) -> Dataset:
    """What ``training_folders`` keeps of ``root`` to measure on. Raises InputError as ``evaluation_folder`` does."""
    return training_folders(root, on_progress)[1] if is_unsplit(root) else evaluation_folder(root, on_progress)


def evaluation_folder(root: Path, on_progress: OnProgress = silent) -> ImageFolder:
    """The pictures to measure on: ``root/val/<class>/*``, or ``root/<class>/*`` where ``root`` has no splits.

    A class is as a rule the rank of its folder's name. Where all folders are named by wnids of ImageNet, it is
    the rank among ImageNet's 1,000 wnids, also when some have no folder, and ``classes`` are all 1,000 names.

    Raises InputError where there are no class folders, fewer than two, or one without pictures.
    """
    _check_folder(root)
    if _has_splits(root):
        root = _split(root, "val", on_progress)
    folders = _class_folders(root)
    if not folders and _has_pictures(root):
        raise InputError(
            f"{printable(root)} has pictures but no class folders: put them in <class>/ to measure accuracy"
        )
    return _labelled(root, folders, on_progress)


def calibration_folder(root: Path, on_progress: OnProgress = silent) -> ImageFolder:
    """Pictures whose classes need not be known: of ``root/train``, else ``root/val``, else all below ``root``.

    Labels are given as by ``evaluation_folder`` where there are two class folders or more; else they are None.
    Raises InputError where there is no picture.
    """
    _check_folder(root)
    if _has_splits(root):
        root = _split(root, "train" if _has_split(root, "train") else "val", on_progress)
    folders = _class_folders(root)
    if len(folders) > 1 and not _has_pictures(root):
        return _labelled(root, folders, on_progress)
    paths = _pictures_below(root, "")
    if not paths.lengths.size:
        raise InputError(f"{printable(root)} has no pictures in it: name another folder")
    return _folder_of(root, (), None, [paths])


def _has_split(root: Path, split: Split) -> bool:
    return (root / split).is_dir() or has_archive(root, split)


def _has_splits(root: Path) -> bool:
    return _has_split(root, "train") or _has_split(root, "val")


def _split(root: Path, split: Split, on_progress: OnProgress) -> Path:
    _check_folder(root)
    if (root / split).is_dir():
        return root / split
    if has_archive(root, split):
        return unpacked(root, split, on_progress)
    raise InputError(f"{printable(root)} has no folder {split}/: make it, with a folder of pictures for each class")


def _check_folder(root: Path) -> None:
    if not root.exists():
        raise InputError(f"{printable(root)} does not exist: check the path")
    if not root.is_dir():
        raise InputError(f"{printable(root)} is not a folder: name a folder of pictures")


def _check_same_classes(root: Path, train: Sequence[str], val: Sequence[str]) -> None:
    only_train, only_val = (sorted(set(a) - set(b)) for a, b in ((train, val), (val, train)))
    if only_train and _is_imagenet(train) and _is_imagenet(val):
        only_train = []
    for here, there, names in (("train", "val", only_train), ("val", "train", only_val)):
        if names:
            raise InputError(
                f"{printable(root)} has {_listed(names)} in {here}/ and not in {there}/: give both the same classes"
            )


# ---- classes ----


def _labelled(folder: Path, folders: Sequence[str], on_progress: OnProgress) -> ImageFolder:
    """The pictures of the class folders, which must be two at least and none empty."""
    if len(folders) < 2:
        raise InputError(
            f"{printable(folder)} has {len(folders) or 'no'} class folder{'s' * (not folders)} and a classifier"
            " needs 2: make a folder of pictures for each class"
        )
    paths = []
    for done, name in enumerate(folders, 1):
        paths.append(_pictures_below(folder / name, f"{name}/"))
        on_progress(Progress(f"list {folder.name}", done, len(folders), "classes"))
    empty = [name for name, group in zip(folders, paths, strict=True) if not group.lengths.size]
    if len(empty) == len(folders):
        raise InputError(f"{printable(folder)} has no pictures in its class folders: put some in each")
    if empty:
        raise InputError(f"{printable(folder)} has no pictures in {_listed(empty)}: put some in, or remove the folder")
    if not _is_imagenet(folders):
        return _folder_of(folder, tuple(map(printable, folders)), range(len(folders)), paths)
    ranks = {entry.wnid: rank for rank, entry in enumerate(imagenet_classes())}
    names = tuple(entry.name for entry in imagenet_classes())
    return _folder_of(folder, names, [ranks[name] for name in folders], paths)


def _is_imagenet(folders: Sequence[str]) -> bool:
    return bool(folders) and set(folders) <= {entry.wnid for entry in imagenet_classes()}


def _listed(names: Sequence[str], most: int = 3) -> str:
    shown = ", ".join(printable(name) for name in names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


class _Paths(NamedTuple):
    """Encoded paths, end to end, and the length of each, int64 (paths,)."""

    joined: bytes
    lengths: npt.NDArray[np.int64]


def _folder_of(
    folder: Path, classes: tuple[str, ...], labels: Sequence[int] | None, paths: Sequence[_Paths]
) -> ImageFolder:
    """The pictures of ``paths``, one of them for each of ``labels``."""
    numbers = None
    if labels is not None:
        numbers = np.repeat(np.asarray(labels, np.int64), [group.lengths.size for group in paths])
        numbers.flags.writeable = False
    ends = np.concatenate([group.lengths for group in paths]).cumsum()
    return ImageFolder(folder, classes, numbers, b"".join(group.joined for group in paths), ends)


# ---- what is on the disk ----


def _class_folders(folder: Path) -> list[str]:
    """The names of the folders in ``folder``, sorted, but hidden ones."""
    return sorted(entry.name for entry in map(entry_of, _shown(folder)) if entry.is_folder)


def _has_pictures(folder: Path) -> bool:
    return any(entry.is_picture for entry in map(entry_of, _shown(folder)))


def _pictures_below(folder: Path, prefix: str) -> _Paths:
    """The pictures in ``folder`` and below it, each path after ``prefix``, sorted."""
    found: list[bytes] = []
    waiting = [(folder, prefix)]
    while waiting:
        here, path = waiting.pop()
        for entry in _shown(here):
            if entry.is_dir(follow_symlinks=False):  # Not through links, which may lead in a circle.
                waiting.append((here / entry.name, f"{path}{entry.name}/"))
            # A pipe, which an archive may hold, too, would be waited for without end.
            elif _is_picture(entry.name) and (entry.is_file(follow_symlinks=False) or entry.is_symlink()):
                found.append(os.fsencode(path + entry.name))
    found.sort()
    return _Paths(b"".join(found), np.array([len(path) for path in found], np.int64))


def _is_picture(name: str) -> bool:
    return name.lower().endswith(PICTURE_SUFFIXES)


def _shown(folder: Path) -> Iterator[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            yield from (entry for entry in entries if not entry.name.startswith("."))
    except OSError as error:
        raise InputError(f"{printable(folder)} cannot be searched ({error.strerror}): check its permissions") from error

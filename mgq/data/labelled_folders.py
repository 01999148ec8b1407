"""Folders of classes as datasets: which folder is which split, and which picture has which label."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from mgq.data.datasets import Dataset, select
from mgq.data.folder_layout import Layout, Role, class_folders, has_images, is_empty, join_names, layout_of, list_folder
from mgq.data.folder_scan import EMPTY_CLASS, OUTSIDE, Tally
from mgq.data.imagenet_archives import unpack_split
from mgq.data.imagenet_classes import imagenet_classes
from mgq.errors import InputError, plural, printable
from mgq.events import OnMessage, OnProgress, Progress, log_message, log_progress


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

    def image(self, index: int) -> Path:
        """The path of a picture, 0 <= ``index`` < len. Raises IndexError for another."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        start = int(self._ends[index - 1]) if index else 0
        return self.folder / os.fsdecode(self._paths[start : int(self._ends[index])])

    def counts(self) -> npt.NDArray[np.int64]:
        """How many pictures each class has, int64 (classes,)."""
        labels = np.zeros(0, np.int64) if self.labels is None else self.labels
        return np.bincount(labels, minlength=len(self.classes))


KEPT = 5
"""In a folder without ``train`` and ``val``, one image of this many is held out to measure on."""


LEAST_TO_TRAIN = 2
"""The fewest classes that a classifier can be trained on. One can be measured on."""


def training_folders(
    root: Path, on_progress: OnProgress = log_progress, on_message: OnMessage = log_message
) -> tuple[Dataset, Dataset]:
    """The pictures to train on and those to measure on: ``root/train/<class>/*`` and ``root/val/<class>/*``.

    The splits may have other names, see ``mgq.data.folder_layout``; without ``val``, ``test`` is measured on. Where one
    is missing and the original archive of ImageNet lies in ``root``, it is unpacked first. Folders that are all named
    by wnids of ImageNet get its 1,000 classes, see ``evaluation_folder``. Where ``root`` is unsplit, see
    ``is_unsplit``, one picture in ``KEPT`` is to measure on, see ``hold_out_validation``. ``on_message`` is told what
    was taken for what, and what was left out.

    Raises InputError for a missing folder, fewer than two classes, a class without pictures, class names that are not
    the same in both, or folders that can be read in two ways. Of ImageNet's classes ``val`` may have fewer than
    ``train``.
    """
    layout = layout_of(root)
    if layout.classes or (not layout.splits and has_images(layout.root)):
        tally = _scan_around(root, layout.root)
        train, val = hold_out_validation(_label_images(layout.root, layout.classes, on_progress, tally, LEAST_TO_TRAIN))
        on_message(
            f"{printable(layout.root)} has no train/ and val/: {len(val):,} of its pictures, one in {KEPT}, are kept to"
            " measure on, always the same"
        )
    elif not layout.splits:
        raise _too_few(layout.root, 0, LEAST_TO_TRAIN)
    else:
        places = [_split(layout, role, on_progress) for role in ("train", layout.measured)]
        tally, names = _scan_around(root, *places), [class_folders(place) for place in places]
        _check_same_classes(layout, places, names)
        train, val = (
            _label_images(place, classes, on_progress, tally, LEAST_TO_TRAIN)
            for place, classes in zip(places, names, strict=True)
        )
        on_message(_describe_folders(layout, dict(zip(places, map(len, (train, val)), strict=True))))
    _tell(tally, root, on_message)
    return train, val


def is_unsplit(root: Path) -> bool:
    """Whether ``root`` is a folder of class folders without ``train`` and ``val``."""
    return root.is_dir() and len(layout_of(root).classes) > 1


def hold_out_validation(images: ImageFolder) -> tuple[Dataset, Dataset]:
    """``images`` to train on and to measure on: the same ones whenever it is asked.

    Which is which follows from the picture's path in the folder alone, so that a picture stays on its side when others
    come. About one in ``KEPT`` is to measure on, and at least one on each side. Raises InputError for a class of one.
    """
    assert images.labels is not None
    ranks = np.array([_rank(images.image(i).relative_to(images.folder)) for i in range(len(images))])
    measured = ranks < 1 / KEPT
    for label in np.unique(images.labels):
        mine = np.flatnonzero(images.labels == label)
        if len(mine) < 2:
            raise InputError(
                f"{printable(images.image(int(mine[0])))} is alone in its class, and one picture of each has to be"
                " kept to measure on: add another"
            )
        order = mine[np.argsort(ranks[mine])]
        measured[order[0]], measured[order[-1]] = True, False
    kept = f"one in {KEPT}, kept to measure on"
    return select(images, np.flatnonzero(~measured)), select(images, np.flatnonzero(measured), kept)


def _rank(path: Path) -> float:
    """A number in 0..1 that follows from ``path`` and looks random."""
    return int.from_bytes(hashlib.blake2b(os.fsencode(path), digest_size=6).digest(), "big") / 2**48


def validation_folder(
    root: Path, on_progress: OnProgress = log_progress, on_message: OnMessage = log_message
) -> Dataset:
    """What ``training_folders`` keeps of ``root`` to measure on. Raises InputError as ``evaluation_folder`` does."""
    if is_unsplit(root):
        return training_folders(root, on_progress, on_message)[1]
    return evaluation_folder(root, on_progress, on_message)


def evaluation_folder(
    root: Path,
    on_progress: OnProgress = log_progress,
    on_message: OnMessage = log_message,
    listed: ImageFolder | None = None,
) -> ImageFolder:
    """The pictures to measure on: ``root/val/<class>/*``, or ``root/<class>/*`` where ``root`` has no splits.

    The splits may have other names, see ``mgq.data.folder_layout``; without ``val`` it is ``test``. One class is
    enough. A class is as a rule the rank of its folder's name. Where all folders are named by wnids of ImageNet, it is
    the rank among ImageNet's 1,000 wnids, also when some have no folder, and ``classes`` are all 1,000 names.
    ``on_message`` gets a line where folders could be read in several ways, and for what was left out. What is
    ``listed`` already, with labels, is not listed again where these are its pictures.

    Raises InputError where there are no class folders, one without pictures, or folders that can be read in two ways.
    """
    layout = layout_of(root)
    place = _split(layout, layout.measured, on_progress) if layout.splits else layout.root
    if listed is not None and listed.labels is not None and listed.folder == place:
        found, tally = listed, Tally()
    else:
        tally = _scan_around(root, place)
        found = _label_images(place, class_folders(place), on_progress, tally)
    if layout.splits and (place != root / "val" or "test" in layout.splits):
        on_message(_describe_folders(layout, {place: len(found)}))
    _tell(tally, root, on_message)
    return found


def calibration_folder(
    root: Path, on_progress: OnProgress = log_progress, on_message: OnMessage = log_message
) -> ImageFolder:
    """The images to calibrate on, labelled or not: of ``root/train``, else ``root/val``, else all below ``root``.

    Labels are given as by ``evaluation_folder`` where there are two class folders or more; else they are None.
    Raises InputError where there is no picture.
    """
    layout = layout_of(root)
    role: Role = "train" if "train" in layout.splits else layout.measured
    place = _split(layout, role, on_progress) if layout.splits else layout.root
    folders = class_folders(place)
    if len(folders) > 1 and not has_images(place):
        tally = _scan_around(root, place)
        found = _label_images(place, folders, on_progress, tally)
    else:
        tally = Tally() if place == root else _scan_around(root, place.parent)
        paths = _images_below(place, "", tally)
        if not paths.lengths.size:
            raise InputError(f"{printable(place)} has no pictures in it{tally.as_clause()}: name another folder")
        found = _folder_of(place, (), None, [paths])
    _tell(tally, root, on_message)
    return found


def _split(layout: Layout, role: Role, on_progress: OnProgress) -> Path:
    """The folder of a split, unpacked where it is not yet there."""
    path = layout.splits.get(role)
    if path is not None:
        return path
    if role in layout.splits and role != "test":
        return unpack_split(layout.root, role, on_progress)
    mend = f"make it, with a folder of pictures for each class{_describe_only_split(layout)}"
    raise InputError(f"{printable(layout.root)} has no folder {role}/: {mend}")


def _describe_only_split(layout: Layout) -> str:
    """What a set with one split alone may be used as."""
    only = next(iter(layout.splits.values()), None)
    return "" if only is None else f", or name {printable(only)}, to take that for the whole set"


_USES: Mapping[Role, str] = {"train": "trained on", "val": "measured on", "test": "measured on"}


def _describe_folders(layout: Layout, counts: Mapping[Path, int]) -> str:
    """Which folders were taken for what, in one line."""
    parts = []
    for role, path in layout.splits.items():
        place = path or layout.root / role
        name = printable(place.relative_to(layout.root))
        if place in counts:
            as_val = ", for there is no val/" if role == "test" else ""
            parts.append(f"{name}/ is {_USES[role]} ({plural(counts[place], 'picture', ',')}{as_val})")
        else:
            parts.append(f"{name}/ is not looked at")
    return f"{printable(layout.root)}: {', '.join(parts)}"


def _scan_around(root: Path, *places: Path) -> Tally:
    """What does not count in the folders from ``root`` to ``places``, to which what lies deeper may be added."""
    tally = Tally()
    on_the_way = {above for place in places for above in (place, *place.parents) if root in (above, *above.parents)}
    for folder in sorted({root, *on_the_way}):
        loose = sum(entry.is_image for entry in list_folder(folder, tally))
        tally.left_out += Counter({OUTSIDE: loose})
    return tally


def _tell(tally: Tally, folder: Path, on_message: OnMessage) -> None:
    for line in tally.lines(printable(folder)):
        on_message(line)


def _check_same_classes(layout: Layout, places: Sequence[Path], names: Sequence[Sequence[str]]) -> None:
    """Raises InputError for class folders, ``names`` of both ``places``, that have something in one of them alone."""
    filled = [[n for n in mine if not is_empty(place / n)] for place, mine in zip(places, names, strict=True)]
    for place, mine, full, others in zip(places, names, filled, reversed(filled), strict=True):
        if hollow := sorted(set(mine) & set(others) - set(full)):
            raise InputError(
                f"{printable(place)} has no pictures in {join_names(hollow)}: put some in, "
                "or remove the folder everywhere"
            )
    train, val = filled
    only_train, only_val = (sorted(set(a) - set(b)) for a, b in ((train, val), (val, train)))
    if only_train and _is_imagenet(train) and _is_imagenet(val):
        only_train = []
    first, second = (path.name if (path := layout.splits[r]) else r for r in ("train", layout.measured))
    for here, there, names in ((first, second, only_train), (second, first, only_val)):
        if names:
            raise InputError(
                f"{printable(layout.root)} has {join_names(names)} in {here}/ and not in {there}/: give both the same"
                " classes"
            )


# ---- classes ----


def _label_images(
    folder: Path, folders: Sequence[str], on_progress: OnProgress, tally: Tally, least: int = 1
) -> ImageFolder:
    """The pictures of the class folders, of which there must be ``least``; empty folders are none.

    What does not count in them goes to ``tally``.
    """
    _check_number(folder, folders, least)
    paths, kept, without, there = [], [], [], Tally()
    for done, name in enumerate(folders, 1):
        mine = Tally()
        found = _images_below(folder / name, f"{name}/", mine)
        if found.lengths.size:
            paths.append(found)
            kept.append(name)
        elif mine.left_out:
            without.append(name)
            there.add(mine)
        else:
            mine.passed = Counter([f"{EMPTY_CLASS}{name}/"])
        tally.add(mine)
        on_progress(Progress(f"list {folder.name}", done, len(folders), "classes"))
    if not kept:
        raise InputError(
            f"{printable(folder)} has no pictures in its class folders{tally.as_clause()}: put some in each"
        )
    if without:
        raise InputError(
            f"{printable(folder)} has no pictures in {join_names(without)}: put some in, or remove the folder (there:"
            f" {there.describe()})"
        )
    _check_number(folder, kept, least)
    folders = kept
    if not _is_imagenet(folders):
        return _folder_of(folder, tuple(map(printable, folders)), range(len(folders)), paths)
    ranks = {entry.wnid: rank for rank, entry in enumerate(imagenet_classes())}
    names = tuple(entry.name for entry in imagenet_classes())
    return _folder_of(folder, names, [ranks[name] for name in folders], paths)


def _check_number(folder: Path, folders: Sequence[str], least: int) -> None:
    """Raises InputError for fewer class folders than ``least``."""
    if len(folders) >= least:
        return
    if not folders and has_images(folder):
        raise InputError(
            f"{printable(folder)} has pictures but no class folders: put them in <class>/ to measure accuracy"
        )
    raise _too_few(folder, len(folders), least)


def _too_few(folder: Path, found: int, least: int) -> InputError:
    needed = f" and a classifier needs {least}" if least > 1 else ""
    return InputError(
        f"{printable(folder)} has {found or 'no'} class folder{'s' * (not found)}{needed}: make a folder of pictures"
        " for each class"
    )


def _is_imagenet(folders: Sequence[str]) -> bool:
    return bool(folders) and set(folders) <= {entry.wnid for entry in imagenet_classes()}


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


def _images_below(folder: Path, prefix: str, tally: Tally) -> _Paths:
    """The pictures in ``folder`` and below it, each path after ``prefix``, sorted; the rest goes to ``tally``."""
    found: list[bytes] = []
    waiting = [(folder, prefix)]
    while waiting:
        here, path = waiting.pop()
        for entry in list_folder(here, tally, is_below=here != folder):
            if entry.is_image:
                found.append(os.fsencode(path + entry.name))
            elif not (here / entry.name).is_symlink():  # Not through links, which may lead in a circle.
                waiting.append((here / entry.name, f"{path}{entry.name}/"))
    found.sort()
    return _Paths(b"".join(found), np.array([len(path) for path in found], np.int64))

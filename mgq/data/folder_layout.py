"""Decides whether folders are splits or classes. What could be read in two ways is refused.

``training`` and ``validation``, ``Train`` and ``Val``, ``train_set`` and the like are splits and never classes. A
folder that has nothing but one folder in it, as archives leave them, stands for what is in that.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from mgq.data.folder_scan import Entry, Tally, entries_in, scan_folder
from mgq.data.imagenet_archives import has_archive
from mgq.errors import InputError, no_such_path, printable

Role: TypeAlias = Literal["train", "val", "test"]

_WORDS: Mapping[str, Role] = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
_NAME = re.compile(rf"({'|'.join(_WORDS)})(?:[-_ .]?(?:sets?|data|images|imgs|pictures|photos|split|[0-9]{{4}}))?")
_DEEPEST = 8
_WRAPPERS = frozenset({"images", "imgs", "pictures", "photos", "data", "dataset"})
_MEANING: Mapping[Role, str] = {"train": "what is trained on", "val": "what is measured on", "test": "the test set"}


def role_of(name: str) -> Role | None:
    """The split that a folder called ``name`` holds; None where it holds none."""
    found = _NAME.fullmatch(name.strip().casefold())
    return _WORDS[found[1]] if found else None


@dataclass(frozen=True)
class Layout:
    """What lies where. ``root`` is the folder that has the splits or the classes in it.

    A split that is None is an archive of ImageNet that is not yet unpacked. ``classes`` are the folders of a set
    without splits, by name.
    """

    root: Path
    splits: Mapping[Role, Path | None]
    classes: tuple[str, ...] = ()

    @property
    def measured(self) -> Role:
        """The split to measure on: ``val``, or ``test`` where there is none."""
        return "test" if "val" not in self.splits and "test" in self.splits else "val"


def layout_of(root: Path) -> Layout:
    """How ``root`` is laid out. Raises InputError where it is no folder, or can be read in two ways."""
    check_folder(root)
    here = root
    for _ in range(_DEEPEST):
        entries = list_folder(here)
        folders = [entry.name for entry in entries if entry.is_folder]
        splits = _splits_of(here, folders)
        if splits and not _wraps_a_split(here, splits, entries):
            return Layout(here, {role: path and _unwrap_split(path, role) for role, path in splits.items()})
        inner = _only_folder_of_folders(here, entries)
        if inner is None:
            break
        here = inner
    _refuse_parts_of_a_set(here, folders)
    return Layout(here, {}, tuple(folders))


def check_folder(root: Path) -> None:
    """Raises InputError for what is no folder."""
    if not root.exists():
        raise no_such_path(root)
    if not root.is_dir():
        raise InputError(f"{printable(root)} is not a folder: name a folder of pictures")


def list_folder(folder: Path, tally: Tally | None = None, is_below: bool = True) -> list[Entry]:
    """As :func:`entries_in`. Raises InputError where it may not be searched."""
    with _searching(folder):
        return entries_in(folder, Tally() if tally is None else tally, is_below)


@contextlib.contextmanager
def _searching(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(f"{printable(folder)} cannot be searched ({error.strerror}): check its permissions") from error


def class_folders(folder: Path) -> list[str]:
    """The names of the folders in ``folder``, sorted."""
    return [entry.name for entry in list_folder(folder) if entry.is_folder]


def has_images(folder: Path) -> bool:
    """Whether pictures lie in ``folder`` itself."""
    with _searching(folder):
        return any(entry.is_image for entry in scan_folder(folder, Tally()))


def is_empty(folder: Path) -> bool:
    """Whether there is nothing in ``folder`` and below it but what other programs left."""
    tally = Tally()
    return next(_images_in_and_below(folder, tally), None) is None and not tally.left_out


def join_names(names: Sequence[str], most: int = 3) -> str:
    """``names`` in a few words."""
    shown = ", ".join(printable(name) for name in names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


# ---- splits ----


def _splits_of(root: Path, folders: Sequence[str]) -> dict[Role, Path | None]:
    """The splits in ``root``. Raises InputError for two of one kind, and for classes beside them."""
    by_role: dict[Role, list[str]] = {}
    for name in folders:
        if role := role_of(name):
            by_role.setdefault(role, []).append(name)
    splits: dict[Role, Path | None] = {}
    for role, names in by_role.items():
        filled = [name for name in names if _has_images_below(root / name)] or names
        if len(filled) > 1:
            raise InputError(
                f"{printable(root)} can be read in two ways, with {_join(filled[:1])} or with {_join(filled[1:])}"
                f" as {_MEANING[role]}: remove one, or move it out of there"
            )
        splits[role] = root / filled[0]
    for split in ("train", "val"):
        if split not in splits and has_archive(root, split):
            splits[split] = None
    if splits:
        _refuse_classes_beside(root, [path.name for path in splits.values() if path is not None], folders)
    return splits


def _refuse_classes_beside(root: Path, splits: Sequence[str], folders: Sequence[str]) -> None:
    beside = [name for name in folders if role_of(name) is None and _has_images_below(root / name)]
    if splits and beside:
        raise InputError(
            f"{printable(root)} can be read in two ways, with {_join(splits)} as parts of a set, or as classes"
            f" beside {_join(beside)}: move {_join(beside)} out of there, or rename {_join(splits)}"
        )


def _join(names: Sequence[str]) -> str:
    return join_names([f"{name}/" for name in names])


def _wraps_a_split(here: Path, splits: Mapping[Role, Path | None], entries: Sequence[Entry]) -> bool:
    """Whether ``here`` is itself called by the name of the only split in it, as in ``train/train``."""
    role = role_of(here.resolve().name)
    return role is not None and set(splits) == {role} and _only_folder_of_folders(here, entries) is not None


def _unwrap_split(split: Path, role: Role) -> Path:
    """The folder that has the classes of a split in it. Raises InputError where it has splits in it, too."""
    for _ in range(_DEEPEST):
        entries = list_folder(split)
        inner = _only_folder_of_folders(split, entries)
        inside = [entry.name for entry in entries if entry.is_folder and role_of(entry.name)]
        usual = {*_WRAPPERS, split.parent.name.casefold()}
        if inner is None or (role_of(inner.name) != role and inner.name.casefold() not in usual):
            _refuse_splits_inside(split, inside)
            return split
        split = inner
    return split


def _refuse_splits_inside(split: Path, inside: Sequence[str]) -> None:
    deep = [name for name in inside if not has_images(split / name) and _has_images_below(split / name)]
    if deep:
        raise InputError(
            f"{printable(split)} can be read in two ways, {_join(deep)} in it as classes or as splits: name the"
            f" folder that is meant, such as {printable(split / deep[0])}"
        )


# ---- folders within folders ----


def _only_folder_of_folders(here: Path, entries: Sequence[Entry]) -> Path | None:
    """The one folder in ``here`` with pictures below it, where these lie in folders of its own; else None."""
    if any(entry.is_image for entry in entries):
        return None
    filled = (entry.name for entry in entries if entry.is_folder and _has_images_below(here / entry.name))
    first, second = next(filled, None), next(filled, None)
    if first is None or second is not None or has_images(here / first):
        return None
    return here / first


def _refuse_parts_of_a_set(root: Path, folders: Sequence[str]) -> None:
    """Raises InputError where all ``folders`` have no pictures but the same folders of pictures in them."""
    shared: set[str] | None = None
    for name in folders:
        entries = list_folder(root / name)
        if any(entry.is_image for entry in entries):
            return
        inside = {e.name for e in entries if e.is_folder and _has_images_below(root / name / e.name)}
        shared = inside if shared is None else shared & inside
        if len(shared) < 2:
            return
    if shared and len(folders) > 1:
        raise InputError(
            f"{printable(root)} can be read in two ways, with the classes {join_names(folders)}, or with these as parts"
            f" of a set with the classes {join_names(sorted(shared))}: name one of them, or call them train/ and val/;"
            " if they are the classes, put their pictures into them directly"
        )


def _has_images_below(folder: Path) -> bool:
    return next(_images_in_and_below(folder, Tally()), None) is not None


def _images_in_and_below(folder: Path, tally: Tally) -> Iterator[Entry]:
    """The pictures as they come, so that one may stop at the first."""
    waiting = [folder]
    while waiting:
        here = waiting.pop()
        with _searching(here):
            for entry in scan_folder(here, tally):
                if entry.is_image:
                    yield entry
                elif not (here / entry.name).is_symlink():  # Not through links, which may lead in a circle.
                    waiting.append(here / entry.name)

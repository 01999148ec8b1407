"""Turns arguments of the command line into images that can be read one by one."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mgq.data.decoding import read_image
from mgq.data.folder_scan import IMAGE_SUFFIXES, Entry, Tally, entries_in, is_folder, is_left_by_programs
from mgq.data.image_limits import MAX_BYTES
from mgq.errors import InputError, printable
from mgq.events import OnMessage, log_message

__all__ = ["IMAGE_SUFFIXES", "Source", "expand", "expand_existing", "leave_out_absent", "refuse_hopeless"]


@dataclass(frozen=True, slots=True)
class Source:
    """Something that was asked for and may hold a picture. It is not opened before ``read``.

    ``text`` is its exact path; where an argument led to nothing, it is the argument, and ``problem`` the line that says
    so. Without either it is standard input. There may be millions of them: what can be made of the text is not kept.
    """

    text: str | None = None
    problem: str | None = None

    @property
    def name(self) -> str:
        """What it is called, printable and in one line."""
        return "standard input" if self.text is None else printable(self.text)

    @property
    def path(self) -> Path | None:
        """The path; None for standard input, and for an argument that led to nothing."""
        return None if self.text is None or self.problem is not None else Path(self.text)

    def read(self) -> npt.NDArray[np.uint8]:
        """The pixels, uint8 (H, W, 3) in BGR order. Raises InputError, as ``read_image`` does."""
        if self.problem is not None:
            raise InputError(self.problem)
        return read_image(self.path or _standard_input(), self.name)


def refuse_hopeless(sources: Sequence[Source]) -> None:
    """Raises InputError where none of the sources is there, or the only one, a file, has no picture in it: before more
    is loaded for them."""
    if len(sources) == 1 and sources[0].path is not None:
        sources[0].read()
    lines = [line for source in sources if (line := tell_absence(source)) is not None]
    if lines and len(lines) == len(sources):
        more = f" (and so on, {len(lines):,} in all)" if len(lines) > 1 else ""
        raise InputError(lines[0] + more)


def leave_out_absent(sources: Sequence[Source], on_message: OnMessage = log_message) -> list[Source]:
    """``sources`` without those that are not there; ``on_message`` gets a line for each of these: before long work."""
    found = []
    for source in sources:
        line = tell_absence(source)
        if line is None:
            found.append(source)
        else:
            on_message(line)
    return found


def expand_existing(arguments: Sequence[str], on_message: OnMessage = log_message) -> list[Source]:
    """The pictures that ``arguments`` name (:func:`expand`), without those that are not there.

    Raises InputError where none is.
    """
    sources = expand(arguments)
    refuse_hopeless(sources)
    return leave_out_absent(sources, on_message)


def tell_absence(source: Source) -> str | None:
    """Why there is nothing to read in ``source``; None where something is there, picture or not."""
    if source.problem is not None:
        return source.problem
    if source.path is None or os.path.lexists(source.path):
        return None
    try:
        source.read()
    except InputError as error:
        return str(error)
    return None


def expand(arguments: Sequence[str], on_message: OnMessage = log_message) -> list[Source]:
    """The pictures that ``arguments`` name, in their order, each once.

    An argument is one of these; what exists under that very name is preferred to a pattern:

    - a file, tried whatever its suffix;
    - a folder, searched with all below it for pictures, known by one of ``IMAGE_SUFFIXES`` or, where a suffix says
      nothing, by content, in the order of their names. What is hidden or left by other programs is passed over, what
      is no picture left out, and ``on_message`` gets both. Links are followed, and no folder is entered twice;
    - a pattern with ``*``, ``?``, ``[...]`` or ``**`` (any folders): the files and folders that match it;
    - ``-``: the bytes of one picture on standard input.

    Nothing is raised. An argument that leads to no picture gives a Source whose ``read`` says why, so that
    the others are still answered.
    """
    found: dict[str | None, Source] = {}
    real_folders: dict[str, str] = {}
    for argument in arguments:
        tally, has_some = Tally(), False
        for source in _sources(argument, tally):
            found.setdefault(_identity(source, real_folders), source)
            has_some = has_some or source.problem is None
        for line in tally.lines(printable(argument)) if has_some else []:
            on_message(line)
    return list(found.values())


def _identity(source: Source, real_folders: dict[str, str]) -> str | None:
    """Equal for two spellings of one path. Not for two links to one file, which someone made to be two."""
    if source.text is None or source.problem is not None:
        return source.problem and f"\0{source.problem}"  # as no path is
    folder, name = os.path.split(source.text)
    if folder not in real_folders:
        real_folders[folder] = os.path.realpath(folder)  # Path.resolve raises where links lead in a circle
    return f"{real_folders[folder]}{os.sep}{name}"


def _sources(argument: str, tally: Tally) -> Iterator[Source]:
    path = Path(argument)
    if argument == "-":
        yield Source()
    elif not argument:
        yield _make_problem(argument, "an empty name was given: name a picture, a folder or a pattern")
    elif is_folder(path):
        yield from _require_sources(
            _in_folder(path, tally), argument, "has no pictures in it", "name another folder", tally
        )
    elif _exists(path) or not _is_pattern(argument):
        yield _file(path)
    else:
        found = _of_pattern(path, tally)
        yield from _require_sources(found, argument, "matches no picture", "check the pattern", tally)


def _file(path: Path) -> Source:
    return Source(str(path))


def _make_problem(name: str, problem: str) -> Source:
    return Source(name, problem)


def _require_sources(
    sources: Iterator[Source], argument: str, problem: str, mend: str, tally: Tally
) -> Iterator[Source]:
    """``sources``, or one that tells of ``problem``, and of what there is instead, if there are none."""
    source = next(sources, None)
    if source is None:
        yield _make_problem(argument, f"{printable(argument)} {problem}{tally.as_clause()}: {mend}")
        return
    yield source
    yield from sources


# What cannot be looked at counts as absent here. If it was named, reading it tells what is wrong.


def _exists(path: Path) -> bool:
    try:
        path.lstat()
    except (OSError, ValueError):
        return False
    return True


# ---- folders ----


def _in_folder(top: Path, tally: Tally) -> Iterator[Source]:
    """The images in and below a folder, and a problem in the place of each folder that cannot be searched."""
    entered: set[tuple[int, int]] = set()
    waiting = [(top, True)]  # Not recursion: folders may be nested deeper than Python's stack.
    while waiting:
        path, is_folder = waiting.pop()
        if not is_folder:
            yield _file(path)
            continue
        try:
            inside = _list_folder(path, entered, tally)
        except OSError as error:
            problem = f"{printable(str(path))} cannot be searched ({error.strerror}): check its permissions"
            yield _make_problem(str(path), problem)
            continue
        waiting.extend((path / entry.name, entry.is_folder) for entry in reversed(inside))


def _folders_below(top: Path) -> Iterator[Path]:
    """``top`` and the folders below it that can be searched, by name."""
    entered: set[tuple[int, int]] = set()
    waiting = [top]
    while waiting:
        path = waiting.pop()
        try:
            inside = _list_folder(path, entered, Tally())
        except OSError:
            continue  # As in a shell: a pattern matches what can be seen.
        yield path
        waiting.extend(path / entry.name for entry in reversed(inside) if entry.is_folder)


def _list_folder(folder: Path, entered: set[tuple[int, int]], tally: Tally) -> list[Entry]:
    """The folders and pictures in a folder, by name; nothing if it was ``entered`` before (a loop of links)."""
    status = folder.stat()
    if (status.st_dev, status.st_ino) in entered:
        return []
    entered.add((status.st_dev, status.st_ino))
    return entries_in(folder, tally, is_below=len(entered) > 1)


# ---- patterns ----


def _is_pattern(text: str) -> bool:
    return any(character in text for character in "*?[")


def _of_pattern(pattern: Path, tally: Tally) -> Iterator[Source]:
    parts = pattern.parts
    paths = _matches(Path(parts[0]), parts[1:]) if pattern.is_absolute() else _matches(Path(), parts)
    for path in paths:
        if is_folder(path):
            yield from _in_folder(path, tally)
        else:
            yield _file(path)


def _matches(folder: Path, parts: tuple[str, ...]) -> Iterator[Path]:
    """The paths below ``folder`` that match ``parts``, by name.

    Written out because ``glob.glob`` follows loops of links under ``**`` until the system stops it, and
    ``Path.glob`` follows no links there.
    """
    if not parts:
        yield folder
        return
    first, rest = parts[0], parts[1:]
    if first == "**":
        # At the end of a pattern it stands for the folder, which is searched to the bottom anyway.
        for below in _folders_below(folder) if rest else [folder]:
            yield from _matches(below, rest)
    elif _is_pattern(first):
        for name in _names_in(folder):
            is_shown = first.startswith(".") or not is_left_by_programs(name)
            if is_shown and fnmatchcase(name, first):
                yield from _continue_path(folder / name, rest)
    else:
        yield from _continue_path(folder / first, rest)


def _continue_path(path: Path, rest: tuple[str, ...]) -> Iterator[Path]:
    if is_folder(path) or (not rest and _exists(path)):
        yield from _matches(path, rest)


def _names_in(folder: Path) -> list[str]:
    try:
        return sorted(path.name for path in folder.iterdir())
    except OSError:
        return []  # As in a shell: a pattern matches what can be seen.


# ---- standard input ----


def _standard_input() -> bytes:
    if sys.stdin.isatty():
        raise InputError("standard input is a terminal: send a picture to it, as in `mgq infer - < cat.jpg`")
    if not (data := sys.stdin.buffer.read(MAX_BYTES + 1)):
        raise InputError("standard input is empty: send a picture to it, as in `mgq infer - < cat.jpg`")
    return data

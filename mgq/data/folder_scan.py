"""Lists a folder: folders, images by suffix or content, and other files, which are counted and named."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from mgq.data.decoding import HEAD_BYTES, begins_as_image
from mgq.errors import plural, printable

IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".webp", ".gif", ".bmp", ".dib", ".tif", ".tiff"),
    *(".avif", ".avifs", ".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx", ".pbm", ".pgm", ".ppm", ".pnm", ".pam"),
    *(".tga", ".icb", ".vda", ".vst", ".pcx", ".sgi", ".rgb", ".rgba", ".bw", ".ras", ".qoi"),
)
"""The suffixes, in lower case, by which a picture is known in a folder. A file with none of them is known by content,
unless its suffix says that it is something else."""

_SUFFIXES = frozenset(IMAGE_SUFFIXES)
_REASONS = {
    "HEIF is not read: save as JPEG": (".heic .heif .hif .heics",),
    "camera raw is not read: save as JPEG": (
        ".dng .nef .nrw .cr2 .cr3 .crw .arw .srf .sr2 .orf .rw2 .raf .pef .srw .3fr .raw",
    ),
    "drawings and pages are not read: save as PNG": (".svg .svgz .eps .ps .ai .wmf .emf .pdf .djvu",),
    "not read: save as PNG": (
        ".psd .psb .xcf .ico .cur .icns .dds .exr .hdr .pfm .jxl .jxr .wdp .fits .dcm .nii .bpg .flif",
    ),
    "video is not read: save its frames": (".mp4 .mov .m4v .avi .mkv .webm .mpg .mpeg .wmv .3gp .ts .flv",),
    "archives are not read: unpack them": (".zip .tar .gz .tgz .bz2 .xz .7z .rar .tfrecord .lmdb .rec",),
    "": (
        ".txt .md .rst .json .jsonl .xml .csv .tsv .xls .xlsx .yaml .yml .toml .ini .cfg .html .htm .css .js .py",
        ".ipynb .sh .bat .r .m .npy .npz .mat .pkl .pickle .h5 .hdf5 .pt .pth .ckpt .onnx .safetensors .db .sqlite",
        ".log .doc .docx .odt .rtf .ppt .pptx .wav .mp3 .xmp .aae .thm .lock .cache .sum .md5 .sha256 .license",
    ),
}
_NO_IMAGES = {suffix: reason for reason, lines in _REASONS.items() for line in lines for suffix in line.split()}
"""What is no picture by its suffix, and why it is left out, where that is not plain."""

_LEFT_FOLDERS = frozenset(
    {
        *("__macosx", "@eadir", "@tmp", "@recycle", "#recycle", "#snapshot", "$recycle.bin", "recycler"),
        *("system volume information", "lost+found", "thumbnails", "__pycache__"),
    }
)
_LEFT_FILES = frozenset({"thumbs.db", "ehthumbs.db", "ehthumbs_vista.db", "desktop.ini", "picasa.ini", "icon\r"})
_LEFT_SUFFIXES = ("~", ".bak", ".orig", ".tmp", ".temp", ".part", ".crdownload", ".swp", "_original")
_UNIMAGED = "without a suffix"

OUTSIDE = "outside the class folders"
"""What pictures are called that lie where folders are looked for."""


class Entry(NamedTuple):
    """Something in a folder that counts."""

    name: str
    is_folder: bool
    is_image: bool


@dataclass
class Tally:
    """What was met in folders and does not count: ``passed`` is what other programs left, ``left_out`` all else."""

    passed: Counter[str] = field(default_factory=Counter)
    left_out: Counter[str] = field(default_factory=Counter)

    def add(self, other: Tally) -> None:
        self.passed.update(other.passed)
        self.left_out.update(other.left_out)

    def describe(self) -> str:
        """What there is in the place of pictures: ``3 .heic (...), 2 .txt``; nothing where there is nothing."""
        return _format_counts(self.left_out + self.passed, with_reason=True)

    def as_clause(self) -> str:
        """The description as a clause: ``, but ...``; empty where there is nothing."""
        return f", but {self.describe()}" if self.describe() else ""

    def lines(self, name: str) -> list[str]:
        """Two lines at the most about the folder ``name``."""
        found = []
        if self.passed:
            found.append(f"{name}: passed over what other programs left there: {_format_counts(self.passed)}")
        if self.left_out:
            number = self.left_out.total()
            found.append(
                f"{name}: left out {plural(number, 'file', ',')}: {_format_counts(self.left_out, with_reason=True)}"
            )
        return found


_MOST_LISTED = 6
EMPTY_CLASS = "empty folder "
"""Before the name of a folder that would be a class, if there were anything in it."""


def _format_counts(counts: Counter[str], with_reason: bool = False) -> str:
    """The most frequent of ``counts``, but first the folders that might have been classes."""
    ordered = sorted(counts.items(), key=lambda item: (not item[0].startswith(EMPTY_CLASS), -item[1]))
    shown = [_format_count(label, count, with_reason) for label, count in ordered[:_MOST_LISTED]]
    rest = counts.total() - sum(count for _, count in ordered[:_MOST_LISTED])
    return ", ".join(shown) + (f" and {rest:,} more" if rest else "")


def _format_count(label: str, count: int, with_reason: bool) -> str:
    reason = _NO_IMAGES.get(label, "") if with_reason else ""
    name = printable(label)
    counted = plural(count, name, ",") if label.startswith(("empty", "hidden")) else f"{count:,} {name}"
    return counted + (f" ({reason})" if reason else "")


def entries_in(folder: Path, tally: Tally, is_below: bool = True) -> list[Entry]:
    """The folders and pictures in ``folder``, by name; what else is there goes to ``tally``, and so does the folder
    where it is empty and ``is_below`` the one that is searched. Raises OSError."""
    others = tally.left_out.total()
    found = sorted(scan_folder(folder, tally))
    if is_below and not found and tally.left_out.total() == others:
        tally.passed["empty folder"] += 1
    return found


def scan_folder(folder: Path, tally: Tally) -> Iterator[Entry]:
    """The folders and pictures in ``folder`` as they come, so that one may stop early. Raises OSError."""
    with os.scandir(folder) as entries:
        for entry in entries:
            name = entry.name
            # Most files are plain: of a set of a million pictures each microsecond here is a second.
            if _suffix(name) in _SUFFIXES and name[0] != "." and entry.is_file(follow_symlinks=False):
                yield Entry(name, False, True)
            elif (left := _name_leftover(entry)) is not None:
                tally.passed[left] += 1
            elif (kind := _entry_of(entry)).is_folder or kind.is_image:
                yield kind
            elif _is_file(entry):
                tally.left_out[_label(entry)] += 1


def _suffix(name: str) -> str:
    """In lower case, with its dot; the last letter where there is none."""
    return name[name.rfind(".") :].lower()


def is_image_file(path: Path) -> bool:
    """Whether ``path`` counts as a picture where it is met in a folder."""
    name = path.name.lower()
    if name.endswith(IMAGE_SUFFIXES):
        return True
    return path.suffix.lower() not in _NO_IMAGES and _begins_as_image(path)


def is_left_by_programs(name: str) -> bool:
    """Whether ``name`` is hidden, or such as operating systems and tools leave."""
    lower = name.lower()
    return name.startswith(".") or lower in _LEFT_FILES or lower in _LEFT_FOLDERS or lower.endswith(_LEFT_SUFFIXES)


def _name_leftover(entry: os.DirEntry[str]) -> str | None:
    """What it is called in the count, where an operating system or a tool left it; None where it counts."""
    name = entry.name
    if name.startswith("."):
        if name.startswith("._"):
            return "._*"
        return name if name in _HIDDEN or entry.is_dir(follow_symlinks=False) else "hidden file"
    lower = name.lower()
    if lower in _LEFT_FILES or lower in _LEFT_FOLDERS:
        is_folder = entry.is_dir(follow_symlinks=False)
        return name if is_folder == (lower in _LEFT_FOLDERS) else None
    if lower.endswith(_LEFT_SUFFIXES) and not entry.is_dir(follow_symlinks=False):
        return next(f"*{suffix}" for suffix in _LEFT_SUFFIXES if lower.endswith(suffix))
    return None


_HIDDEN = frozenset(
    {".DS_Store", ".localized", ".gitignore", ".gitattributes", ".gitkeep", ".picasa.ini", ".directory"}
)


def _entry_of(entry: os.DirEntry[str]) -> Entry:
    """A broken link with an image's suffix counts as an image, so that it is reported; a pipe does not."""
    is_link = entry.is_symlink()
    if is_folder(Path(entry.path)) if is_link else entry.is_dir():
        return Entry(entry.name, True, False)
    if not (is_link or entry.is_file()):
        return Entry(entry.name, False, False)
    return Entry(entry.name, False, is_image_file(Path(entry.path)))


def _begins_as_image(path: Path) -> bool:
    try:
        if not path.is_file():
            return False  # A link to a pipe would be waited for without end.
        with path.open("rb") as file:
            return begins_as_image(file.read(HEAD_BYTES))
    except OSError:
        return False


def _is_file(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_file()
    except OSError:
        return False


def _label(entry: os.DirEntry[str]) -> str:
    suffix = Path(entry.name).suffix.lower()
    if suffix in _NO_IMAGES:
        return suffix
    try:
        if not entry.stat().st_size:
            return "empty file"
    except OSError:
        pass
    return suffix or _UNIMAGED


def is_folder(path: Path) -> bool:
    """Whether it is one, or a link to one; what cannot be looked at is none."""
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False

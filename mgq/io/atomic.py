"""Writes files atomically: whenever the machine stops, a file is the old one or the new one, whole."""

from __future__ import annotations

import contextlib
import errno
import glob
import os
import re
import secrets
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path

from mgq.errors import FailureError, InputError, MgqError, printable

# What the user can put right by naming another place. Anything else the system says is a failure.
_WRONG_PLACE = frozenset(
    {
        errno.EACCES,
        errno.EPERM,
        errno.EROFS,
        errno.ENOENT,
        errno.ENOTDIR,
        errno.EISDIR,
        errno.EEXIST,
        errno.ELOOP,
        errno.ENAMETOOLONG,
    }
)
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
# Filesystems that cannot sync a folder, and folders that may be written but not read.
_NO_FOLDER_SYNC = frozenset({errno.EINVAL, errno.ENOTSUP, errno.EACCES, errno.EPERM})
_ELSEWHERE = "choose another place"
_LONGEST_NAME = 255  # bytes, on every common filesystem
# numpy reports a short write in words alone, with no error number.
_SHORT_WRITE = re.compile(r"\d+ requested and \d+ written")


def write_error(path: Path, error: OSError, mend: str = _ELSEWHERE) -> MgqError:
    """The one-line error for what the system said when ``path`` was to be written. It ends in ``mend``.

    A wrong place (read-only, not a folder, too long a name, ...) is an InputError. A full disk, a used-up
    quota and a broken disk are a FailureError. The caller raises it ``from error``.
    """
    if error.errno in _FULL:
        return _full_disk_error(path, mend)
    if error.errno == errno.ENOENT:
        return InputError(f"cannot write {printable(path)}: its folder does not exist: make it, or {mend}")
    why = os.strerror(error.errno) if error.errno else printable(error)
    kind = InputError if error.errno in _WRONG_PLACE else FailureError
    return kind(f"cannot write {printable(path)}: {why}: {mend}")


@contextlib.contextmanager
def explain_write_errors(path: Path, mend: str = _ELSEWHERE) -> Iterator[None]:
    """Turns an OSError inside into :func:`write_error` of ``path``. Wrap file operations alone in it."""
    try:
        yield
    except OSError as error:
        raise write_error(path, error, mend) from error


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yields a temporary path in the folder of ``path``; what is written there becomes ``path`` at the end.

    The temporary is an empty file named ``.NAME.PID-RANDOM.part``. When the block ends well it is synced to
    the disk and renamed over ``path``, and the folder is synced. On any exception, KeyboardInterrupt
    included, it is removed and an older file at ``path`` is as it was. Only a killed process leaves a
    temporary behind, and an older file is as it was then, too.

    A symbolic link at ``path`` is followed. An older file's permissions are kept. The temporary does not end
    as ``path`` does: give an open file to writers that choose a format, or an ending, by the name.

    Raises InputError when ``path`` is a folder or a device, or its folder cannot be written; FailureError
    when the disk is full, also when a write in the block found it so. Other exceptions of the block pass.
    """
    target = Path(os.path.realpath(path))
    old_mode = _mode_to_keep(path, target)
    temporary = _temporary_beside(target)
    try:
        with explain_write_errors(path):
            drop_abandoned(target)
            _make_empty(temporary)
            mode = stat.S_IMODE(temporary.stat().st_mode) if old_mode is None else old_mode
        try:
            yield temporary
        except Exception as error:
            if says_disk_full(error):
                raise _full_disk_error(path) from error
            raise
        with explain_write_errors(path):
            # After the block, for a writer may have put a file of its own there. Some filesystems refuse
            # every chmod, so only where it changes something.
            if stat.S_IMODE(temporary.stat().st_mode) != mode:
                temporary.chmod(mode)
            put_in_place(temporary, target)
    except BaseException:
        with contextlib.suppress(OSError):  # the error under way says more than a failed clean-up
            temporary.unlink()
        raise


@contextlib.contextmanager
def atomic_output(path: Path) -> Iterator[Path]:
    """As :func:`atomic_write`, for a file that a user names: its folder is made where there is none, and taken away
    again where the block fails."""
    with make_folder_for(path), atomic_write(path) as temporary:
        yield temporary


@contextlib.contextmanager
def make_folder_for(path: Path, mend: str = "choose another folder") -> Iterator[None]:
    """Makes the folder of ``path``, which the block writes; takes away what it made where the block fails or is
    interrupted. Raises as :func:`ensure_writable_folder` does."""
    folder = path.absolute().parent
    missing = list_missing(folder)
    try:
        ensure_writable_folder(folder, mend)
        yield
    except BaseException:
        remove_empty(missing)
        raise


def refuse_unwritable_folder(path: Path, mend: str = "choose another folder") -> None:
    """Raise as :func:`ensure_writable_folder` does, and leave no folder that was not there: before long work."""
    missing = list_missing(path)
    try:
        ensure_writable_folder(path, mend)
    finally:
        remove_empty(missing)


def list_missing(folder: Path) -> list[Path]:
    """``folder`` and those above it that are not there, from below."""
    return [path for path in (folder, *folder.parents) if not path.exists()]


def remove_empty(folders: Iterable[Path]) -> None:
    with contextlib.suppress(OSError):
        for folder in folders:
            folder.rmdir()


def write_bytes_atomically(path: Path, data: bytes) -> None:
    """Makes ``path`` hold ``data``, or leaves it as it was. Raises as :func:`atomic_write` does."""
    with atomic_write(path) as temporary:
        temporary.write_bytes(data)


def write_text_atomically(path: Path, text: str) -> None:
    """Makes ``path`` hold ``text`` in UTF-8 with its newlines unchanged, or leaves it as it was."""
    write_bytes_atomically(path, text.encode("utf-8"))


def write_text_output(path: Path, text: str) -> None:
    """As :func:`write_text_atomically`, for a file that a user names: see :func:`atomic_output`."""
    with make_folder_for(path):
        write_text_atomically(path, text)


def put_in_place(temporary: Path, path: Path) -> None:
    """Syncs ``temporary``, renames it over ``path`` in the same folder, syncs the folder. Raises OSError."""
    _sync(temporary)
    temporary.replace(path)
    try:
        _sync(path.parent)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC:
            raise


def drop_abandoned(path: Path) -> None:
    """Delete half-written files beside ``path`` whose processes have ended. Raises nothing."""
    _drop_ownerless(path.parent, f".{glob.escape(path.name)}.*.part")


def drop_abandoned_in(folder: Path) -> None:
    """Delete half-written files in ``folder`` whose processes have ended. Raises nothing."""
    _drop_ownerless(folder, ".*.part")


def _drop_ownerless(folder: Path, pattern: str) -> None:
    with contextlib.suppress(OSError):
        for part in folder.glob(pattern):
            owner = part.name.rpartition(".part")[0].rpartition(".")[2].partition("-")[0]
            if owner.isdecimal() and not _is_alive(int(owner)):
                with contextlib.suppress(OSError):
                    part.unlink()


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        pass
    return True


def ensure_writable_folder(path: Path, mend: str = "choose another folder") -> Path:
    """Makes the folder ``path`` and its parents, tries an empty file in it, and returns ``path``.

    Raises InputError, one line that ends in ``mend``, when it cannot be made or written, and FailureError
    when the disk is full or broken.
    """
    probe = _temporary_beside(path / "folder")
    try:
        path.mkdir(parents=True, exist_ok=True)
        _make_empty(probe)
        probe.unlink()
    except FileExistsError as error:
        raise InputError(f"{printable(path)} is a file, not a folder: {mend}") from error
    except OSError as error:
        if error.errno not in _WRONG_PLACE:
            raise write_error(path, error, mend) from error
        why = os.strerror(error.errno)
        raise InputError(f"cannot write in the folder {printable(path)}: {why}: {mend}") from error
    return path


def _mode_to_keep(path: Path, target: Path) -> int | None:
    """The permission bits of the file that is to be replaced, None where there is none."""
    with explain_write_errors(path):
        try:
            mode = target.stat().st_mode
        except FileNotFoundError:
            return None
    if not stat.S_ISREG(mode):
        what = "a folder" if stat.S_ISDIR(mode) else "a device or pipe"
        raise InputError(f"cannot write {printable(path)}: it is {what}: give the name of a file")
    return stat.S_IMODE(mode)


def _temporary_beside(target: Path) -> Path:
    """A name in the folder of ``target`` that no other process has."""
    ending = f".{os.getpid()}-{secrets.token_hex(8)}.part"
    start = os.fsencode(target.name)[: _LONGEST_NAME - 1 - len(ending)].decode(errors="ignore")
    return target.parent / f".{start}{ending}"


def _make_empty(path: Path) -> None:
    # 0o666 less the umask, as for any new file: tempfile's would be closed to everybody else for good.
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def says_disk_full(error: BaseException | None) -> bool:
    """Whether ``error`` is what a full disk, or a used-up quota, has made of a write."""
    if isinstance(error, MgqError):
        return False
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in _FULL
    # A writer in another language, such as safetensors, wraps the system's words in its own exception.
    text = str(error)
    return any(os.strerror(number) in text for number in _FULL) or bool(_SHORT_WRITE.fullmatch(text))


def _full_disk_error(path: Path, mend: str = _ELSEWHERE) -> FailureError:
    why = "the disk or your quota is full"
    return FailureError(f"cannot write {printable(path)}: {why}: free some space, or {mend}")

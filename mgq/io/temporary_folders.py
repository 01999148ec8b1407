"""Temporary folders that do not stay: what a killed process left behind is removed by the next one that makes one."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from mgq.errors import FailureError, InputError, printable
from mgq.io.atomic import says_disk_full

PREFIX = "mgq-"
_MARK = ".temporary-folder-of-mgq"
"""A file in each, which its user has locked. What has none is somebody's own folder."""
_PROBE = 1 << 16
_MEND = "free some space there, or let TMPDIR name a folder with more"


@contextlib.contextmanager
def temporary_folder() -> Iterator[Path]:
    """A new folder, which is removed at the end of the block, whatever ends that.

    Its user holds a lock on it, which the system lets go of when the process ends, however it ends: so whatever makes
    the next folder, on any later day, also removes those that nobody holds. Raises InputError where none can be made,
    FailureError where the block fails and its disk is full.
    """
    with contextlib.ExitStack() as stack:
        folder = _make_folder(stack)
        try:
            yield folder
        except InputError:
            raise
        except Exception as error:
            if _is_full(folder) or (str(folder) in str(error) and says_disk_full(error.__cause__)):
                raise FailureError(f"{printable(folder.parent)}, for temporary files, is full: {_MEND}") from error
            raise
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            drop_abandoned_folders()


def drop_abandoned_folders() -> None:
    """Remove this user's temporary folders whose processes have ended. Raises nothing."""
    with contextlib.suppress(OSError), os.scandir(tempfile.gettempdir()) as entries:
        for entry in entries:
            if entry.name.startswith(PREFIX) and entry.is_dir(follow_symlinks=False):
                _drop_if_abandoned(Path(entry.path))


def _make_folder(stack: contextlib.ExitStack) -> Path:
    """A new folder that is locked until ``stack`` ends."""
    while True:
        try:
            folder = Path(tempfile.mkdtemp(prefix=PREFIX))
        except OSError as error:
            why = error.strerror or printable(error)
            raise InputError(f"no folder for temporary files can be made: {why}: {_MEND}") from error
        try:
            stack.enter_context(_hold(folder / _MARK, os.O_CREAT))
        except BlockingIOError:  # Another process takes it for abandoned, which it was not yet.
            continue
        except OSError:  # There are no locks here, so that nobody removes it.
            return folder
        if folder.exists():
            return folder


def _is_full(folder: Path) -> bool:
    try:
        (folder / "probe").write_bytes(bytes(_PROBE))
    except OSError as error:
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return False


def _drop_if_abandoned(folder: Path) -> None:
    with contextlib.suppress(OSError), _hold(folder / _MARK, 0):
        if folder.stat().st_uid == os.geteuid():
            shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _hold(mark: Path, creation: int) -> Iterator[None]:
    """Holds the lock of ``mark``. Raises OSError where there is none, or another process has it."""
    try:
        import fcntl
    except ImportError:
        raise OSError("this system has no such locks") from None
    descriptor = os.open(mark, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | creation, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)

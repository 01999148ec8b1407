"""Locks files and folders, so that one process at a time writes them.

The system lets go of a lock when its process ends, however it ends. A lock is a file beside what it guards, which may
be renamed, and stays there, unless the process that has it takes it away.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from mgq.io.atomic import write_error

if TYPE_CHECKING:
    import filelock

POLL_S = 0.25


def take_lock(path: Path, mend: str, wait_s: float = 0.0) -> filelock.BaseFileLock | None:
    """The lock of ``path``, taken; None where another process has it for ``wait_s`` seconds.

    Raises as :func:`mgq.io.atomic.write_error` says where its file cannot be written; the line ends in ``mend``.
    """
    import filelock

    lock = filelock.FileLock(path.with_name(f".{path.name}.lock"))
    try:
        lock.acquire(timeout=wait_s)
    except filelock.Timeout:
        return None
    except OSError as error:
        raise write_error(path, error, mend) from error
    return lock


def drop_lock(lock: filelock.BaseFileLock) -> None:
    """Release ``lock`` and take its file away: where what it guards was not made.

    Another process that waits for the lock finds out, when it has it, that the file is gone, and makes a new one.
    """
    with contextlib.suppress(OSError):
        Path(lock.lock_file).unlink()
    lock.release()


@contextlib.contextmanager
def hold_lock(path: Path, mend: str, on_wait: Callable[[], None]) -> Iterator[None]:
    """Holds the lock of ``path``. While another process has it, ``on_wait`` is called now and then."""
    while (lock := take_lock(path, mend, POLL_S)) is None:
        on_wait()
    try:
        yield
    finally:
        lock.release()

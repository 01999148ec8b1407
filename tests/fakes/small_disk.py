"""A disk that is soon full, and the one line that an error is."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mgq.errors import MgqError
from tests.fakes.places import ROOT

NO_MOUNT = 77


def the_line(caught: pytest.ExceptionInfo[MgqError]) -> str:
    """The message, which must be one line."""
    message = str(caught.value)
    assert message
    assert message.isprintable()
    return message


def run_on_small_disk(folder: Path, script: str, options: str = "size=64k") -> str:
    """What ``script`` prints, run with ``folder`` as a disk of its own that nobody else sees."""
    unshare = ["unshare", "-m" if os.geteuid() == 0 else "-rm"]
    shell = f'mount -t tmpfs -o "$1" none "$2" || exit {NO_MOUNT}; exec "$3" -c "$4" "$2"'
    command = [*unshare, "sh", "-c", shell, "sh", options, str(folder), sys.executable, script]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    except FileNotFoundError:
        pytest.skip("there is no unshare to make a small disk with")
    if done.returncode == NO_MOUNT or "unshare failed" in done.stderr:
        pytest.skip(f"mounting a small disk is not allowed here: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    return done.stdout

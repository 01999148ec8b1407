"""Commands in processes of their own, to be stopped or killed."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ARCH = "shufflenet_v1_x0_5_g3"


def started(verb: str, folder: Path, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "mgq", verb, *options]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def waited_for(condition: Callable[[], bool], child: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 60
    while not condition() and child.poll() is None and time.monotonic() < end:
        time.sleep(0.01)


def lines_of(path: Path) -> int:
    return len(path.read_text().splitlines()) if path.exists() else 0

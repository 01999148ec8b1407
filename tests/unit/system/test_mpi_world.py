"""What becomes of the launcher of `--jobs`, and of what it starts, when `mgq` is ended."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import pytest

from tests.fakes.places import ROOT

LAUNCHER = """#!/bin/sh
trap 'echo ended > {folder}/ended; exit 130' TERM
echo $$ > {folder}/part && mv {folder}/part {folder}/leader
while :; do sleep 0.1; done
"""
RUN = (
    "import sys; from pathlib import Path; from mgq.system import mpi_world\n"
    "folder = Path(sys.argv[1])\n"
    "mpi_world.find_launcher = lambda: str(folder / 'launcher')\n"
    "mpi_world.find_spec = lambda name: True\n"
    "sys.exit(mpi_world.run_jobs(1, [], folder))\n"
)
PATIENCE_S = 60


@pytest.fixture
def jobs(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[bytes], psutil.Process]]:
    """A process that runs jobs, and its launcher, which takes their signals itself."""
    launcher = tmp_path / "launcher"
    launcher.write_text(LAUNCHER.format(folder=tmp_path))
    launcher.chmod(0o755)
    child = subprocess.Popen([sys.executable, "-c", RUN, str(tmp_path)], cwd=ROOT)
    end = time.monotonic() + PATIENCE_S
    while not (tmp_path / "leader").exists() and time.monotonic() < end:
        time.sleep(0.05)
    started = psutil.Process(int((tmp_path / "leader").read_text()))
    yield child, started
    child.kill()
    child.wait()
    if started.is_running():
        started.kill()


def test_a_launcher_does_not_outlive_the_command_that_is_killed(
    jobs: tuple[subprocess.Popen[bytes], psutil.Process],
) -> None:
    child, launcher = jobs
    child.kill()
    child.wait()
    assert psutil.wait_procs([launcher], timeout=PATIENCE_S) == ([launcher], [])


def test_a_terminal_that_is_closed_ends_jobs_in_order(
    jobs: tuple[subprocess.Popen[bytes], psutil.Process], tmp_path: Path
) -> None:
    child, _ = jobs
    child.send_signal(signal.SIGHUP)
    assert child.wait(PATIENCE_S) == 130 and (tmp_path / "ended").exists()

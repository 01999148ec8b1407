"""A verb that is not shared: the first process has what all were given, and the others take nothing from it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mgq.machine import usable_cores
from mgq.system.mpi_world import find_launcher

pytestmark = pytest.mark.skipif(find_launcher() is None, reason="needs MPI: pip install 'mgq[mpi]'")


def run_bound(folder: Path, *cores: str) -> subprocess.CompletedProcess[str]:
    """One rank on each of ``cores``, which works alone into ``folder``."""
    launcher = find_launcher()
    assert launcher is not None
    command = [sys.executable, "-m", "tests.fakes.rank_alone", str(folder)]
    words = [word for core in cores for word in (":", "-n", "1", "taskset", "-c", core, *command)]
    return subprocess.run([launcher, *words[1:]], capture_output=True, text=True, check=False)


@pytest.mark.skipif(usable_cores() < 2 or shutil.which("taskset") is None, reason="needs two cores, and taskset")
def test_the_first_rank_has_the_cores_of_all_and_the_others_sleep_until_it_has_ended(tmp_path: Path) -> None:
    first, second = sorted(os.sched_getaffinity(0))[:2]
    done = run_bound(tmp_path, str(first), str(second))
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "0").read_text()) == [first, second]
    assert json.loads((tmp_path / "1").read_text()) == {"first has ended": True, "MegEngine": False}

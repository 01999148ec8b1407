"""Supervisors of the ranks of a job, with workers that only pretend to compute."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from mgq.system.mpi_world import JOBS_VARIABLE
from mgq.system.supervision import WORKER_VARIABLE

WORKER = f"""#!{sys.executable}
import json, os, pathlib, socket, time
link = socket.socket(fileno=int(os.environ["{WORKER_VARIABLE}"])).makefile("rwb", buffering=0)
folder, rank = pathlib.Path(os.environ["FOLDER"]), os.environ["RANK"]

def wait_for(name):
    while not (folder / name).exists():
        time.sleep(0.05)

if rank == "0":
    (folder / "part").write_bytes(link.readline())
    (folder / "part").rename(folder / "hub")
    link.write(json.dumps({{"hosts": ["here", "here"]}}).encode() + b"\\n")
    wait_for("joined")
else:
    wait_for("hub")
    join = json.loads((folder / "hub").read_text())["hub"]
    link.write(json.dumps({{"hosts": ["here", "here"], "join": join}}).encode() + b"\\n")
    time.sleep(1)
    (folder / "joined").touch()
    time.sleep(2)
    (folder / "ended").touch()
"""
SUPERVISOR = """
import os, sys
from mgq.system.mpi_world import World
from mgq.system.supervision import supervise
sys.executable = os.environ["WORKER"]
sys.exit(supervise(World(int(os.environ["RANK"]), 2), []))
"""


def test_a_rank_that_ends_after_the_first_one_may_do_so(tmp_path: Path) -> None:
    """Once the first rank's work is done it says so; the others are not killed on their last steps."""
    worker = tmp_path / "worker"
    worker.write_text(WORKER)
    worker.chmod(0o755)
    common = {**os.environ, "FOLDER": str(tmp_path), "WORKER": str(worker), JOBS_VARIABLE: "2"}
    ranks = [subprocess.Popen([sys.executable, "-c", SUPERVISOR], env={**common, "RANK": rank}) for rank in ("0", "1")]
    assert [process.wait(30) for process in ranks] == [0, 0]
    assert (tmp_path / "ended").exists()

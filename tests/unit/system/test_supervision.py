"""Supervisors of the ranks of a job, with workers that only pretend to compute."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mgq.system.mpi_world import JOBS_VARIABLE
from mgq.system.supervision import SILENCE_S, WORKER_VARIABLE

WORKER = f"""#!{sys.executable}
import json, os, pathlib, signal, socket, sys, time
link = socket.socket(fileno=int(os.environ["{WORKER_VARIABLE}"])).makefile("rwb", buffering=0)
folder, rank = pathlib.Path(os.environ["FOLDER"]), os.environ["RANK"]

def wait_for(name):
    while not (folder / name).exists():
        time.sleep(0.05)

def stop_one(number):
    if rank == number:
        os.kill(os.getpid(), signal.SIGSTOP)
    for line in link:
        if "end" in json.loads(line):
            sys.exit("error: " + json.loads(line)["end"])

if rank == "0":
    (folder / "part").write_bytes(link.readline())
    (folder / "part").rename(folder / "hub")
    link.write(json.dumps({{"hosts": ["here", "here"]}}).encode() + b"\\n")
    wait_for("joined")
    if os.environ["STOPS"]:
        stop_one(os.environ["STOPS"])
else:
    wait_for("hub")
    join = json.loads((folder / "hub").read_text())["hub"]
    link.write(json.dumps({{"hosts": ["here", "here"], "join": join}}).encode() + b"\\n")
    time.sleep(1)
    (folder / "joined").touch()
    if os.environ["STOPS"]:
        stop_one(os.environ["STOPS"])
    time.sleep(2)
    (folder / "ended").touch()
"""
SUPERVISOR = """
import os, sys
from mgq.system import supervision
from mgq.system.mpi_world import World
sys.executable = os.environ["WORKER"]
supervision.SILENCE_S = float(os.environ["SILENCE"])
sys.exit(supervision.supervise(World(int(os.environ["RANK"]), 2), []))
"""


def run_ranks(folder: Path, stops: str = "", silence_s: float = SILENCE_S) -> tuple[list[int], str]:
    """Two supervisors with their workers, of which number ``stops`` is stopped: exit codes, and what all said."""
    worker = folder / "worker"
    worker.write_text(WORKER)
    worker.chmod(0o755)
    common = {**os.environ, "FOLDER": str(folder), "WORKER": str(worker), JOBS_VARIABLE: "2"}
    common |= {"STOPS": stops, "SILENCE": str(silence_s)}
    with (folder / "log").open("a") as log:
        ranks = [
            subprocess.Popen([sys.executable, "-c", SUPERVISOR], env={**common, "RANK": rank}, stderr=log)
            for rank in ("0", "1")
        ]
    return [process.wait(60) for process in ranks], (folder / "log").read_text()


def test_a_rank_that_ends_after_the_first_one_may_do_so(tmp_path: Path) -> None:
    """Once the first rank's work is done it says so; the others are not killed on their last steps."""
    assert run_ranks(tmp_path)[0] == [0, 0]
    assert (tmp_path / "ended").exists()


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_rank_that_is_stopped_from_outside_ends_all_with_one_line(rank: str, tmp_path: Path) -> None:
    codes, said = run_ranks(tmp_path, stops=rank, silence_s=2)
    assert codes == [1, 1], said
    assert said.count("error: ") == 1 and f"error: rank {rank} on here was stopped for 2 s (SIGSTOP)" in said

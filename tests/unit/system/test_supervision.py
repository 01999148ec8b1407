"""Supervisors of the ranks of a job, with workers that only pretend to compute."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mgq.system.mpi_world import JOBS_VARIABLE
from mgq.system.supervision import BEAT_S, SILENCE_S, WORKER_VARIABLE, Link

Process = subprocess.Popen[bytes]

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
            link.write(b'{{"spoken": true}}\\n')
            sys.exit("error: " + json.loads(line)["end"])

def kill_one(number):
    # The other one's MPI sees that first, and ends its process.
    if rank == number:
        wait_for("aborted")
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGKILL)
    (folder / "aborted").touch()
    os._exit(17)

if rank == "0":
    (folder / "part").write_bytes(link.readline())
    (folder / "part").rename(folder / "hub")
    link.write(json.dumps({{"hosts": ["here", "here"]}}).encode() + b"\\n")
    wait_for("joined")
    if os.environ["PAUSES"]:
        wait_for("on")
    if os.environ["STOPS"]:
        stop_one(os.environ["STOPS"])
    if os.environ["KILLS"]:
        kill_one(os.environ["KILLS"])
else:
    wait_for("hub")
    join = json.loads((folder / "hub").read_text())["hub"]
    link.write(json.dumps({{"hosts": ["here", "here"], "join": join}}).encode() + b"\\n")
    time.sleep(1)
    (folder / "joined").touch()
    if os.environ["PAUSES"]:
        wait_for("on")
    if os.environ["STOPS"]:
        stop_one(os.environ["STOPS"])
    if os.environ["KILLS"]:
        kill_one(os.environ["KILLS"])
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


def run_ranks(
    folder: Path,
    stops: str = "",
    silence_s: float = SILENCE_S,
    pause: Callable[[list[Process]], None] | None = None,
    kills: str = "",
) -> tuple[list[int], str]:
    """Two supervisors with their workers, of which number ``stops`` is stopped and ``kills`` killed: exit codes, and
    what all said.

    ``pause`` gets the supervisors once they know each other.
    """
    worker = folder / "worker"
    worker.write_text(WORKER)
    worker.chmod(0o755)
    common = {**os.environ, "FOLDER": str(folder), "WORKER": str(worker), JOBS_VARIABLE: "2"}
    common |= {"STOPS": stops, "KILLS": kills, "SILENCE": str(silence_s), "PAUSES": "yes" if pause else ""}
    with (folder / "log").open("a") as log:
        ranks = [
            subprocess.Popen([sys.executable, "-c", SUPERVISOR], env={**common, "RANK": rank}, stderr=log)
            for rank in ("0", "1")
        ]
    if pause is not None:
        while not (folder / "joined").exists():
            time.sleep(0.05)
        pause(ranks)
        (folder / "on").touch()
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


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_worker_whose_mpi_ends_it_is_not_to_blame(rank: str, tmp_path: Path) -> None:
    """Open MPI ends its process as soon as another one's connection is closed, before a supervisor has seen it."""
    codes, said = run_ranks(tmp_path, kills=rank)
    assert codes == [1, 1], said
    assert said.count("error: ") == 1 and f"error: rank {rank} on here was killed by SIGKILL" in said


def test_a_pause_of_all_supervisors_is_nobodys_silence(tmp_path: Path) -> None:
    """As on a machine with far too much to do: who did not run himself could hear nobody."""

    def pause(ranks: list[Process]) -> None:
        time.sleep(2 * BEAT_S)
        for process in ranks:
            process.send_signal(signal.SIGSTOP)
        time.sleep(5)
        for process in ranks:
            process.send_signal(signal.SIGCONT)
            time.sleep(BEAT_S)

    codes, said = run_ranks(tmp_path, silence_s=4, pause=pause)
    assert codes == [0, 0], said


def test_a_supervisor_that_is_stopped_alone_ends_all_with_one_line(tmp_path: Path) -> None:
    def stop(ranks: list[Process]) -> None:
        time.sleep(2 * BEAT_S)
        ranks[1].send_signal(signal.SIGSTOP)
        ranks[0].wait(60)
        ranks[1].kill()

    codes, said = run_ranks(tmp_path, silence_s=2, pause=stop)
    assert codes[0] == 1 and said.count("error: ") == 1 and "rank 1 on here gave no sign for 2 s" in said


@contextmanager
def link_to_process(program: str, address: str = "127.0.0.1") -> Iterator[Link]:
    """A link, from 127.0.0.1 to ``address``, over which a process that runs ``program`` once said where it is."""
    with (
        socket.create_server((address, 0)) as server,
        subprocess.Popen([sys.executable, "-c", program]) as process,
        socket.create_connection(server.getsockname(), source_address=("127.0.0.1", 0)) as end,
        server.accept()[0],
    ):
        link = Link(end)
        link.process = process.pid
        yield link
        process.kill()


BUSY, ASLEEP = "while True: pass", "import time; time.sleep(60)"


@pytest.mark.parametrize("program", [BUSY, ASLEEP], ids=["busy", "asleep"])
def test_a_supervisor_that_waits_for_a_core_has_twice_the_time(program: str) -> None:
    with link_to_process(program) as link:
        until = time.monotonic() + 60
        while link.waits_for_core() != (program == BUSY) and time.monotonic() < until:
            time.sleep(0.1)  # it starts
        link.heard = time.monotonic() - 0.9 * SILENCE_S
        assert not link.is_lost
        link.heard = time.monotonic() - 1.1 * SILENCE_S
        assert link.is_lost == (program == ASLEEP)
        link.heard = time.monotonic() - 2.1 * SILENCE_S
        assert link.is_lost


def test_a_process_of_another_machine_is_not_looked_for_here() -> None:
    with link_to_process(BUSY, "127.0.0.2") as link:
        link.heard = time.monotonic() - 1.1 * SILENCE_S
        assert link.is_lost

"""Work in processes: messages arrive, failures have a name, and nothing is left running."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest

from mgq.errors import FailureError, InputError
from mgq.system.processes import Channel, Task, run_in_processes
from tests.fakes.places import ROOT

PREPARED = "MGQ_TEST_PREPARED"


def prepare() -> None:
    os.environ[PREPARED] = "yes"


@dataclass(frozen=True)
class Report:
    """Says what its process is like, before and after all are there."""

    number: int

    def __call__(self, channel: Channel) -> None:
        names = ("OMP_NUM_THREADS", PREPARED)
        channel.send((self.number, os.getpid(), *(os.environ.get(name) for name in names)))
        channel.wait_for_all()
        channel.send((self.number, "went on"))


def refuse(channel: Channel) -> None:
    raise InputError("the picture is no picture")


def stumble(channel: Channel) -> None:
    raise KeyError("somewhere")


def be_killed(channel: Channel) -> None:
    channel.send("alive")
    os.kill(os.getpid(), signal.SIGKILL)


def leave(channel: Channel) -> None:
    sys.exit(3)


def talk(channel: Channel) -> None:
    channel.send(os.getpid())
    while True:
        time.sleep(0.05)
        channel.send("still here")


def messages_of(*tasks: Task) -> list[Any]:
    return list(run_in_processes(tasks, "the count", 3, prepare))


def children() -> set[int]:
    """The processes of this one but for the standard library's tracker of resources, which stays."""
    return {child.pid for child in psutil.Process().children(recursive=True) if not tracks_resources(child)}


def tracks_resources(child: psutil.Process) -> bool:
    """Whether it is that tracker; a process that has ended has no command line to tell by, and is not."""
    try:
        return "resource_tracker" in " ".join(child.cmdline())
    except psutil.NoSuchProcess:
        return False


def test_a_child_that_ended_and_was_not_waited_for_is_counted() -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    assert ended(gone.pid) and gone.pid in children()
    gone.wait()
    assert gone.pid not in children()


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    before = children()
    yield
    assert children() <= before


def ended(pid: int, within: float = 10.0) -> bool:
    """Whether the process ends within so many seconds: it is to be waited for, not timed."""
    deadline = time.monotonic() + within
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def test_each_task_has_a_process_and_all_go_on_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    found = messages_of(Report(0), Report(1))
    together = found.index(None)
    assert {message[2:] for message in found[:together]} == {("3", "yes")}
    assert {message[0] for message in found[:together]} == {0, 1}
    assert len({message[1] for message in found[:together]} | {os.getpid()}) == 3
    assert sorted(found[together + 1 :]) == [(0, "went on"), (1, "went on")]
    assert "OMP_NUM_THREADS" not in os.environ and PREPARED not in os.environ


def test_the_number_of_threads_that_the_user_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert messages_of(Report(0))[0][2] == "7"


def test_bad_input_met_in_a_process_is_that_error_here() -> None:
    with pytest.raises(InputError, match=r"^the picture is no picture$"):
        messages_of(talk, refuse)


def test_a_failure_names_the_work_and_the_process() -> None:
    with pytest.raises(FailureError, match=r"^process 1 of 1 of the count failed: KeyError: 'somewhere'$") as caught:
        messages_of(stumble)
    assert "stumble" in str(caught.value.__cause__)


def test_a_process_that_is_killed_is_named() -> None:
    with pytest.raises(FailureError, match=r"^process 2 of 2 of the count \(pid \d+\) was killed by SIGKILL"):
        messages_of(talk, be_killed)


def test_a_process_that_leaves_is_named() -> None:
    with pytest.raises(FailureError, match=r"process 1 of 1 of the count \(pid \d+\) ended with code 3"):
        messages_of(leave)


def test_whoever_stops_listening_leaves_no_process() -> None:
    with closing(run_in_processes([talk, talk], "the count")) as found:
        pids = {next(found), next(found), next(found)} - {"still here"}
        assert pids
    assert all(not psutil.pid_exists(pid) for pid in pids)


SCRIPT = """
from tests.unit.system.test_processes import talk
from mgq.system.processes import run_in_processes
if __name__ == "__main__":
    for message in run_in_processes([talk, talk], "the count"):
        print(message, flush=True)
"""


@pytest.fixture
def talking(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], list[int]]]:
    """A program with two talking processes in its own session, and their ids."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    program = subprocess.Popen(
        [sys.executable, str(script)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    pids: set[int] = set()
    assert program.stdout is not None
    while len(pids) < 2:
        line = program.stdout.readline()
        assert line, program.communicate()[1]
        if line.strip().isdigit():
            pids.add(int(line))
    yield program, sorted(pids)
    if program.poll() is None:
        program.kill()
    program.communicate()


def test_ctrl_c_ends_all_and_only_the_program_tells_of_it(talking: tuple[subprocess.Popen[str], list[int]]) -> None:
    program, pids = talking
    os.killpg(program.pid, signal.SIGINT)  # As the terminal does: to all of them.
    said = program.communicate(timeout=30)[1]
    assert all(ended(pid) for pid in pids)
    assert said.count("KeyboardInterrupt") == 1


def test_when_the_program_is_killed_its_processes_end_in_silence(
    talking: tuple[subprocess.Popen[str], list[int]],
) -> None:
    program, pids = talking
    program.kill()
    assert all(ended(pid) for pid in pids)
    assert program.communicate(timeout=30)[1] == ""

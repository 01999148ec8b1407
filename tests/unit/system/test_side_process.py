"""A second process that calls functions: what it gives, and what happens where it cannot."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mgq.errors import FailureError
from mgq.system.side_process import SideProcess, begin, share_halves, share_out


def tell_process(_: Any = None) -> int:
    return os.getpid()


def make_list() -> list[int]:
    return []


def refuse(first: int) -> int:
    """Refuses to work anywhere but in the process ``first``."""
    if os.getpid() != first:
        raise KeyError("not here")
    return first


def fail() -> None:
    raise FailureError("it does not apply")


def be_killed(first: int) -> str:
    if os.getpid() != first:
        os.kill(os.getpid(), signal.SIGKILL)
    return "here after all"


def wait_for(file: Path) -> int:
    """Waits until ``file`` is there."""
    while not file.exists():
        pass
    return os.getpid()


def wait_and_leave(task: tuple[Path | None, Path]) -> int:
    """Waits until the first file is there, and leaves the second one."""
    waited, left = task
    if waited is not None:
        wait_for(waited)
    left.touch()
    return os.getpid()


def make_function() -> Callable[[], int]:
    return lambda: 3


def tell_process_and(word: str, items: list[int]) -> tuple[int, str, list[int]]:
    return os.getpid(), word, items


@pytest.fixture
def side() -> Iterator[SideProcess]:
    process = SideProcess("the test's second process")
    yield process
    process.close()


def test_calls_are_made_in_another_process_one_after_the_other(side: SideProcess) -> None:
    first, second = begin(side, tell_process), begin(side, int, "7")
    assert second.result() == 7
    assert first.result() not in (os.getpid(), None)


def test_without_a_process_the_call_is_made_where_its_result_is_wanted() -> None:
    call = begin(None, tell_process)
    assert not call.is_done and call.result() == os.getpid()
    once = begin(None, make_list)
    assert once.result() is once.result()


def test_what_fails_there_is_called_again_here(side: SideProcess) -> None:
    assert begin(side, refuse, os.getpid()).result() == os.getpid()
    with pytest.raises(FailureError, match=r"^it does not apply$"):
        begin(side, fail).result()
    assert begin(side, tell_process).result() != os.getpid()  # it goes on


def test_what_cannot_be_pickled_is_called_here(side: SideProcess) -> None:
    assert begin(side, lambda: 5).result() == 5
    assert begin(side, make_function).result()() == 3
    assert begin(side, tell_process).result() != os.getpid()


def test_where_the_process_ends_calls_are_made_here(side: SideProcess) -> None:
    calls = [begin(side, be_killed, os.getpid()), begin(side, be_killed, os.getpid())]
    assert [call.result() for call in calls] == ["here after all"] * 2


def test_tasks_are_shared_out_and_results_keep_their_order(side: SideProcess) -> None:
    seen: list[int] = []
    there = share_out(side, [1, 2, 3], tell_process, seen.append)
    assert len(there) == 3 and sorted(there) == sorted(seen)
    assert there[0] != os.getpid() and there[1] == os.getpid()
    assert share_out(None, [1, 2], tell_process, seen.append) == [os.getpid()] * 2


def test_the_last_task_is_begun_while_this_process_is_busy(side: SideProcess, tmp_path: Path) -> None:
    first, second, last = (tmp_path / name for name in ("first", "second", "last"))
    tasks = [(None, first), (last, second), (None, last)]  # what each waits for, and what it leaves
    there = share_out(side, tasks, wait_and_leave, lambda _: None)
    assert there[0] == there[2] != os.getpid() == there[1]
    assert side.is_idle


def test_a_task_that_waits_is_done_here_if_this_process_is_free_first(side: SideProcess, tmp_path: Path) -> None:
    first, second, last = (tmp_path / name for name in ("first", "second", "last"))
    tasks = [(last, first), (None, second), (None, last)]
    there = share_out(side, tasks, wait_and_leave, lambda _: None)
    assert there[0] != os.getpid() == there[1] == there[2]


def test_a_process_whose_waiting_task_was_taken_back_is_not_idle(side: SideProcess, tmp_path: Path) -> None:
    busy, waiting = begin(side, wait_for, tmp_path / "end"), begin(side, tell_process)
    waiting.take_back()
    assert not side.is_idle and waiting.result() == os.getpid()
    (tmp_path / "end").touch()
    assert busy.result() != os.getpid() and side.is_idle


def test_halves_are_shared_and_an_empty_one_is_not_sent(side: SideProcess) -> None:
    here, there = share_halves(side, tell_process_and, [1, 2, 3], "items")
    assert here == (os.getpid(), "items", [1, 2])
    assert there[0] != os.getpid() and there[1:] == ("items", [3])
    assert share_halves(side, tell_process_and, [1], "items") == (
        (os.getpid(), "items", [1]),
        (os.getpid(), "items", []),
    )


def test_a_process_that_is_busy_is_ended(tmp_path: Path) -> None:
    side = SideProcess("the test's second process")
    call = begin(side, wait_for, tmp_path / "never")
    side.close()
    (tmp_path / "never").touch()
    assert call.result() == os.getpid()


def test_the_script_that_starts_it_is_not_run_again(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "print('begun')\n"
        "from mgq.system.side_process import SideProcess\n"
        "side = SideProcess('its second process')\n"
        "print(side.begin(abs, -4).result())\n"
        "side.close()\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("begun\n4\n", "")

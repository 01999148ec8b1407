"""Whatever happens to one of several processes, all end soon, with one line that names it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import pytest

from mgq.engine.runs.run_folder import LAST
from mgq.engine.runs.training_state import read_training_state
from mgq.system.mpi_world import find_launcher
from mgq.system.supervision import WORKER_VARIABLE
from tests.conftest import slow
from tests.fakes.disks import fill, small_disk
from tests.fakes.network_hosts import Hosts, two_hosts

pytestmark = pytest.mark.skipif(
    find_launcher() is None or find_spec("mpi4py") is None, reason="needs MPI: pip install 'mgq[mpi]'"
)
ENDS_WITHIN_S = 30
WORKS_WITHIN_S = 120
"""A whole training on a busy machine."""
TRAIN = ["-a", "shufflenet_v1_x0_5_g3", "--image-size", "32", "--epochs", "90", "--limit", "512", "--report-freq", "1"]


def wait_until(holds: Callable[[], bool]) -> None:
    until = time.monotonic() + ENDS_WITHIN_S
    while not holds():
        assert time.monotonic() < until
        time.sleep(0.1)


def mgq(*words: str) -> list[str]:
    return [sys.executable, "-m", "mgq", *words]


def mpirun(*words: str) -> list[str]:
    launcher = find_launcher()
    assert launcher is not None
    return [launcher, *words]


class Run:
    """A command whose output goes to a file."""

    def __init__(self, command: Sequence[str], folder: Path, **environment: str) -> None:
        self.log = folder / "log"
        with self.log.open("a") as log:  # the launcher is not the only one who writes
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env={**os.environ, **environment}
            )

    @property
    def output(self) -> str:
        return self.log.read_text()

    def wait_for(self, text: str) -> None:
        until = time.monotonic() + WORKS_WITHIN_S
        while text not in self.output:
            assert self.process.poll() is None and time.monotonic() < until, self.output
            time.sleep(0.1)

    def worker(self, rank: int) -> psutil.Process:
        for process in psutil.Process(self.process.pid).children(recursive=True):
            environment = process.environ()
            if WORKER_VARIABLE in environment and str(rank) == environment.get(
                "PMI_RANK", environment.get("OMPI_COMM_WORLD_RANK")
            ):
                return process
        raise AssertionError(f"no rank {rank} in {self.output}")

    def end(self, within_s: float = ENDS_WITHIN_S) -> tuple[int, list[str]]:
        """The exit code, and the lines of errors; nothing of it may be left afterwards."""
        family = psutil.Process(self.process.pid).children(recursive=True)
        try:
            code = self.process.wait(within_s)
        finally:
            for process in family:
                if process.is_running():
                    process.kill()
            self.process.kill()
        return code, [line for line in self.output.splitlines() if line.startswith("error: ")]


@pytest.mark.parametrize("rank", [slow(0), 1])
def test_a_rank_that_is_killed_ends_all_with_one_line(rank: int, tmp_path: Path) -> None:
    run = Run(mgq("train", *TRAIN, "--jobs", "2", "-s", str(tmp_path)), tmp_path)
    run.wait_for("step 2/")
    run.worker(rank).kill()
    code, errors = run.end()
    assert code == 1 and len(errors) == 1, run.output
    assert f"rank {rank} on " in errors[0] and "killed by SIGKILL" in errors[0] and "--resume" in errors[0]


@pytest.mark.slow
def test_all_ranks_killed_at_once_leave_no_memory_behind(tmp_path: Path) -> None:
    """Others may use that folder at the same time: so only what this run has open counts. Open MPI's is its own."""
    run = Run(mgq("train", *TRAIN, "--jobs", "2", "-s", str(tmp_path)), tmp_path)
    run.wait_for("step 2/")
    mapped = [m.path for rank in (0, 1) for m in run.worker(rank).memory_maps() if "shm/mpich_" in m.path]
    for process in psutil.Process(run.process.pid).children(recursive=True):
        process.kill()
    run.end()
    assert not [path for path in mapped if Path(path).exists()]


def run_on_two_hosts(hosts: Hosts, folder: Path) -> Run:
    """A training with a rank on each machine, under way."""
    start = mpirun(
        *("-launcher", "ssh", "-launcher-exec", str(hosts.login), "-localhost", hosts.addresses[0]),
        *("-hosts", ",".join(hosts.addresses), "-n", "2"),
    )
    run = Run(hosts.on_first(*start, *mgq("train", *TRAIN, "-s", str(folder))), folder)
    run.wait_for("step 2/")
    assert works_on(hosts, hosts.names[1])
    return run


def works_on(hosts: Hosts, name: str) -> bool:
    return any("mgq" in command for command in hosts.commands_on(name))


@pytest.mark.slow
def test_a_machine_that_vanishes_ends_all_with_one_line(tmp_path: Path) -> None:
    with two_hosts(tmp_path) as hosts:
        run = run_on_two_hosts(hosts, tmp_path)
        hosts.cut()
        code, errors = run.end()
        assert code != 0 and len(errors) == 1, run.output  # of the launcher, which does not pass on what its ranks have
        wait_until(lambda: not works_on(hosts, hosts.names[1]))
        assert f"rank 1 on {hosts.names[1]} gave no sign" in errors[0]


@pytest.mark.slow
def test_a_machine_that_is_killed_ends_all_with_one_line(tmp_path: Path) -> None:
    with two_hosts(tmp_path) as hosts:
        run = run_on_two_hosts(hosts, tmp_path)
        hosts.kill(hosts.names[1])
        wait_until(lambda: "error: " in run.output)  # the launcher itself may have ended already
        wait_until(lambda: not works_on(hosts, hosts.names[0]))
        code, errors = run.end()
        assert code != 0 and len(errors) == 1, run.output
        assert f"rank 1 on {hosts.names[1]} was ended" in errors[0]


@pytest.mark.slow
def test_without_the_first_machine_the_others_end(tmp_path: Path) -> None:
    with two_hosts(tmp_path) as hosts:
        run_on_two_hosts(hosts, tmp_path)
        hosts.kill(hosts.names[0])
        wait_until(lambda: not works_on(hosts, hosts.names[1]))


@pytest.mark.slow
def test_a_disk_that_is_full_ends_all_and_with_room_again_they_go_on_to_the_bit(tmp_path: Path) -> None:
    words = [*TRAIN, "--jobs", "2", "--epochs", "3", "--limit", "64"]
    for name in ("full", "plain"):
        (tmp_path / name).mkdir()
    with small_disk(tmp_path / "disk", "64m") as disk:
        run = Run(mgq("train", *words, "-s", str(disk)), tmp_path / "full")
        run.wait_for("epoch 2/3")
        filler = fill(disk)
        code, errors = run.end()
        assert code == 1 and len(errors) == 1 and "is full: free some space" in errors[0], run.output
        filler.unlink()
        run = Run(mgq("train", *words, "-s", str(disk), "--resume"), tmp_path / "full")
        assert run.end(WORKS_WITHIN_S)[0] == 0, run.output
        went_on = weights_below(disk)
    run = Run(mgq("train", *words, "-s", str(tmp_path / "plain")), tmp_path / "plain")
    assert run.end(WORKS_WITHIN_S)[0] == 0, run.output
    assert went_on == weights_below(tmp_path / "plain")


def weights_below(folder: Path) -> dict[str, bytes]:
    """Of the run there, at its end."""
    (last,) = folder.glob(f"*/{LAST}")
    return {name: value.tobytes() for name, value in read_training_state(last).tensors.items()}


def run_first(folder: Path, program: str) -> str:
    """The PYTHONPATH with which a Python runs ``program`` before anything else."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(program)
    return str(folder)


@pytest.mark.slow
def test_a_rank_may_end_long_before_the_first(tmp_path: Path) -> None:
    """A launcher kills all that have not ended when one ends without a goodbye."""
    lasting = run_first(
        tmp_path / "lasting",
        "import atexit, os, time\nif os.environ.get('PMI_RANK') == '0':\n    atexit.register(time.sleep, 2)\n",
    )
    words = ["train", *TRAIN, "--jobs", "2", "--epochs", "1", "--limit", "64", "-s", str(tmp_path)]
    run = Run(mgq(*words), tmp_path, PYTHONPATH=lasting)
    assert run.end(WORKS_WITHIN_S)[0] == 0, run.output


def test_ranks_that_were_given_different_options_say_so(tmp_path: Path) -> None:
    one, other = (mgq("train", "-s", str(tmp_path), "--lr", lr) for lr in ("1", "2"))
    run = Run(mpirun("-n", "1", *one, ":", "-n", "1", *other), tmp_path)
    code, errors = run.end()
    assert code == 2 and len(errors) == 1 and "rank 1 on " in errors[0] and "--lr 2" in errors[0], run.output


def test_ranks_of_different_versions_say_so(tmp_path: Path) -> None:
    other = run_first(
        tmp_path / "other",
        "import importlib.metadata as m\nfind = m.version\n"
        "m.version = lambda name: '0.0' if name == 'mgq' else find(name)\n",
    )
    command = mgq("train", "-s", str(tmp_path))
    run = Run(mpirun("-n", "1", *command, ":", "-n", "1", "env", f"PYTHONPATH={other}", *command), tmp_path)
    code, errors = run.end()
    assert code == 2 and len(errors) == 1 and "rank 1 on " in errors[0] and "has mgq 0.0" in errors[0], run.output


def test_wrong_words_are_said_once(tmp_path: Path) -> None:
    run = Run(mpirun("-n", "2", *mgq("train", "--lr", "x")), tmp_path)
    code, errors = run.end()
    assert code == 2 and len(errors) == 1, run.output


def test_a_verb_that_is_not_shared_works_once(tmp_path: Path) -> None:
    run = Run(mpirun("-n", "2", *mgq("models")), tmp_path)
    code, _ = run.end()
    assert code == 0 and run.output.count("works in one process") == 1, run.output


def test_without_mpi_jobs_names_the_extra(tmp_path: Path) -> None:
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    (hidden / "sitecustomize.py").write_text(
        "import importlib.util as u\nfind = u.find_spec\n"
        "u.find_spec = lambda n, *a: None if n == 'mpi4py' else find(n, *a)\n"
    )
    run = Run(mgq("train", "--jobs", "2"), tmp_path, PYTHONPATH=str(hidden))
    code, errors = run.end()
    assert code == 2 and errors == ["error: --jobs needs MPI, which is not installed: pip install 'mgq[mpi]'"]

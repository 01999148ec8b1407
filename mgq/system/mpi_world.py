"""Finds out whether an MPI launcher started this process, and starts one."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from mgq.errors import FailureError, InputError, plural
from mgq.machine import usable_cores
from mgq.system.end_signals import end_signals
from mgq.system.parent_death import end_with_parent

RANK_AND_SIZE = (("PMI_RANK", "PMI_SIZE"), ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"))
"""What MPICH and its kin, and Open MPI, tell the processes that they start."""
OF_LAUNCHERS = ("PMI_", "PMIX_", "OMPI_", "PRTE_", "HYDRA_", "MPI_LOCAL")
JOBS_VARIABLE = "MGQ_JOBS"
"""How many processes `--jobs` started: set for them alone."""
FOLDER_VARIABLE = "MGQ_JOBS_FOLDER"
TERMINAL_VARIABLE = "MGQ_JOBS_TERMINAL"
LEADER = "leader"
"""A file in the folder of `--jobs`: the process that takes signals."""
OWN_CODES = {0, 1, 2, 130}
"""Those of `mgq` itself."""
MEND = "pip install 'mgq[mpi]'"
LAUNCHERS = ("mpiexec", "mpirun")


@dataclass(frozen=True)
class World:
    """One of ``size`` processes that were started together: number ``rank``."""

    rank: int
    size: int


def find_world(environment: Mapping[str, str] = os.environ) -> World | None:
    """This process among those that an MPI launcher started; None where it is alone."""
    for rank, size in RANK_AND_SIZE:
        found = environment.get(rank, ""), environment.get(size, "")
        if all(text.isdigit() for text in found) and int(found[1]) > 1:
            return World(*map(int, found))
    return None


def leave_world() -> None:
    """Let programs that this process starts know nothing of the launcher."""
    for name in [name for name in os.environ if name.startswith(OF_LAUNCHERS)]:
        del os.environ[name]


def find_launcher() -> str | None:
    """The program that starts processes, of this Python's own MPI where it has one."""
    own = [Path(sys.executable).parent / name for name in LAUNCHERS]
    return next((str(path) for path in own if path.is_file()), None) or next(
        filter(None, map(shutil.which, LAUNCHERS)), None
    )


def run_jobs(jobs: int, words: Sequence[str], folder: Path) -> int:
    """Run ``mgq words`` as ``jobs`` processes of this machine; the exit code. ``folder``: theirs, for a while.

    Raises InputError for more processes than cores, and where there is no MPI; FailureError where the launcher itself
    ends them, or is ended.
    """
    if jobs > usable_cores():
        raise InputError(
            f"--jobs {jobs} is more than the {plural(usable_cores(), 'core')} here: give 1 to {usable_cores()}"
        )
    launcher = find_launcher()
    if launcher is None or find_spec("mpi4py") is None:
        raise InputError(f"--jobs needs MPI, which is not installed: {MEND}")
    command = [launcher, "-n", str(jobs), sys.executable, "-m", "mgq", *words]
    # A session of its own: Ctrl-C is to reach the leader alone, and once.
    child = subprocess.Popen(
        command,
        env=_environment(jobs, folder),
        stdin=subprocess.DEVNULL,
        start_new_session=True,
        preexec_fn=end_with_parent,
    )
    code = _wait(child, folder / LEADER)
    if code not in OWN_CODES:
        raise FailureError(
            f"{launcher} ended the {plural(jobs, 'process')} with code {code}: one was killed from outside; "
            "`--resume` goes on from the state last saved"
        )
    return code


def _environment(jobs: int, folder: Path) -> dict[str, str]:
    found = {**os.environ, JOBS_VARIABLE: str(jobs), FOLDER_VARIABLE: str(folder)}
    # Open MPI refuses to start for root otherwise; whoever is root has chosen to be.
    found |= dict.fromkeys(("OMPI_ALLOW_RUN_AS_ROOT", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM"), "1")
    terminals = {str(number): os.ttyname(number) for number in (1, 2) if os.isatty(number)}
    return found | {f"{TERMINAL_VARIABLE}_{number}": name for number, name in terminals.items()}


def _wait(child: subprocess.Popen[bytes], leader: Path) -> int:
    def forward(number: int, _: object) -> None:
        try:
            os.kill(int(leader.read_text()), signal.SIGTERM if number == signal.SIGHUP else number)
        except (OSError, ValueError):  # not there yet, or gone already
            child.send_signal(number)

    before = {number: signal.signal(number, forward) for number in end_signals()}
    try:
        return child.wait()
    finally:
        child.kill()
        for number, handler in before.items():
            signal.signal(number, handler)


def take_terminal() -> None:
    """Draw on the terminal that `--jobs` was typed in: the launcher's own pipes are none."""
    for number in (1, 2):
        name = os.environ.pop(f"{TERMINAL_VARIABLE}_{number}", "")
        if name:
            try:
                terminal = os.open(name, os.O_WRONLY | os.O_NOCTTY)
            except OSError:
                continue
            os.dup2(terminal, number)
            os.close(terminal)


def note_leader() -> None:
    """Tell `--jobs` which process takes its signals: this one."""
    folder = os.environ.get(FOLDER_VARIABLE)
    if folder:
        path = Path(folder) / LEADER
        path.with_suffix(".part").write_text(str(os.getpid()))
        path.with_suffix(".part").rename(path)

"""Runs a verb in the processes of an MPI job: all of them train together, or the first works alone."""

from __future__ import annotations

import contextlib
import os
import sys
import time
import traceback
from collections.abc import Callable
from importlib.util import find_spec
from typing import TYPE_CHECKING, NoReturn

from mgq.cli.console import note, print_error
from mgq.errors import FailureError, InputError, MgqError, plural
from mgq.machine import is_debugging, usable_cores
from mgq.system.local_ranks import take_local_cores, wait_for_first
from mgq.system.mpi_world import MEND, World, leave_world, take_terminal

if TYPE_CHECKING:
    from mgq.system.supervision import Link

LAST_WAIT_S = 60.0
"""Longer than supervisors need to end all."""


def work_alone(world: World, work: Callable[[], int]) -> int:
    """The first process does ``work`` with the cores of all on its machine; the others sleep, and end with it.

    Those on other machines end at once. Returns the exit code.
    """
    if world.rank:
        with contextlib.suppress(KeyboardInterrupt):  # the first says so
            wait_for_first()
        return 0
    take_local_cores()
    leave_world()
    verb = next((word for word in sys.argv[1:] if not word.startswith("-")), "")
    if verb:
        others = "the other one has" if world.size == 2 else f"the other {world.size - 1} have"
        note(f"mgq {verb} works in one process, here on {plural(usable_cores(), 'core')}: {others} nothing to do")
    return work()


def work_together(world: World, work: Callable[[], int]) -> int:
    """The first process does ``work``; the others compute their share of it. Returns the exit code."""
    from mgq.system.supervision import link_to_supervisor, supervise

    link = link_to_supervisor()
    if link is not None:
        return be_rank(world, link, work)
    if find_spec("mpi4py") is None:
        if world.rank == 0:
            print_error(f"started {world.size} times by MPI, and mpi4py is not installed: {MEND}")
        return InputError.exit_code
    return supervise(world, sys.argv[1:])


def be_rank(world: World, link: Link, work: Callable[[], int]) -> int:
    """Run as the worker of this rank. Returns 0 where all went well, and ends this process where it did not.

    The process has to end in order where all went well. MPICH says goodbye to its launcher when the C library runs
    what is registered for the end, after MPI_Finalize: without that the launcher takes the rank to be lost, and kills
    those that have not ended yet.
    """
    try:
        code = lead(world, link, work) if world.rank == 0 else follow(world, link)
    except BaseException:  # in debug mode alone
        traceback.print_exc()
        code = FailureError.exit_code
    if code == 0:
        return code
    link.send(spoken=True)
    return end_process(code)


def lead(world: World, link: Link, work: Callable[[], int]) -> int:
    from mgq.engine.distributed.team import join_team, leave_team

    take_terminal()
    try:
        join_team(world, link, sys.argv[1:])
    except MgqError as error:
        print_error(str(error))
        return error.exit_code
    code = work()
    if code == 0:
        leave_team()
    return code


def follow(world: World, link: Link) -> int:
    from mgq.engine.distributed.team import join_team, leave_team, serve

    failure: MgqError
    try:
        serve(join_team(world, link, sys.argv[1:]))
        leave_team()
        return 0
    except MgqError as error:
        failure = error
    except Exception as error:
        if is_debugging():
            traceback.print_exc()
        failure = FailureError(f"unexpected {type(error).__name__}: {error}")
    named = str(failure).startswith("rank ")  # as where all find the same
    link.send(failed=str(failure), named=named, code=failure.exit_code)
    time.sleep(LAST_WAIT_S)
    return failure.exit_code


def end_process(code: int) -> NoReturn:
    """End this process at once: MPI's own exit would wait for ranks that have gone."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)

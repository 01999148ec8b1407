"""Runs work in several processes of this machine: started clean, watched, and ended with their parent."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import signal
import sys
import traceback
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import connection, resource_tracker
from types import ModuleType
from typing import Any, Protocol

from mgq.errors import FailureError, InputError, MgqError
from mgq.system.end_signals import END_REQUEST
from mgq.system.parent_death import end_with_parent

_THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
_JOIN_S = 5.0


class Channel(Protocol):
    """What a task has of the process that started it."""

    def send(self, message: Any) -> None:
        """Give it a ``message``, which can be pickled."""

    def wait_for_all(self) -> None:
        """Say that everything is loaded, and wait until the other tasks have said so."""

    def questions(self) -> Iterator[Any]:
        """What is asked of an :class:`AnsweringProcess` process, one after the other; each is answered by ``send``."""


Task = Callable[[Channel], None]
"""Work for a process. It is pickled, and so are its messages."""


def do_nothing() -> None:
    """The preparation of those who need none."""


def run_in_processes(
    tasks: Sequence[Task],
    what: str,
    threads: int = 1,
    prepare: Callable[[], None] = do_nothing,
    with_main: bool = True,
) -> Generator[Any | None, None, None]:
    """Run each of ``tasks`` in a process of its own; their messages as they come.

    None stands for the moment when all tasks have called ``wait_for_all`` and go on. ``prepare`` is called in each
    process before its task, and the modules that it needs, are loaded. The libraries' thread pools get ``threads``
    threads in each, unless the environment says another number. Processes that are still there when the caller
    stops taking messages, for whatever reason, are ended. Ctrl-C reaches the caller alone. ``with_main`` as in
    :class:`AnsweringProcess`.

    An MgqError in a process is raised here; FailureError, which names ``what`` and the process, when one ends in
    any other way.
    """
    processes: list[_Process] = []
    try:
        with _environment(threads), _hold_back_interrupts(), _main_module(with_main):
            processes.extend(_start(task, prepare) for task in tasks)
        yield from _messages(processes, what)
    finally:
        _end(processes)


class AnsweringProcess:
    """One task in a process of its own that answers questions, and sleeps in between.

    It sends one message when it is ready and one for every question. Ends with ``close``. ``prepare`` is called there
    before the task, and the modules that it needs, are loaded. Without ``with_main`` nothing of the program's main
    module is known there, and a script that does not expect to be run again is not.
    """

    def __init__(
        self,
        task: Task,
        what: str,
        threads: int = 1,
        prepare: Callable[[], None] = do_nothing,
        with_main: bool = True,
    ) -> None:
        self.what = what
        with _environment(threads), _hold_back_interrupts(), _main_module(with_main):
            self._child = _start(task, prepare)

    def answer(self, patience_s: float) -> Any:
        """The next message; nothing of the process runs after it, threads that wait in a loop included, until it is
        asked. Raises as :func:`run_in_processes`, and FailureError where none comes in time."""
        pipe = self._child.pipe
        try:
            if not pipe.poll(patience_s):
                self.close()
                raise FailureError(f"{self.what} gave no answer within {patience_s:.0f} s and was ended")
            message = pipe.recv()
        except (EOFError, OSError):
            raise FailureError(f"{self.what}: its process {_end_of(self._child)}") from None
        if isinstance(message, _TaskFailure):
            raise _error(message, self.what)
        if not isinstance(message, _Message):
            raise FailureError(f"{self.what}: its process ended early")
        self._signal(signal.SIGSTOP)
        return message.content

    def ask(self, question: Any, patience_s: float) -> Any:
        """The answer to ``question``, which can be pickled and is not None. Raises as :meth:`answer`."""
        self._signal(signal.SIGCONT)
        with contextlib.suppress(OSError):  # Its end is noticed when its pipe is read.
            self._child.pipe.send(question)
        return self.answer(patience_s)

    def close(self) -> None:
        """End the process, whatever it does."""
        self._signal(signal.SIGCONT)  # What is paused does not end.
        _end([self._child])

    def _signal(self, number: signal.Signals) -> None:
        process = self._child.process
        if process.is_alive() and process.pid is not None:
            os.kill(process.pid, number)


@dataclass(frozen=True)
class _Process:
    process: multiprocessing.process.BaseProcess
    pipe: connection.Connection


@dataclass(frozen=True)
class _Message:
    content: Any


@dataclass(frozen=True)
class _TaskFailure:
    """How a task ended badly: exit code of the error, its line, and the traceback for who debugs."""

    is_input: bool
    is_own: bool
    line: str
    trace: str


_READY, _GO, _DONE = "ready", "go", "done"


# ---- in the process that wants the work done ----


def _start(task: Task, prepare: Callable[[], None]) -> _Process:
    # Spawned, not forked: MegEngine's threads and the loader's would not come along.
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    # Pickled here, so that it is loaded only after the preparation.
    process = context.Process(target=_run, args=(theirs, prepare, pickle.dumps(task)), daemon=True)
    with END_REQUEST.hold():  # it would find half of what it is told
        process.start()
    theirs.close()  # Now the pipe ends when the process does.
    return _Process(process, ours)


@contextlib.contextmanager
def _environment(threads: int) -> Iterator[None]:
    """The variables that a new process takes over, and that are read when libraries are loaded."""
    unset = [name for name in _THREAD_VARIABLES if name not in os.environ]
    os.environ.update(dict.fromkeys(unset, str(threads)))
    try:
        yield
    finally:
        for name in unset:
            os.environ.pop(name, None)


@contextlib.contextmanager
def _main_module(is_loaded: bool) -> Iterator[None]:
    """Unless it ``is_loaded``, processes that are started here find a main module without a file."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = main if is_loaded else ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


@contextlib.contextmanager
def _hold_back_interrupts() -> Iterator[None]:
    """Ctrl-C waits meanwhile, and never comes to processes that are started here: they take over the mask."""
    resource_tracker.ensure_running()  # Which would let the signal through again when it is first needed.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _messages(processes: Sequence[_Process], what: str) -> Iterator[Any | None]:
    running = {child.pipe: number for number, child in enumerate(processes)}
    waiting: list[connection.Connection] = []
    while running:
        for pipe in connection.wait(list(running)):
            assert isinstance(pipe, connection.Connection)
            number = running[pipe]
            try:
                message = pipe.recv()
            except (EOFError, OSError):
                raise _death_error(processes[number], number, len(processes), what) from None
            if isinstance(message, _TaskFailure):
                raise _error(message, f"process {number + 1} of {len(processes)} of {what}")
            if isinstance(message, _Message):
                yield message.content
            elif message == _READY:
                waiting.append(pipe)
            elif message == _DONE:
                del running[pipe]
        if len(waiting) == len(processes):
            for pipe in waiting:
                with contextlib.suppress(OSError):  # Their end is noticed when their pipe is read.
                    pipe.send(_GO)
            waiting.clear()
            yield None


def _death_error(child: _Process, number: int, of: int, what: str) -> FailureError:
    return FailureError(
        f"process {number + 1} of {of} of {what} (pid {child.process.pid}) {_end_of(child)} before its work was done:"
        " use fewer processes if memory is short"
    )


def _end_of(child: _Process) -> str:
    """How a process ended whose pipe has ended."""
    child.process.join(_JOIN_S)
    code = child.process.exitcode
    return f"was killed by {signal.Signals(-code).name}" if code is not None and code < 0 else f"ended with code {code}"


def _error(failed: _TaskFailure, who: str) -> MgqError:
    kind = InputError if failed.is_input else FailureError
    line = failed.line if failed.is_own else f"{who} failed: {failed.line}"
    error = kind(line)
    error.__cause__ = RuntimeError(failed.trace)
    return error


def _end(processes: Sequence[_Process]) -> None:
    for child in processes:
        child.process.terminate()
    for child in processes:
        child.process.join(_JOIN_S)
        if child.process.is_alive():
            child.process.kill()
            child.process.join()
        child.pipe.close()


# ---- in the process that works ----


@dataclass(frozen=True)
class _Channel:
    pipe: connection.Connection

    def send(self, message: Any) -> None:
        self.pipe.send(_Message(message))

    def wait_for_all(self) -> None:
        self.pipe.send(_READY)
        self.pipe.recv()

    def questions(self) -> Iterator[Any]:
        while True:
            yield self.pipe.recv()


def _run(pipe: connection.Connection, prepare: Callable[[], None], task: bytes) -> None:
    end_with_parent()
    # Without the one that started it, which reads and answers, there is nobody to work for.
    with contextlib.suppress(BrokenPipeError, EOFError, ConnectionResetError):
        try:
            prepare()
            pickle.loads(task)(_Channel(pipe))
        except (BrokenPipeError, EOFError, ConnectionResetError):
            raise
        except Exception as error:
            own = isinstance(error, MgqError)
            line = str(error) if own else f"{type(error).__name__}: {error}"
            pipe.send(_TaskFailure(isinstance(error, InputError), own, line, traceback.format_exc()))
        else:
            pipe.send(_DONE)

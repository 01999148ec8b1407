"""Calls functions in a second process, while this one goes on with something else."""

from __future__ import annotations

import contextlib
import pickle
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Generic, TypeVar

from mgq.system.processes import AnsweringProcess, Channel, do_nothing

Result = TypeVar("Result")
Task = TypeVar("Task")

PATIENCE_S = 3600.0
"""How long one call may take there before it is made here instead."""


def dumps(thing: Any) -> bytes:
    """``thing`` pickled; the newest protocol copies arrays once instead of twice."""
    return pickle.dumps(thing, pickle.HIGHEST_PROTOCOL)


def call_functions(channel: Channel) -> None:
    """The second process: call what is asked for, one after the other."""
    channel.send(None)
    for question in channel.questions():
        try:
            function, arguments = pickle.loads(question)
            channel.send(dumps(function(*arguments)))
        except Exception:  # it is called again in the first process, which raises the error where it belongs
            channel.send(None)


@dataclass
class Call(Generic[Result]):
    """A call that was begun elsewhere, or, without a ``future``, is made when its result is asked for."""

    function: Callable[..., Result]
    arguments: tuple[Any, ...]
    future: Future[bytes | None] | None = None

    @property
    def is_done(self) -> bool:
        return self.future is not None and self.future.done()

    def take_back(self) -> None:
        """If the second process has not yet begun it, the call is made here, when its result is asked for."""
        if self.future is not None and self.future.cancel():
            self.future = None

    def result(self) -> Result:
        """What the call gives. Where the second process gave nothing, because it ended, has no memory left, or does not
        know the arguments' kinds, the call is made here. Raises what ``function`` raises."""
        return self._result

    @cached_property
    def _result(self) -> Result:
        if self.future is not None:
            with contextlib.suppress(Exception):
                if (answer := self.future.result()) is not None:
                    found: Result = pickle.loads(answer)
                    return found
        return self.function(*self.arguments)


class SideProcess:
    """A process that calls functions of installed modules, one after the other.

    ``what`` it serves, for messages; ``prepare`` is called there first. The caller's own script is not run in it. Its
    libraries have one thread each.
    """

    def __init__(self, what: str, prepare: Callable[[], None] = do_nothing) -> None:
        self._process = AnsweringProcess(call_functions, what, 1, prepare, with_main=False)
        self._thread = ThreadPoolExecutor(1)
        self._begun: list[Future[Any]] = [self._thread.submit(self._process.answer, PATIENCE_S)]  # that it is ready

    @property
    def is_idle(self) -> bool:
        """Whether nothing that was begun is left to do."""
        return all(each.done() for each in self._begun)

    def begin(self, function: Callable[..., Result], *arguments: Any) -> Call[Result]:
        """Call ``function``, which can be imported, after what was begun before. All is pickled.

        It is pickled and loaded in the thread that asks: MegEngine reads and makes tensors in its own thread alone.
        """
        try:
            question = dumps((function, arguments))
        except Exception:
            return Call(function, arguments)
        asked = self._thread.submit(self._process.ask, question, PATIENCE_S)
        self._begun = [*(each for each in self._begun if not each.done()), asked]
        return Call(function, arguments, asked)

    def close(self) -> None:
        """End the process, whatever it does."""
        self._process.close()
        self._thread.shutdown(cancel_futures=True)


def begin(side: SideProcess | None, function: Callable[..., Result], *arguments: Any) -> Call[Result]:
    """Begin a call in the ``side`` process; without one it is made when its result is asked for."""
    return Call(function, arguments) if side is None else side.begin(function, *arguments)


def halve(items: Sequence[Task]) -> tuple[Sequence[Task], Sequence[Task]]:
    """Both halves of ``items``; the first has one more of an odd number."""
    middle = -(-len(items) // 2)
    return items[:middle], items[middle:]


def share_halves(
    side: SideProcess | None, function: Callable[..., Result], items: Sequence[Task], *arguments: Any
) -> tuple[Result, Result]:
    """``function`` of ``arguments`` and of each half of ``items``, the second in the ``side`` process, where there is
    one and something in that half."""
    own, others = halve(items)
    there = begin(side if others else None, function, *arguments, others)
    return function(*arguments, own), there.result()


def share_out(
    side: SideProcess | None,
    tasks: Sequence[Task],
    function: Callable[[Task], Result],
    on_result: Callable[[Result], None],
) -> list[Result]:
    """``function`` of each of ``tasks``, in their order. Each is begun as soon as this process or the ``side`` process
    is free: put the longest first. ``on_result`` is told of each as it is known here.

    The last one waits for the ``side`` process while this one does another, and is done here if this is free first.
    """
    left = deque(enumerate(tasks))
    found: dict[int, Result] = {}
    there: dict[int, Call[Result]] = {}
    waiting: Call[Result] | None = None
    while left:
        number, task = left.popleft()
        if side is not None and all(call.is_done for call in there.values()):
            there[number] = side.begin(function, task)
            continue
        if side is not None and len(left) == 1:
            last, other = left.popleft()
            waiting = there[last] = side.begin(function, other)
        found[number] = function(task)
        on_result(found[number])
    if waiting is not None:
        waiting.take_back()
    for number, call in reversed(there.items()):
        found[number] = call.result()
        on_result(found[number])
    return [found[number] for number in range(len(tasks))]

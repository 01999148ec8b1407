"""Which signals end a command: from the keyboard, from other programs, and from a terminal that is closed."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType


def end_signals() -> tuple[signal.Signals, ...]:
    """Those that a command catches to end in order. `nohup` and its kin let it live on without its terminal."""
    always = (signal.SIGINT, signal.SIGTERM)
    if not hasattr(signal, "SIGHUP") or signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        return always
    return (*always, signal.SIGHUP)


INTERRUPTED = 130
"""The exit code of a command that was ended so."""
IMPORT = "<frozen importlib._bootstrap>"
"""The file of the code that loads modules."""
ALARM = getattr(signal, "SIGALRM", None)
"""The signal of a timer, on systems that have one."""
AGAIN_S = 0.02
"""So long a signal waits until it is asked again whether modules are loaded."""


def leave_at_once(number: int, frame: FrameType | None) -> None:
    """A handler for what comes before the command has begun or after its end: one line, and this process is over."""
    os.write(2, b"error: interrupted\n")
    os._exit(INTERRUPTED)


class EndRequest:
    """Whether a signal wants this process to end.

    Its KeyboardInterrupt would be lost, or told by a library in its own words, while modules are loaded: it comes after
    that. It may still be lost, as in an error that MegEngine makes of it: so it is remembered, and raised again where
    :meth:`obey` is called.
    """

    def __init__(self) -> None:
        self.is_made = False
        self._is_held = False

    @contextlib.contextmanager
    def watch(self) -> Iterator[None]:
        """Signals that would end the process raise KeyboardInterrupt meanwhile; afterwards they do what they did."""
        usual = (signal.SIG_DFL, signal.default_int_handler, leave_at_once)
        is_main = threading.current_thread() is threading.main_thread()
        before = {number: signal.getsignal(number) for number in end_signals()} if is_main else {}
        ours = {number: handler for number, handler in before.items() if handler in usual}
        self.is_made = False
        if ours and ALARM is not None:
            ours[ALARM] = signal.SIG_DFL
        for number in ours:
            signal.signal(number, self._take)
        try:
            yield
        finally:
            if ours:
                set_alarm(0)
            for number, handler in ours.items():
                signal.signal(number, handler)

    @contextlib.contextmanager
    def hold(self) -> Iterator[None]:
        """A signal that comes meanwhile is obeyed afterwards: for what is worth nothing when half of it is done."""
        before, self._is_held = self._is_held, True
        try:
            yield
        finally:
            self._is_held = before
        self.obey()

    def obey(self) -> None:
        """Raise KeyboardInterrupt where a signal has come."""
        if self.is_made and not self._is_held:
            set_alarm(0)
            raise KeyboardInterrupt

    def _take(self, number: int, frame: FrameType | None) -> None:
        is_first, self.is_made = number == ALARM or not self.is_made, True
        if is_first and ALARM is not None and loads_modules(frame):
            set_alarm(AGAIN_S)
            return
        self.obey()


def set_alarm(seconds: float) -> None:
    """Send this process ``ALARM`` in so many ``seconds``; 0: not any more."""
    if ALARM is not None:
        signal.setitimer(signal.ITIMER_REAL, seconds)


def loads_modules(frame: FrameType | None) -> bool:
    """Whether ``frame`` is part of an import."""
    while frame is not None and frame.f_code.co_filename != IMPORT:
        frame = frame.f_back
    return frame is not None


END_REQUEST = EndRequest()
"""That of this process."""

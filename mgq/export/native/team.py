"""A thread pool for one network. Its threads sleep between two runs."""

from __future__ import annotations

import mmap
import os
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Calls:
    """Functions of a compiled network. Each takes the address of a work area of ``size`` bytes, which begins as zeros.

    ``run`` takes images, their number, logits and the work area, ``help`` the work area and a thread's number, from 1
    on, and returns after ``end``. While they run, Python's other threads do, too.
    """

    size: int
    run: Callable[[int, int, int, int], object]
    help: Callable[[int, int], object]
    end: Callable[[int], object]


class Team:
    """``threads`` that run a network with logits of ``classes``. Calls of ``run`` are serialized."""

    def __init__(self, calls: Calls, classes: int, threads: int) -> None:
        self.calls, self.classes, self.threads = calls, classes, threads
        self.turn = threading.Lock()
        self.process: int | None = None
        self.gather()

    def gather(self) -> None:
        """Allocate the work area and start the helper threads. A forked process has neither."""
        self.process = os.getpid()
        self.work = reserve(self.calls.size)
        address = self.work.ctypes.data
        helpers = [
            threading.Thread(target=self.calls.help, args=(address, number), daemon=True)
            for number in range(1, self.threads)
        ]
        for helper in helpers:
            helper.start()
        if helpers:
            weakref.finalize(self, dismiss, self.calls, self.work, helpers, self.process)

    def run(self, images: Bytes) -> Floats:
        """Logits float32 (N, classes) of ``images``, uint8 (N, 3, S, S) in BGR."""
        images = np.ascontiguousarray(images)
        logits = np.empty((len(images), self.classes), np.float32)
        with self.turn:
            if self.process != os.getpid():
                self.gather()
            self.calls.run(images.ctypes.data, len(images), logits.ctypes.data, self.work.ctypes.data)
        return logits


def dismiss(calls: Calls, work: Bytes, helpers: list[threading.Thread], process: int) -> None:
    """Let the ``helpers`` return before what they work with is gone. ``work`` and ``calls`` live until then."""
    if process == os.getpid():
        calls.end(work.ctypes.data)
        for helper in helpers:
            helper.join()


def reserve(size: int) -> Bytes:
    """``size`` bytes, zeros, that begin with a page."""
    return np.frombuffer(mmap.mmap(-1, max(size, 1)), np.uint8)

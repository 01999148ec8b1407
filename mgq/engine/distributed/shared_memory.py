"""Sums over the ranks of one machine, through memory that all of them see.

MPI would copy what it adds up into such memory and out of it again, piece by piece, whenever it is called. Here each
rank writes where the others read, and adds up once: in the order of the ranks, so that all come to the same bits.
"""

from __future__ import annotations

import mmap
import os
import platform
import tempfile
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mgq.cpu_kernels.channels_last import add
from mgq.cpu_kernels.tensor_exchange import Array
from mgq.engine.distributed.team import Team

FOLDER = Path("/dev/shm")
ORDERED = ("x86_64", "AMD64")
"""Processors on which others see what a core writes in the order in which it wrote it."""
_LINE = 64  # bytes that cores exchange at once

Counters = npt.NDArray[np.int64]


class SharedMemory:
    """For each rank of ``team``, all on one machine: ``size`` float32 that it writes, and two counters.

    ``written``: of exchanges that it has written its part for; ``read``: of those whose parts of others it has read.
    """

    def __init__(self, team: Team, memory: mmap.mmap, size: int) -> None:
        self.team, self.size = team, size
        head = 2 * _LINE * team.size
        whole = np.frombuffer(memory, np.uint8)
        counters: Counters = whole[:head].view(np.int64).reshape(2, team.size, -1)[:, :, 0]
        self.written, self.read = counters
        self.parts: Array = whole[head:].view(np.float32).reshape(team.size, size)
        self.begun = 0
        """How many exchanges have begun."""
        self.before = 0
        """How many had when this step began."""
        self.used = 0
        """Where the next part of this step begins."""

    def begin_step(self) -> None:
        """Let parts begin at the front again."""
        self.before, self.used = self.begun, 0

    def part(self, size: int) -> Array | None:
        """Where this rank writes the next ``size`` numbers; None where there is no room for so many.

        It waits until others have read what stood there, which they have long done, as a rule.
        """
        start = self.used
        if start + size > self.size:
            return None
        self.used += size
        self.team.wait_until(lambda: bool((self.read >= self.before).all()))
        own: Array = self.parts[self.team.rank, start : start + size]
        return own


class SharedExchange:
    """A sum through ``memory``: its ``array`` is a part of that at first, and the sum once it is done."""

    def __init__(self, memory: SharedMemory, array: Array) -> None:
        self.memory, self.array = memory, array
        self.start = memory.used - array.size
        memory.begun += 1
        self.number = memory.begun
        memory.written[memory.team.rank] = self.number

    def is_done(self) -> bool:
        memory = self.memory
        if not (memory.written >= self.number).all():
            return False
        first, *others = memory.parts[:, self.start : self.start + self.array.size]
        total = first
        for part in others:
            total = add(total, part)
        self.array = total
        memory.read[memory.team.rank] = self.number
        return True


def share_memory(team: Team, size: int) -> SharedMemory | None:
    """Memory for ``size`` numbers of each rank, where all are on one machine that has room for it; all ranks call this.

    The room is taken at once: where it were missing later, the process would be killed.
    """
    if not team.is_on_one_machine or platform.machine() not in ORDERED or not FOLDER.is_dir():
        return None
    length = team.size * (2 * _LINE + 4 * size)
    name = team.share(make_file(length) if team.rank == 0 else None)
    memory = None if name is None else open_file(name, length)
    everywhere = all(team.gather(memory is not None))
    if team.rank == 0 and name is not None:
        Path(name).unlink()
    return SharedMemory(team, memory, size) if memory is not None and everywhere else None


def make_file(length: int) -> str | None:
    """A new file in memory, full of zeros; None where there is no room."""
    try:
        descriptor, name = tempfile.mkstemp(prefix="mgq-", dir=FOLDER)
    except OSError:
        return None
    try:
        os.posix_fallocate(descriptor, 0, length)
    except OSError:
        Path(name).unlink()
        return None
    finally:
        os.close(descriptor)
    return name


def open_file(name: str, length: int) -> mmap.mmap | None:
    try:
        with Path(name).open("r+b") as file:
            return mmap.mmap(file.fileno(), length)
    except (OSError, ValueError):  # another rank's own /dev/shm, as in a container
        return None

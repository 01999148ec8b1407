"""Sums over the ranks of one machine, through memory that all of them see.

MPI would copy what it adds up into such memory and out of it again, piece by piece, whenever it is called. Here each
rank writes where the others read, and adds up once: in the order of the ranks, so that all come to the same bits.

The memory is a file without a name: nothing of it is left once all ranks have ended, however they did.
"""

from __future__ import annotations

import mmap
import os
import platform
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from mgq.cpu_kernels.channels_last import add
from mgq.cpu_kernels.tensor_exchange import Array
from mgq.engine.distributed.team import Team

FOLDER = Path("/dev/shm")
ORDERED = ("x86_64", "AMD64")
"""Processors on which others see what a core writes in the order in which it wrote it."""
_LINE = 64  # bytes that cores exchange at once

BOARD_BYTES = 1 << 16
"""The most that a rank shows at a time: statistics of 2,730 channels."""

Counters = npt.NDArray[np.int64]
Bytes = npt.NDArray[np.uint8]


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


class SharedBoard:
    """Where each rank of ``team``, all on one machine, shows all others some bytes at a time, in two places in turn.

    Whoever writes to a place again has read what all wrote to the other since, so all have read what stood there.
    """

    def __init__(self, team: Team, memory: mmap.mmap, size: int) -> None:
        self.team, self.size = team, size
        head = _LINE * team.size
        whole = np.frombuffer(memory, np.uint8)
        self.written: Counters = whole[:head].view(np.int64).reshape(team.size, -1)[:, 0]
        self.places: Bytes = whole[head:].reshape(2, team.size, size)
        self.begun = 0

    def show(self, array: npt.NDArray[Any]) -> npt.NDArray[Any] | None:
        """What all ranks call this with, by rank, to be read before the next call; None where there is no room."""
        data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        if data.size > self.size:
            return None
        self.begun += 1
        place = self.places[self.begun % 2, :, : data.size]
        place[self.team.rank] = data
        self.written[self.team.rank] = self.begun
        self.team.wait_for_others(lambda: bool(self.written.min() >= self.begun))
        return place.view(array.dtype).reshape(self.team.size, *array.shape)


def share_board(team: Team) -> SharedBoard | None:
    """A board for all ranks, where all are on one machine that has room for it; all ranks call this."""
    memory = map_together(team, team.size * (_LINE + 2 * BOARD_BYTES))
    return None if memory is None else SharedBoard(team, memory, BOARD_BYTES)


def share_memory(team: Team, size: int) -> SharedMemory | None:
    """Memory for ``size`` numbers of each rank, where all are on one machine that has room for it; all ranks call
    this."""
    memory = map_together(team, team.size * (2 * _LINE + 4 * size))
    return None if memory is None else SharedMemory(team, memory, size)


def map_together(team: Team, length: int) -> mmap.mmap | None:
    """``length`` bytes, all 0, that all ranks see; None where they are not on one machine with room for that.

    The room is taken at once: where it were missing later, the process would be killed.
    """
    if not team.is_on_one_machine or platform.machine() not in ORDERED:
        return None
    descriptor = make_file(length) if team.rank == 0 else None
    shared: SharedFile | None = team.share(None if descriptor is None else SharedFile.of(descriptor))
    memory = None if shared is None else map_file(shared)
    everywhere = all(team.gather(memory is not None))
    if descriptor is not None:
        os.close(descriptor)
    return memory if everywhere else None


class SharedFile(NamedTuple):
    """An open file without a name, by the ``path`` under which other processes find it, and what it must be."""

    path: str
    length: int
    device: int
    number: int

    @classmethod
    def of(cls, descriptor: int) -> SharedFile:
        found = os.fstat(descriptor)
        return cls(f"/proc/{os.getpid()}/fd/{descriptor}", found.st_size, found.st_dev, found.st_ino)


def make_file(length: int) -> int | None:
    """The descriptor of a new file in memory, full of zeros; None where there is no room."""
    descriptor = None
    if not hasattr(os, "O_TMPFILE"):
        return None
    try:
        descriptor = os.open(FOLDER, os.O_TMPFILE | os.O_RDWR, 0o600)
        os.posix_fallocate(descriptor, 0, length)
    except OSError:
        if descriptor is not None:
            os.close(descriptor)
        return None
    return descriptor


def map_file(shared: SharedFile) -> mmap.mmap | None:
    """None where another process, or another /dev/shm, is meant here, as in a container."""
    with suppress(OSError, ValueError), Path(shared.path).open("r+b") as file:
        found = os.fstat(file.fileno())
        if (found.st_size, found.st_dev, found.st_ino) == shared[1:]:
            return mmap.mmap(file.fileno(), shared.length)
    return None

"""Dynamic batching: runs images of several requests together."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Crop = npt.NDArray[np.uint8]
Logits = npt.NDArray[np.float32]


class BatchResult(NamedTuple):
    """Logits (classes,) of a picture, and its share of the batch's time."""

    logits: Logits
    milliseconds: float


class PendingRequest(NamedTuple):
    """An image, uint8 (S, S, 3), in the queue, and the future that gets its result."""

    crop: Crop
    ran: asyncio.Future[BatchResult]


class Batcher:
    """Runs pictures in groups of at most ``most``, one group at a time, in a thread of its own.

    ``run`` takes some crops and returns logits (N, classes). While a group runs, the next one gathers; where none
    runs, the first picture of a group waits ``gather_s`` seconds for others.
    """

    def __init__(self, run: Callable[[list[Crop]], Logits], most: int, gather_s: float) -> None:
        self.run, self.most, self.gather_s = run, most, gather_s
        self.queue: asyncio.Queue[PendingRequest] = asyncio.Queue()
        self.thread = ThreadPoolExecutor(1, "network")

    async def ask(self, crop: Crop) -> BatchResult:
        """The logits of ``crop``. Raises what ``run`` does."""
        waiting = PendingRequest(crop, asyncio.get_running_loop().create_future())
        self.queue.put_nowait(waiting)
        return await waiting.ran

    async def work(self) -> None:
        """Run batches until the task is cancelled."""
        while True:
            group = [one for one in await self.gather() if not one.ran.done()]  # done: the request was cancelled
            if group:
                await self.answer(group)

    async def gather(self) -> list[PendingRequest]:
        group = [await self.queue.get()]
        end = time.monotonic() + self.gather_s
        while len(group) < self.most:
            if not self.queue.empty():
                group.append(self.queue.get_nowait())
                continue
            left = end - time.monotonic()
            if left <= 0:
                break
            try:
                group.append(await asyncio.wait_for(self.queue.get(), left))
            except asyncio.TimeoutError:
                break
        return group

    async def answer(self, group: list[PendingRequest]) -> None:
        start = time.perf_counter()
        loop = asyncio.get_running_loop()
        try:
            logits = await loop.run_in_executor(self.thread, self.run, [one.crop for one in group])
        except Exception as error:
            for one in group:
                if not one.ran.done():
                    one.ran.set_exception(error)
            return
        milliseconds = (time.perf_counter() - start) * 1000 / len(group)
        for one, row in zip(group, logits, strict=True):
            if not one.ran.done():
                one.ran.set_result(BatchResult(row, milliseconds))

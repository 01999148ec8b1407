"""Pictures of several requests run together, and each gets its own answer."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

import numpy as np
import pytest

from mgq.errors import FailureError
from mgq.service.batching import Batcher, Crop, Logits

Result = TypeVar("Result")


def crop(value: int) -> Crop:
    return np.full((2, 2, 3), value, np.uint8)


class Echo:
    """A network whose only logit is the first pixel. ``held`` keeps it from running; ``fails``: it raises."""

    def __init__(self) -> None:
        self.groups: list[list[int]] = []
        self.held = threading.Event()
        self.held.set()
        self.fails = False

    def __call__(self, crops: list[Crop]) -> Logits:
        assert self.held.wait(20)
        self.groups.append([int(one[0, 0, 0]) for one in crops])
        if self.fails:
            raise FailureError("logits that are no numbers")
        return np.array([[one[0, 0, 0]] for one in crops], np.float32)


def run_with(batcher: Batcher, work: Coroutine[Any, Any, Result]) -> Result:
    async def both() -> Result:
        worker = asyncio.ensure_future(batcher.work())
        try:
            return await work
        finally:
            worker.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await worker

    return asyncio.run(both())


def test_what_comes_together_runs_together_and_each_gets_its_own() -> None:
    network = Echo()
    batcher = Batcher(network, most=4, gather_s=0.2)

    async def ask() -> list[float]:
        return [float(ran.logits[0]) for ran in await asyncio.gather(*(batcher.ask(crop(i)) for i in range(10)))]

    assert run_with(batcher, ask()) == list(range(10))
    assert network.groups == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def test_what_comes_while_a_group_runs_is_the_next_group() -> None:
    network = Echo()
    network.held.clear()
    batcher = Batcher(network, most=16, gather_s=0)

    async def ask() -> None:
        first = asyncio.ensure_future(batcher.ask(crop(1)))
        while not batcher.queue.empty() or not batcher.thread._threads:
            await asyncio.sleep(0.01)
        others = [asyncio.ensure_future(batcher.ask(crop(i))) for i in (2, 3, 4)]
        await asyncio.sleep(0)
        network.held.set()
        await asyncio.gather(first, *others)

    run_with(batcher, ask())
    assert network.groups == [[1], [2, 3, 4]]


def test_a_failure_is_told_to_all_who_wait_and_the_next_group_runs() -> None:
    network = Echo()
    batcher = Batcher(network, most=2, gather_s=0.2)

    async def ask() -> float:
        network.fails = True
        failed = await asyncio.gather(batcher.ask(crop(1)), batcher.ask(crop(2)), return_exceptions=True)
        assert [type(one) for one in failed] == [FailureError, FailureError]
        network.fails = False
        return float((await batcher.ask(crop(3))).logits[0])

    assert run_with(batcher, ask()) == 3


def test_nobody_runs_for_a_request_that_was_given_up() -> None:
    network = Echo()
    batcher = Batcher(network, most=1, gather_s=0)
    network.held.clear()

    async def ask() -> None:
        first = asyncio.ensure_future(batcher.ask(crop(1)))
        while not batcher.thread._threads:
            await asyncio.sleep(0.01)
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(batcher.ask(crop(2)), 0.05)
        network.held.set()
        await first
        await batcher.ask(crop(3))

    run_with(batcher, ask())
    assert network.groups == [[1], [3]]

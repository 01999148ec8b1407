"""Gradients averaged over processes while the backward pass still runs.

As gradients become ready, from the last layer to the first, they are put together in buckets, and the exchange of a
full bucket begins at once. What the optimizer gets in the end are the averages.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from megengine import Tensor
from megengine.utils.future import Future

from mgq.cpu_kernels import fast_gradients_enabled
from mgq.cpu_kernels.tensor_exchange import Array, empty, values
from mgq.engine.distributed.shared_memory import SharedExchange, share_memory
from mgq.engine.distributed.team import Team

BUCKET_BYTES = 4 << 20
Halves = npt.NDArray[np.float16]


class Exchange(Protocol):
    """The sum of one array over all processes, under way; ``array`` is that once it is done."""

    array: Array

    def is_done(self) -> bool:
        """Whether the sum is there; it makes progress meanwhile. The order of sums is the same on all processes."""


class WholeExchange:
    """In float32, by MPI's allreduce."""

    def __init__(self, team: Team, array: Array) -> None:
        from mpi4py import MPI

        self.team, self.array = team, array
        self.request = team.comm.Iallreduce(MPI.IN_PLACE, array, MPI.SUM)

    def is_done(self) -> bool:
        return self.team.is_done(self.request)


class HalfExchange:
    """In float16: half the bytes. Sums are made in float32, in the order of the ranks.

    Every process sums one part of the array and sends it to all. A part travels with a scale of its own (two halves in
    front of it that are a float32), so that neither large nor small gradients leave float16's range.
    """

    def __init__(self, team: Team, array: Array) -> None:
        self.team, self.array = team, array
        self.part = -(-array.size // team.size)
        parts = np.zeros((team.size, self.part), np.float32)
        parts.reshape(-1)[: array.size] = array
        self.received: Halves = np.empty((team.size, self.part + _SCALE), np.float16)
        self.sent = pack(parts)
        self.request = team.comm.Ialltoall(as_bytes(self.sent), as_bytes(self.received))
        self.is_summed = False

    def is_done(self) -> bool:
        if not self.team.is_done(self.request):
            return False
        if self.is_summed:
            self.array[:] = unpack(self.received).reshape(-1)[: self.array.size]
            return True
        # In another communicator: exchanges have to begin in the same order everywhere within each.
        self.sent = pack(unpack(self.received).sum(0, keepdims=True))
        self.received = np.empty_like(self.received)
        self.request = self.team.second.Iallgather(as_bytes(self.sent), as_bytes(self.received))
        self.is_summed = True
        return False


_SCALE = 2  # halves that hold one float32
_LARGEST = np.float32(2.0**14)


def pack(rows: Array) -> Halves:
    """float32 (R, N) -> float16 (R, 2 + N): each row as multiples of a power of two, which stands in front of it."""
    largest = np.abs(rows).max(1, initial=0).astype(np.float32)
    _, exponent = np.frexp(np.maximum(largest, np.float32(1e-30)))
    scale = np.ldexp(np.float32(1), exponent.astype(np.int32) - 14).astype(np.float32)
    scale[~np.isfinite(largest)] = 1
    result = np.empty((len(rows), rows.shape[1] + _SCALE), np.float16)
    result[:, :_SCALE] = scale[:, None].view(np.float16)
    with np.errstate(over="ignore", invalid="ignore"):
        result[:, _SCALE:] = rows / scale[:, None]
    return result


def unpack(rows: Halves) -> Array:
    """What :func:`pack` was given, rounded."""
    scale = np.ascontiguousarray(rows[:, :_SCALE]).view(np.float32)
    result: Array = rows[:, _SCALE:].astype(np.float32) * scale
    return result


def as_bytes(array: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    return array.reshape(-1).view(np.uint8)


EXCHANGES: dict[str, Callable[[Team, Array], Exchange]] = {"none": WholeExchange, "fp16": HalfExchange}


@dataclass
class Bucket:
    """Gradients that travel together; the averages are in ``flat`` once they are there."""

    gradients: list[Tensor]
    flat: Array | None = None
    exchange: Exchange | None = None


class Average(Future):  # type: ignore[misc]
    """A gradient to come: what a gradient manager waits for after the backward pass."""

    def __init__(self, owner: GradientAverage, bucket: Bucket, start: int, gradient: Tensor) -> None:
        # Not the base's: its lock is for a value from another thread, and takes as long as all the rest.
        self.owner, self.bucket, self.start = owner, bucket, start
        self.shape, self.device = gradient._tuple_shape, gradient.device

    def get(self) -> Tensor | Array:
        """The average; an array where the optimizer takes one, which spares two copies."""
        self.owner.finish(self.bucket)
        assert self.bucket.flat is not None
        size = math.prod(self.shape)
        own = self.bucket.flat[self.start : self.start + size].reshape(self.shape)
        return own if fast_gradients_enabled() else Tensor(own, device=self.device, no_cache=True)


class GradientAverage:
    """Call it with each parameter and its gradient, in the same order on all processes: a future of the average.

    ``numbers``: how many the gradients of a step have together. On one machine they travel through memory, as they are:
    there packing takes longer than halving their bytes saves.
    """

    def __init__(self, team: Team, compress: str = "none", numbers: int = 0) -> None:
        self.team = team
        self.compress = compress
        self.open = Bucket([])
        self.size = 0
        self.under_way: list[Bucket] = []
        self.is_over = False  # the step's backward pass
        self.memory = share_memory(team, numbers) if numbers else None

    def __call__(self, _: Tensor, gradient: Tensor) -> Average:
        if self.is_over and self.memory is not None:
            self.memory.begin_step()
        self.is_over = False
        future = Average(self, self.open, self.size, gradient)
        self.open.gradients.append(gradient)
        self.size += math.prod(gradient._tuple_shape)
        self.advance()
        if 4 * self.size >= BUCKET_BYTES:
            self.send()
        return future

    def send(self) -> None:
        """Let the exchange of what is together begin."""
        bucket = self.open
        shared = None if self.memory is None else self.memory.part(self.size)
        flat = empty((self.size,)) if shared is None else shared
        for (start, end), value in zip(bounds(bucket.gradients), values(*bucket.gradients), strict=True):
            # Divided here, so that a sum over many processes stays in range.
            np.divide(value.reshape(-1), np.float32(self.team.size), out=flat[start:end])
        if self.memory is not None and shared is not None:
            bucket.exchange = SharedExchange(self.memory, shared)
        else:
            bucket.exchange = EXCHANGES[self.compress](self.team, flat)
        bucket.gradients = []
        self.under_way.append(bucket)
        self.open, self.size = Bucket([]), 0

    def advance(self) -> None:
        """Take what is there. Sums follow each other, so the first counts."""
        if self.memory is not None:
            self.team.make_progress()
        while self.under_way:
            exchange = self.under_way[0].exchange
            assert exchange is not None
            if not exchange.is_done():
                return
            self.under_way.pop(0).flat = exchange.array

    def finish(self, bucket: Bucket) -> None:
        """Wait until the averages of ``bucket``, and of those before it, are there."""
        self.is_over = True
        if bucket is self.open:
            self.send()

        def is_there() -> bool:
            if bucket.flat is None:
                self.advance()
            return bucket.flat is not None

        self.team.wait_for_others(is_there)


def bounds(gradients: list[Tensor]) -> Iterator[tuple[int, int]]:
    """Where in a bucket each gradient lies."""
    start = 0
    for gradient in gradients:
        end = start + math.prod(gradient._tuple_shape)
        yield start, end
        start = end

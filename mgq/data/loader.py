"""Loads batches of images, decoded ahead in threads. The number of threads does not change them.

Threads, because reading, decoding and resizing happen outside Python's lock: two did as much as two processes,
and they need no copies, no pickling and no clean-up, and start at once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import MappingProxyType, TracebackType
from typing import Literal, NamedTuple, TypeAlias

import cv2
import numpy as np
import numpy.typing as npt

from mgq.data.augmentation import Draw, Stream, Transform, generator
from mgq.data.datasets import Dataset
from mgq.data.pixel_decoders import Pixels
from mgq.errors import InputError, plural
from mgq.machine import usable_cores

Indices: TypeAlias = npt.NDArray[np.int64]

NO_LABEL = -1
"""The label of pictures whose class is not known."""


class Batch(NamedTuple):
    """``images`` uint8 (N, 3, H, W) in BGR order, ``labels`` and ``indices`` in the dataset int64 (N,).

    ``problems`` has a line for each broken picture that was met here for the first time.
    """

    images: Pixels
    labels: Indices
    indices: Indices
    problems: tuple[str, ...] = ()


class Loader:
    """A dataset as batches, epoch after epoch. Close it, or use it in a ``with``, to end its threads.

    Order and content depend on ``seed``, the epoch and the dataset alone: not on ``workers`` (threads; by default one
    a core, 0 to work in the caller's), and not on the batches before. About two batches are held ahead of the one in
    use.

    A picture that cannot be read is named in ``problems``. With ``broken="replace"`` the next one of the dataset
    that can be read stands in for it, as a rule of the same class, so that all batches keep their size; with
    ``"drop"``, for measuring, it is left out of its batch. When more than the share ``max_bad`` of the dataset was
    found broken, InputError is raised.

    ``drop_last`` leaves out a last batch that is not full. With several ``ranks``, ``batch_size`` pictures go to each
    of them: ``rank`` gets its part of every batch, as if one had loaded all. Raises InputError for an empty dataset or
    values that cannot be.
    """

    def __init__(
        self,
        dataset: Dataset,
        transform: Transform,
        batch_size: int,
        *,
        shuffle: bool = False,
        seed: int = 0,
        workers: int | None = None,
        drop_last: bool = False,
        broken: Literal["replace", "drop"] = "replace",
        max_bad: float = 0.01,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        self.dataset = dataset
        self.transform = transform
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.workers = usable_cores() if workers is None else workers
        self.drop_last = drop_last
        self.broken = broken
        self.max_bad = max_bad
        self.rank, self.ranks = rank, ranks
        self._problems: dict[int, str] = {}
        self._pool: ThreadPoolExecutor | None = None
        self._check()

    def __len__(self) -> int:
        """The number of batches in an epoch."""
        whole, rest = divmod(len(self.dataset), self.batch_size * self.ranks)
        return whole + (rest > 0 and not self.drop_last)

    def __enter__(self) -> Loader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the threads, once each has finished the few pictures it is at. A later use starts new ones."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None

    @property
    def problems(self) -> Mapping[int, str]:
        """The broken pictures met so far: index in the dataset -> the line that says why."""
        return MappingProxyType(self._problems)

    def __iter__(self) -> Iterator[Batch]:
        return self.batches()

    def batches(self, epoch: int = 0, start: int = 0) -> Iterator[Batch]:
        """The batches of an epoch from number ``start`` on, the same as if those before had been taken.

        Raises InputError when too many pictures are broken, or ``start`` is not within the epoch. Whatever else
        goes wrong in a thread is raised here in its place.
        """
        if not 0 <= start <= len(self):
            raise InputError(f"batch {start} is not in an epoch of {len(self)} batches: start at one that is")
        return self._batches(epoch, start)

    def order(self, epoch: int) -> Indices:
        """The indices of all pictures in the order of ``epoch``, int64 (pictures,)."""
        if not self.shuffle:
            return np.arange(len(self.dataset))
        return generator(self.seed, Stream.ORDER, epoch).permutation(len(self.dataset))

    def _check(self) -> None:
        images = len(self.dataset)
        if not images:
            raise InputError(f"{self.dataset.name} has no pictures: name another set")
        if self.batch_size < 1:
            raise InputError(f"a batch of {self.batch_size} pictures is not possible: give at least 1")
        if self.drop_last and self.batch_size * self.ranks > images:
            raise InputError(
                f"{self.dataset.name} has {plural(images, 'picture')}, too few for a batch of"
                f" {self.batch_size * self.ranks}: give less"
            )
        if not 0 <= self.rank < self.ranks or (self.ranks > 1 and not self.drop_last):
            raise InputError(f"rank {self.rank} of {self.ranks} is not possible: count from 0, and drop the last batch")
        if self.workers < 0:
            raise InputError(f"{self.workers} workers are not possible: give 0 or more")
        if not 0 <= self.max_bad <= 1:
            raise InputError(f"a share of {self.max_bad} broken pictures is not possible: give 0 to 1")

    # ---- batches ----

    def _batches(self, epoch: int, start: int) -> Iterator[Batch]:
        order = self.order(epoch)
        # Enough that all threads have work, also when batches are smaller than what a thread takes at once.
        ahead = max(_BATCHES_AHEAD, -(-_PARTS_AHEAD * self.workers * _PART // self.batch_size)) if self.workers else 0
        waiting: deque[_PendingBatch] = deque()
        try:
            for number in range(start, len(self)):
                first = (number * self.ranks + self.rank) * self.batch_size
                waiting.append(self._start_batch(order[first : first + self.batch_size], epoch))
                if len(waiting) > ahead:
                    yield from self._take_first(waiting)
            while waiting:
                yield from self._take_first(waiting)
        finally:
            for pending in waiting:
                for part in pending.parts:
                    part.cancel()

    def _start_batch(self, wanted: Indices, epoch: int) -> _PendingBatch:
        images = np.empty((len(wanted), 3, *self.transform.shape), np.uint8)
        indices = wanted.copy()
        parts = []
        for first in range(0, len(wanted), _PART):
            rows = slice(first, first + _PART)
            parts.append(self._submit(images[rows], indices[rows], epoch))
        return _PendingBatch(images, indices, parts)

    def _submit(self, images: Pixels, indices: Indices, epoch: int) -> Future[_Problems]:
        if self.workers:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(self.workers, "loader")
            return self._pool.submit(self._fill, images, indices, epoch)
        done: Future[_Problems] = Future()
        done.set_result(self._fill(images, indices, epoch))
        return done

    def _take_first(self, waiting: deque[_PendingBatch]) -> Iterator[Batch]:
        """Take the first batch out of ``waiting`` when it is full; nothing where all its pictures were left out."""
        pending = waiting[0]
        news = [line for part in pending.parts for line in self._note_problems(part.result())]
        waiting.popleft()
        if self._are_too_many(self._problems):
            raise self._too_many_error()
        images, indices = pending.images, pending.indices
        kept = indices != _DROPPED
        if not kept.all():
            images, indices = images[kept], indices[kept]
        if len(indices):
            known = self.dataset.labels
            labels = np.full(len(indices), NO_LABEL) if known is None else known[indices]
            yield Batch(images, labels, indices, tuple(news))

    def _note_problems(self, problems: _Problems) -> list[str]:
        """The lines of the broken pictures that were not known before."""
        news = {index: line for index, line in problems.items() if index not in self._problems}
        self._problems.update(news)
        return list(news.values())

    def _are_too_many(self, problems: _Problems) -> bool:
        return are_too_many(len(problems), len(self.dataset), self.max_bad)

    def _too_many_error(self) -> InputError:
        pictures = f"{plural(len(self.dataset), 'picture')} of {self.dataset.name}"
        return too_many_error(list(self._problems.values()), pictures, self.max_bad)

    # ---- in the threads ----

    def _fill(self, images: Pixels, indices: Indices, epoch: int) -> _Problems:
        """Make the pictures of ``indices`` in ``images``, and set right in ``indices`` which ones these are."""
        problems: dict[int, str] = {}
        for row, wanted in enumerate(indices.tolist()):
            index = wanted
            while (crop := self._crop(index, Draw(self.seed, epoch, wanted), problems)) is None:
                if self.broken == "drop" or self._are_too_many(problems):
                    break
                index = (index + 1) % len(self.dataset)
            indices[row] = _DROPPED if crop is None else index
            if crop is not None:
                cv2.split(crop, list(images[row]))  # Fills the three planes, 25 times as fast as NumPy.
        return problems

    def _crop(self, index: int, draw: Draw, problems: dict[int, str]) -> Pixels | None:
        try:
            return self.transform(self.dataset.image(index), draw)
        except InputError as error:
            problems[index] = str(error)
            return None


# Pictures that a thread takes at once: few enough to share a batch out evenly, enough to make handing over cheap.
_PART = 8
_PARTS_AHEAD = 2  # for each thread
_BATCHES_AHEAD = 2
_PROBLEMS_SHOWN = 3
_DROPPED = -1

_Problems: TypeAlias = Mapping[int, str]


@dataclass(frozen=True, slots=True)
class _PendingBatch:
    """A batch that threads are filling."""

    images: Pixels
    indices: Indices
    parts: list[Future[_Problems]]


def are_too_many(broken: int, pictures: int, max_bad: float) -> bool:
    """Whether ``broken`` of ``pictures`` are more than the share ``max_bad``, or all."""
    return broken > max_bad * pictures or broken == pictures


def too_many_error(problems: Sequence[str], pictures: str, max_bad: float) -> InputError:
    """The error for ``problems``, a line for each broken one of ``pictures``, a number with what they are."""
    first = "; ".join(problems[:_PROBLEMS_SHOWN])
    return InputError(
        f"{len(problems):,} of {pictures} cannot be read, and at most {100 * max_bad:.3g} % may be: remove or mend"
        f" them, or allow more; the first: {first}"
    )

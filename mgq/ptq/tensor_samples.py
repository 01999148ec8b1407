"""Keeps what some tensors held while gradients were measured.

What a mixture of their channels holds follows from it: the values are multiplied by a matrix, the gradients with
respect to them by its inverse, transposed. That takes less time than another pass through the network and back.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]
Values = npt.NDArray[np.float64]

MOST_KEPT = 1 << 27
"""Numbers that one process keeps at most: half a gigabyte of them."""


class Part(NamedTuple):
    """A part of the images of the measurement ``run``, that one process looks at."""

    run: str
    number: int


@dataclass
class Samples:
    """Values and gradients of the tensors ``of`` some names, float32 (N, C, ...), batch by batch."""

    of: dict[str, list[tuple[Array, Array]]] = field(default_factory=dict)
    size: int = 0

    def add(self, name: str, values: Array, gradients: Array) -> None:
        """Keep a copy of both, or nothing any more where it is too much in all."""
        self.size += values.size + gradients.size
        if self.size > MOST_KEPT:
            self.of.clear()
        if name in self.of:
            self.of[name].append((values.copy(), gradients.copy()))

    def mix_values(self, name: str, mixing: Values) -> Iterator[Array]:
        """The values of the tensor ``name`` with its channels multiplied by ``mixing`` (C, C)."""
        return (multiply(mixing, values) for values, _ in self.of[name])

    def mix_gradients(self, name: str, mixing: Values) -> Iterator[Array]:
        """The gradients with respect to these."""
        inverse = np.linalg.inv(mixing).T
        return (multiply(inverse, gradients) for _, gradients in self.of[name])


_kept: list[dict[Part, Samples]] = []


@contextlib.contextmanager
def keep_samples() -> Iterator[None]:
    """Within it the samples of the last measurement are kept."""
    _kept.append({})
    try:
        yield
    finally:
        _kept.pop()


def begin_samples(part: Part, names: Iterable[str]) -> Samples:
    """Samples of the tensors ``names``, to be filled; those of other measurements are dropped. Of none, where nobody
    keeps them."""
    samples = Samples()
    if _kept:
        samples.of = {name: [] for name in names}
        others = {old: kept for old, kept in _kept[-1].items() if old.run == part.run}
        _kept[-1].clear()
        _kept[-1].update({**others, part: samples})
    return samples


def find_samples(part: Part, names: Collection[str]) -> Samples | None:
    """The samples that this process kept of the tensors ``names``; None unless it has all."""
    samples = _kept[-1].get(part) if _kept else None
    return samples if samples is not None and samples.of.keys() >= set(names) else None


def multiply(matrix: Values, array: Array) -> Array:
    """``array`` (N, C, ...) with its channels multiplied by ``matrix`` (C, C)."""
    result: Array = (matrix.astype(np.float32) @ array.reshape(*array.shape[:2], -1)).reshape(array.shape)
    return result

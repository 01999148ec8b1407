"""Statistics of a batch that several processes share, exchanged in the middle of their forward and backward passes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Protocol

import numpy as np
import numpy.typing as npt

from mgq.cpu_kernels.tensor_exchange import Array

Sums = npt.NDArray[np.float64]


class Exchange(Protocol):
    """An exchange of statistics among processes. All of them make the same calls in the same order."""

    def merge_extremes(self, extremes: Array) -> Array:
        """The smallest and the largest of all: float32 (2,)."""

    def add_up(self, values: Sums) -> Sums:
        """Added up: float64 (N,)."""


def share_moments(exchange: Exchange, elements: int, mean: Sums, squares: Sums) -> tuple[int, Sums, Sums]:
    """Elements of a channel, mean and (biased) variance of all processes' batches, of those of this one's.

    ``squares`` (C,): sums of squared distances from ``mean`` (C,).
    """
    # Squares around each process's own mean, and what these means add to them.
    own = elements * mean
    found = exchange.add_up(np.concatenate([[elements], own, squares, own * mean]))
    total, within, between = found[1:].reshape(3, -1)
    centre = total / found[0]
    return int(found[0]), centre, np.maximum(within + between - total * centre, 0) / found[0]


def share_gradients(exchange: Exchange, d_shift: Sums, d_scale: Sums) -> Sums:
    """Both added up over all processes: (2, C)."""
    return exchange.add_up(np.concatenate([d_shift, d_scale])).reshape(2, -1)


_exchange: Exchange | None = None
_normalizes = False


@contextlib.contextmanager
def exchanging(exchange: Exchange, batch_norm: bool) -> Iterator[None]:
    """Within it observers see the extremes of all processes, and with ``batch_norm`` batch norms the whole batch.

    Batch norms need :func:`mgq.cpu_kernels.fast_gradients` for it.
    """
    global _exchange, _normalizes
    before = _exchange, _normalizes
    _exchange, _normalizes = exchange, batch_norm
    try:
        yield
    finally:
        _exchange, _normalizes = before


def exchange_of_batch_norm() -> Exchange | None:
    """The exchange that batch norms in training state use; None where they share no statistics."""
    return _exchange if _normalizes else None


def merge_extremes(extremes: Array) -> Array:
    """``extremes`` of all processes, float32 (2,); its own where it works alone."""
    return extremes if _exchange is None else _exchange.merge_extremes(extremes)

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

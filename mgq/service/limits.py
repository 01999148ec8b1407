"""Limits of a service, so that no client can use up its memory, its time or its connections."""

from __future__ import annotations

from dataclasses import dataclass

MEGA = 1_000_000


@dataclass(frozen=True)
class Limits:
    """``body_bytes``: of one request. ``pictures``: in one request. ``requests``: in work at a time, uploads included;
    more are refused with status 503. ``body_s``: seconds for a whole upload; ``answer_s``: for what follows it.
    ``batch``: pictures that run together, by default what suits the engine; ``gather_s``: seconds that the first of
    them waits for others.

    The uploads held in memory are at most ``requests * body_bytes``, and twice that while they are read.
    """

    body_bytes: int = 20 * MEGA
    pictures: int = 64
    requests: int = 32
    body_s: float = 30.0
    answer_s: float = 30.0
    batch: int | None = None
    gather_s: float = 0.002


HEAD_S = 10.0
"""Seconds for the head of a request, from the first byte on or before it, and for the rest of a body that is not
wanted any more."""
LAST_REQUEST_S = 1.0
"""While the service stops, an idle connection may still begin one request for this many seconds: it may have been
sent."""
CONNECTIONS = 500
"""The most connections; further ones are closed with an error."""

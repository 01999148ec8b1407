"""Which graphics cards MegEngine's CUDA runs on, and which are here."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

from mgq.errors import InputError, printable

OLDEST, NEWEST = (5, 2), (7, 5)
"""Compute capabilities that the wheel of MegEngine 1.13.0 (CUDA 10.1) has kernels for: GeForce GTX 900 to RTX 20."""
QUERY = ("nvidia-smi", "--query-gpu=name,compute_cap", "--format=csv,noheader")
PATIENCE_S = 20


@dataclass(frozen=True)
class GraphicsCard:
    """A card of NVIDIA's and its compute ``capability``, (major, minor)."""

    name: str
    capability: tuple[int, int]

    @property
    def fits(self) -> bool:
        """Whether MegEngine has kernels for it."""
        return OLDEST <= self.capability <= NEWEST

    def __str__(self) -> str:
        return f"{self.name} (compute capability {format_capability(self.capability)})"


def format_capability(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))


RANGE = (
    f"MegEngine 1.13.0 has kernels for compute capability {format_capability(OLDEST)} to {format_capability(NEWEST)}"
)


def graphics_cards() -> tuple[GraphicsCard, ...]:
    """The cards that NVIDIA's driver reports; none without a driver, or where it does not report their compute
    capability."""
    try:
        done = subprocess.run(QUERY, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ()
    return parse_cards(done.stdout) if done.returncode == 0 else ()


def parse_cards(listing: str) -> tuple[GraphicsCard, ...]:
    """The cards of lines like ``NVIDIA H200, 9.0``; other lines are left out."""
    found = []
    for line in listing.splitlines():
        name, _, capability = line.rpartition(",")
        major, _, minor = capability.strip().partition(".")
        if name and major.isdecimal() and minor.isdecimal():
            found.append(GraphicsCard(printable(name.strip()), (int(major), int(minor))))
    return tuple(found)


def refuse_unfit(cards: Sequence[GraphicsCard]) -> None:
    """Raises InputError where MegEngine has no kernels for one of ``cards``: it would fail somewhere deep inside."""
    for card in cards:
        if not card.fits:
            raise InputError(f"{card} does not train: {RANGE}; pass -n 0 to train on the processor")

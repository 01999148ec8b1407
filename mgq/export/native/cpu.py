"""Processor levels that code is compiled for, and the level of this machine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from mgq.errors import InputError, no_such
from mgq.export.native.emit.isa import Avx2, Avx512Vnni, AvxVnni, PortableIsa
from mgq.machine import CPU_INFO, cpuinfo_field

NATIVE = "native"


@dataclass(frozen=True)
class Leaf:
    """Bits that a leaf of ``cpuid`` has to have set: ``register`` is 0 to 3 for eax to edx."""

    leaf: int
    subleaf: int
    register: int
    bits: tuple[int, ...]

    @property
    def mask(self) -> int:
        return sum(1 << bit for bit in self.bits)


@dataclass(frozen=True)
class Level:
    """``flags``: Linux's names of the required features, ``leaves``: their bits in ``cpuid``.

    ``cpu`` and ``features`` are LLVM's names. ``state``: the registers that the system has to save, as bits of XCR0.
    """

    key: str
    isa: Callable[[], PortableIsa]
    cpu: str
    features: str
    flags: frozenset[str]
    leaves: tuple[Leaf, ...]
    state: int

    def runs_here(self) -> bool:
        return self.flags <= host_flags()


AVX2_LEAVES = (Leaf(1, 0, 2, (12, 27, 28)), Leaf(7, 0, 1, (3, 5, 8)))
V3 = frozenset({"avx2", "fma", "bmi1", "bmi2"})
V4_FLAGS = frozenset({"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl", "avx512_vnni", "avx512_vbmi2"})
LEVELS = (
    Level(
        "x86-64-v4-vnni",
        Avx512Vnni,
        "x86-64-v4",
        "+avx512vnni,+avx512vbmi,+avx512vbmi2",
        V3 | V4_FLAGS | {"avx512vbmi"},
        (*AVX2_LEAVES, Leaf(7, 0, 1, (16, 17, 28, 30, 31)), Leaf(7, 0, 2, (1, 6, 11))),
        0xE6,
    ),
    Level("avx-vnni", AvxVnni, "x86-64-v3", "+avxvnni", V3 | {"avx_vnni"}, (*AVX2_LEAVES, Leaf(7, 1, 0, (4,))), 6),
    Level("avx2", Avx2, "x86-64-v3", "", V3, AVX2_LEAVES, 6),
    Level("portable", PortableIsa, "x86-64", "", frozenset(), (), 0),
)
"""The faster first."""


@cache
def host_flags() -> frozenset[str]:
    """The features of this processor as Linux calls them; none where it does not say."""
    try:
        return frozenset(cpuinfo_field(CPU_INFO.read_text(encoding="utf-8", errors="replace"), "flags").split())
    except OSError:
        return frozenset()


def cpu_names() -> tuple[str, ...]:
    """The values of ``--cpu``."""
    return (NATIVE, *(level.key for level in LEVELS))


def get_level(key: str) -> Level:
    """The level ``key``, or the best that runs here. Raises InputError, which lists them, for any other name."""
    if key == NATIVE:
        return next(level for level in LEVELS if level.runs_here())
    for level in LEVELS:
        if level.key == key:
            return level
    raise no_such("cpu", key, cpu_names())


def refuse_foreign(level: Level, what: str) -> None:
    """Raises InputError where code for ``level`` cannot run on this processor."""
    if not level.runs_here():
        lacks = ", ".join(sorted(level.flags - host_flags()))
        raise InputError(
            f"{what} is for {level.key} processors, and this one lacks {lacks}: dump it with --cpu {NATIVE} or portable"
        )

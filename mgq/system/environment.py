"""Describes the machine that figures were measured on."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from pathlib import Path

import psutil  # type: ignore[import-untyped]

from mgq.machine import CPU_INFO, cpuinfo_field, set_library_defaults, usable_cores

# What the kernel calls it -> what the world calls it: the instructions that int8 and fp32 speed depends on.
FEATURES = {
    "avx": "AVX",
    "avx2": "AVX2",
    "fma": "FMA",
    "avx512f": "AVX-512",
    "avx_vnni": "AVX-VNNI",
    "avx512_vnni": "AVX-512 VNNI",
    "avx512_bf16": "AVX-512 BF16",
    "amx_int8": "AMX int8",
    "asimddp": "Arm dot product",
    "i8mm": "Arm i8mm",
    "sve": "Arm SVE",
}
DOT_PRODUCTS = frozenset({"AVX-VNNI", "AVX-512 VNNI", "AMX int8", "Arm dot product", "Arm i8mm"})
"""The instructions that sum products of int8 in 32 bits."""
# The beginnings of the names of variables that change how fast the engines and their libraries are.
VARIABLES = ("GOMP_", "KMP_", "MEGENGINE_", "MGB_", "MGE_", "MKL_", "OMP_", "ONEDNN_", "OPENBLAS_")
CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Machine:
    """One machine at one moment.

    ``physical_cores`` is None where the system does not tell. ``usable_cores`` are the logical ones that this
    process may run on. ``load`` is the average of the last 1, 5 and 15 minutes, empty where there is none.
    ``variables`` are those of the environment (as NAME=VALUE) that engines heed.
    """

    cpu: str
    features: tuple[str, ...]
    physical_cores: int | None
    logical_cores: int
    usable_cores: int
    system: str
    load: tuple[float, ...]
    variables: tuple[str, ...] = ()

    @property
    def busy(self) -> bool:
        """Whether more than a quarter of the usable cores had work in the last minute."""
        return bool(self.load) and self.load[0] > self.usable_cores / 4


def this_machine() -> Machine:
    """The machine that this runs on, as it is now, with the variables as the engines will find them."""
    set_library_defaults()
    cpuinfo = CPU_INFO.read_text(encoding="utf-8", errors="replace") if CPU_INFO.is_file() else ""
    return Machine(
        cpu=cpu_model(cpuinfo) or platform.processor() or platform.machine() or "unknown",
        features=cpu_features(cpuinfo),
        physical_cores=psutil.cpu_count(logical=False),
        logical_cores=os.cpu_count() or 1,
        usable_cores=usable_cores(),
        system=f"{operating_system()}, {platform.system()} {platform.release()} {platform.machine()}",
        load=tuple(os.getloadavg()) if hasattr(os, "getloadavg") else (),
        variables=tuple(f"{k}={v}" for k, v in sorted(os.environ.items()) if k.startswith(VARIABLES)),
    )


def saturates(features: tuple[str, ...]) -> bool:
    """Whether int8 is multiplied by AVX2's or AVX-512's sums of two products in 16 bits, which may not hold them."""
    return "AVX2" in features and DOT_PRODUCTS.isdisjoint(features)


def free_memory() -> int:
    """Bytes of memory that can be had without swapping."""
    return int(psutil.virtual_memory().available)


def total_memory() -> int:
    """Bytes of memory that the machine has."""
    return int(psutil.virtual_memory().total)


def cgroup_cores(root: Path = CGROUP) -> float | None:
    """The cores' worth of time that a container leaves to this process; None where it sets no limit."""
    quota, period = (cgroup_text(root / "cpu.max") or "").split() or ("max", "0")
    if quota == "max":  # or the older layout
        quota = cgroup_text(root / "cpu" / "cpu.cfs_quota_us") or "-1"
        period = cgroup_text(root / "cpu" / "cpu.cfs_period_us") or "100000"
    return int(quota) / int(period) if int(quota) > 0 else None


def cgroup_memory(root: Path = CGROUP) -> tuple[int | None, int]:
    """The bytes of memory that a container may use, None where it sets no limit, and those that it uses."""
    for limit, used in (
        (root / "memory.max", root / "memory.current"),
        (root / "memory" / "memory.limit_in_bytes", root / "memory" / "memory.usage_in_bytes"),
    ):
        text = cgroup_text(limit)
        if text and text.isdigit():
            return int(text), int(cgroup_text(used) or 0)
    return None, 0


def cgroup_text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="ascii").strip()
    except OSError:
        return None


def cpu_model(cpuinfo: str) -> str:
    """The processor's name in the text of ``/proc/cpuinfo``; '' where it has none, as on Arm."""
    return " ".join(cpuinfo_field(cpuinfo, "model name").split())


def cpu_features(cpuinfo: str) -> tuple[str, ...]:
    """Those of ``FEATURES`` that the text of ``/proc/cpuinfo`` lists, by the names that the world uses."""
    flags = set((cpuinfo_field(cpuinfo, "flags") or cpuinfo_field(cpuinfo, "Features")).split())
    return tuple(name for flag, name in FEATURES.items() if flag in flags)


def operating_system() -> str:
    """The distribution's name and version where the system tells them, else the platform's."""
    try:
        return platform.freedesktop_os_release()["PRETTY_NAME"]
    except (OSError, KeyError):
        return platform.platform(terse=True)

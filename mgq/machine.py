"""What MegEngine should know of the machine before it starts."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

DEBUG_VARIABLE = "MGQ_DEBUG"
"""Where it is set, tracebacks and what the libraries say are shown: it stands for ``mgq --debug``."""
PACKAGES = {
    "mgq": "mgq",
    "MegEngine": "megengine",
    "numpy": "numpy",
    "OpenCV": "opencv-python",
    "oneDNN": "onednn-cpu-gomp",
    "numba": "numba",
    "ONNX": "onnx",
    "ONNX Runtime": "onnxruntime",
    "OpenVINO": "openvino",
}
"""What the numbers depend on, besides Python: what the world calls it, and what pip does."""
CPU_INFO = Path("/proc/cpuinfo")
MKL_VARIABLE = "MKL_DEBUG_CPU_TYPE"
MKL_AVX2 = "5"
SPIN_VARIABLE = "MGB_WORKER_MAX_SPIN"
ONEDNN_VARIABLE = "ONEDNN_MAX_CPU_ISA"
ONEDNN_EXACT = "AVX512_CORE_VNNI"


def usable_cores() -> int:
    """The logical cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpuinfo_field(cpuinfo: str, name: str) -> str:
    """The value of the first line called ``name``: all processors of a machine are taken to be alike."""
    for line in cpuinfo.splitlines():
        key, colon, value = line.partition(":")
        if colon and key.strip() == name:
            return value.strip()
    return ""


def package_version(package: str) -> str | None:
    """The version of ``package`` as pip calls it; None where it is not installed. Imports nothing of it."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return None


def wait_without_spinning() -> None:
    """Let MegEngine's threads sleep while they wait for work, so that they take no core from others.

    It is read when the first tensor is made. A value that the user has set stays.
    """
    os.environ.setdefault(SPIN_VARIABLE, "1")


def prefer_exact_kernels() -> None:
    """Keep OpenVINO's oneDNN from AMX: with it (2025.4.1 and 2026.4.1) convolutions in groups give wrong integers.

    It is read when the first kernel is made. A value that the user has set stays.
    """
    with contextlib.suppress(OSError):
        if b"amx_int8" in CPU_INFO.open("rb").read(4096):
            os.environ.setdefault(ONEDNN_VARIABLE, ONEDNN_EXACT)


def prefer_fast_kernels() -> None:
    """Let MegEngine's MKL use its AVX2 kernels on an AMD processor: about 2.8 times as fast as its choice there.

    That version of MKL takes its slowest kernels on processors of other makers, unless this variable says
    otherwise when it first runs. A value that the user has set stays.
    """
    if MKL_VARIABLE in os.environ:
        return
    try:
        start = CPU_INFO.open("rb").read(4096)
    except OSError:
        return
    if b"AuthenticAMD" in start and b" avx2 " in start:
        os.environ[MKL_VARIABLE] = MKL_AVX2


def keep_freed_memory() -> None:
    """Let the C library keep what is freed for the next allocation, from here on.

    It would give large arrays back to the system at once, and every training step would pay for new, zeroed pages:
    up to a third of its time. Where the C library is another than glibc, nothing changes.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(_MMAP_MAX, 0)
        libc.mallopt(_TRIM_THRESHOLD, -1)


# Parameters of mallopt, as malloc.h has them.
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4


def debugging() -> bool:
    """Whether tracebacks and what the libraries say are to be shown."""
    return bool(os.environ.get(DEBUG_VARIABLE))


def hush_decoders() -> None:
    """Keep from the terminal what libraries say of damaged pictures, but for debugging: mgq names the files itself.

    libjpeg, libpng and libtiff print through the C library's ``stderr``, from whatever thread decodes, and name no
    file. That is sent to nowhere; Python's ``sys.stderr`` has a way of its own and stays. Where the C library has no
    such variable, nothing changes.
    """
    if debugging():
        return
    logging.getLogger("PIL").addHandler(_UNHEARD)
    warnings.filterwarnings("ignore", module=r"PIL\.")
    with contextlib.suppress(OSError, ValueError, AttributeError):
        if nowhere := _nowhere():
            ctypes.c_void_p.in_dll(ctypes.CDLL(None), "stderr").value = nowhere


_UNHEARD = logging.NullHandler()


@functools.cache
def _nowhere() -> int | None:
    """A file of the C library that keeps nothing; None where it cannot be opened."""
    libc = ctypes.CDLL(None)
    libc.fopen.restype = ctypes.c_void_p
    found: int | None = libc.fopen(os.devnull.encode(), b"w")
    return found


@contextlib.contextmanager
def mute_stderr() -> Iterator[None]:
    """Send file descriptor 2 to nowhere, but for debugging: libraries write there past Python's ``sys.stderr``."""
    if debugging():
        yield
        return
    sys.stderr.flush()
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        sys.stderr.flush()
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)

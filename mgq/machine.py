"""Facts about the machine, and settings of libraries that must be made before MegEngine starts."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

from mgq.errors import InputError

DEBUG_VARIABLE = "MGQ_DEBUG"
"""The variable for ``mgq --debug``: tracebacks and messages of libraries are shown where it is set."""
PACKAGES = {
    "mgq": "mgq",
    "MegEngine": "megengine",
    "numpy": "numpy",
    "OpenCV": "opencv-python",
    "oneDNN": "onednn-cpu-gomp",
    "numba": "numba",
    "ONNX": "onnx",
    "llvmlite": "llvmlite",
}
"""What the numbers depend on, besides Python and backends: what the world calls it, and what pip does."""
OTHER_PACKAGES = {
    "opencv-python": ("opencv-python-headless", "opencv-contrib-python", "opencv-contrib-python-headless")
}
"""Packages that bring the same module as one of those."""
MEGENGINE_PYTHON = (3, 10)
"""The newest Python that MegEngine has a wheel for."""
MEGENGINE_MEND = "run it by `uv run --python 3.10 mgq`, or pip install 'mgq[megengine]' under Python 3.10"
WITHOUT_MEGENGINE = f"this needs MegEngine, which is not installed: {MEGENGINE_MEND}"
CPU_INFO = Path("/proc/cpuinfo")
MKL_VARIABLE = "MKL_DEBUG_CPU_TYPE"
MKL_AVX2 = "5"
SPIN_VARIABLE = "MGB_WORKER_MAX_SPIN"
TUNING_VARIABLE = "MGE_FASTRUN_CACHE_TYPE"
POLLER = "CompNodeSync"
PATIENCE_NS = 5_000_000
HELPERS = ("worker", "cpu")
"""What MegEngine calls its thread that polls; how the names of those begin that work for others."""
ONEDNN_VARIABLE = "ONEDNN_MAX_CPU_ISA"
ONEDNN_EXACT = "AVX512_CORE_VNNI"


def usable_cores() -> int:
    """The number of logical cores that this process may run on."""
    return len(list_usable_cores())


def list_usable_cores() -> set[int]:
    """The numbers of the logical cores that this process may run on."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


def place_threads(cores: set[int]) -> None:
    """Let all threads of this process run on ``cores``; those that it starts later do, too."""
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):  # it has ended
            os.sched_setaffinity(int(task.name), cores)


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

    for name in (package, *OTHER_PACKAGES.get(package, ())):
        with contextlib.suppress(PackageNotFoundError):
            return version(name)
    return None


def has_megengine() -> bool:
    """Whether MegEngine is installed. Imports nothing of it."""
    from importlib.util import find_spec

    return find_spec("megengine") is not None


def refuse_without_megengine() -> None:
    """Raises InputError, which says what to run instead, where MegEngine is not installed."""
    if not has_megengine():
        raise InputError(WITHOUT_MEGENGINE)


def set_library_defaults() -> None:
    """Set the variables of the environment that MegEngine and OpenVINO read when they start to compute.

    Called before the first network is built, the first file is loaded, or the machine is described: an import of mgq
    alone changes nothing in the program around it. Values that the user has set stay.
    """
    prefer_exact_kernels()
    prefer_fast_kernels()
    wait_without_spinning()
    keep_tuning_in_memory()


def keep_tuning_in_memory() -> None:
    """Spare MegEngine its file of measured kernels where that cannot be written: its import would fail.

    So it is where the home folder is read-only or not there. A value that the user has set stays.
    """
    if "megengine" in sys.modules or TUNING_VARIABLE in os.environ or not has_megengine():
        return
    caches = os.environ.get("MGE_HOME") or f"{os.environ.get('XDG_CACHE_HOME', '~/.cache')}/megengine"
    folder = Path(os.environ.get("MGE_FASTRUN_CACHE_DIR") or f"{caches}/persistent_cache")
    try:
        folder = folder.expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "cache.bin").open("ab"):
            pass
    except (OSError, RuntimeError):  # the latter where there is no home at all
        os.environ[TUNING_VARIABLE] = "MEMORY"


def wait_without_spinning() -> None:
    """Let MegEngine's threads sleep while they wait for work, so that they take no core from others.

    It is read when the first tensor is made. A value that the user has set stays.
    """
    os.environ.setdefault(SPIN_VARIABLE, "1")


def processor_has(flag: str) -> bool:
    """Whether the processor has a feature that Linux calls ``flag``; elsewhere it is not known, and not there."""
    try:
        with CPU_INFO.open("rb") as file:
            return flag.encode() in file.read(4096).split()
    except OSError:
        return False


def has_bfloat16() -> bool:
    """Whether the processor multiplies bfloat16 numbers by itself."""
    return any(map(processor_has, ("avx512_bf16", "amx_bf16")))


def prefer_exact_kernels() -> None:
    """Keep OpenVINO's oneDNN from AMX: with it (2025.4.1 and 2026.4.1) convolutions in groups give wrong integers.

    It is read when the first kernel is made. A value that the user has set stays.
    """
    if processor_has("amx_int8"):
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


def calm_threads() -> None:
    """Let none of MegEngine's threads push the one that computes aside.

    One of them polls: it wakes some ten thousand times a second whatever there is to do, and a training step on one
    core took 1.4 times as long. Others work for the one that computes. They get their share as before, but wait until
    the core is free instead of breaking in. (With no share at all, what the poller gives back piled up.) Does nothing
    before MegEngine has made its first tensor, and where the system knows no such threads.
    """
    with contextlib.suppress(OSError, AttributeError):
        for task in Path("/proc/self/task").iterdir():
            name = (task / "comm").read_text().strip()
            if name == POLLER or name.startswith(HELPERS):
                os.sched_setscheduler(int(task.name), os.SCHED_BATCH, os.sched_param(0))


@contextlib.contextmanager
def patient_threads() -> Iterator[None]:
    """Threads that start within it may be woken later than they ask for: their naps end together with other things.

    MegEngine's thread that polls takes naps of some ten microseconds for as long as the program runs, and each
    interrupts what computes. Does nothing where the system knows no such thing.
    """
    before = _prctl(_GET_TIMER_SLACK, 0)
    if before > 0:
        _prctl(_SET_TIMER_SLACK, PATIENCE_NS)
    try:
        yield
    finally:
        if before > 0:
            _prctl(_SET_TIMER_SLACK, before)


def _prctl(what: int, value: int) -> int:
    """What the kernel answers; -1 where it is none that knows such calls."""
    try:
        return int(ctypes.CDLL(None).prctl(what, ctypes.c_ulong(value), 0, 0, 0))
    except (OSError, AttributeError, TypeError):
        return -1


def keep_freed_memory() -> None:
    """Let the C library keep what is freed for the next allocation, from here on.

    It would give large arrays back to the system at once, and every training step would pay for new, zeroed pages:
    up to a third of its time, and an eighth of a calibration's. Threads that begin later share one heap, so that each
    can use what another has freed. Where the C library is another than glibc, nothing changes.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(_MMAP_MAX, 0)
        libc.mallopt(_TRIM_THRESHOLD, -1)
        libc.mallopt(_ARENA_MAX, 1)


@contextlib.contextmanager
def one_blas_thread() -> Iterator[None]:
    """Inside, numpy and scipy multiply in the thread that asks for it.

    OpenBLAS shares out sums of 10,000 numbers already, and its threads wait for each other in a loop: with other work
    on the machine three equalizations took 200 s instead of 11. What it gives depends on no number of cores so.
    """
    import scipy.linalg  # noqa: F401  # its library counts from here on
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1, "blas"):
        yield


def use_threads(number: int) -> None:
    """Let the libraries that are loaded compute in ``number`` threads from here on."""
    from threadpoolctl import threadpool_limits

    threadpool_limits(number)


@functools.cache
def use_large_pages() -> None:
    """Ask the system for pages of 2 MiB for what the C library allocates from here on: arrays are then found faster.

    The heap grows once by addresses, not by memory: what nobody writes to takes none. Call :func:`keep_freed_memory`
    first, or the C library gives them back. Where the system knows no such thing, nothing changes.
    """
    with contextlib.suppress(OSError, AttributeError, ValueError):
        libc = ctypes.CDLL(None)
        libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, (ctypes.c_size_t,)
        libc.free.argtypes = (ctypes.c_void_p,)
        libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        size = min(_LARGE_HEAP, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2)
        if start := libc.malloc(size):
            first = -(-start // _LARGE_PAGE) * _LARGE_PAGE
            libc.madvise(first, (start + size - first) // _LARGE_PAGE * _LARGE_PAGE, _MADV_HUGEPAGE)
            libc.free(start)


_LARGE_PAGE, _LARGE_HEAP = 2 << 20, 4 << 30
# What madvise is told, as mman.h has it.
_MADV_HUGEPAGE = 14
# Parameters of mallopt, as malloc.h has them.
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8
# What prctl is asked for, as the kernel has it.
_SET_TIMER_SLACK, _GET_TIMER_SLACK = 29, 30


def is_debugging() -> bool:
    """Whether tracebacks and what the libraries say are to be shown."""
    return bool(os.environ.get(DEBUG_VARIABLE))


def hush_decoders() -> None:
    """Keep from the terminal what libraries say of damaged pictures, but for debugging: mgq names the files itself.

    libjpeg, libpng and libtiff print through the C library's ``stderr``, from whatever thread decodes, and name no
    file. That is sent to nowhere; Python's ``sys.stderr`` has a way of its own and stays. Where the C library has no
    such variable, nothing changes.
    """
    if is_debugging():
        return
    warnings.filterwarnings("ignore", module=r"PIL\.")
    with contextlib.suppress(OSError, ValueError, AttributeError, TypeError):
        if nowhere := _open_null_file():
            ctypes.c_void_p.in_dll(ctypes.CDLL(None), "stderr").value = nowhere


@functools.cache
def _open_null_file() -> int | None:
    """A file of the C library that keeps nothing; None where it cannot be opened."""
    libc = ctypes.CDLL(None)
    libc.fopen.restype = ctypes.c_void_p
    found: int | None = libc.fopen(os.devnull.encode(), b"w")
    return found


@contextlib.contextmanager
def quiet_import() -> Iterator[None]:
    """Inside, MegEngine may be imported: what it and its modules say then is not shown, but for debugging."""
    import numpy as np

    # MegEngine makes the processor flush subnormals to zero; asked later, numpy would warn of that.
    np.finfo(np.float32), np.finfo(np.float64)
    with mute_stderr(), warnings.catch_warnings():
        if not is_debugging():
            warnings.filterwarnings("ignore", message=".*pkg_resources.*")
        yield


@functools.cache
def load_megengine() -> None:
    """Import MegEngine; but for debugging without what its library says while it looks for a GPU and at first use.

    A program that calls mgq has its modules and filters of warnings as they were. Raises InputError, which says what to
    run instead, where it is not installed.
    """
    refuse_without_megengine()
    set_library_defaults()
    with quiet_import(), patient_threads():
        import megengine

        (megengine.tensor([0.0]) + 1).numpy()
        megengine.is_cuda_available()


@contextlib.contextmanager
def mute_stderr() -> Iterator[None]:
    """Send file descriptor 2 to nowhere, but for debugging: libraries write there past Python's ``sys.stderr``."""
    if is_debugging():
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

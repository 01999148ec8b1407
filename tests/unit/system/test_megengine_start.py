"""How MegEngine is started."""

from __future__ import annotations

import ctypes
import os
import platform
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from megengine.core import get_option

from mgq.machine import PATIENCE_NS, patient_threads
from mgq.system.megengine_start import NEVER, import_megengine


def test_no_tensor_is_ever_listed_to_be_dropped() -> None:
    """Two threads of MegEngine change that list, one of them without a lock."""
    import_megengine()
    assert get_option("dtr_evictee_minimum_size") == NEVER


def test_it_starts_where_no_cache_can_be_written() -> None:
    """A read-only home, as services and containers have it. Root may write anywhere but below /proc."""
    program = "from mgq.system.megengine_start import import_megengine; import_megengine()"
    kept = {name: value for name, value in os.environ.items() if name not in ("XDG_CACHE_HOME", "MGE_HOME")}
    done = subprocess.run(
        [sys.executable, "-c", program], env={**kept, "HOME": "/proc"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux lets threads nap longer")
def test_threads_of_megengine_nap_long_and_this_one_as_before() -> None:
    before = slack_ns()
    with patient_threads():
        assert slack_ns() == PATIENCE_NS
        assert ThreadPoolExecutor(1).submit(slack_ns).result() == PATIENCE_NS
    assert slack_ns() == before


def slack_ns() -> int:
    """How much later than it asks for this thread may be woken."""
    of_slack = 30  # as prctl.h has it
    return int(ctypes.CDLL(None).prctl(of_slack, 0, 0, 0, 0))


def gives_large_pages() -> bool:
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return setting.is_file() and "[never]" not in setting.read_text()


@pytest.mark.skipif(not gives_large_pages(), reason="this system has no large pages to give")
def test_arrays_of_a_training_lie_in_large_pages() -> None:
    program = """
from pathlib import Path
from mgq.machine import keep_freed_memory, use_large_pages
keep_freed_memory()
use_large_pages()
import numpy
arrays = [numpy.ones(3 << 18, numpy.float32) for _ in range(8)]  # numpy itself asks from 4 MiB on
lines = Path("/proc/self/smaps").read_text().splitlines()
print(sum(int(line.split()[1]) for line in lines if line.startswith("AnonHugePages")))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert int(done.stdout) >= 16 << 10


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries take no such settings")
def test_what_one_thread_frees_serves_another() -> None:
    program = """
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from mgq.machine import keep_freed_memory
keep_freed_memory()
import numpy
def fill():
    numpy.ones(24 << 20, numpy.uint8)  # freed at once
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS"))
with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(1) as other:
    before = one.submit(fill).result()
    print(other.submit(fill).result() - before)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 12 << 10  # half of the array

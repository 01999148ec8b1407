"""Finds the run that a command uses when none is named. Importing it imports no MegEngine."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path

from mgq.errors import printable
from mgq.quantization.option_names import Mode
from mgq.zoo.registry import ModelSpec, spec_of, specs

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


def find_unused_float_run(spec: ModelSpec, mode: Mode, save: Path) -> Path | None:
    """The folder of the float run of ``spec`` under ``save``, where none of its runs can serve ``mode``; else None."""
    if find_newest_run(spec, mode, save) is not None:
        return None
    found = find_newest_run(spec, Mode.NORMAL, save)
    return None if found is None else found.parent


def find_newer_run(mode: Mode, save: Path) -> Path | None:
    """The newest run under ``save`` that can serve ``mode``, an imported network's included, where it is none of
    ``DEFAULT_ARCH``: its checkpoint."""
    found = [path for kind in RUNS_FOR[mode] for path in save.glob(f"*.{kind}/{RUN_CHECKPOINT}")]
    newest = find_newest(found)
    return None if newest is None or newest.parent.name.rpartition(".")[0] == DEFAULT_ARCH else newest


def describe_unused_runs(arch: str | None, mode: Mode, save: Path) -> list[str]:
    """What is said of runs under ``save`` that a command passes over, a line each: of those that
    :func:`describe_others` names."""
    return [f"not used: {line}" for line in describe_others(arch, mode, save)]


def describe_others(arch: str | None, mode: Mode, save: Path) -> list[str]:
    """What makes something of the runs under ``save`` that are not what ``arch`` and ``mode`` mean, a phrase each.

    Such is a float run of ``arch``, where that has no other and ``mode`` takes other weights; and the newest run, where
    no ``arch`` was chosen and that is none of ``DEFAULT_ARCH``.
    """
    spec, found = spec_of(arch or DEFAULT_ARCH), []
    if (run := find_unused_float_run(spec, mode, save)) is not None:
        found.append(describe_unused(run, spec))
    if arch is None and (newer := find_newer_run(mode, save)) is not None:
        found.append(describe_newer(newer))
    return found


def describe_lack(arch: str | None, modes: Sequence[Mode], save: Path) -> str:
    """Why no run of ``arch`` under ``save`` can serve one of ``modes``, as the end of a sentence about that folder;
    empty where one can."""
    spec = spec_of(arch or DEFAULT_ARCH)
    if any(find_newest_run(spec, mode, save) for mode in modes):
        return ""
    if (save / RUN_CHECKPOINT).is_file():
        return f"is a run itself: pass -c {printable(save / RUN_CHECKPOINT)}, or the folder that it lies in"
    others = [phrase for mode in modes for phrase in describe_others(arch, mode, save)]
    verb = "train" if Mode.NORMAL in modes else "qat"
    mend = others[0] if others else f"`mgq {verb} -a {shlex.quote(spec.typed)}` makes one, or leave the option out"
    return f"has no run of {spec.name} that can serve: {mend}"


def describe_newer(run: Path) -> str:
    """What takes the ``run``, a checkpoint, as the end of a sentence about it."""
    arch = run.parent.name.rpartition(".")[0]
    option = f"-a {arch}" if arch in specs() else f"-c {shlex.quote(str(run))}"
    return f"{printable(run.parent)} is the newest run: `{printable(option)}` takes it"


def describe_unused(run: Path, spec: ModelSpec) -> str:
    """What makes int8 of the float ``run`` of ``spec``, as the end of a sentence about it."""
    arch = shlex.quote(spec.typed)
    return f"{printable(run)} is float: `mgq calibrate -a {arch}` or `mgq qat -a {arch}` makes int8 of it"


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

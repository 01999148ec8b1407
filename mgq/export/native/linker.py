"""Writes shared libraries: a network as one file that needs only libc, and a header beside it."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mgq.errors import FailureError, InputError, printable
from mgq.export.native.compiler import module_for, object_of
from mgq.export.native.cpu import Level
from mgq.export.native.emit.interface import HEADER, Facts, interface_text
from mgq.export.native.program import Program
from mgq.io.atomic import atomic_write
from mgq.io.temporary_folders import temporary_folder

PATIENCE_S = 120


@dataclass(frozen=True)
class SharedLibrary:
    """``path`` of the library, or of the object file where nothing could link it; its header and its bytes."""

    path: Path
    header: Path
    size: int
    linked_by: str | None


def write_library(program: Program, path: Path, level: Level, about: Mapping[str, Any]) -> SharedLibrary:
    """Write ``program`` for ``level`` to ``path``, and its header beside it, with the suffix ``.h``.

    Without a linker the object file is written, under the suffix ``.o``. Raises FailureError where linking fails,
    InputError for a network that the engine does not run; nothing is left at ``path`` then.
    """
    refuse_other_than_squares(program)
    facts = facts_of(program, about)
    code = object_of(interface_text(module_for(program, level, linkage="internal"), level, facts), level, shared=True)
    command = link_command()
    header = path.with_suffix(".h")
    target = path if command else path.with_suffix(".o")
    with atomic_write(target) as temporary:
        if command:
            link(command, code, temporary)
        else:
            temporary.write_bytes(code)
    with atomic_write(header) as temporary:
        temporary.write_text(HEADER, encoding="utf-8")
    return SharedLibrary(target, header, target.stat().st_size, name_of(command) if command else None)


def refuse_other_than_squares(program: Program) -> None:
    """Raise InputError for images that are no squares: the functions of a library state one size."""
    tensor = program.tensors[program.input]
    if tensor.height != tensor.width:
        raise InputError(
            "mgq does not write a library of pictures that are no squares: pass --engine native with the .onnx file"
        )


def facts_of(program: Program, about: Mapping[str, Any]) -> Facts:
    names = [str(name) for name in about.get("classes") or ()]
    if len(names) != program.classes:
        names = [str(number) for number in range(program.classes)]
    return Facts(str(about.get("arch", "network")), program.image_size, names, json.dumps(dict(about), sort_keys=True))


def link_command() -> list[str] | None:
    """A command that links a shared library; None where this machine has none."""
    for name in ("cc", "gcc", "clang"):
        if shutil.which(name):
            return [name, "-shared", "-nostartfiles", "-s"]
    if importlib.util.find_spec("ziglang"):
        return [sys.executable, "-m", "ziglang", "cc", "-shared", "-s"]
    for name in ("ld", "ld.lld"):
        if shutil.which(name):
            return [name, "-shared", "-s"]
    return None


def name_of(command: list[str]) -> str:
    """The linker's name: ``cc`` or ``ziglang cc``."""
    words = command if command[0] != sys.executable else [word for word in command[1:] if word != "-m"]
    return " ".join(Path(word).name for word in words if not word.startswith("-"))


def link(command: list[str], code: bytes, path: Path) -> None:
    with temporary_folder() as folder:
        source, result = folder / "network.o", folder / "network.so"
        source.write_bytes(code)
        whole = [*command, "-o", str(result), str(source), *([] if "ld" in Path(command[0]).name else ["-lc"])]
        done = subprocess.run(whole, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
        if done.returncode:
            lines = (done.stderr or done.stdout).strip().splitlines() or ["no reason given"]
            raise FailureError(f"{name_of(command)} cannot link the library: {printable(lines[-1])[:300]}")
        shutil.copyfile(result, path)

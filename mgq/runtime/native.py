"""The native engine: an int8 ``.onnx`` file of mgq as machine code for this processor."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from mgq.errors import InputError, MgqError, printable
from mgq.export.native.cache import Entry, key_of, read_entry, write_entry
from mgq.export.native.compiler import compile_program
from mgq.export.native.cpu import NATIVE, Level, get_level, refuse_foreign
from mgq.export.native.library import Library
from mgq.export.onnx.onnx_file import OnnxFile, import_package, parse_onnx, read_content
from mgq.runtime.protocol import OnnxFileRuntime, check_threads

if TYPE_CHECKING:
    from mgq.export.native.program import Program


class NativeRuntime(OnnxFileRuntime):
    """An ``.onnx`` file that mgq has written in int8. Takes and returns what :class:`mgq.runtime.protocol.Runtime`
    says.

    ``cpu`` is a name of :func:`mgq.export.native.cpu.cpu_names`. Compiled code is cached. Raises InputError for a file
    that the engine does not run, for more threads than cores, for a processor that ``cpu`` does not fit, and for images
    of another shape than the file takes.
    """

    name = "native"

    def __init__(self, path: Path, threads: int = 1, cpu: str = NATIVE) -> None:
        self.threads = check_threads(threads)
        level = get_level(cpu)
        refuse_foreign(level, f"the native engine of {printable(path)}")
        self.version = level.key
        self.file, entry = prepare(path, level)
        self.library = Library(entry.compiled, self.file.classes, threads)

    def run(self, batch: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        self.file.refuse_other_shape(batch.shape)
        if batch.dtype != np.uint8:
            raise InputError(f"{printable(self.file.path)} takes uint8 pixels, not {batch.dtype}")
        return self.library.run(batch)

    def outputs(self, batch: npt.NDArray[np.uint8]) -> dict[str, npt.NDArray[Any]]:
        """The logits, by the name of the file's output."""
        return {self.file.output: self.run(batch)}


def prepare(path: Path, level: Level) -> tuple[OnnxFile, Entry]:
    """The cache entry of the file at ``path``, with its machine code; compiled now if it is missing."""
    content = read_content(path)
    key = key_of(content, level.key)
    entry = read_entry(key)
    if entry is not None:
        return file_of(path, content, entry), entry
    file = parse_onnx(path, content)
    entry = compile_file(file, level)
    write_entry(key, entry)
    return file, entry


def can_run(path: Path) -> bool:
    """Whether the engine runs the file at ``path`` on this processor. Nothing is compiled to find out."""
    from mgq.export.native.planner import make_plan

    try:
        content = read_content(path)
        if read_entry(key_of(content, get_level(NATIVE).key)) is None:
            make_plan(program_of(parse_onnx(path, content)))
    except MgqError:
        return False
    return True


def program_of(file: OnnxFile) -> Program:
    from mgq.export.native.program import read_program

    model = import_package("onnx").load_from_string(file.content)
    if len(model.graph.output) > 1:
        raise InputError(f"the native engine gives logits alone, and {printable(file.path)} has more outputs")
    return read_program(model)


def compile_file(file: OnnxFile, level: Level) -> Entry:
    code = compile_program(program_of(file), level)
    kept = ("input", "type", "shape", "output", "about", "quantized", "classes")
    return Entry(code, {name: getattr(file, name) for name in kept})


def file_of(path: Path, content: bytes, entry: Entry) -> OnnxFile:
    """As :func:`mgq.export.onnx.onnx_file.read_onnx` gives it, without reading it."""
    about = dict(entry.about)
    return OnnxFile(path, content, **{**about, "shape": tuple(about["shape"])})

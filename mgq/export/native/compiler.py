"""From an ONNX file's network to machine code: in memory, or as an object file to link. It needs llvmlite alone."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from mgq.export.native.cpu import Level

if TYPE_CHECKING:
    from mgq.export.native.emit.driver import Module
    from mgq.export.native.program import Program

ATTRIBUTES = "nounwind"
OPTIMIZATION = 3


@dataclass(frozen=True)
class CompiledProgram:
    """Machine code as an object file, the constants that it reads, and the bytes of a thread's work area."""

    code: bytes
    constants: bytes
    work: int


@cache
def llvm() -> Any:
    """LLVM's binding, made ready for this machine."""
    import llvmlite.binding as binding

    with contextlib.suppress(RuntimeError):  # later versions do it by themselves, and say so
        binding.initialize()
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    binding.initialize_native_asmparser()
    return binding


def module_for(program: Program, level: Level, keep: bool = False, linkage: str = "") -> Module:
    """``keep``: every tensor stays readable in the work area, for tests. Raises InputError as ``make_plan`` does."""
    from mgq.export.native.emit.driver import emit_module  # what was compiled before needs none of it
    from mgq.export.native.planner import make_plan

    isa = level.isa()
    return emit_module(make_plan(program, keep, isa.unit), isa, ATTRIBUTES, linkage)


def compile_program(program: Program, level: Level, keep: bool = False) -> CompiledProgram:
    """``program`` for processors of ``level``, to be run by :class:`mgq.export.native.library.Library`."""
    module = module_for(program, level, keep)
    return CompiledProgram(object_of(module.text, level), module.constants, module.work)


def object_of(text: str, level: Level, shared: bool = False) -> bytes:
    """The object file of a module's text; ``shared``: to be linked into a shared library."""
    binding = llvm()
    module = binding.parse_assembly(text)
    module.verify()
    options = {"reloc": "pic", "codemodel": "small"} if shared else {"codemodel": "jitdefault", "jit": True}
    target = binding.Target.from_default_triple()
    machine = target.create_target_machine(cpu=level.cpu, features=level.features, opt=OPTIMIZATION, **options)
    content: bytes = machine.emit_object(module)
    return content

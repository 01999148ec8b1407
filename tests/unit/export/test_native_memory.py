"""The native engine's kernels touch nothing but their own memory: guard pages, the address sanitizer, and another
processor."""

from __future__ import annotations

import ctypes
import importlib.util
import mmap
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from mgq.export.native.compiler import CompiledProgram, llvm, object_of
from mgq.export.native.cpu import Level
from mgq.export.native.emit import driver, team
from mgq.export.native.emit.driver import Module, emit_module
from mgq.export.native.emit.team import HEADER
from mgq.export.native.library import Library
from mgq.export.native.packing import Constants
from mgq.export.native.planner import Plan, make_plan
from mgq.export.native.program import Program
from mgq.export.native.reference import run_reference
from tests.conftest import slow
from tests.fakes.native_programs import HERE, PORTABLE, Images, noise, program_for

PAGE = mmap.PAGESIZE
SIZE = 96
"""Maps of 48, 24, 12, 6 and 3 pixels: rows that fill no vector, too."""
ARCHS = ("mobilenet_v2", "shufflenet_v1_x1_5_g3", slow("resnet18"), slow("efficientnet_lite0"))
Bytes = npt.NDArray[np.uint8]


def up(size: int) -> int:
    return -(-size // PAGE) * PAGE


class Apart(Constants):
    """Each array ends with a page, and behind it is one that nobody may touch."""

    def add(self, values: npt.NDArray[np.generic]) -> int:
        size = -(-np.ascontiguousarray(values).nbytes // 64) * 64
        self.fill(up(self.size + size) - size)
        offset = super().add(values)
        guards.append(self.size)
        self.fill(self.size + PAGE)
        return offset

    def fill(self, end: int) -> None:
        self.parts.append(bytes(end - self.size))
        self.size = end


guards: list[int] = []
"""Pages behind the constants."""


def spread(plan: Plan) -> list[int]:
    """Put each tensor right before a page of its own, in the work area; these pages."""
    plan.border = up(plan.border)
    place, found = 2 * plan.border, [2 * plan.border]
    for storage in plan.storages.values():
        end = up(place + PAGE + storage.size)
        storage.offset = end - storage.size
        found.append(end)
        place = end
    plan.size = place + PAGE
    return found


def guarded_module(program: Program, level: Level, keep: bool = False) -> tuple[Module, list[int], list[int]]:
    """The network with its tensors and constants apart, and the pages behind those and these."""
    guards.clear()
    plan = make_plan(program, keep, level.isa().unit)
    pages = spread(plan)
    return emit_module(plan, level.isa(), "nounwind"), pages, list(guards)


def forbid(address: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mprotect(ctypes.c_void_p(address), PAGE, 0):
        raise OSError(ctypes.get_errno(), "mprotect")


def ending(size: int) -> Bytes:
    """``size`` bytes that end with the last page that may be touched."""
    whole = np.frombuffer(mmap.mmap(-1, up(size) + PAGE), np.uint8)
    forbid(whole.ctypes.data + up(size))
    return whole[up(size) - size : up(size)]


def status_of(work: Callable[[], bool]) -> int:
    """What a child process that does ``work`` ends with: 0 where that is true, a signal where it is stopped."""
    child = os.fork()
    if not child:
        os._exit(0 if work() else 1)
    return os.waitpid(child, 0)[1]


@pytest.fixture
def constants_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "Constants", Apart)


@pytest.mark.parametrize("level", HERE, ids=lambda level: str(level.key))
@pytest.mark.parametrize("arch", ARCHS)
def test_no_kernel_touches_what_lies_behind_its_memory(arch: str, level: Level, constants_apart: None) -> None:
    program = program_for(arch, SIZE)
    image = noise(SIZE, 1, 3)
    wanted = run_reference(program, image)[0]
    module, pages, behind = guarded_module(program, level)
    compiled = CompiledProgram(object_of(module.text, level), module.constants, module.work)

    def work() -> bool:
        library = Library(compiled, 1000, 2)
        for page in pages:
            for area in range(2):
                forbid(library.team.work.ctypes.data + HEADER + area * compiled.work + page)
        for page in behind:
            forbid(library.constants.ctypes.data + page)
        pixels, logits = ending(image.size), ending(4 * program.classes)
        pixels[:] = image.ravel()
        library.team.calls.run(pixels.ctypes.data, 1, logits.ctypes.data, library.team.work.ctypes.data)
        return bool(np.array_equal(logits.view(np.float32), wanted[0]))

    assert status_of(work) == 0


def test_guard_pages_stop_who_touches_them() -> None:
    assert status_of(lambda: bool(ctypes.string_at(ending(10).ctypes.data, 11))) != 0


# Programs in C

MAIN = """
#include <stdio.h>
#include <stdlib.h>
#ifdef CHECKED
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(start, size) ((void)(start))
#endif
void mgq_lead(void *constants, void *images, size_t count, float *logits, void *team, size_t threads);
static const size_t gaps[][3] = {GAPS};
int main(void) {
    char *memory[2] = {aligned_alloc(4096, WORK_SIZE), aligned_alloc(4096, CONSTANT_SIZE)};
    unsigned char *image = malloc(IMAGE_SIZE);
    float *logits = malloc(4 * CLASSES);
    FILE *file = fopen("constants", "rb");
    if (fread(memory[1], 1, CONSTANT_SIZE, file) != CONSTANT_SIZE || fread(image, 1, IMAGE_SIZE, stdin) != IMAGE_SIZE)
        return 2;
    for (size_t i = 0; i < sizeof gaps / sizeof *gaps; i++)
        ASAN_POISON_MEMORY_REGION(memory[gaps[i][0]] + gaps[i][1], gaps[i][2]);
    mgq_lead(memory[1], image, 1, logits, memory[0], 1);
    fwrite(logits, 4, CLASSES, stdout);
    fclose(file), free(memory[0]), free(memory[1]), free(image), free(logits);
    return 0;
}
"""
Gaps = list[tuple[int, int, int]]
"""In which memory, work area or constants, from which byte on, and how many."""


def write_program(folder: Path, module: Module, code: bytes, program: Program, gaps: Gaps) -> None:
    """``main.c``, ``net.o`` and ``constants``: the program takes an image and gives logits."""
    tensor = program.tensors[program.input]
    numbers = {
        "CONSTANT_SIZE": up(len(module.constants)),
        "WORK_SIZE": HEADER + module.work,
        "IMAGE_SIZE": tensor.channels * tensor.height * tensor.width,
        "CLASSES": program.classes,
    }
    source = "".join(f"#define {name} {value}\n" for name, value in numbers.items())
    listed = ", ".join(f"{{{memory}, {first}, {size}}}" for memory, first, size in gaps)
    (folder / "main.c").write_text(source + MAIN.replace("GAPS", listed))
    (folder / "net.o").write_bytes(code)
    (folder / "constants").write_bytes(module.constants.ljust(up(len(module.constants)), b"\0"))


def built(folder: Path, *command: str) -> str:
    """What the compiler says; empty where all is well."""
    words = [*command, "main.c", "net.o", "-o", "main"]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, check=False)
    return done.stderr if done.returncode else ""


def answered(folder: Path, image: Images, *before: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([*before, "./main"], cwd=folder, input=image.tobytes(), capture_output=True, check=False)


# The address sanitizer

ACCESS = re.compile(
    r"  (?:%\S+ = load (?P<read><[^>]+>|i\d+|float), (?P=read)\* (?P<from>%\S+), align \d+"
    r"|store (?P<written><[^>]+>|i\d+|float) \S.*?, (?P=written)\* (?P<to>%\S+), align \d+)$"
)


def bytes_of(kind: str) -> int:
    found = re.fullmatch(r"(?:<(\d+) x )?(?:i(\d+)|float)>?", kind)
    assert found, kind
    return int(found[1] or 1) * int(found[2] or 32) // 8


def with_checks(text: str) -> tuple[str, int]:
    """``text`` as a compiler with an address sanitizer makes it: each access asks first. And how many there are."""
    lines, count = ["declare void @__asan_loadN(i8*, i64)", "declare void @__asan_storeN(i8*, i64)"], 0
    for line in text.splitlines():
        found = ACCESS.match(line)
        if found:
            kind, pointer = found["read"] or found["written"], found["from"] or found["to"]
            count += 1
            lines.append(f"  %asan{count} = bitcast {kind}* {pointer} to i8*")
            function = "load" if found["read"] else "store"
            lines.append(f"  call void @__asan_{function}N(i8* %asan{count}, i64 {bytes_of(kind)})")
        lines.append(line)
    return "\n".join(lines), count


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
@pytest.mark.parametrize("arch", ARCHS)
def test_the_address_sanitizer_finds_nothing_in_the_portable_kernels(
    arch: str, tmp_path: Path, constants_apart: None
) -> None:
    program = program_for(arch, SIZE)
    plan = make_plan(program)
    guards.clear()
    ends = spread(plan)
    module = emit_module(plan, PORTABLE.isa(), "nounwind")
    text, count = with_checks(module.text)
    assert count > 300
    starts = [*(storage.offset for storage in plan.storages.values()), module.work]
    gaps: Gaps = [(0, HEADER + end, start - end) for end, start in zip(ends, starts, strict=True)]
    gaps += [(1, page, PAGE) for page in guards]
    write_program(tmp_path, module, object_of(text, PORTABLE, shared=True), program, gaps)
    if said := built(tmp_path, "cc", "-DCHECKED", "-fsanitize=address"):
        pytest.skip(f"this compiler has no address sanitizer: {said[-200:]}")
    image = noise(SIZE, 1, 4)
    done = answered(tmp_path, image)
    assert done.returncode == 0, done.stderr.decode(errors="replace")[:2000]
    assert np.array_equal(np.frombuffer(done.stdout, np.float32), run_reference(program, image)[0][0])
    # The same without the ends of the constants, which some kernel has to read: the sanitizer is really there.
    gaps += [(1, page - 64, 64) for page in guards]
    write_program(tmp_path, module, object_of(text, PORTABLE, shared=True), program, gaps)
    assert not built(tmp_path, "cc", "-DCHECKED", "-fsanitize=address")
    assert b"AddressSanitizer" in answered(tmp_path, image).stderr


# Another processor


def arm_compiler() -> list[str] | None:
    """What makes static programs for 64-bit Arm."""
    if importlib.util.find_spec("ziglang"):
        return [sys.executable, "-m", "ziglang", "cc", "-target", "aarch64-linux-musl", "-static"]
    found = shutil.which("aarch64-linux-gnu-gcc")
    return [found, "-static"] if found else None


@pytest.mark.skipif(shutil.which("qemu-aarch64") is None, reason="no qemu-aarch64 (apt-get install qemu-user)")
@pytest.mark.skipif(
    arm_compiler() is None, reason="nothing that links for Arm (pip install 'mgq[native]', or gcc-aarch64-linux-gnu)"
)
@pytest.mark.parametrize("arch", ARCHS)
def test_portable_kernels_give_the_same_bits_on_arm(arch: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = program_for(arch, 32)
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    monkeypatch.setattr(team, "PAUSE", {})  # LLVM reads assembly for this processor alone
    module = emit_module(make_plan(program), PORTABLE.isa(), "nounwind")
    binding = llvm()
    binding.initialize_all_targets()
    binding.initialize_all_asmprinters()
    target = binding.Target.from_triple("aarch64-unknown-linux-gnu")
    machine = target.create_target_machine(opt=3, reloc="pic", codemodel="small")
    code = machine.emit_object(binding.parse_assembly(module.text))
    write_program(tmp_path, module, code, program, [(0, 0, 0)])
    command = arm_compiler()
    assert command is not None and not built(tmp_path, *command)
    image = noise(32, 1, 6)
    done = answered(tmp_path, image, "qemu-aarch64")
    assert done.returncode == 0, done.stderr
    assert np.array_equal(np.frombuffer(done.stdout, np.float32), run_reference(program, image)[0][0])

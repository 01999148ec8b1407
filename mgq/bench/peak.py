"""Measures the peak of this processor: multiply-add loops that use registers only, compiled when they are needed.

Each loop keeps enough independent sums in registers to hide the latency of the widest instruction that the processor
has for the work, and reads no memory, so that its rate is the ceiling of every kernel that uses the instruction.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mgq.bench.settings import Precision
from mgq.errors import FailureError
from mgq.export.native.compiler import llvm

SUMS = 12
"""Independent sums: more than the latency of the instruction times how many begin in a cycle in any x86 core, and few
enough to stay in the 16 registers of those without AVX-512."""
ITERATIONS = 1_000_000


@dataclass(frozen=True)
class Instruction:
    """A multiply-and-add of LLVM on x86: ``macs`` of it at a time, on values of type ``kind``.

    ``needs`` are the names, as in :mod:`mgq.system.environment`, of what the processor must have.
    """

    name: str
    needs: tuple[str, ...]
    intrinsic: str
    kind: str
    macs: int
    features: str


# The widest first; without any of them no peak is measured.
INSTRUCTIONS = {
    Precision.INT8: (
        Instruction(
            "vpdpbusd, 512 bits",
            ("AVX-512", "AVX-512 VNNI"),
            "llvm.x86.avx512.vpdpbusd.512",
            "<16 x i32>",
            64,
            "+avx512f,+avx512vnni",
        ),
        Instruction(
            "vpdpbusd, 256 bits",
            ("AVX2", "AVX-VNNI"),
            "llvm.x86.avx512.vpdpbusd.256",
            "<8 x i32>",
            32,
            "+avx2,+avxvnni",
        ),
    ),
    Precision.FP32: (
        Instruction("fma, 512 bits", ("AVX-512",), "llvm.fma.v16f32", "<16 x float>", 16, "+avx512f"),
        Instruction("fma, 256 bits", ("AVX2", "FMA"), "llvm.fma.v8f32", "<8 x float>", 8, "+avx2,+fma"),
    ),
}
BEYOND = {Precision.INT8: ("AMX int8",), Precision.FP32: ()}
"""What multiplies more at a time than any of the loops here: the peak would not be one."""


def find_instruction(precision: Precision, features: Sequence[str]) -> Instruction | None:
    """The widest instruction among ``features``; None where the processor's ceiling cannot be measured here."""
    if any(feature in features for feature in BEYOND[precision]):
        return None
    return next((one for one in INSTRUCTIONS[precision] if set(one.needs) <= set(features)), None)


def module_text(instruction: Instruction) -> str:
    """The loop in LLVM's language: ``void peak(i64 n)`` runs the instruction n times ``SUMS`` times."""
    kind = instruction.kind
    is_fma = "fma" in instruction.intrinsic
    call = f"call {kind} @{instruction.intrinsic}"
    phis, steps, results = [], [], []
    for number in range(SUMS):
        phis.append(f"  %s{number} = phi {kind} [ zeroinitializer, %entry ], [ %t{number}, %loop ]")
        arguments = f"{kind} %a, {kind} %b, {kind} %s{number}" if is_fma else f"{kind} %s{number}, {kind} %a, {kind} %b"
        steps.append(f"  %t{number} = {call}({arguments})")
        results.append(f"  store volatile {kind} %t{number}, {kind}* %out")
    return "\n".join(
        [
            f"declare {kind} @{instruction.intrinsic}({kind}, {kind}, {kind})",
            f"define void @peak(i64 %n, {kind}* %out) {{",
            "entry:",
            # Read from memory, so that nothing is known of them when this is compiled.
            f"  %a = load volatile {kind}, {kind}* %out",
            f"  %b = load volatile {kind}, {kind}* %out",
            "  br label %loop",
            "loop:",
            "  %i = phi i64 [ 0, %entry ], [ %j, %loop ]",
            *phis,
            *steps,
            "  %j = add i64 %i, 1",
            "  %more = icmp ult i64 %j, %n",
            "  br i1 %more, label %loop, label %done",
            "done:",
            *results,
            "  ret void",
            "}",
        ]
    )


class PeakLoop:
    """The loop of one instruction on ``threads`` threads: a runtime that computes nothing of use, at full speed."""

    version = "1"

    def __init__(self, precision: Precision, features: Sequence[str], threads: int) -> None:
        instruction = find_instruction(precision, features)
        if instruction is None:
            raise FailureError(f"this processor has no instruction that the self-test of {precision.value} knows")
        self.name = instruction.name
        self.threads = threads
        self.macs = instruction.macs * SUMS * ITERATIONS * threads
        self.call, self.keep = compile_loop(instruction)
        self.pool = ThreadPoolExecutor(threads)
        # What each thread reads and writes is on cache lines of its own.
        self.memory = np.zeros(256 * threads + 64, np.uint8)

    def run(self, batch: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        start = -(-self.memory.ctypes.data // 64) * 64
        if self.threads == 1:
            self.call(ITERATIONS, start)
        else:
            list(self.pool.map(lambda thread: self.call(ITERATIONS, start + 256 * thread), range(self.threads)))
        return np.zeros((len(batch), 1), np.float32)


def compile_loop(instruction: Instruction) -> tuple[Callable[[int, int], None], Any]:
    """The loop as machine code, and what has to live as long. Raises FailureError where it cannot be compiled."""
    binding = llvm()
    try:
        machine = binding.Target.from_default_triple().create_target_machine(
            cpu=binding.get_host_cpu_name(), features=instruction.features + ",-prefer-256-bit", opt=2
        )
        engine = binding.create_mcjit_compiler(binding.parse_assembly(module_text(instruction)), machine)
        engine.finalize_object()
        address = engine.get_function_address("peak")
    except RuntimeError as error:
        raise FailureError(f"the self-test's loop of {instruction.name} cannot be compiled: {error}") from None
    return ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_void_p)(address), engine

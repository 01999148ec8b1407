"""Known faults of backends, by version. They are not given files that they would run wrongly.

ONNX Runtime 1.21 to 1.23 give wrong integers in convolutions on processors with AMX, in grouped ones above all (its
issue 26324).
"""

from __future__ import annotations

import re

from mgq.machine import package_version, processor_has

FIRST_WRONG, FIRST_RIGHT = (1, 21), (1, 24)
AMX_FLAG = "amx_int8"


def numbers_in(version: str) -> tuple[int, int]:
    """The first two numbers of a version, 0 where there are none."""
    major, minor, *_ = [*(int(number) for number in re.findall(r"\d+", version)), 0, 0]
    return major, minor


def fault_of_onnxruntime(version: str) -> str:
    """What is wrong with int8 in that version on this processor, as the end of a sentence; empty where nothing is."""
    if FIRST_WRONG <= numbers_in(version) < FIRST_RIGHT and processor_has(AMX_FLAG):
        return "gives wrong integers in convolutions on a processor with AMX"
    return ""


def onnxruntime_is_sound() -> bool:
    """Whether the installed ONNX Runtime has no such fault here."""
    return not processor_has(AMX_FLAG) or not fault_of_onnxruntime(package_version("onnxruntime") or "")

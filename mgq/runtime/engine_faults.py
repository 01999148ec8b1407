"""Known faults of backends, by version. These versions are not used for files that they would run wrongly.

ONNX Runtime 1.21 to 1.23 give wrong integers in convolutions on processors with AMX, in grouped ones above all (its
issue 26324).
"""

from __future__ import annotations

import re

from mgq.machine import package_version, processor_has

FIRST_WRONG, FIRST_RIGHT = (1, 21), (1, 24)
MEND = "pip install 'onnxruntime!=1.21.*,!=1.22.*,!=1.23.*'"
"""The pip argument for the newest version without the fault, for every Python."""
AMX_FLAG = "amx_int8"


def numbers_in(version: str) -> tuple[int, int]:
    """The first two numbers of a version, 0 where there are none."""
    major, minor, *_ = [*(int(number) for number in re.findall(r"\d+", version)), 0, 0]
    return major, minor


def fault_of_onnxruntime(version: str) -> str:
    """The known fault of int8 in that version on this processor, as the end of a sentence; '' without one."""
    if FIRST_WRONG <= numbers_in(version) < FIRST_RIGHT and processor_has(AMX_FLAG):
        return "gives wrong integers in convolutions on a processor with AMX"
    return ""


def onnxruntime_is_sound() -> bool:
    """Whether the installed ONNX Runtime has no such fault here."""
    return not processor_has(AMX_FLAG) or not fault_of_onnxruntime(package_version("onnxruntime") or "")


TESTED = {"ONNX Runtime": ("onnxruntime", "1.20", "1.32"), "OpenVINO": ("openvino", "2025.4", "2026.4")}
"""Name of a backend -> its package, and the oldest and the newest version with which mgq is tested."""


def advice_for(name: str, version: str) -> str:
    """What to do where that version of a backend refuses a file, as the end of a sentence."""
    if name in TESTED:
        package, oldest, newest = TESTED[name]
        if numbers_in(version) < numbers_in(oldest):
            return f"it is older than {oldest}, the oldest that is tested: pip install '{package}>={oldest}'"
        if numbers_in(version) > numbers_in(newest):
            return f"it is newer than {newest}, the newest that is tested: pip install '{package}=={newest}.*'"
    return "pass another --engine, or write the file again by `mgq dump`"

"""Emits the C interface of a shared library: functions that run the network and describe it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mgq.export.native.cpu import Level
from mgq.export.native.emit.driver import Module
from mgq.export.native.emit.team import END, LEAD, SERVE
from mgq.export.native.emit.team import HEADER as TEAM_HEADER

WORK_ALIGNMENT = 64
PLAIN = 'nounwind "target-cpu"="x86-64" "target-features"="+sse2"'
"""For what has to run on any processor."""


@dataclass(frozen=True)
class Facts:
    """The description of the network in the library. ``about`` is JSON: its origin, its classes and so on."""

    name: str
    image_size: int
    class_names: Sequence[str]
    about: str


def interface_text(module: Module, level: Level, facts: Facts) -> str:
    """``module`` with its constants inside and the functions of :data:`HEADER` around it."""
    words = {"name": facts.name, "cpu": level.key, "about": facts.about}
    parts = [
        module.text,
        f"@constants = internal constant {data(module.constants)}, align 4096",
        *(text_function(name, text) for name, text in words.items()),
        *(number_function(*pair) for pair in numbers(module, facts)),
        class_names(facts.class_names),
        check(level),
        runner(module),
    ]
    return "\n".join(parts)


def numbers(module: Module, facts: Facts) -> list[tuple[str, str, int]]:
    return [
        ("image_size", "i32", facts.image_size),
        ("classes", "i32", len(facts.class_names)),
        ("work_size", "i64", work_size(module, 1)),
    ]


def work_size(module: Module, threads: int) -> int:
    return TEAM_HEADER + threads * module.work + WORK_ALIGNMENT


def data(content: bytes) -> str:
    """``content`` as a constant of LLVM, type first."""
    table = [f"\\{byte:02X}" for byte in range(256)]
    return f'[{len(content)} x i8] c"{"".join(map(table.__getitem__, content))}"'


def text_function(name: str, text: str) -> str:
    content = text.encode() + b"\0"
    kind = f"[{len(content)} x i8]"
    return (
        f"@text_{name} = internal constant {data(content)}\n"
        f"define i8* @mgq_{name}() {PLAIN} {{\n"
        f"  ret i8* getelementptr ({kind}, {kind}* @text_{name}, i64 0, i64 0)\n}}"
    )


def number_function(name: str, kind: str, value: int) -> str:
    return f"define {kind} @mgq_{name}() {PLAIN} {{\n  ret {kind} {value}\n}}"


def class_names(names: Sequence[str]) -> str:
    """The names one behind the other, and where each begins."""
    content, places = b"", []
    for name in names:
        places.append(len(content))
        content += name.encode() + b"\0"
    kind, table = f"[{len(content)} x i8]", f"[{len(names)} x i32]"
    offsets = ", ".join(f"i32 {place}" for place in places)
    return f"""@class_names = internal constant {data(content)}
@class_places = internal constant {table} [{offsets}]
define i8* @mgq_class_name(i32 %index) {PLAIN} {{
  %inside = icmp ult i32 %index, {len(names)}
  br i1 %inside, label %known, label %unknown
known:
  %wide = zext i32 %index to i64
  %entry = getelementptr {table}, {table}* @class_places, i64 0, i64 %wide
  %place = load i32, i32* %entry
  %offset = zext i32 %place to i64
  %name = getelementptr {kind}, {kind}* @class_names, i64 0, i64 %offset
  ret i8* %name
unknown:
  ret i8* null
}}"""


def check(level: Level) -> str:
    """``mgq_runs_here``: whether this processor, and its system, have what the code needs."""
    lines = ["  %ok0 = and i1 true, true"]
    count = 0
    state = "{i32, i32, i32, i32}"
    for i, leaf in enumerate(level.leaves):
        lines += [
            f'  %leaf{i} = call {state} asm sideeffect "cpuid", '
            f'"={{ax}},={{bx}},={{cx}},={{dx}},{{ax}},{{cx}}"(i32 {leaf.leaf}, i32 {leaf.subleaf})',
            f"  %register{i} = extractvalue {state} %leaf{i}, {leaf.register}",
            f"  %bits{i} = and i32 %register{i}, {as_signed(leaf.mask)}",
            f"  %has{i} = icmp eq i32 %bits{i}, {as_signed(leaf.mask)}",
            f"  %ok{i + 1} = and i1 %ok{i}, %has{i}",
        ]
        count = i + 1
    if level.state:
        lines += [
            f"  br i1 %ok{count}, label %saved, label %no",
            "saved:",
            '  %state = call {i32, i32} asm sideeffect "xgetbv", "={ax},={dx},{cx}"(i32 0)',
            "  %low = extractvalue {i32, i32} %state, 0",
            f"  %kept = and i32 %low, {level.state}",
            f"  %all = icmp eq i32 %kept, {level.state}",
            "  %answer = zext i1 %all to i32",
            "  ret i32 %answer",
            "no:",
            "  ret i32 0",
        ]
    else:
        lines += [f"  %answer = zext i1 %ok{count} to i32", "  ret i32 %answer"]
    body = "\n".join(lines)
    return f"define i32 @mgq_runs_here() {PLAIN} {{\n{body}\n}}"


def as_signed(value: int) -> int:
    return value - (1 << 32) if value >= 1 << 31 else value


def runner(module: Module) -> str:
    """What runs the network: ``mgq_run``, and the calls of a team of threads."""
    return "\n".join([check_once(), align_work(), team_size(module), run_calls(module), helper_calls()])


def check_once() -> str:
    """``fits``: whether the processor can run the code. cpuid is asked once: virtual machines take long to answer."""
    return f"""@known = internal global i32 0
define internal i1 @fits() {PLAIN} {{
entry:
  %before = load atomic i32, i32* @known monotonic, align 4
  %asked = icmp ne i32 %before, 0
  br i1 %asked, label %yes, label %ask
ask:
  %here = call i32 @mgq_runs_here()
  %good = icmp ne i32 %here, 0
  br i1 %good, label %note, label %no
note:
  store atomic i32 1, i32* @known monotonic, align 4
  br label %yes
yes:
  ret i1 true
no:
  ret i1 false
}}"""


def align_work() -> str:
    """``aligned``: the first aligned byte of a work area."""
    return f"""define internal i8* @aligned(i8* %work) {PLAIN} {{
  %address = ptrtoint i8* %work to i64
  %more = add i64 %address, {WORK_ALIGNMENT - 1}
  %rounded = and i64 %more, -{WORK_ALIGNMENT}
  %aligned = inttoptr i64 %rounded to i8*
  ret i8* %aligned
}}"""


def team_size(module: Module) -> str:
    """``mgq_team_size``: bytes of the work area of several threads."""
    return f"""define i64 @mgq_team_size(i32 %threads) {PLAIN} {{
  %wide = zext i32 %threads to i64
  %areas = mul i64 %wide, {module.work}
  %size = add i64 %areas, {work_size(module, 0)}
  ret i64 %size
}}"""


BEGIN = """  %good = call i1 @fits()
  br i1 %good, label %start, label %foreign
foreign:
  ret i32 -1
start:
  %team = call i8* @aligned(i8* %work)"""
"""How calls begin that run code of the library: they return -1 on a processor that cannot run it."""


def run_calls(module: Module) -> str:
    """``mgq_run`` and ``mgq_team_run``: the caller's thread computes, alone or at the head of a team."""
    constants = f"[{len(module.constants)} x i8]"
    return f"""define i32 @mgq_run(i8* %images, i64 %count, i8* %logits, i8* %work) {PLAIN} {{
  %done = call i32 @mgq_team_run(i8* %images, i64 %count, i8* %logits, i8* %work, i32 1)
  ret i32 %done
}}
define i32 @mgq_team_run(i8* %images, i64 %count, i8* %logits, i8* %work, i32 %threads) {PLAIN} {{
{BEGIN}
  %parts = zext i32 %threads to i64
  %data = getelementptr {constants}, {constants}* @constants, i64 0, i64 0
  call void @{LEAD}(i8* %data, i8* %images, i64 %count, i8* %logits, i8* %team, i64 %parts)
  ret i32 0
}}"""


def helper_calls() -> str:
    """``mgq_team_help``, which another thread computes in, and ``mgq_team_end``, which lets it return."""
    return f"""define i32 @mgq_team_help(i8* %work, i32 %number) {PLAIN} {{
{BEGIN}
  %part = zext i32 %number to i64
  call void @{SERVE}(i8* %team, i64 %part)
  ret i32 0
}}
define void @mgq_team_end(i8* %work) {PLAIN} {{
  %team = call i8* @aligned(i8* %work)
  call void @{END}(i8* %team)
  ret void
}}"""


HEADER = """/* An int8 image classifier as a library, written by mgq. Link with it, or load it by dlopen. */
#ifndef MGQ_NETWORK_H
#define MGQ_NETWORK_H
#include <stddef.h>
#include <stdint.h>
#ifdef __cplusplus
extern "C" {
#endif

/* The network's name, the processors that the code is for, and where it came from, as JSON. */
const char *mgq_name(void);
const char *mgq_cpu(void);
const char *mgq_about(void);

/* Images are square: mgq_image_size() pixels a side. */
int32_t mgq_image_size(void);
int32_t mgq_classes(void);
/* The name of class 0 to mgq_classes() - 1; NULL for any other. */
const char *mgq_class_name(int32_t index);

/* 1 where this processor can run the code, else 0. */
int32_t mgq_runs_here(void);

/* Bytes of the work area. Each thread that calls mgq_run needs one of its own. */
size_t mgq_work_size(void);

/* images: count x 3 x size x size bytes, planes in the order blue, green, red. logits: count x classes floats.
   Returns 0, or -1 where this processor cannot run the code. */
int32_t mgq_run(const uint8_t *images, size_t count, float *logits, void *work);

/* Several threads on one network, and on one image: a work area of mgq_team_size(threads) bytes, which begins as zeros
   (calloc). Threads number 1 to threads - 1 are the caller's: each calls mgq_team_help, which returns after
   mgq_team_end. They sleep between two runs. mgq_team_run is mgq_run with their help; one at a time in a work area. */
size_t mgq_team_size(int32_t threads);
int32_t mgq_team_run(const uint8_t *images, size_t count, float *logits, void *work, int32_t threads);
int32_t mgq_team_help(void *work, int32_t number);
void mgq_team_end(void *work);

#ifdef __cplusplus
}
#endif
#endif
"""

"""Threads that work on one network together: on the images of a batch, or on the rows and channels of each layer.

The library starts no threads: the caller's own call ``serve``. They sleep between two runs. Within a run they meet
behind every group of layers, and wait there for a moment without sleeping, for a group takes some microseconds.
"""

from __future__ import annotations

import platform
from dataclasses import dataclass

NET, WAIT, SHARE, LEAD, SERVE, END = "mgq_net", "team_wait", "team_share", "mgq_lead", "mgq_serve", "mgq_end"
HEADER = 4096
"""Bytes in front of the work areas, by which the threads know of one another. They begin as zeros."""
JOB, ARRIVED, SLEEPERS, TASK = 0, 128, 256, 384
"""Where the number of the run, of arrivals and of sleepers lie, and what is to be done."""
STOP = -1
PATIENCE = 2000
"""How often a thread looks, some nanoseconds each, before it lets others run, or sleeps."""
FUTEX = {"x86_64": 202, "aarch64": 98}
"""The number of that system call."""
PAUSE = {"x86_64": "pause", "aarch64": "yield"}
SLEEP, WAKE, ALL = 128, 129, (1 << 31) - 1
"""Operations of a futex that only this process knows, and how many to wake."""


@dataclass(frozen=True)
class Team:
    """``area`` is the bytes of one thread's work area, ``pixels`` those of an image."""

    area: int
    pixels: int
    classes: int

    def text(self, attributes: str, linkage: str) -> str:
        """The functions. ``LEAD`` takes constants, images, their number, logits, the work area of all and the number of
        threads; ``SERVE`` the work area and a thread's number, and returns after ``END``."""
        declared = "declare i64 @syscall(i64, ...)\ndeclare i32 @sched_yield()"
        parts = wait(), self.share(), lead(linkage), serve(linkage), end(linkage)
        return "\n".join([declared, *(part.replace("ATTRIBUTES", attributes) for part in parts)])

    def share(self) -> str:
        """Whole images for each thread, and what is left over together."""
        return f"""define internal void @{SHARE}(i8* %constants, i8* %images, i64 %count, i8* %logits, i8* %team,
    i64 %part, i64 %parts) ATTRIBUTES {{
entry:
  %first = getelementptr i8, i8* %team, i64 {HEADER}
  %skip = mul i64 %part, {self.area}
  %own = getelementptr i8, i8* %first, i64 %skip
  %rest = urem i64 %count, %parts
  %whole = sub i64 %count, %rest
  %each = udiv i64 %whole, %parts
  %from = mul i64 %part, %each
  %to = add i64 %from, %each
  br label %alone
alone:
  %i = phi i64 [%from, %entry], [%i1, %run]
  %more = icmp ult i64 %i, %to
  br i1 %more, label %run, label %meet
run:
  %image0 = mul i64 %i, {self.pixels}
  %image = getelementptr i8, i8* %images, i64 %image0
  %answer0 = mul i64 %i, {4 * self.classes}
  %answer = getelementptr i8, i8* %logits, i64 %answer0
  call void @{NET}(i8* %constants, i8* %own, i8* %own, i8* %image, i8* %answer, i8* %team, i64 0, i64 1)
  %i1 = add i64 %i, 1
  br label %alone
meet:
  call void @{WAIT}(i8* %team, i64 %parts)
  br label %together
together:
  %j = phi i64 [%whole, %meet], [%j1, %join]
  %left = icmp ult i64 %j, %count
  br i1 %left, label %join, label %done
join:
  %joined0 = mul i64 %j, {self.pixels}
  %joined = getelementptr i8, i8* %images, i64 %joined0
  %found0 = mul i64 %j, {4 * self.classes}
  %found = getelementptr i8, i8* %logits, i64 %found0
  call void @{NET}(i8* %constants, i8* %first, i8* %own, i8* %joined, i8* %found, i8* %team, i64 %part, i64 %parts)
  %j1 = add i64 %j, 1
  br label %together
done:
  ret void
}}"""


def pause() -> str:
    word = PAUSE.get(platform.machine())
    return f'call void asm sideeffect "{word}", ""()' if word else "fence seq_cst"


def word_at(name: str, place: int, kind: str = "i32") -> str:
    return f"""%{name}0 = getelementptr i8, i8* %team, i64 {place}
  %{name} = bitcast i8* %{name}0 to {kind}*"""


def wait() -> str:
    """Until all have arrived as often as this thread. Arrivals are counted for ever: 64 bits do not run over."""
    return f"""define internal void @{WAIT}(i8* %team, i64 %parts) ATTRIBUTES {{
entry:
  %alone = icmp ult i64 %parts, 2
  br i1 %alone, label %done, label %meet
meet:
  {word_at("arrived", ARRIVED, "i64")}
  %ticket = atomicrmw add i64* %arrived, i64 1 seq_cst
  %over = urem i64 %ticket, %parts
  %begun = sub i64 %ticket, %over
  %all = add i64 %begun, %parts
  br label %look
look:
  %looks = phi i64 [0, %meet], [%looked, %rest], [%looks, %yield]
  %now = load atomic i64, i64* %arrived acquire, align 8
  %there = icmp uge i64 %now, %all
  br i1 %there, label %done, label %absent
absent:
  %patient = icmp ult i64 %looks, {PATIENCE}
  br i1 %patient, label %rest, label %yield
rest:
  {pause()}
  %looked = add i64 %looks, 1
  br label %look
yield:
  %ignored = call i32 @sched_yield()
  br label %look
done:
  ret void
}}"""


TASKS = (("constants", "i8*"), ("images", "i8*"), ("count", "i64"), ("logits", "i8*"), ("parts", "i64"))


def task_places() -> str:
    return "\n  ".join(word_at(f"{name}_at", TASK + 8 * i, kind) for i, (name, kind) in enumerate(TASKS))


def shared(part: str) -> str:
    return (
        f"call void @{SHARE}(i8* %constants, i8* %images, i64 %count, i8* %logits, i8* %team, i64 {part}, i64 %parts)"
    )


def lead(linkage: str) -> str:
    """Say what there is to do, wake who sleeps, and take part number 0."""
    stores = "\n  ".join(f"store {kind} %{name}, {kind}* %{name}_at, align 8" for name, kind in TASKS)
    return f"""define {linkage} void @{LEAD}(i8* %constants, i8* %images, i64 %count, i8* %logits, i8* %team,
    i64 %parts) ATTRIBUTES {{
entry:
  %alone = icmp ult i64 %parts, 2
  br i1 %alone, label %work, label %tell
tell:
  {task_places()}
  {stores}
  {word_at("job", JOB)}
  %last = load atomic i32, i32* %job monotonic, align 4
  %more = add i32 %last, 1
  %next = and i32 %more, {ALL}
  store atomic i32 %next, i32* %job seq_cst, align 4
  {word_at("sleepers", SLEEPERS)}
  %asleep = load atomic i32, i32* %sleepers seq_cst, align 4
  %wanted = icmp ne i32 %asleep, 0
  br i1 %wanted, label %wake, label %work
wake:
  {futex("woken", WAKE, str(ALL))}
  br label %work
work:
  {shared("0")}
  ret void
}}"""


def futex(name: str, operation: int, value: str) -> str:
    """One that sleeps and wakes at ``%job``. On other systems nobody sleeps: all look again."""
    number = FUTEX.get(platform.machine())
    if number is None:
        return f"%{name} = call i32 @sched_yield()"
    arguments = f"i64 {number}, i32* %job, i64 {operation}, i64 {value}, i8* null"
    return f"%{name} = call i64 (i64, ...) @syscall({arguments})"


def serve(linkage: str) -> str:
    """Part number ``part`` of every run, until there are no more."""
    loads = "\n  ".join(f"%{name} = load {kind}, {kind}* %{name}_at, align 8" for name, kind in TASKS)
    return f"""define {linkage} void @{SERVE}(i8* %team, i64 %part) ATTRIBUTES {{
entry:
  {word_at("job", JOB)}
  {word_at("sleepers", SLEEPERS)}
  {task_places()}
  br label %look
look:
  %seen = phi i32 [0, %entry], [%seen, %rest], [%seen, %sleep], [%now, %work]
  %looks = phi i64 [0, %entry], [%looked, %rest], [%looks, %sleep], [0, %work]
  %now = load atomic i32, i32* %job acquire, align 4
  %same = icmp eq i32 %now, %seen
  br i1 %same, label %idle, label %begin
idle:
  %patient = icmp ult i64 %looks, {PATIENCE}
  br i1 %patient, label %rest, label %sleep
rest:
  {pause()}
  %looked = add i64 %looks, 1
  br label %look
sleep:
  %before = atomicrmw add i32* %sleepers, i32 1 seq_cst
  %wide = zext i32 %seen to i64
  {futex("slept", SLEEP, "%wide")}
  %after = atomicrmw sub i32* %sleepers, i32 1 seq_cst
  br label %look
begin:
  %over = icmp eq i32 %now, {STOP}
  br i1 %over, label %done, label %work
work:
  {loads}
  {shared("%part")}
  br label %look
done:
  ret void
}}"""


def end(linkage: str) -> str:
    return f"""define {linkage} void @{END}(i8* %team) ATTRIBUTES {{
entry:
  {word_at("job", JOB)}
  store atomic i32 {STOP}, i32* %job seq_cst, align 4
  {futex("woken", WAKE, str(ALL))}
  ret void
}}"""

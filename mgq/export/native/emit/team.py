"""Threads that work on one network together: on the images of a batch, or on the rows and channels of each layer.

The library starts no threads: the caller's own call ``serve``. Work comes in phases: an image for each thread as long
as there are enough, then each group of layers of each image that is left. A phase has a piece for each thread, which
has in its cache what it has made before. A thread that is done takes a piece that nobody has begun. So a thread that
the system suspends delays the others only if it stops in the middle of a piece. The thread that leads waits for the
pieces of a phase and opens the next. Between two runs the others sleep.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass

PREPARE, ANSWER = "prepare", "answer"
"""Functions: what each thread does once in its work area, and what the leading thread does after the last group."""
LEAD, SERVE, END = "mgq_lead", "mgq_serve", "mgq_end"
HEADER = 4096
"""Bytes before the work areas that hold the shared state of the threads. They begin as zeros."""
JOB, PHASE, FINISHED, SLEEPERS, TASK, BEGUN = 0, 128, 256, 384, 512, 1024
"""The run's number, odd while it lasts; the phase, counted for ever; pieces done; who sleeps; the task; and for each
piece the last phase in which it was begun."""
MOST_THREADS = (HEADER - BEGUN) // 8
"""The most threads: more would have no work."""
STOP, CLOSED = -1, 0
"""A run, and a phase, that are none."""
PATIENCE = 8000
"""How often a waiting thread polls before it yields or sleeps: some 20 ns each."""
FUTEX = {"x86_64": 202, "aarch64": 98}
"""The number of that system call."""
PAUSE = {"x86_64": "pause", "aarch64": "yield"}
SLEEP, WAKE, ALL = 128, 129, (1 << 31) - 1
"""Operations of a futex that only this process knows, and how many to wake."""
SIGNATURE = "i8* %constants, i8* %work, i8* %own, i8* %image, i8* %logits, i64 %part, i64 %parts"
TASKS = (
    *((name, "i8*") for name in ("constants", "images", "logits")),
    *((name, "i64") for name in ("rounds", "parts", "base", "phases")),
)
"""In ``rounds`` phases from ``base`` on every one of ``parts`` threads has an image of its own."""


@dataclass(frozen=True)
class Team:
    """``groups`` are functions of :data:`SIGNATURE`, ``area`` is the bytes of one thread's work area, ``pixels`` those
    of an image."""

    groups: Sequence[str]
    area: int
    pixels: int
    classes: int

    def text(self, attributes: str, linkage: str) -> str:
        """The functions. ``LEAD`` takes constants, images, their number, logits, the work area of all and the number of
        threads; ``SERVE`` the work area and a thread's number, from 1 on, and returns after ``END``."""
        declared = "declare i64 @syscall(i64, ...)\ndeclare i32 @sched_yield()"
        parts = (
            self.step(),
            self.network(),
            self.piece(),
            take(),
            self.lead(linkage),
            self.serve(linkage),
            end(linkage),
        )
        return "\n".join([declared, *(part.replace("ATTRIBUTES", attributes) for part in parts)])

    def step(self) -> str:
        """Group number ``group``."""
        cases = "\n".join(f"    i64 {i}, label %g{i}" for i in range(len(self.groups)))
        calls = "\n".join(f"g{i}:\n  call void @{name}({SIGNATURE})\n  ret void" for i, name in enumerate(self.groups))
        return f"""define internal void @step(i64 %group, {SIGNATURE}) ATTRIBUTES {{
  switch i64 %group, label %none [
{cases}
  ]
none:
  ret void
{calls}
}}"""

    def network(self) -> str:
        """All of an image in one thread."""
        given = "i8* %constants, i8* %own, i8* %own, i8* %image, i8* %logits, i64 0, i64 1"
        calls = "\n".join(f"  call void @{name}({given})" for name in (*self.groups, ANSWER))
        return f"""define internal void @network(i8* %constants, i8* %own, i8* %image, i8* %logits) ATTRIBUTES {{
{calls}
  ret void
}}"""

    def places(self, number: str) -> str:
        """Image ``number`` and its logits."""
        return f"""%skip = mul i64 {number}, {self.pixels}
  %image = getelementptr i8, i8* %images, i64 %skip
  %skipped = mul i64 {number}, {4 * self.classes}
  %answer = getelementptr i8, i8* %logits, i64 %skipped"""

    def piece(self) -> str:
        """Piece ``part`` of phase ``index`` of a run; the phases behind the ``rounds`` are groups of layers."""
        return f"""define internal void @alone(i8* %constants, i8* %own, i8* %images, i8* %logits, i64 %i) ATTRIBUTES {{
  {self.places("%i")}
  call void @network(i8* %constants, i8* %own, i8* %image, i8* %answer)
  ret void
}}
define internal void @piece(i8* %team, i8* %own, i8* %constants, i8* %images, i8* %logits, i64 %rounds, i64 %parts,
    i64 %index, i64 %part) ATTRIBUTES {{
  %whole = mul i64 %rounds, %parts
  %batch = icmp ult i64 %index, %rounds
  br i1 %batch, label %one, label %layers
one:
  %before = mul i64 %index, %parts
  %mine = add i64 %before, %part
  call void @alone(i8* %constants, i8* %own, i8* %images, i8* %logits, i64 %mine)
  ret void
layers:
  %work = getelementptr i8, i8* %team, i64 {HEADER}
  %phase = sub i64 %index, %rounds
  %group = urem i64 %phase, {len(self.groups)}
  %behind = udiv i64 %phase, {len(self.groups)}
  %i = add i64 %whole, %behind
  {self.places("%i")}
  call void @step(i64 %group, i8* %constants, i8* %work, i8* %own, i8* %image, i8* %answer, i64 %part, i64 %parts)
  ret void
}}"""

    def lead(self, linkage: str) -> str:
        """Open one phase after the other, and work on their pieces."""
        parts = (lead_alone(linkage), self.announce(), lead_phases(), self.finish_phases())
        return "\n".join(parts)

    def announce(self) -> str:
        """Part of ``lead``: write down the task for all threads, and wake those that sleep."""
        stores = "\n  ".join(f"store {kind} %{name}, {kind}* %{name}_at, align 8" for name, kind in TASKS)
        return f"""tell:
  {place("job", JOB)}
  {place("phase", PHASE, "i64")}
  {place("finished", FINISHED, "i64")}
  {place("sleepers", SLEEPERS)}
  {task_places()}
  %rounds = udiv i64 %count, %parts
  %whole = mul i64 %rounds, %parts
  %rest = sub i64 %count, %whole
  %groups = mul i64 %rest, {len(self.groups)}
  %phases = add i64 %rounds, %groups
  %before = load i64, i64* %base_at, align 8
  %former = load i64, i64* %phases_at, align 8
  %next = add i64 %before, %former
  %begins = icmp eq i64 %next, 0
  %base = select i1 %begins, i64 1, i64 %next
  store atomic i64 {CLOSED}, i64* %phase seq_cst, align 8
  {stores}
  %job0 = load atomic i32, i32* %job monotonic, align 4
  %job1 = add i32 %job0, 1
  %odd = or i32 %job1, 1
  store atomic i32 %odd, i32* %job seq_cst, align 4
  %asleep = load atomic i32, i32* %sleepers seq_cst, align 4
  %wanted = icmp ne i32 %asleep, 0
  br i1 %wanted, label %wake, label %phased
wake:
  {futex("woken", WAKE, str(ALL))}
  br label %phased"""

    def finish_phases(self) -> str:
        """Part of ``lead``: where a phase ends the last group of an image, compute its logits; then the next phase."""
        last = "i8* %constants, i8* %work, i8* %work, i8* %image, i8* %answer, i64 0, i64 1"
        return f"""finish:
  %index1 = add i64 %index, 1
  %layered = icmp uge i64 %index, %rounds
  %done1 = sub i64 %index1, %rounds
  %in = urem i64 %done1, {len(self.groups)}
  %isend = icmp eq i64 %in, 0
  %ready = and i1 %isend, %layered
  br i1 %ready, label %answers, label %through
answers:
  %which = udiv i64 %done1, {len(self.groups)}
  %ahead = sub i64 %which, 1
  %i = add i64 %whole, %ahead
  {self.places("%i")}
  call void @{ANSWER}({last})
  br label %through
through:
  br label %phased
over:
  %even = add i32 %odd, 1
  store atomic i32 %even, i32* %job seq_cst, align 4
  br label %done
done:
  ret void
}}"""

    def serve(self, linkage: str) -> str:
        """Take pieces of every run until there are no more."""
        return f"""define {linkage} void @{SERVE}(i8* %team, i64 %number) ATTRIBUTES {{
entry:
  %first = getelementptr i8, i8* %team, i64 {HEADER}
  %skip = mul i64 %number, {self.area}
  %own = getelementptr i8, i8* %first, i64 %skip
  call void @{PREPARE}(i8* %own)
  {place("job", JOB)}
  {place("sleepers", SLEEPERS)}
  br label %look
look:
  %looks = phi i64 [0, %entry], [0, %work], [%looked, %rest], [{PATIENCE}, %yield], [{PATIENCE}, %sleep]
  %now = load atomic i32, i32* %job acquire, align 4
  %over = icmp eq i32 %now, {STOP}
  br i1 %over, label %done, label %work0
work0:
  %taken = call i1 @take(i8* %team, i8* %own, i64 %number)
  br i1 %taken, label %work, label %idle
work:
  br label %look
idle:
  %patient = icmp ult i64 %looks, {PATIENCE}
  br i1 %patient, label %rest, label %long
rest:
  {pause()}
  %looked = add i64 %looks, 1
  br label %look
long:
  %low = and i32 %now, 1
  %lasts = icmp eq i32 %low, 1
  br i1 %lasts, label %yield, label %sleep
yield:
  %ignored = call i32 @sched_yield()
  br label %look
sleep:
  %before = atomicrmw add i32* %sleepers, i32 1 seq_cst
  %wide = zext i32 %now to i64
  {futex("slept", SLEEP, "%wide")}
  %after = atomicrmw sub i32* %sleepers, i32 1 seq_cst
  br label %look
done:
  ret void
}}"""


def lead_alone(linkage: str) -> str:
    """The beginning of ``lead``: one thread computes all images by itself."""
    return f"""define {linkage} void @{LEAD}(i8* %constants, i8* %images, i64 %count, i8* %logits, i8* %team,
    i64 %threads) ATTRIBUTES {{
entry:
  %fit = icmp ult i64 %threads, {MOST_THREADS}
  %parts = select i1 %fit, i64 %threads, i64 {MOST_THREADS}
  %work = getelementptr i8, i8* %team, i64 {HEADER}
  call void @{PREPARE}(i8* %work)
  %single = icmp ult i64 %parts, 2
  br i1 %single, label %head, label %tell
head:
  %n = phi i64 [0, %entry], [%n1, %body]
  %more = icmp ult i64 %n, %count
  br i1 %more, label %body, label %done
body:
  call void @alone(i8* %constants, i8* %work, i8* %images, i8* %logits, i64 %n)
  %n1 = add i64 %n, 1
  br label %head"""


def lead_phases() -> str:
    """Part of ``lead``: open a phase, take pieces of it, and wait until all of them are done."""
    return f"""phased:
  %index = phi i64 [0, %tell], [0, %wake], [%index1, %through]
  %open = icmp ult i64 %index, %phases
  br i1 %open, label %begin, label %over
begin:
  store atomic i64 0, i64* %finished monotonic, align 8
  %number = add i64 %base, %index
  store atomic i64 %number, i64* %phase seq_cst, align 8
  br label %take
take:
  %taken = call i1 @take(i8* %team, i8* %work, i64 0)
  br i1 %taken, label %take, label %wait
wait:
  %looks = phi i64 [0, %take], [%looked, %rests], [%looks, %yield]
  %now = load atomic i64, i64* %finished acquire, align 8
  %all = icmp uge i64 %now, %parts
  br i1 %all, label %finish, label %absent
absent:
  %patient = icmp ult i64 %looks, {PATIENCE}
  br i1 %patient, label %rests, label %yield
rests:
  {pause()}
  %looked = add i64 %looks, 1
  br label %wait
yield:
  %ignored = call i32 @sched_yield()
  br label %wait"""


def take() -> str:
    """Work on a piece that nobody has begun, if there is one: ``number``, or the next. What is read of the task holds
    where the phase is still the same behind it: ``CLOSED`` comes before a new task. And where a piece of that phase can
    be begun it still lasts: it ends when all have been."""
    loads = "\n  ".join(f"%{name} = load {kind}, {kind}* %{name}_at, align 8" for name, kind in TASKS)
    return f"""define internal i1 @take(i8* %team, i8* %own, i64 %number) ATTRIBUTES {{
entry:
  {place("phase", PHASE, "i64")}
  {place("finished", FINISHED, "i64")}
  {task_places()}
  %seen = load atomic i64, i64* %phase seq_cst, align 8
  {loads}
  fence seq_cst
  %still = load atomic i64, i64* %phase seq_cst, align 8
  %same = icmp eq i64 %seen, %still
  %open = icmp ne i64 %seen, {CLOSED}
  %known = icmp ult i64 %number, %parts
  %some = and i1 %same, %open
  %good = and i1 %some, %known
  br i1 %good, label %look, label %nothing
look:
  %tries = phi i64 [0, %entry], [%tried, %next]
  %place = phi i64 [%number, %entry], [%following, %next]
  %offset = mul i64 %place, 8
  %from = add i64 %offset, {BEGUN}
  %begun.byte = getelementptr i8, i8* %team, i64 %from
  %begun = bitcast i8* %begun.byte to i64*
  %last = load atomic i64, i64* %begun monotonic, align 8
  %free = icmp ult i64 %last, %seen
  br i1 %free, label %try, label %next
try:
  %result = cmpxchg i64* %begun, i64 %last, i64 %seen seq_cst seq_cst
  %got = extractvalue {{i64, i1}} %result, 1
  br i1 %got, label %mine, label %next
mine:
  %index = sub i64 %seen, %base
  call void @piece(i8* %team, i8* %own, i8* %constants, i8* %images, i8* %logits, i64 %rounds, i64 %parts,
    i64 %index, i64 %place)
  %counted = atomicrmw add i64* %finished, i64 1 seq_cst
  ret i1 true
next:
  %tried = add i64 %tries, 1
  %one = add i64 %place, 1
  %over = icmp uge i64 %one, %parts
  %following = select i1 %over, i64 0, i64 %one
  %more = icmp ult i64 %tried, %parts
  br i1 %more, label %look, label %nothing
nothing:
  ret i1 false
}}"""


def pause() -> str:
    word = PAUSE.get(platform.machine())
    return f'call void asm sideeffect "{word}", ""()' if word else "fence seq_cst"


def place(name: str, offset: int, kind: str = "i32") -> str:
    return f"""%{name}.byte = getelementptr i8, i8* %team, i64 {offset}
  %{name} = bitcast i8* %{name}.byte to {kind}*"""


def task_places() -> str:
    return "\n  ".join(place(f"{name}_at", TASK + 8 * i, kind) for i, (name, kind) in enumerate(TASKS))


def futex(name: str, operation: int, value: str) -> str:
    """A futex call at ``%job``, to sleep or to wake. On other systems threads do not sleep, they poll."""
    number = FUTEX.get(platform.machine())
    if number is None:
        return f"%{name} = call i32 @sched_yield()"
    arguments = f"i64 {number}, i32* %job, i64 {operation}, i64 {value}, i8* null"
    return f"%{name} = call i64 (i64, ...) @syscall({arguments})"


def end(linkage: str) -> str:
    return f"""define {linkage} void @{END}(i8* %team) ATTRIBUTES {{
  {place("job", JOB)}
  store atomic i32 {STOP}, i32* %job seq_cst, align 4
  {futex("woken", WAKE, str(ALL))}
  ret void
}}"""

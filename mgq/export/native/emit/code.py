"""The text of one function in LLVM's language (version 15, typed pointers), written statement by statement.

Values are the names that LLVM gives them, such as ``%v7``, or constants as text. Pointers are ``i8*``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

INTS, FLOATS, BYTES = "<16 x i32>", "<16 x float>", "<64 x i8>"
"""A vector of 64 bytes as it is counted in, scaled and stored."""
Value = str


class Code:
    """A function ``name`` with ``parameters`` (type, name). ``declared`` are the intrinsics that it calls."""

    def __init__(self, name: str, parameters: Sequence[tuple[str, str]], linkage: str = "internal") -> None:
        self.name = name
        self.parameters = parameters
        self.linkage = linkage
        self.lines: list[str] = []
        self.slots: list[str] = []
        self.declared: set[str] = set()
        self.count = 0
        self.label = "entry"

    def text(self, attributes: str) -> str:
        parameters = ", ".join(f"{kind} %{name}" for kind, name in self.parameters)
        head = f"define {self.linkage} void @{self.name}({parameters}) {attributes} {{\nentry:\n"
        return head + "\n".join([*self.slots, *self.lines, "  ret void", "}"])

    def make_name(self) -> str:
        self.count += 1
        return f"v{self.count}"

    def emit(self, text: str) -> None:
        self.lines.append("  " + text)

    def value(self, text: str) -> Value:
        name = "%" + self.make_name()
        self.emit(f"{name} = {text}")
        return name

    def start(self, label: str) -> None:
        self.lines.append(f"{label}:")
        self.label = label

    def advance(self, pointer: Value, offset: int | Value) -> Value:
        """``pointer`` moved by ``offset`` bytes."""
        return pointer if offset in (0, "0") else self.value(f"getelementptr i8, i8* {pointer}, i64 {offset}")

    def cast(self, pointer: Value, kind: str) -> Value:
        return self.value(f"bitcast i8* {pointer} to {kind}*")

    def load(self, kind: str, pointer: Value, align: int = 1) -> Value:
        return self.value(f"load {kind}, {kind}* {self.cast(pointer, kind)}, align {align}")

    def store(self, kind: str, value: Value, pointer: Value, align: int = 1) -> None:
        self.emit(f"store {kind} {value}, {kind}* {self.cast(pointer, kind)}, align {align}")

    def number(self, operation: str, first: int | Value, second: int | Value) -> Value:
        """An operation of two 64-bit integers."""
        return self.value(f"{operation} i64 {first}, {second}")

    def load_offset(self, pointer: Value) -> Value:
        """The 32-bit integer at ``pointer`` as one of 64 bits."""
        return self.value(f"sext i32 {self.load('i32', pointer, 4)} to i64")

    def as_type(self, value: Value, old: str, new: str) -> Value:
        return self.value(f"bitcast {old} {value} to {new}")

    def call(self, result: str, name: str, *arguments: tuple[str, Value]) -> Value:
        kinds = ", ".join(kind for kind, _ in arguments)
        self.declared.add(f"declare {result} @{name}({kinds})")
        given = ", ".join(f"{kind} {value}" for kind, value in arguments)
        if result == "void":
            self.emit(f"call void @{name}({given})")
            return ""
        return self.value(f"call {result} @{name}({given})")

    def shuffle(self, kind: str, first: Value, second: Value, order: Sequence[int]) -> Value:
        """Elements of two vectors of type ``kind`` in ``order``; -1 where any will do."""
        places = ", ".join("i32 undef" if place < 0 else f"i32 {place}" for place in order)
        return self.value(f"shufflevector {kind} {first}, {kind} {second}, <{len(order)} x i32> <{places}>")

    def broadcast(self, pointer: Value) -> Value:
        """The four bytes at ``pointer``, 16 times."""
        one = self.value(f"insertelement {INTS} undef, i32 {self.load('i32', pointer)}, i32 0")
        return self.shuffle(INTS, one, "undef", [0] * 16)

    def slot(self) -> Value:
        """Room for a 64-bit integer."""
        name = "%" + self.make_name()
        self.slots.append(f"  {name} = alloca i64")
        return name

    def put(self, slot: Value, value: int | Value) -> None:
        self.emit(f"store i64 {value}, i64* {slot}")

    def get(self, slot: Value) -> Value:
        return self.value(f"load i64, i64* {slot}")

    def repeat(
        self,
        count: int | Value,
        carried: Sequence[tuple[str, Value]],
        body: Callable[[Value, list[Value]], Sequence[Value]],
    ) -> list[Value]:
        """Run ``body`` at least once, ``count`` times in all; it takes and gives the ``carried`` values."""
        if count == 1:
            return list(body("0", [value for _, value in carried]))
        before, head, after = self.label, self.make_name(), self.make_name()
        self.emit(f"br label %{head}")
        self.start(head)
        index, following = "%" + self.make_name(), "%" + self.make_name()
        names = ["%" + self.make_name() for _ in carried]
        place = len(self.lines)
        results = body(index, names)
        self.emit(f"{following} = add i64 {index}, 1")
        more = self.value(f"icmp slt i64 {following}, {count}")
        phis = [f"  {index} = phi i64 [0, %{before}], [{following}, %{self.label}]"]
        for name, (kind, value), result in zip(names, carried, results, strict=True):
            phis.append(f"  {name} = phi {kind} [{value}, %{before}], [{result}, %{self.label}]")
        self.lines[place:place] = phis
        self.emit(f"br i1 {more}, label %{head}, label %{after}")
        self.start(after)
        return list(results)

    def for_each(self, count: int | Value, body: Callable[[Value], None]) -> None:
        def step(index: Value, _: list[Value]) -> list[Value]:
            body(index)
            return []

        self.repeat(count, [], step)

    def loop_while_below(self, slot: Value, limit: Value, body: Callable[[Value], None]) -> None:
        """Run ``body`` with the number in ``slot``, then count that up, while it is below ``limit``."""
        head, inside, after = self.make_name(), self.make_name(), self.make_name()
        self.emit(f"br label %{head}")
        self.start(head)
        index = self.get(slot)
        more = self.value(f"icmp slt i64 {index}, {limit}")
        self.emit(f"br i1 {more}, label %{inside}, label %{after}")
        self.start(inside)
        body(index)
        self.put(slot, self.number("add", index, 1))
        self.emit(f"br label %{head}")
        self.start(after)

    def for_range(self, start: int | Value, end: int | Value, body: Callable[[Value], None]) -> None:
        """Run ``body`` with every number from ``start`` to before ``end``; not at all where there is none."""
        slot = self.slot()
        self.put(slot, start)
        self.loop_while_below(slot, str(end), body)

    def emit_if(self, condition: Value, body: Callable[[], None]) -> None:
        """Run ``body`` where ``condition``, an i1, holds."""
        inside, after = self.make_name(), self.make_name()
        self.emit(f"br i1 {condition}, label %{inside}, label %{after}")
        self.start(inside)
        body()
        self.emit(f"br label %{after}")
        self.start(after)

    def choose_larger(self, first: int | Value, second: int | Value, signed: str = "sgt") -> Value:
        """The larger of two 64-bit integers; the smaller with ``slt``."""
        return self.choose(self.value(f"icmp {signed} i64 {first}, {second}"), "i64", str(first), str(second))

    def choose(self, condition: Value, kind: str, yes: Value, no: Value) -> Value:
        return self.value(f"select i1 {condition}, {kind} {yes}, {kind} {no}")


def constant(kind: str, value: int | str, count: int) -> Value:
    """A vector of ``count`` times ``value``."""
    return "<" + ", ".join([f"{kind} {value}"] * count) + ">"


def float_text(value: float) -> str:
    """``value``, a float32, as LLVM writes it."""
    import struct

    return "0x" + struct.pack(">d", value).hex().upper()

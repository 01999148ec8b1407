"""A stack machine for the pickles of foreign files, which runs nothing in them.

A pickle is a program for a small stack machine. The one of the standard library is unsafe for files of unknown origin,
even when it looks up no dangerous name: an index in the file makes it reserve gigabytes, a deep tuple used as a key
overflows its stack, and a state can be written into the functions that guard it. So this module has a stack machine of
its own, with only the instructions that weights need. A name in the file stays a name
(:class:`mgq.weights.pickled_values.Name`, which cannot be called), and each name that may be "called" stands for one
function of :mod:`mgq.weights.pickle_names` that makes an array or a container. What programs leave beside the weights
(settings, paths, dates: :mod:`mgq.weights.inert_objects`) becomes one inert value, whatever its arguments. Any other
name is refused. Steps and memory are limited.

Format: the opcodes of Python's ``pickletools`` for protocols 2 to 5.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

from mgq.weights.foreign_formats import identify_model
from mgq.weights.inert_objects import OF_INERT, InertObject, is_inert, is_mapping
from mgq.weights.pickle_names import CALLS, CLASSES, KNOWN, STORAGES, Maker, result_of, wants_code
from mgq.weights.pickled_values import Dtype, LongText, MegTensor, Name, NumpyArray, put_key
from mgq.weights.torch_files import Allowance, Storages, UnreadableError, damaged_error

_MOST_STEPS = 500_000  # PyTorch needs about 40 for a tensor
_LONGEST_TEXT = 4096  # beyond it a text stays bytes
_LONGEST_NAME = 256
_LONGEST_PICKLE = 2**22  # without the data, as PyTorch writes it


class Unpickler:
    """Reads the pickles in ``data`` one after the other, from ``position`` on.

    Values are None, bool, int, float, str, memoryview (for bytes), list, tuple, dict and the classes above.
    """

    def __init__(self, data: memoryview, allowance: Allowance) -> None:
        self.position = 0
        self.allowance = allowance
        self._data = data
        self._steps = _MOST_STEPS
        self._storages: Storages | None = None
        self._stack: list[Any] = []
        self._below: list[list[Any]] = []  # the stacks set aside by each MARK
        self._memo: dict[int, object] = {}

    def load(self, storages: Storages | None = None) -> object:
        """The value of the next pickle, which may refer to ``storages``. Raises UnreadableError."""
        self._storages, self._stack, self._below, self._memo = storages, [], [], {}
        try:
            while (code := self.number(_U1)) != _STOP:
                self.spend(1)
                _STEPS[code](self)
            (value,) = self._stack
        except (IndexError, KeyError, ValueError) as error:
            raise damaged_error() from error
        return value

    def spend(self, steps: int) -> None:
        """Counts work. Raises UnreadableError when it is more than any honest file needs."""
        self._steps -= steps
        if self._steps < 0:
            raise UnreadableError("takes more steps than any weights file: get it from a source you trust")

    def take(self, size: int) -> memoryview:
        """The next ``size`` bytes."""
        if not 0 <= size <= len(self._data) - self.position:
            raise damaged_error()
        self.position += size
        return self._data[self.position - size : self.position]

    def number(self, kind: struct.Struct) -> Any:
        """The next number."""
        (value,) = kind.unpack(self.take(kind.size))
        return value

    def line(self) -> str:
        """The text up to the end of the line."""
        ahead = bytes(self._data[self.position : self.position + _LONGEST_NAME])
        text = ahead[: ahead.index(b"\n")]
        self.position += len(text) + 1
        return str(text, "utf-8")

    def text(self, size: int) -> str | LongText:
        """The next ``size`` bytes as a text."""
        raw = self.take(size)
        if size > _LONGEST_TEXT:
            return LongText(raw)
        self.spend(size // 32)
        return str(raw, "utf-8")

    def integer(self, size: int) -> int:
        """The next ``size`` bytes as a whole number."""
        return int.from_bytes(self.take(size), "little", signed=True)

    def push(self, value: object) -> None:
        """Puts a value on the stack."""
        self._stack.append(value)

    def pop(self) -> Any:
        """Takes the topmost value."""
        return self._stack.pop()

    def peek(self) -> Any:
        """The topmost value, which stays."""
        return self._stack[-1]

    def pop_many(self, count: int) -> tuple[Any, ...]:
        """Takes the topmost ``count`` values, the topmost last."""
        if len(self._stack) < count:
            raise damaged_error()
        values = tuple(self._stack[-count:])
        del self._stack[-count:]
        return values

    def mark(self) -> None:
        """Begins a new stack on top of the present one."""
        self._below.append(self._stack)
        self._stack = []

    def pop_mark(self) -> list[Any]:
        """Takes all values since the last mark."""
        values, self._stack = self._stack, self._below.pop()
        return values

    def remember(self, index: int) -> None:
        """Notes the topmost value under ``index``."""
        self._memo[index] = self._stack[-1]

    def memoize(self) -> None:
        """Notes the topmost value under the next index."""
        self.remember(len(self._memo))

    def recall(self, index: int) -> None:
        """Pushes what was noted under ``index``."""
        self.push(self._memo[index])

    def extend(self, values: list[Any]) -> None:
        """Adds to the topmost list."""
        if type(self.peek()) is InertObject:
            return
        if type(self.peek()) is not list:
            raise damaged_error()
        self.peek().extend(values)

    def update(self, values: list[Any]) -> None:
        """Adds keys and values, in turn, to the topmost mapping."""
        if type(self.peek()) is InertObject:
            return
        if type(self.peek()) is not dict:
            raise damaged_error()
        for key, value in zip(values[::2], values[1::2], strict=True):
            put_key(self.peek(), key, value)

    def name(self, module: object, name: object) -> None:
        """Pushes a name, if weights need it or it is read past. Raises UnreadableError otherwise."""
        if type(module) is not str or type(name) is not str:
            raise damaged_error()
        asked = Name(module, name)
        if asked in KNOWN or is_mapping(module, name) or str(asked) in OF_INERT:
            self.push(asked)
        elif is_inert(module, name):
            self.push(InertObject(str(asked)))
        else:
            raise wants_code(asked, identify_model(bytes(self._data[:_LONGEST_PICKLE])))

    def make(self, makers: dict[Name, Maker]) -> None:
        """Pushes what the name and the arguments on the stack make. Raises UnreadableError."""
        name, args = self.pop_many(2)
        if type(args) is not tuple:
            raise damaged_error()
        if type(name) is InertObject:
            self.push(name)
        elif type(name) is not Name:
            raise damaged_error()
        elif str(name) in OF_INERT:
            self.push(result_of(name, args))
        elif is_mapping(name.module, name.name):
            self.push({})
        else:
            self.push(makers[name](self, args))

    def make_with_words(self) -> None:
        """As :meth:`make` of an inert class, whose arguments have names, too."""
        self.pop_many(1)
        if type(self._stack[-2]) is not InertObject:
            raise damaged_error()
        self.make({})

    def drop_mark(self) -> None:
        """Adds all values since the last mark to a set, which is nothing that weights need."""
        self.pop_mark()
        if self.peek() is not _SET:
            raise damaged_error()

    def freeze_mark(self) -> None:
        """Makes a set of all values since the last mark."""
        self.pop_mark()
        self.push(_SET)

    def build(self) -> None:
        """Gives the topmost object its state. A mapping drops it: there PyTorch keeps versions of layers."""
        state, target = self.pop(), self.peek()
        if type(target) is InertObject:
            return
        if isinstance(target, Dtype | NumpyArray | MegTensor):
            target.set_state(state)
        elif type(target) is not dict or type(state) is not dict:
            raise damaged_error()

    def persistent(self) -> None:
        """Pushes the storage that PyTorch's ("storage", type, key, device, length[, view]) refers to."""
        if self._storages is None:
            raise UnreadableError("refers to data outside of itself, which is not read: save a state dict")
        reference = self.pop()
        if type(reference) is not tuple:
            raise damaged_error()
        kind, storage, key, _, length, *view = reference
        if kind != "storage" or type(storage) is not Name or type(key) is not str or type(length) is not int:
            raise damaged_error()
        self.push(self._storages.part(STORAGES[storage], key, length, view[0] if view else None))


_U1, _U2, _U4, _U8 = struct.Struct("<B"), struct.Struct("<H"), struct.Struct("<I"), struct.Struct("<Q")
_I4, _F8 = struct.Struct("<i"), struct.Struct(">d")
_STOP = ord(".")
_SET = InertObject("a set")


def _refuse_extension(machine: Unpickler) -> None:
    raise wants_code("an extension of copyreg")


def _refuse_instance(machine: Unpickler) -> None:
    machine.name(machine.line(), machine.line())
    raise wants_code(machine.pop())


_STEPS: dict[int, Callable[[Unpickler], object]] = {
    0x80: lambda m: m.take(1),  # PROTO
    0x95: lambda m: m.take(8),  # FRAME
    # constants and numbers
    ord("N"): lambda m: m.push(None),
    0x88: lambda m: m.push(True),
    0x89: lambda m: m.push(False),
    ord("K"): lambda m: m.push(m.number(_U1)),
    ord("M"): lambda m: m.push(m.number(_U2)),
    ord("J"): lambda m: m.push(m.number(_I4)),
    0x8A: lambda m: m.push(m.integer(m.number(_U1))),
    ord("G"): lambda m: m.push(m.number(_F8)),
    # text, by Python 2 too, and bytes
    0x8C: lambda m: m.push(m.text(m.number(_U1))),
    ord("X"): lambda m: m.push(m.text(m.number(_U4))),
    0x8D: lambda m: m.push(m.text(m.number(_U8))),
    ord("U"): lambda m: m.push(m.text(m.number(_U1))),
    ord("T"): lambda m: m.push(m.text(m.number(_I4))),
    ord("C"): lambda m: m.push(m.take(m.number(_U1))),
    ord("B"): lambda m: m.push(m.take(m.number(_U4))),
    0x8E: lambda m: m.push(m.take(m.number(_U8))),
    0x96: lambda m: m.push(m.take(m.number(_U8))),
    # containers
    ord("]"): lambda m: m.push([]),
    ord("}"): lambda m: m.push({}),
    ord(")"): lambda m: m.push(()),
    0x85: lambda m: m.push(m.pop_many(1)),
    0x86: lambda m: m.push(m.pop_many(2)),
    0x87: lambda m: m.push(m.pop_many(3)),
    ord("t"): lambda m: m.push(tuple(m.pop_mark())),
    ord("a"): lambda m: m.extend([m.pop()]),
    ord("e"): lambda m: m.extend(m.pop_mark()),
    ord("s"): lambda m: m.update(list(m.pop_many(2))),
    ord("u"): lambda m: m.update(m.pop_mark()),
    0x8F: lambda m: m.push(_SET),
    0x90: lambda m: m.drop_mark(),
    0x91: lambda m: m.freeze_mark(),
    # the stack and the memo
    ord("("): lambda m: m.mark(),
    ord("0"): lambda m: m.pop(),
    ord("1"): lambda m: m.pop_mark(),
    ord("2"): lambda m: m.push(m.peek()),
    ord("q"): lambda m: m.remember(m.number(_U1)),
    ord("r"): lambda m: m.remember(m.number(_U4)),
    0x94: lambda m: m.memoize(),
    ord("h"): lambda m: m.recall(m.number(_U1)),
    ord("j"): lambda m: m.recall(m.number(_U4)),
    # names, and what they make
    ord("c"): lambda m: m.name(m.line(), m.line()),
    0x93: lambda m: m.name(*m.pop_many(2)),
    ord("R"): lambda m: m.make(CALLS),
    0x81: lambda m: m.make(CLASSES),
    0x92: lambda m: m.make_with_words(),
    ord("b"): lambda m: m.build(),
    ord("Q"): lambda m: m.persistent(),
    ord("i"): _refuse_instance,
    0x82: _refuse_extension,
    0x83: _refuse_extension,
    0x84: _refuse_extension,
}

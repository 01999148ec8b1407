"""Damage: what is done to a valid file so that it stays nearly one."""

from __future__ import annotations

import json
import random
import re
import struct
from collections.abc import Callable, Sequence
from typing import Any

NUMBERS: tuple[int, ...] = (
    *(0, 1, 2, 3, 4, 7, 8, 16, 31, 32, 64, 127, 128, 255, 256, 1000, 4096, 2**15, 2**16, 2**24, 2**31 - 1, 2**31),
    *(2**32 - 1, 2**32, 2**40, 2**53, 2**63 - 1, 2**63, 2**64 - 1),
)
ODD_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 1000, 10**9, 10**18, 10**30, -(10**30), 0.5, 1e308, float("inf"), float("nan")),
    *("", "x", "\x1b[31mred", "[bold]rich[/bold]", "two\nlines", "\ud800", "a" * 5000, "../../etc/passwd"),
    *([], {}, [[]], [0] * 1000, {"a": {"b": [1]}}, [None], ["a", 1]),
)
_INTEGERS = ("<B", "<H", ">H", "<I", ">I", "<Q", ">Q", "<i")


def damaged(data: bytes, rng: random.Random, tokens: Sequence[bytes], others: Sequence[bytes]) -> bytes:
    """``data`` after one to six changes; ``tokens`` are words of its format, ``others`` files to take parts of."""
    for _ in range(rng.choice((1, 1, 1, 2, 3, 6))):
        data = rng.choice(_CHANGES)(data, rng, tokens, others)
    return data


def _place(data: bytes, rng: random.Random) -> int:
    """Where to change something: headers, which come first or last, are met more often than the rest."""
    if rng.random() < 0.4:
        return rng.randrange(min(len(data), 256) + 1)
    if rng.random() < 0.15:
        return max(0, len(data) - rng.randrange(128))
    return rng.randrange(len(data) + 1)


def _flip(data: bytes, rng: random.Random, *_: object) -> bytes:
    at = min(_place(data, rng), max(0, len(data) - 1))
    return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :] if data else data


def _set(data: bytes, rng: random.Random, *_: object) -> bytes:
    at = _place(data, rng)
    return data[:at] + bytes([rng.choice((0, 1, 127, 128, 255, rng.randrange(256)))]) + data[at + 1 :]


def _number(data: bytes, rng: random.Random, *_: object) -> bytes:
    form = rng.choice(_INTEGERS)
    width = struct.calcsize(form)
    at = _place(data, rng)
    at -= at % width if rng.random() < 0.6 else 0
    bits = 8 * width - (form == "<i")
    old = int.from_bytes(data[at : at + width], "little" if form[0] == "<" else "big")
    value = old + rng.choice((-1, 1, 4, -4)) if rng.random() < 0.3 else rng.choice(NUMBERS)
    return data[:at] + struct.pack(form, value % 2**bits) + data[at + width :]


def _cut(data: bytes, rng: random.Random, *_: object) -> bytes:
    return data[: _place(data, rng)]


def _drop(data: bytes, rng: random.Random, *_: object) -> bytes:
    at = _place(data, rng)
    return data[:at] + data[at + rng.choice((1, 2, 4, 8, rng.randrange(1, 64))) :]


def _repeat(data: bytes, rng: random.Random, *_: object) -> bytes:
    at, length = _place(data, rng), rng.choice((1, 4, 8, 64, 512))
    return data[:at] + data[at : at + length] * rng.choice((2, 3, 50)) + data[at + length :]


def _splice(data: bytes, rng: random.Random, _: object, others: Sequence[bytes]) -> bytes:
    other = rng.choice(others)
    start = _place(other, rng)
    part = other[start : start + rng.choice((4, 16, 64, 1024))]
    at = _place(data, rng)
    return data[:at] + part + data[at + (len(part) if rng.random() < 0.5 else 0) :]


def _token(data: bytes, rng: random.Random, tokens: Sequence[bytes], _: object) -> bytes:
    token = rng.choice(tokens) if tokens else b"\0\0\0\0"
    at = _place(data, rng)
    return data[:at] + token + data[at + (len(token) if rng.random() < 0.6 else 0) :]


def _written_number(data: bytes, rng: random.Random, *_: object) -> bytes:
    """Another number where digits stand, as in JSON and TOML."""
    found = list(re.finditer(rb"-?\d+", data[:100_000]))
    if not found:
        return _number(data, rng)
    one = rng.choice(found)
    value = rng.choice((str(rng.choice(NUMBERS)), "-1", "1e400", "9" * 400, "nan", "null", '"text"', "[]", "0.5"))
    return data[: one.start()] + value.encode() + data[one.end() :]


_CHANGES: tuple[Callable[..., bytes], ...] = (
    *(_flip, _flip, _set, _number, _number, _number, _cut, _drop, _repeat, _splice, _token, _token, _written_number),
)


def other_json(value: Any, rng: random.Random) -> Any:
    """``value``, plain data, with an odd value at one place or an entry more or less."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        key = rng.choice(list(value))
        if rng.random() < 0.1:
            return {name: entry for name, entry in value.items() if name != key}
        return {**value, key: other_json(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.6:
        at = rng.randrange(len(value))
        return [*value[:at], other_json(value[at], rng), *value[at + 1 :]]
    if isinstance(value, list) and rng.random() < 0.2:
        return value * rng.choice((0, 2, 1000))
    return rng.choice(ODD_VALUES)


def odd_json(value: Any, rng: random.Random) -> bytes:
    """Text of ``value`` with one to three odd places, or nested far too deep."""
    if rng.random() < 0.03:
        return b"[" * rng.choice((500, 100_000)) + b"1" + b"]" * rng.choice((0, 500))
    for _ in range(rng.choice((1, 1, 2, 3))):
        value = other_json(value, rng)
    return json.dumps(value).encode()

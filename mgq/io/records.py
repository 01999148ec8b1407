"""Makes records of plain data from JSON or TOML, checked against the types and bounds that the class declares.

A class is a dataclass. It says what bounds a number once, as ``Annotated[int, Meta(ge=1)]``: readers, options of the
command line and errors take it from there.

msgspec takes ``gt=0`` for "at least the smallest subnormal", which MegEngine has the processor read as 0: where
:func:`record_of` is to refuse 0, another bound is needed. :func:`bounds_of` tells them apart.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from typing import Any, TypeVar, get_args, get_type_hints

import msgspec

from mgq.io.bounds import Bounds

Record = TypeVar("Record")


def record_of(kind: type[Record], body: object, others: bool = False) -> Record:
    """``body`` as a ``kind``; ``others``: it may have other keys, too.

    Raises ValueError where it is no object or lacks a key, or a value is of another type or out of bounds.
    """
    try:
        found = msgspec.convert(body, kind)
    except msgspec.ValidationError as error:
        raise ValueError(str(error)) from None
    if not others:
        _refuse_unknown(found, body)
    return found


def _refuse_unknown(record: object, body: object) -> None:
    """Raises ValueError where ``body`` has a key that ``record``, made of it, or a record in it does not have."""
    if not is_dataclass(record) or not isinstance(body, Mapping):
        return
    if unknown := body.keys() - {field.name for field in fields(record)}:
        raise ValueError(f"unknown keys {sorted(unknown)}")
    for name, value in body.items():
        _refuse_unknown(getattr(record, name), value)


def value_of(kind: type, name: str, value: object) -> Any:
    """``value`` as the field ``name`` of ``kind`` has it, whatever bounds it. Raises ValueError for another type."""
    try:
        return msgspec.convert(value, types_of(kind)[name])
    except msgspec.ValidationError as error:
        raise ValueError(str(error)) from None


@cache
def types_of(kind: type) -> dict[str, Any]:
    """Name of a field of ``kind`` -> its type."""
    return get_type_hints(kind)


@cache
def bounds_of(kind: type) -> dict[str, Bounds]:
    """Name of a field of ``kind`` that is a number -> what bounds it."""
    hints = get_type_hints(kind, include_extras=True)
    return {n: _bounds(meta) for n, hint in hints.items() for meta in get_args(hint) if isinstance(meta, msgspec.Meta)}


def _bounds(meta: msgspec.Meta) -> Bounds:
    least = next((value for value in (meta.gt, meta.ge) if value is not None), -math.inf)
    most = next((value for value in (meta.lt, meta.le) if value is not None), math.inf)
    return Bounds(least, most, meta.gt is not None, meta.lt is not None)

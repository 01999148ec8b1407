"""Records from plain data: types and bounds are those that the class says, and a line says what to give instead."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

import pytest
from msgspec import Meta

from mgq.errors import InputError
from mgq.io.bounds import Bounds
from mgq.io.records import bounds_of, record_of, types_of, value_of


@dataclass(frozen=True)
class Inner:
    share: Annotated[float, Meta(ge=0.25, lt=1)] = 0.5


@dataclass(frozen=True)
class Outer:
    count: Annotated[int, Meta(ge=1, le=9)]
    names: tuple[str, ...] = ()
    more: Mapping[str, Any] = field(default_factory=dict)
    inner: Inner | None = None


WHOLE = {"count": 3, "names": ["a"], "more": {"x": [1, None]}, "inner": {"share": 0.75}}


def test_plain_data_becomes_a_record() -> None:
    assert record_of(Outer, WHOLE) == Outer(3, ("a",), {"x": [1, None]}, Inner(0.75))
    assert record_of(Outer, {"count": 3}) == Outer(3)
    assert record_of(Outer, {**WHOLE, "other": 1}, others=True).count == 3


WRONG: dict[str, list[Any]] = {
    "count": [0, 10, 1.0, True, "3", None],
    "names": ["a", [1], None, {"a": 1}],
    "more": [[], {1: 2}, None],
    "inner": [{"share": 0.2}, {"share": 1}, {"share": 0.5, "else": 1}, 3],
    "unknown": [1],
}


@pytest.mark.parametrize("change", [{key: value} for key, values in WRONG.items() for value in values])
def test_another_type_a_value_out_of_bounds_and_an_unknown_key_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        record_of(Outer, {**WHOLE, **change})


@pytest.mark.parametrize("body", [[], None, "text", {}, {"names": []}])
def test_what_is_no_object_or_lacks_a_key_is_refused(body: object) -> None:
    with pytest.raises(ValueError):
        record_of(Outer, body)


def test_a_field_alone_is_checked_by_its_type_and_its_bounds_are_known() -> None:
    assert value_of(Outer, "count", 100) == 100 and types_of(Outer)["count"] is int
    with pytest.raises(ValueError):
        value_of(Outer, "count", 1.5)
    assert bounds_of(Outer) == {"count": Bounds(1, 9)} and bounds_of(Inner) == {"share": Bounds(0.25, 1, below=True)}


@pytest.mark.parametrize(
    ("bounds", "number", "line"),
    [
        (Bounds(1, 9), 0, "--n 0 is too small: give 1 to 9"),
        (Bounds(1, 90_000), 10**6, "--n 1000000 is too large: give 1 to 90,000"),
        (Bounds(0, 1, above=True), 0.0, "--n 0.0 is too small: give more than 0 to 1"),
        (Bounds(0, 1, below=True), 1.0, "--n 1.0 is too large: give 0 to less than 1"),
        (Bounds(0), float("inf"), "--n inf is not possible: give at least 0"),
        (Bounds(0, above=True), 0, "--n 0 is too small: give more than 0"),
    ],
)
def test_a_number_out_of_bounds_is_one_line_that_says_what_to_give(bounds: Bounds, number: float, line: str) -> None:
    with pytest.raises(InputError) as caught:
        bounds.refuse_beyond("--n", number)
    assert str(caught.value) == line


def test_numbers_within_are_let_through() -> None:
    Bounds(0, 1).refuse_beyond("--n", 1)
    Bounds().refuse_beyond("--n", -(10**400))

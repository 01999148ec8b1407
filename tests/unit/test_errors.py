"""Words of messages."""

from __future__ import annotations

import pytest

from mgq.errors import format_size, plural, shorten


@pytest.mark.parametrize(
    ("number", "noun", "said"),
    [
        (1, "class", "1 class"),
        (0, "class", "0 classes"),
        (2, "batch", "2 batches"),
        (3, "axis", "3 axes"),
        (1, "axis", "1 axis"),
        (1000, "picture", "1000 pictures"),
    ],
)
def test_a_noun_goes_with_its_number(number: int, noun: str, said: str) -> None:
    assert plural(number, noun) == said


def test_a_long_text_ends_in_a_sign_that_there_is_more() -> None:
    assert (shorten("abcd", 4), shorten("abcde", 4)) == ("abcd", "abc…")


def test_a_large_number_may_be_grouped() -> None:
    assert plural(1000, "picture", ",") == "1,000 pictures"


@pytest.mark.parametrize(
    ("size", "said"), [(13_812_000, "13.8 MB"), (100_000, "0.1 MB"), (99_949, "99.9 kB"), (24_300, "24.3 kB")]
)
def test_a_small_size_is_not_said_to_be_nothing(size: int, said: str) -> None:
    assert format_size(size) == said

"""Words of messages."""

from __future__ import annotations

import pytest

from mgq.errors import plural


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


def test_a_large_number_may_be_grouped() -> None:
    assert plural(1000, "picture", ",") == "1,000 pictures"

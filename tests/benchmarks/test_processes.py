"""The benchmark of processes: what counts, and what is compared with what."""

from __future__ import annotations

import pytest

from tests.benchmarks.processes import Turn, compare, speed_of


def test_the_first_epoch_does_not_count() -> None:
    entries = [
        {"images_per_second": speed, "seconds": seconds} for speed, seconds in ((1.0, 100.0), (10.0, 2.0), (40.0, 1.0))
    ]
    assert speed_of(entries) == pytest.approx(60 / 3)


def test_ways_are_compared_within_each_round() -> None:
    """A machine that is twice as fast in one round makes nothing faster."""
    rounds = [
        {"one": Turn(speed, 1.0), "two": Turn(1.5 * speed, 1.9), "sync-bn": Turn(speed, 2.0)} for speed in (10, 20, 15)
    ]
    one, two, synchronized = compare(rounds)
    assert one == "one: 15.0 (10.0 to 20.0) pictures/s, 1.00 (1.00 to 1.00) cores"
    assert two.endswith("1.90 (1.90 to 1.90) cores, 1.50 (1.50 to 1.50) times 'one'")
    assert synchronized.endswith("0.67 (0.67 to 0.67) times 'two'")


def test_without_what_it_is_compared_to_a_way_stands_alone() -> None:
    (line,) = compare([{"two": Turn(30.0, 2.0)}])
    assert "times" not in line

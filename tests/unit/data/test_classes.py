"""The list of ImageNet's classes."""

from __future__ import annotations

import re

import pytest

from mgq.data.imagenet_classes import imagenet_classes


def test_there_are_1000_classes_in_the_order_of_their_wnids() -> None:
    wnids = [entry.wnid for entry in imagenet_classes()]
    assert len(wnids) == 1000
    assert wnids == sorted(set(wnids))
    assert all(re.fullmatch(r"n\d{8}", wnid) for wnid in wnids)


@pytest.mark.parametrize(
    ("rank", "wnid", "name"),
    [
        (0, "n01440764", "tench"),
        (1, "n01443537", "goldfish"),
        (134, "n02012849", "crane (bird)"),
        (207, "n02099601", "golden retriever"),
        (281, "n02123045", "tabby cat"),
        (285, "n02124075", "Egyptian cat"),
        (517, "n03126707", "crane (machine)"),
        (620, "n03642806", "laptop"),
        (817, "n04285008", "sports car"),
        (954, "n07753592", "banana"),
        (963, "n07873807", "pizza"),
        (999, "n15075141", "toilet paper"),
    ],
)
def test_well_known_classes_stand_at_their_rank(rank: int, wnid: str, name: str) -> None:
    assert imagenet_classes()[rank] == (wnid, name)


def test_no_two_names_are_alike() -> None:
    names = {entry.name.casefold() for entry in imagenet_classes()}
    assert len(names) == 1000


def test_names_are_short_and_clean() -> None:
    for _, name in imagenet_classes():
        assert re.fullmatch(r"[A-Za-z][A-Za-z' .-]*( \([a-z ]+\))?", name), name
        assert len(name) <= 30

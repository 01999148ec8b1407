"""Names the 1,000 classes of ImageNet (ILSVRC 2012), and their WordNet ids."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

_LIST = Path(__file__).with_name("imagenet_classes.txt")


class ImageNetClass(NamedTuple):
    """One class: its WordNet id, such as ``n01440764``, and a short English name, such as ``tench``."""

    wnid: str
    name: str


@lru_cache(maxsize=1)
def imagenet_classes() -> tuple[ImageNetClass, ...]:
    """The 1,000 classes in the order of a network's outputs: class ``i`` has the ``i``-th smallest wnid.

    No two names are alike. They are the first lemmas of WordNet 3.0, or a more usual word for the same thing
    (``polar bear``, not ``ice bear``); where a word has two meanings, the one meant is in parentheses.
    """
    lines = _LIST.read_text(encoding="utf-8").splitlines()
    return tuple(ImageNetClass(*line.split(" ", maxsplit=1)) for line in lines)

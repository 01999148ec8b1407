"""Folders of empty files, where no image is opened."""

from __future__ import annotations

import os
from pathlib import Path

from mgq.data.datasets import Dataset, Selection
from mgq.data.labelled_folders import ImageFolder


def make(root: Path, *names: str) -> Path:
    """Empty files: no picture is opened here."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return root


def listed(images: Dataset) -> list[tuple[str, int]]:
    """The path of each picture in its folder, and its label."""
    whole = images.source if isinstance(images, Selection) else images
    assert images.labels is not None and isinstance(whole, ImageFolder)
    paths = [os.path.relpath(str(images.image(i)), whole.folder) for i in range(len(images))]
    return list(zip(paths, images.labels.tolist(), strict=True))

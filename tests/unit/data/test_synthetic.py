"""The drawn pictures: the same every time, all different, and of the class they are said to be."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import pytest

from mgq.data.datasets import Dataset
from mgq.data.pixel_decoders import Pixels
from mgq.data.synthetic import SyntheticImages
from mgq.errors import InputError


def digest(image: npt.NDArray[Any]) -> str:
    return hashlib.sha256(image.tobytes()).hexdigest()


def test_it_is_a_dataset_that_is_called_synthetic() -> None:
    images: Dataset = SyntheticImages(25)
    assert "synthetic" in images.name
    assert len(images) == 25
    assert len(images.classes) == len(set(images.classes)) == 10


def test_the_classes_come_in_turn() -> None:
    labels = SyntheticImages(25).labels
    assert labels.dtype == np.int64
    assert labels.tolist() == [i % 10 for i in range(25)]
    with pytest.raises(ValueError, match="read-only"):
        labels[0] = 1


@pytest.mark.parametrize("size", [16, 64, 65, 224])
def test_images_have_the_size_asked_for_and_colour(size: int) -> None:
    for index in range(10):
        image = SyntheticImages(10, size=size).image(index)
        assert image.shape == (size, size, 3)
        assert image.dtype == np.uint8
        assert image.flags.c_contiguous
        assert image.std() > 5
        assert (image[..., 0] != image[..., 2]).any()


def test_an_image_depends_on_seed_split_and_index_alone() -> None:
    few, many = SyntheticImages(20, seed=4), SyntheticImages(1000, seed=4)
    alone = [digest(few.image(index)) for index in range(20)]
    with ThreadPoolExecutor(4) as pool:
        backwards = list(pool.map(lambda index: digest(many.image(index)), reversed(range(20))))
    assert alone == backwards[::-1]
    others = [SyntheticImages(20, seed=5), SyntheticImages(20, seed=4, split="val")]
    for other in others:
        assert not set(alone) & {digest(other.image(index)) for index in range(20)}


def test_no_two_images_are_alike_in_or_across_the_splits() -> None:
    splits = [SyntheticImages(300, size=16), SyntheticImages(300, size=16, split="val")]
    # Without the noise, which alone would make any two differ.
    smooth = {digest(cv2.resize(s.image(i), (4, 4), interpolation=cv2.INTER_AREA)) for s in splits for i in range(300)}
    assert len(smooth) == 600


def test_an_image_beyond_the_last_is_an_index_error() -> None:
    for index in (-1, 3):
        with pytest.raises(IndexError):
            SyntheticImages(3).image(index)


def measures(image: Pixels) -> npt.NDArray[np.float32]:
    """What can be told of a drawing at any place, size and rotation: a little of its form, none of its colour."""
    grey = cv2.GaussianBlur(cv2.cvtColor(image, cv2.COLOR_BGR2GRAY), (0, 0), 1.5)
    _, ink = cv2.threshold(grey, 0, 255, cv2.THRESH_BINARY | cv2.THRESH_OTSU)
    border = np.concatenate([ink[0], ink[-1], ink[:, 0], ink[:, -1]])
    ink = 255 - ink if border.mean() > 127 else ink
    outlines, tree = cv2.findContours(ink, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    largest = max(outlines, key=cv2.contourArea)
    area, around = cv2.contourArea(largest), cv2.arcLength(largest, True)
    (_, (width, height), _) = cv2.minAreaRect(largest)
    hull = cv2.contourArea(cv2.convexHull(largest))
    triangle, _ = cv2.minEnclosingTriangle(largest)
    shape = [area / around**2 * 12.6, area / max(hull, 1), area / max(width * height, 1), area / max(triangle, 1)]
    holes = sum(cv2.contourArea(o) for o, node in zip(outlines, tree[0], strict=True) if node[3] >= 0) / max(area, 1)
    return np.array([*shape, holes, np.log1p(len(outlines)), area / ink.size, border.mean() / 255], np.float32)


def test_each_class_can_be_told_from_the_others() -> None:
    """By the nearest drawings of the other split, from eight rough measures: chance would give 10 %."""
    train, val = SyntheticImages(600), SyntheticImages(200, split="val")
    known = np.stack([measures(train.image(index)) for index in range(len(train))])
    asked = np.stack([measures(val.image(index)) for index in range(len(val))])
    middle, spread = known.mean(0), known.std(0)
    neighbours = cv2.ml.KNearest.create()
    neighbours.train((known - middle) / spread, cv2.ml.ROW_SAMPLE, train.labels.astype(np.float32))
    _, found, _, _ = neighbours.findNearest((asked - middle) / spread, 5)
    right = found[:, 0] == val.labels
    assert right.mean() > 0.8
    assert min(right[label::10].mean() for label in range(10)) > 0.5


def test_a_class_looks_as_its_name_says() -> None:
    """By the middle of each measure over 20 drawings."""
    images = SyntheticImages(200)
    all_ = np.stack([measures(images.image(index)) for index in range(200)])
    round_, hull, rectangle, triangle, holes, outlines, share, _ = (
        dict(zip(images.classes, column, strict=True))
        for column in np.median(all_.reshape(20, 10, -1), axis=0).T.tolist()
    )

    def most(values: dict[str, float], *but: str) -> str:
        return max(values.keys() - set(but), key=values.__getitem__)

    assert most(holes) == "ring"
    assert most(round_, "ring") == "disc"
    assert most(rectangle) == "square"
    assert most(triangle) == "triangle"
    assert most({name: -value for name, value in hull.items()}) == "star"
    assert hull["cross"] < 0.85
    assert most(outlines) == "dots"
    assert most(outlines, "dots") == "checkerboard"
    assert most({name: -value for name, value in round_.items()}) == "stripes"
    assert share["glow"] > 0.1


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: SyntheticImages(0), "at least 1"),
        (lambda: SyntheticImages(1, size=8), "at least 16"),
        (lambda: SyntheticImages(1, split="test"), "train or val"),  # type: ignore[arg-type]
    ],
)
def test_values_that_cannot_be_are_refused(make: Callable[[], SyntheticImages], expected: str) -> None:
    with pytest.raises(InputError, match=expected):
        make()

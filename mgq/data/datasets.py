"""Datasets: the protocol that the loader reads from, parts of a dataset, and its images one by one."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from mgq.data.decoding import read_image
from mgq.data.image_sources import Source
from mgq.data.pixel_decoders import Pixels
from mgq.data.synthetic import SyntheticImages
from mgq.errors import InputError


class Dataset(Protocol):
    """Pictures in a fixed order, each of a class.

    ``labels`` are int64 (pictures,), indices into ``classes``; None where no classes are known. ``image`` gives
    a file to be read, or pixels, uint8 (H, W, 3) in BGR order. It is called from several threads at once.
    """

    @property
    def name(self) -> str: ...
    @property
    def classes(self) -> tuple[str, ...]: ...
    @property
    def labels(self) -> npt.NDArray[np.int64] | None: ...
    def __len__(self) -> int: ...
    def image(self, index: int) -> Path | Pixels: ...


@dataclass(frozen=True, eq=False)
class Selection:
    """The pictures of another dataset whose numbers are in ``indices``, with labels and classes of its own.

    ``part`` says which part of it they are, where the name alone would mislead.
    """

    source: Dataset
    indices: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64] | None
    classes: tuple[str, ...]
    part: str = ""

    @property
    def name(self) -> str:
        return f"{self.source.name} ({self.part})" if self.part else self.source.name

    def __len__(self) -> int:
        return len(self.indices)

    def image(self, index: int) -> Path | Pixels:
        """What the other dataset gives, 0 <= ``index`` < len. Raises IndexError for another."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self.source.image(int(self.indices[index]))


def subset(dataset: Dataset, number: int) -> Dataset:
    """``number`` pictures of ``dataset``, evenly spread, with their labels; all where there are fewer.

    Of drawn pictures it is the first ones: their classes come in turn, and even steps would meet some only.

    Raises InputError for fewer than one.
    """
    if number < 1:
        raise InputError(f"a limit of {number} pictures is not possible: give at least 1")
    if number >= len(dataset):
        return dataset
    if isinstance(dataset, SyntheticImages):
        return replace(dataset, count=number)
    return select(dataset, pick_evenly(len(dataset), number))


def without_subset(dataset: Dataset, number: int) -> Dataset:
    """The pictures of ``dataset`` that ``subset`` leaves out."""
    total = len(dataset)
    drawn = isinstance(dataset, SyntheticImages)
    taken = np.arange(min(number, total)) if drawn else pick_evenly(total, number)
    return select(dataset, np.setdiff1d(np.arange(total), taken))


def pick_evenly(total: int, number: int) -> npt.NDArray[np.int64]:
    """``number`` indices below ``total``, evenly spread, int64 (number,); all of them where there are fewer."""
    number = min(number, total)
    return np.arange(number) * total // max(1, number)


def select(dataset: Dataset, chosen: npt.NDArray[np.int64], part: str = "") -> Selection:
    """The pictures whose numbers were ``chosen``; ``part`` says which these are."""
    labels = None if dataset.labels is None else dataset.labels[chosen]
    return Selection(dataset, chosen, labels, dataset.classes, part)


@dataclass(frozen=True, kw_only=True)
class DatasetSource(Source):
    """One picture of a dataset, opened or made when it is read."""

    dataset: Dataset
    index: int

    @property
    def name(self) -> str:
        return f"picture {self.index} of {self.dataset.name}"

    def read(self) -> npt.NDArray[np.uint8]:
        image = self.dataset.image(self.index)
        return read_image(image) if isinstance(image, Path) else image


def list_sources(dataset: Dataset) -> list[Source]:
    """The pictures of ``dataset`` in their order."""
    return [DatasetSource(dataset=dataset, index=i) for i in range(len(dataset))]

"""Crops images for training and for evaluation, with reproducible randomness.

Every random choice is a function of (seed, epoch, picture) alone, so it does not matter which thread makes it,
or whether the pictures before it were made in this process.
"""

from __future__ import annotations

import math
import os
import stat
from dataclasses import dataclass
from enum import IntEnum
from itertools import permutations
from pathlib import Path
from typing import NamedTuple, Protocol

import cv2
import numpy as np

from mgq.data.decoding import read_image
from mgq.data.image_limits import MAX_BYTES
from mgq.data.jpeg import decode_reduced_jpeg, jpeg_facts
from mgq.data.pixel_decoders import Pixels
from mgq.data.transforms import eval_crop, eval_resize
from mgq.errors import InputError

# ---- randomness ----

_64_BITS = (1 << 64) - 1


class Stream(IntEnum):
    """What random numbers are for. Two streams of one seed have nothing in common."""

    ORDER = 0
    CROP = 1
    TRAIN_IMAGE = 2
    VAL_IMAGE = 3


def generator(seed: int, stream: Stream, major: int = 0, minor: int = 0) -> np.random.Generator:
    """A source of random numbers that depends on these four alone (15 us to make).

    Philox is a block cipher over a counter: seed and stream are its key, the others the upper half of the counter.
    Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
    """
    key = np.array([seed & _64_BITS, stream], np.uint64)  # Of a list with a large seed NumPy would make floats.
    return np.random.Generator(np.random.Philox(key=key, counter=np.array([0, 0, minor, major], np.uint64)))


class Draw(NamedTuple):
    """Which of its random variants a picture is wanted in."""

    seed: int = 0
    epoch: int = 0
    number: int = 0


# ---- transforms ----


class Transform(Protocol):
    """From a picture to a crop, uint8 (*shape, 3), BGR. Called from several threads at once.

    ``image`` is a file, or pixels, uint8 (H, W, 3) in BGR order. Raises InputError for a file that cannot be read.
    """

    @property
    def shape(self) -> tuple[int, int]: ...
    def __call__(self, image: Path | Pixels, draw: Draw) -> Pixels: ...


@dataclass(frozen=True)
class EvalTransform:
    """``eval_crop`` of the whole picture: the shorter side becomes ``resize``, the middle is cut out.

    With ``stretched_to``, height and width, nothing is cut out: the picture becomes just that.

    Raises InputError for values that ``eval_crop`` refuses.
    """

    size: int = 224
    resize: int | None = None
    interpolation: str = "bilinear"
    stretched_to: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        # Here and not at the first picture, where it would count as a fault of that.
        eval_crop(np.zeros((1, 1, 3), np.uint8), self.size, self.resize, self.interpolation)

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width."""
        return self.stretched_to or (self.size, self.size)

    def __call__(self, image: Path | Pixels, draw: Draw) -> Pixels:
        pixels = read_image(image) if isinstance(image, Path) else image
        if self.stretched_to is not None:
            return eval_resize(pixels, self.stretched_to)
        return eval_crop(pixels, self.size, self.resize, self.interpolation)


@dataclass(frozen=True)
class TrainTransform:
    """The crop that networks are trained on: a random part of the picture, mirrored or not, its colours changed.

    The part has a random share ``scale`` of the area and a random ``ratio`` of width to height, and is resized to
    ``size`` without smoothing (``INTER_LINEAR``). It is mirrored with probability ``flip``. ``jitter`` 0.4 changes
    brightness, contrast and saturation, in a random order, by factors of 0.6 to 1.4; 0 leaves them. These are
    ``RandomResizedCrop``, ``RandomHorizontalFlip`` and ``ColorJitter`` of ``megengine.data.transform``, where
    colours may differ by up to three steps of 255, by a tenth of one on average.

    A JPEG that is large for the crop is decoded at a half, a quarter or an eighth of its size, as long as the part
    keeps ``size`` pixels each way: three times as fast for a photo of 2000x1500 pixels, and smoother.

    Raises InputError for values that cannot be.
    """

    size: int = 224
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    jitter: float = 0.0

    def __post_init__(self) -> None:
        if self.size < 1:
            raise InputError(f"crop size {self.size} is too small: give at least 1")
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise InputError(f"crop scale {self.scale} is not possible: give two shares of the area, as 0.08 and 1")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise InputError(f"crop ratio {self.ratio} is not possible: give two of width to height, as 0.75 and 1.33")
        if not 0 <= self.flip <= 1:
            raise InputError(f"flip probability {self.flip} is not possible: give 0 to 1")
        if not 0 <= self.jitter <= 1:
            raise InputError(f"colour jitter {self.jitter} is not possible: give 0 to 1")

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width."""
        return self.size, self.size

    def __call__(self, image: Path | Pixels, draw: Draw) -> Pixels:
        chance = generator(draw.seed, Stream.CROP, draw.epoch, draw.number).random(_CHANCES).tolist()
        part = self._part_of_file(image, chance) if isinstance(image, Path) else self._part(image, chance)
        crop = _u8(cv2.resize(part, (self.size, self.size), interpolation=cv2.INTER_LINEAR))
        if chance[_FLIP] < self.flip:
            crop = _u8(cv2.flip(crop, 1))
        return _jitter_colours(crop, self.jitter, chance[_JITTER:]) if self.jitter else crop

    def box(self, width: int, height: int, chance: list[float]) -> Box:
        """The part of a picture that is cut out, by random numbers in 0..1: four for each of ten tries.

        Where no try lies within the picture, it is the middle, as large as ``ratio`` lets it be.
        """
        low, high = (math.log(ratio) for ratio in self.ratio)
        for area_at, ratio_at, x_at, y_at in zip(*[iter(chance[: 4 * _TRIES])] * 4, strict=True):
            area = (self.scale[0] + area_at * (self.scale[1] - self.scale[0])) * width * height
            ratio = math.exp(low + ratio_at * (high - low))
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                return Box(int(x_at * (width - w + 1)), int(y_at * (height - h + 1)), w, h)
        w = min(width, max(1, round(height * self.ratio[1])))
        h = min(height, max(1, round(width / self.ratio[0])))
        return Box((width - w) // 2, (height - h) // 2, w, h)

    def _part(self, image: Pixels, chance: list[float]) -> Pixels:
        x, y, width, height = self.box(image.shape[1], image.shape[0], chance)
        return image[y : y + height, x : x + width]

    def _part_of_file(self, path: Path, chance: list[float]) -> Pixels:
        data = _content(path)
        facts = jpeg_facts(data)
        if facts is not None:
            box = self.box(*facts.upright, chance)
            reduction = next((by for by in (8, 4, 2) if min(box.width, box.height) >= by * self.size), 1)
            reduced = decode_reduced_jpeg(data, facts, reduction) if reduction > 1 else None
            if reduced is not None:
                x, y, right, bottom = box.x, box.y, box.x + box.width, box.y + box.height
                return reduced[y // reduction : -(-bottom // reduction), x // reduction : -(-right // reduction)]
        return self._part(read_image(data, str(path)) if data else read_image(path), chance)


class Box(NamedTuple):
    """A part of a picture, in pixels."""

    x: int
    y: int
    width: int
    height: int


# Where each random number of a picture is used.
_TRIES = 10
_FLIP = 4 * _TRIES
_JITTER = _FLIP + 1
_CHANCES = _JITTER + 4


def _u8(pixels: cv2.typing.MatLike) -> Pixels:
    return np.asarray(pixels, np.uint8)


# ---- colours ----

_ORDERS = tuple(permutations(range(3)))
_LUMA_BGR = (0.114, 0.587, 0.299)
# OpenCV rounds to the nearest whole number where MegEngine cuts the fraction off.
_CUT = -0.499


def _jitter_colours(crop: Pixels, jitter: float, chance: list[float]) -> Pixels:
    """Brightness, contrast and saturation, each times 1 - ``jitter`` to 1 + ``jitter``, in one of six orders."""
    factors = [1 - jitter + 2 * jitter * c for c in chance[:3]]
    for kind in _ORDERS[int(chance[3] * len(_ORDERS))]:
        crop = (_change_brightness, _change_contrast, _change_saturation)[kind](crop, factors[kind])
    return crop


def _change_brightness(crop: Pixels, factor: float) -> Pixels:
    return _u8(cv2.addWeighted(crop, factor, crop, 0, _CUT))


def _change_contrast(crop: Pixels, factor: float) -> Pixels:
    grey = sum(weight * mean for weight, mean in zip(_LUMA_BGR, cv2.mean(crop), strict=False))
    return _u8(cv2.addWeighted(crop, factor, crop, 0, grey * (1 - factor) + _CUT))


def _change_saturation(crop: Pixels, factor: float) -> Pixels:
    grey = cv2.cvtColor(cv2.cvtColor(crop, cv2.COLOR_BGR2GRAY), cv2.COLOR_GRAY2BGR)
    return _u8(cv2.addWeighted(crop, factor, grey, 1 - factor, _CUT))


# ---- large JPEGs ----


def _content(path: Path) -> bytes:
    """The bytes of a plain file; none where ``read_image`` would refuse it, which knows the words for that."""
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            return file.read() if stat.S_ISREG(status.st_mode) and status.st_size <= MAX_BYTES else b""
    except OSError:
        return b""

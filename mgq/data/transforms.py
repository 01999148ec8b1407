"""Resizes, crops and stacks images for evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import cv2
import numpy as np
import numpy.typing as npt

from mgq.errors import InputError

Pixels: TypeAlias = npt.NDArray[np.uint8]

# A picture longer than this many times its shorter side is cut before it is resized. The crop takes only a
# square from the middle: the rest would be resized to be thrown away (5 million pixels long for 20,000 x 1).
_LONGEST = 8


INTERPOLATIONS = {"bilinear": cv2.INTER_LINEAR, "bicubic": cv2.INTER_CUBIC}


def eval_crop(image: Pixels, size: int = 224, resize: int | None = None, interpolation: str = "bilinear") -> Pixels:
    """The middle of a picture as networks are evaluated on: uint8 (H, W, C) in, uint8 (size, size, C) out.

    The shorter side becomes ``resize`` pixels (by default 256 for a size of 224, and in proportion for other
    sizes), the longer side keeps the proportion, and the central square is cut out. This is ``Resize`` and
    ``CenterCrop`` of ``megengine.data.transform`` to the bit: bilinear, without smoothing (``INTER_LINEAR``
    of OpenCV). Only a picture more than 8 times as long as wide may differ, by less than a pixel's shift.
    ``interpolation`` may be ``bicubic`` for weights that were trained so; the longer side is then rounded to the
    nearest pixel, where MegEngine rounds down.

    Raises InputError for a ``size`` below 1 or a ``resize`` smaller than ``size``.
    """
    shorter = round(size / 224 * 256) if resize is None else resize
    if size < 1:
        raise InputError(f"crop size {size} is too small: give at least 1")
    if shorter < size:
        raise InputError(f"resize {shorter} is smaller than the crop size {size}: give at least {size}")
    image = _without_far_ends(image)
    height, width = image.shape[:2]
    if min(height, width) != shorter:
        # In floating point, as MegEngine does it: whole numbers would round some sizes otherwise.
        whole = int if interpolation == "bilinear" else round
        new_height = shorter if height < width else whole(shorter * height / width)
        new_width = whole(shorter * width / height) if height < width else shorter
        method = INTERPOLATIONS[interpolation]
        image = np.asarray(cv2.resize(image, (new_width, new_height), interpolation=method), np.uint8)
    top, left = (round((extent - size) / 2) for extent in image.shape[:2])
    return np.ascontiguousarray(image[top : top + size, left : left + size])


def eval_resize(image: Pixels, size: tuple[int, int]) -> Pixels:
    """The whole of a picture, uint8 (H, W, C), as ``size``, height and width, whatever its proportion."""
    return np.asarray(cv2.resize(image, size[::-1], interpolation=cv2.INTER_LINEAR), np.uint8)


def to_batch(crops: Sequence[Pixels]) -> Pixels:
    """Crops of one shape (H, W, C) as one batch, contiguous uint8 (N, C, H, W), channels as they were.

    Raises InputError for no crops, or crops of different shapes.
    """
    if not crops:
        raise InputError("a batch of no pictures was asked for: give at least one")
    shapes = {crop.shape for crop in crops}
    if len(shapes) > 1:
        raise InputError(f"the crops of a batch differ in shape ({sorted(shapes)}): crop them to one size")
    height, width, channels = crops[0].shape
    batch = np.empty((len(crops), channels, height, width), np.uint8)
    for place, crop in zip(batch, crops, strict=True):
        place[...] = crop.transpose(2, 0, 1)
    return batch


def _without_far_ends(image: Pixels) -> Pixels:
    """``image`` cut about its middle to at most ``_LONGEST`` times its shorter side."""
    most = min(image.shape[:2]) * _LONGEST
    # An even number of pixels goes, so that the middle stays where it was.
    top, left = (max(extent - most, 0) // 2 for extent in image.shape[:2])
    height, width = image.shape[:2]
    return image[top : height - top, left : width - left]

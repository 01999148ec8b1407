"""The crops that networks are trained and measured on."""

from __future__ import annotations

import io
import math
import os
from collections import Counter
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mgq.data import augmentation
from mgq.data.augmentation import Box, Draw, EvalTransform, Stream, TrainTransform, generator
from mgq.data.decoding import read_image
from mgq.data.jpeg import JpegFacts, decode_reduced_jpeg, jpeg_facts
from mgq.data.pixel_decoders import Pixels
from mgq.data.transforms import eval_crop
from mgq.errors import InputError

RNG = np.random.default_rng(11)
NOISE = RNG.integers(0, 256, (90, 120, 3), np.uint8)


def photo(width: int, height: int) -> Pixels:
    """Something as smooth as a photo, with one bright corner."""
    small = np.random.default_rng(width).integers(0, 256, (height // 120 + 2, width // 120 + 2, 3), np.uint8)
    image = np.asarray(cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC), np.uint8)
    image[: height // 4, : width // 4] = (20, 220, 250)
    return image


def jpeg(path: Path, pixels: Pixels, orientation: int = 1, **options: Any) -> Path:
    exif = Image.Exif()
    if orientation != 1:
        exif[274] = orientation
    Image.fromarray(pixels[..., ::-1]).save(path, "JPEG", quality=92, exif=exif, **options)
    return path


def draws(number: int) -> list[Draw]:
    return [Draw(1, 2, i) for i in range(number)]


# ---- randomness ----


def test_random_numbers_depend_on_all_four_values_and_nothing_else() -> None:
    seeds = (0, 1, 2**63, 2**63 + 1, 2**64 - 1)
    keys = [(seed, stream, a, b) for seed in seeds for stream in Stream for a in (0, 1) for b in (0, 1, 2**40)]
    first = {key: tuple(generator(*key).random(3)) for key in keys}
    assert len(set(first.values())) == len(keys)
    assert {key: tuple(generator(*key).random(3)) for key in reversed(keys)} == first


def test_random_numbers_of_neighbours_do_not_overlap() -> None:
    numbers = [number for i in range(50) for number in generator(3, Stream.CROP, 0, i).random(64).tolist()]
    assert len(set(numbers)) == len(numbers)
    assert abs(np.corrcoef(numbers[:-64], numbers[64:])[0, 1]) < 0.1


def test_a_negative_seed_is_a_seed() -> None:
    assert generator(-1, Stream.CROP).random() != generator(1, Stream.CROP).random()


def test_a_crop_depends_on_seed_epoch_and_number_alone() -> None:
    transform = TrainTransform(32, jitter=0.4)
    first = transform(NOISE, Draw(5, 6, 7))
    transform(NOISE, Draw(5, 6, 8))
    np.random.seed(0)
    assert (transform(NOISE, Draw(5, 6, 7)) == first).all()
    for other in (Draw(4, 6, 7), Draw(5, 5, 7), Draw(5, 6, 8)):
        assert (transform(NOISE, other) != first).any()


# ---- the part that is cut out ----


def boxes(transform: TrainTransform, width: int, height: int, number: int = 400) -> list[Box]:
    return [transform.box(width, height, generator(9, Stream.CROP, 0, i).random(64).tolist()) for i in range(number)]


@settings(deadline=None, max_examples=100)
@given(st.integers(1, 700), st.integers(1, 700), st.integers(0, 1000))
def test_the_part_lies_within_the_image(width: int, height: int, number: int) -> None:
    box = TrainTransform().box(width, height, generator(0, Stream.CROP, 0, number).random(64).tolist())
    assert box.width > 0
    assert box.height > 0
    assert 0 <= box.x <= width - box.width
    assert 0 <= box.y <= height - box.height


def test_shares_and_ratios_fill_their_ranges() -> None:
    found = boxes(TrainTransform(scale=(0.08, 0.5)), 1000, 1000)
    shares = np.array([box.width * box.height / 1e6 for box in found])
    ratios = np.array([math.log(box.width / box.height) for box in found])
    assert 0.079 < shares.min() < 0.11
    assert 0.47 < shares.max() < 0.51
    assert abs(shares.mean() - 0.29) < 0.02
    assert math.log(3 / 4) - 0.01 < ratios.min() < math.log(3 / 4) + 0.03
    assert math.log(4 / 3) - 0.03 < ratios.max() < math.log(4 / 3) + 0.01
    assert abs(ratios.mean()) < 0.03


def test_places_reach_all_edges() -> None:
    found = boxes(TrainTransform(scale=(0.1, 0.3)), 60, 40)
    assert min(box.x for box in found) == min(box.y for box in found) == 0
    assert max(box.x + box.width for box in found) == 60
    assert max(box.y + box.height for box in found) == 40


@pytest.mark.parametrize(
    ("size", "expected"),
    [((1000, 10), Box(493, 0, 13, 10)), ((10, 1000), Box(0, 493, 10, 13)), ((1, 1), Box(0, 0, 1, 1))],
)
def test_a_very_long_image_gives_its_middle(size: tuple[int, int], expected: Box) -> None:
    assert set(boxes(TrainTransform(scale=(0.9, 1.0)), *size, number=20)) == {expected}


def test_the_part_is_resized_as_megengine_does() -> None:
    transform = TrainTransform(40, flip=0.0)
    for draw in draws(5):
        chance = generator(1, Stream.CROP, 2, draw.number).random(64).tolist()
        x, y, width, height = transform.box(120, 90, chance)
        expected = cv2.resize(NOISE[y : y + height, x : x + width], (40, 40), interpolation=cv2.INTER_LINEAR)
        assert (transform(NOISE, draw) == expected).all()


def test_half_of_the_crops_are_mirrored() -> None:
    plain, mirrored, either = (TrainTransform(24, flip=flip) for flip in (0.0, 1.0, 0.5))
    kinds: Counter[str] = Counter()
    for draw in draws(300):
        crop = plain(NOISE, draw)
        assert (mirrored(NOISE, draw) == crop[:, ::-1]).all()
        kinds["plain" if (either(NOISE, draw) == crop).all() else "mirrored"] += 1
    assert 115 < kinds["plain"] < 185


def test_the_image_itself_is_left_as_it_was() -> None:
    before = NOISE.copy()
    for draw in draws(5):
        TrainTransform(90, scale=(1.0, 1.0), ratio=(4 / 3, 4 / 3), jitter=1.0)(NOISE, draw)
    assert (before == NOISE).all()


# ---- colours ----


def by_definition(crop: Pixels, jitter: float, chance: list[float]) -> Pixels:
    """Brightness, contrast and saturation, written out as MegEngine computes them."""
    factors = [1 - jitter + 2 * jitter * c for c in chance[:3]]
    order = augmentation._ORDERS[int(chance[3] * 6)]
    for kind in order:
        pixels = crop.astype(np.float32)
        grey = (pixels @ np.array([0.114, 0.587, 0.299], np.float32))[..., None]
        other = (np.zeros_like(grey), grey.mean(), grey)[kind]
        crop = (pixels * factors[kind] + other * (1 - factors[kind])).clip(0, 255).astype(np.uint8)
    return crop


@pytest.mark.parametrize("image", [NOISE, photo(120, 90)], ids=["noise", "photo"])
def test_colours_change_as_defined_to_three_steps(image: Pixels) -> None:
    for i in range(60):
        chance = generator(2, Stream.CROP, 0, i).random(4).tolist()
        found = augmentation._jitter_colours(image, 0.4, chance).astype(int)
        difference = np.abs(found - by_definition(image, 0.4, chance))
        assert difference.max() <= 3
        assert difference.mean() < 0.25


def test_colours_change_as_in_megengine(monkeypatch: pytest.MonkeyPatch) -> None:
    from megengine.data.transform import vision

    for i, name in enumerate(("BrightnessTransform", "ContrastTransform", "SaturationTransform")):
        for factor in (0.6, 0.83, 1.0, 1.27, 1.4):
            monkeypatch.setattr(np.random, "uniform", lambda low, high, factor=factor: factor)
            theirs = getattr(vision, name)(0.4).apply(NOISE.copy())
            ours = (augmentation._change_brightness, augmentation._change_contrast, augmentation._change_saturation)[i](
                NOISE, factor
            )
            assert np.abs(ours.astype(int) - theirs).max() <= 1


def test_all_orders_and_all_factors_are_drawn() -> None:
    flat = np.full((8, 8, 3), (100, 100, 100), np.uint8)
    transform = TrainTransform(8, jitter=0.4)
    values = np.array([transform(flat, draw)[0, 0, 0] for draw in draws(500)])
    assert 59 <= values.min() <= 62
    assert 138 <= values.max() <= 140
    assert abs(values.mean() - 99.5) < 3
    assert len(set(augmentation._ORDERS)) == 6


def test_no_jitter_leaves_colours() -> None:
    flat = np.full((8, 8, 3), (10, 100, 200), np.uint8)
    assert (TrainTransform(8)(flat, Draw()) == flat).all()


# ---- files ----


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".gif", ".bmp", ".tif"])
def test_a_file_gives_the_crop_of_its_pixels(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"picture{suffix}"
    Image.fromarray(photo(120, 90)[..., ::-1]).save(path)
    transform = TrainTransform(64)
    for draw in draws(3):
        assert (transform(path, draw) == transform(read_image(path), draw)).all()
    assert (EvalTransform(64)(path, Draw()) == eval_crop(read_image(path), 64)).all()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("options", [{}, {"progressive": True}], ids=["baseline", "progressive"])
def test_a_large_jpeg_gives_nearly_the_same_crop(tmp_path: Path, orientation: int, options: dict[str, bool]) -> None:
    path = jpeg(tmp_path / "large.jpg", photo(808, 600), orientation, **options)
    transform = TrainTransform(48)
    whole = read_image(path)
    for draw in draws(6):
        difference = np.abs(transform(path, draw).astype(int) - transform(whole, draw))
        assert difference.mean() < 8
        assert np.median(difference) <= 4


@pytest.fixture
def reductions(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """By how much each JPEG was reduced, where the decoder did it."""
    found: list[int] = []

    def noted(data: bytes, facts: JpegFacts, by: int) -> Pixels | None:
        pixels = decode_reduced_jpeg(data, facts, by)
        found.extend([] if pixels is None else [by])
        return pixels

    monkeypatch.setattr(augmentation, "decode_reduced_jpeg", noted)
    return found


def test_a_part_is_never_decoded_smaller_than_the_crop(tmp_path: Path, reductions: list[int]) -> None:
    path = jpeg(tmp_path / "large.jpg", photo(700, 600))
    transform = TrainTransform(50)
    for draw in draws(60):
        box = transform.box(700, 600, generator(1, Stream.CROP, 2, draw.number).random(64).tolist())
        reductions.clear()
        transform(path, draw)
        (by,) = reductions or [1]
        assert min(box.width, box.height) // by >= 50 or by == 1
        assert by == 8 or min(box.width, box.height) < 2 * by * 50


def test_evaluation_decodes_in_full(tmp_path: Path, reductions: list[int]) -> None:
    path = jpeg(tmp_path / "large.jpg", photo(700, 600))
    assert (EvalTransform(32)(path, Draw()) == eval_crop(read_image(path), 32)).all()
    assert reductions == []


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_other_jpegs_give_the_crop_too(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "large.jpg"
    Image.fromarray(photo(600, 500)[..., ::-1]).convert(mode).save(path, quality=92)
    transform = TrainTransform(32)
    for draw in draws(4):
        difference = np.abs(transform(path, draw).astype(int) - transform(read_image(path), draw))
        assert difference.mean() < 5


LARGE = io.BytesIO()
Image.fromarray(photo(640, 480)[..., ::-1]).save(LARGE, "JPEG", quality=85)


@pytest.mark.parametrize("transform", [TrainTransform(16), EvalTransform(16)])
@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (LARGE.getvalue()[:-100], "is cut short"),
        (LARGE.getvalue()[:300] + b"\xff\xd9", "is (cut short|damaged)"),
        (b"\xff\xd8\xff\xd9", "is damaged"),
        (b"", "is empty"),
        (b"hello", "is not a picture"),
    ],
    ids=["cut", "cut within the header", "no picture", "empty", "text"],
)
def test_a_broken_file_is_refused_by_name(
    tmp_path: Path, transform: TrainTransform | EvalTransform, content: bytes, expected: str
) -> None:
    path = tmp_path / "broken.jpg"
    path.write_bytes(content)
    with pytest.raises(InputError, match=rf"broken\.jpg {expected}"):
        transform(path, Draw())


@pytest.mark.parametrize("transform", [TrainTransform(16), EvalTransform(16)])
def test_what_is_no_file_is_refused_by_name(tmp_path: Path, transform: TrainTransform | EvalTransform) -> None:
    with pytest.raises(InputError, match=r"gone\.jpg does not exist"):
        transform(tmp_path / "gone.jpg", Draw())
    (tmp_path / "folder.jpg").mkdir()
    with pytest.raises(InputError, match=r"folder\.jpg is a folder"):
        transform(tmp_path / "folder.jpg", Draw())


def test_a_file_too_large_to_read_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "large.jpg"
    path.touch()
    os.truncate(path, 10**12)
    with pytest.raises(InputError, match=r"large\.jpg is larger than"):
        TrainTransform(16)(path, Draw())


@settings(deadline=None, max_examples=80)
@given(st.data())
def test_damage_ends_in_pixels_or_a_refusal(data: st.DataObject) -> None:
    damaged = bytearray(LARGE.getvalue())
    for _ in range(data.draw(st.integers(1, 3))):
        damaged[data.draw(st.integers(0, 700))] = data.draw(st.integers(0, 255))
    facts = jpeg_facts(bytes(damaged))
    if facts is not None:
        pixels = decode_reduced_jpeg(bytes(damaged), facts, 8)
        assert pixels is None or pixels.shape[:2] == tuple(-(-side // 8) for side in facts.upright[::-1])


def test_what_read_image_refuses_is_not_decoded_smaller_either(tmp_path: Path, reductions: list[int]) -> None:
    data = jpeg(tmp_path / "many.jpg", photo(808, 600), progressive=True).read_bytes()
    scan = data.index(b"\xff\xda")
    (tmp_path / "many.jpg").write_bytes(data[:scan] + data[scan:-2] * 100 + data[-2:])
    with pytest.raises(InputError, match="passes to decode"):
        TrainTransform(48)(tmp_path / "many.jpg", Draw())
    assert reductions == []


# ---- values that cannot be ----


@pytest.mark.parametrize(
    "values",
    [
        {"size": 0},
        {"scale": (0.0, 1.0)},
        {"scale": (0.5, 0.2)},
        {"scale": (0.5, 1.5)},
        {"ratio": (0.0, 1.0)},
        {"ratio": (2.0, 1.0)},
        {"flip": 1.1},
        {"jitter": -0.1},
        {"jitter": 1.1},
    ],
    ids=str,
)
def test_values_that_cannot_be_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=str(next(iter(values.values()))).replace("(", r"\(").replace(")", r"\)")):
        TrainTransform(**values)


@pytest.mark.parametrize("values", [{"size": 0}, {"size": 224, "resize": 100}], ids=str)
def test_values_that_no_evaluation_has_are_refused_at_once(values: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=str(list(values.values())[-1])):
        EvalTransform(**values)

"""Reading pictures, cropping them and stacking them."""

from __future__ import annotations

import io
import os
import struct
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.ImageFile import ImageFile

from mgq.data import decoding
from mgq.data.decoding import bundled_cat, read_image
from mgq.data.image_limits import MAX_BYTES, MAX_PIXELS, MAX_SIDE
from mgq.data.transforms import eval_crop, to_batch
from mgq.errors import InputError, printable
from tests.fakes.places import ROOT

Pixels = npt.NDArray[np.uint8]


def scene(height: int = 48, width: int = 64) -> Pixels:
    """A smooth RGB picture without any symmetry, so that every flip and turn shows."""
    rows, columns = np.mgrid[0:height, 0:width]
    red = 250.0 * columns / width
    green = 250.0 * rows / height
    blue = 128 + 60 * np.sin(columns / 9) + 40 * np.cos(rows / 7)
    image: Pixels = np.stack([red, green, blue], axis=-1).astype(np.uint8)
    return image


def encoded(source: Pixels | Image.Image, kind: str, **options: Any) -> bytes:
    image = source if isinstance(source, Image.Image) else Image.fromarray(source)
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


FAITHFUL: dict[str, dict[str, Any]] = {"JPEG": {"quality": 98, "subsampling": 0}, "WEBP": {"lossless": True}}
"""What makes an encoder change as little as it can."""


def rgb(data: bytes) -> npt.NDArray[np.int64]:
    """What was read, in RGB order and signed so that differences do not wrap."""
    pixels = read_image(data)
    assert pixels.dtype == np.uint8
    assert pixels.flags.c_contiguous
    return pixels[:, :, ::-1].astype(np.int64)


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width: int, height: int, depth: int, colour: int, rows: bytes, *extra: bytes) -> bytes:
    """A PNG from its raw rows (each begins with its filter byte), with further chunks before the data."""
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    tail = png_chunk(b"IDAT", zlib.compress(rows)) + png_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(extra) + tail


def exif_of(orientation: int, order: str = "<") -> bytes:
    mark = b"II*\0" if order == "<" else b"MM\0*"
    return mark + struct.pack(f"{order}IHHHIHHI", 8, 1, 0x0112, 3, 1, orientation, 0, 0)


# ---- what is read ----


@pytest.mark.parametrize(
    ("kind", "options", "tolerance"),
    [
        ("JPEG", {"quality": 95, "subsampling": 0}, 2.0),
        ("JPEG", {"quality": 95, "subsampling": 0, "progressive": True}, 2.0),
        ("JPEG", {"quality": 95, "keep_rgb": True}, 2.0),
        ("PNG", {}, 0.0),
        ("WEBP", {"lossless": True}, 0.0),
        ("WEBP", {"quality": 95}, 4.0),
        ("BMP", {}, 0.0),
        ("TIFF", {}, 0.0),
        ("TIFF", {"compression": "tiff_lzw"}, 0.0),
        ("GIF", {}, 12.0),
        ("PPM", {}, 0.0),
        ("JPEG2000", {}, 0.0),
        ("JPEG2000", {"no_jp2": True, "tile_size": (32, 32)}, 0.0),
        ("JPEG2000", {"irreversible": True, "quality_mode": "dB", "quality_layers": [45]}, 2.0),
        ("AVIF", {"quality": 95}, 2.0),
        ("AVIF", {"quality": 95, "subsampling": "4:4:4"}, 2.0),
        ("TGA", {}, 0.0),
        ("TGA", {"compression": "tga_rle"}, 0.0),
        ("PCX", {}, 0.0),
        ("SGI", {}, 0.0),
        ("QOI", {}, 0.0),
    ],
)
def test_each_format_gives_the_image_in_bgr_order(kind: str, options: dict[str, Any], tolerance: float) -> None:
    assert np.abs(rgb(encoded(scene(), kind, **options)) - scene()).mean() <= tolerance


def test_a_jpeg_gives_the_very_pixels_of_opencv() -> None:
    data = encoded(scene(), "JPEG")
    np.testing.assert_array_equal(read_image(data), cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR))


def test_a_path_is_read_whatever_its_suffix(tmp_path: Path) -> None:
    path = tmp_path / "picture.txt"
    path.write_bytes(encoded(scene(), "PNG"))
    np.testing.assert_array_equal(read_image(path)[:, :, ::-1], scene())


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP", "BMP", "PPM", "JPEG2000", "TGA", "PCX", "SGI"])
def test_grey_becomes_three_equal_channels(kind: str) -> None:
    read = rgb(encoded(np.ascontiguousarray(scene()[:, :, 0]), kind, **FAITHFUL.get(kind, {})))
    assert np.abs(read - scene()[:, :, :1]).max() <= 2


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "BMP", "GIF", "PPM", "PCX"])
def test_one_bit_becomes_black_and_white(kind: str) -> None:
    bits = scene()[:, :, 0] > 100
    read = rgb(encoded(Image.fromarray(bits), kind))
    np.testing.assert_array_equal(read, np.repeat(bits[:, :, None] * 255, 3, axis=2))


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM", "JPEG2000"])
def test_sixteen_bit_grey_is_scaled_not_clipped(kind: str) -> None:
    wide = scene()[:, :, 0].astype(np.uint16) * 257
    np.testing.assert_array_equal(rgb(encoded(Image.fromarray(wide), kind))[:, :, 0], scene()[:, :, 0])


@pytest.mark.parametrize("suffix", [".png", ".tiff", ".ppm"])
def test_sixteen_bit_colour_is_scaled_not_clipped(suffix: str) -> None:
    wide = scene()[:, :, ::-1].astype(np.uint16) * 257
    np.testing.assert_array_equal(rgb(cv2.imencode(suffix, wide)[1].tobytes()), scene())


def inks(image: Pixels) -> Pixels:
    """The picture in cyan, magenta, yellow and black, half of the common grey being printed with black."""
    black = (255 - image).min(axis=2, keepdims=True) // 2
    colours = (255 - image.astype(np.int64) - black) * 255 // (255 - black)
    return np.dstack([colours.clip(0, 255).astype(np.uint8), black])


def test_cmyk_jpeg_is_close_to_the_colours_it_was_made_from() -> None:
    data = encoded(Image.fromarray(inks(scene()), "CMYK"), "JPEG", quality=98)
    assert b"Adobe" in data  # Its form of CMYK, which is the one in use, holds the inks inverted.
    assert np.abs(rgb(data) - scene()).mean() < 3
    in_pillow = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(np.int64)
    assert np.abs(rgb(data) - in_pillow).max() <= 3


def test_ycck_jpeg_is_close_to_the_colours_it_was_made_from() -> None:
    ink = inks(scene())
    ycc = np.asarray(Image.fromarray(np.ascontiguousarray(ink[:, :, :3])).convert("YCbCr"))
    # Pillow inverts what it writes as CMYK; the transform 2 in Adobe's marker calls the same samples YCCK.
    data = bytearray(encoded(Image.fromarray(np.dstack([255 - ycc, ink[:, :, 3:]]), "CMYK"), "JPEG", quality=98))
    transform = data.index(b"Adobe") + 11
    assert data[transform] == 0
    data[transform] = 2
    assert np.abs(rgb(bytes(data)) - scene()).mean() < 3


def test_a_bmp_may_hold_its_rows_from_the_top() -> None:
    assert (rgb(with_bmp_size(64, -48)) == scene()[::-1]).all()


def test_a_bmp_may_have_the_header_of_os2() -> None:
    rows = bytes([3, 2, 1, 0]) + bytes([6, 5, 4, 0])
    data = b"BM" + struct.pack("<IHHI", 34, 0, 0, 26) + struct.pack("<IHHHH", 12, 1, 2, 1, 24) + rows
    assert rgb(data).tolist() == [[[4, 5, 6]], [[1, 2, 3]]]


def test_the_first_frame_of_an_animation_is_read() -> None:
    first, second = Image.fromarray(scene()), Image.fromarray(255 - scene())
    for kind, options in (("GIF", {}), ("WEBP", {"lossless": True}), ("PNG", {}), ("TIFF", {})):
        data = encoded(first, kind, save_all=True, append_images=[second], **options)
        assert np.abs(rgb(data) - scene()).mean() < 12, kind


# ---- Netpbm ----


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"P1\n# a comment\n2 2\n10\n0 1", [[0, 255], [255, 0]]),
        (b"P4 2 2\n\x80\x40", [[0, 255], [255, 0]]),
        (b"P2 2 1 # most\n15\n0 15", [[0, 255]]),
        (b"P2\n2 1\n65535\n0 32896 # and more", [[0, 128]]),
        (b"P5 2 1 1\n\0\1", [[0, 255]]),
        (b"P5\n2 1\n1023\n\x02\0\x03\xff", [[128, 255]]),
    ],
)
def test_grey_netpbm_of_any_depth_uses_the_whole_range(data: bytes, expected: list[list[int]]) -> None:
    assert rgb(data)[:, :, 0].tolist() == expected


def test_words_and_bytes_of_netpbm_give_the_same_colours() -> None:
    pixels = scene(6, 5)
    plain = b"P3 5 6 255\n" + " ".join(map(str, pixels.ravel())).encode() + b"\n"
    header = b"P7\nWIDTH 5\nHEIGHT 6\nDEPTH 3\nMAXVAL 255\nTUPLTYPE RGB\nENDHDR\n"
    for data in (plain, encoded(pixels, "PPM"), header + pixels.tobytes()):
        np.testing.assert_array_equal(rgb(data), pixels)


def test_a_pam_with_alpha_is_laid_on_white() -> None:
    header = b"P7\nWIDTH 2\nHEIGHT 1\nDEPTH 2\nMAXVAL 255\nTUPLTYPE GRAYSCALE_ALPHA\nENDHDR\n"
    assert rgb(header + b"\x0a\xff\x0a\0").tolist() == [[[10] * 3, [255] * 3]]


@pytest.mark.parametrize(
    "data", [b"P2 2 1 255 1 x", b"P2 2 1 255 1", b"P1 2 1 12", b"P5 2 1 0\n\0\0", b"P3 1 1 255 1 -2 3"]
)
def test_netpbm_of_what_is_no_sample_is_refused(data: bytes) -> None:
    refusal(data)


def test_a_tga_without_alpha_bits_is_opaque_whatever_its_fourth_byte() -> None:
    data = bytearray(encoded(np.dstack([scene(), np.zeros((48, 64), np.uint8)]), "TGA"))
    data[17] &= 0xF0
    np.testing.assert_array_equal(rgb(bytes(data)), scene())


# ---- transparency ----


def veiled() -> Pixels:
    """The scene behind an alpha that falls from opaque to nothing."""
    alpha = np.linspace(255, 0, 64).astype(np.uint8)
    return np.dstack([scene(), np.broadcast_to(alpha, (48, 64))])


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF", "JPEG2000", "TGA", "QOI", "SGI"])
def test_transparent_pixels_are_laid_on_white(kind: str) -> None:
    image = veiled()
    alpha = image[:, :, 3:] / 255
    expected = image[:, :, :3] * alpha + 255 * (1 - alpha)
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    assert np.abs(rgb(encoded(image, kind, **options)) - expected).max() <= 1


def test_transparent_pixels_of_a_tall_image_are_laid_on_white_in_every_band() -> None:
    tall = np.full((700, 3, 4), 9, np.uint8)
    tall[:, :, 3] = 0
    assert (rgb(encoded(tall, "PNG")) == 255).all()


def test_grey_with_alpha_is_laid_on_white() -> None:
    image = np.array([[[10, 255], [10, 0], [10, 128]]], np.uint8)
    assert rgb(encoded(Image.fromarray(image, "LA"), "PNG"))[0, :, 0].tolist() == [10, 255, 132]


def test_sixteen_bit_alpha_is_laid_on_white() -> None:
    samples = struct.pack(">8H", 0x0A0A, 0x1414, 0x1E1E, 0xFFFF, 0x0A0A, 0x1414, 0x1E1E, 0)
    assert rgb(png(2, 1, 16, 6, b"\0" + samples)).tolist() == [[[10, 20, 30], [255, 255, 255]]]


def test_a_transparent_palette_entry_becomes_white() -> None:
    palette = png_chunk(b"PLTE", bytes([10, 20, 30, 40, 50, 60]))
    hole = png_chunk(b"tRNS", b"\0")
    assert rgb(png(2, 1, 8, 3, b"\0\0\1", palette, hole)).tolist() == [[[255, 255, 255], [40, 50, 60]]]


def test_a_transparent_gif_colour_becomes_white() -> None:
    indices = Image.fromarray(np.array([[0, 1]], np.uint8), "P")
    indices.putpalette([10, 20, 30, 40, 50, 60])
    assert rgb(encoded(indices, "GIF", transparency=0)).tolist() == [[[255, 255, 255], [40, 50, 60]]]


@pytest.mark.parametrize(
    ("depth", "row", "hole", "expected"),
    [
        (8, b"\x0a\x0b", 0x0A, [255, 11]),
        (16, b"\x0a\x0a\x0a\x0b", 0x0A0A, [255, 10]),
        (4, b"\x37", 3, [255, 0x77]),
        (1, b"\x40", 0, [255, 255]),
        (1, b"\x40", 1, [0, 255]),
    ],
)
def test_a_transparent_grey_of_a_png_becomes_white(depth: int, row: bytes, hole: int, expected: list[int]) -> None:
    data = png(2, 1, depth, 0, b"\0" + row, png_chunk(b"tRNS", struct.pack(">H", hole)))
    assert rgb(data)[0, :, 1].tolist() == expected


def test_a_transparent_colour_of_a_png_becomes_white() -> None:
    hole = png_chunk(b"tRNS", struct.pack(">HHH", 1, 2, 3))
    assert rgb(png(2, 1, 8, 2, b"\0\1\2\3\4\5\6", hole)).tolist() == [[[255, 255, 255], [4, 5, 6]]]


# ---- orientation ----

# How each orientation stores an upright picture: the inverse of what a reader must do (Exif 2.32, 4.6.4).
STORED: dict[int, Callable[[Pixels], Pixels]] = {
    1: lambda upright: upright,
    2: np.fliplr,
    3: lambda upright: np.rot90(upright, 2),
    4: np.flipud,
    5: lambda upright: upright.swapaxes(0, 1),
    6: lambda upright: np.rot90(upright, 1),
    7: lambda upright: np.rot90(upright, 2).swapaxes(0, 1),
    8: lambda upright: np.rot90(upright, -1),
}


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
def test_each_exif_orientation_is_turned_upright_once(kind: str, orientation: int) -> None:
    stored = np.ascontiguousarray(STORED[orientation](scene()))
    exif = Image.Exif()
    exif[0x0112] = orientation
    read = rgb(encoded(stored, kind, exif=exif, **FAITHFUL.get(kind, {})))
    assert read.shape == scene().shape
    assert np.abs(read - scene()).mean() < 1.5


def test_orientation_is_found_in_either_byte_order() -> None:
    for order in "<>":
        data = encoded(scene(), "JPEG", exif=b"Exif\0\0" + exif_of(6, order))
        assert read_image(data).shape == (64, 48, 3)


def test_orientation_is_found_in_a_webp_whose_exif_begins_as_in_a_jpeg() -> None:
    data = encoded(scene(), "WEBP", lossless=True, exif=exif_of(6))
    at = data.index(b"EXIF")
    block = b"Exif\0\0" + exif_of(6)
    body = data[8:at] + b"EXIF" + struct.pack("<I", len(block)) + block
    assert read_image(b"RIFF" + struct.pack("<I", len(body)) + body).shape == (64, 48, 3)


def test_a_cmyk_jpeg_is_turned_too() -> None:
    data = encoded(Image.fromarray(scene()).convert("CMYK"), "JPEG", exif=b"Exif\0\0" + exif_of(8))
    assert read_image(data).shape == (64, 48, 3)


FAR = struct.pack("<2sHIHHHIII", b"II", 42, 8, 1, 274, 3, 3, 1000, 0)
"""EXIF with three orientations at a place behind its end."""


@pytest.mark.parametrize("exif", [b"", b"II*\0", b"\xff" * 40, exif_of(0), exif_of(9), exif_of(6)[:-8], FAR])
def test_malformed_exif_leaves_the_image_as_it_is(exif: bytes, recwarn: pytest.WarningsRecorder) -> None:
    assert read_image(encoded(scene(), "JPEG", exif=b"Exif\0\0" + exif)).shape == (48, 64, 3)
    assert not recwarn.list


# ---- what is refused ----


def refusal(source: Path | bytes, name: str | None = None) -> str:
    with pytest.raises(InputError) as caught:
        read_image(source, name)
    message = str(caught.value)
    assert "\n" not in message
    assert ": " in message  # What is wrong, then how to mend it.
    return message


SAMPLES = {
    "baseline JPEG": encoded(scene(), "JPEG"),
    "progressive JPEG": encoded(scene(), "JPEG", progressive=True),
    "JPEG with a thumbnail": encoded(scene(), "JPEG", exif=b"Exif\0\0" + exif_of(1) + encoded(scene(12, 16), "JPEG")),
    "CMYK JPEG": encoded(Image.fromarray(scene()).convert("CMYK"), "JPEG"),
    "PNG": encoded(scene(), "PNG"),
    "GIF": encoded(scene(), "GIF"),
    "BMP": encoded(scene(), "BMP"),
    "WebP": encoded(scene(), "WEBP"),
    "lossless WebP": encoded(scene(), "WEBP", lossless=True),
    "animated WebP": encoded(scene(), "WEBP", save_all=True, append_images=[Image.fromarray(255 - scene())]),
    "TIFF": encoded(scene(), "TIFF"),
    "packed TIFF": encoded(scene(), "TIFF", compression="tiff_lzw"),
    "PPM": encoded(scene(), "PPM"),
    "JPEG 2000": encoded(scene(), "JPEG2000"),
    "JPEG 2000 without boxes": encoded(scene(), "JPEG2000", no_jp2=True, tile_size=(32, 32)),
    "AVIF": encoded(scene(), "AVIF"),
    "TGA": encoded(scene(), "TGA").removesuffix(b"\0" * 8 + b"TRUEVISION-XFILE.\0"),
    "PCX": encoded(Image.fromarray(scene()).convert("P"), "PCX"),
    "SGI": encoded(scene(), "SGI"),
    "QOI": encoded(scene(), "QOI"),
}


@pytest.mark.parametrize("sample", SAMPLES)
def test_a_truncated_image_is_refused_and_never_half_read(
    sample: str, capfd: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    data = SAMPLES[sample]
    whole = read_image(data)
    for length in sorted({2, 9, 20, 30, len(data) - 40, *range(40, len(data) - 3, len(data) // 25)}):
        assert refusal(data[:length], "cut.jpg").startswith("cut.jpg is ")
    try:
        np.testing.assert_array_equal(read_image(data[:-1]), whole)  # Padding, at the most, was lost.
    except InputError as error:
        assert "cut short" in str(error)
    assert not recwarn.list
    assert capfd.readouterr().err == ""


def test_truncation_is_called_by_its_name() -> None:
    for sample in ("baseline JPEG", "PNG", "WebP", "TIFF", "PPM", "AVIF", "JPEG 2000"):
        data = SAMPLES[sample]
        assert refusal(data[: len(data) * 3 // 4], "a.jpg") == ("a.jpg is cut short: copy or download it again")


@pytest.mark.parametrize("sample", ["baseline JPEG", "PNG", "GIF", "BMP", "WebP", "TIFF", "PPM", "TGA", "SGI"])
def test_bytes_after_the_end_are_ignored(sample: str) -> None:
    data = SAMPLES[sample]
    np.testing.assert_array_equal(read_image(data + b"\xff\xd8more" * 9), read_image(data))


def test_a_damaged_png_is_refused_by_its_checksum(capfd: pytest.CaptureFixture[str]) -> None:
    data = bytearray(SAMPLES["PNG"])
    data[len(data) // 2] ^= 1
    assert "is damaged" in refusal(bytes(data))
    assert capfd.readouterr().err == ""


def test_a_png_without_all_its_rows_is_refused() -> None:
    assert "is damaged" in refusal(png(40, 40, 8, 2, b"\0" * 121 * 20))


def test_a_png_without_its_palette_is_refused(capfd: pytest.CaptureFixture[str]) -> None:
    assert "is damaged" in refusal(png(2, 1, 8, 3, b"\0\0\1"))
    assert capfd.readouterr().err == ""


def test_chunks_that_libpng_complains_of_are_silent(capfd: pytest.CaptureFixture[str]) -> None:
    broken = png_chunk(b"iCCP", b"x\0\0" + zlib.compress(b"not a profile" * 20)) + png_chunk(b"gAMA", b"\0")
    assert rgb(png(1, 1, 8, 2, b"\0\1\2\3", broken)).tolist() == [[[1, 2, 3]]]
    assert capfd.readouterr().err == ""


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_damage_gives_an_image_or_one_line(data: st.DataObject) -> None:
    sample = bytearray(SAMPLES[data.draw(st.sampled_from(sorted(SAMPLES)))])
    for _ in range(data.draw(st.integers(1, 5))):
        sample[data.draw(st.integers(0, len(sample) - 1))] = data.draw(st.integers(0, 255))
    try:
        pixels = read_image(bytes(sample))
    except InputError as error:
        assert "\n" not in str(error)
    else:
        assert pixels.ndim == 3
        assert pixels.dtype == np.uint8


def with_jpeg_size(width: int, height: int) -> bytes:
    data = bytearray(SAMPLES["baseline JPEG"])
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = struct.pack(">HH", height, width)
    return bytes(data)


def with_bmp_size(width: int, height: int) -> bytes:
    data = bytearray(SAMPLES["BMP"])
    data[18:26] = struct.pack("<ii", width, height)
    return bytes(data)


def with_gif_size(width: int, height: int) -> bytes:
    data = bytearray(SAMPLES["GIF"])
    data[6:10] = struct.pack("<HH", width, height)
    return bytes(data)


def with_webp_size(width: int, height: int) -> bytes:
    body = b"\0" * 4 + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    chunk = b"VP8X" + struct.pack("<I", len(body)) + body
    return b"RIFF" + struct.pack("<I", 4 + len(chunk)) + b"WEBP" + chunk


def with_tiff_size(width: int, height: int) -> bytes:
    fields = [(256, width), (257, height), (273, 8), (279, 1)]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in fields)
    return b"II*\0" + struct.pack("<IH", 8, len(fields)) + entries + struct.pack("<I", 0)


def with_avif_size(width: int, height: int) -> bytes:
    data = bytearray(SAMPLES["AVIF"])
    at = data.index(b"ispe") + 8
    data[at : at + 8] = struct.pack(">II", width, height)
    return bytes(data)


def with_jpeg_2000_size(width: int, height: int) -> bytes:
    data = bytearray(SAMPLES["JPEG 2000"])
    at = data.index(b"\xff\x51") + 6
    data[at : at + 8] = struct.pack(">II", width, height)
    data[at + 16 : at + 24] = struct.pack(">II", max(1, width), max(1, height))  # in one tile
    return bytes(data)


def with_numbers(sample: str, form: str, at: int) -> Callable[[int, int], bytes]:
    """Makes of a sample one with other numbers in its header."""

    def made(width: int, height: int) -> bytes:
        data = bytearray(SAMPLES[sample])
        struct.pack_into(form, data, at, width, height)
        return bytes(data)

    return made


LIARS = {
    "PPM": lambda width, height: b"P6\n%d %d\n255\n" % (width, height),
    "plain PGM": lambda width, height: b"P2 %d %d 255 1 2 3" % (width, height),
    "PAM": lambda width, height: b"P7\nWIDTH %d\nHEIGHT %d\nDEPTH 4\nMAXVAL 255\nENDHDR\n" % (width, height),
    "AVIF": with_avif_size,
    "JPEG 2000": with_jpeg_2000_size,
    "TGA": with_numbers("TGA", "<HH", 12),
    "PCX": lambda width, height: with_numbers("PCX", "<HH", 8)(width - 1, height - 1),
    "SGI": with_numbers("SGI", ">HH", 6),
    "QOI": with_numbers("QOI", ">II", 4),
    "JPEG": with_jpeg_size,
    "PNG": lambda width, height: png(width, height, 8, 2, b"\0"),
    "WebP": with_webp_size,
    "GIF": with_gif_size,
    "BMP": with_bmp_size,
    "TIFF": with_tiff_size,
}


@pytest.mark.parametrize("kind", LIARS)
def test_a_header_that_claims_an_enormous_size_is_refused_without_memory(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = LIARS[kind](50_000, 50_000)
    monkeypatch.setattr(cv2, "imdecode", None)  # No decoder may see it: their memory is hidden from Python.
    monkeypatch.setattr(ImageFile, "load", None)
    tracemalloc.start()
    message = refusal(data, "big.jpg")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "50,000 pixels wide" in message
    assert f"{MAX_SIDE:,}" in message
    assert peak < 1_000_000


def test_an_image_60000_pixels_wide_is_refused_with_its_width_and_the_limit() -> None:
    assert refusal(encoded(np.zeros((2, 60_000, 3), np.uint8), "PNG"), "wide.png") == (
        "wide.png is 60,000 pixels wide, and at most 20,000 on a side are read: scale it down"
    )


def test_an_image_too_high_is_refused_with_its_height() -> None:
    assert "20,001 pixels high" in refusal(encoded(np.zeros((20_001, 1), np.uint8), "BMP"))


def test_an_image_of_the_longest_side_is_read() -> None:
    assert read_image(encoded(np.zeros((1, MAX_SIDE), np.uint8), "PNG")).shape == (1, MAX_SIDE, 3)


def test_too_many_pixels_are_refused_and_just_enough_pass_the_header(monkeypatch: pytest.MonkeyPatch) -> None:
    assert f"{MAX_PIXELS:,}" in refusal(png(10_001, 10_000, 8, 2, b"\0"))
    monkeypatch.setattr(decoding, "decode_by_opencv", lambda *_: np.zeros((1, 1, 3), np.uint8))
    assert read_image(png(10_000, 10_000, 8, 2, b"\0")).shape == (1, 1, 3)


def test_a_size_of_nothing_is_refused() -> None:
    for kind in ("JPEG", "PNG", "GIF", "BMP", "TIFF"):
        assert "is damaged" in refusal(LIARS[kind](0, 5)), kind


@pytest.mark.parametrize("sample", ["WebP", "lossless WebP"])
def test_a_webp_of_the_largest_size_it_can_claim_is_refused(sample: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = bytearray(SAMPLES[sample])
    if sample == "WebP":
        data[26:30] = struct.pack("<HH", 16_383, 16_383)
    else:
        data[21:25] = struct.pack("<I", 16_382 | 16_382 << 14)
    monkeypatch.setattr(decoding, "decode_by_pillow", None)
    assert "is 16,383 x 16,383 pixels" in refusal(bytes(data))


@pytest.mark.parametrize(("width", "words"), [(65_000, "is damaged"), (25_000, "is 25,000 pixels wide")])
def test_a_gif_frame_larger_than_its_canvas_is_refused_without_a_word(
    width: int, words: str, recwarn: pytest.WarningsRecorder
) -> None:
    data = bytearray(with_gif_size(4, 4))
    frame = data.index(b",\0\0\0\0")
    data[frame + 5 : frame + 9] = struct.pack("<HH", width, width - 24_990)
    assert words in refusal(bytes(data))
    assert not recwarn.list


def test_a_file_of_too_many_bytes_is_refused_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "heavy.jpg"
    path.write_bytes(SAMPLES["PNG"])
    os.truncate(path, MAX_BYTES + 1)  # Sparse: it takes no room on the disk.
    monkeypatch.setattr(decoding, "_pixels", None)
    assert "heavy.jpg is larger than 200 MB" in refusal(path)


def test_bytes_beyond_the_limit_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "MAX_BYTES", 100)
    assert "is larger than" in refusal(SAMPLES["PNG"])


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "none.jpg"
    assert refusal(path) == f"{path} does not exist: check the path"


def test_a_folder_is_named_as_one(tmp_path: Path) -> None:
    assert refusal(tmp_path) == f"{tmp_path} is a folder, not a picture: name a picture in it"


def test_a_file_in_place_of_a_folder_is_told(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"x")
    assert "Not a directory" in refusal(tmp_path / "a.jpg" / "b.jpg")


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "empty.jpg"
    path.touch()
    assert refusal(path) == f"{path} is empty (0 bytes): copy or download it again"


@pytest.mark.parametrize("text", [b"hello, this is no picture", b"BM and so on, in words, for a while", b"\0" * 99])
def test_a_text_named_jpg_is_refused_with_the_formats_that_are_read(tmp_path: Path, text: bytes) -> None:
    path = tmp_path / "text.jpg"
    path.write_bytes(text)
    message = refusal(path)
    assert message.startswith(f"{path} is not a picture that can be read")
    for kind in ("JPEG", "PNG", "WebP", "GIF", "BMP", "TIFF", "AVIF", "JPEG 2000", "PPM", "TGA"):
        assert kind in message


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(99), "is a HEIF picture, which is not read: save it as JPEG"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git lfs pull"),
        (b"\n<!DOCTYPE html><html><head><title>404</title>", "is a web page"),
        (b"<?xml version='1.0'?><svg xmlns='http://www.w3.org/2000/svg'/>", "is a drawing"),
        (b"%PDF-1.7\n", "is a drawing"),
    ],
)
def test_what_people_have_in_an_images_place_is_named(data: bytes, words: str) -> None:
    assert words in refusal(data)


def test_a_file_without_permission_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*_: object) -> None:
        raise PermissionError(13, "Permission denied")  # Root, who may run the tests, is denied nothing.

    monkeypatch.setattr(Path, "open", denied)
    assert "cannot be read (Permission denied)" in refusal(tmp_path / "secret.jpg")


def test_samples_that_have_no_8_bit_meaning_are_refused() -> None:
    assert "samples of a kind" in refusal(encoded(Image.fromarray(np.ones((2, 2), np.float32)), "TIFF"))


def test_a_jpeg_of_12_bits_is_refused_as_such() -> None:
    data = bytearray(SAMPLES["baseline JPEG"])
    data[data.index(b"\xff\xc0") + 4] = 12
    assert "has 12 bits a sample" in refusal(bytes(data))


def test_a_strange_name_stays_in_one_line() -> None:
    assert refusal(b"", "a\nb\x1b[31m\udcff\u2028.jpg").startswith(r"a\nb\x1b[31m\udcff\u2028.jpg is empty")


def test_printable_leaves_words_of_any_language_alone() -> None:
    assert printable("кошка 猫 chatte é.jpg") == "кошка 猫 chatte é.jpg"


def test_the_bundled_cat_is_an_image_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert read_image(bundled_cat()).shape == (300, 451, 3)


def test_the_cat_of_the_readme_is_the_bundled_one() -> None:
    link = ROOT / "assets" / "cat.jpg"
    if not link.parent.is_dir():
        pytest.skip("the tests run outside a clone, without assets/")
    assert link.read_bytes() == bundled_cat().read_bytes()


# ---- the evaluation crop and the batch ----


def test_the_crop_is_the_middle_of_the_resized_image() -> None:
    image = scene(300, 500)
    resized = cv2.resize(image, (426, 256), interpolation=cv2.INTER_LINEAR)
    np.testing.assert_array_equal(eval_crop(image), resized[16:240, 101:325])


@pytest.mark.parametrize(("size", "shorter"), [(224, 256), (192, 219), (160, 183), (320, 366), (64, 73)])
def test_other_sizes_resize_in_proportion(size: int, shorter: int) -> None:
    image = scene(shorter, shorter + 40)  # Already of the size it is resized to: only the crop is left.
    top, left = round((shorter - size) / 2), round((shorter + 40 - size) / 2)
    np.testing.assert_array_equal(eval_crop(image, size), image[top : top + size, left : left + size])


def test_resize_can_be_chosen() -> None:
    image = scene(224, 300)
    np.testing.assert_array_equal(eval_crop(image, 224, resize=224), image[:, 38:262])


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (7, 1), (1, 20_000), (20_000, 1), (3, 19_999), (2, 2)])
def test_tiny_and_elongated_images_are_cropped(shape: tuple[int, int]) -> None:
    crop = eval_crop(np.full((*shape, 3), 7, np.uint8))
    assert crop.shape == (224, 224, 3)
    assert (crop == 7).all()


def test_the_far_ends_of_an_elongated_image_are_not_resized(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[tuple[int, int]] = []
    resized = cv2.resize

    def watched(image: Pixels, size: tuple[int, int], interpolation: int) -> object:
        sizes.append(size)
        return resized(image, size, interpolation=interpolation)

    monkeypatch.setattr(cv2, "resize", watched)
    eval_crop(np.zeros((1, MAX_SIDE, 3), np.uint8))
    eval_crop(np.zeros((MAX_SIDE, 1, 3), np.uint8))
    assert len(sizes) == 2
    assert max(max(size) for size in sizes) < 10 * 256


@pytest.mark.parametrize("length", [1_000, 1_001, 1_002, 1_003])
def test_an_elongated_image_keeps_its_middle(length: int) -> None:
    ramp = np.broadcast_to(np.abs(np.arange(length) * 2 - (length - 1))[None, :, None], (10, length, 3))
    crop = eval_crop(np.ascontiguousarray(np.minimum(ramp, 255).astype(np.uint8)))[112, :, 0].astype(int)
    assert np.abs(crop - crop[::-1]).max() <= 1


def test_the_crop_equals_megengine_s_transforms() -> None:
    vision = pytest.importorskip("megengine.data.transform")
    for height, width in [(300, 451), (375, 500), (256, 256), (257, 700), (90, 60), (1000, 333)]:
        image = scene(height, width)
        expected = vision.CenterCrop(224).apply(vision.Resize(256).apply(image))
        np.testing.assert_array_equal(eval_crop(image), expected)


@pytest.mark.parametrize(("size", "resize"), [(0, None), (-3, None), (224, 200)])
def test_impossible_crops_are_refused(size: int, resize: int | None) -> None:
    with pytest.raises(InputError, match=r"too small|smaller than"):
        eval_crop(scene(), size, resize)


def test_a_batch_is_contiguous_nchw_in_the_same_channel_order() -> None:
    crops = [scene(5, 6), scene(10, 6)[5:]]
    batch = to_batch(crops)
    assert batch.shape == (2, 3, 5, 6)
    assert batch.dtype == np.uint8
    assert batch.flags.c_contiguous
    np.testing.assert_array_equal(batch[1, 2], crops[1][:, :, 2])


def test_batches_of_nothing_or_of_unequal_crops_are_refused() -> None:
    with pytest.raises(InputError, match="no pictures"):
        to_batch([])
    with pytest.raises(InputError, match="differ in shape"):
        to_batch([scene(5, 6), scene(6, 5)])

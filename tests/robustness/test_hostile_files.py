"""Files from strangers: refused by name in one line, with exit code 2, and nothing run, written or filled meanwhile.

What each reader takes and refuses besides is in its own tests; tests/robustness/fuzz tries what nobody thought of.
"""

from __future__ import annotations

import io
import json
import os
import struct
import subprocess
import sys
import tarfile
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import onnx
import pytest
import safetensors.numpy
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from mgq.data import imagenet_archives
from mgq.data.decoding import read_image
from mgq.data.image_limits import MAX_MEMORY
from mgq.data.imagenet_archives import unpack_split
from mgq.data.labelled_folders import evaluation_folder
from mgq.engine.classifier.deployed_files import open_file
from mgq.engine.classifier.open import open_classifier
from mgq.engine.runs.run_folder import read_metrics
from mgq.engine.runs.training_state import read_training_state
from mgq.engine.training.recipe import Recipe, read_changes
from mgq.errors import InputError
from mgq.export.megengine.flatbuffer import LONGEST_VECTOR, MOST_FIELDS, Table
from mgq.export.megengine.megengine_file import MAGIC, encode_file, read_megengine_file
from mgq.export.onnx.onnx_file import read_onnx
from mgq.io.append import drop_torn_line
from mgq.io.limited_io import LONGEST_JSON, object_in
from mgq.quantization.activation_ranges import read_ranges
from mgq.quantization.modes import Mode
from mgq.weights.state_file import read_state
from tests.conftest import Mgq, slow, the_error
from tests.fakes import imagenet_files, weight_files
from tests.robustness.fuzz import readers
from tests.robustness.fuzz.worker import TOO_MUCH, outcome

SOON = 20.0
"""Seconds that are no hang on any machine; most files are refused in milliseconds."""


def refusal(read: Callable[[Path], object], path: Path, *parts: str) -> str:
    """The line that ``path`` is refused with, soon and without a gigabyte."""
    told = outcome(read, path)
    assert told["how"] == "refused", told
    assert told["seconds"] < SOON and told["memory"] < TOO_MUCH, told
    with pytest.raises(InputError) as caught:
        read(path)
    line = str(caught.value)
    assert all(part in line for part in parts), line
    return line


def written(path: Path, data: bytes | str) -> Path:
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def hole(path: Path) -> Path:
    """A file of a terabyte that takes no room."""
    with path.open("wb") as file:
        file.truncate(2**40)
    return path


# ---- the whole command ----


WATCHED = """
import sys
from mgq.cli.main import run
try:
    run()
finally:
    print("loaded" if "megengine" in sys.modules else "not loaded")
"""


def process(folder: Path, *arguments: str | Path) -> tuple[int, str, int]:
    """Exit code, what is said, at last of MegEngine, and the most memory of ``mgq ARGUMENTS`` in its own process."""
    environment = {**os.environ, "MGQ_CACHE": str(folder / "cache"), "COLUMNS": "200"}
    with (folder / "said").open("w+b") as said:
        command = [sys.executable, "-c", WATCHED, *map(str, arguments)]
        running = subprocess.Popen(command, cwd=folder, env=environment, stdout=said, stderr=said)
        _, status, used = os.wait4(running.pid, 0)
        running.returncode = os.waitstatus_to_exitcode(status)
        said.seek(0)
        return running.returncode, said.read().decode(), 1024 * used.ru_maxrss


@pytest.fixture(scope="module")
def before_reading(tmp_path_factory: pytest.TempPathFactory) -> int:
    """The memory of a command that finds no file."""
    code, said, memory = process(tmp_path_factory.mktemp("none"), "infer", "-c", "none.pkl")
    assert code == 2 and "none.pkl" in said
    return memory


class Evil:
    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, ("touch ran",)


def test_the_command_survives_what_would_end_it_before_it_loads_megengine(tmp_path: Path, before_reading: int) -> None:
    import pickle

    recipe = "x = " + "[" * 60_000
    cases: list[tuple[str, list[str | Path]]] = [
        ("evil.pkl", ["infer", "-c", written(tmp_path / "evil.pkl", pickle.dumps({"state_dict": {"w": Evil()}}))]),
        ("axes.megengine", ["infer", "-c", written(tmp_path / "axes.megengine", graph_with(many_axes))]),
        ("bomb.onnx", ["infer", "-c", written(tmp_path / "bomb.onnx", model_with(doubled).SerializeToString())]),
        ("bomb.png", ["infer", written(tmp_path / "bomb.png", png_of_16_bits())]),
        ("deep.toml", ["train", "--recipe", written(tmp_path / "deep.toml", recipe)]),
    ]
    for name, arguments in cases:
        code, said, memory = process(tmp_path, *arguments)
        assert code == 2, (name, code, said)
        errors = [line for line in said.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1 and name in errors[0] and "Traceback" not in said, said
        assert said.endswith("not loaded\n"), (name, said)
        assert memory < before_reading + TOO_MUCH, (name, memory)
    assert not (tmp_path / "ran").exists()
    assert {path.name for path in tmp_path.iterdir()} <= {*(name for name, _ in cases), "said", "cache"}


# ---- weights ----


@pytest.mark.parametrize("form", ["pickle", "zip", "legacy"])
@pytest.mark.parametrize("name", [("os", "system"), ("builtins", "eval"), ("numpy", "ndarray.tofile.__call__")])
def test_a_name_that_runs_code_stays_a_name_in_every_form(
    form: str, name: tuple[str, str], mgq: Mgq, tmp_path: Path
) -> None:
    asked = b"".join(b"\x8c" + bytes([len(part)]) + part.encode() for part in name) + b"\x93"
    call = weight_files.Raw(asked + weight_files.code(("touch ran",)) + b"R")
    root: dict[str, object] = {"state_dict": {"w": call}}
    forge = weight_files.Forge()
    data = {"pickle": weight_files.pickled, "zip": forge.zip, "legacy": forge.legacy}[form](root)  # type: ignore[operator]
    error = the_error(mgq("infer", "-c", written(tmp_path / "evil.pth", data)))
    assert "evil.pth would run code" in error and name[1] in error
    assert not (tmp_path / "ran").exists()


def test_zip_bombs_are_refused(tmp_path: Path) -> None:
    forge = weight_files.Forge()
    root = {"w": forge.tensor(np.zeros(2**20, np.float32))}
    entries = {"w/data.pkl": weight_files.pickled(root), "w/data/100": bytes(2**22)}
    packed = weight_files.zipped(entries, zipfile.ZIP_DEFLATED)
    refusal(read_state, written(tmp_path / "packed.pth", packed), "packed.pth", "compressed")
    many = weight_files.zipped({f"w/{i}": b"" for i in range(20_100)})
    refusal(read_state, written(tmp_path / "many.pth", many), "many.pth", "entries")


def checkpoint_with(path: Path, header: Callable[[dict[str, Any]], None] | None = None, **info: Any) -> Path:
    """A checkpoint of the smallest network whose metadata, or whose header, says something else."""
    (whole,) = readers._checkpoints()
    (length,) = struct.unpack_from("<Q", whole)
    body = json.loads(whole[8 : 8 + length])
    about = {**json.loads(body["__metadata__"]["mgq"]), **info}
    body["__metadata__"] = {"mgq": json.dumps(about)} if header is None else {}
    if header is not None:
        header(body)
    return written(path, readers.safetensors_file(json.dumps(body).encode(), whole[8 + length :]))


def read_float(path: Path) -> object:
    return open_classifier(checkpoint=path, mode=Mode.NORMAL)


@pytest.mark.parametrize(
    ("info", "says"),
    [
        ({"classes": [str(i) for i in range(300_000)]}, "300000 classes"),
        ({"classes": [1, 2, 3]}, "damaged metadata"),
        ({"image_size": 10**9}, "damaged metadata"),
        ({"image_size": True}, "damaged metadata"),
        ({"origin": ["no", "text"]}, "damaged metadata"),
        ({"target": {}}, "damaged metadata"),
        ({"recipe": "none"}, "damaged metadata"),
        ({"format": 2}, "format 2"),
        ({"arch": "mobilenet_v2", "options": {"width": 1e9}}, "width multiplier"),
        ({"options": {"\x1b[31m": 1}}, "no option '\\x1b[31m'"),
        ({"arch": "\x1b]0;title\x07"}, "\\x1b]0;title\\x07"),
        ({"unknown": 1}, "damaged metadata"),
        ({"arch": "mobilenet_v2", "options": {"activation": ["relu"]}}, "no activation"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_checkpoint_that_lies_of_itself_is_refused(info: dict[str, Any], says: str, tmp_path: Path) -> None:
    path = checkpoint_with(tmp_path / "lies.safetensors", None, **info)
    line = refusal(read_float, path, "lies.safetensors", says)
    assert line.isprintable()


def test_a_classifier_of_a_billion_outputs_without_a_number_makes_no_network(tmp_path: Path) -> None:
    def empty_head(header: dict[str, Any]) -> None:
        header["classifier.0.weight"].update(shape=[10**9, 0], data_offsets=[0, 0])

    told = outcome(read_float, checkpoint_with(tmp_path / "empty.safetensors", empty_head))
    assert told["how"] == "refused" and told["memory"] < TOO_MUCH, told


def test_a_classifier_of_a_million_outputs_of_one_feature_makes_no_network(tmp_path: Path) -> None:
    state: dict[str, np.ndarray[Any, Any]] = {
        "fc.weight": np.zeros((3_000_000, 1), np.uint8),
        "conv1.weight": np.zeros((64, 3, 7, 7), np.float32),
    }
    path = written(tmp_path / "thin.safetensors", safetensors.numpy.save(state))
    told = outcome(read_float, path)
    assert told["how"] == "refused" and told["memory"] < TOO_MUCH // 2, told


@pytest.mark.parametrize(
    "header",
    [
        b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]},"b":{"dtype":"F32","shape":[4],"data_offsets":[8,24]}}',
        b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[16,1000000]}}',
        b'{"a":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,16]}}',
        b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        b'{"a":' * 100_000,
        b"[" * 100_000,
    ],
    ids=["overlap", "outside", "overflow", "twice", "deep", "lists"],
)
def test_a_header_that_does_not_fit_is_refused(header: bytes, tmp_path: Path) -> None:
    data = readers.safetensors_file(header, bytes(32))
    refusal(read_state, written(tmp_path / "odd.safetensors", data), "odd.safetensors")


def test_vectors_and_tables_without_bounds_are_refused() -> None:
    many = struct.pack("<I", LONGEST_VECTOR + 1) + bytes(4 * (LONGEST_VECTOR + 1))
    # A table whose field 0 points at the vector behind it; its vtable comes first.
    vtable, table = struct.pack("<HHH", 6, 8, 4), struct.pack("<iI", 6, 4)
    data = memoryview(vtable + table + many)
    for read in (Table.integers, Table.tables):
        with pytest.raises(ValueError, match="longer than any"):
            read(Table(data, 6), 0)
    wide = struct.pack("<HH", 4 + 2 * (MOST_FIELDS + 1), 8) + bytes(2 * (MOST_FIELDS + 1))
    with pytest.raises(ValueError, match="more fields"):
        Table(memoryview(wide + struct.pack("<i", len(wide))), len(wide)).fields  # noqa: B018


def test_long_metadata_is_refused_before_it_is_unpacked() -> None:
    assert object_in('{"a": [1]}') == {"a": [1]}
    for wrong in ("[1]", "{", "[" * 100_000, '{"a": "' + "x" * LONGEST_JSON + '"}'):
        with pytest.raises(ValueError, match=r"JSON|Expecting"):
            object_in(wrong)


# ---- trainings ----


@pytest.mark.parametrize(
    ("read", "name"),
    [
        (lambda path: read_changes(path), "r.toml"),
        (lambda path: read_ranges(path), "r.json"),
        (lambda path: read_metrics(path), "m.jsonl"),
        (lambda path: read_onnx(path), "n.onnx"),
        (lambda path: read_megengine_file(path), "n.megengine"),
        (lambda path: read_training_state(path), "last.safetensors"),
        (lambda path: read_image(path), "p.png"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_terabyte_is_refused_unread(read: Callable[[Path], object], name: str, tmp_path: Path) -> None:
    refusal(read, hole(tmp_path / name), name)


def test_the_end_of_a_long_line_is_found_without_reading_all_of_it(tmp_path: Path) -> None:
    path = written(tmp_path / "log.txt", b"whole\n" + b"x" * 3_000_000)
    drop_torn_line(path)
    assert path.read_bytes() == b"whole\n"
    drop_torn_line(written(path, b"x" * 3_000_000))
    assert path.read_bytes() == b""


@pytest.mark.parametrize(
    "change",
    [
        {"epoch": "two"},
        {"epoch": 10**30},
        {"pictures": [1]},
        {"meter": []},
        {"best": {"top1": {}}},
        {"info": None},
        {"info": {}},
        {"seconds": "long"},
    ],
    ids=str,
)
def test_a_state_with_a_right_checksum_and_a_wrong_place_is_refused(change: dict[str, Any], tmp_path: Path) -> None:
    (whole,) = readers._states()
    (length,) = struct.unpack_from("<Q", whole)
    header = json.loads(whole[8 : 8 + length])
    body = json.loads(header["__metadata__"]["mgq training"])
    body["progress"].update(change)
    header["__metadata__"]["mgq training"] = json.dumps(body)
    data = readers._state_sealed(readers.safetensors_file(json.dumps(header).encode(), whole[8 + length :]))
    path = written(tmp_path / "last.safetensors", data)
    read_training_state(path)
    refusal(readers._read_training_state, path, "last.safetensors", "start again without --resume")


def test_a_state_of_another_network_does_not_go_on(mgq: Mgq, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "resnet18.normal"
    run.mkdir(parents=True)
    (whole,) = readers._states()
    written(run / "last.safetensors", whole)
    error = the_error(mgq("train", "--resume", "-a", "resnet18"))
    assert "last.safetensors" in error or "resnet18.normal" in error or "pictures" in error


@pytest.mark.parametrize("key", ["epochs", "batch_size", "image_size", "devices", "synthetic_train", "seed", "limit"])
def test_numbers_without_bounds_are_refused_by_name(key: str, tmp_path: Path) -> None:
    path = written(tmp_path / "r.toml", f"{key} = {32 * 10**18}")
    refusal(
        lambda p: Recipe(**{**readers._recipe(), **read_changes(p)}), path, f"--{key.replace('_', '-')}", "too large"
    )


@pytest.mark.parametrize(
    "text", ["[" * 60_000, "a." * 30_000 + "a = 1", "lr = " + "9" * 60_000, "x = " + "{a=" * 20_000]
)
def test_recipes_without_end_are_refused(text: str, tmp_path: Path) -> None:
    assert len(refusal(read_changes, written(tmp_path / "r.toml", text), "r.toml")) < 500


def test_a_number_beyond_all_floats_is_no_traceback(tmp_path: Path) -> None:
    refusal(
        lambda p: Recipe(**{**readers._recipe(), **read_changes(p)}),
        written(tmp_path / "r.toml", "lr = 1" + "0" * 400),
        "lr = ",
    )
    ranges = readers._ranges()[0].replace(b"-1.0", b"-1" + b"0" * 400)
    refusal(read_ranges, written(tmp_path / "r.json", ranges), "r.json")


def test_metrics_of_other_kinds_are_left_out(tmp_path: Path) -> None:
    lines = ['{"epoch": 1, "loss": [1]}', '{"epoch": true}', '{"epoch": 2, "x": %s}' % ("9" * 30), "[" * 100_000]
    path = written(tmp_path / "metrics.jsonl", "\n".join([*lines, '{"epoch": 3, "loss": 0.5}', ""]))
    assert read_metrics(path) == [{"epoch": 3, "loss": 0.5}]


# ---- pictures ----


@pytest.mark.parametrize("kind", [slow(b"IDAT"), None], ids=["empty", "unknown"])
def test_a_million_empty_chunks_take_no_more_memory_than_the_file(kind: bytes | None, tmp_path: Path) -> None:
    data = cv2.imencode(".png", np.zeros((4, 4, 3), np.uint8))[1].tobytes()
    first = data.index(b"IDAT") - 4
    empty = [struct.pack(">I4s", 0, name) for name in ([kind] if kind else [b"%04d" % i for i in range(10_000)])]
    chunks = b"".join(chunk + struct.pack(">I", zlib.crc32(chunk[4:])) for chunk in empty)
    path = written(tmp_path / "many.png", data[:first] + chunks * (1_000_000 // len(empty)) + data[first:])
    tracemalloc.start()
    try:
        read_image(path)
    except InputError:
        pass
    finally:
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert most < 5 * path.stat().st_size


def png_of_16_bits() -> bytes:
    """40 megapixels of four samples of 16 bits: 320 MB decoded, 860 MB at the peak."""
    return cv2.imencode(".png", np.zeros((5000, 8000, 4), np.uint16), [cv2.IMWRITE_PNG_COMPRESSION, 1])[1].tobytes()


def test_the_memory_of_decoding_counts_not_the_pixels_alone(tmp_path: Path) -> None:
    whole = png_of_16_bits()
    refusal(read_image, written(tmp_path / "deep.png", whole), "deep.png", "8,000 x 5,000", f"{MAX_MEMORY // 21:,}")


def test_the_largest_image_of_the_dearest_kind_stays_below_a_gigabyte(tmp_path: Path) -> None:
    side = int((MAX_MEMORY // 21) ** 0.5)
    data = cv2.imencode(".png", np.zeros((side, side, 4), np.uint16), [cv2.IMWRITE_PNG_COMPRESSION, 1])[1].tobytes()
    told = outcome(read_image, written(tmp_path / "large.png", data))
    assert told["how"] == "accepted" and told["memory"] < TOO_MUCH, told


def jpeg(progressive: bool = False) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (64, 64), (9, 99, 199)).save(file, "JPEG", progressive=progressive, subsampling=0)
    return file.getvalue()


def resized(data: bytes, width: int, height: int) -> bytes:
    """``data``, a JPEG, with another size in its header."""
    at = max(data.find(b"\xff\xc0"), data.find(b"\xff\xc2"))
    return data[: at + 5] + struct.pack(">HH", height, width) + data[at + 9 :]


def test_a_jpeg_of_more_pixels_than_bits_is_refused(tmp_path: Path) -> None:
    refusal(read_image, written(tmp_path / "few.jpg", resized(jpeg(), 10_000, 9_000)), "few.jpg", "cut short")


def test_a_jpeg_of_thousands_of_passes_is_refused(tmp_path: Path) -> None:
    whole = jpeg(progressive=True)
    at = whole.rfind(b"\xff\xda")
    scan = whole[at:-2]
    refusal(read_image, written(tmp_path / "p.jpg", whole[:-2] + scan * 300 + b"\xff\xd9"), "p.jpg", "passes")
    large = resized(whole[:-2] + scan * 150 + b"\xff\xd9" + bytes(40_000), 8_000, 8_000)
    refusal(read_image, written(tmp_path / "l.jpg", large), "l.jpg", "passes")


def test_a_webp_that_begins_with_another_chunk_is_refused(tmp_path: Path) -> None:
    file = io.BytesIO()
    Image.new("RGB", (64, 64)).save(file, "WEBP", lossless=True)
    whole = file.getvalue()
    hidden = b"JUNK" + struct.pack("<I", 16) + bytes(16)
    data = b"RIFF" + struct.pack("<I", len(whole) - 8 + len(hidden)) + b"WEBP" + hidden + whole[12:]
    refusal(read_image, written(tmp_path / "w.webp", data), "w.webp")


def test_an_avif_whose_frame_is_larger_than_it_says_is_refused(tmp_path: Path) -> None:
    file = io.BytesIO()
    Image.new("RGB", (7_000, 5_000), (9, 9, 9)).save(file, "AVIF", speed=10)
    data = bytearray(file.getvalue())
    at = data.index(b"ispe") + 8
    data[at : at + 8] = struct.pack(">II", 64, 64)
    refusal(read_image, written(tmp_path / "small.avif", bytes(data)), "small.avif", "7,000 x 5,000")


def jpeg_2000(**options: Any) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (256, 256), (9, 99, 199)).save(file, "JPEG2000", no_jp2=True, **options)
    return file.getvalue()


def test_a_jpeg_2000_of_millions_of_tiles_or_blocks_is_refused(tmp_path: Path) -> None:
    whole = jpeg_2000()
    assert read_image(whole).shape == (256, 256, 3)
    size = whole.index(b"\xff\x51") + 6
    tiles = whole[: size + 16] + struct.pack(">II", 2, 2) + whole[size + 24 :]
    refusal(read_image, written(tmp_path / "tiles.jp2", tiles), "tiles.jp2", "damaged")
    style = whole.index(b"\xff\x52") + 4
    large = bytearray(whole[:size] + struct.pack(">II", 5_000, 4_000) + whole[size + 8 :])
    large[size + 16 : size + 24] = struct.pack(">II", 5_000, 4_000)
    large[style + 6 : style + 8] = b"\0\0"  # blocks of 4x4
    refusal(read_image, written(tmp_path / "blocks.jp2", bytes(large)), "blocks.jp2", "damaged")


def test_a_tiff_whose_strips_are_numbers_of_two_kinds_is_one_line(tmp_path: Path) -> None:
    strips = [(273, 4, 4, 8), (279, 11, 4, 8)]
    odd = tiff((256, 3, 1, 8), (257, 3, 1, 8), *strips, room=64)
    refusal(read_image, written(tmp_path / "odd.tif", odd), "odd.tif")


def tiff(*fields: tuple[int, int, int, int], room: int = 0) -> bytes:
    entries = b"".join(struct.pack("<HHII", *entry) for entry in fields)
    return b"II*\0" + struct.pack("<IH", 8, len(fields)) + entries + bytes(4 + room)


def test_a_tiff_with_two_sizes_or_a_million_numbers_is_refused(tmp_path: Path) -> None:
    size = [(256, 3, 1, 8), (257, 3, 1, 8)]
    refusal(read_image, written(tmp_path / "two.tif", tiff(*size, (256, 4, 1, 9_000))), "two.tif", "damaged")
    many = tiff(*size, (273, 4, 5_000_000, 8), room=20_000_000)
    refusal(read_image, written(tmp_path / "many.tif", many), "many.tif", "damaged")
    tiles = tiff(*size, (322, 4, 1, 2**31 - 1), (323, 4, 1, 2**31 - 1))
    refusal(read_image, written(tmp_path / "tiles.tif", tiles), "tiles.tif")
    wide = tiff((256, 1, 150_000_000, 8), (257, 3, 1, 8), room=150_000_000)
    refusal(read_image, written(tmp_path / "wide.tif", wide), "wide.tif")


def test_a_pipe_among_images_is_not_waited_for(tmp_path: Path) -> None:
    (tmp_path / "cats").mkdir()
    (tmp_path / "dogs").mkdir()
    written(tmp_path / "cats" / "a.jpg", jpeg())
    written(tmp_path / "dogs" / "a.jpg", jpeg())
    os.mkfifo(tmp_path / "cats" / "b.jpg")
    assert len(evaluation_folder(tmp_path)) == 2


# ---- ImageNet's archives ----


def test_a_chain_of_a_thousand_extended_headers_is_no_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sync", lambda: None)
    info = tarfile.TarInfo("x")
    info.type = tarfile.XHDTYPE
    record = b"12 comment=\n"
    info.size = len(record)
    block = info.tobuf(tarfile.USTAR_FORMAT) + record.ljust(512, b"\0")
    folder = tmp_path / "folder"
    folder.mkdir()
    written(folder / imagenet_archives.TRAIN_ARCHIVE, block * 3_000 + bytes(1024))
    with pytest.raises(InputError, match=r"img_train\.tar is damaged"):
        unpack_split(folder, "train", md5=imagenet_files.sums(folder))
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


# ---- deployed files ----


def graph_with(change: Callable[[bytearray, Table], None], **about: Any) -> bytes:
    """A ``.megengine`` file with a right checksum whose graph, or whose metadata, is changed."""
    whole = readers._graphs()[0]
    (length,) = struct.unpack("<Q", whole[-48:-40])
    graph = bytearray(whole[: -48 - length])
    says = {**json.loads(whole[-48 - length : -48]), **about}
    (root,) = struct.unpack_from("<I", graph, 4)
    change(graph, Table(memoryview(bytes(graph)), 4 + root))
    return encode_file(bytes(graph), says)


def pointed(table: Table, index: int) -> int:
    """Where the vector or text in a field begins."""
    at = table.fields[index]
    return at + int(struct.unpack_from("<I", table.data, at)[0])


def operator(model: Table, name: bytes) -> Table:
    return next(found for found in model.tables(2) if found.text(0) == name)


def many_axes(graph: bytearray, model: Table) -> None:
    (tensor,) = operator(model, b"ImmutableTensor").tables(11)
    struct.pack_into("<I", graph, pointed(tensor, 1), 100)


def no_names(graph: bytearray, model: Table) -> None:
    struct.pack_into("<I", graph, pointed(model, 3), 1)


def other_operator(graph: bytearray, model: Table) -> None:
    convolution = operator(model, b"ConvBiasForward")
    graph[pointed(convolution, 0) + 4 : pointed(convolution, 0) + 8] = b"Evil"


def other_number(graph: bytearray, model: Table) -> None:
    graph[operator(model, b"ConvBiasForward").fields[1]] ^= 1


def other_place(graph: bytearray, model: Table) -> None:
    (tensor,) = operator(model, b"ImmutableTensor").tables(11)
    place = tensor.table(2)
    assert place is not None
    graph[pointed(place, 0) + 4 : pointed(place, 0) + 8] = b"gpu0"


def later_input(graph: bytearray, model: Table) -> None:
    struct.pack_into("<I", graph, pointed(operator(model, b"ConvBiasForward"), 7) + 4, 10_000)


def huge_input(graph: bytearray, model: Table) -> None:
    (tensor,) = operator(model, b"Host2DeviceCopy").tables(11)
    struct.pack_into("<4I", graph, pointed(tensor, 1) + 4, 1, 3, 2**16, 2**16)


def infinite_scale(graph: bytearray, model: Table) -> None:
    kind = operator(model, b"ConvBiasForward").table(10)
    assert kind is not None
    scale = kind.table(2)
    assert scale is not None
    struct.pack_into("<f", graph, scale.fields[0], float("nan"))


def huge_window(graph: bytearray, model: Table) -> None:
    window = operator(model, b"PoolingV1").table(4)
    assert window is not None
    struct.pack_into("<I", graph, window.fields[5], 2**31 - 1)


def garbage(graph: bytearray, model: Table) -> None:
    graph[:] = os.urandom(len(graph))


def cut(graph: bytearray, model: Table) -> None:
    del graph[len(graph) // 2 :]


def nothing(graph: bytearray, model: Table) -> None:
    pass


@pytest.mark.parametrize(
    "change",
    [
        *(many_axes, no_names, other_operator, other_number, other_place, later_input, huge_input, infinite_scale),
        *(huge_window, garbage, cut),
    ],
    ids=lambda change: str(change.__name__),
)
def test_a_graph_that_mgq_does_not_write_never_reaches_the_native_loader(
    change: Callable[[bytearray, Table], None], tmp_path: Path
) -> None:
    path = written(tmp_path / "net.megengine", graph_with(change))
    assert path.read_bytes().endswith(MAGIC)
    refusal(read_megengine_file, path, "net.megengine", "mgq dump")


@pytest.mark.parametrize(
    "about",
    [
        {"classes": ["a"] * 1_000_000},
        {"classes": "abcdefg"},
        {"image_size": 10**9},
        {"image_size": "32"},
        {"image_size": 1e400},
        {"arch": ["resnet18"]},
        {"arch": None},
        {"mode": "\x1b[2J"},
        {"options": 1},
    ],
    ids=lambda about: f"{next(iter(about))} {str(next(iter(about.values())))[:9]}",
)
@pytest.mark.parametrize("form", ["megengine", "onnx"])
def test_a_deployed_file_that_lies_of_itself_is_refused(about: dict[str, Any], form: str, tmp_path: Path) -> None:
    path = tmp_path / f"net.{form}"
    if form == "megengine":
        written(path, graph_with(nothing, **about))
        assert open_file(written(tmp_path / "true.megengine", graph_with(nothing))).image_size == 32
    else:
        model = model_with(lambda model: None)
        says = {**json.loads(model.metadata_props[0].value), **about}
        model.metadata_props[0].value = json.dumps(says)
        written(path, model.SerializeToString())
    refusal(open_file, path, f"net.{form}")


def model_with(change: Callable[[Any], object]) -> Any:
    model = onnx.ModelProto.FromString(readers._models()[0])
    change(model)
    return model


def outside(place: str) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        tensor = next(tensor for tensor in model.graph.initializer if tensor.name == "w")
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        entry = tensor.external_data.add()
        entry.key, entry.value = "location", place

    return change


def doubled(model: Any) -> None:
    """Each operator joins the answer of the one before with itself: 2**30 times as large in the end."""
    name = "x9"
    for i in range(30):
        model.graph.node.insert(-1, helper.make_node("Concat", [name, name], [f"twice{i}"], axis=1))
        name = f"twice{i}"


def expanded(model: Any) -> None:
    """A number is repeated 1.6e9 times."""
    model.graph.initializer.append(numpy_helper.from_array(np.ones((1, 1), np.float32), "one"))
    model.graph.initializer.append(numpy_helper.from_array(np.array([40_000, 40_000]), "far"))
    model.graph.node.append(helper.make_node("Expand", ["one", "far"], ["more"]))


def expanded_by_the_picture(model: Any) -> None:
    """A number is repeated as often as the first pixels say."""
    constants = {"one": np.ones((1, 1, 1, 1), np.float32), "minus": np.array([-1]), "zero": np.array([0])}
    constants["four"] = np.array([4])
    model.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in constants.items())
    flat = helper.make_node("Reshape", [model.graph.input[0].name, "minus"], ["flat"])
    part = helper.make_node("Slice", ["flat", "zero", "four"], ["part"])
    cast = helper.make_node("Cast", ["part"], ["far"], to=TensorProto.INT64)
    model.graph.node.extend([flat, part, cast, helper.make_node("Expand", ["one", "far"], ["more"])])


def with_node(*arguments: Any, **more: Any) -> Callable[[Any], None]:
    return lambda model: model.graph.node.append(helper.make_node(*arguments, **more))


def with_function(model: Any) -> None:
    node = helper.make_node("Relu", ["a"], ["b"])
    model.functions.append(helper.make_function("own", "F", ["a"], ["b"], [node], [helper.make_opsetid("", 17)]))
    model.opset_import.append(helper.make_opsetid("own", 1))


def with_attribute(name: str, *values: int) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        convolution = next(node for node in model.graph.node if node.op_type == "Conv")
        kept = [attribute for attribute in convolution.attribute if attribute.name != name]
        del convolution.attribute[:]
        convolution.attribute.extend([*kept, helper.make_attribute(name, values if len(values) > 1 else values[0])])

    return change


def with_dims(*dims: int) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        tensor = next(tensor for tensor in model.graph.initializer if tensor.name == "w")
        tensor.dims[:] = dims

    return change


def loop() -> Any:
    body = helper.make_graph([], "body", [], [])
    return with_node("If", ["s"], ["more"], then_branch=body, else_branch=body)


def huge_image(model: Any) -> None:
    for axis in model.graph.input[0].type.tensor_type.shape.dim[2:]:
        axis.dim_value = 100_000


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (outside("../../../../../../etc/passwd"), "in another file"),
        (outside("/etc/passwd"), "in another file"),
        (outside("link"), "in another file"),
        (outside("weights.bin"), "in another file"),
        (with_node("Evil", ["x9"], ["more"], domain="own"), "'own.Evil'"),
        (with_node("\x1b[31mEvil", ["x9"], ["more"]), "\\x1b[31mEvil"),
        (loop(), "'If'"),
        (with_node("ConstantOfShape", ["shape"], ["more"]), "'ConstantOfShape'"),
        (with_node("Tile", ["x9", "shape"], ["more"]), "'Tile'"),
        (expanded, "too much"),
        (expanded_by_the_picture, "the size"),
        (with_function, "functions"),
        (doubled, "too much"),
        (huge_image, "too much"),
        (with_attribute("pads", 10**9, 10**9, 10**9, 10**9), "pads"),
        (with_attribute("strides", 0, 0), "strides"),
        (with_attribute("group", 0), "group"),
        (with_dims(4, 3, 3, 2**20), "another size"),
        (with_dims(2**62, 2**62, 3, 3), "shape"),
        (with_dims(4, 3, 3, 0), "shape"),
    ],
)
def test_what_no_classifier_needs_never_reaches_an_engine(
    change: Callable[[Any], None], says: str, tmp_path: Path
) -> None:
    written(tmp_path / "weights.bin", bytes(4 * 3 * 9 * 4))
    (tmp_path / "link").symlink_to("/etc/passwd")
    path = written(tmp_path / "net.onnx", model_with(change).SerializeToString())
    refusal(read_onnx, path, "net.onnx", says)


# ---- names ----


def test_names_of_classes_cannot_speak_to_the_terminal(mgq: Mgq, tmp_path: Path) -> None:
    names = ["\x1b[31mred\x1b[0m", "[bold red]markup[/bold red] [/nothing]", "two\nlines\u202e"]
    path = checkpoint_with(tmp_path / "names.safetensors", None, classes=names, origin="\x1b]0;owned\x07[blink]")
    image = written(tmp_path / "[red]a.jpg", jpeg())
    said = mgq("infer", "-m", "normal", "-c", path, image, "--topk", "3")
    assert said.code == 0, said
    for text in (said.out, said.err):
        assert not {"\x1b", "\x07", "\r", "\u202e"} & set(text), text
    shown = said.out.replace("\n", "")  # a long path may be folded
    assert "[bold red]markup" in shown and "[red]a.jpg" in shown and "[blink]" in shown

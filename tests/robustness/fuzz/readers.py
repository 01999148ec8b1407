"""The readers of mgq, each with small valid files to damage, and with ways to damage what a checksum would guard."""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import struct
import tarfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

from tests.robustness.fuzz.mutations import damaged, odd_json, other_json

Forge = Callable[[random.Random], bytes]


@dataclass(frozen=True)
class Reader:
    """``read`` reads the file at a path, and may raise nothing but InputError or FailureError.

    ``seeds`` makes valid files; ``tokens`` are words of the format. ``sealed`` puts the checksums of a damaged file
    right again, as whoever made it could. ``forged`` makes a file from nothing. ``share`` of all inputs go here.
    """

    name: str
    suffix: str
    share: float
    seeds: Callable[[], Sequence[bytes]]
    read: Callable[[Path], object]
    tokens: Sequence[bytes] = ()
    sealed: Callable[[bytes], bytes] = field(default=lambda data: data)
    forged: Forge | None = None

    def input(self, number: int, seed: int, seeds: Sequence[bytes]) -> bytes:
        """The input of that ``number``: the same one whatever was made before."""
        rng = random.Random(f"{seed} {self.name} {number}")
        if number < len(seeds):
            return seeds[number]
        if self.forged is not None and rng.random() < 0.4:
            return self.forged(rng)
        data = damaged(rng.choice(seeds), rng, self.tokens, seeds)
        return self.sealed(data) if rng.random() < 0.7 else data


# ---- weights ----

_PICKLE_TOKENS = (
    *(b"cos\nsystem\n", b"c__builtin__\neval\n", b"\x8c\x02os\x8c\x06system\x93", b"\x8c\x08builtins\x8c\x04eval\x93"),
    *(
        b"\x8c\x09megengine\x8c\x0bcore.tensor\x93",
        b"R",
        b"b",
        b"\x81",
        b"Q",
        b"(",
        b"t",
        b"\x85",
        b"q\0",
        b"h\0",
        b"\x94",
    ),
    *(b"2", b"0", b"1", b"e", b"u", b"]", b"}", b"ccollections\nOrderedDict\n", b"ctorch._utils\n_rebuild_tensor_v2\n"),
    *(
        b"\x8e\xff\xff\xff\xff\xff\xff\xff\x7f",
        b"\x95\xff\xff\xff\xff\xff\xff\xff\x7f",
        b"B\xff\xff\xff\xff",
        b"r\xff\xff\xff\x7f",
    ),
    *(b"cargparse\nNamespace\n", b"c__main__\nColor\n", b"c__builtin__\ngetattr\n", b"c_operator\nor_\n"),
    *(b"ccollections\ndefaultdict\n", b"cdatetime\ndatetime\n", b"ctorch._tensor\n_rebuild_from_type_v2\n"),
    *(b"\x8f", b"\x90", b"\x91", b"\x92", b"s", b"a"),
    *(b"\x8a\xff", b"cnumpy\ndtype\n", b"cnumpy\nndarray\n", b"i", b"o", b"\x82\x01", b"P1\n", b"."),
)


def _read_state(path: Path) -> object:
    from mgq.weights.checkpoint import info_of
    from mgq.weights.state_file import read_state

    return info_of(read_state(path).metadata, str(path))


def _pickles() -> Sequence[bytes]:
    from tests.fakes import weight_files

    return [weight_files.small_megengine(), weight_files.pickled(weight_files.SMALL["head.bias"].tolist())]


def _pickle_from_nothing(rng: random.Random) -> bytes:
    """A program of instructions in any order, with the names that weights use and those that attacks use."""
    parts = [
        rng.choice(_PICKLE_TOKENS)
        if rng.random() < 0.5
        else bytes([rng.choice(b"N\x88K\x01M\x01\x00J]}()\x85\x86\x87abstuQR02q")])
        for _ in range(rng.choice((3, 10, 30, 200)))
    ]
    if rng.random() < 0.1:
        parts = [b"(" * rng.choice((10, 200_000)), *parts, b"t" * rng.choice((10, 200_000))]
    return b"\x80" + bytes([rng.choice((2, 4, 5))]) + b"".join(parts) + b"."


def _zips() -> Sequence[bytes]:
    from tests.fakes import weight_files

    return [weight_files.small_zip()]


def _zip_from_nothing(rng: random.Random, beside: bool = False) -> bytes:
    """A whole zip archive around a damaged pickle, which may have more in it than weights."""
    import zipfile

    from tests.fakes import foreign_values, weight_files

    forge = weight_files.Forge()
    whole: dict[str, object] = {name: forge.tensor(array) for name, array in weight_files.SMALL.items()}
    if beside:
        whole = {"state_dict": whole, "state_dict_ema": whole, **foreign_values.BESIDE}
    data = damaged(weight_files.pickled(whole), rng, _PICKLE_TOKENS, [weight_files.small_megengine()])
    entries = {"w/data.pkl": data, **{f"w/data/{key}": raw for key, (_, raw) in forge.storages.items()}}
    return weight_files.zipped(entries, rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)))


def _legacies() -> Sequence[bytes]:
    from tests.fakes import weight_files

    return [weight_files.small_legacy()]


@cache
def _of_other_programs() -> Sequence[bytes]:
    """Two networks and all that programs leave beside them, in both formats of PyTorch and in a plain pickle."""
    from tests.fakes import foreign_values, weight_files

    found: list[bytes] = []
    for write in (weight_files.Forge.zip, weight_files.Forge.legacy):
        forge = weight_files.Forge()
        small = {name: forge.tensor(array) for name, array in weight_files.SMALL.items()}
        pair = {"state_dict": small, "state_dict_ema": {f"module.{name}": tensor for name, tensor in small.items()}}
        found.append(write(forge, {**pair, **foreign_values.BESIDE}))
    return [*found, weight_files.pickled({"net": {}, "args": foreign_values.BESIDE, "a": {"b": {"c": [1]}}})]


def _read_of_other_programs(path: Path) -> object:
    from mgq.weights.prefixes import network_part
    from mgq.weights.state_file import read_state

    def holds(state: dict[str, Any]) -> bool:
        return "stem.weight" in state

    if path.stat().st_size % 2:
        return network_part(read_state(path, key="state_dict").tensors, holds, holds, holds)
    return network_part(read_state(path).tensors, holds, holds, holds)


_INFO = {
    "format": 1,
    "arch": "resnet18",
    "mode": "normal",
    "classes": ["cat", "dog"],
    "image_size": 64,
    "origin": "here",
    "options": {"width": 1.0},
    "target": "megengine",
    "step": 3,
    "recipe": {"lr": 0.1},
    "metrics": {"top1": 50.0},
    "versions": {"mgq": "0"},
    "float_layers": ["stem"],
}


def safetensors_file(header: bytes, data: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header + data


@cache
def _safetensors() -> Sequence[bytes]:
    from safetensors.numpy import save

    from tests.fakes import weight_files

    return [weight_files.small_safetensors(), save(weight_files.SMALL, {"mgq": json.dumps(_INFO)})]


def _safetensors_from_nothing(rng: random.Random) -> bytes:
    whole = rng.choice(_safetensors())
    (length,) = struct.unpack_from("<Q", whole)
    header = json.loads(whole[8 : 8 + length])
    if rng.random() < 0.5:
        header["__metadata__"] = {"mgq": odd_json(_INFO, rng).decode()}
        return safetensors_file(json.dumps(header).encode(), whole[8 + length :])
    text = odd_json(header, rng)
    if rng.random() < 0.2:  # names twice
        text = text[:-1] + b"," + text[1:]
    return safetensors_file(text, whole[8 + length :])


@cache
def _checkpoints() -> Sequence[bytes]:
    """A whole checkpoint of the smallest network of the zoo."""
    import numpy as np
    from safetensors.numpy import save

    from tests.conftest import blank, random_state

    network = blank("shufflenet_v1_x0_5_g3", 3)
    state = random_state({name: tensor.shape for name, tensor in network.named_tensors()})
    info = {**_INFO, "arch": "shufflenet_v1_x0_5_g3", "classes": ["a", "b", "c"], "options": {}, "float_layers": []}
    return [save({name: np.ascontiguousarray(value) for name, value in state.items()}, {"mgq": json.dumps(info)})]


def _checkpoint_from_nothing(rng: random.Random) -> bytes:
    (whole,) = _checkpoints()
    (length,) = struct.unpack_from("<Q", whole)
    header = json.loads(whole[8 : 8 + length])
    metadata = header.pop("__metadata__")
    if rng.random() < 0.6:
        metadata = {"mgq": odd_json(json.loads(metadata["mgq"]), rng).decode()}
        return safetensors_file(json.dumps({"__metadata__": metadata, **header}).encode(), whole[8 + length :])
    name, other = rng.choice(list(header)), rng.choice(list(header))
    header[name], header[other] = header[other], header[name]
    shape = header[name]["shape"]
    if shape and rng.random() < 0.5:
        shape[rng.randrange(len(shape))] = rng.choice((0, 1, 10**6, 10**9, -1))
        if 0 in shape:
            header[name]["data_offsets"] = [0, 0]
    if rng.random() < 0.3:
        metadata = {}
    return safetensors_file(json.dumps({"__metadata__": metadata, **header}).encode(), whole[8 + length :])


def _read_checkpoint(path: Path) -> object:
    from mgq.engine.classifier.open import open_classifier
    from mgq.quantization.modes import Mode

    classifier = open_classifier(checkpoint=path, mode=Mode.NORMAL)
    return classifier.info()


# ---- trainings ----


@cache
def _states() -> Sequence[bytes]:
    import tempfile

    import numpy as np

    from mgq.engine.runs.training_state import TrainingState, write_training_state

    progress = {
        "prepared": True,
        "epoch": 1,
        "step_in_epoch": 2,
        "meter": {"images": 3, "loss_sum": 1.5, "correct1": 1, "correct5": 2},
        "best": {"top1": 1.0, "loss": 2.0},
        "start": {},
        "seconds": 1.5,
        "pictures": [10, 20],
        "info": {name: value for name, value in _INFO.items() if name != "format"},
    }
    tensors = {"network.w": np.arange(6, dtype=np.float32), "velocity.w": np.zeros((2, 3), np.float32)}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "last.safetensors"
        write_training_state(path, TrainingState(tensors, progress, _recipe(), {"mgq": "0"}))
        return [path.read_bytes()]


@cache
def _recipe() -> dict[str, Any]:
    from mgq.engine.training.recipe import Task, make_recipe, to_plain

    return to_plain(make_recipe(Task("resnet18", "normal", "synthetic", 2, 100, 64), {}))


def _state_sealed(data: bytes) -> bytes:
    """The state with the checksum that it would have to have."""
    from safetensors import SafetensorError
    from safetensors.numpy import load, save

    from mgq.engine.runs.training_state import checksum
    from mgq.weights.checkpoint import TRAINING_KEY

    try:
        (length,) = struct.unpack_from("<Q", data)
        text = json.loads(data[8 : 8 + length])["__metadata__"][TRAINING_KEY]
        tensors = load(data)
        return save(tensors, {TRAINING_KEY: text, "sha256": checksum(text, tensors)})
    except (SafetensorError, ValueError, KeyError, TypeError, struct.error, RecursionError, AttributeError):
        return data


def _state_from_nothing(rng: random.Random) -> bytes:
    from safetensors.numpy import load, save

    from mgq.engine.runs.training_state import checksum
    from mgq.weights.checkpoint import TRAINING_KEY

    (whole,) = _states()
    (length,) = struct.unpack_from("<Q", whole)
    body = json.loads(json.loads(whole[8 : 8 + length])["__metadata__"][TRAINING_KEY])
    text, tensors = odd_json(body, rng).decode(), load(whole)
    return save(tensors, {TRAINING_KEY: text, "sha256": checksum(text, tensors)})


def _read_training_state(path: Path) -> object:
    from mgq.engine.runs.training_state import read_training_state
    from mgq.engine.training.recipe import restore_recipe
    from mgq.engine.training.resumption import info_of_progress

    state = read_training_state(path)
    return info_of_progress(state.progress, restore_recipe(state.recipe, str(path)), path)


def _recipes() -> Sequence[bytes]:
    import tomli_w

    return [tomli_w.dumps(_recipe()).encode(), b"lr = 0.1\nmilestones = [1, 2.5]\noptions = {width = 0.5}\n"]


def _recipe_from_nothing(rng: random.Random) -> bytes:
    depth = rng.choice((10, 1000, 30_000))
    deep = (b"[" * depth, b"a." * depth + b"a = 1", b"x = " + b"[" * depth + b"]" * depth, b"x = " + b"{a=" * depth)
    lines = [f"{key} = {rng.choice(_TOML_VALUES)}" for key in _recipe() if rng.random() < 0.3]
    return rng.choice((*deep, b"\n".join(line.encode() for line in lines), b"\n".join(line.encode() for line in lines)))


_TOML_VALUES = (
    "0",
    "-1",
    "1e400",
    "nan",
    "inf",
    "9" * 300,
    "9" * 5000,
    '"\\u001b[31m"',
    "[1, nan]",
    "[[]]",
    "{}",
    "true",
)


def _read_recipe(path: Path) -> object:
    from mgq.engine.training.recipe import Recipe, read_changes

    return Recipe(**{**_recipe(), **read_changes(path)})


def _ranges() -> Sequence[bytes]:
    from mgq.quantization.activation_ranges import ActivationRanges

    found = ActivationRanges(
        "resnet18", "mse", "0" * 64, {"a": 1}, {"stem": (-1.0, 2.0)}, {"stem": (0.0, 1.0)}, {"stem": (0.5, 1.5)}
    )
    return [found.to_json().encode()]


def _read_ranges(path: Path) -> object:
    from mgq.quantization.activation_ranges import read_ranges

    return read_ranges(path)


_ENTRY = {"epoch": 1, "loss": 0.5, "top1": 50.0, "note": "words", "val_loss": None}


def _metrics() -> Sequence[bytes]:
    return [b"".join(json.dumps({**_ENTRY, "epoch": i}).encode() + b"\n" for i in range(1, 4))]


def _read_metrics(path: Path) -> object:
    from mgq.engine.runs.curves import write_curves
    from mgq.engine.runs.run_folder import read_metrics

    found = read_metrics(path)
    if hash(path.stat().st_size) % 50 == 0:  # drawing takes a hundred times as long as reading
        write_curves(path.with_suffix(".png"), found, "title")
    return found


# ---- pictures ----


def _encoded(suffixes: Sequence[str]) -> Callable[[], Sequence[bytes]]:
    @cache
    def made() -> Sequence[bytes]:
        import numpy as np
        from PIL import Image

        pixels = (np.arange(24 * 20 * 4) % 251).astype(np.uint8).reshape(24, 20, 4)
        images = {mode: Image.fromarray(pixels).convert(mode) for mode in ("RGB", "RGBA", "L", "P", "CMYK", "1")}
        found: list[bytes] = []
        for suffix, mode, options in _VARIANTS:
            if suffix in suffixes:
                file = io.BytesIO()
                more = {"append_images": [images[mode]] * 2, "save_all": True} if options.get("animated") else options
                images[mode].save(file, suffix, **more)
                found.append(file.getvalue())
        return found

    return made


_EXIF = b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0"
_VARIANTS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    *(("JPEG", "RGB", {}), ("JPEG", "L", {"progressive": True}), ("JPEG", "CMYK", {})),
    ("AVIF", "RGB", {"exif": _EXIF}),
    ("AVIF", "RGBA", {"animated": True}),
    ("JPEG2000", "RGB", {}),
    ("JPEG2000", "L", {"no_jp2": True, "tile_size": (8, 8)}),
    ("JPEG2000", "RGBA", {"irreversible": True, "precinct_size": (16, 16)}),
    ("PPM", "RGB", {}),
    ("PPM", "1", {}),
    ("TGA", "RGBA", {"compression": "tga_rle"}),
    ("TGA", "P", {}),
    ("PCX", "P", {}),
    ("PCX", "RGB", {}),
    ("SGI", "RGBA", {}),
    ("QOI", "RGB", {}),
    ("JPEG", "RGB", {"exif": _EXIF}),
    *(("PNG", "RGBA", {}), ("PNG", "P", {}), ("PNG", "L", {"transparency": 3}), ("PNG", "1", {})),
    *(("WEBP", "RGB", {}), ("WEBP", "RGBA", {"lossless": True}), ("WEBP", "RGB", {"animated": True})),
    *(("GIF", "P", {}), ("GIF", "P", {"animated": True}), ("GIF", "P", {"transparency": 1})),
    *(("BMP", "RGB", {}), ("BMP", "P", {}), ("BMP", "RGBA", {}), ("BMP", "1", {})),
    *(("TIFF", "RGB", {}), ("TIFF", "RGBA", {"compression": "tiff_lzw"})),
    ("TIFF", "L", {"compression": "tiff_adobe_deflate"}),
    *(("TIFF", "1", {"compression": "group4"}), ("TIFF", "CMYK", {}), ("TIFF", "RGB", {"compression": "jpeg"})),
)  # fmt: skip


def png_sealed(data: bytes) -> bytes:
    """A PNG with the checksums of its chunks put right."""
    parts, at = [data[:8]], 8
    while at + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, at)
        body = data[at + 4 : at + 8 + length]
        parts.append(data[at : at + 4] + body + struct.pack(">I", zlib.crc32(body)))
        at += 12 + length
    return b"".join(parts) + data[at:]


def _read_image(path: Path) -> object:
    from mgq.data.decoding import read_image

    return read_image(path).shape


def _image(suffix: str, share: float, tokens: Sequence[bytes], **more: Any) -> Reader:
    return Reader(suffix, f".{suffix}", share, _encoded((suffix.upper(),)), _read_image, tokens, **more)


# ---- archives ----


@cache
def _tars() -> Sequence[bytes]:
    from tests.fakes import imagenet_files

    members = imagenet_files.train_members()
    sparse = tarfile.TarInfo("n01440764.tar")
    sparse.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "10"}
    long = tarfile.TarInfo("n" * 300)
    return [imagenet_files.inner_tar(part) for part in (members, members[:1], [(sparse, b"x" * 600)], [(long, b"")])]


def tar_sealed(data: bytes) -> bytes:
    """A tar with the checksums of its headers put right."""
    blocks = bytearray(data)
    for at in range(0, len(blocks) - 511, 512):
        if blocks[at + 257 : at + 262] == b"ustar":
            blocks[at + 148 : at + 156] = b" " * 8
            blocks[at + 148 : at + 156] = b"%06o\0 " % sum(blocks[at : at + 512])
    return bytes(blocks)


def _tar_from_nothing(rng: random.Random) -> bytes:
    """A tar with members of any kind under any name."""
    from tests.fakes import imagenet_files

    names = (
        "../out.JPEG",
        "/tmp/out.JPEG",
        "n01440764.tar",
        "n01440764.tar/../../x",
        "n01440764_1.JPEG",
        "",
        "a" * 200,
    )
    kinds = (tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE)
    members: list[tuple[str | tarfile.TarInfo, bytes]] = []
    for _ in range(rng.randrange(1, 5)):
        info = tarfile.TarInfo(rng.choice(names))
        info.type, info.linkname = rng.choice(kinds), rng.choice(("/etc/passwd", "../..", "n01440764"))
        members.append((info, b"data"))
    inner = imagenet_files.inner_tar(members)
    if rng.random() < 0.6:
        return inner
    return imagenet_files.inner_tar([("n01440764.tar", tar_sealed(damaged(inner, rng, (), [inner])))])


def _read_tar(path: Path) -> object:
    """Unpack it as the training archive, and look for files where none may be."""
    import shutil

    from mgq.data.imagenet_archives import TRAIN_ARCHIVE, unpack_split

    around = path.parent / "around"
    folder = around / "folder"
    shutil.rmtree(around, ignore_errors=True)
    folder.mkdir(parents=True)
    data = path.read_bytes()
    (folder / TRAIN_ARCHIVE).write_bytes(data)
    os.sync = lambda: None  # the disk is not what is tried here
    try:
        unpack_split(folder, "train", md5={TRAIN_ARCHIVE: hashlib.md5(data).hexdigest()})
    finally:
        links = [p for p in folder.rglob("*") if p.is_symlink()]
        known = {TRAIN_ARCHIVE, "train", ".train.part", ".train.lock"}
        beside, inside = {p.name for p in around.iterdir()}, {p.name for p in folder.iterdir()}
        if beside != {"folder"} or links or not inside <= known:
            raise AssertionError(f"files where none may be: {beside} {inside} {links}")
    return None


# ---- deployed files ----


@cache
def _graphs() -> Sequence[bytes]:
    """Files of networks as small as they can be with all of the zoo's kinds of layers."""
    from mgq.export.megengine.megengine_file import encode_file
    from mgq.export.megengine.writer import cast_input, graph_of
    from mgq.quantization.modes import Mode
    from tests.conftest import smooth_images
    from tests.fakes.runtime_network import SIZE, in_memory

    about = {"arch": "resnet18", "mode": "quantized", "classes": [str(i) for i in range(7)], "image_size": SIZE}
    about |= {"options": {}, "recipe": {}}
    found = []
    for mode in (Mode.QUANTIZED, Mode.NORMAL):
        fed = cast_input(smooth_images(1, SIZE, SIZE), "uint8")
        found.append(encode_file(graph_of(in_memory(mode), fed, "uint8"), about))
    return found


def graph_sealed(data: bytes) -> bytes:
    """The file with the sum that its content has."""
    from mgq.export.megengine.megengine_file import MAGIC

    body = data[: -len(MAGIC) - 32]
    return body + hashlib.sha256(body).digest() + MAGIC


def _graph_from_nothing(rng: random.Random) -> bytes:
    """A file with a sound sum whose graph has odd numbers, or which says odd things of itself."""
    from mgq.export.megengine.megengine_file import MAGIC

    data = rng.choice(_graphs())
    (length,) = struct.unpack("<Q", data[-48:-40])
    graph, text = bytearray(data[: -48 - length]), data[-48 - length : -48]
    if rng.random() < 0.3:
        text = odd_json(json.loads(text), rng)
    for _ in range(rng.choice((0, 1, 1, 2, 4))):
        at = 4 * rng.randrange(len(graph) // 4)
        values = (0, 1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 33, 64, 100, 2**16, 2**24, 2**31 - 1, 2**32 - 1)
        graph[at : at + 4] = struct.pack("<I", rng.choice(values))
        if rng.random() < 0.5:
            graph[rng.randrange(len(graph))] = rng.choice((0, 1, 13, 127, 255))
    body = bytes(graph) + text + struct.pack("<Q", len(text))
    return body + hashlib.sha256(body).digest() + MAGIC


def _read_megengine(path: Path) -> object:
    return _run_file(path, "lite")


def _run_file(path: Path, engine: str) -> object:
    """Open a deployed file as the command does, and ask it once."""
    import numpy as np

    from mgq.engine.classifier.deployed_files import open_file

    classifier = open_file(path, engine, threads=1)
    size = classifier.image_size
    return classifier.logits(np.zeros((1, 3, size, size), np.uint8)).shape


@cache
def _models() -> Sequence[bytes]:
    """ONNX files of a few operators each, float and with integers."""
    import numpy as np
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    about = {"arch": "resnet18", "mode": "quantized", "classes": ["a", "b", "c", "d"], "image_size": 32}
    about |= {"options": {}, "recipe": {}}
    rng = np.random.default_rng(0)
    found = []
    for integer in (False, True):
        weight = rng.normal(size=(4, 3, 3, 3)).astype(np.float32)
        constants = {
            "b": np.zeros(4, np.float32),
            "h": rng.normal(size=(4, 4)).astype(np.float32),
            "s": np.float32(0.5),
        }
        constants |= {
            "z": np.uint8(128),
            "shape": np.array([0, -1], np.int64),
            "low": np.float32(0),
            "high": np.float32(6),
        }
        nodes = [helper.make_node("DequantizeLinear", ["data", "s", "z"], ["x0"])]
        if integer:
            constants |= {"wq": np.clip(weight * 40, -127, 127).astype(np.int8), "ws": np.full(4, 0.02, np.float32)}
            constants["wz"] = np.zeros(4, np.int8)
            nodes.append(helper.make_node("DequantizeLinear", ["wq", "ws", "wz"], ["w"], axis=0))
        else:
            constants["w"] = weight
        nodes += [
            helper.make_node("Conv", ["x0", "w", "b"], ["x1"], kernel_shape=[3, 3], pads=[1, 1, 1, 1], strides=[2, 2]),
            helper.make_node("Clip", ["x1", "low", "high"], ["x2"]),
            helper.make_node("MaxPool", ["x2"], ["x3"], kernel_shape=[2, 2], strides=[2, 2]),
            helper.make_node("QuantizeLinear", ["x3", "s", "z"], ["x4"]),
            helper.make_node("DequantizeLinear", ["x4", "s", "z"], ["x5"]),
            helper.make_node("Transpose", ["x5"], ["x6"], perm=[0, 1, 3, 2]),
            helper.make_node("Add", ["x6", "x5"], ["x7"]),
            helper.make_node("GlobalAveragePool", ["x7"], ["x8"]),
            helper.make_node("Reshape", ["x8", "shape"], ["x9"]),
            helper.make_node("Gemm", ["x9", "h"], ["logits"], transB=1),
        ]
        graph = helper.make_graph(
            nodes,
            "net",
            [helper.make_tensor_value_info("data", TensorProto.UINT8, ["N", 3, 32, 32])],
            [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", 4])],
            [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        entry = model.metadata_props.add()
        entry.key, entry.value = "mgq", json.dumps(about)
        onnx.checker.check_model(model)
        found.append(model.SerializeToString())
    return found


_OPERATORS = (
    *(
        "Conv",
        "Relu",
        "Add",
        "Concat",
        "MatMul",
        "Gemm",
        "Loop",
        "If",
        "Scan",
        "ConstantOfShape",
        "Expand",
        "Tile",
        "Pad",
    ),
    *(
        "Range",
        "Resize",
        "NonZero",
        "Gather",
        "Slice",
        "Split",
        "Reshape",
        "Transpose",
        "QLinearConv",
        "QuantizeLinear",
    ),
    *(
        "DequantizeLinear",
        "ConvInteger",
        "MaxPool",
        "AveragePool",
        "Softmax",
        "Flatten",
        "Squeeze",
        "Unsqueeze",
        "Cast",
    ),
    *("BatchNormalization", "PRelu", "ReduceMean", "Shape", "Identity", "Dropout", "HardSwish", "MatMulInteger"),
)


def _model_from_nothing(rng: random.Random) -> bytes:
    """A model whose messages are sound and whose content is not."""
    import onnx

    model = onnx.ModelProto.FromString(rng.choice(_models()))
    graph = model.graph
    for _ in range(rng.choice((1, 1, 2, 3, 5))):
        node, tensor = rng.choice(graph.node), rng.choice(graph.initializer)
        names = [
            *(t.name for t in graph.initializer),
            *(o for n in graph.node for o in n.output),
            "data",
            "",
            "missing",
        ]
        change = rng.randrange(13)
        if change == 0:
            node.op_type = rng.choice(_OPERATORS)
        elif change == 1 and node.input:
            node.input[rng.randrange(len(node.input))] = rng.choice(names)
        elif change == 2:
            node.input.append(rng.choice(names))
        elif change == 3 and node.attribute:
            attribute = rng.choice(node.attribute)
            attribute.i = rng.choice((0, 1, -1, 2, 1000, 2**31, -(2**63)))
            for at in range(len(attribute.ints)):
                attribute.ints[at] = rng.choice((0, 1, 2, 3, 7, -1, 33, 4096, 10**6, 2**62))
        elif change == 4 and tensor.dims:
            tensor.dims[rng.randrange(len(tensor.dims))] = rng.choice((0, 1, 2, 3, 4, -1, 10**6, 2**40))
        elif change == 5:
            tensor.data_type = rng.randrange(24)
        elif change == 6:
            tensor.raw_data = bytes(rng.randrange(256) for _ in range(len(tensor.raw_data)))
        elif change == 7:
            tensor.data_location = 1
            entry = tensor.external_data.add()
            entry.key, entry.value = "location", rng.choice(("../../etc/passwd", "/etc/passwd", "beside"))
        elif change == 8:
            axis = rng.choice(graph.input[0].type.tensor_type.shape.dim)
            axis.dim_value = rng.choice((0, 1, 3, 32, 33, 4096, 10**9, -1))
        elif change == 9:
            model.opset_import[0].version = rng.choice((1, 7, 11, 13, 18, 21, 24, 1000, -1))
        elif change == 10:
            about = model.metadata_props[0]
            about.value = odd_json(json.loads(about.value), rng).decode() if about.value.startswith("{") else "{}"
        elif change == 11:
            graph.node.append(graph.node[rng.randrange(len(graph.node))])
            graph.node[-1].output[0] = "more"
        elif len(graph.node) > 1:
            del graph.node[rng.randrange(len(graph.node))]
    return bytes(model.SerializeToString())


def _read_onnxruntime(path: Path) -> object:
    return _run_file(path, "onnxruntime")


def _read_openvino(path: Path) -> object:
    return _run_file(path, "openvino")


READERS: tuple[Reader, ...] = (
    Reader("pickle", ".pkl", 15, _pickles, _read_state, _PICKLE_TOKENS, forged=_pickle_from_nothing),
    Reader("torch zip", ".pth", 8, _zips, _read_state, _PICKLE_TOKENS, forged=_zip_from_nothing),
    Reader("torch legacy", ".pth", 8, _legacies, _read_state, _PICKLE_TOKENS),
    Reader(
        "of other programs",
        ".pth",
        8,
        _of_other_programs,
        _read_of_other_programs,
        _PICKLE_TOKENS,
        forged=partial(_zip_from_nothing, beside=True),
    ),
    Reader(
        "safetensors",
        ".safetensors",
        8,
        _safetensors,
        _read_state,
        (b'"BF16"', b'"F8_E4M3"', b"{", b"}"),
        forged=_safetensors_from_nothing,
    ),
    Reader("checkpoint", ".safetensors", 1, _checkpoints, _read_checkpoint, (b"{",), forged=_checkpoint_from_nothing),
    Reader(
        "training state", ".safetensors", 6, _states, _read_training_state, (b"{",), _state_sealed, _state_from_nothing
    ),
    Reader(
        "recipe",
        ".toml",
        5,
        _recipes,
        _read_recipe,
        (b"[", b"{", b"=", b'"""', b"\\u0000"),
        forged=_recipe_from_nothing,
    ),
    Reader(
        "ranges",
        ".json",
        5,
        _ranges,
        _read_ranges,
        (b"[", b"{", b"NaN", b"1e999"),
        forged=lambda rng: odd_json(json.loads(_ranges()[0]), rng),
    ),
    Reader(
        "metrics",
        ".jsonl",
        5,
        _metrics,
        _read_metrics,
        (b"[", b"{", b"\n", b"NaN"),
        forged=lambda rng: b"\n".join(json.dumps(other_json(_ENTRY, rng)).encode() for _ in range(3)) + b"\n",
    ),
    _image(
        "jpeg",
        5,
        (b"\xff\xd8", b"\xff\xd9", b"\xff\xda", b"\xff\xc0", b"\xff\xc2", b"\xff\xc4", b"\xff\xdb", b"\xff\xdd"),
    ),
    _image("png", 5, (b"IHDR", b"IDAT", b"PLTE", b"tRNS", b"IEND", b"acTL", b"iCCP", b"eXIf"), sealed=png_sealed),
    _image("webp", 5, (b"VP8 ", b"VP8L", b"VP8X", b"ANIM", b"ANMF", b"ALPH", b"EXIF", b"ICCP")),
    _image("gif", 5, (b"\x21\xf9\x04", b"\x2c", b"\x3b", b"\x21\xff\x0bNETSCAPE2.0")),
    _image("bmp", 4, (b"\x28\0\0\0", b"\x7c\0\0\0", b"\x0c\0\0\0", b"\x01\0", b"\x04\0\0\0")),
    _image("tiff", 5, (b"\x00\x01\x03\0", b"\x11\x01\x04\0", b"\x17\x01\x04\0", b"\x42\x01\x04\0", b"\x03\x01\x03\0")),
    _image("avif", 4, (b"ispe", b"av1C", b"iloc", b"mdat", b"irot", b"grid", b"stco", b"\x0a\x0b", b"\x12\0")),
    _image("jpeg2000", 4, (b"\xff\x51", b"\xff\x52", b"\xff\x53", b"\xff\x90", b"\xff\x93", b"pclr", b"cdef")),
    _image("ppm", 2, (b"P1", b"P3", b"P7\n", b"#", b"WIDTH ", b"DEPTH ", b"\nENDHDR\n", b" 65535\n", b" 999999999 ")),
    _image("tga", 2, (b"\0\0\x02", b"\x01\x01\x09", b"\0\0\x0a", b"\x20\x08", b"\x18\x20")),
    _image("pcx", 1, (b"\x0a\x05\x01\x08", b"\x0a\x03\x01\x01", b"\x0c", b"\xff\xff")),
    _image("sgi", 1, (b"\x01\xda\x01\x01", b"\x01\xda\0\x02", b"\0\x03", b"\xff\xff")),
    _image("qoi", 1, (b"qoif", b"\xfe", b"\xff", b"\xc0", b"\0\0\0\x01")),
    Reader(
        "imagenet tar",
        ".tar",
        2,
        _tars,
        _read_tar,
        (b"../", b"/", b"\x80\0\0\0", b"2", b"x", b"L"),
        tar_sealed,
        _tar_from_nothing,
    ),
    Reader(".megengine", ".megengine", 3, _graphs, _read_megengine, (), graph_sealed, _graph_from_nothing),
    Reader(
        "onnx, ONNX Runtime", ".onnx", 2, _models, _read_onnxruntime, (b"Loop", b"\x1a\x00"), forged=_model_from_nothing
    ),
    Reader("onnx, OpenVINO", ".onnx", 1, _models, _read_openvino, (b"Loop", b"\x1a\x00"), forged=_model_from_nothing),
)
"""All readers, the shares in percent or so: slow ones get fewer inputs."""


def reader_called(name: str) -> Reader:
    return next(reader for reader in READERS if reader.name == name)

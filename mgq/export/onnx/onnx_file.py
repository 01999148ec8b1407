"""ONNX files as the engines that run them take them: checked before an engine sees them."""

from __future__ import annotations

import hashlib
import importlib
import json
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mgq.errors import InputError, printable
from mgq.export.onnx.float_input import PIXEL_ZERO, PIXELS, FloatInput, float_input_in
from mgq.io.limited_io import bytes_of, identify_stand_in, object_in
from mgq.io.private_cache import cache_folder, read_private, write_private
from mgq.machine import mute_stderr

INTEGER_OPERATORS = {"QuantizeLinear", "DequantizeLinear", "QLinearConv", "QLinearMatMul", "ConvInteger"}
MOST_BYTES = 1 << 28
"""Of a file of a classifier."""
FACTS = ("input", "type", "shape", "output", "about", "quantized", "classes")
"""What is remembered of a file that was checked."""
METADATA = "mgq"
"""The key of what mgq writes into a file's metadata, as JSON."""


@dataclass(frozen=True)
class OnnxFile:
    """What is known of an ONNX file: ``input`` and ``output`` are names, ``shape`` (N, 3, H, W) is that of the pictures
    it is run on, with None where any will do, ``type`` is that of ONNX, such as ``uint8`` or ``float``. ``about`` is
    what mgq wrote into it, empty in others. ``quantized``: whether there are integers to compute with. ``classes`` is
    how many numbers an answer has.
    """

    path: Path
    content: bytes = field(repr=False)
    input: str
    type: str
    shape: tuple[int | None, ...]
    output: str
    about: dict[str, Any] = field(repr=False)
    quantized: bool = False
    classes: int = 0

    @cached_property
    def kept_input(self) -> FloatInput | None:
        """What it is fed, where it has the input of the file that its network was imported from."""
        kept = float_input_in(self.about)
        return kept if kept is not None and kept.takes_pixels == (self.type == PIXELS) else None

    def to_input(self, batch: npt.NDArray[np.uint8]) -> npt.NDArray[Any]:
        """``batch``, pixels (N, 3, H, W) in BGR, as the file takes it: so, minus 128 in float32, or as it says."""
        kept = self.kept_input
        if kept is not None:
            return kept.to_input(batch)
        return batch if self.type == PIXELS else batch.astype(np.float32) - PIXEL_ZERO

    def refuse_other_shape(self, shape: tuple[int, ...]) -> None:
        """Raises InputError where a batch of ``shape`` does not fit."""
        fits = len(shape) == len(self.shape) and all(
            wanted is None or wanted == has for wanted, has in zip(self.shape, shape, strict=True)
        )
        if not fits:
            wanted = "x".join("N" if axis is None else str(axis) for axis in self.shape)
            raise InputError(
                f"{printable(self.path)} takes pictures of shape {wanted}, not {'x'.join(map(str, shape))}"
            )


def read_onnx(path: Path) -> OnnxFile:
    """Raises InputError where ``path`` is missing or no whole ONNX file, is no classifier of pictures, holds more than
    one needs (see :mod:`mgq.export.onnx.guard`), or where the package that reads it is not installed."""
    content = read_content(path)
    return find_earlier_check(path, content) or check_now(path, content)


def check_now(path: Path, content: bytes) -> OnnxFile:
    """The same, remembered: the check takes longer than to run the network on a few pictures."""
    found = parse_onnx(path, content)
    facts = {name: getattr(found, name) for name in FACTS}
    write_private(place_of(content), json.dumps(facts).encode())
    return found


def find_earlier_check(path: Path, content: bytes) -> OnnxFile | None:
    """What this code found in a file of the same ``content``; None where it has seen none."""
    known_facts = read_private(place_of(content))
    if known_facts is None:
        return None
    facts = object_in(known_facts)
    return OnnxFile(path, content, **{**facts, "shape": tuple(facts["shape"])})


def place_of(content: bytes) -> Path:
    """Where it is kept what was found in a file of this ``content``, by this version of the code that looks."""
    digest = hashlib.sha256(content).hexdigest()
    return cache_folder() / "checked" / f"{hashlib.sha256((digest + own_code()).encode()).hexdigest()[:40]}.json"


@cache
def own_code() -> str:
    """A hash of the code that checks files."""
    sources = (Path(__file__).with_name(name).read_bytes() for name in ("guard.py", "onnx_file.py", "float_input.py"))
    return hashlib.sha256(b"".join(sources)).hexdigest()


def read_content(path: Path) -> bytes:
    """Raises InputError where ``path`` cannot be read, is larger than a file of a classifier, or a failed download."""
    try:
        data = bytes_of(path, MOST_BYTES)
    except OSError as error:
        raise InputError(f"cannot read {printable(path)}: {error.strerror}; check the path") from None
    if stand_in := identify_stand_in(data):
        raise InputError(f"{printable(path)} {stand_in}")
    return data


def parse_onnx(path: Path, content: bytes) -> OnnxFile:
    """The ``content`` of the file at ``path``. Raises as :func:`read_onnx` does."""
    from mgq.export.onnx.guard import StrangeModelError, output_shapes

    name = printable(path)
    onnx = import_package("onnx")
    try:
        model = onnx.load_from_string(content)
        answers = output_shapes(model)
    except StrangeModelError as error:
        raise InputError(f"{name} {error}") from None
    except Exception as error:
        what = str(error).strip().partition("\n")[0]
        raise InputError(f"{name} is damaged, or is no ONNX file ({printable(what)[:200]}): write it again") from None
    constants = {initializer.name for initializer in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in constants]
    if len(inputs) != 1 or not model.graph.output:
        raise InputError(f"{name} does not take one batch of pictures and give an answer: give a classifier")
    tensor = inputs[0].type.tensor_type
    shape = tuple(int(axis.dim_value) or None for axis in tensor.shape.dim)
    about = read_metadata(next((entry.value for entry in model.metadata_props if entry.key == METADATA), None))
    kept = float_input_in(about)
    if kept is not None and kept.name == inputs[0].name and kept.shape == shape:
        shape = (shape[0], 3, *kept.image[1:])
    if len(shape) != 4 or shape[1] not in (3, None):
        raise InputError(f"{name} does not take pictures (N, 3, H, W): give a classifier of pictures")
    output = model.graph.output[0].name
    answer = answers[output]
    if len(answer) != 2 or shape[0] not in (None, answer[0]):
        raise InputError(f"{name} does not answer with one number for each class: give a classifier of pictures")
    kind = onnx.TensorProto.DataType.Name(tensor.elem_type).lower()
    quantized = any(is_of_integers(node, inputs[0].name) for node in model.graph.node)
    return OnnxFile(path, content, inputs[0].name, kind, shape, output, about, quantized, answer[1])


def is_of_integers(node: Any, pixels: str) -> bool:
    """Whether ``node`` is one of a quantized network: to take ``pixels`` for floats is what float networks do, too."""
    return node.op_type in INTEGER_OPERATORS and not (node.op_type == "DequantizeLinear" and node.input[0] == pixels)


def read_metadata(about: str | None) -> dict[str, Any]:
    """What mgq wrote into the file; empty where another program wrote it, or that is damaged."""
    try:
        return object_in(about) if about is not None else {}
    except ValueError:
        return {}


def import_package(package: str) -> Any:
    """Raises InputError where ``package`` is not installed, or fails."""
    try:
        with mute_stderr():  # OpenVINO's import makes MegEngine's library complain that there is no GPU
            return importlib.import_module(package)
    except ImportError as error:
        raise InputError(f"{package} cannot be imported ({error}): pip install 'mgq[deploy]'") from None

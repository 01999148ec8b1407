"""Formats of deployed files and their inputs. Importing this imports nothing heavy."""

from __future__ import annotations

from pathlib import Path

from mgq.errors import InputError, no_such, printable
from mgq.quantization.option_names import ANY_ENGINE, MEGENGINE, Mode

SUFFIXES = {"megengine": ".megengine", "onnx": ".onnx", "native": ".so"}
"""Formats of files, and how their names end."""
INPUTS = ("uint8", "int8", "float32")


def format_of(path: Path | None) -> str | None:
    """The format by the suffix of ``path``, upper or lower case; None for any other suffix."""
    if path is None:
        return None
    return next((name for name, suffix in SUFFIXES.items() if path.suffix.lower() == suffix), None)


def find_format(path: Path | None, wanted: str | None) -> str | None:
    """The format of a file as ``wanted``, else as ``path`` ends; None where neither is given.

    Raises InputError for an unknown format, and where ``path`` says none or another one.
    """
    by_name = format_of(path)
    if wanted is not None and wanted not in SUFFIXES:
        raise no_such("format", wanted, SUFFIXES)
    if wanted and by_name and wanted != by_name:
        raise InputError(f"{printable(path)} is no name for format {wanted}: let it end in {SUFFIXES[wanted]}")
    if path is not None and wanted is None and by_name is None:
        raise InputError(f"{printable(path)} does not say its format: let it end in {' or '.join(SUFFIXES.values())}")
    return wanted or by_name


def refuse_format(kind: str, mode: Mode, target: str | None, is_imported: bool) -> None:
    """Raise InputError where a file of the format ``kind`` cannot hold a network in ``mode``, quantized for ``target``;
    None where that is not known."""
    if kind == "megengine" and target not in (None, MEGENGINE):
        raise InputError(
            f"MegEngine cannot run what was quantized for the target {target}: let the file be .onnx (--format onnx), "
            "or take another engine"
        )
    if kind == "megengine" and mode is Mode.QAT:
        raise InputError(
            "MegEngine's files are float or int8, not fake-quantized: pass -m quantized, the integers that mode qat "
            "simulates"
        )
    if kind == "megengine" and is_imported:
        raise InputError("MegEngine's files are for networks of the zoo, not for imported ones: pass --format onnx")
    if kind == "native" and (mode is not Mode.QUANTIZED or target == MEGENGINE):
        its = f"target {target}" if mode is Mode.QUANTIZED else f"mode {mode.value}"
        raise InputError(f"a native library is int8 for the target onnx, not {its}: pass -m quantized --target onnx")


def refuse_words_of_other_formats(
    kind: str, input_type: str, batch: int | None, cpu: str | None, engine: str, keep_input: bool
) -> None:
    """Raise InputError for what a file of the format ``kind`` cannot be made for; words as for
    :func:`mgq.engine.classifier.dump.dump_classifier`."""
    if input_type not in INPUTS:
        raise no_such("input", input_type, INPUTS)
    if input_type != "uint8" and kind != "megengine":
        a_file = "an .onnx file" if kind == "onnx" else "a native library"
        raise InputError(f"{a_file} takes uint8 pixels, not {input_type}: leave --input out")
    if batch is None and kind == "megengine":
        raise InputError("--batch 0, any number of pictures, is for ONNX files: give at least 1, or pass --format onnx")
    if batch is not None and batch < 1:
        raise InputError(f"a batch holds at least 1 picture, not {batch}")
    if cpu is not None and kind != "native":
        raise InputError("--cpu is for native libraries: pass --format native, or leave it out")
    for option, is_given in (("--for", engine != ANY_ENGINE), ("--keep-input", keep_input)):
        if is_given and kind != "onnx":
            raise InputError(f"{option} is for ONNX files: pass --format onnx, or leave it out")

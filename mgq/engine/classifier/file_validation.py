"""Checks that a file of weights can be read, before anything slow starts."""

from __future__ import annotations

from pathlib import Path

from mgq.errors import InputError, printable
from mgq.export.formats import format_of


def validate_file(path: Path, key: str | None = None) -> None:
    """Read ``path`` as what it is called, and keep nothing. Needs no MegEngine.

    An ``.onnx`` file is left to whoever opens it: nothing slow comes before that, and to read and hash it twice takes
    as long as to run it. Raises InputError as the reader does: for a file that is missing or damaged, is something
    else, would run code, or has no network called ``key``.
    """
    suffix = path.suffix.lower()
    if key is not None and format_of(path) is not None:
        raise InputError(f"{printable(path)} is a finished file with one network: leave out --key")
    if suffix == ".onnx":
        return
    if suffix == ".so":
        from mgq.export.native.machine_code import refuse_other_files

        refuse_other_files(path)
    elif suffix == ".megengine":
        from mgq.export.megengine.megengine_file import read_megengine_file

        read_megengine_file(path)
    else:
        from mgq.weights.state_file import read_state

        read_state(path, key)

"""Whether a file of weights can be read, found out before anything slow is done for it."""

from __future__ import annotations

from pathlib import Path


def refuse_unreadable(path: Path) -> None:
    """Read ``path`` as what it is called, and keep nothing. Needs no MegEngine.

    Raises InputError as the reader does: for a file that is missing or damaged, is something else, or would run code.
    """
    suffix = path.suffix.lower()
    if suffix == ".onnx":
        from mgq.files.onnx_file import read_onnx

        read_onnx(path)
    elif suffix == ".megengine":
        from mgq.files.sealed import read_sealed

        read_sealed(path)
    else:
        from mgq.files.pickles import read_state

        read_state(path)

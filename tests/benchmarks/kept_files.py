"""Files of a network by several quantizers, in turns: ``python -m tests.benchmarks.kept_files FOLDER...``.

FOLDER is what ``imported_peers --keep`` leaves of a network. All its files have turns in their engines, in an order
that is drawn anew for each turn, one picture at a time on one thread, and OpenVINO knows of all that it is one.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Picture = npt.NDArray[Any]
Run = Callable[[Picture], npt.NDArray[np.float32]]

FLOAT = "float"
"""What the file itself, which all are compared with, is called among quantizers."""
LIST, PICTURE = "contenders.json", "picture.npz"
WARM_UP = 5


@dataclass(frozen=True)
class Contender:
    """The file ``path`` by ``quantizer`` in ``engine``. ``takes_pixels``: it is fed pixels, uint8 (1, 3, H, W), else
    what the float file is fed."""

    quantizer: str
    engine: str
    path: Path
    takes_pixels: bool = False

    def load(self) -> Run:
        return ENGINES[self.engine](self.path)


@dataclass(frozen=True)
class Fed:
    """A picture as ``pixels``, and as the float file takes it."""

    pixels: Picture
    floats: Picture

    def to(self, contender: Contender) -> Picture:
        return self.pixels if contender.takes_pixels else self.floats


@dataclass(frozen=True)
class Speed:
    """``milliseconds`` for a picture, the middle of all turns, and ``faster``: the middle of float's in the same engine
    / these, turn by turn, None where it does not run float."""

    milliseconds: float
    faster: float | None


def in_openvino(path: Path) -> Run:
    from mgq.export.onnx.onnx_file import import_package
    from mgq.runtime.openvino import open_core, settings_for

    core = open_core(import_package("openvino").Core)
    model = core.read_model(str(path))
    shape = model.input(0).partial_shape
    if shape.is_dynamic:
        model.reshape([1, *list(shape)[1:]])
    request = core.compile_model(model, "CPU", settings_for(1)).create_infer_request()
    return lambda fed: request.infer({0: fed}, share_inputs=True, share_outputs=False)[0]


def in_onnxruntime(path: Path) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda fed: session.run(None, {name: fed})[0]


def in_native(path: Path) -> Run:
    from mgq.runtime.native import NativeRuntime

    return NativeRuntime(path, 1).run


ENGINES: dict[str, Callable[[Path], Run]] = {
    "OpenVINO": in_openvino,
    "ONNX Runtime": in_onnxruntime,
    "native": in_native,
}


# ---- a folder of them ----


def write_list(folder: Path, contenders: Sequence[Contender], fed: Fed) -> None:
    """Write to ``folder`` which files they are; paths of those inside begin there, so that it can be moved."""
    entries = [asdict(own) | {"path": str(path_from(folder, own.path))} for own in contenders]
    (folder / LIST).write_text(json.dumps(entries, indent=1) + "\n")
    np.savez(folder / PICTURE, pixels=fed.pixels, floats=fed.floats)


def path_from(folder: Path, path: Path) -> Path:
    return path.relative_to(folder) if path.is_relative_to(folder) else path.absolute()


def read_list(folder: Path) -> tuple[list[Contender], Fed]:
    contenders = [Contender(**entry) for entry in json.loads((folder / LIST).read_text())]
    with np.load(folder / PICTURE) as picture:
        fed = Fed(picture["pixels"], picture["floats"])
    return [replace(own, path=folder / own.path) for own in contenders], fed


# ---- turns ----


def speeds_of(contenders: Sequence[Contender], fed: Fed, seconds: float) -> list[Speed]:
    """How soon each of ``contenders`` has answered, of turns that all have for so many seconds."""
    taken = take_turns([own.load() for own in contenders], [fed.to(own) for own in contenders], seconds)
    floats = {own.engine: turns for own, turns in zip(contenders, taken, strict=True) if own.quantizer == FLOAT}
    return [speed_of(turns, floats.get(own.engine)) for own, turns in zip(contenders, taken, strict=True)]


def speed_of(turns: Sequence[float], floats: Sequence[float] | None) -> Speed:
    if floats is None:
        return Speed(statistics.median(turns), None)
    return Speed(
        statistics.median(turns), statistics.median(first / own for first, own in zip(floats, turns, strict=True))
    )


def take_turns(runs: Sequence[Run], pictures: Sequence[Picture], seconds: float) -> list[list[float]]:
    """The milliseconds of each turn of each of ``runs``."""
    for run, picture in zip(runs, pictures, strict=True):
        for _ in range(WARM_UP):
            run(picture)
    taken: list[list[float]] = [[] for _ in runs]
    order, drawn = list(range(len(runs))), random.Random(0)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        drawn.shuffle(order)
        for place in order:
            start = time.perf_counter()
            runs[place](pictures[place])
            taken[place].append((time.perf_counter() - start) * 1e3)
    return taken


def speed_cells(speed: Speed) -> tuple[str, str]:
    return f"{speed.milliseconds:.2f}", "" if speed.faster is None else f"{speed.faster:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--seconds", type=float, default=10, help="for the turns of all files of a network")
    parser.add_argument("--rows", type=Path, help="a line of JSON for each file is appended to this one")
    options = parser.parse_args()
    from mgq.bench.tables import markdown_table

    rows = []
    for folder in options.folders:
        contenders, fed = read_list(folder)
        for own, speed in zip(contenders, speeds_of(contenders, fed, options.seconds), strict=True):
            who = {"network": folder.name, "quantizer": own.quantizer, "engine": own.engine}
            rows.append((*who.values(), *speed_cells(speed)))
            sys.stderr.write("  ".join(rows[-1]) + "\n")
            if options.rows is not None:
                append_row(options.rows, who | asdict(speed))
    sys.stdout.write(markdown_table(("network", "quantizer", "engine", "ms", "float / int8"), rows, left=3) + "\n")


def append_row(path: Path, row: dict[str, Any]) -> None:
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()

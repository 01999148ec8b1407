"""How long do whole commands take, beside the least that does the same? ``python -m tests.benchmarks.start [ROUNDS]``

Each round runs every command once, in a shuffled order, so that what else the machine does falls on all alike. Printed
are the medians of wall-clock seconds, processor seconds and peak memory, and their ratios to the yardstick: medians of
the ratios within a round. The file cache is warm, and so is mgq's own: the first run of a file, which checks it, is a
row of its own. Python's bytecode of all packages lies ready, as pip leaves it: where it may not be written, each start
compiles some hundred modules, and numpy alone takes longer than everything else.
"""

from __future__ import annotations

import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.fakes.places import ROOT

ROUNDS = 15
CAT = ROOT / "assets" / "cat.jpg"
MGQ = str(Path(sys.executable).with_name("mgq"))
LEAST = """
import sys
import numpy as np
import onnxruntime
from PIL import Image
picture = Image.open(sys.argv[2]).convert("RGB")
scale = 256 / min(picture.size)
picture = picture.resize((round(picture.width * scale), round(picture.height * scale)), Image.BICUBIC)
left, top = (picture.width - 224) // 2, (picture.height - 224) // 2
pixels = np.asarray(picture.crop((left, top, left + 224, top + 224)))[:, :, ::-1].transpose(2, 0, 1)[None]
session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
print(session.run(None, {session.get_inputs()[0].name: np.ascontiguousarray(pixels)})[0].argmax())
"""
BARE = """
import typer
app = typer.Typer()
@app.command()
def one(name: str) -> None: "Say one thing."
@app.command()
def other(name: str) -> None: "Say another thing."
app()
"""


@dataclass(frozen=True)
class Cost:
    """Of one process: seconds on the wall and of the processor, and the most memory it had, in MB."""

    wall: float
    cpu: float
    memory: float


def cost_of(command: Sequence[str], environment: Mapping[str, str]) -> Cost:
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment)
    _, status, used = os.wait4(process.pid, 0)
    wall = time.perf_counter() - start
    if status:
        raise SystemExit(f"{command} failed")
    return Cost(wall, used.ru_utime + used.ru_stime, used.ru_maxrss / 1024)


def files_in(folder: Path) -> tuple[Path, Path]:
    """The built-in network as an ONNX file and as a native library."""
    paths = folder / "net.onnx", folder / "net.so"
    for path in paths:
        subprocess.run([MGQ, "dump", "--target", "onnx", "--check", "none", "-o", str(path)], check=True, cwd=folder)
    return paths


def commands(folder: Path) -> dict[str, tuple[str, list[str]]]:
    """What is measured -> the yardstick that it is compared with, and the command."""
    network, library = files_in(folder)
    least = "script: ONNX Runtime and Pillow"
    return {
        least: (least, [sys.executable, "-c", LEAST, str(network), str(CAT)]),
        "mgq infer -c net.onnx cat.jpg": (least, [MGQ, "infer", "-c", str(network), str(CAT)]),
        "the same, for the first time": (least, [MGQ, "infer", "-c", str(network), str(CAT)]),
        "mgq infer -c net.so cat.jpg": (least, [MGQ, "infer", "-c", str(library), str(CAT)]),
        "mgq infer --engine native -c net.onnx cat.jpg": (
            least,
            [MGQ, "infer", "--engine", "native", "-c", str(network), str(CAT)],
        ),
        "mgq infer cat.jpg": (least, [MGQ, "infer", str(CAT)]),
        "typer program: --help": ("typer program: --help", [sys.executable, "-c", BARE, "--help"]),
        "mgq --help": ("typer program: --help", [MGQ, "--help"]),
    }


def with_bytecode(folder: Path) -> dict[str, str]:
    """The environment of all commands: they write bytecode, and what mgq keeps, into ``folder``."""
    places = {"MGQ_CACHE": "cache", "MGQ_NATIVE_CACHE": "native", "PYTHONPYCACHEPREFIX": "pyc"}
    whole = {**os.environ, **{name: str(folder / place) for name, place in places.items()}}
    return {name: value for name, value in whole.items() if name != "PYTHONDONTWRITEBYTECODE"}


def measured(folder: Path, rounds: int) -> dict[str, tuple[str, list[Cost]]]:
    found: dict[str, tuple[str, list[Cost]]] = {}
    kept = with_bytecode(folder)
    told = commands(folder)
    for name, (_, command) in told.items():
        cost_of(command, kept)  # which fills the caches
        found[name] = (told[name][0], [])
    names = list(told)
    for number in range(rounds):
        random.Random(number).shuffle(names)
        for name in names:
            environment = kept
            if name == "the same, for the first time":
                environment = {**kept, "MGQ_CACHE": str(folder / "new")}
                shutil.rmtree(folder / "new", ignore_errors=True)
            found[name][1].append(cost_of(told[name][1], environment))
        print(f"round {number + 1} of {rounds}", file=sys.stderr)
    return found


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else ROUNDS
    with tempfile.TemporaryDirectory() as name:
        found = measured(Path(name), rounds)
    print(f"{'':46s} {'wall':>16s} {'processor':>16s} {'memory':>16s}")
    for name, (yardstick, costs) in found.items():
        cells = []
        for what, unit in (("wall", "s"), ("cpu", "s"), ("memory", "MB")):
            values = [getattr(cost, what) for cost in costs]
            beside = [getattr(cost, what) for cost in found[yardstick][1]]
            ratio = statistics.median(one / other for one, other in zip(values, beside, strict=True))
            digits = 0 if unit == "MB" else 2
            cells.append(f"{statistics.median(values):.{digits}f} {unit} ({ratio:.2f})")
        print(f"{name:46s} " + " ".join(f"{cell:>16s}" for cell in cells))


if __name__ == "__main__":
    main()

"""Does all survive a kill? ``python -m tests.benchmarks.faults --kills 50 --seed 0``

Real ``mgq`` processes are ended by SIGKILL: every other one at a random moment of its work, the others as soon as a
half-written file shows up. After each kill every file that has its final name has to be readable; then the work is
taken up (``--resume``) or done again, and has to end with the same bits as work that nobody disturbed. Exits with 1
where it does not.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import cv2
import tomli

from mgq.cli.console import import_megengine
from mgq.engine.files import about_of
from mgq.engine.runs import read_metrics
from mgq.engine.training_state import read_training_state
from mgq.errors import MgqError
from mgq.files.onnx_file import read_onnx
from mgq.files.pickles import read_state

ARCH = "shufflenet_v1_x0_5_g3"
SMALL = ("-a", ARCH, "--image-size", "32", "--batch-size", "8", "--limit", "48", "--epochs", "2", "-w", "1")
FLOAT = "given/checkpoint.safetensors"
"""The float network that all but ``train`` begin with."""
DOWNLOADED = random.Random(0).randbytes(2_000_000)
CHUNK, PAUSE_S = 20_000, 0.02
FETCH = """
import sys
from pathlib import Path
from mgq.files.download import Source, download
download(Source(sys.argv[1], "weights.bin", int(sys.argv[2]), sys.argv[3]), Path("cache"))
"""
MGQ = (sys.executable, "-m", "mgq")


@dataclass(frozen=True)
class Work:
    """Something that is killed: its command, how it is taken up, what it makes, and how often it is killed."""

    name: str
    command: tuple[str, ...]
    product: str
    weight: int
    resumed: tuple[str, ...] = ()
    state: str = ""
    """The file without which it cannot be resumed, and begins anew."""

    def again(self, folder: Path) -> tuple[str, ...]:
        return self.resumed if self.resumed and (folder / self.state).exists() else self.command


@dataclass
class Tally:
    """What became of the kills of one work."""

    kills: int = 0
    too_late: int = 0
    resumed: int = 0
    same: int = 0
    unreadable: int = 0
    left_over: int = 0


def works(url: str) -> list[Work]:
    digits = hashlib.sha256(DOWNLOADED).hexdigest()
    run, qat = f"runs/{ARCH}.normal", f"runs/{ARCH}.qat"
    resume = ("--resume", "-a", ARCH, "-w", "1")
    last = "last.safetensors"
    train = (*MGQ, "train", *SMALL)
    further = (*MGQ, "qat", "-c", FLOAT, *SMALL)
    calibrate = (*MGQ, "calibrate", "-c", FLOAT, "--images", "16")
    dump = (*MGQ, "dump", "-c", "given/calibrated.safetensors")
    fetch = (sys.executable, "-c", FETCH, url, str(len(DOWNLOADED)), digits)
    made = "checkpoint.safetensors"
    return [
        Work("train", train, f"{run}/{made}", 4, (*MGQ, "train", *resume), f"{run}/{last}"),
        Work("qat", further, f"{qat}/{made}", 4, (*MGQ, "qat", *resume), f"{qat}/{last}"),
        Work("calibrate", calibrate, f"runs/{ARCH}.calibration/{made}", 3),
        Work("dump, MegEngine", (*dump, "-o", "out.megengine"), "out.megengine", 2),
        Work("dump, ONNX", (*dump, "--format", "onnx", "-o", "out.onnx"), "out.onnx", 2),
        Work("download", fetch, "cache/weights.bin", 2),
    ]


class Slowly(BaseHTTPRequestHandler):
    """Serves the same bytes a little at a time, from where it is asked to go on."""

    def do_GET(self) -> None:
        asked = self.headers.get("Range")
        first = int(asked.removeprefix("bytes=").removesuffix("-")) if asked else 0
        self.send_response(206 if asked else 200)
        self.send_header("ETag", '"one"')
        self.send_header("Content-Length", str(len(DOWNLOADED) - first))
        if asked:
            self.send_header("Content-Range", f"bytes {first}-{len(DOWNLOADED) - 1}/{len(DOWNLOADED)}")
        self.end_headers()
        try:
            for start in range(first, len(DOWNLOADED), CHUNK):
                self.wfile.write(DOWNLOADED[start : start + CHUNK])
                time.sleep(PAUSE_S)
        except ConnectionError:
            pass

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def served() -> Iterator[str]:
    """The address of the slow server."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Slowly)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}/weights.bin"
    server.shutdown()


def begun(command: Sequence[str], folder: Path) -> subprocess.Popen[bytes]:
    here = {**os.environ, "PYTHONPATH": str(Path.cwd())}
    log = (folder / "log.txt").open("ab")
    return subprocess.Popen(command, cwd=folder, stdout=log, stderr=log, env=here)


def done(command: Sequence[str], folder: Path) -> float:
    """Run ``command`` to its end; the seconds that it took. What goes wrong ends everything."""
    start = time.monotonic()
    if begun(command, folder).wait(600) != 0:
        sys.exit(f"{' '.join(command)} failed:\n{(folder / 'log.txt').read_text()}")
    return time.monotonic() - start


def killed(work: Work, folder: Path, after_s: float | None) -> bool:
    """Begin ``work`` and kill it ``after_s``, or where that is None, in the middle of writing a file; whether it was
    still at work."""
    child = begun(work.command, folder)
    end = None if after_s is None else time.monotonic() + after_s
    while child.poll() is None:
        if (end is None and half_written(folder)) or (end is not None and time.monotonic() > end):
            break
        time.sleep(0.001)
    child.kill()
    return child.wait() == -9


def half_written(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*.part") if path.name.startswith(".") or path.parent.name == "cache"]


READERS: dict[str, Callable[[Path], object]] = {
    "checkpoint.safetensors": read_state,
    "float.safetensors": read_state,
    "last.safetensors": read_training_state,
    "recipe.toml": lambda path: tomli.loads(path.read_text()),
    "metrics.jsonl": read_metrics,
    "curves.png": lambda path: cv2.imread(str(path)).shape,
    "out.megengine": about_of,
    "out.onnx": read_onnx,
    "weights.bin": lambda path: path.read_bytes() == DOWNLOADED or sys.exit("a download is another file"),
}


def unreadable(folder: Path) -> list[str]:
    """The files under their final names that their readers refuse."""
    found = []
    for path in folder.rglob("*"):
        reader = READERS.get(path.name)
        if reader is None or "given" in path.parts:
            continue
        try:
            reader(path)
        except (MgqError, ValueError, AttributeError, OSError) as error:
            found.append(f"{path.relative_to(folder)}: {error}")
    return found


def new_folder(root: Path, given: Path, number: int) -> Path:
    folder = root / str(number)
    folder.mkdir()
    if given.exists():
        shutil.copytree(given, folder / "given")
    return folder


def prepared(root: Path) -> Path:
    """A folder with a float network and a calibrated one."""
    made = root / "made"
    made.mkdir()
    done((*MGQ, "train", *SMALL), made)
    done((*MGQ, "calibrate", "--images", "16"), made)
    given = root / "given"
    given.mkdir()
    shutil.copy(made / f"runs/{ARCH}.normal/checkpoint.safetensors", root / FLOAT)
    shutil.copy(made / f"runs/{ARCH}.calibration/checkpoint.safetensors", given / "calibrated.safetensors")
    return given


def tallied(work: Work, kills: int, root: Path, given: Path, order: random.Random) -> Tally:
    whole = new_folder(root, given, 0)
    seconds = done(work.command, whole)
    expected = (whole / work.product).read_bytes()
    tally = Tally()
    for number in range(1, kills + 1):
        folder = new_folder(root, given, number)
        after_s = None if number % 2 else order.uniform(0.2, 0.95) * seconds
        tally.too_late += not killed(work, folder, after_s)
        tally.kills += 1
        bad = unreadable(folder)
        for line in bad:
            print(f"  unreadable after a kill: {line}", flush=True)
        tally.unreadable += len(bad)
        again = work.again(folder)
        tally.resumed += again is not work.command
        done(again, folder)
        tally.same += (folder / work.product).read_bytes() == expected
        tally.left_over += len(half_written(folder))
        shutil.rmtree(folder)
    shutil.rmtree(whole)
    return tally


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    wanted = parser.parse_args()
    import_megengine(debug=False)
    order = random.Random(wanted.seed)
    start = time.monotonic()
    sound, total = True, 0
    with tempfile.TemporaryDirectory(prefix="mgq-faults-") as name, served() as url:
        root = Path(name)
        given = prepared(root)
        every = works(url)
        weights = sum(work.weight for work in every)
        columns = ("kills", "too late", "resumed", "same bits", "unreadable", "left over")
        print(f"{'killed':18s}" + "".join(f"{column:>11s}" for column in columns), flush=True)
        for work in every:
            tally = tallied(work, -(-wanted.kills * work.weight // weights), root, given, order)
            total += tally.kills - tally.too_late
            sound &= tally.same == tally.kills and not tally.unreadable and not tally.left_over
            print(f"{work.name:18s}" + "".join(f"{count:11d}" for count in vars(tally).values()), flush=True)
    print(
        f"{total} kills in the middle of work (too late: it had ended before). Resumed: taken up where it was, the\n"
        "others begun anew. Left over: half-written files that are still there in the end.\n"
        f"Drawn pictures, {ARCH}, seed {wanted.seed}; {(time.monotonic() - start) / 60:.0f} minutes"
    )
    sys.exit(0 if sound else 1)


if __name__ == "__main__":
    main()

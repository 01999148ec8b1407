"""Does anything break when mgq is killed? ``python -m tests.benchmarks.faults --kills 50 --seed 0``

Kills real processes by SIGKILL: half of them as soon as a half-written file shows up or grows, the others at a random
moment of the length that the undisturbed command took. Then every file under a final name is opened with its reader.
The command is resumed, or started again where it left nothing to resume, and killed again up to ``--chain`` times;
then it may end, and has to leave the same bits as the undisturbed one. A download is a Python process of its own that
fetches from a slow server on this machine; the others are commands of mgq on drawn pictures. Exit code 1 where
anything broke.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

ARCH = "shufflenet_v1_x0_5_g3"
SMALL = ("-a", ARCH, "--image-size", "32", "--batch-size", "8", "--limit", "24", "--epochs", "2", "-w", "1")
START, RANGED = "start.safetensors", "calibrated.safetensors"
MAKERS = {START: "train", RANGED: "calibrate"}
LONGEST = 600.0  # seconds that a command may take; behind that it hangs
CONTENT = bytes(range(256)) * 4096
FETCH = """
import sys
from pathlib import Path
from mgq.io.download import Source, download
url, size = sys.argv[1], int(sys.argv[2])
download(Source(url, "weights.bin", size), Path("cache"))
"""


@dataclass(frozen=True)
class Command:
    """What is killed. ``made`` is the file that counts, ``resume`` the words to go on with where ``state`` is there."""

    name: str
    words: tuple[str, ...]
    made: str
    needs: tuple[str, ...] = ()
    resume: tuple[str, ...] = ()
    state: str = ""


@dataclass
class Count:
    """What came of one command."""

    kills: int = 0
    ends: int = 0
    same: int = 0
    unreadable: list[str] = field(default_factory=list)
    left: int = 0
    seconds: float = 0.0
    troubles: list[str] = field(default_factory=list)

    @property
    def fine(self) -> bool:
        return self.same == self.ends and not self.unreadable and not self.troubles


def of_mgq(*words: str) -> tuple[str, ...]:
    return (sys.executable, "-m", "mgq", *words)


def commands(url: str) -> list[Command]:
    trained, qat = f"runs/{ARCH}.normal", f"runs/{ARCH}.qat"
    calibrated = f"runs/{ARCH}.calibration/checkpoint.safetensors"
    again = ("--resume", "-a", ARCH)
    name, state = "checkpoint.safetensors", "last.safetensors"
    few = ("--images", "8", "--method", "min-max", "--limit", "8")
    into = ("dump", "-c", RANGED, "-o")
    return [
        Command(
            "train", of_mgq("train", *SMALL), f"{trained}/{name}", (), of_mgq("train", *again), f"{trained}/{state}"
        ),
        Command(
            "qat",
            of_mgq("qat", *SMALL, "-c", START),
            f"{qat}/{name}",
            (START,),
            of_mgq("qat", *again),
            f"{qat}/{state}",
        ),
        Command("calibrate", of_mgq("calibrate", "-c", START, *few), calibrated, (START,)),
        Command("dump megengine", of_mgq(*into, "net.megengine"), "net.megengine", (RANGED,)),
        Command("dump onnx", of_mgq(*into, "net.onnx", "--check", "none"), "net.onnx", (RANGED,)),
        Command("download", (sys.executable, "-c", FETCH, url, str(len(CONTENT))), "cache/weights.bin"),
    ]


@contextlib.contextmanager
def slow_server() -> Iterator[str]:
    """The address of a file that takes about two seconds to come, in any part that is asked for."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            asked = self.headers.get("Range")
            first = int(asked.removeprefix("bytes=").split("-")[0]) if asked else 0
            self.send_response(206 if asked else 200)
            if asked:
                self.send_header("Content-Range", f"bytes {first}-{len(CONTENT) - 1}/{len(CONTENT)}")
            self.send_header("Content-Length", str(len(CONTENT) - first))
            self.send_header("ETag", '"one"')
            self.end_headers()
            try:
                for start in range(first, len(CONTENT), 1 << 14):
                    self.wfile.write(CONTENT[start : start + (1 << 14)])
                    time.sleep(0.03)
            except OSError:  # whom we served was killed
                self.close_connection = True

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/weights.bin"
    finally:
        server.shutdown()
        server.server_close()


def started(words: Sequence[str], folder: Path) -> subprocess.Popen[bytes]:
    with (folder / "said.txt").open("wb") as said:
        return subprocess.Popen(words, cwd=folder, stdout=said, stderr=subprocess.STDOUT)


def parts_in(folder: Path) -> set[Path]:
    return set(folder.rglob("*.part"))


def sizes_in(folder: Path) -> set[tuple[Path, int]]:
    """The half-written files and their sizes in bytes; those that go away meanwhile are left out."""
    found = set()
    for path in parts_in(folder):
        with contextlib.suppress(FileNotFoundError):
            found.add((path, path.stat().st_size))
    return found


def readable(path: Path) -> bool:
    """Whether the reader of files of that name takes ``path``."""
    import cv2

    from mgq.engine.runs.training_state import read_training_state
    from mgq.engine.training.recipe import read_changes
    from mgq.errors import MgqError
    from mgq.export.megengine.megengine_file import read_megengine_file
    from mgq.export.onnx.onnx_file import read_onnx
    from mgq.zoo.weight_loading import read_weights

    try:
        if path.name == "last.safetensors":
            read_training_state(path)
        elif path.suffix == ".safetensors":
            read_weights(path)
        elif path.suffix == ".onnx":
            read_onnx(path)
        elif path.suffix == ".megengine":
            read_megengine_file(path)
        elif path.suffix == ".toml":
            read_changes(path)
        elif path.suffix == ".jsonl":
            return all(json.loads(line) for line in path.read_text().splitlines())
        elif path.suffix == ".png":
            return cv2.imread(str(path)) is not None
        elif path.suffix == ".bin":
            return path.read_bytes() == CONTENT
    except (MgqError, ValueError):
        return False
    return True


def unreadable_in(folder: Path) -> list[str]:
    files = (
        path
        for path in folder.rglob("*")
        if path.is_file() and not path.name.startswith(".") and path.suffix != ".part"
    )
    return [str(path.relative_to(folder)) for path in files if not readable(path)]


def next_words(command: Command, folder: Path) -> tuple[str, ...]:
    return command.resume if command.state and (folder / command.state).is_file() else command.words


def killed(command: Command, folder: Path, moment: float | None) -> bool:
    """Start ``command`` and kill it ``moment`` seconds later, or as soon as it writes; False where it ended before."""
    before = sizes_in(folder)
    child = started(next_words(command, folder), folder)
    end = time.monotonic() + (LONGEST if moment is None else moment)
    while child.poll() is None and time.monotonic() < end:
        if moment is None and sizes_in(folder) - before:
            break
        time.sleep(0.001)
    was_running = child.poll() is None
    child.kill()
    child.wait()
    return was_running


def ended(command: Command, folder: Path) -> str:
    """Let ``command`` end. What went wrong, or ''."""
    child = started(next_words(command, folder), folder)
    try:
        code = child.wait(LONGEST)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()
        return f"hangs for {LONGEST:.0f} s"
    return f"exit code {code}: {(folder / 'said.txt').read_text()[-300:]}" if code else ""


class Bench:
    """Folders of commands under ``root``, and what each command makes when nobody disturbs it."""

    def __init__(self, root: Path, all_commands: Sequence[Command]) -> None:
        self.root = root
        self.commands = {command.name: command for command in all_commands}
        self.counts = {command.name: Count() for command in all_commands}
        self._made: dict[str, bytes] = {}
        self._folders = 0

    def folder_for(self, command: Command) -> Path:
        """A new folder with what ``command`` needs."""
        self._folders += 1
        folder = self.root / str(self._folders)
        folder.mkdir()
        for name in command.needs:
            (folder / name).write_bytes(self.made_by(self.commands[MAKERS[name]]))
        return folder

    def made_by(self, command: Command) -> bytes:
        """The file that ``command`` ends with, undisturbed. Notes how long it takes."""
        if command.name not in self._made:
            folder = self.folder_for(command)
            began = time.monotonic()
            trouble = ended(command, folder)
            self.counts[command.name].seconds = time.monotonic() - began
            if trouble:
                raise SystemExit(f"{command.name}, undisturbed: {trouble}")
            self._made[command.name] = (folder / command.made).read_bytes()
            shutil.rmtree(folder)
        return self._made[command.name]


def one_round(command: Command, folder: Path, chain: int, wanted: bytes, rng: random.Random, count: Count) -> None:
    """Kill ``command`` up to ``chain`` times, then let it end."""
    for _ in range(chain):
        moment = None if rng.random() < 0.5 else rng.uniform(0, count.seconds)
        if not killed(command, folder, moment):
            break
        count.kills += 1
        count.unreadable += unreadable_in(folder)
    trouble = ended(command, folder)
    count.ends += 1
    count.unreadable += unreadable_in(folder)
    count.left += len(parts_in(folder))
    if trouble:
        count.troubles.append(trouble)
    elif (folder / command.made).read_bytes() == wanted:
        count.same += 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--chain", type=int, default=1, help="kills before a command may end")
    parser.add_argument("--only", nargs="+", help="names of commands, as the table has them; all by default")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no round later than this")
    given = parser.parse_args()
    rng, began = random.Random(given.seed), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mgq-faults-") as name, slow_server() as url:
        bench = Bench(Path(name), commands(url))
        counts = bench.counts
        for command in itertools.cycle(bench.commands[name] for name in given.only or bench.commands):
            left = given.kills - sum(count.kills for count in counts.values())
            if left <= 0 or time.monotonic() - began > given.seconds:
                break
            wanted, folder = bench.made_by(command), bench.folder_for(command)
            one_round(command, folder, min(given.chain, left), wanted, rng, counts[command.name])
            shutil.rmtree(folder)
            print(f"{command.name}: {counts[command.name]}", file=sys.stderr, flush=True)
    print_table(counts)
    if sum(count.kills for count in counts.values()) < given.kills:
        print(f"stopped by --seconds before {given.kills} kills")
    sys.exit(0 if all(count.fine for count in counts.values()) else 1)


def print_table(counts: dict[str, Count]) -> None:
    print(f"{'command':16}{'seconds':>8}{'kills':>7}{'ended':>7}{'same bits':>11}{'unreadable':>12}{'left-over':>11}")
    for name, count in counts.items():
        print(
            f"{name:16}{count.seconds:8.1f}{count.kills:7}{count.ends:7}{count.same:11}"
            f"{len(count.unreadable):12}{count.left:11}"
        )
    print(f"{'all':16}{'':8}{sum(count.kills for count in counts.values()):7}")
    for name, count in counts.items():
        for trouble in (*count.unreadable, *count.troubles):
            print(f"{name}: {trouble}")


if __name__ == "__main__":
    main()

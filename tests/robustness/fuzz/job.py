"""The whole job: workers are started, watched, ended where they hang, and started again behind what ended them."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.fakes.places import ROOT
from tests.robustness.fuzz.readers import READERS, reader_called
from tests.robustness.fuzz.worker import TOO_MUCH, is_fault, kept_input

HANG = 30.0
"""Seconds without a word from a worker. Reading takes milliseconds, but a busy machine may stand still for a while."""
START = 120.0
"""The same before its first word: it imports MegEngine and makes its first files."""


@dataclass
class Row:
    """What became of the inputs of one reader."""

    reader: str
    ways: Counter[str] = field(default_factory=Counter)
    slowest: float = 0.0
    memory: int = 0
    faults: list[str] = field(default_factory=list)

    def add(self, told: Mapping[str, Any], folder: Path) -> None:
        """Count an outcome; where it is a fault, its input lies in ``folder``."""
        how = "too much memory" if told["memory"] > TOO_MUCH else str(told["how"])
        self.ways[how] += 1
        self.slowest = max(self.slowest, told["seconds"])
        self.memory = max(self.memory, told["memory"])
        if is_fault(told):
            kept = kept_input(folder, self.reader, told["number"], reader_called(self.reader).suffix)
            self.faults.append(f"{how}: {kept}\n{told.get('why', '')}")


def plan_of(inputs: int, least: int, readers: Sequence[str] = ()) -> dict[str, int]:
    """How many inputs each reader gets of ``inputs`` in all, none less than ``least``."""
    chosen = [reader for reader in READERS if not readers or reader.name in readers]
    whole = sum(reader.share for reader in chosen)
    return {reader.name: max(least, round(inputs * reader.share / whole)) for reader in chosen}


def rows_of(
    plan: Mapping[str, int], seed: int, folder: Path, tell: Callable[[Row], None] = lambda row: None
) -> list[Row]:
    """What became of the inputs of ``plan`` (reader -> how many). ``tell`` gets each row when its reader is done."""
    waiting = [(name, 0, count) for name, count in plan.items()]
    rows = {name: Row(name) for name in plan}
    while waiting:
        work = [(name, seed, first, last) for name, first, last in waiting]
        with _worker(folder, work) as process:
            ended = _followed(process, rows, waiting, folder, tell)
        if ended is not None:
            name, number, _ = waiting[0]
            suffix = reader_called(name).suffix
            kept_input(folder, name, number, suffix).write_bytes((folder / f"input{suffix}").read_bytes())
            rows[name].add({"how": ended, "number": number, "seconds": 0.0, "memory": 0}, folder)
            _advance(waiting, number + 1, rows, tell)
    return list(rows.values())


def _advance(
    waiting: list[tuple[str, int, int]], number: int, rows: Mapping[str, Row], tell: Callable[[Row], None]
) -> None:
    """Note that the first reader that is ``waiting`` goes on with input ``number``, or is done."""
    name, _, last = waiting[0]
    waiting[0] = (name, number, last)
    if number >= last:
        waiting.pop(0)
        tell(rows[name])


@contextlib.contextmanager
def _worker(folder: Path, work: Sequence[tuple[str, int, int, int]]) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-m", "tests.robustness.fuzz.worker", str(folder), json.dumps(work)]
    environment = {**os.environ, "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT, env=environment
    ) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()


def _followed(
    process: subprocess.Popen[bytes],
    rows: Mapping[str, Row],
    waiting: list[tuple[str, int, int]],
    folder: Path,
    tell: Callable[[Row], None],
) -> str | None:
    """Take the worker's words until it ends; how that was, or None where all is done. ``waiting`` is what is left."""
    assert process.stdout is not None and process.stderr is not None
    selector = selectors.DefaultSelector()
    selector.register(process.stdout, selectors.EVENT_READ)
    rest, patience = b"", START
    while True:
        if not selector.select(patience):
            return "hang"
        chunk = os.read(process.stdout.fileno(), 1 << 16)
        if not chunk:
            break
        patience = HANG
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            told = json.loads(line)
            rows[told["reader"]].add(told, folder)
            _advance(waiting, told["number"] + 1, rows, tell)
    code = process.wait()
    if not waiting:
        return None
    if code < 0:
        return f"crash ({signal.Signals(-code).name})"
    raise RuntimeError(f"the worker failed: {process.stderr.read().decode(errors='replace')[-2000:]}")


def table_of(rows: Sequence[Row]) -> str:
    heads = ("reader", "inputs", "refused", "accepted", "crashes", "hangs", "tracebacks", "slowest s", "memory MB")
    lines: list[tuple[str, ...]] = [heads]
    for row in rows:
        crashes = sum(count for how, count in row.ways.items() if how.startswith("crash"))
        other = row.ways.total() - crashes - row.ways["hang"] - row.ways["refused"] - row.ways["accepted"]
        numbers = (row.ways.total(), row.ways["refused"], row.ways["accepted"], crashes, row.ways["hang"], other)
        lines.append((row.reader, *map(str, numbers), f"{row.slowest:.2f}", f"{row.memory / 1e6:.0f}"))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            text.ljust(width) if not i else text.rjust(width)
            for i, (text, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )

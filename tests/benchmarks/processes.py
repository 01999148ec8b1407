"""How much faster two processes train than one: ``python -m tests.benchmarks.processes FOLDER_OF_PHOTOS``.

Each process has one core. A round takes each way to train in turn, and what is compared is compared within a round:
machines are faster at one time than at another. Epochs after the first count, with reading pictures and without
measuring. What is printed for each way is the median over the rounds and, in brackets, the least and the most.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import psutil  # type: ignore[import-untyped]

from mgq.system.mpi_world import find_launcher

NETWORKS = ("resnet18", "mobilenet_v2", "shufflenet_v1_x1_5_g3")
BATCH = 32
SAMPLE_S = 0.25
CORES = (0, 1)
AUTOGROUP = Path("/proc/self/autogroup")
WITH_PRIORITY = ["sh", "-c", f'[ -z "$0" ] || echo "$0" > {AUTOGROUP}; exec "$@"']
"""A launcher puts its processes into sessions of their own, where Linux gives them a share of the cores of its own."""


@dataclass(frozen=True)
class Turn:
    """What one way reached in one round; ``cores``: processor time over wall time."""

    images_per_second: float
    cores: float


@dataclass(frozen=True)
class Size:
    """How much a turn trains: ``epochs`` of so many ``pictures``, the first of which does not count."""

    data: str
    network: str
    pictures: int
    epochs: int

    def command(self, folder: str, **more: Any) -> list[str]:
        words = {"arch": self.network, "data": self.data, "limit": self.pictures, "epochs": self.epochs}
        words |= {"image_size": 64, "batch_size": BATCH, "from_scratch": True, "val_every": self.epochs, **more}
        training = [sys.executable, "-m", "tests.fakes.training_together", folder, "normal", json.dumps(words)]
        return [*WITH_PRIORITY, priority(), *training]


def priority() -> str:
    """That of this process's session, which all trainings are to have; none where the system knows no such thing."""
    return AUTOGROUP.read_text(encoding="ascii").rpartition(" ")[2].strip() if AUTOGROUP.exists() else ""


def one(size: Size, number: int) -> Turn:
    """One process; on one core in this round, on the other in the next."""
    return run_all(lambda folder: alone(CORES[number % 2], size.command(folder)))


def apart(size: Size, _: int) -> Turn:
    """The ceiling: two trainings that know nothing of each other, but share memory, caches and clock."""
    return run_all(*(lambda folder, core=core: alone(core, size.command(folder)) for core in CORES))


def together(**more: Any) -> Callable[[Size, int], Turn]:
    """Two processes of one training."""

    def run(size: Size, _: int) -> Turn:
        launcher = find_launcher()
        assert launcher is not None
        return run_all(lambda folder: [launcher, "-n", "2", *size.command(folder, **more)])

    return run


WAYS: dict[str, Callable[[Size, int], Turn]] = {
    "one": one,
    "apart": apart,
    "two": together(),
    "fp16": together(compress="fp16"),
    "sync-bn": together(sync_bn=True),
}
COMPARED = {"apart": "one", "two": "one", "fp16": "two", "sync-bn": "two"}
"""Each way with what it is compared to."""


def alone(core: int, command: list[str]) -> list[str]:
    return ["taskset", "-c", str(core), *command]


def run_all(*commands: Callable[[str], list[str]]) -> Turn:
    """Run all at once, with one thread each; each is told its folder."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with ExitStack() as stack:
        folders = [stack.enter_context(TemporaryDirectory()) for _ in commands]
        running = [
            subprocess.Popen(command(folder), stdout=subprocess.DEVNULL, env=environment)
            for command, folder in zip(commands, folders, strict=True)
        ]
        stack.callback(end_all, running)
        cores = watch(running, folders)
        codes = [process.wait() for process in running]
        assert not any(codes), codes
        return Turn(sum(map(speed_in, folders)), cores)


def end_all(running: Sequence[subprocess.Popen[bytes]]) -> None:
    """What was stopped in the middle leaves nothing that would disturb the next."""
    for process in running:
        if process.poll() is None:
            for child in psutil.Process(process.pid).children(recursive=True):
                child.kill()
            process.kill()


def watch(running: Sequence[subprocess.Popen[bytes]], folders: Sequence[str]) -> float:
    """Cores used once each of ``running`` has an epoch behind it, until the first begins its last."""
    seen: list[tuple[float, float]] = []
    while all(process.poll() is None for process in running):
        epochs = [list(entries_in(folder)) for folder in folders]
        if epochs and all(epochs) and not any("val_loss" in lines[-1] for lines in epochs):
            seen.append((time.monotonic(), sum(processor_seconds(process.pid) for process in running)))
        time.sleep(SAMPLE_S)
    (started, before), (ended, after) = seen[0], seen[-1]
    return (after - before) / (ended - started)


def processor_seconds(pid: int) -> float:
    """Of a process and all below it."""
    whole = psutil.Process(pid)
    times = [process.cpu_times() for process in (whole, *whole.children(recursive=True))]
    return float(sum(t.user + t.system for t in times))


def entries_in(folder: str) -> Iterator[dict[str, Any]]:
    """One for each epoch of the training in ``folder``."""
    for file in Path(folder).glob("*/metrics.jsonl"):
        yield from map(json.loads, file.read_text().splitlines())


def speed_in(folder: str) -> float:
    """Images per second in all epochs but the first of the training in ``folder``."""
    return speed_of(list(entries_in(folder)))


def speed_of(entries: Sequence[dict[str, Any]]) -> float:
    _, *counted = entries
    seconds = sum(entry["seconds"] for entry in counted)
    return float(sum(entry["images_per_second"] * entry["seconds"] for entry in counted) / seconds)


def compare(rounds: Sequence[dict[str, Turn]]) -> Iterator[str]:
    """A line for each way: speeds, cores, and how many times what it is compared to, within each round."""
    for way in rounds[0]:
        turns = [turns[way] for turns in rounds]
        speeds = [turn.images_per_second for turn in turns]
        line = f"{way}: {spread(speeds, 1)} pictures/s, {spread([turn.cores for turn in turns])} cores"
        other = COMPARED.get(way)
        if other in rounds[0]:
            ratios = [found[way].images_per_second / found[other].images_per_second for found in rounds]
            line += f", {spread(ratios)} times {other!r}"
        yield line


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Median, least and most."""
    return f"{median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def tell(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data")
    parser.add_argument("--networks", nargs="+", default=NETWORKS)
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--pictures", type=int, default=640)
    parser.add_argument("--epochs", type=int, default=4)
    asked = parser.parse_args()
    sizes = [Size(asked.data, network, asked.pictures, asked.epochs) for network in asked.networks]
    rounds: dict[str, list[dict[str, Turn]]] = {size.network: [] for size in sizes}
    for number in range(asked.rounds):
        for size in sizes:
            turns = {way: WAYS[way](size, number) for way in asked.ways}
            rounds[size.network].append(turns)
            found = ", ".join(f"{way} {t.images_per_second:.1f} on {t.cores:.2f} cores" for way, t in turns.items())
            tell(f"round {number + 1}, {size.network}: {found}")
    for network, done in rounds.items():
        for line in compare(done):
            tell(f"{network}, {line}")


if __name__ == "__main__":
    main()

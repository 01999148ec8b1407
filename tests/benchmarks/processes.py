"""How much faster two processes train than one: ``python -m tests.benchmarks.processes FOLDER_OF_PHOTOS``.

Each process has one core. The second of two epochs counts, reading pictures included and measuring not.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from mgq.system.mpi_world import find_launcher

NETWORKS = ("resnet18", "mobilenet_v2", "shufflenet_v1_x1_5_g3")
WORDS = {"image_size": 64, "epochs": 2, "val_every": 2, "limit": 640, "batch_size": 32, "from_scratch": True}


def command_for(folder: str, words: dict[str, Any]) -> list[str]:
    return [
        sys.executable,
        "-m",
        "tests.fakes.training_together",
        folder,
        "normal",
        json.dumps({**WORDS, **words}),
    ]


def run_all(*commands: list[str]) -> None:
    """Run all at once, with one thread each."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    running = [subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment) for command in commands]
    codes = [process.wait() for process in running]
    assert not any(codes), codes


def speed_in(folder: str) -> float:
    """Images per second in the last epoch of the training in ``folder``."""
    lines = next(Path(folder).glob("*/metrics.jsonl")).read_text().splitlines()
    return float(json.loads(lines[-1])["images_per_second"])


def images_per_second(processes: int, **words: Any) -> float:
    launcher = find_launcher()
    assert launcher is not None
    with TemporaryDirectory() as folder:
        start = [launcher, "-n", str(processes)] if processes > 1 else ["taskset", "-c", "0"]
        run_all([*start, *command_for(folder, words)])
        return speed_in(folder)


def most_a_second(**words: Any) -> float:
    """The ceiling: of two trainings together that know nothing of each other, but share memory and caches."""
    with TemporaryDirectory() as first, TemporaryDirectory() as second:
        run_all(*(["taskset", "-c", str(core), *command_for(f, words)] for core, f in enumerate((first, second))))
        return speed_in(first) + speed_in(second)


def main() -> None:
    for network in NETWORKS:
        words = {"arch": network, "data": sys.argv[1]}
        one, most = images_per_second(1, **words), most_a_second(**words)
        tell(network, "two that know nothing of each other", one, most)
        for more in ({}, {"compress": "fp16"}, {"sync_bn": True}):
            tell(network, str(more or "plain"), one, images_per_second(2, **words, **more))


def tell(network: str, how: str, one: float, two: float) -> None:
    sys.stdout.write(f"{network}, {how}: one {one:.1f}, two {two:.1f}, {two / one:.2f} times\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()

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


def images_per_second(processes: int, **words: Any) -> float:
    launcher = find_launcher()
    assert launcher is not None
    with TemporaryDirectory() as folder:
        command = [
            sys.executable,
            "-m",
            "tests.fakes.training_together",
            folder,
            "normal",
            json.dumps({**WORDS, **words}),
        ]
        start = [launcher, "-n", str(processes)] if processes > 1 else ["taskset", "-c", "0"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run([*start, *command], check=True, stdout=subprocess.DEVNULL, env=environment)
        lines = next(Path(folder).glob("*/metrics.jsonl")).read_text().splitlines()
        return float(json.loads(lines[-1])["images_per_second"])


def main() -> None:
    for network in NETWORKS:
        words = {"arch": network, "data": sys.argv[1]}
        one = images_per_second(1, **words)
        for more in ({}, {"compress": "fp16"}, {"sync_bn": True}):
            two = images_per_second(2, **words, **more)
            sys.stdout.write(f"{network} {more or 'plain'}: one {one:.1f}, two {two:.1f}, {two / one:.2f} times\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()

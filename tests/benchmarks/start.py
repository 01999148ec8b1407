"""How long do the first commands take? ``python -m tests.benchmarks.start``

Prints wall-clock seconds of whole processes, warm file cache: median, least and most of several rounds.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

COMMANDS = (["--help"], ["models"], ["infer", "assets/cat.jpg"], ["infer", "-m", "normal", "assets/cat.jpg"])
ROUNDS = 7


def seconds(arguments: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "mgq", *arguments], check=True, capture_output=True)
    return time.perf_counter() - start


def main() -> None:
    for arguments in COMMANDS:
        seconds(arguments)
        times = sorted(seconds(arguments) for _ in range(ROUNDS))
        name = "mgq " + " ".join(arguments)
        print(f"{name:32s} {statistics.median(times):.2f} s ({times[0]:.2f} to {times[-1]:.2f})")


if __name__ == "__main__":
    main()

"""What a command costs: ``python tests/benchmarks/cost.py FILE COMMAND ...`` runs it and writes that to FILE, as JSON.

A process of its own, and a small one: Linux counts what the process that starts a command holds as that command's, too.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple


class Cost(NamedTuple):
    """Of a whole command, its start included: seconds of wall clock and of all processors, bytes of its largest
    process; and its exit code."""

    seconds: float
    processor: float
    peak: int
    code: int


def cost_of(command: list[str]) -> Cost:
    """Run ``command``, which says what it has to say on this process's streams, as the first child of this process."""
    start = time.perf_counter()
    code = subprocess.run(command).returncode
    seconds = time.perf_counter() - start
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return Cost(seconds, used.ru_utime + used.ru_stime, used.ru_maxrss * 1024, code)


def measured(command: list[str], where: Path | None = None) -> tuple[Cost, str]:
    """Run ``command`` apart, in the folder ``where``: what it costs, and all that it says."""
    with TemporaryDirectory(prefix="mgq-") as folder:
        file = Path(folder) / "cost.json"
        watched = [sys.executable, __file__, str(file), *command]
        done = subprocess.run(watched, check=True, cwd=where, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        return Cost(*json.loads(file.read_text())), done.stdout.decode(errors="replace")


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps(cost_of(sys.argv[2:])))

"""A verb that the first rank does alone: ``python -m tests.fakes.rank_alone FOLDER``, started by MPI.

Each rank leaves what it found there, as JSON: the first the cores it works with, the others whether its work was over
when they ended, and whether they had loaded MegEngine.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

from mgq.cli.ranks import work_alone
from mgq.system.mpi_world import find_world

WORK_S = 1.0
PATIENCE_S = 60.0


def work(folder: Path, others: int) -> int:
    """Lasts until some time after all others have begun."""
    until = time.monotonic() + PATIENCE_S
    while len(list(folder.glob("began-*"))) < others and time.monotonic() < until:
        time.sleep(0.05)
    time.sleep(WORK_S)
    (folder / "0").write_text(json.dumps(sorted(os.sched_getaffinity(0))))
    return 0


def main() -> int:
    folder, world = Path(sys.argv[1]), find_world()
    assert world is not None
    if world.rank:
        (folder / f"began-{world.rank}").touch()
    code = work_alone(world, lambda: work(folder, world.size - 1))
    if world.rank:
        found = {"first has ended": (folder / "0").exists(), "MegEngine": "megengine" in sys.modules}
        (folder / str(world.rank)).write_text(json.dumps(found))
    return code


if __name__ == "__main__":
    sys.exit(main())

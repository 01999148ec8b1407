"""``python -m tests.robustness.fuzz --inputs 100000 --seed 0``: the long form. Exit code 1 where a reader failed."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

from tests.robustness.fuzz.job import Row, plan_of, rows_of, table_of


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.robustness.fuzz", description=__doc__)
    parser.add_argument("--inputs", type=int, default=100_000, help="how many in all, shared by the readers' speed")
    parser.add_argument("--least", type=int, default=1_000, help="how many the slowest reader gets at least")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--readers", nargs="*", default=[], help="these alone")
    parser.add_argument("--folder", type=Path, help="where inputs that a reader fails on are kept")
    given = parser.parse_args()
    folder = given.folder or Path(tempfile.mkdtemp(prefix="mgq-fuzz-"))
    folder.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()

    def tell(row: Row) -> None:
        print(f"{time.monotonic() - start:6.0f} s  {row.reader}: {row.ways.total():,}", file=sys.stderr, flush=True)
        for fault in row.faults[:20]:
            print(fault, file=sys.stderr, flush=True)

    rows = rows_of(plan_of(given.inputs, given.least, given.readers), given.seed, folder, tell)
    print(table_of(rows))
    inputs, faults = sum(row.ways.total() for row in rows), sum(len(row.faults) for row in rows)
    print(f"{inputs:,} inputs, seed {given.seed}, {faults} faults")
    return 1 if any(row.faults for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())

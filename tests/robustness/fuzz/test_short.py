"""The short form of the job: some inputs for every reader, the same ones at every run."""

from __future__ import annotations

from pathlib import Path

from tests.robustness.fuzz.job import plan_of, rows_of, table_of

INPUTS, LEAST = 1_500, 12


def test_no_reader_fails_on_damaged_and_forged_files(tmp_path: Path) -> None:
    plan = plan_of(INPUTS, LEAST)
    rows = rows_of(plan, seed=0, folder=tmp_path)
    assert not [fault for row in rows for fault in row.faults], table_of(rows)
    assert {row.reader: row.ways.total() for row in rows} == plan
    # A reader that refuses everything would pass, too: each takes its valid files.
    assert not {row.reader for row in rows if not row.ways["accepted"]}

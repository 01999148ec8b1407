"""Files that grow have whole pieces alone, also when the disk is full."""

from __future__ import annotations

from pathlib import Path

import pytest

from mgq.errors import InputError
from mgq.io.append import append_whole, drop_torn_line
from tests.fakes.small_disk import run_on_small_disk, the_line


def test_pieces_follow_each_other(tmp_path: Path) -> None:
    for piece in (b"one\n", b"", b"two\n"):
        append_whole(tmp_path / "log", piece, sync=True)
    assert (tmp_path / "log").read_bytes() == b"one\ntwo\n"


def test_nothing_of_a_piece_that_does_not_fit_is_there(tmp_path: Path) -> None:
    script = """
import sys
from pathlib import Path
from mgq.errors import FailureError
from mgq.io.append import append_whole

path = Path(sys.argv[1]) / "log"
append_whole(path, b"first\\n")
try:
    append_whole(path, bytes(200_000))
except FailureError as error:
    print(error)
assert path.read_bytes() == b"first\\n"
append_whole(path, b"second\\n")
assert path.read_bytes() == b"first\\nsecond\\n"
"""
    lines = run_on_small_disk(tmp_path, script).splitlines()
    assert len(lines) == 1
    assert str(tmp_path / "log") in lines[0] and "full: free some space" in lines[0]


def test_a_place_that_cannot_be_written_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        append_whole(tmp_path / "missing" / "log", b"x")
    assert str(tmp_path / "missing" / "log") in the_line(caught)


@pytest.mark.parametrize(
    ("before", "after"),
    [(b"", b""), (b"one\n", b"one\n"), (b"one\ntw", b"one\n"), (b"on", b""), (b"one\n\n", b"one\n\n")],
)
def test_half_a_line_at_the_end_is_cut_off(before: bytes, after: bytes, tmp_path: Path) -> None:
    (tmp_path / "log").write_bytes(before)
    drop_torn_line(tmp_path / "log")
    assert (tmp_path / "log").read_bytes() == after


def test_there_need_not_be_a_file_to_mend(tmp_path: Path) -> None:
    drop_torn_line(tmp_path / "log")
    assert list(tmp_path.iterdir()) == []

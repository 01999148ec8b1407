"""What stays of temporary folders when a process ends, in order or not."""

from __future__ import annotations

import fcntl
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from mgq.errors import InputError
from mgq.io.temporary_folders import temporary_folder
from tests.fakes.places import ROOT
from tests.fakes.small_disk import run_on_small_disk, the_line

HOLD = (
    "from mgq.io.temporary_folders import temporary_folder\n"
    "with temporary_folder() as folder:\n"
    "    (folder / 'network.onnx').write_bytes(b'half')\n"
    "    print(folder, flush=True)\n"
    "    input()\n"
)
"""A program that has a temporary folder until it is told to end."""


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary folders are made, here and in programs started here."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    return tmp_path


@pytest.fixture
def other() -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """A program that has a temporary folder, and that folder."""
    child = subprocess.Popen(
        [sys.executable, "-c", HOLD], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    yield child, Path(child.stdout.readline().strip())
    child.kill()
    child.communicate()


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt(), SystemExit(3)])
def test_whatever_ends_the_block_the_folder_is_gone(place: Path, error: BaseException) -> None:
    with pytest.raises(type(error)), temporary_folder() as folder:
        (folder / "file").write_text("here")
        raise error
    assert not list(place.iterdir())


def test_the_folder_of_a_killed_process_is_removed_by_the_next(other: tuple[subprocess.Popen[str], Path]) -> None:
    child, left = other
    child.kill()
    child.wait()
    assert (left / "network.onnx").exists()
    with temporary_folder():
        pass
    assert not left.exists()


def test_folders_in_use_and_folders_of_the_user_stay(place: Path, other: tuple[subprocess.Popen[str], Path]) -> None:
    _, used = other
    own = place / "mgq-archives"
    own.mkdir(mode=0o700)
    (own / "a.jpg").write_text("mine")
    with temporary_folder() as first, temporary_folder() as second:
        (place / "mgq-link").symlink_to(first)
        assert first.exists() and second.exists()
    assert (used / "network.onnx").exists() and (own / "a.jpg").exists()


@pytest.mark.parametrize("is_locked", [True, False], ids=["while it is locked", "before it is locked"])
def test_a_folder_that_another_takes_for_abandoned_is_made_again(
    monkeypatch: pytest.MonkeyPatch, is_locked: bool
) -> None:
    lock = fcntl.flock
    taken: list[Path] = []

    def lose_the_first(descriptor: int, operation: int) -> None:
        if not taken:
            taken.append(Path(f"/proc/self/fd/{descriptor}").readlink().parent)
            shutil.rmtree(taken[0])
            if is_locked:
                raise BlockingIOError
        lock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", lose_the_first)
    with temporary_folder() as folder:
        assert folder != taken[0] and folder.exists()


def test_where_no_folder_can_be_made_the_line_names_the_mend(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(place / "none"))
    with pytest.raises(InputError) as caught, temporary_folder():
        pass
    assert "TMPDIR" in the_line(caught)


@pytest.mark.parametrize("write", ["path.write_bytes", "partial(write_bytes_atomically, path)"])
def test_a_full_disk_of_temporary_files_is_said_so(tmp_path: Path, write: str) -> None:
    """Also where the half-written file has been taken away, so that there is room again."""
    said = run_on_small_disk(
        tmp_path,
        "import sys, tempfile\n"
        "from functools import partial\n"
        "from mgq.errors import FailureError\n"
        "from mgq.io.atomic import write_bytes_atomically\n"
        "from mgq.io.temporary_folders import temporary_folder\n"
        "tempfile.tempdir = sys.argv[1]\n"
        "try:\n"
        "    with temporary_folder() as folder:\n"
        "        path = folder / 'network.onnx'\n"
        f"        {write}(bytes(1 << 20))\n"
        "except FailureError as error:\n"
        "    print(error)\n",
        "size=256k",
    )
    assert str(tmp_path) in said and "is full" in said and "TMPDIR" in said

"""What is on the disk when writing goes wrong, and what the user is told."""

from __future__ import annotations

import errno
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mgq.errors import FailureError, InputError, MgqError
from mgq.io.atomic import (
    atomic_output,
    atomic_write,
    ensure_writable_folder,
    refuse_unwritable_folder,
    write_bytes_atomically,
    write_text_atomically,
)
from tests.fakes.places import ROOT
from tests.fakes.small_disk import run_on_small_disk, the_line


def test_a_new_file_holds_what_was_written(tmp_path: Path) -> None:
    write_bytes_atomically(tmp_path / "a.bin", b"\x00new")
    write_text_atomically(tmp_path / "a.txt", "grün\r\n\n")
    assert (tmp_path / "a.bin").read_bytes() == b"\x00new"
    assert (tmp_path / "a.txt").read_bytes() == "grün\r\n\n".encode()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.bin", "a.txt"]


def test_the_old_file_is_there_until_the_new_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(b"old")
    with atomic_write(path) as temporary:
        temporary.write_bytes(b"new")
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_temporaries_are_hidden_recognisable_and_apart(tmp_path: Path) -> None:
    path = tmp_path / "weights.mge"
    with atomic_write(path) as first, atomic_write(path) as second:
        assert first != second
        for temporary in (first, second):
            assert temporary.parent == tmp_path
            assert temporary.name.startswith(f".weights.mge.{os.getpid()}-")
            assert temporary.name.endswith(".part")
        first.write_bytes(b"first")
        second.write_bytes(b"second")
    assert path.read_bytes() == b"first"  # the outer block ends last


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt(), SystemExit(3)])
def test_an_exception_leaves_the_old_file_and_nothing_else(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "weights"
    path.write_bytes(b"old")

    def write() -> None:
        with atomic_write(path) as temporary:
            temporary.write_bytes(b"half of")
            raise error

    with pytest.raises(type(error)):
        write()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_killed_process_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(b"old")
    script = """
import sys, time
from pathlib import Path
from mgq.io.atomic import write_bytes_atomically

def stop_before_the_rename(temporary, target):
    print(temporary.read_bytes().decode(), flush=True)
    time.sleep(60)

Path.replace = stop_before_the_rename
write_bytes_atomically(Path(sys.argv[1]), b"new")
"""
    command = [sys.executable, "-c", script, str(path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        written = process.stdout.readline()
        process.send_signal(signal.SIGKILL)
    assert written == "new\n"
    assert path.read_bytes() == b"old"
    write_bytes_atomically(path, b"newer")
    assert path.read_bytes() == b"newer"
    assert list(tmp_path.iterdir()) == [path]  # what was half written is gone, too


def test_the_data_is_on_the_disk_before_the_name_and_the_name_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    real_sync, real_replace = os.fsync, Path.replace

    def sync(descriptor: int) -> None:
        events.append("sync folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "sync file")
        real_sync(descriptor)

    def replace(temporary: Path, target: Path) -> Path:
        events.append("rename")
        return real_replace(temporary, target)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(Path, "replace", replace)
    write_bytes_atomically(tmp_path / "weights", b"new")
    assert events == ["sync file", "rename", "sync folder"]


def test_a_folder_that_cannot_be_synced_is_no_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def sync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "fsync", sync)
    write_bytes_atomically(tmp_path / "weights", b"new")
    assert (tmp_path / "weights").read_bytes() == b"new"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_fills_up_at_the_last_moment_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    path = tmp_path / "weights"
    path.write_bytes(b"old")

    def sync(_: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", sync)
    with pytest.raises(FailureError) as caught:
        write_bytes_atomically(path, b"new")
    assert str(path) in the_line(caught)
    assert "full: free some space" in the_line(caught)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError("100000 requested and 16352 written"),  # as numpy says it
        RuntimeError("I/O error: No space left on device (os error 28)"),  # as safetensors says it
    ],
)
def test_a_writer_that_finds_the_disk_full_is_one_line(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(FailureError) as caught, atomic_write(tmp_path / "weights"):
        raise error
    assert "full: free some space" in the_line(caught)
    assert caught.value.__cause__ is error


@pytest.mark.parametrize("error", [FileNotFoundError(errno.ENOENT, "x"), InputError("bad: No space left on device")])
def test_an_error_that_is_not_about_the_disk_passes_unchanged(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(type(error)) as caught, atomic_write(tmp_path / "weights"):
        raise error
    assert caught.value is error


def test_a_really_full_disk_loses_nothing(tmp_path: Path) -> None:
    script = """
import sys
from pathlib import Path
import numpy as np
import safetensors.numpy
from mgq.errors import FailureError
from mgq.io.atomic import atomic_write, write_bytes_atomically

array = np.ones(200_000, np.uint8)
path = Path(sys.argv[1]) / "weights"
path.write_bytes(b"old")

def plainly():
    write_bytes_atomically(path, array.tobytes())

def by_numpy():
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        np.save(file, array)

def by_safetensors():
    with atomic_write(path) as temporary:
        safetensors.numpy.save_file({"a": array}, temporary)

for write in (plainly, by_numpy, by_safetensors):
    try:
        write()
    except FailureError as error:
        print(error)
    assert path.read_bytes() == b"old"
    assert list(path.parent.iterdir()) == [path]
"""
    lines = run_on_small_disk(tmp_path, script).splitlines()
    assert len(lines) == 3
    assert all(str(tmp_path / "weights") in line and "full: free some space" in line for line in lines)


@pytest.mark.parametrize("place", ["missing/weights", "file/weights", "folder", "pipe", "x" * 300])
def test_a_place_that_cannot_be_written_is_refused_by_name(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError) as caught:
        write_bytes_atomically(tmp_path / place, b"new")
    assert str(tmp_path / place) in the_line(caught)
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder", "pipe"]


def test_a_name_with_a_line_break_stays_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        write_bytes_atomically(tmp_path / "missing" / "two\nlines", b"")
    assert "two\\nlines" in the_line(caught)


def test_the_longest_names_can_be_written(tmp_path: Path) -> None:
    for name in ("x" * 255, "é" * 127, "x" + "é" * 127):  # cut between bytes of a letter, and not
        write_bytes_atomically(tmp_path / name, b"new")
        assert (tmp_path / name).read_bytes() == b"new"


def test_a_symbolic_link_is_written_through(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    real, link = tmp_path / "elsewhere" / "real", tmp_path / "link"
    link.symlink_to(real)
    for content in (b"one", b"two"):
        write_bytes_atomically(link, content)
        assert link.is_symlink()
        assert real.read_bytes() == content


def test_permissions_are_the_old_files_or_the_usual_ones(tmp_path: Path) -> None:
    def mode(path: Path) -> int:
        return stat.S_IMODE(path.stat().st_mode)

    plain, new, old = tmp_path / "plain", tmp_path / "new", tmp_path / "old"
    plain.touch()
    old.touch()
    old.chmod(0o640)
    write_bytes_atomically(new, b"")
    write_bytes_atomically(old, b"")
    assert mode(new) == mode(plain)
    assert mode(old) == 0o640


def test_a_writer_may_put_a_file_of_its_own_in_place_of_the_temporary(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.numpy")
    path, plain = tmp_path / "weights", tmp_path / "plain"
    plain.touch()
    with atomic_write(path) as temporary:
        safetensors.save_file({"a": np.arange(4)}, temporary)
        temporary.chmod(0o600)
    assert safetensors.load_file(path)["a"].tolist() == [0, 1, 2, 3]
    assert path.stat().st_mode == plain.stat().st_mode


def test_a_folder_is_made_with_its_parents_and_left_empty(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    for _ in range(2):
        assert ensure_writable_folder(folder) == folder
        assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    "place", [lambda root: root / "file", lambda root: root / "file" / "below", lambda _: Path("/proc/mgq")]
)
def test_a_folder_that_cannot_be_made_is_refused_by_name(tmp_path: Path, place: Callable[[Path], Path]) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError) as caught:
        ensure_writable_folder(place(tmp_path), "pass --save FOLDER")
    assert str(place(tmp_path)) in the_line(caught)
    assert the_line(caught).endswith(": pass --save FOLDER")


@pytest.mark.parametrize(
    ("number", "kind"),
    [
        (errno.EACCES, InputError),
        (errno.EROFS, InputError),
        (errno.ENOSPC, FailureError),
        (errno.EIO, FailureError),
    ],
)
def test_a_folder_that_lets_no_file_in_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, kind: type[MgqError]
) -> None:
    def no_file(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch, pytest.raises(kind) as caught:
        patch.setattr(os, "open", no_file)
        ensure_writable_folder(tmp_path)
    assert str(tmp_path) in the_line(caught)


def test_a_really_read_only_folder_is_refused_by_name(tmp_path: Path) -> None:
    script = """
import sys
from pathlib import Path
from mgq.errors import InputError
from mgq.io.atomic import ensure_writable_folder, write_bytes_atomically

folder = Path(sys.argv[1])
for attempt in (
    lambda: ensure_writable_folder(folder),
    lambda: ensure_writable_folder(folder / "below"),
    lambda: write_bytes_atomically(folder / "weights", b""),
):
    try:
        attempt()
    except InputError as error:
        print(error)
"""
    lines = run_on_small_disk(tmp_path, script, "ro").splitlines()
    assert len(lines) == 3
    assert all(str(tmp_path) in line and "Read-only" in line for line in lines)


def test_an_output_has_its_folder_made_and_a_failure_takes_that_away(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "file"
    with pytest.raises(KeyboardInterrupt), atomic_output(path):
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
    with atomic_output(path) as temporary:
        temporary.write_text("whole")
    assert path.read_text() == "whole"
    with pytest.raises(KeyboardInterrupt), atomic_output(tmp_path / "new" / "other" / "file"):
        raise KeyboardInterrupt
    assert [found.name for found in (tmp_path / "new").iterdir()] == ["folder"]


def test_a_folder_that_is_tried_is_made_by_nobody(tmp_path: Path) -> None:
    refuse_unwritable_folder(tmp_path / "new" / "folder")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="is a file"):
        refuse_unwritable_folder(tmp_path / "file")

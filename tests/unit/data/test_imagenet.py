"""ImageNet's archives, forged small: what is unpacked of them, and what never is."""

from __future__ import annotations

import gzip
import io
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
from pathlib import Path

import filelock
import pytest

from mgq.data import imagenet_archives
from mgq.data.imagenet_archives import DEVKIT, TRAIN_ARCHIVE, VAL_ARCHIVE, has_archive, unpack_split, wnids_by_id
from mgq.errors import FailureError, InputError
from mgq.events import Progress
from tests.fakes.imagenet_files import (
    BY_ID,
    INNER_NODES,
    META,
    TRUTH,
    WNIDS,
    devkit,
    element,
    image,
    inner_tar,
    matrix,
    meta,
    sums,
    tar,
    train_members,
    val_members,
)
from tests.fakes.places import ROOT


@pytest.fixture(autouse=True)
def synced(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[bool]:
    """For each sync, whether a split was in place by then. No disk is kept waiting for it."""
    seen: list[bool] = []
    monkeypatch.setattr(os, "sync", lambda: seen.append((tmp_path / "train").exists() or (tmp_path / "val").exists()))
    return seen


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with all three archives."""
    tar(tmp_path / TRAIN_ARCHIVE, train_members())
    tar(tmp_path / VAL_ARCHIVE, val_members())
    devkit(tmp_path / DEVKIT)
    return tmp_path


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def the_line(caught: pytest.ExceptionInfo[Exception]) -> str:
    message = str(caught.value)
    assert message.isprintable()
    return message


TRAIN_FILES = {f"{wnid}/{wnid}_{i}.JPEG": image(f"{wnid}{i}") for wnid in WNIDS[:3] for i in range(4)}
VAL_FILES = {f"{BY_ID[id_]}/ILSVRC2012_val_{i:08}.JPEG": image(f"val{i}") for i, id_ in enumerate(TRUTH, 1)}


# ---- unpacking ----


def test_the_training_archive_becomes_a_folder_for_each_class(folder: Path) -> None:
    assert unpack_split(folder, "train", md5=sums(folder)) == folder / "train"
    assert files(folder / "train") == TRAIN_FILES


def test_validation_images_go_where_the_ground_truth_says(folder: Path) -> None:
    assert unpack_split(folder, "val", md5=sums(folder)) == folder / "val"
    assert files(folder / "val") == VAL_FILES


def test_what_is_unpacked_is_not_touched_again(folder: Path) -> None:
    unpack_split(folder, "val", md5=sums(folder))
    for name in (VAL_ARCHIVE, DEVKIT):
        (folder / name).unlink()
    events: list[Progress] = []
    assert unpack_split(folder, "val", events.append) == folder / "val"
    assert events == []


def test_nothing_but_the_images_is_left_behind(folder: Path) -> None:
    for split in ("train", "val"):
        unpack_split(folder, split, md5=sums(folder))
    shown = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
    assert shown == {"train", "val", TRAIN_ARCHIVE, VAL_ARCHIVE, DEVKIT}
    assert not list(folder.glob(".*.part"))


def test_files_are_on_the_disk_before_their_folder_has_its_name(folder: Path, synced: list[bool]) -> None:
    unpack_split(folder, "val", md5=sums(folder))
    assert synced == [False]


def test_progress_is_in_bytes_and_reaches_the_total(folder: Path) -> None:
    events: list[Progress] = []
    unpack_split(folder, "train", events.append, sums(folder))
    size = (folder / TRAIN_ARCHIVE).stat().st_size
    for what in ("check", "unpack"):
        done = [event.done for event in events if event.what == f"{what} {TRAIN_ARCHIVE}"]
        assert done == sorted(done)
        assert done[-1] == size
    assert {(event.total, event.unit) for event in events} == {(size, "B")}


def test_has_archive_tells_the_splits_apart(tmp_path: Path) -> None:
    assert not has_archive(tmp_path, "val")
    tar(tmp_path / VAL_ARCHIVE, val_members())
    assert has_archive(tmp_path, "val")
    assert not has_archive(tmp_path, "train")


@pytest.mark.parametrize("missing", [VAL_ARCHIVE, DEVKIT])
def test_a_missing_archive_is_named(folder: Path, missing: str) -> None:
    known = sums(folder)
    (folder / missing).unlink()
    with pytest.raises(InputError, match=missing) as caught:
        unpack_split(folder, "val", md5=known)
    assert "image-net.org" in the_line(caught)


def test_a_disk_that_is_too_small_is_told_before_the_work(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil._ntuple_diskusage(10**12, 10**12, 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(FailureError, match="make room"):
        unpack_split(folder, "train", md5=sums(folder))
    assert not list(folder.rglob("*.JPEG"))


# ---- interruptions ----


class StoppedError(Exception):
    """What a test stops the work with."""


def stopped_after(folder: Path, split: str, members: int) -> None:
    seen = 0

    def stop(event: Progress) -> None:
        nonlocal seen
        seen += event.what.startswith("unpack")
        if seen > members:
            raise StoppedError

    with pytest.raises(StoppedError):
        unpack_split(folder, split, stop, sums(folder))  # type: ignore[arg-type]
    assert not (folder / split).exists()


@pytest.mark.parametrize(("split", "expected"), [("train", TRAIN_FILES), ("val", VAL_FILES)])
def test_an_interrupted_work_goes_on_where_it_was(folder: Path, split: str, expected: dict[str, bytes]) -> None:
    known = sums(folder)
    stopped_after(folder, split, 1)
    kept = {path.name: path.stat().st_mtime_ns for path in (folder / f".{split}.part").rglob("*.JPEG")}
    assert 0 < len(kept) < len(expected)
    events: list[Progress] = []
    unpack_split(folder, split, events.append, known)  # type: ignore[arg-type]
    assert files(folder / split) == expected
    again = {path.name: path.stat().st_mtime_ns for path in (folder / split).rglob("*.JPEG")}
    assert {name: again[name] for name in kept} == kept
    assert not [event for event in events if event.what.startswith(f"check {imagenet_archives._ARCHIVES[split]}")]  # type: ignore[index]


def test_half_a_file_is_written_again(folder: Path) -> None:
    known = sums(folder)
    stopped_after(folder, "val", 2)
    half = next((folder / ".val.part").rglob("*.JPEG"))
    half.write_bytes(half.read_bytes()[:100])
    unpack_split(folder, "val", md5=known)
    assert files(folder / "val") == VAL_FILES


def test_a_killed_process_leaves_no_folder_and_the_next_finishes(folder: Path) -> None:
    known = sums(folder)
    script = f"""
import os, signal, sys
from pathlib import Path
from mgq.data.imagenet_archives import unpack_split
count = 0
def kill(event):
    global count
    count += event.what.startswith("unpack")
    if count == 2:
        os.kill(os.getpid(), signal.SIGKILL)
unpack_split(Path(sys.argv[1]), "train", kill, {known!r})
"""
    done = subprocess.run([sys.executable, "-c", script, str(folder)], cwd=ROOT, timeout=60, check=False)
    assert done.returncode == -signal.SIGKILL
    assert not (folder / "train").exists()
    assert 0 < len(list((folder / ".train.part").rglob("*.JPEG"))) < len(TRAIN_FILES)
    unpack_split(folder, "train", md5=known)
    assert files(folder / "train") == TRAIN_FILES


def test_an_archive_that_changed_after_an_interruption_is_checked_again(folder: Path) -> None:
    known = sums(folder)
    stopped_after(folder, "val", 2)
    changed = bytearray((folder / VAL_ARCHIVE).read_bytes())
    changed[600] ^= 1
    (folder / VAL_ARCHIVE).write_bytes(changed)
    with pytest.raises(InputError, match="not the original"):
        unpack_split(folder, "val", md5=known)


def test_a_second_process_waits_for_the_first(folder: Path) -> None:
    lock = filelock.FileLock(folder / ".val.lock")
    lock.acquire()
    events: list[str] = []

    def release(event: Progress) -> None:
        events.append(event.what)
        if event.what.startswith("wait"):
            lock.release()

    unpack_split(folder, "val", release, sums(folder))
    assert events[0] == f"wait for another process that unpacks {VAL_ARCHIVE}"
    assert files(folder / "val") == VAL_FILES


# ---- archives that are not the original ----


@pytest.mark.parametrize("changed", [VAL_ARCHIVE, DEVKIT])
def test_a_changed_archive_is_refused_by_name_before_anything_is_written(folder: Path, changed: str) -> None:
    known = {**sums(folder), changed: "0" * 32}
    with pytest.raises(InputError, match=changed) as caught:
        unpack_split(folder, "val", md5=known)
    assert "0" * 32 in the_line(caught)
    assert not list(folder.rglob("*.JPEG"))


def test_the_published_sums_are_asked_for_by_default(folder: Path) -> None:
    with pytest.raises(InputError, match="1d675b47d978889d74fa0da5fadfb00e"):
        unpack_split(folder, "train")


def info(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    made = tarfile.TarInfo(name)
    made.type, made.linkname = kind, link
    return made


HOSTILE = [
    info("../ILSVRC2012_val_00000001.JPEG"),
    info("/tmp/ILSVRC2012_val_00000001.JPEG"),
    info("./ILSVRC2012_val_00000001.JPEG"),
    info("ILSVRC2012_val_00000001.JPEG/../../x"),
    info("ILSVRC2012_val_00000001.JPEG\n"),
    info("ILSVRC2012_val_00000001.JPEG", tarfile.SYMTYPE, "/etc/passwd"),
    info("ILSVRC2012_val_00000001.JPEG", tarfile.LNKTYPE, "ILSVRC2012_val_00000002.JPEG"),
    info("ILSVRC2012_val_00000001.JPEG", tarfile.CHRTYPE),
    info("ILSVRC2012_val_00000001.JPEG", tarfile.FIFOTYPE),
    info("ILSVRC2012_val_00000001.JPEG", tarfile.DIRTYPE),
    info("ILSVRC2012_val_00000000.JPEG"),
    info("ILSVRC2012_val_00000007.JPEG"),
    info("notes.txt"),
]


@pytest.mark.parametrize("hostile", HOSTILE, ids=lambda info: f"{info.name!r} {info.type!r}")
def test_a_member_that_is_no_validation_image_is_refused(folder: Path, hostile: tarfile.TarInfo) -> None:
    tar(folder / VAL_ARCHIVE, [(hostile, b"evil")])
    before = {path for path in folder.parent.rglob("*") if ".val" not in str(path)}
    with pytest.raises(InputError, match=r"ImageNet's does not") as caught:
        unpack_split(folder, "val", md5=sums(folder))
    the_line(caught)
    assert {path for path in folder.parent.rglob("*") if ".val" not in str(path)} == before
    assert not [path for path in (folder / ".val.part").rglob("*") if not path.is_dir() and path.suffix != ".json"]


@pytest.mark.parametrize(
    ("outer", "inner"),
    [
        ("../n01440764.tar", "n01440764_1.JPEG"),
        ("n01440764.tar.gz", "n01440764_1.JPEG"),
        ("n99999999.tar", "n99999999_1.JPEG"),  # no class of ImageNet
        ("n01440764.tar", "../n01440764_1.JPEG"),
        ("n01440764.tar", "/n01440764_1.JPEG"),
        ("n01440764.tar", "n01443537_1.JPEG"),  # of another class
        ("n01440764.tar", "n01440764_1.JPEG.exe"),
    ],
)
def test_a_member_that_is_no_training_image_is_refused(folder: Path, outer: str, inner: str) -> None:
    tar(folder / TRAIN_ARCHIVE, [(outer, inner_tar([(inner, b"evil")]))])
    with pytest.raises(InputError, match=r"ImageNet's does not"):
        unpack_split(folder, "train", md5=sums(folder))
    # Other tests' files lie beside the folder; some are too large to read.
    small = [path for path in folder.parent.rglob("*") if path.is_file() and path.stat().st_size == len(b"evil")]
    assert not [path for path in small if path.read_bytes() == b"evil"]


def test_a_file_with_holes_which_takes_more_than_its_archive_is_refused(folder: Path) -> None:
    sparse = info("ILSVRC2012_val_00000001.JPEG")
    sparse.pax_headers = {"GNU.sparse.major": "0", "GNU.sparse.map": "0,1", "GNU.sparse.size": str(10**8)}
    with tarfile.open(folder / VAL_ARCHIVE, "w", format=tarfile.PAX_FORMAT) as file:
        sparse.size = 1
        file.addfile(sparse, io.BytesIO(b"x"))
    with pytest.raises(InputError, match=r"ImageNet's does not"):
        unpack_split(folder, "val", md5=sums(folder))


def test_a_file_too_large_for_an_image_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(imagenet_archives, "MAX_BYTES", 100)
    with pytest.raises(InputError, match="1280 bytes"):
        unpack_split(folder, "val", md5=sums(folder))


@pytest.mark.parametrize("length", [10, 700, 1400])
def test_a_cut_archive_with_the_right_sum_is_refused(folder: Path, length: int) -> None:
    whole = (folder / VAL_ARCHIVE).read_bytes()
    (folder / VAL_ARCHIVE).write_bytes(whole[:length])
    with pytest.raises(InputError, match=f"{VAL_ARCHIVE} is damaged"):
        unpack_split(folder, "val", md5=sums(folder))


def test_an_inner_archive_that_is_none_is_refused(folder: Path) -> None:
    tar(folder / TRAIN_ARCHIVE, [("n01440764.tar", b"nothing of the kind" * 100)])
    with pytest.raises(InputError, match="is damaged"):
        unpack_split(folder, "train", md5=sums(folder))


# ---- the development kit ----


def test_a_kit_that_unpacks_to_gigabytes_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(imagenet_archives, "_MOST_UNPACKED", 1 << 20)
    (folder / DEVKIT).write_bytes(gzip.compress(bytes(3 << 20)))
    with pytest.raises(InputError, match="unpacks to more than 1 MB"):
        unpack_split(folder, "val", md5=sums(folder))


@pytest.mark.parametrize(
    "content", [b"", b"no gzip at all", gzip.compress(META, mtime=0)[:5000], gzip.compress(b"no tar", mtime=0)]
)
def test_a_kit_that_is_no_archive_is_refused(folder: Path, content: bytes) -> None:
    (folder / DEVKIT).write_bytes(content)
    with pytest.raises(InputError, match=DEVKIT) as caught:
        unpack_split(folder, "val", md5=sums(folder))
    the_line(caught)


def test_a_kit_without_the_ground_truth_is_refused_by_what_it_lacks(folder: Path) -> None:
    tar(folder / DEVKIT, [("ILSVRC2012_devkit_t12/data/meta.mat", META)], "w:gz")
    with pytest.raises(InputError, match=r"ILSVRC2012_validation_ground_truth\.txt"):
        unpack_split(folder, "val", md5=sums(folder))


@pytest.mark.parametrize("truth", ["1\n2\n1001\n", "1\n0\n", "1\ntwo\n", "1.5\n"])
def test_a_ground_truth_with_lines_that_are_no_class_is_refused(folder: Path, truth: str) -> None:
    devkit(folder / DEVKIT, truth=truth)
    with pytest.raises(InputError, match="ground truth"):
        unpack_split(folder, "val", md5=sums(folder))


# ---- meta.mat ----


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("compressed", [True, False])
def test_meta_is_read_in_either_byte_order_packed_or_not(order: str, compressed: bool) -> None:
    assert wnids_by_id(meta([*INNER_NODES, *BY_ID.items()], order, compressed)) == BY_ID


def test_meta_is_read_with_its_fields_in_another_order_and_text_in_utf8() -> None:
    fields = ("children", "WNID", "words", "ILSVRC2012_ID")
    assert wnids_by_id(meta(list(BY_ID.items()), fields=fields, text_kind=16)) == BY_ID


def test_other_variables_in_meta_are_passed_over() -> None:
    number_alone = matrix(6, (1, 1), "version", element(9, struct.pack("<d", 1.0)))
    assert wnids_by_id(META[:128] + number_alone + META[128:] + number_alone) == BY_ID


@pytest.mark.parametrize(
    "entries",
    [
        list(BY_ID.items())[:-1],
        [*list(BY_ID.items())[:-1], (1000, "n00001740")],
        [*list(BY_ID.items())[:-1], (999, WNIDS[0])],
        [],
    ],
    ids=["one missing", "one unknown", "one number twice", "none"],
)
def test_a_meta_that_does_not_name_every_class_is_refused(entries: list[tuple[int, str]]) -> None:
    with pytest.raises(InputError, match="1,000 classes"):
        wnids_by_id(meta(entries))


def test_a_meta_without_the_fields_is_refused() -> None:
    with pytest.raises(InputError, match=r"meta\.mat"):
        wnids_by_id(meta(list(BY_ID.items()), fields=("words", "children")))


def test_a_damaged_meta_is_refused_in_one_line() -> None:
    with pytest.raises(InputError, match="cannot be understood") as caught:
        wnids_by_id(META[: len(META) // 2])
    the_line(caught)


def test_no_byte_of_a_kit_that_is_not_the_original_is_parsed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = sums(folder)
    (folder / DEVKIT).write_bytes((folder / DEVKIT).read_bytes()[:-1] + b"?")
    note = {"size": (folder / DEVKIT).stat().st_size, "changed_ns": (folder / DEVKIT).stat().st_mtime_ns}
    (folder / ".val.part").mkdir()
    (folder / ".val.part" / f".{DEVKIT}.json").write_text(json.dumps({**note, "md5": known[DEVKIT]}))
    monkeypatch.setattr(imagenet_archives, "_devkit_files", None)
    with pytest.raises(InputError, match="not the original"):
        unpack_split(folder, "val", md5=known)

"""What a killed process, a full disk and a folder that cannot be written leave behind: nothing half done."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest

from mgq.data.labelled_folders import evaluation_folder
from mgq.engine.runs.provenance import listing_of
from tests.conftest import Said, one_line_about, the_error
from tests.fakes.commands import ARCH, lines_of, started, waited_for
from tests.fakes.disks import small_disk

TRAINING = ("-a", ARCH, "--image-size", "32", "--batch-size", "8", "--limit", "16", "-w", "1")
LONG = ("--epochs", "500")


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder on a disk of its own with room for 256 kB."""
    with small_disk(tmp_path / "disk", "256k") as folder:
        yield folder


def said_by(folder: Path, *words: str) -> Said:
    """What `mgq WORDS` says in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "mgq", *words], cwd=folder, capture_output=True, text=True, timeout=240
    )
    return Said(done.returncode, done.stdout, done.stderr)


def half_written(folder: Path) -> list[Path]:
    return list(folder.rglob("*.part"))


@pytest.mark.parametrize(
    "number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=["ctrl-c", "sigterm", "closed terminal"]
)
def test_a_signal_saves_a_training_and_says_how_to_go_on(tmp_path: Path, number: signal.Signals) -> None:
    child = started("train", tmp_path, *TRAINING, *LONG)
    run = tmp_path / "runs" / f"{ARCH}.normal"
    waited_for(lambda: lines_of(run / "metrics.jsonl") >= 1, child)
    child.send_signal(number)
    _, err = child.communicate(timeout=120)
    assert child.returncode == 130, err
    assert f"mgq train --resume -a {ARCH} -s runs" in err and "Traceback" not in err
    assert (run / "last.safetensors").exists() and not half_written(tmp_path)


def test_sigterm_ends_another_verb_by_one_line(tmp_path: Path) -> None:
    child = started("infer", tmp_path, "-")
    waited_for(lambda: catches_sigterm(child.pid), child)
    child.send_signal(signal.SIGTERM)
    _, err = child.communicate(timeout=120)
    assert child.returncode == 130 and "error: interrupted" in err and "Traceback" not in err
    assert not half_written(tmp_path)


def test_an_image_that_disappears_while_training_is_named_and_replaced(tmp_path: Path) -> None:
    for part, number in (("train", 12), ("val", 2)):
        for kind in ("blue", "red"):
            for index in range(number):
                path = tmp_path / "set" / part / kind / f"{index}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                cv2.imwrite(str(path), np.full((40, 40, 3), (200, 9 * index, 40 if kind == "red" else 90), np.uint8))
    words = ("-a", ARCH, "-d", "set", "--from-scratch", "--image-size", "32", "--batch-size", "8", "-w", "1")
    child = started("train", tmp_path, *words, *LONG, "--max-bad", "0.1")
    metrics = tmp_path / "runs" / f"{ARCH}.normal" / "metrics.jsonl"
    waited_for(lambda: lines_of(metrics) >= 1, child)
    (tmp_path / "set" / "train" / "red" / "5.png").unlink()
    before = lines_of(metrics)
    waited_for(lambda: lines_of(metrics) >= before + 3, child)
    child.send_signal(signal.SIGTERM)
    _, err = child.communicate(timeout=120)
    assert child.returncode == 130 and lines_of(metrics) >= before + 3, err
    named = [line for line in err.splitlines() if "5.png" in line]
    assert len(named) == 1 and "red" in named[0] and "Traceback" not in err


def catches_sigterm(pid: int) -> bool:
    status = Path(f"/proc/{pid}/status")
    lines = status.read_text().splitlines() if status.exists() else []
    caught = next((int(line.split()[1], 16) for line in lines if line.startswith("SigCgt")), 0)
    return bool(caught >> (signal.SIGTERM - 1) & 1)


@pytest.mark.slow
def test_a_second_run_in_the_same_folder_is_refused_until_the_first_is_gone(tmp_path: Path) -> None:
    first = started("train", tmp_path, *TRAINING, *LONG)
    last = tmp_path / "runs" / f"{ARCH}.normal" / "last.safetensors"
    waited_for(last.exists, first)
    refused = said_by(tmp_path, "train", "--resume", "-a", ARCH)
    assert first.poll() is None
    first.kill()
    first.communicate()
    assert one_line_about(the_error(refused), "another mgq is writing", f"{ARCH}.normal", "--save")
    after = said_by(tmp_path, "train", *TRAINING, "--epochs", "1")
    assert after.code == 0, after


@pytest.mark.parametrize(
    "words",
    [
        ("train", *TRAINING, "--epochs", "1", "-s", "disk"),
        pytest.param(("calibrate", "-a", "efficientnet_lite0", "--data-free", "-s", "disk"), marks=pytest.mark.slow),
        ("dump", "-o", "disk/cat.megengine"),
        pytest.param(("dump", "--format", "onnx", "--check", "none", "-o", "disk/cat.onnx"), marks=pytest.mark.slow),
    ],
)
def test_a_full_disk_is_one_line_and_leaves_nothing_half_written(
    tmp_path: Path, full_disk: Path, words: tuple[str, ...]
) -> None:
    said = said_by(tmp_path, *words)
    assert said.code == 1, said
    errors = [line for line in said.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "full" in errors[0] and "disk" in errors[0] and "Traceback" not in said.err
    assert not half_written(full_disk)
    assert not [path for path in full_disk.rglob("*") if path.suffix != ".lock"]


def said_into(output: str, *words: str, buffered: bool = True) -> tuple[int, str]:
    """Exit code and errors of `mgq WORDS` whose standard output a shell sends to ``output``, such as ``>/dev/full``."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "" if buffered else "1"}
    command = f"{shlex.join([sys.executable, '-m', 'mgq', *words])} {output}"
    done = subprocess.run(command, shell=True, env=environment, capture_output=True, text=True, timeout=120)
    return done.returncode, done.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
@pytest.mark.parametrize("words", [("--version",), ("--help",), (), ("models", "--json")], ids=" ".join)
@pytest.mark.parametrize("buffered", [True, False])
def test_output_that_cannot_be_written_is_one_line(words: tuple[str, ...], buffered: bool) -> None:
    code, err = said_into(">/dev/full", *words, buffered=buffered)
    assert code == 1 and err.count("\n") == 1
    assert "standard output cannot be written (No space left on device)" in err


def test_output_that_is_closed_is_no_failure() -> None:
    assert said_into(">&-", "--version") == (0, "")


@pytest.mark.parametrize(
    "words",
    [
        ("train", *TRAINING, "--epochs", "1", "-s", "closed/runs"),
        ("calibrate", "-a", "efficientnet_lite0", "--data-free", "-s", "closed/runs"),
        ("dump", "-o", "closed/cat.megengine"),
        ("analyze", "--html", "closed/cat.html"),
        ("bench", "--json", "closed/speed.json"),
    ],
)
def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path, words: tuple[str, ...]) -> None:
    closed = tmp_path / "closed"
    closed.mkdir()
    closed.chmod(0o555)
    if os.geteuid() == 0:
        mounted = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(closed)], capture_output=True, check=False
        )
        if mounted.returncode:
            pytest.skip("root may write everywhere, and a read-only disk cannot be mounted here")
    try:
        said = said_by(tmp_path, *words)
        assert one_line_about(the_error(said), "closed", "cannot write")
        assert list(closed.iterdir()) == []
    finally:
        if os.geteuid() == 0:
            subprocess.run(["umount", str(closed)], check=True)
        closed.chmod(0o755)


@pytest.mark.slow
def test_the_same_seed_gives_the_same_bits_whatever_the_folder_and_the_workers(tmp_path: Path) -> None:
    files = []
    for name, workers in (("one", "1"), ("two", "2")):
        (tmp_path / name).mkdir()
        words = ("train", *TRAINING[:-2], "-w", workers, "--epochs", "1", "--seed", "5", "-s", f"runs {name}")
        said = said_by(tmp_path / name, *words)
        assert said.code == 0, said
        run = tmp_path / name / f"runs {name}" / f"{ARCH}.normal"
        files.append((run / "checkpoint.safetensors").read_bytes())
        told = json.loads((run / "environment.json").read_text())
        assert told["checkpoint_sha256"] == hashlib.sha256(files[-1]).hexdigest()
        assert told["seed"] == 5 and told["weights"]["sha256"] is None and told["train"]["pictures"] == 16
        (process,) = told["processes"]
        assert process["command"] == shlex.join(["mgq", *words]) and process["workers"] == int(workers)
        assert {"megengine", "numpy", "onednn-cpu-gomp", "numba", "mgq"} <= set(process["versions"])
    assert files[0] == files[1]


def test_the_listing_of_images_tells_another_size_and_another_name(tmp_path: Path) -> None:
    for name in ("kind/a.png", "kind/b.png", "other/a.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    before = listing_of(evaluation_folder(tmp_path))
    assert before["pictures"] == 3 and listing_of(evaluation_folder(tmp_path)) == before
    (tmp_path / "kind" / "b.png").write_bytes(b"longer than before")
    longer = listing_of(evaluation_folder(tmp_path))
    (tmp_path / "kind" / "b.png").rename(tmp_path / "kind" / "c.png")
    named = listing_of(evaluation_folder(tmp_path))
    assert len({before["sha256"], longer["sha256"], named["sha256"]}) == 3

"""A run's folder: nothing is lost in it, nothing is there twice, and nobody else writes to it."""

from __future__ import annotations

import errno
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mgq.engine.runs.run_folder import RunFolder, read_metrics
from mgq.engine.runs.training_state import TrainingState, read_training_state, write_training_state
from mgq.errors import FailureError, InputError
from mgq.weights.checkpoint import info_of
from mgq.weights.state_file import read_state
from tests.conftest import one_line_about

STATE = TrainingState(
    {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.array(7, np.int64), "c": np.zeros(0, np.int8)},
    {"epoch": 3, "loss": 0.1 + 0.2, "nan": math.nan, "deep": {"list": [1, "two"]}},
    {"lr": 1e-5},
    {"mgq": "0"},
)


def new_run(save: Path, tensorboard: bool = False) -> RunFolder:
    return RunFolder.create(save, "net", "normal", tensorboard)


def entry(epoch: int) -> dict[str, float]:
    return {"epoch": epoch, "step": epoch * 10, "loss": 1 / epoch, "val_top1": 50.0 + epoch, "lr": 0.1}


# ---- the folder ----


def test_an_earlier_run_is_kept_under_the_first_free_name(tmp_path: Path) -> None:
    for number in range(3):
        with new_run(tmp_path) as run:
            run.log(f"run {number}")
            assert run.path == tmp_path / "net.normal"
            assert (run.notice is None) == (number == 0)
    assert "run 0" in (tmp_path / "net.normal.1" / "log.txt").read_text()
    assert "run 1" in (tmp_path / "net.normal.2" / "log.txt").read_text()
    assert "run 2" in (tmp_path / "net.normal" / "log.txt").read_text()


def test_what_is_whole_or_nothing_leaves_the_earlier_run_and_no_lock(tmp_path: Path) -> None:
    def write_half() -> None:
        with new_run(tmp_path) as run, run.whole_or_nothing():
            run.write_recipe("half = true")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_half()
    assert list(tmp_path.iterdir()) == []
    with new_run(tmp_path) as run, run.whole_or_nothing():
        run.write_recipe("whole = true")
    with pytest.raises(KeyboardInterrupt):
        write_half()
    assert [path.name for path in tmp_path.iterdir()] == ["net.normal"]
    assert (run.path / "recipe.toml").read_text() == "whole = true"
    with new_run(tmp_path), pytest.raises(InputError, match="another mgq"):
        new_run(tmp_path)


@pytest.mark.parametrize("saved", ["checkpoint.safetensors", "last.safetensors", None])
def test_a_run_that_ends_before_it_saved_anything_leaves_nothing(tmp_path: Path, saved: str | None) -> None:
    """Its log lay there without a checkpoint, and the earlier run under another name."""
    save = tmp_path / "new" / "runs"
    with pytest.raises(KeyboardInterrupt), new_run(save) as run, run.saved_or_nothing():
        run.log("begun")
        if saved:
            (run.path / saved).touch()
        raise KeyboardInterrupt
    assert (save / "net.normal" / "log.txt").exists() == bool(saved)
    assert (tmp_path / "new").exists() == bool(saved)


def test_a_run_that_cannot_be_resumed_leaves_no_lock(tmp_path: Path) -> None:
    (tmp_path / "net.normal").mkdir()
    with pytest.raises(InputError, match=r"no last\.safetensors"):
        RunFolder.open(tmp_path, "net", "normal")
    assert not list(tmp_path.glob(".*"))


def test_two_runs_in_one_folder_at_once_are_refused(tmp_path: Path) -> None:
    with new_run(tmp_path) as run:
        run.log("first")
        with pytest.raises(InputError) as caught:
            new_run(tmp_path)
        assert one_line_about(str(caught.value), "net.normal", "another mgq", "--save")
        run.log("goes on")
    assert not (tmp_path / "net.normal.1").exists()


def test_the_lock_of_a_killed_process_blocks_nobody(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path\n"
        "from mgq.system.megengine_start import import_megengine; import_megengine()\n"
        "from mgq.engine.runs.run_folder import RunFolder; run = RunFolder.create(Path(sys.argv[1]), 'net', 'normal')\n"
        "run.log('alive'); print('ready', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None and child.stdout.readline().strip() == "ready"
        with pytest.raises(InputError):
            new_run(tmp_path)
        child.send_signal(signal.SIGKILL)
    new_run(tmp_path).close()


def test_what_a_killed_process_left_half_written_is_taken_away(tmp_path: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    with new_run(tmp_path) as run:
        run.write_state(STATE)
        dead = [run.path / f".{name}.{gone.pid}-0a1b.part" for name in ("float.safetensors", "last.safetensors")]
        others = [run.path / f".log.txt.{os.getpid()}-0a1b.part", run.path / ".mine.part"]
        for path in (*dead, *others):
            path.write_text("half")
    with RunFolder.open(tmp_path, "net", "normal") as run:
        assert not any(path.exists() for path in dead) and all(path.exists() for path in others)
    dead[0].write_text("half")
    with new_run(tmp_path) as run:
        assert run.kept is not None and not (run.kept / dead[0].name).exists()


def test_opening_needs_a_state_to_go_on_from(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no run .*net\.normal to resume"):
        RunFolder.open(tmp_path, "net", "normal")
    new_run(tmp_path).close()
    with pytest.raises(InputError, match=r"no last\.safetensors"):
        RunFolder.open(tmp_path, "net", "normal")


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError) as caught:
        new_run(tmp_path / "file")
    assert one_line_about(str(caught.value), "file", "--save")


# ---- what it holds ----


def test_metrics_come_back_and_later_epochs_are_dropped(tmp_path: Path) -> None:
    with new_run(tmp_path) as run:
        for epoch in (1, 2, 3):
            run.add_metrics(entry(epoch))
        run.write_state(STATE)
    with RunFolder.open(tmp_path, "net", "normal") as run:
        run.keep_metrics(2)
        run.add_metrics(entry(3))
        assert [found["epoch"] for found in run.metrics()] == [1, 2, 3]
        assert run.metrics()[1]["loss"] == 0.5


def test_a_line_cut_by_a_kill_does_not_hurt(tmp_path: Path) -> None:
    with new_run(tmp_path) as run:
        run.add_metrics(entry(1))
        run.write_state(STATE)
    path = tmp_path / "net.normal" / "metrics.jsonl"
    with path.open("a") as file:
        file.write('{"epoch": 2, "lo')
    assert [found["epoch"] for found in read_metrics(path)] == [1]
    with RunFolder.open(tmp_path, "net", "normal") as run:
        run.add_metrics(entry(2))
    assert [json.loads(line)["epoch"] for line in path.read_text().splitlines()] == [1, 2]


def test_what_is_not_finite_is_strict_json_and_comes_back_as_nan(tmp_path: Path) -> None:
    with new_run(tmp_path) as run:
        run.add_metrics({"epoch": 1, "loss": math.inf, "val_loss": np.float32("nan")})
        assert math.isnan(run.metrics()[0]["loss"]) and math.isnan(run.metrics()[0]["val_loss"])
    assert "NaN" not in (tmp_path / "net.normal" / "metrics.jsonl").read_text()


def test_log_lines_have_times(tmp_path: Path) -> None:
    with new_run(tmp_path) as run:
        run.log("one\ntwo")
        lines = (run.path / "log.txt").read_text().splitlines()
    assert [line.split("  ", 1)[1] for line in lines] == ["one", "two"]
    assert all(line[:2] == "20" and line[13] == ":" for line in lines)


def test_tensorboard_reads_the_events_of_a_resumed_run_once(tmp_path: Path) -> None:
    with new_run(tmp_path, tensorboard=True) as run:
        for epoch in (1, 2):
            run.add_metrics(entry(epoch))
        run.write_state(STATE)
    with RunFolder.open(tmp_path, "net", "normal", tensorboard=True) as run:
        run.keep_metrics(1)
        run.add_metrics({**entry(2), "loss": 9.0})
        files = sorted((run.path / "events").iterdir())
    assert len(files) == 2
    assert [steps_in(path) for path in files] == [[10, 20], [20]]


def steps_in(path: Path) -> list[int]:
    """The steps of the scalar events in a file of TFRecords."""
    from tensorboardX.proto.event_pb2 import Event

    data, at, steps = path.read_bytes(), 0, []
    while at < len(data):
        size = int.from_bytes(data[at : at + 8], "little")
        event = Event.FromString(data[at + 12 : at + 12 + size])
        if event.HasField("summary"):
            steps.append(event.step)
        at += 12 + size + 4
    return steps


def test_a_full_disk_loses_nothing_that_was_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with new_run(tmp_path) as run:
        run.write_state(STATE)
        run.add_metrics(entry(1))
        before = {path.name: path.read_bytes() for path in run.path.iterdir()}

        def full(*_: object, **__: object) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr("mgq.io.atomic._sync", full)
        monkeypatch.setattr("mgq.io.append.os.write", full)
        with pytest.raises(FailureError, match="full"):
            run.write_state(STATE)
        with pytest.raises(FailureError, match="full"):
            run.add_metrics(entry(2))
        with pytest.raises(FailureError, match="full"):
            run.log("more")
        monkeypatch.undo()
        after = {path.name: path.read_bytes() for path in run.path.iterdir()}
    assert {name: after[name] for name in before} == before
    assert read_training_state(run.last).progress["epoch"] == 3


def test_curves_are_an_image_even_of_nothing(tmp_path: Path) -> None:
    with new_run(tmp_path) as run:
        assert run.write_curves("no epoch") is None
        for epoch in (1, 2):
            run.add_metrics({**entry(epoch), "loss": math.nan})
        assert run.write_curves("two epochs") is None
        assert (run.path / "curves.png").read_bytes()[:4] == b"\x89PNG"


def test_curves_that_cannot_be_written_stop_nothing(tmp_path: Path) -> None:
    with new_run(tmp_path) as run:
        (run.path / "curves.png").mkdir()
        problem = run.write_curves("title")
        (run.path / "metrics.jsonl").mkdir()
        unread = run.write_curves("title")
    assert problem is not None and one_line_about(problem, "curves.png")
    assert unread is not None and one_line_about(unread, "metrics.jsonl")


# ---- the state ----


def test_a_state_comes_back_to_the_bit(tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    write_training_state(path, STATE)
    found = read_training_state(path)
    for name, value in STATE.tensors.items():
        assert found.tensors[name].dtype == value.dtype and found.tensors[name].shape == value.shape
        assert np.array_equal(found.tensors[name], value)
    assert found.progress["loss"] == 0.1 + 0.2 and math.isnan(found.progress["nan"])
    assert found.progress["deep"] == {"list": [1, "two"]}
    assert found.recipe == STATE.recipe and found.versions == STATE.versions


@pytest.mark.parametrize("how", ["cut", "changed", "empty", "text", "missing"])
def test_a_damaged_state_never_loads(tmp_path: Path, how: str) -> None:
    path = tmp_path / "state.safetensors"
    write_training_state(path, STATE)
    data = bytearray(path.read_bytes())
    if how == "changed":
        data[-3] ^= 1
    elif how == "cut":
        del data[-5:]
    elif how == "empty":
        data.clear()
    elif how == "text":
        data = bytearray(b"hello " * 20)
    path.write_bytes(data)
    if how == "missing":
        path.unlink()
    with pytest.raises(InputError) as caught:
        read_training_state(path)
    assert one_line_about(str(caught.value), "state.safetensors")


def test_a_state_is_no_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "last.safetensors"
    write_training_state(path, STATE)
    with pytest.raises(InputError, match="not a checkpoint"):
        info_of(read_state(path).metadata, str(path))

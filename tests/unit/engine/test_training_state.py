"""A state to go on from is whole and unchanged, or it does not load."""

from __future__ import annotations

import math
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from mgq.engine.runs.training_state import TrainingState, read_training_state, write_training_state
from mgq.errors import InputError
from mgq.weights.checkpoint import TRAINING_KEY, write_tensors
from tests.conftest import one_line_about
from tests.fakes.places import ROOT

STATE = TrainingState({"w": np.arange(4, dtype=np.float32), "mask": np.array([True, False])}, {"epoch": 3})


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "last.safetensors"


def refused(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        read_training_state(path)
    assert one_line_about(str(caught.value), str(path))
    return str(caught.value)


def test_no_byte_can_change(path: Path) -> None:
    write_training_state(path, STATE)
    whole = path.read_bytes()
    for at in range(len(whole)):
        for flip in (0x01, 0x20, 0xFF):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ flip]) + whole[at + 1 :])
            refused(path)
    path.write_bytes(whole)
    assert read_training_state(path).progress == {"epoch": 3}


def test_no_byte_can_be_missing_or_more(path: Path) -> None:
    write_training_state(path, STATE)
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        refused(path)
    path.write_bytes(whole + b"\0")
    refused(path)


@pytest.mark.parametrize("dtype", ["?", "i1", "u1", "i2", "i4", "u4", "i8", "u8", "f2", "f4", "f8", "c8"])
@pytest.mark.parametrize("shape", [(), (1,), (0, 3), (2, 1, 3)])
def test_every_dtype_and_shape_comes_back(dtype: str, shape: tuple[int, ...], path: Path) -> None:
    value = (np.random.default_rng(0).normal(size=shape) * 100).astype(dtype)
    write_training_state(path, TrainingState({"a": value}, {}))
    found = read_training_state(path).tensors["a"]
    assert found.dtype == value.dtype and found.shape == value.shape and found.tobytes() == value.tobytes()
    assert found.flags.writeable


def test_bits_that_no_number_shows_come_back(path: Path) -> None:
    odd = np.array([0x7FC00001, 0x80000000, 0x00000001], np.uint32).view(np.float32)  # NaN's payload, -0, denormal
    strided = np.arange(24, dtype=np.float32).reshape(4, 6).T[::2]
    write_training_state(path, TrainingState({"odd": odd, "strided": strided}, {}))
    found = read_training_state(path).tensors
    assert found["odd"].tobytes() == odd.tobytes()
    assert np.array_equal(found["strided"], strided)


def test_numbers_of_the_progress_come_back_exactly(path: Path) -> None:
    floats = [0.1 + 0.2, 5e-324, 1.7976931348623157e308, -0.0, math.pi, math.inf]
    generator = np.random.default_rng(7)
    generator.random(5)
    progress = {"floats": floats, "generator": generator.bit_generator.state, "text": "grün\n\u4e2d"}
    write_training_state(path, TrainingState({}, progress))
    found = read_training_state(path).progress
    assert [number.hex() for number in found["floats"]] == [number.hex() for number in floats]
    assert found["text"] == progress["text"]
    again = np.random.default_rng(0)
    again.bit_generator.state = found["generator"]
    assert again.random() == generator.random()


def test_other_files_say_what_they_are(path: Path) -> None:
    write_tensors(path, {"w": np.zeros(3, np.float32)}, {"format": "pt"})
    assert "not the state of a training" in refused(path)
    assert "check the path" in refused(path.with_name("missing"))
    path.with_name("folder").mkdir()
    assert "check the path" in refused(path.with_name("folder"))


def test_a_later_format_is_named(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("mgq.engine.runs.training_state.FORMAT", 2)
        write_training_state(path, STATE)
    assert "update mgq" in refused(path)


def test_metadata_without_a_checksum_is_damaged(path: Path) -> None:
    write_tensors(path, {}, {TRAINING_KEY: '{"format": 1, "progress": {}}'})
    assert "damaged" in refused(path)


def test_a_process_killed_while_it_writes_leaves_a_whole_state(path: Path) -> None:
    script = """
import sys
from itertools import count
from pathlib import Path
import numpy as np
from mgq.engine.runs.training_state import TrainingState, write_training_state

for epoch in count(1):
    tensors = {str(i): np.full(50_000, epoch, np.float32) for i in range(20)}
    write_training_state(Path(sys.argv[1]), TrainingState(tensors, {"epoch": epoch}))
"""
    last = 0
    for moment in range(5):
        command = [sys.executable, "-c", script, str(path)]
        with subprocess.Popen(command, cwd=ROOT) as child:
            deadline = time.monotonic() + 60
            path.unlink(missing_ok=True)
            while not path.exists() and time.monotonic() < deadline:
                time.sleep(0.005)
            time.sleep(0.007 * moment)
            child.send_signal(signal.SIGKILL)
        state = read_training_state(path)
        last = state.progress["epoch"]
        assert all((value == last).all() for value in state.tensors.values())
    assert last

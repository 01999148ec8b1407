"""Several processes come to the weights that one comes to, again and again, and go on with them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from mgq.engine.runs.run_folder import LAST
from mgq.engine.runs.training_state import read_training_state
from mgq.system.mpi_world import find_launcher

pytestmark = pytest.mark.skipif(
    find_launcher() is None or find_spec("mpi4py") is None, reason="needs MPI: pip install 'mgq[mpi]'"
)
Weights = Mapping[str, npt.NDArray[Any]]
TWO_EPOCHS: dict[str, Any] = {"epochs": 2, "val_every": 2, "sync_bn": True, "from_scratch": True}
OF_ONE: dict[str, Any] = {"batch_size": 16, "lr": 0.02}
OF_EACH: dict[str, Any] = {"batch_size": 8, "lr": 0.01}
ROUNDING = 1e-5


def train(folder: Path, processes: int, mode: str = "normal", **words: Any) -> str:
    """Train as that many processes into ``folder``; what they said."""
    command = [sys.executable, "-m", "tests.fakes.training_together", str(folder), mode, json.dumps(words)]
    if processes > 1:
        launcher = find_launcher()
        assert launcher is not None
        command = [launcher, "-n", str(processes), *command]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def weights(folder: Path, mode: str = "normal") -> Weights:
    found = read_training_state(next(folder.glob(f"*.{mode}")) / LAST).tensors
    return {name: value for name, value in found.items() if "observer" not in name}


def distance(one: Weights, other: Weights) -> float:
    """Of all weights together, against their length."""
    assert one.keys() == other.keys()
    squares = sum(float(((value.astype(np.float64) - other[name]) ** 2).sum()) for name, value in one.items())
    return float(np.sqrt(squares / sum(float((value.astype(np.float64) ** 2).sum()) for value in one.values())))


def has_same_bits(one: Weights, other: Weights) -> bool:
    return one.keys() == other.keys() and all(one[name].tobytes() == other[name].tobytes() for name in one)


@pytest.mark.slow
def test_two_processes_learn_what_one_does_and_go_on_to_the_bit(tmp_path: Path) -> None:
    one, two, stopped, fewer = (tmp_path / name for name in ("one", "two", "stopped", "fewer"))
    train(one, 1, **TWO_EPOCHS, **OF_ONE)
    train(two, 2, **TWO_EPOCHS, **OF_EACH)
    assert 0 < distance(weights(one), weights(two)) < ROUNDING

    train(stopped, 2, **TWO_EPOCHS, **OF_EACH, stop_after="epoch 1/2")
    fewer.mkdir()
    subprocess.run(["cp", "-r", *stopped.iterdir(), fewer], check=True)
    train(stopped, 2, resume=True)
    assert has_same_bits(weights(stopped), weights(two))

    said = train(fewer, 1, resume=True)
    assert "begun with 2 processes, going on with 1: the same pictures a step, equal up to rounding" in said
    assert 0 < distance(weights(fewer), weights(two)) < ROUNDING


@pytest.mark.slow
def test_two_processes_learn_for_int8_what_one_does(tmp_path: Path) -> None:
    train(tmp_path, 1, from_scratch=True, **OF_ONE)
    (run,) = tmp_path.glob("*.normal")
    start = {"checkpoint": str(run / "checkpoint.safetensors"), "sync_bn": True}
    train(tmp_path / "one", 1, "qat", **start, batch_size=16, lr=0.002)
    train(tmp_path / "two", 2, "qat", **start, batch_size=8, lr=0.001)
    assert 0 < distance(weights(tmp_path / "one", "qat"), weights(tmp_path / "two", "qat")) < ROUNDING

    stopped, of_each = tmp_path / "stopped", {"batch_size": 8, "lr": 0.001}
    train(stopped, 2, "qat", **start, **of_each, stop_in="calibrate: candidates")
    kept = read_training_state(next(stopped.glob("*.qat")) / LAST)
    assert not kept.progress["prepared"]
    train(stopped, 2, "qat", resume=True)
    assert has_same_bits(weights(stopped, "qat"), weights(tmp_path / "two", "qat"))

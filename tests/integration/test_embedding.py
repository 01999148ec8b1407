"""What a program that embeds mgq sees of it: an environment as it was, and the standard log."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import pytest

from mgq.data.labelled_folders import evaluation_folder
from mgq.events import Progress
from mgq.machine import SPIN_VARIABLE
from tests.conftest import write_images

IMPORT_THEN_CALL = f"""
import os
os.environ.pop({SPIN_VARIABLE!r}, None)
before = dict(os.environ)
import mgq, mgq.machine, mgq.runtime.registry, mgq.cli.main
assert dict(os.environ) == before
from mgq import create_model, infer, train
changed = {{name for name, value in os.environ.items() if before.get(name) != value}}
assert changed <= {{"LD_LIBRARY_PATH"}}, changed  # which OpenCV adds its own folder to
create_model("shufflenet_v1_x0_5_g3")
assert os.environ[{SPIN_VARIABLE!r}] == "1"
"""


def test_the_environment_is_as_it_was_until_a_call_needs_it() -> None:
    done = subprocess.run([sys.executable, "-c", IMPORT_THEN_CALL], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "call",
    [
        "mgq.infer(mode='normal')",
        "mgq.create_model('shufflenet_v1_x0_5_g3')",
        "mgq.quantize, mgq.dump, mgq.analyze, mgq.load_weights",
        "mgq.calibrate(arch='shufflenet_v1_x0_5_g3', checkpoint='missing.pkl')",
    ],
)
def test_calls_say_nothing_on_standard_error_and_leave_the_filters_of_warnings(call: str, tmp_path: Path) -> None:
    program = f"""
import warnings, contextlib, mgq
with contextlib.suppress(mgq.InputError):
    {call}
assert [f for f in warnings.filters if f[1] is not None and 'pkg_resources' in f[1].pattern] == []
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.fixture
def labelled(tmp_path: Path) -> Path:
    """A set of two classes with a file in it that is no picture, which is worth a remark."""
    for kind in ("a", "b"):
        write_images(tmp_path / kind, 1)
    (tmp_path / "a" / "notes.txt").write_text("no picture")
    return tmp_path


def test_messages_and_progress_go_to_the_log_where_there_are_no_callbacks(
    labelled: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG, "mgq"):
        evaluation_folder(labelled)
    said = {record.levelno: record.getMessage() for record in caplog.records}
    assert "left out 1 file" in said[logging.INFO]
    assert labelled.name in said[logging.DEBUG]


def test_callbacks_take_what_the_log_would(labelled: Path, caplog: pytest.LogCaptureFixture) -> None:
    remarks: list[str] = []
    steps: list[Progress] = []
    with caplog.at_level(logging.DEBUG, "mgq"):
        evaluation_folder(labelled, steps.append, remarks.append)
    assert remarks and not caplog.records


UNGUARDED = """
import mgq
print("runs")
report = mgq.benchmark(["shufflenet_v1_x0_5_g3"], ["fp32"], threads=[1], rounds=1, image_size=64)
assert report.rows
"""


@pytest.mark.slow
def test_a_script_without_a_guard_runs_once(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(UNGUARDED)
    done = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "runs\n"), done.stderr

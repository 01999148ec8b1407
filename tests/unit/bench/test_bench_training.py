"""``mgq bench --train``: the same steps by both sets of kernels, in turns, and what is said of them."""

from __future__ import annotations

import itertools
import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil  # type: ignore[import-untyped]
import pytest

from mgq.bench import torch_peer
from mgq.bench.training_speed import (
    FAST,
    STOCK,
    TORCH,
    Stepper,
    TrainingReport,
    TrainingSettings,
    make_training_settings,
    on_cores,
    training_benchmark,
    training_markdown,
)
from mgq.errors import InputError
from mgq.events import Progress
from mgq.machine import usable_cores
from mgq.quantization.modes import Mode
from mgq.quantization.qat import qat_modules
from mgq.zoo.network_state import set_state
from tests.conftest import Mgq, the_error

ARCH = "shufflenet_v1_x0_5_g3"
TINY = TrainingSettings((ARCH,), rounds=2, batch=2, image_size=32)


@pytest.fixture(scope="module")
def report() -> TrainingReport:
    """Measured with a clock by which every step takes a second."""
    ticks = itertools.count(step=10**9)
    return training_benchmark(TINY, clock=lambda: next(ticks))


def test_both_kernels_and_modes_have_a_row(report: TrainingReport) -> None:
    rows = [(row.network, row.mode, row.kernels) for row in report.rows]
    assert rows == [(ARCH, mode, kernels) for mode in ("normal", "qat") for kernels in (STOCK, FAST)]
    assert all(0 < row.cores < 1.5 for row in report.rows)
    assert all(len(row.rounds_ns) == 2 for row in report.rows)


def test_speed_and_ratios_follow_from_the_times(report: TrainingReport) -> None:
    assert all(row.speed.fps == pytest.approx(2.0) and row.speed.p50_ms == 1000 for row in report.rows)
    fast_qat = report.rows[-1]
    assert fast_qat.speedup is not None and fast_qat.speedup.median == pytest.approx(1)
    assert fast_qat.of_float is not None and fast_qat.of_float.median == pytest.approx(1)
    assert report.rows[0].speedup is None and report.rows[1].of_float is None


def test_the_report_says_its_conditions_and_keeps_all_samples(report: TrainingReport) -> None:
    body = json.loads(report.to_json())
    assert body["format"].startswith("mgq bench --train") and len(body["rows"]) == 4
    assert body["rows"][0]["rounds_ns"][0] == [10**9]
    text = training_markdown(report)
    assert "batch 2 of 32x32 pixels" in text and "random weights" in text and text.count(ARCH) == 4


def fake_torch(folder: Path, answers: str) -> Path:
    """A Python, as far as the benchmark asks, that has a PyTorch."""
    program = folder / "python"
    script = f"""#!/bin/sh
if [ "$1" = -c ]; then echo 2.0; exit 0; fi
read order; {answers}
while read steps; do echo '{{"times": [2000000000, 2000000000], "processor": 3000000000}}'; done
"""
    program.write_text(script, encoding="utf-8")
    program.chmod(0o755)
    return program


def test_pytorch_is_a_row_and_a_ratio(tmp_path: Path) -> None:
    python = fake_torch(tmp_path, """echo '{"version": "2.0"}'""")
    settings = make_training_settings([ARCH], 2, 2, 32, stock=False, against=[Path("torch")], python=python)
    ticks = itertools.count(step=10**9)
    found = training_benchmark(settings, clock=lambda: next(ticks))
    assert [row.kernels for row in found.rows] == [FAST, TORCH] * 2
    ours, theirs = found.rows[:2]
    assert theirs.speed.fps == pytest.approx(1.0)
    assert ours.of_torch is not None and ours.of_torch.median == pytest.approx(2)
    assert found.versions["torch"] == "2.0"


def test_a_network_that_pytorch_lacks_is_one_remark(tmp_path: Path) -> None:
    python = fake_torch(tmp_path, """echo '{"problem": "no such network"}'""")
    settings = make_training_settings([ARCH], 1, 2, 32, stock=False, against=[Path("torch")], python=python)
    ticks = itertools.count(step=10**9)
    found = training_benchmark(settings, clock=lambda: next(ticks))
    assert [row.kernels for row in found.rows] == [FAST] * 2
    assert found.remarks()[0] == f"{ARCH}, normal, PyTorch: no such network"


@pytest.mark.slow
def test_each_network_is_trained_in_a_process_of_its_own() -> None:
    settings = make_training_settings([ARCH], 2, 2, 32, stock=False)
    before = {child.pid for child in psutil.Process().children()}
    seen = set[int]()

    def look(progress: Progress) -> None:
        seen.update(child.pid for child in psutil.Process().children())

    found = training_benchmark(settings, on_progress=look)
    assert [(row.mode, row.kernels) for row in found.rows] == [("normal", FAST), ("qat", FAST)]
    assert all(0 < row.cores < 1.5 and len(row.rounds_ns) == 2 for row in found.rows)
    assert len(seen - before) >= 2
    left = [child for child in psutil.Process().children() if child.pid in seen - before]
    assert all("resource_tracker" in " ".join(child.cmdline()) for child in left)


def test_a_missing_pytorch_is_one_line_that_says_how_to_get_it(mgq: Mgq, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_peer, "find_spec", lambda name: None)
    assert "--torch-python" in the_error(mgq("bench", "--train", "--against", "torch"))
    assert "/nowhere/python does not exist" in the_error(mgq("bench", "--train", "--torch-python", "/nowhere/python"))


@pytest.mark.skipif(usable_cores() < 2, reason="needs two cores")
def test_rows_run_on_the_cores_that_they_name() -> None:
    before = os.sched_getaffinity(0)
    with on_cores(1):
        assert os.sched_getaffinity(0) == {max(before)}
    assert os.sched_getaffinity(0) == before


def test_both_kernels_take_the_same_step() -> None:
    losses = {}
    for kernels in (STOCK, FAST):
        stepper = Stepper(ARCH, Mode.NORMAL, kernels, TINY)
        state = {name: np.full(t.shape, 0.01, np.float32) for name, t in stepper.network.named_tensors()}
        for name, value in state.items():
            if name.endswith(("bn.weight", "running_var")):
                value[...] = 1
        set_state(stepper.network, state)
        with stepper.by_kernels():
            losses[kernels] = stepper.step()
    assert losses[FAST] == pytest.approx(losses[STOCK], rel=1e-5)


def test_a_network_of_many_layers_stays_a_network_of_numbers_in_quantization_aware_training() -> None:
    """New batch norms would let activations grow until all of them are rounded to 0."""
    stepper = Stepper("mobilenet_v2", Mode.QAT, FAST, replace(TINY, batch=8))
    ranges = [float(part.act_observer.max_val.numpy()) for part in qat_modules(stepper.network) if part.act_observer]
    assert max(ranges) < 1e4
    with stepper.by_kernels():
        assert all(np.isfinite(stepper.step()) for _ in range(3))


@pytest.mark.parametrize(
    "words",
    [{"rounds": 0}, {"batch": 0}, {"image_size": 50}, {"networks": ["resnet19"]}],
    ids=lambda words: next(iter(words)),
)
def test_settings_that_cannot_be_are_refused(words: dict[str, object]) -> None:
    given: dict[str, object] = {"networks": [], "rounds": None, "batch": None, "image_size": None, **words}
    with pytest.raises(InputError):
        make_training_settings(**given)  # type: ignore[arg-type]


def test_options_of_the_other_benchmark_are_refused(mgq: Mgq) -> None:
    assert "--train" in the_error(mgq("bench", "--train", "--int8"))

"""``mgq bench --train``: the same steps by both sets of kernels, in turns, and what is said of them."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest

from mgq.bench.training_speed import (
    FAST,
    STOCK,
    Stepper,
    TrainingReport,
    TrainingSettings,
    make_training_settings,
    training_benchmark,
    training_markdown,
)
from mgq.errors import InputError
from mgq.quantization.modes import Mode
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


def test_both_kernels_take_the_same_step() -> None:
    losses = {}
    for kernels in (STOCK, FAST):
        stepper = Stepper(ARCH, Mode.NORMAL, kernels, TINY)
        state = {name: np.full(t.shape, 0.01, np.float32) for name, t in stepper.network.named_tensors()}
        for name, value in state.items():
            if name.endswith(("bn.weight", "running_var")):
                value[...] = 1
        stepper.network.load_state_dict(state)
        losses[kernels] = stepper.step()
    assert losses[FAST] == pytest.approx(losses[STOCK], rel=1e-5)


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

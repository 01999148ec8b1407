"""The registry of backends: one record is all that the commands read."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from mgq.bench import doctor
from mgq.bench.doctor import State, list_checks
from mgq.bench.settings import Precision, Settings
from mgq.bench.suite import BenchmarkSuite, computes_in
from mgq.errors import InputError
from mgq.runtime import registry
from mgq.runtime.registry import (
    BACKENDS,
    COMPARED,
    EAGER,
    TRACED,
    backend_names,
    choose_backend,
    get_backend,
    list_packages,
)
from mgq.system.environment import this_machine

NEW = replace(
    get_backend("openvino"),
    key="new",
    name="New",
    package="no_such_package",
    distribution="no-such-package",
    mend="pip install new",
    probe="",
)


@pytest.fixture
def with_new(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "BACKENDS", (*BACKENDS, NEW))
    monkeypatch.setattr(doctor, "BACKENDS", (*BACKENDS, NEW))


@pytest.mark.usefixtures("with_new")
def test_one_record_is_enough_for_infer_doctor_and_version() -> None:
    assert "new" in backend_names()
    with pytest.raises(InputError, match="New is not installed: pip install new"):
        choose_backend(Path("a.onnx"), "new")
    finding = next(check for check in list_checks(Path("runs")) if check.name == "New").run()
    assert (finding.state, finding.found, finding.mend) == (State.LACKING, "not installed", "pip install new")
    assert list_packages()["New"] == "no-such-package"


def test_a_record_has_a_row_in_the_benchmark(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(BenchmarkSuite, "macs", 1)
    suite = BenchmarkSuite("resnet18", Settings(("resnet18",), threads=(1,)), this_machine(), tmp_path, [NEW])
    rows = [case for case in suite.cases() if case.engine == "New"]
    assert [(case.precision, case.target) for case in rows] == [(Precision.FP32, ""), (Precision.INT8, "onnx")]
    with pytest.raises(InputError, match="pip install new"):
        rows[0].load()


def test_megengine_comes_first_and_the_fastest_last_in_the_benchmark() -> None:
    of_files = [backend for backend in reversed(BACKENDS) if backend.compared]
    assert list(COMPARED) == [EAGER, TRACED, *of_files]
    native = get_backend("native")
    assert computes_in(native, Precision.INT8) and not computes_in(native, Precision.FP32)
    assert len({backend.key for backend in (*BACKENDS, *COMPARED)}) == len({*BACKENDS, *COMPARED})

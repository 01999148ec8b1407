"""What is said of an int8 file beside a float one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from mgq.cli.deployment_table import show_deployment
from mgq.cli.dump import FileOptions, show_speed
from mgq.engine.classifier.deployment import Deployment, EngineRow


def measured(*speedups: float) -> Deployment:
    path = Path("model.int8.onnx")
    rows = [EngineRow(f"engine {n}", "1", 1.0, 1 / speedup, 100.0, 30.0, path) for n, speedup in enumerate(speedups)]
    return Deployment(path, 4000, 1000, 8, 1, tuple(rows))


def test_a_file_that_is_slower_than_float_everywhere_is_not_called_done(capsys: pytest.CaptureFixture[str]) -> None:
    show_deployment(measured(0.9, 0.8))
    said = capsys.readouterr()
    assert "not done: model.int8.onnx is slower than float in every engine here" in said.err
    assert "int8 file:" not in said.out


def test_one_that_is_slower_in_an_engine_is_told_with_the_mend(capsys: pytest.CaptureFixture[str]) -> None:
    show_deployment(measured(0.9, 2.0))
    said = capsys.readouterr()
    assert "slower than float in engine 0: run the float file there (`mgq dump -m normal`)" in said.err
    assert "int8 file: model.int8.onnx" in said.out and "not done" not in said.err


def test_float_is_said_to_be_the_imported_file_where_that_is_faster(capsys: pytest.CaptureFixture[str]) -> None:
    found = measured(0.9, 0.9, 2.0)
    rows = (found.rows[0], *(replace(row, is_own_float=True) for row in found.rows[1:]))
    show_deployment(replace(found, rows=rows))
    said = " ".join(capsys.readouterr().err.split())
    assert "float is the imported file itself in engine 1 and engine 2" in said
    assert "slower than float in engine 0: run the float file there (`mgq dump -m normal`)" in said
    assert "slower than float in engine 1: run the imported file there" in said
    assert "in engine 2: run" not in said


@pytest.mark.parametrize(("same", "is_said"), [(52.1, True), (90.0, False)])
def test_an_engine_in_which_int8_answers_otherwise_is_told(
    capsys: pytest.CaptureFixture[str], same: float, is_said: bool
) -> None:
    found = measured(1.3, 2.0)
    show_deployment(replace(found, rows=(found.rows[0], replace(found.rows[1], same=same))))
    said = " ".join(capsys.readouterr().err.split())
    assert ("int8 answers fewer than 90 % of the pictures as float does in engine 1: `mgq analyze`" in said) == is_said


@pytest.mark.parametrize(("others", "is_said"), [(0.43, True), (0.05, False)])
def test_the_work_of_other_programs_is_said_where_it_disturbed_the_times(
    capsys: pytest.CaptureFixture[str], others: float, is_said: bool
) -> None:
    show_deployment(replace(measured(2.0), others=others))
    said = " ".join(capsys.readouterr().err.split())
    assert ("other programs had 43% of the processor meanwhile: times are rough" in said) == is_said


@pytest.mark.parametrize(("plain", "is_said"), [(0.7, True), (1.2, False)])
def test_where_the_file_for_any_engine_is_slower_than_float_beside_its_own_it_says_so(
    capsys: pytest.CaptureFixture[str], plain: float, is_said: bool
) -> None:
    found = measured(1.3, 2.0)
    own = replace(found.rows[0], path=Path("model.int8.own.onnx"), plain_speedup=plain)
    show_deployment(replace(found, rows=(own, replace(found.rows[1], plain_speedup=2.0))))
    said = " ".join(capsys.readouterr().err.split())
    told = "model.int8.onnx is slower than float in engine 0: take the file for that engine alone there"
    assert (told in said) == is_said

    show_deployment(replace(found, rows=(replace(own, int8_ms=2.0), found.rows[1])))
    assert told not in " ".join(capsys.readouterr().err.split()), "its own file is slower than float, too"


@pytest.mark.parametrize(
    ("form", "slower", "advice"),
    [
        ("openvino", "ONNX Runtime", "write a file for it alone (`--for`), or run the float file there"),
        ("openvino", "OpenVINO", "in OpenVINO: run the float file there"),
        ("any", "OpenVINO", "write a file for it alone (`--for`), or run the float file there"),
    ],
)
def test_a_file_for_another_engine_is_advised_where_this_one_is_not_for_it(
    capsys: pytest.CaptureFixture[str], form: str, slower: str, advice: str
) -> None:
    found = measured(0.5, 2.0)
    rows = (replace(found.rows[0], engine=slower), found.rows[1])
    show_speed(replace(found, rows=rows), FileOptions(engine=form))
    assert advice in " ".join(capsys.readouterr().err.split())

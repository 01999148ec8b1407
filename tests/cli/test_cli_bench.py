"""``mgq bench``: its options, what it shows, what it writes; and one real contest, kept small."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from rich.cells import cell_len
from typer.testing import CliRunner

import mgq.bench.benchmark as benchmark_module
from mgq.bench.benchmark_report import Report, Row
from mgq.bench.cases import Agreement
from mgq.bench.settings import EXAMPLE_NETWORKS, ROUNDS, Load, Precision, Settings
from mgq.bench.statistics import Speed, Speedup
from mgq.cli.bench import BenchCommand
from mgq.cli.help_layout import Verb
from mgq.errors import FailureError, InputError
from mgq.events import OnProgress, log_progress
from mgq.system.environment import Machine
from tests.fakes.places import ROOT

FP32, INT8 = Precision.FP32, Precision.INT8
ENGINES = ("MegEngine eager", "MegEngine traced", "MegEngine Lite", "ONNX Runtime", "OpenVINO")
MACHINE = Machine(
    "AMD EPYC 9B14 96-Core Processor", ("AVX2", "AVX-512", "AVX-512 VNNI"), 1, 2, 2, "Debian, Linux", (1.5,)
)

BOTH = tuple(sorted({1, len(os.sched_getaffinity(0))}))

app = typer.Typer(pretty_exceptions_enable=False)
app.command(cls=Verb)(BenchCommand)


def row(
    network: str, precision: Precision, engine: str, same: int = 1, problem: str | None = None, threads: int = 1
) -> Row:
    return Row(
        network=network,
        precision=precision,
        engine=engine,
        engine_version="1.13.0",
        weights="" if problem else "random weights (speed only)",
        file_bytes=46_800_000 if engine.endswith("Lite") else None,
        problem=problem,
        agreement=None if problem else Agreement(ENGINES[0], 1, same, 0.5),
        speed=None if problem else Speed(1234.5, 123.4, 1234.5, 1234.5, 1234.5, 600),
        speedup=Speedup(12.34, 11.22, 13.45) if precision is INT8 and not problem else None,
        rounds_ns=() if problem else ((100, 200), (300,)),
        threads=threads,
        share=None if problem else 1.234,
        peak_memory=None if problem else 1_234_000_000,
    )


def rows_for(settings: Settings) -> tuple[Row, ...]:
    return tuple(
        row(network, precision, engine, threads=threads)
        for network in settings.networks
        for threads in settings.threads
        for precision in settings.precisions
        for engine in ENGINES
    )


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Settings]:
    """Benchmarks that cost no time; the settings of each one asked for."""
    settings_seen: list[Settings] = []

    def fake(settings: Settings, on_progress: OnProgress = log_progress) -> Report:
        settings_seen.append(settings)
        return Report(settings, MACHINE, {"mgq": "0.1.0"}, "a cat", rows_for(settings), ("the load was high",))

    monkeypatch.setattr(benchmark_module, "benchmark", fake)
    return settings_seen


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "80", "TERM": "dumb"})


def refused(*arguments: str) -> str:
    """The one line with which ``arguments`` are refused."""
    result = run(*arguments)
    assert isinstance(result.exception, InputError)
    assert "\n" not in str(result.exception)
    return str(result.exception)


def test_without_options_it_measures_the_public_example(asked: list[Settings]) -> None:
    assert run().exit_code == 0
    assert asked == [Settings(EXAMPLE_NETWORKS, (FP32, INT8), BOTH, ROUNDS, 1, 224)]


def test_options_reach_the_benchmark(asked: list[Settings]) -> None:
    options = (
        "-a resnet50 --arch mobilenet_v2 --threads 1 --rounds 3 --batch 4 --image-size 96 --int8 --mode throughput"
    )
    assert run(*options.split()).exit_code == 0
    networks = ("resnet50", "mobilenet_v2")
    assert asked == [Settings(networks, (FP32, INT8), (1,), 3, 4, 96, Load.THROUGHPUT, yardstick=True)]


def test_one_precision_shows_only_its_rows(asked: list[Settings]) -> None:
    text = run("--fp32", "--threads", "1").stdout
    assert asked[0].precisions == (FP32,)
    assert "\nfp32, 1 thread" in text and "int8, " not in text.partition("FPS: ")[0]


def test_wrong_options_are_refused_before_anything_is_measured(asked: list[Settings], tmp_path: Path) -> None:
    assert refused("--int8", "--fp32").startswith("--fp32 and --int8 exclude each other")
    assert refused("--markdown", "--json", "-").startswith("--markdown wants standard output: give --json a file")
    assert "more than this machine's" in refused("--threads", "100000")
    assert "did you mean resnet18" in refused("-a", "resnet81")
    assert "--threads many is no number" in refused("--threads", "many")
    assert "choose latency, throughput" in refused("--mode", "fast")
    assert "there is no such file" in refused("--against", str(tmp_path / "none.onnx"))
    assert "let it end in .png or .svg" in refused("--plot", str(tmp_path / "plot.gif"))
    assert refused("--train", "--against", "a.onnx").startswith("--train compares with PyTorch alone")
    assert "give the name of a file" in refused("--json", str(tmp_path))
    assert asked == []


@pytest.mark.parametrize(("option", "name"), [("--json", "bench.json"), ("--plot", "bench.svg")])
def test_the_folder_of_an_output_is_made(asked: list[Settings], tmp_path: Path, option: str, name: str) -> None:
    file = tmp_path / "new" / "folder" / name
    assert run(option, str(file)).exit_code == 0
    assert file.is_file() and len(asked) == 1


def test_weights_come_from_the_folder_of_runs_that_is_named(asked: list[Settings], tmp_path: Path) -> None:
    run_of_mobilenet = tmp_path / "mobilenet_v2.normal"
    run_of_mobilenet.mkdir()
    (run_of_mobilenet / "checkpoint.safetensors").touch()
    assert run("-s", str(tmp_path)).exit_code == 0
    assert asked[0].save == tmp_path
    assert "has no run of resnet18 that can serve" in refused("-s", str(tmp_path), "-a", "resnet18")


def test_the_table_fits_80_columns_and_is_plain_in_a_pipe(asked: list[Settings]) -> None:
    text = run().stdout
    assert max(cell_len(line) for line in text.splitlines()) <= 80
    assert "\x1b" not in text
    assert "…" not in text
    for network in EXAMPLE_NETWORKS:
        assert f"{network}: random weights (speed only)" in text
    lines = {line for line in text.splitlines() if line.startswith("MegEngine Lite")}
    begin, end = ["1234", "123", "1234", "1234", "1234"], ["123%", "46.8", "1234"]
    assert sorted(line.split()[2:] for line in lines) == [
        [*begin, "-", *end],
        [*begin, "12.34", "11.22-13.45", *end],
    ]
    assert "int8, 1 thread" in text
    assert "AMD EPYC 9B14" in text and "AVX-512 VNNI" in text and "the load was high" in text


def test_rows_that_are_missing_or_wrong_say_so(asked: list[Settings], monkeypatch: pytest.MonkeyPatch) -> None:
    rows = (
        row("resnet18", INT8, "MegEngine eager"),
        row("resnet18", INT8, "MegEngine traced", same=0),
        row("resnet18", INT8, "OpenVINO", problem="it is not installed: pip install 'mgq[openvino]'"),
    )
    monkeypatch.setattr(f"{__name__}.rows_for", lambda _: rows)
    text = " ".join(run("-a", "resnet18").stdout.split())
    assert "MegEngine traced !" in text
    assert "! resnet18 int8 MegEngine traced, 1 thread: another answer than MegEngine eager on 1 of 1 pictures" in text
    assert "! OpenVINO: not measured: it is not installed: pip install 'mgq[openvino]'" in text


def test_json_on_standard_output_is_alone_there(asked: list[Settings]) -> None:
    body = json.loads(run("--json", "-").stdout)
    assert len(body["rows"]) == 30 * len(BOTH)
    assert body["rows"][0]["rounds_ns"] == [[100, 200], [300]]


def test_json_file_is_written_beside_the_table(asked: list[Settings], tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    assert "MegEngine traced" in run("--json", str(path)).stdout
    assert json.loads(path.read_text())["settings"]["rounds"] == ROUNDS
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(("name", "begins"), [("a.png", b"\x89PNG"), ("a.SVG", b"<?xml")])
def test_a_chart_is_drawn_beside_the_table(asked: list[Settings], tmp_path: Path, name: str, begins: bytes) -> None:
    assert run("--plot", str(tmp_path / name)).exit_code == 0
    assert (tmp_path / name).read_bytes().startswith(begins)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_failed_benchmark_leaves_the_older_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def failing(settings: Settings, on_progress: OnProgress = log_progress) -> Report:
        raise FailureError("the engine broke")

    monkeypatch.setattr(benchmark_module, "benchmark", failing)
    path = tmp_path / "bench.json"
    path.write_text("old")
    assert isinstance(run("--json", str(path)).exception, FailureError)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_markdown_is_a_document_and_nothing_else(asked: list[Settings]) -> None:
    text = run("--markdown").stdout
    assert text.startswith("# mgq bench\n\n## Conditions\n")
    assert sum("| MegEngine traced |" in line for line in text.splitlines()) == 6 * len(BOTH)


def test_help_names_the_default_of_rounds() -> None:
    assert f"[default: ({ROUNDS}; with --train 3)]" in " ".join(run("--help").stdout.split())


def test_the_verb_imports_nothing_heavy() -> None:
    code = (
        "import sys, mgq.cli.bench; "
        "sys.exit(bool({'megengine', 'numpy', 'psutil', 'mgq.zoo.registry'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_it_fails_where_no_engine_could_be_measured(asked: list[Settings], monkeypatch: pytest.MonkeyPatch) -> None:
    rows = (row("resnet18", INT8, "OpenVINO", problem="get it"),)
    monkeypatch.setattr(f"{__name__}.rows_for", lambda _: rows)
    result = run("-a", "resnet18")
    assert result.exit_code == 1
    assert "! OpenVINO: not measured: get it" in result.stdout


# ---- one real contest ----


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any]]:
    """What a small benchmark in all engines prints, and its JSON file."""
    folder = tmp_path_factory.mktemp("bench")
    options = "-a shufflenet_v1_x0_5_g3 --image-size 64 --rounds 2 --batch 2 --threads 1 --json bench.json"
    done = subprocess.run(
        [sys.executable, "-c", "from mgq.cli.main import run; run()", "bench", *options.split()],
        cwd=folder,
        env={**os.environ, "COLUMNS": "80", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert [path.name for path in folder.iterdir()] == ["bench.json"]
    return done.stdout, json.loads((folder / "bench.json").read_text())


@pytest.mark.slow
def test_all_engines_do_the_same_work_and_are_timed(real: tuple[str, dict[str, Any]]) -> None:
    rows = real[1]["rows"]
    assert [(r["precision"], r["engine"]) for r in rows] == [
        *(("fp32", engine) for engine in ENGINES),
        *(("int8", engine) for engine in (*ENGINES, "native")),
    ]
    for r in rows:
        assert r["sound"] is True and r["problem"] is None, r["remark"]
        if r["agreement"]["rounds_otherwise"] and r["precision"] == "int8":
            assert r["agreement"]["likeness"] > 0.95
        else:
            assert r["agreement"]["same"] == r["agreement"]["pictures"] == 2
        simulated = r["agreement"]["rounds_otherwise"]
        assert r["agreement"]["reference"] == ("MegEngine's simulation" if simulated else "MegEngine eager")
        assert r["peak_memory"] > 10**7
        assert len(r["rounds_ns"]) == 2 and min(min(turn) for turn in r["rounds_ns"]) > 0
        assert r["speed"]["runs"] == sum(len(turn) for turn in r["rounds_ns"])
        assert (r["speedup"] is None) == (r["precision"] == "fp32")
        assert r["weights"] == "random weights (speed only)"


@pytest.mark.slow
def test_the_file_of_int8_is_smaller(real: tuple[str, dict[str, Any]]) -> None:
    for engine in ENGINES[2:]:
        sizes = {r["precision"]: r["file_bytes"] for r in real[1]["rows"] if r["engine"] == engine}
        assert 0 < sizes["int8"] < sizes["fp32"]
    assert all(r["file_bytes"] is None for r in real[1]["rows"] if r["engine"] in ENGINES[:2])


@pytest.mark.slow
def test_conditions_are_recorded_with_the_samples(real: tuple[str, dict[str, Any]]) -> None:
    text, body = real
    assert (body["settings"]["batch"], body["settings"]["image_size"]) == (2, 64)
    assert body["versions"]["megengine"] == "1.13.0"
    assert body["machine"]["logical_cores"] >= 1
    assert "versions: mgq" in text and "64x64 pixels, batch 2" in text

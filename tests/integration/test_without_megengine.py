"""Deployed files and the built-in network where MegEngine is not installed: an import of it fails, as it does there."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from mgq.engine.classifier.classifier import Classifier
from mgq.engine.classifier.dump import dump_classifier
from mgq.quantization.option_names import Mode
from tests.conftest import classifier_of, one_line_about
from tests.fakes.deployed_folders import ARCH, calibrate_on_cat, fill_deployed_folder

pytestmark = pytest.mark.usefixtures("short_shufflenet")
BLOCKED = """
import importlib.util, sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("megengine", "megenginelite"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing())
genuine = importlib.util.find_spec
importlib.util.find_spec = lambda name, *more: None if name.startswith("megengine") else genuine(name, *more)
"""
COMMAND = BLOCKED + "from mgq.cli.main import run\nsys.argv[0] = 'mgq'\nrun()"


@pytest.fixture(scope="module")
def calibrated(short_shufflenet: None) -> Classifier:
    return calibrate_on_cat()


@pytest.fixture(scope="module")
def deployed(calibrated: Classifier, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fill_deployed_folder(tmp_path_factory.mktemp("deployed"), calibrated)


def without_megengine(folder: Path, *words: str, code: str = COMMAND) -> subprocess.CompletedProcess[str]:
    """``mgq WORDS`` in ``folder``."""
    environment = {**os.environ, "MGQ_CACHE": str(folder / "cache"), "COLUMNS": "200"}
    command = [sys.executable, "-c", code, *words]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("file", ["net.onnx", "net.so"])
def test_infer_answers(deployed: Path, file: str) -> None:
    if not (deployed / file).exists():
        pytest.skip("there is no linker here: the native file was not linked")
    done = without_megengine(deployed, "infer", "-c", file, "--json")
    assert done.returncode == 0, done.stderr
    body = json.loads(done.stdout)
    assert body["arch"] == ARCH and len(body["answers"][0]["guesses"]) == 5


@pytest.mark.parametrize("engine", ["openvino", "onnxruntime", "native"])
def test_every_engine_of_onnx_files_answers(deployed: Path, engine: str) -> None:
    done = without_megengine(deployed, "infer", "-c", "net.onnx", "--engine", engine)
    assert done.returncode == 0, done.stderr
    assert ARCH in done.stdout


@pytest.mark.parametrize("words", [[], ["--jobs", "2"]])
def test_eval_measures(deployed: Path, words: list[str]) -> None:
    if words and len(os.sched_getaffinity(0)) < 2:
        pytest.skip("one core: no two jobs")
    done = without_megengine(deployed, "eval", "-c", "net.onnx", "-d", "val", "--batch-size", "4", "--json", *words)
    assert done.returncode == 0, done.stderr
    body = json.loads(done.stdout)
    assert body["images"] == 8 and body["jobs"] == (2 if words else 1)


def test_bench_measures_files_in_every_engine(deployed: Path) -> None:
    done = without_megengine(deployed, "bench", "net.onnx", "net.so", "--threads", "1", "--rounds", "1", "--json", "-")
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["rows"]
    assert {(row["file"], row["engine"]) for row in rows} >= {
        ("net.onnx", "OpenVINO"),
        ("net.onnx", "ONNX Runtime"),
        ("net.so", "native library"),
    }
    assert all(row["speed"] and row["problem"] is None for row in rows), rows


@pytest.mark.parametrize("file", ["net.onnx", "net.so"])
def test_report_writes_a_page_about_a_file(deployed: Path, tmp_path: Path, file: str) -> None:
    if not (deployed / file).exists():
        pytest.skip("there is no linker here: the native file was not linked")
    done = without_megengine(deployed, "report", file, "-d", "val", "-o", str(tmp_path / "page.html"), "--json")
    assert done.returncode == 0, done.stderr
    body = json.loads(done.stdout)
    assert body["arch"] == ARCH and body["kind"] == "int8" and body["images"] == 8
    engines = {row["engine"] for row in body["engines"] if row["speed"] and row["top1"] is not None}
    assert engines >= ({"OpenVINO", "ONNX Runtime"} if file == "net.onnx" else {"native library"})
    page = (tmp_path / "page.html").read_text()
    for part in (ARCH, file, body["sha256"], "made-up weights", "Accuracy", "Engines", "training curves: only the run"):
        assert part in page


@pytest.mark.parametrize("words", [["models"], ["--version"], ["--help"], ["infer", "--help"], ["train", "--help"]])
def test_what_only_tells_something_works(deployed: Path, words: list[str]) -> None:
    done = without_megengine(deployed, *words)
    assert done.returncode == 0 and done.stdout, done.stderr


@pytest.mark.slow
def test_doctor_looks_at_the_rest(deployed: Path) -> None:
    done = without_megengine(deployed, "doctor", "--json")
    found = {finding["name"]: finding for finding in json.loads(done.stdout)["findings"]}
    assert found["ONNX Runtime"]["state"] == "fine"


def test_python_calls_answer(deployed: Path) -> None:
    code = BLOCKED + (
        "import mgq\n"
        "print(len(mgq.infer(['val'], checkpoint='net.onnx')), mgq.evaluate('val', checkpoint='net.onnx').images)\n"
        "print(mgq.report('net.onnx', engines=False).page)\n"
        "try:\n    mgq.report()\n"
        "except mgq.InputError as error:\n    print(error)\n"
        "try:\n    mgq.train(arch='resnet18')\n"
        "except mgq.InputError as error:\n    print(error)\n"
        "try:\n    mgq.create_model('resnet18')\n"
        "except mgq.InputError as error:\n    print(error)\n"
    )
    done = without_megengine(deployed, code=code)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "8 8"
    assert lines[1] == "net.onnx.report.html" and (deployed / lines[1]).is_file()
    assert len(lines) == 5 and all(one_line_about(line, "MegEngine", "3.10", "mgq[megengine]") for line in lines[2:])


@pytest.mark.parametrize(
    "words",
    [
        ["train", "-a", "resnet18", "-d", "val"],
        ["qat", "-a", "resnet18"],
        ["calibrate", "val", "-a", "resnet18"],
        ["infer", "-a", "resnet18"],
        ["infer", "--target", "megengine"],
        ["infer"],
        ["dump", "-a", "resnet18"],
        ["analyze", "-a", "resnet18"],
        ["bench", "-a", "resnet18"],
        ["report"],
        ["report", "some.qat"],
    ],
)
def test_what_needs_megengine_says_what_to_run_instead(deployed: Path, words: list[str]) -> None:
    done = without_megengine(deployed, *words)
    assert done.returncode == 2 and not done.stdout
    assert one_line_about(done.stderr.strip(), "MegEngine", "uv run --python 3.10 mgq", "mgq[megengine]"), done.stderr


def test_a_megengine_file_says_so_too(deployed: Path, calibrated: Classifier, tmp_path: Path) -> None:
    dump_classifier(classifier_of(ARCH, Mode.QUANTIZED), tmp_path / "net.megengine")
    for words in (["infer", "-c", "net.megengine"], ["report", "net.megengine"]):
        done = without_megengine(tmp_path, *words)
        assert done.returncode == 2
        said = done.stderr.strip()
        assert one_line_about(said, "net.megengine: ", "MegEngine", "uv run --python 3.10 mgq", "mgq[megengine]"), said


@pytest.mark.parametrize("verb", ["infer", "eval", "serve"])
def test_a_float_file_of_another_program_is_named(tmp_path: Path, verb: str) -> None:
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 3, 4, 4]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "graph", values[:1], values[1:])
    onnx.save(helper.make_model(graph), tmp_path / "other.onnx")
    done = without_megengine(tmp_path, verb, "-c", "other.onnx")
    said = done.stderr.strip()
    assert done.returncode == 2
    parts = ["other.onnx, written by another program: ", "MegEngine", "mgq[megengine]"]
    if verb == "serve":  # it serves no such file anywhere
        parts = ["other.onnx is another program's file: `mgq calibrate -c other.onnx -d FOLDER`"]
    assert one_line_about(said, *parts), said


def test_the_built_in_network_answers_from_the_file_that_is_kept(
    deployed: Path, tmp_path: Path, kept_files: Path, cache_folder: Path
) -> None:
    from mgq.engine.classifier.network_choice import choose_network
    from mgq.engine.classifier.network_options import NetworkOptions, Usage

    choose_network(NetworkOptions(save=tmp_path), usage=Usage(kept=True))  # with MegEngine, which writes it
    shutil.copytree(kept_files, tmp_path / "cache")
    done = without_megengine(tmp_path, "infer", "--json")
    assert done.returncode == 0, done.stderr
    body = json.loads(done.stdout)
    assert body["arch"] == "efficientnet_lite0" and "cat" in body["answers"][0]["guesses"][0]["class"]

"""mgq installed by itself under several Pythons: deployed files run there, with the engines that it brings."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

import pytest

from tests.conftest import one_line_about
from tests.fakes.deployed_folders import calibrate_on_cat, fill_deployed_folder
from tests.fakes.places import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900), pytest.mark.usefixtures("short_shufflenet")]
LATER = ("3.14", "3.13", "3.12", "3.11")
"""Pythons without a MegEngine, the newest first."""
PATIENCE_S = 600


def uv() -> str | None:
    """The uv that runs the tests, or another one."""
    return os.environ.get("UV") or shutil.which("uv")


@cache
def interpreter(version: str) -> str | None:
    """A Python of this ``version`` that is installed here; None without one."""
    folders = sorted(Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")).glob(f"versions/{version}.*/bin"))
    candidates = [*(folder / "python" for folder in reversed(folders)), shutil.which(f"python{version}")]
    return next((str(path) for path in candidates if path and says(path, version)), None)


def says(python: str | Path, version: str) -> bool:
    command = [str(python), "-c", "import sys; print('{}.{}'.format(*sys.version_info))"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() == version
    except OSError:
        return False


def newest_and_between() -> list[str]:
    """The newest Python that can be had, and one between it and 3.10: as few as tell something."""
    found = [version for version in LATER if interpreter(version)]
    return [*found[:1], *found[1:][-1:]]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    program = uv()
    if program is None:
        pytest.skip("uv is not at hand: it makes the environments")
    folder = tmp_path_factory.mktemp("wheel")
    done = quiet([program, "build", "--wheel", "-q", "-p", sys.executable, "-o", str(folder), str(ROOT)])
    if done.returncode:
        pytest.skip(f"no wheel can be built here, off line perhaps: {last_line(done)}")
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def deployed(short_shufflenet: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fill_deployed_folder(tmp_path_factory.mktemp("deployed"), calibrate_on_cat())


@pytest.fixture(scope="module", params=newest_and_between() or [""])
def mgq_there(request: pytest.FixtureRequest, wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The command ``mgq`` of an environment of its own, with OpenVINO, under a later Python."""
    if not request.param:
        pytest.skip(f"none of Python {', '.join(LATER)} is installed here")
    folder = tmp_path_factory.mktemp(f"python{request.param}")
    program, python = uv(), interpreter(request.param)
    assert program and python
    assert quiet([program, "venv", "-q", "-p", python, str(folder / "venv")]).returncode == 0
    its = folder / "venv" / "bin" / "python"
    done = quiet([program, "pip", "install", "-q", "-p", str(its), f"mgq[deploy] @ {wheel.as_uri()}"])
    if done.returncode:
        pytest.skip(f"it cannot be installed here, off line perhaps: {last_line(done)}")
    yield its.with_name("mgq")
    shutil.rmtree(folder)


def quiet(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "VIRTUAL_ENV"}
    return subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=PATIENCE_S, env=environment, cwd="/"
    )


def last_line(done: subprocess.CompletedProcess[str]) -> str:
    return (done.stderr.strip().splitlines() or ["no reason given"])[-1]


def said_there(command: Path, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "MGQ_CACHE": str(folder / "cache"), "COLUMNS": "200"}
    environment.pop("PYTHONPATH", None)
    return subprocess.run(
        [str(command), *words], cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=300
    )


def best_class(done: subprocess.CompletedProcess[str]) -> dict[str, float]:
    assert done.returncode == 0, done.stderr
    return {guess["class"]: guess["probability"] for guess in json.loads(done.stdout)["answers"][0]["guesses"][:1]}


def test_a_later_python_runs_deployed_files_and_says_what_it_cannot(mgq_there: Path, deployed: Path) -> None:
    version = said_there(mgq_there, deployed, "--version").stdout
    assert "MegEngine not installed" in version and "OpenVINO 20" in version
    wanted = best_class(
        said_there(Path(sys.executable).with_name("mgq"), deployed, "infer", "-c", "net.onnx", "--json")
    )
    files = [name for name in ("net.onnx", "net.so") if (deployed / name).exists()]
    for words in [*(["-c", name] for name in files), ["-c", "net.onnx", "--engine", "openvino"]]:
        there = best_class(said_there(mgq_there, deployed, "infer", *words, "--json"))
        assert there.keys() == wanted.keys(), words
        assert there == pytest.approx(wanted, abs=0.05), words
    measured = said_there(mgq_there, deployed, "eval", "-c", "net.onnx", "-d", "val", "--json")
    assert measured.returncode == 0 and json.loads(measured.stdout)["images"] == 8, measured.stderr
    timed = said_there(mgq_there, deployed, "bench", *files, "--threads", "1", "--rounds", "1", "--json", "-")
    assert timed.returncode == 0 and all(row["speed"] for row in json.loads(timed.stdout)["rows"]), timed.stderr
    for name in files:
        told = said_there(mgq_there, deployed, "report", name, "-d", "val", "--no-engines", "--json")
        assert told.returncode == 0 and json.loads(told.stdout)["images"] == 8, told.stderr
    assert said_there(mgq_there, deployed, "doctor").returncode == 0
    assert said_there(mgq_there, deployed, "models").returncode == 0
    refused = said_there(mgq_there, deployed, "train", "-d", "val")
    assert refused.returncode == 2
    assert one_line_about(refused.stderr.strip(), "MegEngine", "uv run --python 3.10 mgq", "mgq[megengine]")


@pytest.mark.parametrize("version", ["3.10", "3.14"])
def test_what_trains_is_installed_where_it_can_be(wheel: Path, version: str) -> None:
    """What would be installed, without doing so: MegEngine has 0.9 GB, and these tests run in such an environment.

    Later Pythons find wheels of everything, the extras included.
    """
    program = uv()
    assert program
    command = [program, "pip", "compile", "-q", "--no-header", "-p", sys.executable, "--python-version", version, "-"]
    wanted = "mgq"
    if version != "3.10":
        wanted = "mgq[deploy,serve,native]"
        command += ["--only-binary", ":all:"]
    found = {}
    for platform in ("x86_64-manylinux_2_28", "aarch64-manylinux_2_35", "macos", "windows"):
        done = subprocess.run(
            [*command, "--python-platform", platform],
            input=f"{wanted} @ {wheel.as_uri()}\n",
            capture_output=True,
            text=True,
            check=False,
            timeout=PATIENCE_S,
            env={**os.environ, "MACOSX_DEPLOYMENT_TARGET": "14.0"},
        )
        if done.returncode:
            pytest.skip(f"nothing can be resolved here, off line perhaps: {last_line(done)}")
        found[platform] = "megengine==1.13.0" in done.stdout
        assert "onnxruntime==" in done.stdout
    assert found == {platform: version == "3.10" and platform.startswith("x86_64") for platform in found}

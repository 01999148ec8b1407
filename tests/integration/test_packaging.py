"""The wheel and the source distribution: they build without a network, hold all files, and what is installed runs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

import mgq

ROOT = Path(mgq.__file__).parent.parent
DATA = {
    "mgq/py.typed",
    "mgq/data/cat.jpg",
    "mgq/data/imagenet_classes.txt",
    "mgq/quantization/default_ranges/efficientnet_lite0.json",
    "mgq/reports/templates/report.html",
    "mgq/reports/templates/style.css",
}
BUILD = "import sys; from setuptools import build_meta; print(getattr(build_meta, 'build_' + sys.argv[1])(sys.argv[2]))"
LOADED = """
import json, mgq
from importlib.resources import files
from mgq.reports.html import templates
from mgq.zoo.registry import specs
[templates().get_template(name) for name in ("report.html", "analysis.html")]
print(json.dumps([mgq.__file__, len(specs()), len((files("mgq") / "data" / "cat.jpg").read_bytes())]))
"""

pytestmark = pytest.mark.slow


def build(kind: str, source: Path, folder: Path) -> Path:
    """The ``wheel`` or ``sdist`` of the project in ``source``, built by what this Python has."""
    folder.mkdir(exist_ok=True)
    command = [sys.executable, "-c", BUILD, kind, str(folder)]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Both, from a copy of the project, so that nothing is left in it."""
    root = tmp_path_factory.mktemp("built")
    source = root / "source"
    shutil.copytree(ROOT / "mgq", source / "mgq", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    return {kind: build(kind, source, root / "dist") for kind in ("sdist", "wheel")}


def files_in(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_the_wheel_holds_every_file_of_the_package(built: dict[str, Path]) -> None:
    here = {str(path.relative_to(ROOT)) for path in (ROOT / "mgq").rglob("*") if path.is_file()}
    expected = {name for name in here if "__pycache__" not in name}
    found = {name for name in files_in(built["wheel"]) if name.startswith("mgq/")}
    assert found == expected and expected > DATA


def test_the_wheel_says_what_it_is(built: dict[str, Path]) -> None:
    with zipfile.ZipFile(built["wheel"]) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        said = archive.read(name).decode().split("\n\n")[0]
    for field in ("Summary", "Author", "License-Expression", "Keywords", "Classifier", "Project-URL", "Requires-Dist"):
        assert f"\n{field}: " in said


def test_a_wheel_of_the_source_distribution_is_the_same(built: dict[str, Path], tmp_path: Path) -> None:
    with tarfile.open(built["sdist"]) as archive:
        archive.extractall(tmp_path, filter="data")
    (source,) = tmp_path.iterdir()
    assert files_in(build("wheel", source, tmp_path / "again")) == files_in(built["wheel"])


@pytest.fixture(scope="module")
def installed(built: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The ``bin`` folder of a new environment with the wheel. Its libraries are those of this environment."""
    uv = os.environ.get("UV") or shutil.which("uv")
    if uv is None:
        pytest.skip("uv, which installs the wheel, is not on the path: run the tests with `uv run`")
    root = tmp_path_factory.mktemp("installed")
    venv.create(root, symlinks=True)
    python = root / "bin" / "python"
    options = ("--quiet", "--offline", "--no-deps", "--python", python)
    subprocess.run([uv, "pip", "install", *options, built["wheel"]], check=True, capture_output=True)
    packages = root / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    (packages / "libraries.pth").write_text(sysconfig.get_path("purelib"))
    return root / "bin"


def said(*command: str | Path, where: Path) -> str:
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(command, cwd=where, env=variables, capture_output=True, text=True, check=True).stdout


def test_what_is_installed_runs_and_finds_its_files(installed: Path, tmp_path: Path) -> None:
    assert said(installed / "mgq", "--version", where=tmp_path).startswith("mgq ")
    file, networks, image = json.loads(said(installed / "python", "-c", LOADED, where=tmp_path))
    assert Path(file).is_relative_to(installed.parent) and networks > 5 and image > 1000

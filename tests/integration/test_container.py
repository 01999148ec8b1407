"""The Dockerfile's steps, run one by one in an empty folder: what they leave is small enough, and answers."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from mgq.data.decoding import bundled_cat
from mgq.data.image_sources import expand
from mgq.engine.calibration import calibration_run
from mgq.engine.classifier.dump import dump_classifier
from mgq.engine.classifier.open import convert
from mgq.ptq.presets import CalibrationConfig
from mgq.quantization.option_names import Mode
from mgq.quantization.targets import ONNX
from tests.conftest import classifier_of

ROOT = Path(__file__).parents[2]
PLACE = "/opt/mgq"
BASE_MB = 57
"""What the base image has: the packages in its source's list, unpacked (see docs/results/serve.md)."""
BASE_LIBRARIES = {
    # libc6
    *("libc.so.6", "libm.so.6", "libdl.so.2", "librt.so.1", "libpthread.so.0", "libutil.so.1"),
    # libstdc++6, libgcc-s1, libgomp1, zlib1g
    *("libstdc++.so.6", "libgcc_s.so.1", "libgomp.so.1", "libz.so.1"),
    # what its Python brings: libbz2-1.0, libexpat1, liblzma5, libffi8, libsqlite3-0, libssl3
    *("libbz2.so.1.0", "libexpat.so.1", "liblzma.so.5", "libffi.so.8", "libsqlite3.so.0"),
    *("libssl.so.3", "libcrypto.so.3"),
}
"""Libraries that programs find in the base image, by the package lists of its source (base, cc and python3)."""
MOST_MB = 350
PATIENCE_S = 600


def dockerfile() -> str:
    return (ROOT / "Dockerfile").read_text(encoding="utf-8")


def python_of_the_image() -> str | None:
    """A Python of the version that the Dockerfile names."""
    version = re.findall(r"^FROM python:(3\.\d+)-slim", dockerfile(), re.MULTILINE)[0]
    folders = sorted(Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")).glob(f"versions/{version}.*/bin"))
    return str(folders[-1] / "python") if folders else shutil.which(f"python{version}")


def run(command: Sequence[str], folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name not in ("VIRTUAL_ENV", "PYTHONPATH")}
    return subprocess.run(
        command, cwd=folder, env={**environment, **variables}, capture_output=True, text=True, timeout=PATIENCE_S
    )


def libraries_beyond(place: Path) -> dict[str, str]:
    """The libraries that binaries under ``place`` need and that are not there: name -> one that needs it."""
    found: dict[str, str] = {}
    for binary in place.rglob("*.so*"):
        said = run(["ldd", str(binary)], place).stdout
        for name, where in re.findall(r"^\s*(\S+) => (.+?)(?: \(|$)", said, re.MULTILINE):
            if not where.startswith(str(place)):
                found.setdefault(name, str(binary.relative_to(place)))
    return found


def test_the_image_that_answers_is_the_one_whose_libraries_are_listed() -> None:
    stages = re.findall(r"^FROM (\S+)", dockerfile(), re.MULTILINE)
    assert stages[-1] == "gcr.io/distroless/python3-debian13:nonroot"
    assert "apt-get" not in dockerfile()  # would only reach the stage that builds


def test_only_what_is_needed_goes_to_the_daemon() -> None:
    copied = [word for line in re.findall(r"^COPY (?!--)(.*)$", dockerfile(), re.MULTILINE) for word in line.split()]
    sent = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    sources = {word for word in copied if (ROOT / word).exists() and word != "./"}
    assert "*" in sent and sources == {line[1:] for line in sent if line.startswith("!")}


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("short_shufflenet")
def test_the_steps_of_the_dockerfile_leave_a_small_folder_that_answers(tmp_path: Path) -> None:
    python = python_of_the_image()
    if python is None:
        pytest.skip("the Python of the image is not installed here")
    source, place = tmp_path / "source", tmp_path / "place"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "mgq", source / "mgq", ignore=shutil.ignore_patterns("__pycache__"))
    assert run([python, "-m", "venv", str(tmp_path / "venv")], tmp_path).returncode == 0
    there = tmp_path / "venv" / "bin"
    steps = re.findall(r"^RUN (.*)$", dockerfile(), re.MULTILINE)
    assert len(steps) > 2
    for step in steps:
        command = ["sh", "-ec", step.replace(PLACE, str(place))]
        done = run(command, source, PATH=f"{there}:{os.environ['PATH']}")
        if done.returncode and "pip install" in step:
            pytest.skip(f"nothing can be installed here, off line perhaps: {done.stderr.strip().splitlines()[-1]}")
        assert done.returncode == 0, done.stderr
    size = sum(path.stat().st_size for path in place.rglob("*") if path.is_file()) / 1e6
    assert size + BASE_MB < MOST_MB, size
    needed = libraries_beyond(place)
    assert "libc.so.6" in needed and not {name: needed[name] for name in needed.keys() - BASE_LIBRARIES}
    cat = expand([str(bundled_cat())])
    config = CalibrationConfig(target=ONNX, weight_rounding="nearest")
    found = calibration_run.calibrate(classifier_of("shufflenet_v1_x0_5_g3"), cat, 1, config=config).classifier
    dump_classifier(convert(found, Mode.QUANTIZED), tmp_path / "net.onnx", batch=None)
    variables = {"PYTHONPATH": str(place), "PYTHONDONTWRITEBYTECODE": "1", "MGQ_CACHE": str(tmp_path / "cache")}
    words = [str(there / "python"), "-m", "mgq"]
    said = run([*words, "infer", "-c", "net.onnx", str(bundled_cat()), "--json"], tmp_path, **variables)
    assert said.returncode == 0 and json.loads(said.stdout)["failed"] == 0, said.stderr
    assert run([*words, "serve", "-c", "net.onnx", "--fd", "999"], tmp_path, **variables).stderr.count("no socket") == 1

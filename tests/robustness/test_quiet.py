"""What libraries print of damaged pictures, in a command of its own: one line of ours, or none."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.conftest import classifier_of, one_line_about
from tests.fakes.places import ROOT

KINDS = ("kind 3", "kind 7")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / "float.safetensors"
    classifier_of("shufflenet_v1_x0_5_g3").write_checkpoint(path)
    return path


def damaged(folder: Path) -> Path:
    """Pictures of which libjpeg and libtiff complain on standard error: two that are read, two that are not."""
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 255, (8, 8, 3), np.uint8).repeat(12, 0).repeat(12, 1)
    for name, kind, options in (("a.jpg", "JPEG", {}), ("b.tif", "TIFF", {"compression": "tiff_lzw"})):
        stream = io.BytesIO()
        Image.fromarray(pixels).save(stream, kind, **options)
        data = bytearray(stream.getvalue())
        half = len(data) // 2
        if kind == "JPEG":
            (folder / f"2{name}").write_bytes(data[:half] + b"\xff\xd9")
            data[half : half + 40] = bytes(range(40))
        else:
            data[half : half + 40] = b"\xff" * 40
            (folder / f"2{name}").write_bytes(data)
        (folder / name).write_bytes(data)
    return folder


def commanded(*arguments: str | Path, where: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mgq", *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=where, capture_output=True, text=True, env=environment, check=False)


READ = "import sys, pathlib, mgq.data.decoding as p; p.read_image(pathlib.Path(sys.argv[1]))"


def test_what_libraries_print_of_damaged_images_is_one_line_of_ours_or_none(tmp_path: Path, checkpoint: Path) -> None:
    folder = damaged(tmp_path / "set")
    loud = subprocess.run(
        [sys.executable, "-c", READ, str(folder / "2a.jpg")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "Corrupt JPEG data" in loud.stderr, "the picture should be one that libjpeg complains of"
    said = commanded("infer", "-m", "normal", "-c", checkpoint, "set", "--json", where=tmp_path)
    document = json.loads(said.stdout)
    refused = [entry for entry in document["answers"] if "error" in entry]
    assert {Path(entry["picture"]).name for entry in refused} == {"b.tif", "2b.tif"}
    assert all(one_line_about(entry["error"], entry["picture"], "damaged") for entry in refused)
    assert said.stderr.strip() == "2 of 4 pictures could not be read"


@pytest.mark.slow
def test_processes_that_help_are_as_quiet(tmp_path: Path, checkpoint: Path) -> None:
    folder = damaged(tmp_path / "all")
    for kind in KINDS:
        (tmp_path / "set" / kind).mkdir(parents=True)
        for path in folder.iterdir():
            (tmp_path / "set" / kind / path.name).write_bytes(path.read_bytes())
    said = commanded(
        *("eval", "-m", "normal", "-c", checkpoint, "-d", "set", "--jobs", "2", "--batch-size", "1", "--max-bad", "1"),
        where=tmp_path,
    )
    assert said.returncode == 0, said.stderr
    for line in said.stderr.splitlines():
        assert line.startswith(("evaluate:", "set/", "4 of 8 pictures")), line

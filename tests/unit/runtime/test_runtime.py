"""Runners of networks: the same bits in each, in memory and from a file."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from mgq.errors import FailureError
from mgq.export.megengine import writer
from mgq.export.megengine.writer import fuse, write_megengine
from mgq.export.onnx.onnx_file import import_package
from mgq.export.onnx.writer import write_onnx
from mgq.machine import DEBUG_VARIABLE
from mgq.quantization.modes import Mode
from mgq.runtime.megengine import EagerRuntime, TracedRuntime
from mgq.runtime.megengine_lite import LiteRuntime
from mgq.runtime.openvino import OpenVino
from tests.conftest import CLASSES, blank, smooth_images
from tests.fakes.runtime_network import SIZE, in_memory, small

BOTH = (Mode.NORMAL, Mode.QUANTIZED)


def written(path: Path, mode: Mode, input_type: str = "uint8", batch: int = 1) -> Path:
    write_megengine(
        small(mode),
        path,
        image_size=SIZE,
        batch=batch,
        input_type=input_type,
        provenance={},
        check=smooth_images(batch, SIZE, SIZE, seed=8),
    )
    return path


def images(number: int) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(5).integers(0, 256, (number, 3, SIZE, SIZE), np.uint8)


@pytest.mark.parametrize("input_type", ["uint8", "int8", "float32"])
@pytest.mark.parametrize("mode", BOTH)
def test_lite_answers_to_the_bit_as_the_network_in_memory(tmp_path: Path, mode: Mode, input_type: str) -> None:
    lite = LiteRuntime(written(tmp_path / "net.megengine", mode, input_type))
    memory = EagerRuntime(in_memory(mode))
    for image in np.split(images(4), 4):
        np.testing.assert_array_equal(lite.run(image), memory.run(image))


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="this machine has one core")
@pytest.mark.parametrize("mode", BOTH)
def test_two_threads_give_the_bits_of_one(tmp_path: Path, mode: Mode) -> None:
    path = written(tmp_path / "net.megengine", mode, batch=3)
    one, two = LiteRuntime(path), LiteRuntime(path, threads=2)
    assert (one.threads, two.threads) == (1, 2)
    np.testing.assert_array_equal(two.run(images(3)), one.run(images(3)))


@pytest.mark.parametrize("mode", BOTH)
def test_a_traced_network_answers_to_the_bit_as_eager(mode: Mode) -> None:
    # A float one as its folded and fused twin, which rounds otherwise than batch norms that are computed.
    eager = EagerRuntime(fuse(small(mode)) if mode is Mode.NORMAL else small(mode))
    traced = TracedRuntime(small(mode))
    for batch in np.split(images(6), 3):
        np.testing.assert_array_equal(traced.run(batch), eager.run(batch))


def test_answers_stay_when_the_next_images_run(tmp_path: Path) -> None:
    path = written(tmp_path / "net.megengine", Mode.QUANTIZED)
    first, second = np.split(images(2), 2)
    for runtime in (LiteRuntime(path), EagerRuntime(small(Mode.QUANTIZED)), TracedRuntime(small(Mode.QUANTIZED))):
        given = first.copy()
        logits = runtime.run(given)
        kept = logits.copy()
        given[...] = 0
        other = runtime.run(second)
        np.testing.assert_array_equal(logits, kept)
        assert logits.dtype == np.float32 and logits.shape == (1, 7) and not np.array_equal(other, logits)
        np.testing.assert_array_equal(runtime.run(first), kept)


def test_images_need_not_be_contiguous(tmp_path: Path) -> None:
    path = written(tmp_path / "net.megengine", Mode.QUANTIZED)
    rgb = np.ascontiguousarray(images(1)[:, ::-1])
    for runtime in (LiteRuntime(path), EagerRuntime(small(Mode.QUANTIZED))):
        np.testing.assert_array_equal(runtime.run(rgb[:, ::-1]), runtime.run(images(1)))


def test_a_fused_network_is_the_same_but_for_rounding() -> None:
    network = small(Mode.NORMAL)
    before, after = EagerRuntime(network).run(images(3)), EagerRuntime(fuse(network)).run(images(3))
    np.testing.assert_allclose(after, before, rtol=0, atol=1e-5 * np.abs(before).max())
    kinds = {type(module).__name__ for module in fuse(network).modules()}
    assert "FusedConv" in kinds and not kinds & {"BatchNorm2d", "Conv2d", "ConvRelu2d", "ConvRelu6"}
    # The network that was given is as it was.
    np.testing.assert_array_equal(EagerRuntime(network).run(images(3)), before)


def test_a_fused_relu6_stops_at_6() -> None:
    network = fuse(small(Mode.NORMAL))
    seen: list[npt.NDArray[np.float32]] = []
    network.depthwise.register_forward_hook(lambda module, inputs, outputs: seen.append(outputs.numpy()))
    EagerRuntime(network).run(images(2))
    assert seen[0].min() == 0 and seen[0].max() == 6


def test_a_file_with_other_last_bits_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # MegEngine folds the batch norms itself then, which the network in memory does not.
    monkeypatch.setattr(writer, "fuse", lambda network: network)
    with pytest.raises(FailureError, match="differs from the network in memory"):
        written(tmp_path / "net.megengine", Mode.NORMAL)
    assert list(tmp_path.iterdir()) == []


INTERRUPTED = """
import gc, signal, sys
from pathlib import Path
from mgq.runtime.openvino import OpenVino
first, second = (OpenVino(Path(sys.argv[1])) for _ in range(2))
del first
gc.collect()
del second
gc.collect()
try:
    signal.raise_signal(signal.SIGINT)
except KeyboardInterrupt:
    print("interrupted")
"""


def test_a_signal_ends_what_used_openvino_in_order(tmp_path: Path) -> None:
    write_onnx(blank("shufflenet_v1_x0_5_g3"), tmp_path / "net.onnx", image_size=SIZE, batch=1, provenance={})
    begin = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    command = [sys.executable, "-c", begin + INTERRUPTED, str(tmp_path / "net.onnx")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (0, "interrupted\n")


@pytest.mark.parametrize("debugging", ["", "1"])
def test_what_openvino_s_devices_say_is_for_debugging(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path, debugging: str
) -> None:
    path = tmp_path / "net.onnx"
    write_onnx(blank("shufflenet_v1_x0_5_g3"), path, image_size=SIZE, batch=1, provenance={})
    engine = import_package("openvino")

    class Talking:
        def __init__(self) -> None:
            os.write(2, b"there is no GPU\n")
            self.core = engine.Core()

        def __getattr__(self, name: str) -> Any:
            return getattr(self.core, name)

    talking = SimpleNamespace(Core=Talking, __version__=engine.__version__)
    monkeypatch.setattr("mgq.runtime.openvino.import_package", lambda _: talking)
    monkeypatch.setenv(DEBUG_VARIABLE, debugging)
    capfd.readouterr()
    assert OpenVino(path).run(smooth_images(1, SIZE, SIZE)).shape == (1, CLASSES)
    assert ("there is no GPU" in capfd.readouterr().err) is bool(debugging)

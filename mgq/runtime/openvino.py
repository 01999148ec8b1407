"""OpenVINO on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mgq.export.onnx.onnx_file import import_package, read_onnx
from mgq.machine import mute_stderr, set_library_defaults
from mgq.runtime.protocol import OnnxFileRuntime, cannot_run, check_threads


class OpenVino(OnnxFileRuntime):
    """An ``.onnx`` file in OpenVINO. Takes and returns what :class:`mgq.runtime.protocol.Runtime` says.

    Raises InputError as :func:`mgq.export.onnx.onnx_file.read_onnx` does, for more threads than cores and for pictures
    of another shape than the file takes.
    """

    name = "OpenVINO"

    def __init__(self, path: Path, threads: int = 1) -> None:
        set_library_defaults()
        package = import_package("openvino")
        self.version: str = package.__version__.partition("-")[0]
        self.threads = check_threads(threads)
        self.file = read_onnx(path)
        try:
            # While it looks for devices, in a thread of its own, MegEngine's library complains that there is no GPU.
            with mute_stderr():
                core = open_core(package.Core)
                self.network = core.compile_model(core.read_model(self.file.content), "CPU", settings_for(threads))
        except Exception as error:
            raise cannot_run(self, path, error) from None
        self.request = self.network.create_infer_request()

    def run(self, batch: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        result: npt.NDArray[np.float32] = self._answers(batch)[self.file.output]
        return result

    def outputs(self, batch: npt.NDArray[np.uint8]) -> dict[str, npt.NDArray[Any]]:
        """All that the file gives for ``batch``, by name."""
        answers = self._answers(batch)
        # A tensor that equals another, such as one that is quantized to the grid that it has, shares its output.
        return {name: answers[output] for output in self.network.outputs for name in output.get_names()}

    def _answers(self, batch: npt.NDArray[np.uint8]) -> Any:
        self.file.refuse_other_shape(batch.shape)
        try:
            return self.request.infer({0: self.file.to_input(batch)}, share_inputs=True, share_outputs=False)
        except Exception as error:
            raise cannot_run(self, self.file.path, error) from None


@cache
def open_core(kind: Callable[[], Any]) -> Any:
    """OpenVINO's ``Core``, which ``kind`` makes: one a process, for good.

    It gives the thread that makes it a stack for signals (2025.4.1). Of two that end in the order of their beginning
    the memory of one stack is gone while it is in use: the next signal, such as Ctrl-C, is a segmentation fault then.
    """
    return kind()


def settings_for(threads: int) -> dict[str, Any]:
    """OpenVINO's settings: one image after the other, on ``threads`` threads."""
    return {
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
        # Float stays float32, whatever the processor has besides.
        "INFERENCE_PRECISION_HINT": "f32",
    }

"""ONNX Runtime on the CPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mgq.errors import InputError, printable
from mgq.export.onnx.onnx_file import import_package, read_onnx
from mgq.runtime.engine_faults import MEND, fault_of_onnxruntime
from mgq.runtime.protocol import OnnxFileRuntime, cannot_run, check_threads


class OnnxRuntime(OnnxFileRuntime):
    """An ``.onnx`` file in ONNX Runtime. Takes and returns what :class:`mgq.runtime.protocol.Runtime` says.

    Raises InputError as :func:`mgq.export.onnx.onnx_file.read_onnx` does, for more threads than cores and for pictures
    of another shape than the file takes.
    """

    name = "ONNX Runtime"

    def __init__(self, path: Path, threads: int = 1) -> None:
        package = import_package("onnxruntime")
        self.version: str = package.__version__
        self.threads = check_threads(threads)
        self.file = read_onnx(path)
        fault = fault_of_onnxruntime(self.version)
        if fault and self.file.quantized:
            raise InputError(
                f"{self.name} {self.version} {fault}, so {printable(path)} is not run in it: pass another --engine, "
                f"or {MEND}"
            )
        options = package.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.execution_mode = package.ExecutionMode.ORT_SEQUENTIAL
        options.graph_optimization_level = package.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.log_severity_level = 4  # errors come once, by the exception
        # Spinning threads would take the processor from backends that run in turn with this one.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            self.session = package.InferenceSession(self.file.content, options, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise cannot_run(self, path, error) from None
        self.forget_content()

    def forget_content(self) -> None:
        """Let go of the file's content, which the package would keep to start again on another device."""
        self.session.disable_fallback()
        self.session._model_bytes = None
        self.file = replace(self.file, content=b"")

    def run(self, batch: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        result: npt.NDArray[np.float32] = self._answers([self.file.output], batch)[0]
        return result

    def outputs(self, batch: npt.NDArray[np.uint8]) -> dict[str, npt.NDArray[Any]]:
        """All that the file gives for ``batch``, by name."""
        names = [output.name for output in self.session.get_outputs()]
        return dict(zip(names, self._answers(names, batch), strict=True))

    def _answers(self, names: list[str], batch: npt.NDArray[np.uint8]) -> list[npt.NDArray[Any]]:
        self.file.refuse_other_shape(batch.shape)
        try:
            found: list[npt.NDArray[Any]] = self.session.run(names, {self.file.input: self.file.to_input(batch)})
        except Exception as error:
            raise cannot_run(self, self.file.path, error) from None
        return found

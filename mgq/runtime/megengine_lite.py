"""MegEngine Lite: the inference library on a ``.megengine`` file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import megengine
import numpy as np
import numpy.typing as npt

from mgq.errors import InputError, printable
from mgq.export.megengine.megengine_file import read_megengine_file
from mgq.export.megengine.writer import LiteGraph
from mgq.machine import set_library_defaults
from mgq.runtime.protocol import cannot_run, check_threads


class LiteRuntime:
    """A ``.megengine`` file in MegEngine Lite. Takes and returns what :class:`mgq.runtime.protocol.Runtime` says.

    Raises InputError for a file that is damaged or not mgq's, and for more threads than the machine has cores;
    ``run`` does for pictures of another shape than the file takes.
    """

    name = "MegEngine Lite"
    version = megengine.__version__

    def __init__(self, path: Path, threads: int = 1) -> None:
        set_library_defaults()
        self.threads = check_threads(threads)
        graph, self.about, face = read_megengine_file(path)
        self.path = path
        self.input_type, self.shape, (_, self.classes) = face
        try:
            self.graph = LiteGraph(graph, threads)
        except RuntimeError as error:
            raise cannot_run(self, path, error) from None

    @property
    def batch(self) -> int:
        return int(self.shape[0])

    @property
    def takes(self) -> tuple[int, ...]:
        return self.shape

    def outputs(self, batch: npt.NDArray[np.uint8]) -> dict[str, npt.NDArray[Any]]:
        return {"logits": self.run(batch)}

    def run(self, batch: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        if batch.shape != self.shape:
            raise InputError(f"{printable(self.path)} takes pictures of shape {self.shape}, not {batch.shape}")
        if self.input_type != "uint8":
            batch = (batch.astype(np.int16) - 128).astype(self.input_type)
        try:
            return self.graph.run(batch)
        except RuntimeError as error:
            raise cannot_run(self, self.path, error) from None

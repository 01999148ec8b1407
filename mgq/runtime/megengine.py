"""MegEngine itself as an engine: operator by operator, and as a traced graph."""

from __future__ import annotations

import megengine
import megengine.module as M
import numpy as np
import numpy.typing as npt
from megengine import Tensor

from mgq.errors import FailureError
from mgq.export.megengine.writer import CompiledGraph, fuse, graph_of
from mgq.quantization.modes import Mode, mode_of

ONE_THREAD = 1


class EagerRuntime:
    """``network`` run operator by operator. Takes and returns what :class:`mgq.runtime.protocol.Runtime` says.

    Raises FailureError for more than one thread, which MegEngine's Python side does not offer on a CPU.
    """

    name = "MegEngine eager"
    version = megengine.__version__
    threads = ONE_THREAD

    def __init__(self, network: M.Module, threads: int = ONE_THREAD) -> None:
        if threads != ONE_THREAD:
            raise FailureError(f"{self.name} computes on one thread; for {threads}, use MegEngine Lite")
        self.network = network
        self.batch: int | None = None
        """How many pictures a batch must have; None for any number."""

    def run(self, batch: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        result: npt.NDArray[np.float32] = self.network(Tensor(batch.astype(np.float32) - 128)).numpy()
        return result


class TracedRuntime(EagerRuntime):
    """``network`` traced on its first batch, optimized for inference and compiled as one graph.

    A float network has its batch norms folded first. Later batches must have the same shape.
    """

    name = "MegEngine traced"

    def __init__(self, network: M.Module, threads: int = ONE_THREAD) -> None:
        super().__init__(fuse(network) if mode_of(network) is Mode.NORMAL else network, threads)
        self.graph: CompiledGraph | None = None

    def run(self, batch: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        if self.graph is None:
            self.graph = CompiledGraph(graph_of(self.network, batch, "uint8"))
            self.batch = len(batch)
        return self.graph.run(batch)

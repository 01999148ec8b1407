"""Runs an int8 network that MegEngine cannot run in an engine that can, behind the interface of a module."""

from __future__ import annotations

import megengine as mge
import megengine.module as M
import numpy as np
from megengine import Tensor
from megengine.module.quantized import QuantizedModule

from mgq.export.onnx.writer import write_onnx
from mgq.io.temporary_folders import temporary_folder
from mgq.machine import usable_cores
from mgq.quantization.modes import Mode, to_mode
from mgq.quantization.targets import MEGENGINE, target_of
from mgq.runtime.megengine import EagerRuntime, TracedRuntime
from mgq.runtime.protocol import BatchRuntime, FileRuntime, run_in_batches
from mgq.runtime.registry import load

OWN_CHOICE = "xpux"
"""MegEngine's default device."""


def int8_of(fake_quantized: M.Module, image_size: int) -> M.Module:
    """The int8 network that ``fake_quantized``, mode ``qat``, stands for: for its target, and ready to run.

    Raises InputError where the target's engine is not installed.
    """
    if target_of(fake_quantized) is MEGENGINE:
        return to_mode(fake_quantized, Mode.QUANTIZED)
    return RuntimeModule.from_qat_module(fake_quantized, image_size)


def int8_runtime(fake_quantized: M.Module, image_size: int) -> BatchRuntime:
    """The int8 network as one compiled graph, for short use.

    Raises InputError where the target's engine is not installed. MegEngine keeps every operator of a network that runs
    operator by operator, with its scales, as long as the process lives: see :mod:`mgq.quantization.int8_casts`. It does
    so only where it was told to compute on another device than its own choice, for which it writes no graphs.
    """
    network = int8_of(fake_quantized, image_size)
    if isinstance(network, RuntimeModule):
        return network.runtime
    return (TracedRuntime if mge.get_default_device() == OWN_CHOICE else EagerRuntime)(network)


class RuntimeModule(QuantizedModule):  # type: ignore[misc]
    """A deployed file behind the face of a network: float32 pixels minus 128 in, float32 logits out."""

    def __init__(self, runtime: FileRuntime, size: int) -> None:
        super().__init__()
        self.runtime = runtime
        self.size: int = size
        self.eval()  # nothing else is possible

    def forward(self, inp: Tensor) -> Tensor:
        return Tensor(run_in_batches(self.runtime, (inp.numpy() + 128).astype(np.uint8)))

    @classmethod
    def from_qat_module(cls, qat_module: M.Module, image_size: int) -> RuntimeModule:
        """``qat_module``, a whole network, by way of an ONNX file."""
        with temporary_folder() as folder:
            path = folder / "network.onnx"
            report = write_onnx(qat_module, path, image_size=image_size, batch=None, provenance={})
            return cls(load(path, threads=usable_cores()), report.size)

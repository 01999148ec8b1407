"""Protocols of the engines that run deployed networks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from mgq.errors import InputError, plural, printable
from mgq.export.onnx.onnx_file import OnnxFile
from mgq.machine import usable_cores
from mgq.runtime.engine_faults import advice_for


class Runtime(Protocol):
    """One engine with one network loaded, ready to run.

    ``run`` takes a batch of pictures, uint8 of shape (N, 3, H, W), channels in BGR order, and returns
    float32 logits of shape (N, classes). It returns only when the result is in memory, so it can be timed.
    """

    name: str
    version: str
    threads: int

    def run(self, batch: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]: ...


class BatchRuntime(Runtime, Protocol):
    """A runtime whose ``batch`` is the N that it takes, None where any will do."""

    @property
    def batch(self) -> int | None: ...


class FileRuntime(BatchRuntime, Protocol):
    """A runtime that has a file loaded.

    ``outputs`` gives all that the file answers, by name: it may be asked for more than logits. ``about`` is what mgq
    wrote into the file, unchecked; empty where another program wrote it. ``takes`` is the shape of its input, with None
    where any number will do, ``classes`` how many logits it gives.
    """

    @property
    def about(self) -> Mapping[str, Any]: ...

    @property
    def takes(self) -> tuple[int | None, ...]: ...

    @property
    def classes(self) -> int: ...

    def outputs(self, batch: npt.NDArray[np.uint8]) -> dict[str, npt.NDArray[Any]]: ...


class OnnxFileRuntime:
    """What a :class:`FileRuntime` says of itself that has an ``.onnx`` file loaded."""

    file: OnnxFile

    @property
    def batch(self) -> int | None:
        return self.file.shape[0]

    @property
    def about(self) -> Mapping[str, Any]:
        return self.file.about

    @property
    def takes(self) -> tuple[int | None, ...]:
        return self.file.shape

    @property
    def classes(self) -> int:
        return self.file.classes


def cannot_run(runtime: Runtime, path: Path, error: Exception) -> InputError:
    """The error for a file that ``runtime`` does not take, with the first line of what it says and the mend."""
    why = printable(str(error).strip().partition("\n")[0])[:300]
    return InputError(
        f"{runtime.name} {runtime.version} cannot run {printable(path)} ({why}): "
        + advice_for(runtime.name, runtime.version)
    )


def check_threads(threads: int) -> int:
    """Raises InputError for more threads than cores."""
    cores = usable_cores()
    if not 1 <= threads <= cores:
        raise InputError(f"{plural(threads, 'thread')} on {plural(cores, 'core')} will not do; give 1 to {cores}")
    return threads


def run_in_batches(runtime: BatchRuntime, images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """The logits of ``images``, any number of them, in batches of the size that ``runtime`` takes."""
    if runtime.batch in (None, len(images)):
        return runtime.run(images)
    return np.concatenate([runtime.run(batch) for batch in batches_of(runtime.batch or 1, images)])[: len(images)]


def batches_of(size: int, images: npt.NDArray[np.uint8]) -> list[npt.NDArray[np.uint8]]:
    """``images`` in batches of ``size``, the last of them filled up with the first picture."""
    whole = [images[i : i + size] for i in range(0, len(images), size)]
    missing = size - len(whole[-1])
    whole[-1] = np.concatenate([whole[-1], np.repeat(images[:1], missing, axis=0)])
    return whole

"""Several processes that train one network: what each does besides its own part."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import megengine as mge
import megengine.module as M
from megengine import Tensor

from mgq.engine.distributed.team import current_team
from mgq.errors import InputError
from mgq.events import Callbacks
from mgq.system.graphics_cards import RANGE
from mgq.system.processes import do_nothing

Result = TypeVar("Result")
Thing = TypeVar("Thing")


@dataclass(frozen=True)
class Cluster:
    """Which processes train together: number ``node`` of ``nodes`` machines, each with ``devices`` GPUs.

    ``master`` is ``host:port`` of machine 0, where all meet. With ``by_mpi`` they are ``devices`` processes on
    processors, which MPI has started.
    """

    devices: int = 1
    nodes: int = 1
    node: int = 0
    master: str = "localhost:0"
    by_mpi: bool = False

    @property
    def world(self) -> int:
        return self.devices * self.nodes

    @property
    def address(self) -> tuple[str, int]:
        host, _, port = self.master.rpartition(":")
        return host, int(port)


@dataclass(frozen=True)
class ProcessGroup:
    """One of ``world_size`` processes, by its ``rank``; alone by default. This one exchanges nothing: see its kinds.

    Every process calls the same methods in the same order.
    """

    rank: int = 0
    world_size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this is the one that writes and speaks."""
        return self.rank == 0

    @property
    def share(self) -> tuple[int, int]:
        """Which part of the pictures to measure is this process's, and of how many; all, where each measures all."""
        return 0, 1

    def gradient_callbacks(self, compress: str = "none", numbers: int = 0) -> list[Any]:
        """What a gradient manager has to call when a gradient is ready: averages it over all processes.

        ``numbers``: how many all gradients have together.
        """
        return []

    def broadcast(self, network: M.Module) -> None:
        """Give all the weights of the first."""

    def from_first(self, thing: Thing) -> Thing:
        """What the first process has for ``thing``, on all."""
        return thing

    def call_on_first(self, function: Callable[[], Thing]) -> Thing:
        """What ``function`` returns in the first process, on all; where nothing but tensors is exchanged, in each."""
        return function()

    def gather(self, thing: Thing) -> list[Thing]:
        """What all processes have for ``thing``, by rank, on all."""
        return [thing]

    def begin_average(self, tensors: list[Tensor]) -> Callable[[], None]:
        """Begin to exchange ``tensors``, float32; what this returns gives all of them the means of all processes."""
        return do_nothing

    def merge_ranges(self, network: M.Module) -> None:
        """Let observers of activations know what those of all processes have seen."""

    def exchanging(self, batch_norm: bool) -> contextlib.AbstractContextManager[None]:
        """Within it observers see all processes' activations and, where asked for, batch norms their whole batch."""
        return contextlib.nullcontext()

    def describe(self) -> str:
        """How the processes are getting on, in a few words; none where there is nothing to tell."""
        return ""

    def note_progress(self, steps: int, seconds: float) -> None:
        """Let the first process's view know that ``steps`` of the epoch are behind, after ``seconds`` in it."""


def runs_on_processor() -> bool:
    """Whether networks run on the processor here."""
    return bool(mge.get_default_device().startswith("cpu")) or not gpus()


def gpus() -> int:
    """How many GPUs this machine has that MegEngine can use."""
    return int(mge.get_device_count("gpu")) if mge.is_cuda_available() else 0


def check_cluster(devices: int | None, nodes: int, node: int, master: str | None) -> Cluster:
    """The cluster that the options mean; without GPUs this machine's processor alone, or all that MPI has started.

    Raises InputError for more GPUs than there are, or machines that cannot meet.
    """
    team = current_team()
    if team is not None:
        if devices or nodes != 1 or node or master is not None:
            raise InputError("-n, --nnodes, --node-rank and --master are for GPUs: leave them out where MPI starts mgq")
        return Cluster(team.size, by_mpi=True)
    there = gpus()
    if devices is not None and devices < 0:
        raise InputError(f"-n {devices} is not a number of GPUs: give 0 for the processor, or more")
    if devices and not there:
        raise InputError(f"-n {devices}: MegEngine finds no GPU here ({RANGE}): leave -n out")
    if devices is not None and devices > there:
        raise InputError(f"-n {devices} is more than the {there} GPUs that MegEngine finds here: leave -n out")
    if nodes < 1 or not 0 <= node < nodes:
        raise InputError(f"--node-rank {node} of --nnodes {nodes} is not possible: count machines from 0")
    if nodes > 1 and there == 0:
        raise InputError("--nnodes needs GPUs on every machine: for processors start mgq by mpirun --hostfile FILE")
    if (nodes > 1 or master is not None) and not is_address(master):
        raise InputError("--nnodes needs --master HOST:PORT, the address of machine 0: give it on every machine")
    used = there if devices is None else devices
    return Cluster(max(1, used), nodes, node, master or "localhost:0")


def is_address(text: str | None) -> bool:
    host, _, port = (text or "").rpartition(":")
    return bool(host) and port.isdigit() and 0 < int(port) < 65536


Work = Callable[[ProcessGroup, Callbacks], Result]
"""One process's part of a training. It is pickled where there are several."""


class EndedError(Exception):
    """The processes of several devices were ended because their watcher wanted it."""

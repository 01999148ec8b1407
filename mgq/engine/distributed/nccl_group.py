"""One process for each GPU, which exchange gradients by MegEngine's own NCCL."""

from __future__ import annotations

import contextlib
import os
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import megengine as mge
import megengine.distributed as dist
import megengine.module as M
from megengine.distributed.group import _set_machine_ranks

from mgq.engine.distributed.process_group import Cluster, EndedError, ProcessGroup, Result, Work
from mgq.events import NO_CALLBACKS, Callbacks, Progress
from mgq.machine import usable_cores
from mgq.system.processes import Channel, run_in_processes
from mgq.zoo.own_networks import has_own_networks


class NcclGroup(ProcessGroup):
    """Processes on GPUs. Observers of several devices are MegEngine's own, and each process measures all pictures."""

    def gradient_callbacks(self, compress: str = "none", numbers: int = 0) -> list[Any]:
        return [dist.make_allreduce_cb("mean")]

    def broadcast(self, network: M.Module) -> None:
        dist.bcast_list_(list(network.tensors()))


def launch_on_gpus(cluster: Cluster, work: Work[Result], callbacks: Callbacks, prepare: Callable[[], None]) -> Result:
    """What the first of a process for each GPU returns; see :func:`mgq.engine.distributed.launch.launch`."""
    host, port = cluster.address
    server = dist.Server(port) if cluster.node == 0 else None  # as long as it is referred to
    port, sent = server.py_server_port if server else port, pickle.dumps(work)
    parts = [_Part(sent, cluster, host, port, device) for device in range(cluster.devices)]
    found: list[Result] = []
    threads = max(1, usable_cores() // cluster.devices)
    messages = run_in_processes(parts, "training", threads, prepare, has_own_networks())
    with contextlib.closing(messages):
        for message in messages:
            if isinstance(message, Progress):
                callbacks.on_progress(message)
            elif isinstance(message, str):
                callbacks.on_message(message)
            elif isinstance(message, _TaskResult):
                found.append(message.result)
            if callbacks.should_stop() and not found:
                raise EndedError
    return found[0]


@dataclass(frozen=True)
class _TaskResult:
    result: Any


@dataclass(frozen=True)
class _Part:
    """The work for GPU number ``device`` of this machine, as it comes into a process of its own.

    ``work`` stays pickled until MegEngine knows the device: what is loaded with it may make tensors.
    """

    work: bytes
    cluster: Cluster
    host: str
    port: int
    device: int

    def __call__(self, channel: Channel) -> None:
        first = self.cluster.node * self.cluster.devices
        rank, world = first + self.device, self.cluster.world
        dist.init_process_group(self.host, self.port, world, rank, self.device, backend="nccl", device_type="gpu")
        # As MegEngine's own launcher has it, against deadlocks.
        os.environ["NCCL_LAUNCH_MODE"] = "PARALLEL"
        _set_machine_ranks(list(range(first, first + self.cluster.devices)))
        dist.group_barrier()
        speaks = self.device == 0
        callbacks = Callbacks(channel.send, channel.send) if speaks else NO_CALLBACKS
        result = pickle.loads(self.work)(NcclGroup(rank, world), callbacks)
        mge._full_sync()
        dist.group_barrier()
        if speaks:
            channel.send(_TaskResult(result))

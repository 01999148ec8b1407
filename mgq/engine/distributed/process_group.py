"""Several devices that train one network: what each does besides its own part."""

from __future__ import annotations

import contextlib
import os
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import megengine as mge
import megengine.distributed as dist
import megengine.module as M
from megengine.distributed.group import _set_machine_ranks

from mgq.errors import InputError
from mgq.events import NO_CALLBACKS, Callbacks, Progress
from mgq.machine import usable_cores
from mgq.system.processes import Channel, do_nothing, run_in_processes

Result = TypeVar("Result")


@dataclass(frozen=True)
class Cluster:
    """Which machines train together: this is number ``node`` of ``nodes``, each with ``devices`` GPUs.

    ``master`` is ``host:port`` of machine 0, where all meet.
    """

    devices: int = 1
    nodes: int = 1
    node: int = 0
    master: str = "localhost:0"

    @property
    def world(self) -> int:
        return self.devices * self.nodes

    @property
    def address(self) -> tuple[str, int]:
        host, _, port = self.master.rpartition(":")
        return host, int(port)


@dataclass(frozen=True)
class ProcessGroup:
    """One of ``world_size`` processes, by its ``rank``; alone by default. Gradients are averaged over all."""

    rank: int = 0
    world_size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this is the one that writes and speaks."""
        return self.rank == 0

    def gradient_callbacks(self) -> list[Any]:
        """What a gradient manager has to call when a gradient is ready."""
        return [dist.make_allreduce_cb("mean")] if self.world_size > 1 else []

    def broadcast(self, network: M.Module) -> None:
        """Give all the weights of the first."""
        if self.world_size > 1:
            dist.bcast_list_(list(network.tensors()))


def on_processor() -> bool:
    """Whether networks run on the processor here."""
    return bool(mge.get_default_device().startswith("cpu")) or not gpus()


def gpus() -> int:
    """How many GPUs this machine has that MegEngine can use."""
    return int(mge.get_device_count("gpu")) if mge.is_cuda_available() else 0


def check_cluster(devices: int | None, nodes: int, node: int, master: str | None) -> Cluster:
    """The cluster that the options mean; without GPUs this machine's processor alone.

    Raises InputError for more GPUs than there are, or machines that cannot meet.
    """
    there = gpus()
    if devices is not None and devices < 0:
        raise InputError(f"-n {devices} is not a number of GPUs: give 0 for the processor, or more")
    if devices is not None and devices > there:
        raise InputError(f"-n {devices} is more than the {there} GPUs that MegEngine finds here: leave -n out")
    if nodes < 1 or not 0 <= node < nodes:
        raise InputError(f"--node-rank {node} of --nnodes {nodes} is not possible: count machines from 0")
    if nodes > 1 and there == 0:
        raise InputError("--nnodes needs GPUs on every machine: MegEngine has no other way to exchange gradients")
    if (nodes > 1 or master is not None) and not is_address(master):
        raise InputError("--nnodes needs --master HOST:PORT, the address of machine 0: give it on every machine")
    used = there if devices is None else devices
    return Cluster(max(1, used), nodes, node, master or "localhost:0")


def is_address(text: str | None) -> bool:
    host, _, port = (text or "").rpartition(":")
    return bool(host) and port.isdigit() and 0 < int(port) < 65536


Work = Callable[[ProcessGroup, Callbacks], Result]
"""One device's part of a training. It is pickled where there are several."""


def launch(
    cluster: Cluster, work: Work[Result], callbacks: Callbacks, prepare: Callable[[], None] = do_nothing
) -> Result:
    """What ``work`` returns: in this process with one device, else in a process for each, whose first one counts.

    These are started clean, as MegEngine cannot go on in a fork of a process that used it. What the first says and how
    far it is comes to ``callbacks``. When that asks to stop, or an error is raised in any of them, all are ended:
    EndedError, or the error. ``prepare`` is called in each before MegEngine is loaded.
    """
    if cluster.world == 1:
        return work(ProcessGroup(), callbacks)
    host, port = cluster.address
    server = dist.Server(port) if cluster.node == 0 else None  # as long as it is referred to
    port, sent = server.py_server_port if server else port, pickle.dumps(work)
    parts = [_Part(sent, cluster, host, port, device) for device in range(cluster.devices)]
    found: list[Result] = []
    messages = run_in_processes(parts, "training", max(1, usable_cores() // cluster.devices), prepare)
    with contextlib.closing(messages):
        for message in messages:
            if isinstance(message, Progress):
                callbacks.on_progress(message)
            elif isinstance(message, str):
                callbacks.on_message(message)
            elif isinstance(message, _Found):
                found.append(message.result)
            if callbacks.should_stop() and not found:
                raise EndedError
    return found[0]


class EndedError(Exception):
    """The processes of several devices were ended because their watcher wanted it."""


@dataclass(frozen=True)
class _Found:
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
        result = pickle.loads(self.work)(ProcessGroup(rank, world), callbacks)
        mge._full_sync()
        dist.group_barrier()
        if speaks:
            channel.send(_Found(result))

"""Several devices that train one network: what each does besides its own part."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import megengine as mge
import megengine.distributed as dist
import megengine.module as M

from mgq.errors import InputError

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
class Peers:
    """One of ``count`` processes, by its ``rank``; alone by default. Gradients are averaged over all."""

    rank: int = 0
    count: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this is the one that writes and speaks."""
        return self.rank == 0

    def callbacks(self) -> list[Any]:
        """What a gradient manager has to call when a gradient is ready."""
        return [dist.make_allreduce_cb("mean")] if self.count > 1 else []

    def share(self, network: M.Module) -> None:
        """Give all the weights of the first."""
        if self.count > 1:
            dist.bcast_list_(list(network.tensors()))


def on_processor() -> bool:
    """Whether networks run on the processor here."""
    return bool(mge.get_default_device().startswith("cpu")) or not gpus()


def gpus() -> int:
    """How many GPUs this machine has that MegEngine can use."""
    return int(mge.get_device_count("gpu")) if mge.is_cuda_available() else 0


def checked_cluster(devices: int | None, nodes: int, node: int, master: str | None) -> Cluster:
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


def on_every_device(cluster: Cluster, work: Callable[[Peers], Result]) -> Result:
    """What the first process's ``work`` returns; with one device in this process, else in one for each device."""
    if cluster.world == 1:
        return work(Peers())
    host, port = cluster.address

    def in_child() -> Result:
        return work(Peers(dist.get_rank(), dist.get_world_size()))

    launch = dist.launcher(
        in_child,
        n_gpus=cluster.devices,
        world_size=cluster.world,
        rank_start=cluster.node * cluster.devices,
        master_ip=host,
        port=port,
        device_type="gpu",
    )
    result: Result = launch()[0]
    return result

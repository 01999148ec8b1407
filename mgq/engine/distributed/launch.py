"""Starts work in several processes: on each GPU, or in the processes that MPI has started."""

from __future__ import annotations

from collections.abc import Callable

from mgq.engine.distributed.mpi_group import launch_by_mpi
from mgq.engine.distributed.nccl_group import launch_on_gpus
from mgq.engine.distributed.process_group import Cluster, ProcessGroup, Result, Work
from mgq.events import Callbacks
from mgq.system.processes import do_nothing


def launch(
    cluster: Cluster, work: Work[Result], callbacks: Callbacks, prepare: Callable[[], None] = do_nothing
) -> Result:
    """What ``work`` returns: in this process with one device, else in a process for each, whose first one counts.

    For GPUs these are started clean, as MegEngine cannot go on in a fork of a process that used it; those of MPI are
    there already. What the first says and how far it is comes to ``callbacks``. When that asks to stop, or an error is
    raised in any of them, all are ended: EndedError, or the error; those of MPI are asked to stop together.
    ``prepare`` is called in each before MegEngine is loaded.
    """
    if cluster.by_mpi:
        return launch_by_mpi(work, callbacks, prepare)
    if cluster.world == 1:
        return work(ProcessGroup(), callbacks)
    return launch_on_gpus(cluster, work, callbacks, prepare)

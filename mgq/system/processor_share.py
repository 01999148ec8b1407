"""How much of the processor other programs take while this one measures times."""

from __future__ import annotations

import time
from dataclasses import dataclass

import psutil  # type: ignore[import-untyped]

from mgq.machine import list_usable_cores


@dataclass(frozen=True)
class ProcessorTime:
    """In seconds, at one moment: ``total`` of the cores that this process may run on, how many of these they were
    ``idle``, and how many this process had."""

    total: float
    idle: float
    own: float


def read_processor_time() -> ProcessorTime:
    cores, times = list_usable_cores(), psutil.cpu_times(percpu=True)
    idle = sum(times[core].idle + getattr(times[core], "iowait", 0.0) for core in cores if core < len(times))
    return ProcessorTime(time.perf_counter() * len(cores), idle, time.process_time())


def share_of_others(since: ProcessorTime) -> float:
    """The part of these cores, 0 to 1, that was neither idle nor this process's ``since`` then."""
    now = read_processor_time()
    free = (now.idle - since.idle) + (now.own - since.own)
    return min(max(1 - free / (now.total - since.total), 0.0), 1.0)

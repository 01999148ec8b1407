"""One process for each share of the cores, on one machine or many, which exchange gradients by MPI."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import megengine as mge
import megengine.module as M
import numpy as np
from megengine import Tensor
from megengine.quantization.observer import MinMaxObserver

from mgq.cpu_kernels import fast_gradients_enabled
from mgq.cpu_kernels.fake_quantization import set_value
from mgq.cpu_kernels.statistics_exchange import Sums, exchanging
from mgq.cpu_kernels.tensor_exchange import Array, gathering_state, read_state, values, write_state
from mgq.engine.distributed.gradient_average import GradientAverage, bounds
from mgq.engine.distributed.process_group import ProcessGroup, Result, Thing, Work
from mgq.engine.distributed.shared_memory import SharedBoard, share_board
from mgq.engine.distributed.team import Team, current_team, send_work
from mgq.errors import FailureError, MgqError
from mgq.events import NO_CALLBACKS, Callbacks
from mgq.quantization.qat import CurrentRangeObserver
from mgq.system.processes import do_nothing

UFUNCS: dict[str, np.ufunc] = {"SUM": np.add, "MIN": np.minimum, "MAX": np.maximum}
FEW_RANKS = 8
"""Up to this many are listed one by one."""


@dataclass(frozen=True)
class MpiGroup(ProcessGroup):
    """Processes on processors. Network, optimizer and running statistics are the same to the bit on all of them."""

    @property
    def team(self) -> Team:
        team = current_team()
        assert team is not None
        return team

    @property
    def share(self) -> tuple[int, int]:
        return self.rank, self.world_size

    def gradient_callbacks(self, compress: str = "none", numbers: int = 0) -> list[Any]:
        return [GradientAverage(self.team, compress, numbers)]

    def broadcast(self, network: M.Module) -> None:
        found = self.team.share([tensor.numpy() for tensor in network.tensors()] if self.is_first else None)
        if not self.is_first:
            for tensor, value in zip(network.tensors(), found, strict=True):
                tensor[...] = value

    def from_first(self, thing: Thing) -> Thing:
        found: Thing = self.team.share(thing)
        return found

    def call_on_first(self, function: Callable[[], Thing]) -> Thing:
        found: Thing = self.team.share(function() if self.is_first else None)
        return found

    def gather(self, thing: Thing) -> list[Thing]:
        return self.team.gather(thing)

    def begin_average(self, tensors: list[Tensor]) -> Callable[[], None]:
        from mpi4py import MPI

        if not tensors:
            return do_nothing
        arrays = read_state(*tensors) if fast_gradients_enabled() else values(*tensors)
        flat = np.concatenate([array.reshape(-1) for array in arrays])
        request = self.team.comm.Iallreduce(MPI.IN_PLACE, flat, MPI.SUM)

        def finish() -> None:
            self.team.wait(request)
            np.divide(flat, np.float32(self.world_size), out=flat)
            with gathering_state():
                for tensor, (start, end) in zip(tensors, bounds(tensors), strict=True):
                    write_state(tensor, flat[start:end])

        return finish

    def merge_ranges(self, network: M.Module) -> None:
        observers = [m for m in network.modules() if isinstance(m, MinMaxObserver) and m.enabled]
        seen = [observer for observer in observers if not isinstance(observer, CurrentRangeObserver)]
        self.replace([observer.min_val for observer in seen], lambda array: self.reduce(array, "MIN"))
        self.replace([observer.max_val for observer in seen], lambda array: self.reduce(array, "MAX"))

    def replace(self, tensors: list[Any], exchange: Callable[[Array], Array]) -> None:
        """Replace the values of ``tensors``, together float32 (N,), by the result of ``exchange``."""
        if not tensors:
            return
        before = [tensor.numpy() for tensor in tensors]
        found = exchange(np.concatenate([value.reshape(-1) for value in before]).astype(np.float32))
        ends = np.cumsum([value.size for value in before])
        for tensor, value, end in zip(tensors, before, ends, strict=True):
            set_value(tensor, found[end - value.size : end].reshape(value.shape))

    def exchanging(self, batch_norm: bool) -> contextlib.AbstractContextManager[None]:
        return exchanging(self, batch_norm)

    def merge_extremes(self, extremes: Array) -> Array:
        smallest, largest = extremes.reshape(-1)
        found: Array = self.reduce(np.array([-smallest, largest], np.float32), "MAX")
        found[0] = -found[0]
        return found

    def add_up(self, values: Sums) -> Sums:
        found: Sums = self.reduce(values, "SUM")
        return found

    def reduce(self, array: Any, operation: str) -> Any:
        """``array`` with those of all processes, by an operation that MPI calls so: in the order of the ranks where
        they are on one machine."""
        shown = None if self.board is None else self.board.show(array)
        if shown is not None:
            return UFUNCS[operation].reduce(shown, 0)
        from mpi4py import MPI

        found = np.array(array)
        self.team.wait(self.team.comm.Iallreduce(MPI.IN_PLACE, found, getattr(MPI, operation)))
        return found

    @cached_property
    def board(self) -> SharedBoard | None:
        return share_board(self.team)

    def note_progress(self, steps: int, seconds: float) -> None:
        before, before_seconds, before_waited = self.team.noted
        self.team.noted = steps, seconds, self.team.waited
        if steps < before:
            self.team.epoch += 1
        if steps > before:
            busy = seconds - before_seconds - (self.team.waited - before_waited)
            self.team.tell(progress=[steps, busy / (steps - before), self.team.epoch])

    def describe(self) -> str:
        epoch = self.team.epoch
        found = sorted((rank, told[:2]) for rank, told in self.team.progress.items() if told[2] == epoch)
        if not found:
            return ""
        if len(found) <= FEW_RANKS:
            steps = " ".join(f"{done:.0f}" for _, (done, _) in found)
            times = " ".join(f"{1000 * seconds:.0f}" for _, (_, seconds) in found)
            return f"ranks at {steps}, {times} ms"
        rank, (_, longest) = max(found, key=lambda item: item[1][1])
        least = min(done for _, (done, _) in found)
        return f"{len(found)} ranks, step {least:.0f}, longest {1000 * longest:.0f} ms on {self.team.name_of(rank)}"


def launch_by_mpi(work: Work[Result], callbacks: Callbacks, prepare: Callable[[], None]) -> Result:
    """What ``work`` returns in this process, the first of its team, while all others do it, too."""
    team = current_team()
    assert team is not None
    send_work(team, partial(take_part, work), prepare)
    with naming_rank(team):
        return work(MpiGroup(team.rank, team.size), callbacks)


def take_part(work: Work[Any], team: Team) -> None:
    """Do ``work`` in a process other than the first: without progress or messages."""
    mge.set_default_device("cpux")
    work(MpiGroup(team.rank, team.size), NO_CALLBACKS)


@contextlib.contextmanager
def naming_rank(team: Team) -> Iterator[None]:
    """Inside, errors get the name of this process; one that came from another process names that already."""
    try:
        yield
    except MgqError as error:
        if isinstance(error, FailureError) and not str(error).startswith("rank "):
            raise FailureError(f"{team.name_of(team.rank)}: {error}") from error
        raise

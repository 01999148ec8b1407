"""A training as one process or several that MPI starts: ``python -m tests.fakes.training_together FOLDER MODE WORDS``.

``WORDS`` is JSON: what is asked for, and ``stop_after`` which line, or ``stop_in`` what work. The weights are in the
run's state afterwards.
"""

from __future__ import annotations

import contextlib
import json
import socket
import sys
from pathlib import Path
from typing import Any

from mgq.system.megengine_start import prepare_process
from mgq.system.mpi_world import World, find_world
from mgq.system.supervision import Link

SMALL = {
    "arch": "shufflenet_v1_x0_5_g3",
    "image_size": 32,
    "epochs": 1,
    "synthetic_train": 48,
    "synthetic_val": 20,
}


def short_networks() -> None:
    from mgq.zoo import shufflenet_v1

    shufflenet_v1.REPEATS = (1, 1, 1)


def prepare() -> None:
    prepare_process()
    if "data" not in json.loads(sys.argv[3]):
        short_networks()


def join(world: World, words: list[str]) -> Any:
    """The team, without supervisors."""
    from mgq.engine.distributed.team import join_team

    ours, theirs = socket.socketpair()
    KEPT.append(theirs)
    Link(theirs).send(hub=[[], 0, ""])
    return join_team(world, Link(ours), words)


KEPT: list[socket.socket] = []


def train(folder: Path, mode: str, words: dict[str, Any]) -> None:
    from dataclasses import replace

    from mgq.api import make_train_options
    from mgq.engine.training import training_run
    from mgq.engine.training.trainer import StoppedError
    from mgq.events import Callbacks

    stop_after, stop_in = words.pop("stop_after", None), words.pop("stop_in", None)
    said: list[str] = []
    begun: set[str] = set()
    callbacks = Callbacks(
        lambda progress: begun.add(progress.what),
        said.append,
        lambda: stop_in in begun or any(str(stop_after) in line for line in said),
    )
    small = {} if words.keys() & {"resume", "data"} else SMALL
    options = replace(make_train_options({**small, **words, "save": folder}), prepare=prepare)
    # What comes after the training is not of interest here.
    training_run.finish_run = training_run.train_on_all_devices  # type: ignore[assignment]
    with contextlib.suppress(StoppedError):
        (training_run.qat if mode == "qat" else training_run.train)(options, callbacks)
    sys.stdout.write("\n".join(said))


def main() -> None:
    folder, mode, words = Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
    world = find_world()
    if world is None:
        prepare()
        train(folder, mode, words)
        return
    team = join(world, sys.argv[1:])
    from mgq.engine.distributed.team import leave_team, serve

    if team.rank == 0:
        prepare()
        train(folder, mode, words)
    else:
        serve(team)
    leave_team()


if __name__ == "__main__":
    main()

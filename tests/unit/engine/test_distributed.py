"""Training by several processes that meet and wait for each other as on GPUs, on the processor: without NCCL nothing
that they learn is exchanged."""

from __future__ import annotations

import os
import pickle
import signal
import socket
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from mgq.api import make_train_options
from mgq.engine.distributed.launch import launch
from mgq.engine.distributed.process_group import Cluster, EndedError, ProcessGroup
from mgq.engine.training import train_options, training_run
from mgq.engine.training.trainer import StoppedError
from mgq.engine.training.training_process import train_on_device
from mgq.errors import FailureError, InputError
from mgq.events import NO_CALLBACKS, Callbacks, Progress
from tests.fakes.without_gpus import without_gpus

pytestmark = pytest.mark.usefixtures("short_shufflenet")
TWO = Cluster(devices=2)
WORDS: dict[str, Any] = {
    "arch": "shufflenet_v1_x0_5_g3",
    "image_size": 32,
    "epochs": 1,
    "batch_size": 8,
    "synthetic_train": 64,
    "synthetic_val": 20,
}


def ranked(group: ProcessGroup, callbacks: Callbacks) -> tuple[int, int, int]:
    callbacks.on_message(f"rank {group.rank}")
    callbacks.on_progress(Progress("work", 1, 2))
    return group.rank, group.world_size, os.getpid()


def test_one_device_works_in_this_process() -> None:
    assert launch(Cluster(), ranked, NO_CALLBACKS) == (0, 1, os.getpid())


@pytest.mark.slow
def test_the_first_process_of_each_machine_speaks_and_answers() -> None:
    """Two machines of two devices each, which meet at the first."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        master = f"localhost:{free.getsockname()[1]}"

    def machine(node: int) -> tuple[tuple[int, int, int], list[str], list[Progress]]:
        remarks: list[str] = []
        progress: list[Progress] = []
        callbacks = Callbacks(progress.append, remarks.append)
        return launch(Cluster(2, 2, node, master), ranked, callbacks, without_gpus), remarks, progress

    with ThreadPoolExecutor(2) as machines:
        for rank, (found, remarks, progress) in zip((0, 2), machines.map(machine, range(2)), strict=True):
            assert found[:2] == (rank, 4) and found[2] != os.getpid()
            assert remarks == [f"rank {rank}"] and progress == [Progress("work", 1, 2)]


def refusing(group: ProcessGroup, callbacks: Callbacks) -> None:
    if group.rank == 1:
        raise InputError("these pictures cannot be: take others")
    signal.pause()


def dying(group: ProcessGroup, callbacks: Callbacks) -> None:
    if group.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    signal.pause()


def endless(group: ProcessGroup, callbacks: Callbacks) -> None:
    callbacks.on_progress(Progress("work", 1, 2))
    signal.pause()


@pytest.mark.slow
def test_an_error_of_one_ends_all_and_is_told_as_it_is() -> None:
    with pytest.raises(InputError, match=r"^these pictures cannot be: take others$"):
        launch(TWO, refusing, NO_CALLBACKS, without_gpus)
    with pytest.raises(FailureError, match=r"process 2 of 2 of training .*was killed by SIGKILL"):
        launch(TWO, dying, NO_CALLBACKS, without_gpus)


def test_a_watcher_that_wants_to_stop_ends_all() -> None:
    with pytest.raises(EndedError):
        launch(TWO, endless, Callbacks(should_stop=lambda: True), without_gpus)


# ---- whole trainings ----


@pytest.fixture
def on_two(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (training_run, train_options):
        monkeypatch.setattr(module, "check_cluster", lambda *_: TWO)


def requested(save: Path, **words: Any) -> Any:
    return replace(make_train_options({**WORDS, **words, "save": save}), prepare=without_gpus)


@pytest.mark.usefixtures("on_two")
@pytest.mark.slow
def test_train_and_qat_on_two_devices(tmp_path: Path) -> None:
    remarks: list[str] = []
    trained = training_run.train(requested(tmp_path), Callbacks(on_message=remarks.append))
    assert trained.checkpoint.is_file() and trained.comparison.images == 20
    assert sum("epoch 1/1" in line for line in remarks) == 1  # of one process
    log = (trained.checkpoint.parent / "log.txt").read_text()
    assert log.count("epoch 1/1") == 1

    found = training_run.qat(requested(tmp_path), NO_CALLBACKS)
    assert found.comparison.images == 20 and found.recipe.devices == 2


@pytest.mark.usefixtures("on_two")
@pytest.mark.slow
def test_a_training_on_two_devices_stops_and_goes_on(tmp_path: Path) -> None:
    epochs: list[str] = []
    callbacks = Callbacks(on_message=epochs.append, should_stop=lambda: any("epoch 1/2" in line for line in epochs))
    with pytest.raises(StoppedError, match="stopped on 2 devices; its state last saved is kept") as stopped:
        training_run.train(requested(tmp_path, epochs=2, synthetic_train=160), callbacks)
    assert (stopped.value.verb, stopped.value.arch) == ("train", WORDS["arch"])
    again = replace(make_train_options({"resume": True, "save": tmp_path}), prepare=without_gpus)
    assert training_run.train(again).best["epoch"] in (1, 2)


def test_another_machine_than_the_first_has_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_run, "find_cluster", lambda _: Cluster(1, 2, 1, "localhost:1"))
    monkeypatch.setattr(training_run, "launch", lambda *_: ({}, {}))
    with pytest.raises(training_run.ElsewhereError, match="machine 0"):
        training_run.train(requested(tmp_path))
    with pytest.raises(InputError, match="--nnodes needs float weights of shufflenet_v1_x0_5_g3 on every machine"):
        training_run.qat(requested(tmp_path))


def test_a_part_of_a_training_can_be_sent(tmp_path: Path) -> None:
    plan = training_run.make_float_job(make_train_options({**WORDS, "save": tmp_path}), NO_CALLBACKS)
    with training_run.create_run(plan, NO_CALLBACKS) as run:
        again = pickle.loads(pickle.dumps(partial(train_on_device, plan, run)))
        assert again.args[1].path == run.path
        again.args[1].close()  # which is not its to close
        with pytest.raises(InputError, match="another mgq is writing"), training_run.create_run(plan, NO_CALLBACKS):
            pass

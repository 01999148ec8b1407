"""Players in processes of their own, and the loop that measures the processor's ceiling."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import psutil  # type: ignore[import-untyped]
import pytest

from mgq.bench import workers as players_module
from mgq.bench.cases import BenchmarkCase, LoadedWorker, run_cases
from mgq.bench.peak import INSTRUCTIONS, ITERATIONS, SUMS, PeakLoop, find_instruction, module_text
from mgq.bench.settings import Precision
from mgq.bench.workers import SubprocessWorker, WorkerConfig
from mgq.errors import FailureError, InputError
from mgq.runtime.protocol import Runtime
from mgq.system.environment import this_machine

IMAGES = np.zeros((2, 3, 32, 32), np.uint8)
CORE = min(os.sched_getaffinity(0))


@dataclass
class Echo:
    """A runtime that answers with where it runs, and does on its third run what it is told to."""

    does: str = ""
    threads: int = 1
    name: str = "echo"
    version: str = "3"
    runs: int = 0

    def run(self, batch: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        self.runs += 1
        if self.runs == 3 and self.does == "crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        if self.does == "chatter":
            os.write(2, b"WRN worker would execute\n")
        if self.runs == 3 and self.does == "hang":
            time.sleep(60)
        cores = os.sched_getaffinity(0)
        return np.array([[os.getpid() % 65536, len(cores), min(cores)]] * len(batch), np.float32)


@dataclass(frozen=True)
class EchoLoader:
    does: str = ""

    def __call__(self, threads: int) -> Runtime:
        if self.does == "absent":
            raise InputError("echo is not installed: get it")
        if self.does == "stumble":
            raise KeyError("somewhere")
        return Echo(self.does, threads)


def away(does: str = "", copies: int = 1) -> SubprocessWorker:
    return SubprocessWorker("resnet18 int8", WorkerConfig(EchoLoader(does), 1, copies, (CORE,), ("json",)), IMAGES)


@pytest.fixture
def worker() -> Iterator[SubprocessWorker]:
    found = away()
    found.wait_until_ready()
    yield found
    found.close()


def test_it_runs_in_its_own_process_on_its_own_cores(worker: SubprocessWorker) -> None:
    pid, cores, first = worker.logits()[0]
    assert (int(pid), int(cores), int(first)) == (worker.process._child.process.pid % 65536, 1, CORE)  # type: ignore[operator]
    assert (worker.name, worker.version, worker.threads) == ("echo", "3", 1)
    assert len(worker.turn(4)) == 4 and min(worker.turn(1)) > 0
    memory = worker.peak_memory()
    assert memory is not None and 10**7 < memory < 10**9


def test_it_is_paused_between_its_turns(worker: SubprocessWorker) -> None:
    process = psutil.Process(worker.process._child.process.pid)
    worker.turn(1)
    given_up = time.monotonic() + 60  # a signal that was sent is not yet a process that stands still
    while process.status() != psutil.STATUS_STOPPED and time.monotonic() < given_up:
        time.sleep(0.01)
    assert process.status() == psutil.STATUS_STOPPED


def test_a_paused_process_ends_when_it_is_closed() -> None:
    found = away()
    found.wait_until_ready()
    pid = found.process._child.process.pid
    found.close()
    assert pid is not None and not psutil.pid_exists(pid)


def test_copies_run_side_by_side_in_one_process() -> None:
    found = away(copies=2)
    found.wait_until_ready()
    assert found.threads == 2 and len(found.turn(3)) == 6
    found.close()


def test_what_a_library_says_after_it_is_loaded_is_no_news(capfd: pytest.CaptureFixture[str]) -> None:
    found = away("chatter")
    found.wait_until_ready()
    found.turn(2)
    found.close()
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("does", "why"),
    [
        ("absent", "echo is not installed: get it"),
        ("stumble", "resnet18 int8 failed: KeyError: 'somewhere'"),
        ("crash", "resnet18 int8: its process was killed by SIGSEGV"),
        ("hang", "resnet18 int8 gave no answer within 1 s and was ended"),
    ],
)
def test_what_goes_wrong_in_its_process_is_told_in_a_line_and_costs_its_row(
    monkeypatch: pytest.MonkeyPatch, does: str, why: str
) -> None:
    if does == "hang":
        monkeypatch.setattr(players_module, "TURN_PATIENCE_S", 1.0)
    rows = [
        BenchmarkCase("resnet18", Precision.INT8, name, lambda what=what: LoadedWorker(away(what), ""), answers=None)  # type: ignore[misc]
        for name, what in (("good", ""), ("bad", does))
    ]
    good, bad = run_cases(rows, 2)
    assert good.problem is None and len(good.rounds) == 2
    assert bad.problem == why and bad.rounds == ()


def test_the_widest_instruction_of_the_processor_is_chosen() -> None:
    int8, fp32 = Precision.INT8, Precision.FP32

    def name(precision: Precision, *features: str) -> str | None:
        found = find_instruction(precision, features)
        return found.name if found else None

    assert name(int8, "AVX2", "AVX-512", "AVX-512 VNNI", "AVX-VNNI") == "vpdpbusd, 512 bits"
    assert name(int8, "AVX2", "AVX-VNNI") == "vpdpbusd, 256 bits"
    assert name(int8, "AVX2", "FMA") is None  # no such instruction
    assert name(int8, "AVX-512", "AVX-512 VNNI", "AMX int8") is None  # AMX is beyond
    assert name(fp32, "AVX2", "FMA") == "fma, 256 bits"
    assert name(fp32, "Arm SVE") is None


@pytest.mark.parametrize("precision", Precision)
def test_the_loop_keeps_its_sums_apart(precision: Precision) -> None:
    for instruction in INSTRUCTIONS[precision]:
        text = module_text(instruction)
        assert text.count(f"@{instruction.intrinsic}(") == SUMS + 1
        assert text.count(" phi ") == SUMS + 1


@pytest.mark.parametrize("precision", Precision)
def test_the_loop_runs_here_as_often_as_it_says(precision: Precision) -> None:
    features = this_machine().features
    instruction = find_instruction(precision, features)
    if instruction is None:
        with pytest.raises(FailureError, match="no instruction that the self-test"):
            PeakLoop(precision, features, 1)
        return
    loop = PeakLoop(precision, features, 2)
    assert loop.macs == instruction.macs * SUMS * ITERATIONS * 2
    assert loop.run(IMAGES).shape == (2, 1)
    # Sums of ones: each of the 16 or 8 numbers grows by 1 (or the 4 products of int8 that it adds) in each pass.
    one, passes = (1.0, 10) if precision is Precision.FP32 else (0x01010101, 10)
    kind = np.float32 if precision is Precision.FP32 else np.int32
    memory = np.zeros(64, kind)
    start = (-memory.ctypes.data % 64) // 4
    lanes = 64 // 4 if "512" in instruction.name else 32 // 4
    memory[start : start + lanes] = one
    loop.call(passes, memory.ctypes.data + 4 * start)
    grown = passes * (1 if precision is Precision.FP32 else 4)
    assert memory[start : start + lanes].tolist() == [grown] * lanes

"""The benchmark's arithmetic, order, checks and documents, on engines and a clock that are made up."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from mgq.bench import cases as contest_module
from mgq.bench import suite as engines_module
from mgq.bench.benchmark import list_notes
from mgq.bench.benchmark_report import Report, make_peaks, make_rows
from mgq.bench.cases import (
    MOST_RUNS,
    TURN_NS,
    WARM_UP_RUNS,
    Agreement,
    BenchmarkCase,
    CaseResult,
    LoadedWorker,
    measure_agreement,
    run_cases,
)
from mgq.bench.settings import EXAMPLE_NETWORKS, ROUNDS, Load, Precision, Settings, make_settings
from mgq.bench.statistics import interquartile_range, measure_speed, measure_speedup, median_time
from mgq.bench.suite import BenchmarkSuite, NetworkJob, cat_batch
from mgq.bench.tables import COLUMNS, cells, comparison_text, example_cells, find_group, format_three_digits, markdown
from mgq.bench.workers import InProcessWorker, SideBySide
from mgq.errors import FailureError, InputError
from mgq.events import Progress
from mgq.quantization.modes import Mode
from mgq.quantization.targets import MEGENGINE, ONNX
from mgq.runtime.registry import COMPARED, Backend
from mgq.system.environment import Machine, cpu_features, cpu_model, saturates, this_machine

MS = 1_000_000
IMAGES = np.zeros((2, 3, 32, 32), np.uint8)
FP32, INT8 = Precision.FP32, Precision.INT8


@dataclass
class World:
    """A clock that moves only while a runtime runs, and the order in which they ran."""

    now: int = 0
    ran: list[str] = field(default_factory=list)

    def clock(self) -> int:
        return self.now


@dataclass
class FakeRuntime:
    """Takes ``times[i]`` ns for its i-th run (the last one for all later ones), and answers ``logits``."""

    name: str
    world: World = field(default_factory=World)
    times: Sequence[int] = (MS,)
    logits: npt.NDArray[np.float32] = field(default_factory=lambda: np.eye(2, 5, dtype=np.float32))
    version: str = "1.2"
    threads: int = 1
    runs: int = 0
    macs: int | None = None
    on_run: Callable[[], None] = lambda: None

    def run(self, batch: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        self.world.now += self.times[min(self.runs, len(self.times) - 1)]
        self.world.ran.append(self.name)
        self.runs += 1
        self.on_run()
        return self.logits


def present(runtime: FakeRuntime) -> InProcessWorker:
    return InProcessWorker(runtime, IMAGES, runtime.world.clock)


def case(
    runtime: FakeRuntime, engine: str, precision: Precision = FP32, network: str = "resnet18", **more: Any
) -> BenchmarkCase:
    weights = "random weights (speed only)"
    return BenchmarkCase(network, precision, engine, lambda: LoadedWorker(present(runtime), weights, 1_500_000), **more)


def times_of(runtimes: Sequence[FakeRuntime], rounds: int, seed: int = 0) -> list[tuple[tuple[int, ...], ...]]:
    """The times of a contest of ``runtimes``, whose answers nobody compares."""
    players = [case(runtime, runtime.name, answers=None) for runtime in runtimes]
    return [entry.rounds for entry in run_cases(players, rounds, seed)]


def small_turns(monkeypatch: pytest.MonkeyPatch, runs: int) -> None:
    """A turn lasts ``runs`` runs of a millisecond."""
    monkeypatch.setattr(contest_module, "TURN_NS", runs * MS)


# ---- statistics ----


def test_speed_is_the_median_round_and_quantiles_of_all_runs() -> None:
    # Rounds of 100, 50 and 25 pictures a second; 1 to 4 would be wrong if rounds were not weighed by time.
    rounds = [[10 * MS, 30 * MS], [40 * MS, 40 * MS], [60 * MS, 100 * MS]]
    speed = measure_speed(rounds, batch=2)
    assert speed.fps == pytest.approx(50)
    assert speed.fps_iqr == pytest.approx(75 - 37.5)
    # Sorted: 10 30 40 40 60 100; the quantile q lies at place 5q.
    assert speed.p50_ms == pytest.approx(40)
    assert speed.p90_ms == pytest.approx(80)
    assert speed.p99_ms == pytest.approx(60 + 0.95 * 40)
    assert speed.runs == 6


def test_rounds_of_different_length_count_alike() -> None:
    assert measure_speed([[10 * MS] * 9, [20 * MS]], batch=1).fps == pytest.approx(75)


@pytest.mark.parametrize(("values", "expected"), [([7.0], 0.0), ([1.0, 2.0], 0.5), ([1.0, 2.0, 3.0, 4.0, 100.0], 2.0)])
def test_interquartile_range(values: list[float], expected: float) -> None:
    assert interquartile_range(np.array(values)) == pytest.approx(expected)


def test_a_slow_run_counts_in_its_round() -> None:
    assert measure_speed([[10 * MS, 10 * MS, 80 * MS]], batch=1).fps == pytest.approx(30)


def test_speedup_is_the_median_of_the_ratios_not_the_ratio_of_the_medians() -> None:
    int8 = [[1 * MS], [10 * MS], [4 * MS]]
    fp32 = [[2 * MS], [40 * MS], [4 * MS]]
    # Ratios 2, 4 and 1. The medians' ratio would be 4 / 4 = 1.
    speedup = measure_speedup(int8, fp32)
    assert speedup.median == pytest.approx(2)


def test_speedup_uses_throughput_where_turns_have_different_numbers_of_runs() -> None:
    assert measure_speedup([[1 * MS] * 8], [[4 * MS] * 2]).median == pytest.approx(4)


def test_speedup_of_unequal_numbers_of_rounds_is_refused() -> None:
    with pytest.raises(ValueError, match="2 rounds cannot be compared with 1"):
        measure_speedup([[1], [1]], [[1]])


def test_the_interval_of_a_ratio_holds_what_resampled_rounds_would_show() -> None:
    rng = np.random.default_rng(1)
    ratios = rng.normal(2.0, 0.1, 40)
    found = median_time(ratios)
    assert found.low is not None and found.high is not None
    assert found.low < found.median < found.high
    # The standard error of a normal sample's median is 1.2533 of the mean's.
    assert found.high - found.low == pytest.approx(2 * 1.96 * 1.2533 * 0.1 / 40**0.5, rel=0.5)
    assert median_time(np.full(5, 3.0)).low == median_time(np.full(5, 3.0)).high == 3.0


def test_one_round_has_no_interval() -> None:
    assert (median_time(np.array([2.0])).low, median_time(np.array([2.0])).high) == (None, None)


# ---- the contest ----


def test_every_round_runs_every_runtime_once_in_a_new_order(monkeypatch: pytest.MonkeyPatch) -> None:
    small_turns(monkeypatch, 2)
    world = World()
    names = "abcde"
    times = times_of([FakeRuntime(name, world) for name in names], 6)
    before = 5 + 5 * (1 + WARM_UP_RUNS)  # one run each for the answers
    measured = world.ran[before:-5]
    assert len(measured) == 6 * 5 * 3
    orders = [measured[start : start + 15 : 3] for start in range(0, len(measured), 15)]
    assert all(sorted(order) == list(names) for order in orders)
    assert len({tuple(order) for order in orders}) > 1
    assert all(len(set(measured[start : start + 3])) == 1 for start in range(0, len(measured), 3))
    assert times == [((MS, MS),) * 6] * 5


def test_the_order_is_that_of_the_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    small_turns(monkeypatch, 1)

    def order(seed: int) -> list[str]:
        world = World()
        times_of([FakeRuntime(name, world) for name in "abcdef"], 3, seed)
        return world.ran

    assert order(1) == order(1) != order(2)


def test_warm_up_and_first_run_of_a_turn_are_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    small_turns(monkeypatch, 2)
    world = World()
    slow_first = [800 * MS] + [900 * MS] + [MS] * WARM_UP_RUNS + [700 * MS, MS, 2 * MS] + [700 * MS, 3 * MS, 4 * MS]
    (times,) = times_of([FakeRuntime("a", world, slow_first)], 2)
    assert times == ((MS, 2 * MS), (3 * MS, 4 * MS))


@pytest.mark.parametrize(
    ("run_ns", "runs"), [(TURN_NS // 4, 4), (TURN_NS * 3, 1), (TURN_NS // 1000, MOST_RUNS), (0, MOST_RUNS)]
)
def test_a_turn_has_as_many_runs_as_fill_it_within_bounds(run_ns: int, runs: int) -> None:
    (times,) = times_of([FakeRuntime("a", World(), [run_ns])], 2)
    assert [len(turn) for turn in times] == [runs, runs]


def test_no_garbage_is_collected_while_an_engine_is_timed() -> None:
    states: list[bool] = []
    runtime = FakeRuntime("a", on_run=lambda: states.append(gc.isenabled()))
    assert gc.isenabled()
    present(runtime).turn(2)
    assert len(states) == 3 and not any(states)
    assert gc.isenabled()


def test_garbage_collection_returns_after_a_failure() -> None:
    def fail() -> None:
        raise FailureError("the engine broke")

    with pytest.raises(FailureError):
        present(FakeRuntime("a", on_run=fail)).turn(1)
    assert gc.isenabled()


def test_copies_side_by_side_count_all_their_runs() -> None:
    copies = [FakeRuntime("a") for _ in range(3)]
    worker = SideBySide(copies, IMAGES)
    assert worker.threads == 3
    assert len(worker.turn(4)) == 12
    assert [copy.runs for copy in copies] == [5, 5, 5]
    worker.close()


def test_throughput_counts_the_images_of_all_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    (entry,) = entries_of(monkeypatch, case(FakeRuntime("a", times=[4 * MS]), "eager"))
    entry.case = replace(entry.case, threads=2)
    for load, fps in ((Load.LATENCY, 500), (Load.THROUGHPUT, 1000)):
        (row,) = make_rows([entry], Settings(batch=2, load=load))
        assert row.speed is not None and row.speed.fps == pytest.approx(fps)


def test_one_that_dies_before_it_tells_its_memory_costs_only_its_row(monkeypatch: pytest.MonkeyPatch) -> None:
    class Dying(InProcessWorker):
        def peak_memory(self) -> int | None:
            raise FailureError("the process was killed by SIGKILL")

    dead, well = FakeRuntime("a"), FakeRuntime("b")
    worker = Dying(dead, IMAGES, dead.world.clock)
    first = BenchmarkCase(
        "resnet18", FP32, "eager", lambda: LoadedWorker(worker, "random weights (speed only)", 1_500_000)
    )
    found = entries_of(monkeypatch, first, case(well, "ORT"))
    assert "SIGKILL" in str(found[0].problem) and found[1].problem is None and found[1].rounds


def test_one_that_breaks_on_the_way_costs_only_its_row(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = FakeRuntime("b")

    def fail() -> None:
        if broken.runs > WARM_UP_RUNS + 4:
            raise FailureError("the process was killed by SIGSEGV")

    broken.on_run = fail
    first, second = entries_of(monkeypatch, case(FakeRuntime("a"), "eager"), case(broken, "Lite"))
    assert first.problem is None and len(first.rounds) == 2
    assert second.problem == "the process was killed by SIGSEGV" and second.rounds == ()


def test_progress_ends_at_its_total(monkeypatch: pytest.MonkeyPatch) -> None:
    small_turns(monkeypatch, 1)
    seen: list[Progress] = []
    world = World()
    entries = [case(FakeRuntime(name, world), name) for name in "ab"]
    run_cases(entries, 3, on_progress=seen.append)
    for what, total in (("prepare", 2), ("measure", 6)):
        assert [event.done for event in seen if event.what == what] == list(range(total + 1))
        assert {event.total for event in seen if event.what == what} == {total}


# ---- the same work ----


def entries_of(monkeypatch: pytest.MonkeyPatch, *cases: BenchmarkCase) -> list[CaseResult]:
    small_turns(monkeypatch, 1)
    return run_cases(cases, 2)


def test_equal_answers_agree_and_small_differences_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    near = np.eye(2, 5, dtype=np.float32)
    near[1, 1] -= 0.25
    first, second = entries_of(
        monkeypatch, case(FakeRuntime("a"), "eager"), case(FakeRuntime("b", logits=near), "Lite")
    )
    assert first.agreement == Agreement("eager", 2, 2, 0.0)
    assert second.agreement == Agreement("eager", 2, 2, 0.25)
    assert second.agreement.holds


def test_where_int8_rounds_otherwise_likeness_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    near = np.eye(2, 5, dtype=np.float32)
    flipped, other = near.copy(), np.roll(near, 1, axis=1)
    flipped[1, 2] = 1.01
    near[1, 2] = 1 - 1e-3
    engines = {"near": near, "flipped": flipped, "other": other}
    cases = [case(FakeRuntime(name, logits=logits), name) for name, logits in engines.items()]
    strict = entries_of(monkeypatch, *cases)
    lenient = entries_of(monkeypatch, *(replace(one, rounds_otherwise=True) for one in cases))
    for entries, expected in ((strict, [True, False, False]), (lenient, [True, True, False])):
        assert [entry.agreement is not None and entry.agreement.holds for entry in entries] == expected


def test_another_answer_marks_the_row_and_keeps_it_from_being_the_best(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wrong = np.roll(np.eye(2, 5, dtype=np.float32), 1, axis=1)
    wrong[0] = [1, 0, 0, 0, 0]
    report = report_of(
        entries_of(
            monkeypatch,
            case(FakeRuntime("a", times=[2 * MS]), "eager"),
            case(FakeRuntime("b", logits=wrong), "Lite"),
        )
    )
    eager, lite = report.rows
    assert eager.sound and not lite.sound
    assert lite.remark == "another answer than eager on 1 of 2 pictures (logits differ by up to 1)"
    assert cells(lite)[0] == "Lite !" and cells(eager)[0] == "eager"
    assert report.best("resnet18", FP32) is eager
    assert f"resnet18 fp32 Lite, 1 thread: {lite.remark}" in report.remarks()


def test_an_engine_that_goes_wrong_during_the_contest_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    drifting = FakeRuntime("b")

    def drift() -> None:
        if drifting.runs == WARM_UP_RUNS + 3:
            drifting.logits = np.roll(drifting.logits, 1, axis=1)

    drifting.on_run = drift
    _, entry = entries_of(monkeypatch, case(FakeRuntime("a"), "eager"), case(drifting, "Lite"))
    assert entry.agreement is not None and entry.agreement.same == 0
    assert entry.rounds


def test_an_engine_that_recovers_after_a_wrong_start_stays_marked(monkeypatch: pytest.MonkeyPatch) -> None:
    late = FakeRuntime("b", logits=np.zeros((2, 5), np.float32))

    def recover() -> None:
        if late.runs == 2:
            late.logits = np.eye(2, 5, dtype=np.float32)

    late.on_run = recover
    _, entry = entries_of(monkeypatch, case(FakeRuntime("a"), "eager"), case(late, "Lite"))
    assert entry.agreement == Agreement("eager", 2, 1, 1.0)


def test_reused_output_memory_does_not_hide_a_change(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = FakeRuntime("a")

    def change() -> None:
        if runtime.runs == WARM_UP_RUNS + 3:
            runtime.logits[...] = np.roll(runtime.logits, 1, axis=1)

    runtime.on_run = change
    (entry,) = entries_of(monkeypatch, case(runtime, "eager"))
    assert entry.agreement is not None and not entry.agreement.holds


def test_not_a_number_is_no_answer() -> None:
    logits = np.eye(2, 5, dtype=np.float32)
    broken = logits.copy()
    broken[0, 0] = np.nan
    agreement = measure_agreement(broken, logits, "eager")
    assert agreement.same == 1 and not agreement.holds
    # Two engines that give the same nonsense do not confirm each other.
    assert measure_agreement(broken, broken, "eager").same == 1


@pytest.mark.parametrize(
    ("logits", "why"),
    [
        (np.zeros((2, 4), np.float32), "Lite gave 4 logits a picture where eager gives 5"),
        (np.zeros((1, 5), np.float32), "b gave no logits but an array of shape (1, 5) for 2 pictures"),
        (np.zeros((2, 5, 1), np.float32), "b gave no logits but an array of shape (2, 5, 1) for 2 pictures"),
    ],
)
def test_an_engine_without_the_right_logits_is_not_timed(
    monkeypatch: pytest.MonkeyPatch, logits: npt.NDArray[np.float32], why: str
) -> None:
    wrong = FakeRuntime("b", logits=logits)
    entries = entries_of(monkeypatch, case(FakeRuntime("a"), "eager"), case(wrong, "Lite"))
    (row,) = make_rows(entries, Settings(batch=2))[1:]
    assert row.problem == why and row.speed is None and row.rounds_ns == ()
    assert wrong.runs == 1


def test_precisions_and_networks_are_not_compared_with_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    other = np.roll(np.eye(2, 5, dtype=np.float32), 2, axis=1)
    entries = entries_of(
        monkeypatch,
        case(FakeRuntime("a"), "eager"),
        case(FakeRuntime("b", logits=other), "eager", INT8),
        case(FakeRuntime("c", logits=other), "eager", FP32, "mobilenet_v2"),
    )
    assert all(entry.agreement is not None and entry.agreement.holds for entry in entries)


def test_a_missing_engine_costs_only_its_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent() -> LoadedWorker:
        raise InputError("OpenVINO is not installed: pip install 'mgq[openvino]'")

    missing = BenchmarkCase("resnet18", FP32, "OpenVINO", absent)
    report = report_of(entries_of(monkeypatch, missing, case(FakeRuntime("a"), "eager")))
    row, eager = report.rows
    assert report.remarks()[0] == f"OpenVINO: {row.remark}"
    assert row.remark == "not measured: OpenVINO is not installed: pip install 'mgq[openvino]'"
    assert cells(row) == ("OpenVINO", *["-"] * 9)
    assert eager.sound and eager.agreement is not None and eager.agreement.reference == "eager"


def test_an_engine_that_is_missing_everywhere_is_told_of_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent() -> LoadedWorker:
        raise InputError("get it")

    missing = [BenchmarkCase("resnet18", precision, "OpenVINO", absent) for precision in Precision]
    assert report_of(entries_of(monkeypatch, *missing)).remarks() == ["OpenVINO: not measured: get it"]
    partly = entries_of(monkeypatch, missing[0], case(FakeRuntime("a"), "OpenVINO", INT8))
    assert report_of(partly).remarks() == ["resnet18 fp32 OpenVINO, 1 thread: not measured: get it"]


def test_one_round_has_no_spread(monkeypatch: pytest.MonkeyPatch) -> None:
    small_turns(monkeypatch, 1)
    (row,) = make_rows(run_cases([case(FakeRuntime("a"), "eager")], 1), Settings(batch=2))
    assert cells(row)[2] == "-"


def test_a_fault_of_the_program_is_not_taken_for_a_missing_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> LoadedWorker:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        entries_of(monkeypatch, BenchmarkCase("resnet18", FP32, "eager", broken))


# ---- the engines' networks ----


def field_of(monkeypatch: pytest.MonkeyPatch, settings: Settings, *names: str) -> tuple[BenchmarkSuite, list[str]]:
    """What takes part in the contest of ResNet18, engines made up, and the networks built so far."""
    built: list[str] = []

    def fake(network: str, precision: Precision, target: object, save: Path) -> Any:
        built.append(f"{network} {precision.value} {'onnx' if target is ONNX else 'megengine'}")
        return FakeClassifier(built[-1])

    def start(backend: Backend, job: NetworkJob, threads: int) -> LoadedWorker:
        return LoadedWorker(present(FakeRuntime("a", threads=threads)), job.classifier.origin)

    monkeypatch.setattr(engines_module, "open_for_benchmark", fake)
    monkeypatch.setattr(BenchmarkSuite, "macs", 10**9)
    backends = [backend for backend in COMPARED if backend.name in names]
    machine = replace(MACHINE, features=("AVX2", "FMA"))
    return BenchmarkSuite("resnet18", settings, machine, Path("folder"), backends, start), built


@dataclass(frozen=True)
class FakeClassifier:
    origin: str
    image_size: int = 224


def test_every_precision_meets_every_engine_and_networks_are_built_once(monkeypatch: pytest.MonkeyPatch) -> None:
    taking_part, built = field_of(
        monkeypatch, Settings(threads=(1, 2)), "MegEngine eager", "MegEngine Lite", "OpenVINO"
    )
    found = [one for one in taking_part.cases() if not one.is_peak]
    assert built == []
    origins = [one.load().weights for one in found]
    eager, lite, vino = "MegEngine eager", "MegEngine Lite", "OpenVINO"
    assert [(one.threads, one.precision, one.engine) for one in found] == [
        *((1, precision, name) for precision in Precision for name in (eager, lite, vino)),
        *((2, precision, name) for precision in Precision for name in (lite, vino)),
    ]
    assert len(built) == len(set(built)) == 3
    assert set(origins) == {"resnet18 fp32 megengine", "resnet18 int8 megengine", "resnet18 int8 onnx"}
    assert {one.answers for one in found} == set(origins)


def test_with_int8_alone_one_engine_runs_float_as_the_yardstick(monkeypatch: pytest.MonkeyPatch) -> None:
    taking_part, _ = field_of(
        monkeypatch, make_settings(precisions=[INT8], threads=["1"]), "MegEngine eager", "OpenVINO"
    )
    float_rows = [one.engine for one in taking_part.cases() if one.precision is FP32 and not one.is_peak]
    assert float_rows == ["OpenVINO"]


def test_an_engine_that_computes_in_int8_alone_has_no_row_in_float(monkeypatch: pytest.MonkeyPatch) -> None:
    taking_part, _ = field_of(monkeypatch, Settings(threads=(1,)), "OpenVINO", "native")
    for settings in (Settings(threads=(1,)), make_settings(precisions=[INT8], threads=["1"])):
        found = replace(taking_part, settings=settings).cases()
        rows = [(one.precision, one.engine) for one in found if not one.is_peak]
        assert rows == [(FP32, "OpenVINO"), (INT8, "OpenVINO"), (INT8, "native")]


def test_self_tests_take_part_where_the_processor_has_an_instruction(monkeypatch: pytest.MonkeyPatch) -> None:
    taking_part, _ = field_of(monkeypatch, Settings(threads=(1, 2)), "MegEngine eager")
    peaks = [(one.precision, one.threads) for one in taking_part.cases() if one.is_peak]
    assert peaks == [(FP32, 1), (FP32, 2)]  # AVX2 has no int8 instruction that the self-test knows


def test_an_engine_with_another_number_of_threads_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    (entry,) = entries_of(monkeypatch, case(FakeRuntime("a", threads=1), "eager", threads=2))
    assert entry.problem == "a runs on 1 thread where 2 were asked for"


def test_random_weights_are_used_and_named_where_there_are_none(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(engines_module, "is_cached", lambda *_: False)
    classifier = engines_module.open_for_benchmark("shufflenet_v1_x0_5_g3", FP32, MEGENGINE)
    assert classifier.origin == "random weights (speed only)"
    assert classifier.mode is Mode.NORMAL


def test_weights_that_cannot_be_used_are_told_of(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "runs" / "shufflenet_v1_x0_5_g3.normal" / "checkpoint.safetensors"
    run.parent.mkdir(parents=True)
    run.write_bytes(b"no checkpoint")
    origin = engines_module.open_for_benchmark("shufflenet_v1_x0_5_g3", FP32, MEGENGINE).origin
    assert origin.startswith("random weights (speed only); not used: ")
    assert str(run.relative_to(tmp_path)) in origin


def test_packaged_weights_are_preferred_to_random_ones(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert engines_module.open_for_benchmark("efficientnet_lite0", FP32, MEGENGINE).origin.startswith(
        "ImageNet weights"
    )


def test_images_of_a_batch_differ() -> None:
    batch = cat_batch(3, 64)
    assert batch.shape == (3, 3, 64, 64) and batch.dtype == np.uint8
    assert not any(np.array_equal(batch[i], batch[j]) for i, j in ((0, 1), (1, 2), (0, 2)))
    assert np.array_equal(cat_batch(1, 64)[0], batch[0])


# ---- conditions and settings ----

CPUINFO = """processor\t: 0
vendor_id\t: GenuineIntel
model name\t: Intel(R) Xeon(R) Gold  6130 CPU @ 2.10GHz
flags\t\t: fpu avx avx2 fma avx512f avx512_vnni avx2x
bogomips\t: 1

processor\t: 1
model name\t: another
flags\t\t: amx_int8
"""


def test_cpu_name_and_instructions_come_from_cpuinfo() -> None:
    assert cpu_model(CPUINFO) == "Intel(R) Xeon(R) Gold 6130 CPU @ 2.10GHz"
    assert cpu_features(CPUINFO) == ("AVX", "AVX2", "FMA", "AVX-512", "AVX-512 VNNI")
    assert cpu_features("Features\t: fp asimd asimddp\n") == ("Arm dot product",)
    assert cpu_model("") == "" and cpu_features("") == ()


def test_this_machine_is_described() -> None:
    machine = this_machine()
    assert machine.cpu and machine.system
    assert 1 <= machine.usable_cores <= machine.logical_cores


def test_variables_that_engines_heed_are_conditions(monkeypatch: pytest.MonkeyPatch, report: Report) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.setenv("SOME_SECRET_MKL_", "no")
    machine = this_machine()
    assert "OMP_NUM_THREADS=7" in machine.variables
    assert not any("SECRET" in variable for variable in machine.variables)
    conditions = dict(replace(report, machine=machine).conditions())
    assert "OMP_NUM_THREADS=7" in conditions["environment"]
    assert "environment" not in dict(report.conditions())


@pytest.mark.parametrize(("load", "busy"), [((0.5, 9.0, 9.0), False), ((0.6, 0.0, 0.0), True), ((), False)])
def test_a_busy_machine_is_told_by_the_last_minute(load: tuple[float, ...], busy: bool) -> None:
    assert replace(MACHINE, load=load).busy is busy


def test_default_settings_are_the_public_example() -> None:
    settings = make_settings()
    assert settings.networks == EXAMPLE_NETWORKS == ("resnet18", "shufflenet_v1_x1_5_g3", "mobilenet_v2")
    assert settings.precisions == (FP32, INT8)
    assert settings.threads == tuple(sorted({1, this_machine().usable_cores}))
    assert (settings.rounds, settings.batch, settings.image_size) == (ROUNDS, 1, 224)
    assert settings.load is Load.LATENCY and not settings.yardstick


def test_threads_are_numbers_or_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mgq.bench.settings.usable_cores", lambda: 4)
    assert make_settings(threads=["all", "2", "2"]).threads == (2, 4)


def test_a_network_named_twice_is_measured_once() -> None:
    assert make_settings(["resnet50", "resnet18", "resnet50"]).networks == ("resnet50", "resnet18")


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"networks": ["resnet81"]}, "there is no architecture 'resnet81'; did you mean resnet18"),
        ({"threads": ["0"]}, "--threads 0 is too few"),
        ({"threads": ["many"]}, "--threads many is no number: give 1 to 4, or all"),
        ({"load": "fast"}, "there is no --mode 'fast'; choose latency or throughput"),
        ({"against": [Path("none.onnx")]}, "cannot read none.onnx: there is no such file; check the path"),
        ({"threads": ["5"]}, "--threads 5 is more than this machine's 4 cores: give 4 or fewer"),
        ({"rounds": 0}, "--rounds 0 is too few"),
        ({"batch": -1}, "--batch -1 is too few"),
        ({"image_size": 0}, "--image-size 0 is too small: 32 would do"),
        ({"image_size": -32}, "--image-size -32 is too small: 32 would do"),
        ({"image_size": 100}, "--image-size 100 is not a multiple of 32"),
        ({"batch": 10**6}, "needs about 51380.2 GB"),
        ({"image_size": 32 * 10**5}, "--image-size 3200000 is too large: 4096 would do"),
    ],
)
def test_impossible_settings_are_refused_in_one_line(
    monkeypatch: pytest.MonkeyPatch, asked: dict[str, object], message: str
) -> None:
    monkeypatch.setattr("mgq.bench.settings.usable_cores", lambda: 4)
    with pytest.raises(InputError) as caught:
        make_settings(**asked)  # type: ignore[arg-type]
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


# ---- report ----

MACHINE = Machine("A CPU", ("AVX2", "AVX-512 VNNI"), None, 4, 2, "An OS", (0.05, 0.5, 0.75))


def report_of(entries: Sequence[CaseResult], **changes: object) -> Report:
    networks = tuple(dict.fromkeys(entry.case.network for entry in entries))
    settings = Settings(networks=networks, batch=2, image_size=32, rounds=2)
    rows = make_rows(entries, settings)
    report = Report(settings, MACHINE, {"mgq": "0.1.0"}, "two pictures", rows, (), make_peaks(entries))
    return replace(report, **changes)  # type: ignore[arg-type]


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch) -> Report:
    """int8 is twice as fast in one engine, and missing in the other."""
    small_turns(monkeypatch, 1)
    world = World()

    def absent() -> LoadedWorker:
        raise InputError("no int8 here: get some")

    entries = run_cases(
        [
            case(FakeRuntime("a", world, [4 * MS]), "eager"),
            case(FakeRuntime("b", world, [2 * MS]), "eager", INT8),
            case(FakeRuntime("c", world, [1 * MS]), "Lite"),
            BenchmarkCase("resnet18", INT8, "Lite", absent),
        ],
        2,
    )
    return report_of(entries)


def test_rows_hold_speed_and_speedup_in_the_same_engine(report: Report) -> None:
    fp32, int8, lite, missing = report.rows
    assert fp32.speed is not None and fp32.speed.fps == pytest.approx(500)
    assert int8.speed is not None and int8.speed.fps == pytest.approx(1000)
    assert int8.speedup is not None and int8.speedup.median == pytest.approx(2)
    assert fp32.speedup is lite.speedup is missing.speedup is None
    ratio = "2.00 2.00-2.00"
    assert cells(int8) == ("eager", "1000", "0.000", "2.00", "2.00", "2.00", ratio, "-", "1.5", "-")
    assert find_group(int8) == "int8, 1 thread"


def test_int8_is_measured_by_the_fastest_float_where_its_engine_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    entries = entries_of(
        monkeypatch,
        case(FakeRuntime("a", times=[4 * MS]), "Lite"),
        case(FakeRuntime("b", times=[3 * MS]), "OpenVINO"),
        case(FakeRuntime("c", times=[1 * MS]), "eager", INT8),
        case(FakeRuntime("d", times=[1 * MS]), "Lite", INT8),
    )
    eager, lite = make_rows(entries, Settings(batch=2))[2:]
    assert eager.speedup is not None and eager.speedup.median == pytest.approx(3)
    assert lite.speedup is not None and lite.speedup.median == pytest.approx(4)


def test_the_share_of_the_peak_is_that_of_the_same_precision_and_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    def peak(precision: Precision, macs: int, threads: int = 1) -> BenchmarkCase:
        runtime = FakeRuntime("vpdpbusd", times=[MS], threads=threads, macs=macs)
        return case(runtime, "self-test", precision, answers=None, is_peak=True, threads=threads)

    entries = entries_of(
        monkeypatch,
        case(FakeRuntime("a", times=[2 * MS]), "eager", INT8, macs=10_000),
        peak(FP32, 15_000),
        peak(INT8, 40_000),
        peak(INT8, 90_000, threads=2),
    )
    report = report_of(entries)
    (row,) = report.rows
    # Two pictures of 10,000 in 2 ms, where the peak is 40,000 a ms.
    assert row.share == pytest.approx(0.25)
    assert cells(row)[7] == "25%"
    assert [(peak.precision, peak.threads) for peak in report.peaks] == [(FP32, 1), (INT8, 1), (INT8, 2)]
    assert [peak.macs for peak in report.peaks] == pytest.approx([15e6, 40e6, 90e6])
    assert "int8 0 GMAC/s on 2 threads (vpdpbusd)" in dict(report.conditions())["peak"]


def test_another_file_is_a_row_of_its_own_and_compared_by_speed_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    other = np.zeros((2, 3), np.float32)
    entries = entries_of(
        monkeypatch,
        case(FakeRuntime("a", times=[2 * MS]), "Lite", INT8),
        case(FakeRuntime("b", times=[3 * MS], logits=other), "OpenVINO", INT8, answers=None, file="rival.onnx"),
    )
    report = report_of(entries)
    report = replace(report, settings=replace(report.settings, against=(Path("a/rival.onnx"),)))
    own, rival = report.rows
    assert rival.sound and find_group(rival) == "rival.onnx, int8, 1 thread"
    assert report.best("resnet18", INT8) is own
    (found,) = report.comparisons("resnet18")
    assert comparison_text(found) == (
        "int8 in Lite is 1.500 (95 %: 1.500-1.500) times as fast as rival.onnx in OpenVINO, 1 thread"
    )
    (compared,) = json.loads(report.to_json())["comparisons"]
    assert compared["median"] == pytest.approx(1.5) and "rival.onnx" in compared["other"]


def test_processors_that_saturate_are_told_of() -> None:
    assert saturates(("AVX2",)) and saturates(("AVX2", "AVX-512"))
    assert not saturates(("AVX2", "AVX-512", "AVX-512 VNNI")) and not saturates(("Arm dot product",))
    assert any("can saturate" in note for note in list_notes(replace(MACHINE, features=("AVX2", "FMA")), Settings()))
    assert list_notes(replace(MACHINE, features=("AVX2", "FMA", "AVX-VNNI")), Settings()) == ()


def test_an_engine_without_fp32_has_no_speedup(monkeypatch: pytest.MonkeyPatch) -> None:
    entries = entries_of(monkeypatch, case(FakeRuntime("a"), "eager", INT8))
    (row,) = make_rows(entries, Settings(batch=2))
    assert row.speedup is None and row.speed is not None


def test_json_holds_all_samples_and_conditions(report: Report) -> None:
    body = json.loads(report.to_json())
    assert body["format"] == "mgq bench 2"
    assert body["settings"]["precisions"] == ["fp32", "int8"]
    assert body["settings"]["batch"] == 2
    assert body["machine"]["cpu"] == "A CPU" and body["machine"]["load"] == [0.05, 0.5, 0.75]
    assert body["versions"] == {"mgq": "0.1.0"}
    fp32, int8, _, missing = body["rows"]
    assert fp32["rounds_ns"] == [[4 * MS], [4 * MS]]
    assert fp32["weights"] == "random weights (speed only)" and fp32["engine_version"] == "1.2"
    assert fp32["sound"] is True and fp32["file_bytes"] == 1_500_000
    assert int8["agreement"].pop("likeness") == pytest.approx(1)
    expected = {"reference": "eager", "pictures": 2, "same": 2, "largest_difference": 0.0, "rounds_otherwise": False}
    assert int8["agreement"] == expected
    assert int8["speedup"]["median"] == pytest.approx(2)
    assert missing["problem"] == "no int8 here: get some" and missing["rounds_ns"] == []


def test_json_has_null_for_numbers_that_are_not_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    nothing = np.full((2, 5), np.nan, np.float32)
    entries = entries_of(monkeypatch, case(FakeRuntime("a", logits=nothing), "eager"))
    (row,) = json.loads(report_of(entries).to_json(), parse_constant=pytest.fail)["rows"]
    assert row["agreement"]["largest_difference"] is None and row["sound"] is False


def test_conditions_name_what_speed_depends_on(report: Report) -> None:
    text = "\n".join(f"{name}: {value}" for name, value in report.conditions())
    for part in (
        "A CPU; cores: unknown physical, 4 logical, 2 usable",
        "AVX2, AVX-512 VNNI",
        "An OS",
        "mgq 0.1.0",
        "32x32 pixels, batch 2",
        "latency, 2 rounds in shuffled turns",
        "0.05, 0.50, 0.75",
    ):
        assert part in text


def test_weights_are_named_once_or_by_precision(report: Report) -> None:
    assert report.weights_of("resnet18") == "random weights (speed only)"
    first, *others = report.rows
    mixed = replace(report, rows=(replace(first, weights="a run"), *others))
    assert mixed.weights_of("resnet18") == "fp32: a run; int8: random weights (speed only)"


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0123, "0.012"), (1.234, "1.23"), (12.34, "12.3"), (99.96, "100.0"), (123.4, "123"), (1234.5, "1234")],
)
def test_figures_have_about_three_digits(value: float, text: str) -> None:
    assert format_three_digits(value) == text


UNPUBLISHED = "shufflenet_v1_x1_0_g3"


def test_example_table_pairs_published_accuracy_with_the_best_engine(report: Report) -> None:
    assert example_cells(report, "resnet18") == (
        "resnet18",
        "69.796",
        "2000 (Lite)",
        "69.814",
        "1000 (eager)",
    )
    assert example_cells(report, "resnet50") == ("resnet50", "80.858", "-", "-", "-")
    assert example_cells(report, UNPUBLISHED) == (UNPUBLISHED, "-", "-", "-", "-")


def markdown_tables(text: str) -> list[list[list[str]]]:
    """The cells of every table: rows of consecutive lines that begin with a bar."""
    tables: list[list[list[str]]] = []
    inside = False
    for line in text.splitlines():
        if line.startswith("|"):
            if not inside:
                tables.append([])
            tables[-1].append([cell.strip() for cell in line.strip("|").split(" | ")])
        inside = line.startswith("|")
    return tables


def test_markdown_has_conditions_all_rows_and_the_example_table(report: Report) -> None:
    text = markdown(report)
    assert "- CPU: A CPU; cores" in text
    assert "- weights of resnet18: random weights (speed only)" in text
    assert "- resnet18 int8 Lite, 1 thread: not measured: no int8 here: get some" in text
    assert "published figures of resnet18: MegEngine/Models, official/quantization" in text
    full, example = markdown_tables(text)
    assert full[0] == ["network", "what", *COLUMNS]
    assert len(full) == 2 + 4
    assert full[3][:4] == ["resnet18", "int8, 1 thread", "eager", "1000"]
    assert example[0] == ["model", "top-1 fp32", "FPS fp32", "top-1 int8", "FPS int8"]
    assert example[2] == ["resnet18", "69.796", "2000 (Lite)", "69.814", "1000 (eager)"]
    for table in (full, example):
        assert {len(row) for row in table} == {len(table[0])}


def test_markdown_escapes_what_would_break_a_table_or_a_list(report: Report) -> None:
    first, *others = report.rows
    text = markdown(replace(report, rows=(replace(first, engine="a|b", weights="runs/*x*\nnext"), *others)))
    assert "a\\|b" in text
    assert "runs/\\*x\\* next" in text


def test_a_report_without_published_figures_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    entries = entries_of(monkeypatch, case(FakeRuntime("a"), "eager", network=UNPUBLISHED))
    assert "- none published" in markdown(report_of(entries))

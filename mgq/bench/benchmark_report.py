"""The result of a benchmark: conditions and rows, and all of it as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from mgq.bench.cases import Agreement, BenchmarkCase, CaseResult
from mgq.bench.settings import FILES, Load, Precision, Settings, pluralize
from mgq.bench.statistics import Floats, Rounds, Speed, Speedup, images_per_second, measure_speed, measure_speedup
from mgq.system.environment import Machine

FORMAT = "mgq bench 2"


@dataclass(frozen=True)
class Row:
    """One network in one precision in one engine on ``threads`` threads.

    A row without a ``speed`` has a ``problem`` that says why. ``speedup`` is int8 over fp32 in the same engine on as
    many threads, or where that was not measured over the fastest fp32; on int8 rows where both ran. ``share`` is that
    of the processor's peak in the same precision on as many threads. ``peak_memory``: bytes of the whole process.
    ``rounds_ns`` are the single runs in nanoseconds, by round. ``file`` names a file that is not mgq's, ``target`` is
    what an int8 network was quantized for.
    """

    network: str
    precision: Precision
    engine: str
    engine_version: str
    weights: str
    file_bytes: int | None
    problem: str | None
    agreement: Agreement | None
    speed: Speed | None
    speedup: Speedup | None
    rounds_ns: Rounds
    threads: int = 1
    target: str = ""
    file: str = ""
    share: float | None = None
    peak_memory: int | None = None

    @property
    def name(self) -> str:
        what = self.file or f"{self.network} {self.precision.value}"
        return f"{what} {self.engine}, {pluralize(self.threads, 'thread')}"

    @property
    def sound(self) -> bool:
        """Whether it was timed, and on the right work, as far as that is known."""
        return self.speed is not None and (bool(self.file) or (self.agreement is not None and self.agreement.holds))

    def to_json(self) -> dict[str, Any]:
        agreement = self.agreement.to_json() if self.agreement else None
        return asdict(self) | {"agreement": agreement, "sound": self.sound, "remark": self.remark}

    @property
    def remark(self) -> str | None:
        """Why the row has no times, or why they should not be trusted; None for a sound row."""
        if self.problem is not None:
            return f"not measured: {self.problem}"
        if self.agreement is None or self.agreement.holds:
            return None
        wrong, of = self.agreement.images - self.agreement.same, self.agreement.images
        return (
            f"another answer than {self.agreement.reference} on {wrong} of {of} pictures "
            f"(logits differ by up to {self.agreement.largest_difference:.3g})"
        )


@dataclass(frozen=True)
class Peak:
    """The processor's ceiling: ``macs`` multiplied and added a second, by ``instruction``, as measured in this run."""

    precision: Precision
    threads: int
    instruction: str
    macs: float


@dataclass(frozen=True)
class Comparison:
    """How many times faster ``one`` row was than ``other``: the best of each kind on the same number of threads."""

    one: Row
    other: Row
    speedup: Speedup


@dataclass(frozen=True)
class Report:
    """A whole benchmark. ``notes`` are remarks on the conditions, one line each."""

    settings: Settings
    machine: Machine
    versions: Mapping[str, str]
    image: str
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()
    peaks: tuple[Peak, ...] = ()
    sizes: tuple[tuple[int, int], ...] = ()
    """Height and width of the pictures that the files take, where files are measured for themselves."""

    def rows_of(self, network: str) -> tuple[Row, ...]:
        return tuple(row for row in self.rows if row.network == network)

    def best(self, network: str, precision: Precision, threads: int | None = None, file: str = "") -> Row | None:
        """The fastest sound row of ``network``, or of another ``file``, in ``precision``, on ``threads`` if given."""
        rows = [
            row
            for row in self.rows_of(network)
            if row.precision is precision and row.sound and row.file == file and threads in (None, row.threads)
        ]
        return max(rows, key=lambda row: row.speed.fps if row.speed else 0.0, default=None)

    def comparisons(self, network: str) -> list[Comparison]:
        """int8 beside fp32, each in its best engine, and the best engine beside the best one of each other file."""
        found = []
        for threads in self.settings.threads:
            best = {precision: self.best(network, precision, threads) for precision in Precision}
            pairs = [(best[Precision.INT8], best[Precision.FP32])]
            pairs += [
                (best[precision], self.best(network, precision, threads, path.name))
                for path in self.settings.against
                for precision in Precision
            ]
            found += [
                Comparison(one, other, measure_speedup(one.rounds_ns, other.rounds_ns))
                for one, other in pairs
                if one is not None and other is not None
            ]
        return found

    def weights_of(self, network: str) -> str:
        """Where the weights of ``network`` come from, by precision where they differ."""
        if network == FILES:
            return "each has its own weights"
        origins: dict[str, str] = {}
        for row in self.rows_of(network):
            if row.weights and not row.file:
                origins.setdefault(row.precision.value, row.weights)
        if len(set(origins.values())) <= 1:
            return next(iter(origins.values()), "no weights")
        return "; ".join(f"{precision}: {origin}" for precision, origin in origins.items())

    def conditions(self) -> list[tuple[str, str]]:
        """What the numbers depend on, as (name, value) lines for people."""
        machine, settings = self.machine, self.settings
        cores = f"{machine.physical_cores or 'unknown'} physical, {machine.logical_cores} logical"
        if machine.usable_cores != machine.logical_cores:
            cores += f", {machine.usable_cores} usable"
        sizes = self.sizes or ((settings.image_size,) * 2,)
        pixels = " and ".join(f"{height}x{width}" for height, width in sizes)
        return [
            ("CPU", f"{machine.cpu}; cores: {cores}"),
            ("instructions", ", ".join(machine.features) or "unknown"),
            ("system", machine.system),
            ("versions", ", ".join(f"{name} {number}" for name, number in self.versions.items())),
            ("input", f"{pixels} pixels, batch {settings.batch}: {self.image}"),
            (
                "measured",
                f"{settings.load.value}, {pluralize(settings.rounds, 'round')} in shuffled turns, "
                "a pinned process a row",
            ),
            *([("peak", "; ".join(map(peak_text, self.peaks)))] if self.peaks else []),
            ("load at start", ", ".join(f"{value:.2f}" for value in machine.load) or "unknown"),
            *([("environment", " ".join(machine.variables))] if machine.variables else []),
        ]

    def remarks(self) -> list[str]:
        """One line for every row that is not sound, or an engine that ran nowhere for one reason; the notes."""
        lines = [f"{self.subject(row)}: {row.remark}" for row in self.rows if row.remark is not None]
        return [*dict.fromkeys(lines), *self.notes]

    def subject(self, row: Row) -> str:
        """What the remark of ``row`` is about: the engine where all its rows have the same problem."""
        problems = {other.problem for other in self.rows if other.engine == row.engine}
        return row.engine if problems == {row.problem} != {None} else row.name

    def to_json(self) -> str:
        """All of it with every raw sample, a line a row; numbers that are not finite become null."""
        rows = [row.to_json() for row in self.rows]
        compared = [
            {"network": network, "one": found.one.name, "other": found.other.name, **asdict(found.speedup)}
            for network in self.settings.networks
            for found in self.comparisons(network)
        ]
        head = {
            "format": FORMAT,
            "settings": asdict(self.settings)
            | {name: [str(path) for path in getattr(self.settings, name)] for name in ("against", "files")}
            | {"save": str(self.settings.save)},
            "machine": asdict(self.machine),
            "versions": dict(self.versions),
            "picture": self.image,
            "comparisons": compared,
            "notes": list(self.notes),
            "peaks": [asdict(peak) for peak in self.peaks],
        }
        lines = ",\n".join("  " + json.dumps(finite(row), allow_nan=False) for row in rows)
        return json.dumps(finite(head), indent=1, allow_nan=False)[:-2] + f',\n "rows": [\n{lines}\n ]\n}}\n'


def finite(value: Any) -> Any:
    """``value`` with None in place of every float that JSON cannot hold."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value


def peak_text(peak: Peak) -> str:
    threads = pluralize(peak.threads, "thread")
    return f"{peak.precision.value} {peak.macs / 1e9:.0f} GMAC/s on {threads} ({peak.instruction})"


def make_rows(entries: Sequence[CaseResult], settings: Settings) -> tuple[Row, ...]:
    """The rows of the ``entries`` of contests, one of each network, without the self-tests."""
    # What has to be equal for two entries' times to be compared -> those entries.
    comparable: dict[tuple[str, int], list[CaseResult]] = {}
    for entry in entries:
        comparable.setdefault((entry.case.network, entry.case.threads), []).append(entry)
    rows = {id(entry): make_row(entry, settings, beside) for beside in comparable.values() for entry in beside}
    return tuple(rows[id(entry)] for entry in entries if not entry.case.is_peak)


def make_row(entry: CaseResult, settings: Settings, beside: Sequence[CaseResult]) -> Row:
    case, loaded = entry.case, entry.loaded
    copies = case.threads if settings.load is Load.THROUGHPUT else 1
    base = find_base(entry, beside)
    return Row(
        network=case.network,
        precision=case.precision,
        engine=case.engine,
        engine_version=loaded.worker.version if loaded else "",
        weights=loaded.weights if loaded else "",
        file_bytes=loaded.file_bytes if loaded else None,
        problem=entry.problem,
        agreement=entry.agreement,
        speed=measure_speed(entry.rounds, settings.batch * copies) if entry.rounds else None,
        speedup=measure_speedup(entry.rounds, base.rounds) if base is not None else None,
        rounds_ns=entry.rounds,
        threads=case.threads,
        target=case.target,
        file=case.file,
        share=peak_share(entry, settings.batch * copies, beside),
        peak_memory=entry.peak_memory,
    )


def find_base(entry: CaseResult, beside: Sequence[CaseResult]) -> CaseResult | None:
    """The fp32 entry that an int8 one is measured by: that of its engine, else the fastest."""
    case = entry.case
    if case.precision is not Precision.INT8 or not entry.rounds or is_of_others(case):
        return None
    float_ones = [
        other
        for other in beside
        if other.rounds
        and other.case.precision is Precision.FP32
        and not other.case.is_peak
        and not is_of_others(other.case)
    ]
    same = [other for other in float_ones if other.case.engine == case.engine]
    return max(same or float_ones, key=lambda other: measure_speed(other.rounds, 1).fps, default=None)


def is_of_others(case: BenchmarkCase) -> bool:
    """Whether it may be another network than the other cases'."""
    return bool(case.file) and not case.shares_network


def peak_share(entry: CaseResult, images: int, beside: Sequence[CaseResult]) -> float | None:
    """The part of the processor's peak that ``entry`` reaches: the median over rounds, each by its own peak."""
    case = entry.case
    peak = next(
        (other for other in beside if other.case.is_peak and other.case.precision is case.precision),
        None,
    )
    if peak is None or not peak.rounds or not entry.rounds or case.macs is None:
        return None
    reached = images_per_second(entry.rounds, images) * case.macs
    return float(np.median(reached / macs_a_second(peak)))


def macs_a_second(peak: CaseResult) -> Floats:
    """float64 (rounds,): what a self-test that was timed multiplied and added."""
    assert peak.worker.macs is not None
    return images_per_second(peak.rounds, peak.worker.macs)


def make_peaks(entries: Sequence[CaseResult]) -> tuple[Peak, ...]:
    """What the self-tests found: of each precision and number of threads the highest, of all networks' contests."""
    found: dict[tuple[Precision, int], Peak] = {}
    for entry in entries:
        if entry.case.is_peak and entry.rounds:
            key = entry.case.precision, entry.case.threads
            macs = float(np.median(macs_a_second(entry)))
            if key not in found or macs > found[key].macs:
                found[key] = Peak(*key, entry.worker.name, macs)
    return tuple(found[key] for key in sorted(found, key=lambda key: (key[1], key[0].value)))

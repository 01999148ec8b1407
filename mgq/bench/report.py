"""The result of a benchmark: conditions and rows, and all of it as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from mgq.bench.contest import Agreement, Entry
from mgq.bench.environment import Machine
from mgq.bench.settings import Precision, Settings, counted
from mgq.bench.statistics import Rounds, Speed, Speedup, speed_of, speedup_of

FORMAT = "mgq bench 1"


@dataclass(frozen=True)
class Row:
    """One network in one precision in one engine.

    A row without a ``speed`` has a ``problem`` that says why. ``speedup`` is int8 over fp32 in the same
    engine, on int8 rows where both ran. ``rounds_ns`` are the single runs in nanoseconds, by round.
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

    @property
    def name(self) -> str:
        return f"{self.network} {self.precision.value} {self.engine}"

    @property
    def sound(self) -> bool:
        """Whether it was timed, and on the right work."""
        return self.speed is not None and self.agreement is not None and self.agreement.holds

    @property
    def remark(self) -> str | None:
        """Why the row has no times, or why they should not be trusted; None for a sound row."""
        if self.problem is not None:
            return f"not measured: {self.problem}"
        if self.agreement is None or self.agreement.holds:
            return None
        wrong, of = self.agreement.pictures - self.agreement.same, self.agreement.pictures
        return (
            f"another answer than {self.agreement.reference} on {wrong} of {of} pictures "
            f"(logits differ by up to {self.agreement.largest_difference:.3g})"
        )


@dataclass(frozen=True)
class Report:
    """A whole benchmark. ``notes`` are remarks on the conditions, one line each."""

    settings: Settings
    machine: Machine
    versions: Mapping[str, str]
    picture: str
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()

    def rows_of(self, network: str) -> tuple[Row, ...]:
        return tuple(row for row in self.rows if row.network == network)

    def best(self, network: str, precision: Precision) -> Row | None:
        """The fastest sound row of ``network`` in ``precision``."""
        rows = [row for row in self.rows_of(network) if row.precision is precision and row.sound]
        return max(rows, key=lambda row: row.speed.fps if row.speed else 0.0, default=None)

    def weights_of(self, network: str) -> str:
        """Where the weights of ``network`` come from, by precision where they differ."""
        origins: dict[str, str] = {}
        for row in self.rows_of(network):
            if row.weights:
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
        side = settings.image_size
        return [
            ("CPU", f"{machine.cpu}; cores: {cores}"),
            ("instructions", ", ".join(machine.features) or "unknown"),
            ("system", machine.system),
            ("versions", ", ".join(f"{name} {number}" for name, number in self.versions.items())),
            ("input", f"{side}x{side} pixels, batch {settings.batch}: {self.picture}"),
            (
                "measured",
                f"{counted(settings.threads, 'thread')}, {counted(settings.rounds, 'round')} in shuffled turns",
            ),
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
        rows = [asdict(row) | {"sound": row.sound, "remark": row.remark} for row in self.rows]
        head = {
            "format": FORMAT,
            "settings": asdict(self.settings),
            "machine": asdict(self.machine),
            "versions": dict(self.versions),
            "picture": self.picture,
            "notes": list(self.notes),
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


def rows_from(entries: Sequence[Entry], batch: int) -> tuple[Row, ...]:
    """The rows of a contest's ``entries``, where every single run took ``batch`` pictures."""
    fp32 = {
        (entry.contestant.network, entry.contestant.engine): entry.rounds
        for entry in entries
        if entry.contestant.precision is Precision.FP32 and entry.rounds
    }
    return tuple(row_from(entry, batch, fp32) for entry in entries)


def row_from(entry: Entry, batch: int, fp32: Mapping[tuple[str, str], Rounds]) -> Row:
    contestant, loaded = entry.contestant, entry.loaded
    base = fp32.get((contestant.network, contestant.engine))
    compared = base is not None and contestant.precision is Precision.INT8 and entry.rounds
    return Row(
        network=contestant.network,
        precision=contestant.precision,
        engine=contestant.engine,
        engine_version=loaded.runtime.version if loaded else "",
        weights=loaded.weights if loaded else "",
        file_bytes=loaded.file_bytes if loaded else None,
        problem=entry.problem,
        agreement=entry.agreement,
        speed=speed_of(entry.rounds, batch) if entry.rounds else None,
        speedup=speedup_of(entry.rounds, base) if compared and base is not None else None,
        rounds_ns=entry.rounds,
    )

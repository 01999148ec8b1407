"""What the pages of reports show: :class:`Report` of a run, :class:`FileReport` of a deployed file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mgq.engine.classifier.classifier import Classifier
from mgq.engine.classifier.predict import ClassScore
from mgq.errors import plural
from mgq.quantization.option_names import Mode
from mgq.reports.engine_rows import BackendComparison
from mgq.reports.measurements import FLOAT, INT8, Measurements
from mgq.runtime.protocol import FileRuntime
from mgq.system.environment import Machine

if TYPE_CHECKING:  # they import MegEngine, which a deployed file does without
    from mgq.engine.runs.run_folder import Metrics
    from mgq.reports.finished_run import Run
    from mgq.reports.run_predictions import Networks


@dataclass(frozen=True, eq=False)
class Report:
    """All that the page shows of ``run``.

    ``found`` is None where there were no pictures, ``engines`` where they were not wanted. ``missing`` has a line for
    everything that is not there, with the mend. ``float_metrics`` are those of the float training before. ``command``
    makes the report again, ``page`` is where it is written.
    """

    run: Run
    networks: Networks
    found: Measurements | None
    engines: BackendComparison | None
    float_metrics: list[Metrics]
    missing: tuple[str, ...]
    machine: Machine
    versions: Mapping[str, str]
    made: datetime
    command: str
    page: Path

    def summary(self) -> list[str]:
        """The result in a few lines."""
        lines = [f"{self.run.path}: {self.run.weights.arch}, {self.run.kind}"]
        if self.found is not None:
            tops = ", ".join(f"{name} {one.top1:.1f} %" for name, one in self.found.found.items())
            lines.append(f"top-1 on {self.found.images_of}: {tops} (± {self.found.last.top1_error:.1f})")
            if self.found.pair is not None:
                counts = {verdict: len(group) for verdict, group in self.found.groups.items()}
                told = ", ".join(f"{verdict} {count}" for verdict, count in counts.items())
                lines.append(f"int8 changed {plural(sum(counts.values()), 'answer')}: {told}")
        return lines

    def to_json(self) -> dict[str, Any]:
        """Plain data: percent, nats, bytes, pictures a second."""
        found, compared = self.found, self.engines
        return {
            "run": str(self.run.path),
            "arch": self.run.weights.arch,
            "kind": self.run.kind,
            "page": str(self.page),
            "images": found.images if found else 0,
            "accuracy": {
                name: {"top1": one.top1, "top5": one.top5, "loss": one.loss}
                for name, one in (found.found.items() if found else ())
            },
            "changed": {verdict: len(group) for verdict, group in found.groups.items()} if found else {},
            "engines": [row.to_json() for row in compared.rows] if compared else [],
            "missing": list(self.missing),
            "versions": dict(self.versions),
        }


@dataclass(frozen=True)
class WrongAnswer:
    """A picture that the network takes for something else. ``truth`` has the probability that its own class got;
    ``thumbnail`` is what the network saw of it, a JPEG of ``side`` pixels on a side."""

    name: str
    truth: ClassScore
    answer: ClassScore
    thumbnail: bytes
    side: int


@dataclass(frozen=True, eq=False)
class FileReport:
    """All that the page shows of the deployed file at ``path``.

    ``found`` is None where there were no pictures, ``engines`` where they were not wanted. ``missing`` has a line for
    everything that is not there, with the mend. ``command`` makes the report again, ``page`` is where it is written.
    """

    path: Path
    classifier: Classifier
    sha256: str
    found: Measurements | None
    wrong: tuple[WrongAnswer, ...]
    engines: BackendComparison | None
    missing: tuple[str, ...]
    machine: Machine
    versions: Mapping[str, str]
    made: datetime
    command: str
    page: Path

    @property
    def what(self) -> str:
        return precision_of(self.classifier)

    @property
    def runtime(self) -> FileRuntime:
        """The engine that the accuracy was measured in, with the file."""
        found: FileRuntime = self.classifier.network.runtime
        return found

    @property
    def engine(self) -> str:
        return f"{self.runtime.name} {self.runtime.version}".strip()

    @property
    def file_bytes(self) -> int:
        size: int = self.classifier.network.size
        return size

    @property
    def about(self) -> Mapping[str, Any]:
        """What the file says of itself, but for the names of its classes."""
        return {name: value for name, value in self.runtime.about.items() if name != "classes"}

    def summary(self) -> list[str]:
        """The result in a few lines."""
        lines = [f"{self.path}: {self.classifier.spec.name}, {self.what}, in {self.engine}"]
        if self.found is not None:
            one = self.found.last
            lines.append(f"top-1 on {self.found.images_of}: {one.top1:.1f} % ± {one.top1_error:.1f}")
        best = self.engines.fastest(self.what) if self.engines is not None else None
        if best is not None and best.speed is not None:
            lines.append(f"fastest on one thread: {best.engine}, {best.speed.fps:.1f} pictures/s")
        return lines

    def to_json(self) -> dict[str, Any]:
        """Plain data: percent, nats, bytes, pictures a second."""
        found, compared = self.found, self.engines
        return {
            "file": str(self.path),
            "file_bytes": self.file_bytes,
            "sha256": self.sha256,
            "arch": self.classifier.spec.name,
            "kind": self.what,
            "engine": self.engine,
            "page": str(self.page),
            "images": found.images if found else 0,
            "accuracy": {
                name: {"top1": one.top1, "top5": one.top5, "loss": one.loss}
                for name, one in (found.found.items() if found else ())
            },
            "engines": [row.to_json() for row in compared.rows] if compared else [],
            "missing": list(self.missing),
            "about": dict(self.about),
            "versions": dict(self.versions),
        }


def precision_of(classifier: Classifier) -> str:
    return FLOAT if classifier.mode is Mode.NORMAL else INT8

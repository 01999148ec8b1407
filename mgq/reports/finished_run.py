"""Reads a finished run from its folder: network, recipe, metrics, and the weights that it began with."""

from __future__ import annotations

import glob
import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from mgq.data.datasets import Dataset, without_subset
from mgq.data.labelled_folders import ImageFolder
from mgq.engine.calibration.calibration_run import RANGES_FILE
from mgq.engine.classifier.labelled_sets import evaluation_data
from mgq.engine.classifier.open import RUN_CHECKPOINT, find_newest
from mgq.engine.runs.provenance import read_environment
from mgq.engine.runs.run_folder import FLOAT_START, LAST, METRICS, RECIPE, Metrics, read_metrics
from mgq.engine.runs.training_state import read_training_state
from mgq.errors import InputError, plural, printable
from mgq.events import OnProgress, log_progress
from mgq.weights.checkpoint import CheckpointInfo
from mgq.weights.state_selection import parse_key
from mgq.zoo.registry import ModelSpec, spec_of
from mgq.zoo.weight_loading import Weights, read_packaged_weights, read_weights

KINDS = ("qat", "calibration", "normal")
"""What the names of runs' folders end in."""


@dataclass(frozen=True)
class Run:
    """The run in the folder ``path``, with the network that it made: ``kind`` is ``normal``, ``qat`` or
    ``calibration``."""

    path: Path
    kind: str
    weights: Weights

    @property
    def info(self) -> CheckpointInfo:
        assert self.weights.info is not None
        return self.weights.info

    @property
    def checkpoint(self) -> Path:
        return self.path / RUN_CHECKPOINT

    @property
    def finished(self) -> datetime:
        """When the network was last kept, in local time."""
        return datetime.fromtimestamp(self.checkpoint.stat().st_mtime).astimezone()

    @property
    def is_int8(self) -> bool:
        """Whether the network has the ranges that int8 needs."""
        return self.weights.mode == "qat"

    @cached_property
    def metrics(self) -> list[Metrics]:
        """The metrics of all epochs; empty where nothing was trained. Raises InputError where they cannot be read."""
        return read_metrics(self.path / METRICS)

    @cached_property
    def recipe(self) -> str:
        """The text of the recipe, or of a calibration's provenance; empty without one."""
        if self.kind == "calibration":
            return json.dumps(self.provenance, indent=1, ensure_ascii=False) if self.provenance else ""
        return open_if_readable(self.path / RECIPE)

    @cached_property
    def provenance(self) -> Mapping[str, Any]:
        """What a calibration says of itself; empty for other runs."""
        try:
            found = json.loads(open_if_readable(self.path / RANGES_FILE) or "{}")["provenance"]
        except (ValueError, KeyError, TypeError, RecursionError):
            return {}
        return found if isinstance(found, dict) else {}

    @cached_property
    def calibrated(self) -> Mapping[str, float]:
        """What the network of a ``qat`` run was worth before it was trained: percent, nats; empty where unknown."""
        if self.kind != "qat":
            return {}
        try:
            start = read_training_state(self.path / LAST).progress.get("start", {})
        except InputError:
            return {}
        known = isinstance(start, dict) and all(isinstance(start.get(name), float) for name in ("top1", "top5", "loss"))
        return start if known else {}

    @property
    def command(self) -> str:
        """The command that does it again."""
        verb = {"calibration": "calibrate", "qat": "qat"}.get(self.kind, "train")
        typed = find_command(self.path, verb)
        if typed:
            return typed
        if self.kind == "calibration":
            return str(self.provenance.get("made_by", f"mgq calibrate -a {self.info.arch}"))
        start = f" -c {quote_path(self.path / FLOAT_START)}" if self.kind == "qat" else ""
        return f"mgq {verb} --recipe {quote_path(self.path / RECIPE)}{start}"

    def files(self) -> list[tuple[str, int]]:
        """Its files by name, with their bytes."""
        there = sorted(path for path in self.path.iterdir() if path.is_file() and not path.name.startswith("."))
        return [(path.name, path.stat().st_size) for path in there]


def find_command(folder: Path, verb: str) -> str:
    """The ``mgq VERB`` that began ``folder``, as its environment tells; empty where it does not."""
    processes = read_environment(folder).get("processes")
    first = processes[0] if isinstance(processes, list) and processes else None
    command = str(first.get("command", "")) if isinstance(first, dict) else ""
    return command if command.startswith(f"mgq {verb}") else ""


def quote_path(path: Path) -> str:
    return shlex.quote(str(path))


def open_if_readable(path: Path) -> str:
    """The text of ``path``; empty where it is not there or cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


# ---- which run ----


def find_run(name: str | Path | None, save: Path, arch: str | None = None) -> Run:
    """The run in the folder ``name``, or called so under ``save``; without a name the newest one there, of ``arch``.

    Raises InputError where there is none, or it has no network yet.
    """
    path = find_newest_folder(save, arch) if name is None else find_folder(Path(name), save)
    checkpoint = path / RUN_CHECKPOINT
    if not checkpoint.is_file():
        raise InputError(f"{printable(path)} has no {RUN_CHECKPOINT} yet: let the run finish, or name another one")
    weights = read_weights(checkpoint)
    if weights.info is None:
        raise InputError(f"{printable(checkpoint)} was not written by mgq: name the folder of a run")
    kind = "calibration" if (path / RANGES_FILE).is_file() else "qat" if weights.mode == "qat" else "normal"
    return Run(path, kind, weights)


def find_newest_folder(save: Path, arch: str | None = None) -> Path:
    """The newest run under ``save``, of ``arch`` where that is given. Raises InputError where there is none."""
    spec = None if arch is None else spec_of(arch)
    pattern = "*" if spec is None else glob.escape(spec.name)
    found = find_newest(path for kind in KINDS for path in save.glob(f"{pattern}.{kind}/{RUN_CHECKPOINT}"))
    if found is None:
        of = "" if spec is None else f" of {spec.name}"
        maker = describe_maker(spec)
        raise InputError(f"there is no run{of} under {printable(save)}: `{maker}` makes one, or pass -s FOLDER")
    return found.parent


def describe_maker(spec: ModelSpec | None) -> str:
    """The command that makes an int8 run of ``spec``, or of any network."""
    if spec is None:
        return "mgq qat"
    return "mgq calibrate -c FILE -d FOLDER" if spec.is_described else f"mgq qat -a {shlex.quote(spec.typed)}"


def find_folder(name: Path, save: Path) -> Path:
    if name.name == RUN_CHECKPOINT:
        name = name.parent
    found = next((path for path in (name, save / name) if path.is_dir()), None)
    if found is None:
        runs = sorted(path.parent.name for path in save.glob(f"*/{RUN_CHECKPOINT}"))
        there = f"; there are {', '.join(map(printable, runs))}" if runs else ""
        if name.is_file():
            raise InputError(f"{printable(name)} is neither a run nor a deployed file{there}: name a run's folder")
        raise InputError(f"there is no run {printable(name)}{there}: name its folder")
    return found


# ---- what it began with ----


def find_float_weights(run: Run) -> tuple[Weights | None, str]:
    """The float network that int8 is to be compared with, or why there is none."""
    if run.kind == "normal":
        return run.weights, ""
    kept = run.path / FLOAT_START
    if kept.is_file():
        return read_weights(kept, spec_of(run.weights.arch)), ""
    origin = run.info.origin
    packaged = read_packaged_weights(spec_of(run.weights.arch))
    if packaged is not None and packaged.origin == origin:
        return packaged, ""
    path = path_in(origin, run)
    if path is None:
        return None, f"the float network that it started from ({origin}) is missing: give it with -c FILE"
    if path.stat().st_mtime > run.checkpoint.stat().st_mtime:
        return None, f"{path} has been trained again since: calibrate again, or give the float network with -c FILE"
    return read_weights(path, spec_of(run.weights.arch), key=parse_key(origin.partition(" (")[2])), ""


def path_in(origin: str, run: Run) -> Path | None:
    """The file that ``origin`` names, ``PATH (what is known of it)``: there, or in a folder beside the run's."""
    named = Path(origin.partition(" (")[0])
    beside = run.path.parent / named.parent.name / named.name
    return next((path for path in (named, beside) if path.suffix and path.is_file()), None)


def float_metrics(run: Run) -> list[Metrics]:
    """The metrics of the float training that a ``qat`` run or a calibration continues; empty where it is missing."""
    if run.kind == "normal":
        return []
    start = run.path / FLOAT_START
    began = read_weights(start).info if start.is_file() else run.info
    path = path_in(began.origin, run) if began else None
    if path is None or path.name != RUN_CHECKPOINT or path.stat().st_mtime > run.checkpoint.stat().st_mtime:
        return []
    return read_metrics(path.parent / METRICS)


# ---- what it is measured on ----


def images_of(run: Run, data: Path | None, on_progress: OnProgress = log_progress) -> tuple[Dataset, str]:
    """The labelled pictures to measure ``run`` on: in the folder ``data``, else those that it knows of; and a remark
    on pictures that a calibration had seen and that are left out.

    Raises InputError where there are none.
    """
    known = run.provenance.get("pictures")
    if data is None and not run.info.recipe.get("data") and isinstance(known, str) and Path(known).is_dir():
        data = Path(known)
    images = evaluation_data(data, run.info.recipe, run.info.image_size, on_progress)
    seen, of = (run.provenance.get(name, 0) for name in ("images", "of"))
    # A calibration looks into train/ where there is one, and `of` says how many pictures it had to choose from.
    alone = isinstance(images, ImageFolder) and not (images.folder.parent / "train").is_dir()
    if not (alone and isinstance(seen, int) and 0 < seen < len(images) == of):
        return images, ""
    return without_subset(images, seen), f"left out: {plural(seen, 'picture')} on which the ranges were measured"

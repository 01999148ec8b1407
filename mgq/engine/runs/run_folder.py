"""The folder of a run, ``<save>/<arch>.<mode>/``: checkpoint, state, recipe, log and metrics."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import msgspec
from msgspec import Meta

from mgq.engine.classifier.open import RUN_CHECKPOINT
from mgq.engine.runs.curves import Mark, write_curves
from mgq.engine.runs.provenance import read_environment, write_environment
from mgq.engine.runs.tensorboard import EventsFile
from mgq.engine.runs.training_state import TrainingState, read_training_state, write_training_state
from mgq.errors import InputError, printable
from mgq.io.append import append_whole, drop_torn_line
from mgq.io.atomic import (
    drop_abandoned_in,
    ensure_writable_folder,
    explain_write_errors,
    list_missing,
    remove_empty,
    write_text_atomically,
)
from mgq.io.limited_io import bytes_of
from mgq.io.locks import drop_lock, take_lock

if TYPE_CHECKING:
    import filelock

LAST = "last.safetensors"
FLOAT_START = "float.safetensors"
"""In the folder of a ``qat`` run: the float network that it began from."""
RECIPE = "recipe.toml"
LOG = "log.txt"
METRICS = "metrics.jsonl"
CURVES = "curves.png"
EVENTS = "events"
_ELSEWHERE = "pass --save FOLDER"
_MOST_METRICS = 1 << 26  # bytes: of 200,000 epochs
Plain: TypeAlias = str | bool | Annotated[int, Meta(ge=1 - 2**63, le=2**63 - 1)] | float | None
"""A value of an entry, in a file."""
Metrics = dict[str, Any]


class RunFolder:
    """The folder of one run, locked for this process until :meth:`close`.

    ``path`` is the folder, ``kept`` where an earlier run of the same name lies now (None without one). Made by
    :meth:`create` or :meth:`open`; also a context manager. Whole files are written atomically; lines are appended
    whole. So whenever the process is killed or the disk is full, what was saved before is there and can be read.
    Every method that writes raises InputError where the place does not allow it and FailureError for a full disk.

    Pickled, for a process that works for its owner, it comes without the lock.
    """

    def __init__(
        self,
        path: Path,
        lock: filelock.BaseFileLock | None,
        kept: Path | None,
        tensorboard: bool,
        made: Sequence[Path] = (),
    ) -> None:
        self.path = path
        self.kept = kept
        self._made = made  # folders above it that were not there before, from below
        self._lock = lock
        self._tensorboard = tensorboard
        self._events: EventsFile | None = None

    @classmethod
    def create(cls, save: Path, arch: str, mode: str, tensorboard: bool = False) -> RunFolder:
        """A new, empty run; ``mode`` is ``normal``, ``qat`` or ``calibration``.

        A run that is there already is kept under the first free name ``<arch>.<mode>.1``, ``.2`` and so on, as
        ``notice`` says. So call this last, when nothing else can be wrong with the command. Raises InputError
        where another process is at work in the folder, or it cannot be written.
        """
        path = save / f"{arch}.{mode}"
        made = list_missing(save)
        ensure_writable_folder(save, _ELSEWHERE)
        with _releasing_on_error(_take_lock(path)) as lock:
            kept = _move_aside(path)
            try:
                ensure_writable_folder(path, _ELSEWHERE)
            except BaseException:
                if kept is not None:
                    with contextlib.suppress(OSError):  # the error under way says more
                        kept.rename(path)
                raise
            return cls(path, lock, kept, tensorboard, made)

    @classmethod
    def open(cls, save: Path, arch: str, mode: str, tensorboard: bool = False) -> RunFolder:
        """Open an existing run, to resume it from :meth:`read_state`.

        Raises InputError where there is none, where it saved no state yet, where another process is at work in it,
        or it cannot be written.
        """
        path = save / f"{arch}.{mode}"
        if not path.is_dir():
            raise InputError(f"there is no run {printable(path)} to resume; leave out --resume, or pass --save FOLDER")
        with _releasing_on_error(_take_lock(path)) as lock:
            if not (path / LAST).is_file():
                raise InputError(f"{printable(path)} has no {LAST} to resume from; leave out --resume to start again")
            ensure_writable_folder(path, "change that to resume it")
            run = cls(path, lock, None, tensorboard)
            run._mend()
            return run

    @property
    def notice(self) -> str | None:
        """A line for the user about the earlier run that made room for this one; None where there was none."""
        return f"the earlier run {self.path} is kept as {self.kept}" if self.kept else None

    @property
    def checkpoint(self) -> Path:
        """The file of the best network; other verbs look for it here."""
        return self.path / RUN_CHECKPOINT

    @property
    def last(self) -> Path:
        """The file of the state that the run can be resumed from."""
        return self.path / LAST

    def write_recipe(self, text: str) -> None:
        write_text_atomically(self.path / RECIPE, text)

    def note_environment(self, **changes: Any) -> None:
        """Keep ``changes``, plain JSON, with what else the bits of this run depend on. A list is added to one there."""
        found = read_environment(self.path)
        for name, value in changes.items():
            found[name] = [*found.get(name, []), *value] if isinstance(value, list) else value
        write_environment(self.path, found)

    def write_state(self, state: TrainingState) -> None:
        write_training_state(self.last, state)

    def read_state(self) -> TrainingState:
        """The state last written. Raises InputError where it is damaged."""
        return read_training_state(self.last)

    def log(self, text: str) -> None:
        """Append ``text`` to the log, each of its lines with the local time."""
        now = time.strftime("%Y-%m-%d %H:%M:%S")
        lines = "".join(f"{now}  {line}\n" for line in text.splitlines())
        append_whole(self.path / LOG, lines.encode(errors="backslashreplace"))

    def add_metrics(self, entry: Mapping[str, Any]) -> None:
        """Append the metrics of one finished epoch, and tell TensorBoard of them where that was asked for.

        ``entry`` holds plain numbers and words, ``epoch`` (from 1) among them. Call it before :meth:`write_state`:
        after a kill between the two, ``keep_metrics`` drops what is done again.
        """
        if self._tensorboard and self._events is None:
            self._events = EventsFile.continue_after(self.path / EVENTS, self.metrics())
        line = json.dumps({name: _write_strictly(value) for name, value in entry.items()}, allow_nan=False)
        append_whole(self.path / METRICS, f"{line}\n".encode(), sync=True)
        if self._events is not None:
            self._events.add(entry)

    def metrics(self) -> list[Metrics]:
        """The metrics of all finished epochs in their order; NaN for what was not finite."""
        return read_metrics(self.path / METRICS)

    def keep_metrics(self, epochs: int) -> None:
        """Drop the metrics of all epochs after the first ``epochs``, those that a resumed run is to do again."""
        with explain_write_errors(self.path / METRICS):
            lines = _lines(self.path / METRICS)
        kept = [line for line in lines if (entry := _entry(line)) is not None and entry["epoch"] <= epochs]
        if kept != lines:
            write_text_atomically(self.path / METRICS, "".join(f"{line}\n" for line in kept))

    def write_curves(self, title: str, marks: Sequence[Mark] = ()) -> str | None:
        """Draw the metrics so far. Returns None, or a line that says why it could not be done; raises nothing."""
        try:
            metrics = self.metrics()
        except InputError as error:
            return str(error)
        return write_curves(self.path / CURVES, metrics, title, marks)

    @contextlib.contextmanager
    def whole_or_nothing(self) -> Iterator[None]:
        """Takes the folder away again where the block fails or is interrupted, and puts the earlier run back: for what
        is worth nothing before all of it is written."""
        try:
            yield
        except BaseException:
            self._withdraw()
            raise

    @contextlib.contextmanager
    def saved_or_nothing(self) -> Iterator[None]:
        """The same where the block ends so before it has saved a network, or a state to resume from."""
        try:
            yield
        except BaseException:
            if not self.checkpoint.is_file() and not self.last.is_file():
                self._withdraw()
            raise

    def _withdraw(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)  # the error under way says more
        if self.kept is not None:
            with contextlib.suppress(OSError):
                self.kept.rename(self.path)
        if self._lock is not None:
            drop_lock(self._lock)
        remove_empty(self._made)

    def close(self) -> None:
        """Release the lock of the folder. To be called when all is written; a second call does nothing."""
        if self._lock is not None:
            self._lock.release()

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_lock": None}

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _mend(self) -> None:
        """Delete what a killed process left half written."""
        drop_abandoned_in(self.path)
        for name in (LOG, METRICS):
            drop_torn_line(self.path / name)


def read_metrics(path: Path) -> list[Metrics]:
    """The entries of a ``metrics.jsonl`` in their order; lines that are not whole are left out.

    Raises InputError where the file is there and cannot be read.
    """
    try:
        lines = _lines(path)
    except OSError as error:
        raise InputError(f"cannot read {printable(path)} ({error.strerror}); check the path") from error
    return [entry for line in lines if (entry := _entry(line)) is not None]


def _lines(path: Path) -> list[str]:
    try:
        return bytes_of(path, _MOST_METRICS).decode(errors="replace").split("\n")[:-1]
    except FileNotFoundError:
        return []


def _entry(line: str) -> Metrics | None:
    try:
        entry = msgspec.convert(json.loads(line), dict[str, Plain])
    except (ValueError, RecursionError, msgspec.ValidationError):
        return None
    if type(entry.get("epoch")) is not int:
        return None
    return {name: math.nan if value is None else value for name, value in entry.items()}


def _write_strictly(value: Any) -> Any:
    """``value`` as JSON knows it: numpy's numbers as Python's, null for NaN and infinities."""
    if isinstance(value, str | bool | int):
        return value
    number = float(value)
    return number if math.isfinite(number) else None


def _move_aside(path: Path) -> Path | None:
    """Where what was at ``path`` lies now; None where there was nothing whole."""
    drop_abandoned_in(path)
    with explain_write_errors(path, _ELSEWHERE):
        if not path.is_dir() or not any(path.iterdir()):
            return None
        kept = next(other for i in count(1) if not os.path.lexists(other := path.with_name(f"{path.name}.{i}")))
        path.rename(kept)
    return kept


def _take_lock(path: Path) -> filelock.BaseFileLock:
    """The lock of the run ``path``, taken. Raises InputError where another process has it."""
    lock = take_lock(path, _ELSEWHERE)
    if lock is None:
        name = printable(path)
        raise InputError(f"another mgq is writing to {name}; wait until it has ended, or {_ELSEWHERE}")
    return lock


@contextlib.contextmanager
def _releasing_on_error(lock: filelock.BaseFileLock) -> Iterator[filelock.BaseFileLock]:
    try:
        yield lock
    except BaseException:
        drop_lock(lock)
        raise

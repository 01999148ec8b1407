"""Evaluates a network on labelled images, in one process or several."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from mgq.data.augmentation import EvalTransform, Transform
from mgq.data.datasets import Dataset
from mgq.data.loader import Loader
from mgq.engine.classifier.classifier import Classifier
from mgq.engine.classifier.deployed_files import open_file, write_for_backend
from mgq.engine.classifier.evaluation_result import Evaluation
from mgq.engine.classifier.labelled_sets import match_classes
from mgq.engine.classifier.metrics import Labels, Logits, Meter, cross_entropy, refuse_not_finite
from mgq.engine.distributed.team import Team, current_team, send_work
from mgq.errors import InputError, plural
from mgq.events import OnProgress, Progress, log_progress
from mgq.io.temporary_folders import temporary_folder
from mgq.machine import usable_cores
from mgq.quantization.option_names import Mode
from mgq.system.processes import Channel, Task, do_nothing, run_in_processes
from mgq.zoo.own_networks import has_own_networks

Network = Callable[[npt.NDArray[np.uint8]], Logits]
"""uint8 (N, 3, H, W), BGR -> float32 (N, classes)."""

Thing = TypeVar("Thing")

BATCH = 8
"""Pictures at a time: with 32, float EfficientNet-Lite0 was measured at half the speed."""
MOST = 32


def batch_for(image_size: int) -> int:
    """The batch size whose images have as many pixels as ``BATCH`` ones at 224x224. Small batches are slow: each one
    quantizes all weights again."""
    return max(BATCH, min(MOST, BATCH * 224**2 // image_size**2))


class Group(Protocol):
    """Processes that measure together: this is part ``share[0]`` of ``share[1]``."""

    @property
    def share(self) -> tuple[int, int]: ...

    def gather(self, thing: Thing) -> list[Thing]: ...


def evaluate_loader(
    logits: Network,
    loader: Loader,
    what: str = "evaluate",
    on_progress: OnProgress = log_progress,
    group: Group | None = None,
) -> Evaluation:
    """Evaluate the network ``logits`` on the images of ``loader``, whose labels are indices of its outputs.

    With a ``group`` its processes share the batches, and all get the result that one process would. The
    loader should leave broken pictures out (``broken="drop"``). Raises InputError where the pictures have no
    labels, or labels that the network has no output for; FailureError where an output is not a finite number.
    """
    if group is not None and group.share[1] > 1:
        return _evaluate_together(logits, loader, what, on_progress, group)
    tally = _Tally(loader, what, on_progress)
    for answers in _answers(logits, loader):
        tally.add(answers)
    return tally.evaluation()


def _evaluate_together(logits: Network, loader: Loader, what: str, on_progress: OnProgress, group: Group) -> Evaluation:
    part, of = group.share
    tally = _Tally(loader, what, lambda event: on_progress(event._replace(done=min(event.done * of, event.total or 0))))
    with _Deal(loader, part, of, loader.workers) as own:
        for answers in _answers(logits, own):
            tally.add(answers)
    tally.merge(group.gather(tally.found))
    _Deal(loader, 0, 1).refuse_too_many(tally.problems)
    return tally.evaluation(of)


# ---- a classifier on a dataset ----


def evaluate(
    classifier: Classifier,
    dataset: Dataset,
    *,
    jobs: int = 1,
    batch_size: int = BATCH,
    workers: int | None = None,
    max_bad: float = 0.01,
    prepare: Callable[[], None] = do_nothing,
    on_progress: OnProgress = log_progress,
) -> Evaluation:
    """Measure ``classifier`` on the labelled pictures of ``dataset``, whose classes are matched by name.

    With several ``jobs`` the batches are dealt out to as many processes of one CPU core each, and the result is the
    same to the bit, but for the time; the same is so for processes that MPI has started. ``workers`` are threads that
    decode, of all jobs together. ``prepare`` is
    called in each process before it loads MegEngine. Pictures that cannot be read are left out and named.

    Raises InputError for classes that the network does not have, more jobs than cores, or more broken pictures than
    the share ``max_bad``; FailureError where a process dies or an output is not finite.
    """
    team = current_team()
    if team is not None:
        if jobs > 1:
            raise InputError(f"--jobs {jobs} starts processes by itself: leave it out where MPI starts mgq")
        with evaluation_loader(classifier, dataset, batch_size, workers, max_bad) as loader:
            return _evaluate_in_team(team, classifier, loader, prepare, on_progress)
    if not 1 <= jobs <= usable_cores():
        raise InputError(
            f"--jobs {jobs} is not possible on {plural(usable_cores(), 'core')}: give 1 to {usable_cores()}"
        )
    with evaluation_loader(classifier, dataset, batch_size, workers, max_bad) as loader:
        jobs = min(jobs, len(loader))
        if jobs > 1:
            return _evaluate_in_processes(classifier, loader, jobs, prepare, on_progress)
        return evaluate_loader(classifier.logits, loader, on_progress=on_progress)


def evaluation_loader(
    classifier: Classifier,
    dataset: Dataset,
    batch_size: int = BATCH,
    workers: int | None = None,
    max_bad: float = 0.01,
) -> Loader:
    """A loader of ``dataset`` for ``classifier``: with its image size, its preprocessing and its classes, in order."""
    size, how = classifier.image_size, classifier.preprocessing
    transform = EvalTransform(size, how.shorter_side(size), how.interpolation, classifier.stretched_to)
    data = match_classes(dataset, classifier.classes)
    return Loader(data, transform, batch_size, workers=workers, broken="drop", max_bad=max_bad)


# ---- batches, and what comes of them ----


class _Answers(NamedTuple):
    """What a network answers to one batch, and all broken pictures that its loader has met."""

    logits: Logits
    labels: Labels
    indices: Labels
    problems: Mapping[int, str]


def _answers(logits: Network, loader: Loader) -> Iterator[_Answers]:
    """Yield the answers to each batch that has images, and an empty one at the end, for the last broken images."""
    for batch in loader:
        yield _Answers(logits(batch.images), batch.labels, batch.indices, dict(loader.problems))
    none = np.zeros(0, np.int64)
    yield _Answers(np.zeros((0, len(loader.dataset.classes)), np.float32), none, none, dict(loader.problems))


class _PartialResult(NamedTuple):
    """What one process found: see :class:`_Tally`."""

    meter: Meter
    losses: list[float]
    parts: list[npt.NDArray[np.int64]]
    problems: dict[int, str]


class _Tally:
    """Accumulates answers; its sums are the same to the bit in any order."""

    def __init__(self, loader: Loader, what: str, on_progress: OnProgress) -> None:
        self.loader = loader
        self.what = what
        self.on_progress = on_progress
        self.meter = Meter()
        self.losses: list[float] = []
        self.parts: list[npt.NDArray[np.int64]] = []
        self.problems: dict[int, str] = {}
        self.start = time.perf_counter()
        if loader.dataset.labels is None:
            raise InputError(f"{loader.dataset.name} has no classes: put the pictures in <class>/ to measure accuracy")

    @property
    def found(self) -> _PartialResult:
        """The accumulated values, to be sent to other processes."""
        return _PartialResult(self.meter, self.losses, self.parts, self.problems)

    def merge(self, parts: Sequence[_PartialResult]) -> None:
        """Take over what all ``parts`` found, this process's own included."""
        self.meter = Meter.add_up([part.meter for part in parts])
        self.losses = [loss for part in parts for loss in part.losses]
        self.parts = [numbers for part in parts for numbers in part.parts]
        self.problems = {index: line for part in parts for index, line in part.problems.items()}

    def restart_clock(self) -> None:
        self.start = time.perf_counter()

    def add(self, answers: _Answers) -> None:
        logits, labels, indices, problems = answers
        if not len(labels) and problems.keys() <= self.problems.keys():
            return
        self.problems.update(problems)
        if len(labels):
            self._check(logits, labels)
            losses = cross_entropy(logits, labels)
            self.meter.add(losses, logits, labels)
            self.losses += losses.tolist()
            # argmax takes the lower index of equals, as ranks does.
            self.parts.append(np.stack([indices, labels, logits.argmax(1)]))
        done = self.meter.images + len(self.problems)
        detail = f"top-1 {self.meter.top1:.1f} %" if self.meter.images else ""
        self.on_progress(Progress(self.what, done, len(self.loader.dataset), "pictures", detail))

    def _check(self, logits: Logits, labels: Labels) -> None:
        outputs = logits.shape[1]
        if labels.max() >= outputs or labels.min() < 0:
            raise InputError(
                f"{self.loader.dataset.name} has {plural(len(self.loader.dataset.classes), 'class')} and the network "
                f"has {plural(outputs, 'output')}: give pictures of its classes"
            )
        refuse_not_finite(logits)

    def evaluation(self, jobs: int = 1) -> Evaluation:
        seconds = time.perf_counter() - self.start
        indices, labels, predictions = np.concatenate(self.parts, 1) if self.parts else np.zeros((3, 0), np.int64)
        order = np.argsort(indices)
        return Evaluation(
            images=self.meter.images,
            loss=math.fsum(self.losses) / self.meter.images if self.losses else math.nan,
            top1=self.meter.top1,
            top5=self.meter.top5,
            seconds=seconds,
            predictions=predictions[order],
            labels=labels[order],
            indices=indices[order],
            classes=self.loader.dataset.classes,
            problems=tuple(line for _, line in sorted(self.problems.items())),
            jobs=jobs,
        )


# ---- several processes ----


class _Deal(Loader):
    """Every ``of``-th batch of ``whole`` from number ``part`` on: the same pictures together as there."""

    def __init__(self, whole: Loader, part: int, of: int, workers: int | None = None) -> None:
        self.part, self.of = part, of
        shared = max(1, whole.workers // of) if whole.workers else 0
        super().__init__(
            whole.dataset,
            whole.transform,
            whole.batch_size,
            workers=shared if workers is None else workers,
            broken="drop",
            max_bad=whole.max_bad,
        )

    def __len__(self) -> int:
        return len(range(self.part, super().__len__(), self.of))

    def order(self, epoch: int) -> Labels:
        everything = super().order(epoch)
        starts = range(self.part * self.batch_size, len(everything), self.of * self.batch_size)
        return np.concatenate([everything[:0], *(everything[start : start + self.batch_size] for start in starts)])

    def refuse_too_many(self, problems: Mapping[int, str]) -> None:
        """Raise InputError if ``problems`` of all parts together are more than ``max_bad`` allows."""
        if self._are_too_many(problems):
            self._note_problems(problems)
            raise self._too_many_error()


@dataclass(frozen=True)
class _Work:
    """What a process has to do: open the checkpoint and answer its part of the batches."""

    checkpoint: Path
    engine: str | None  # that of a deployed file
    mode: Mode
    image_size: int | None
    dataset: Dataset
    transform: Transform
    batch_size: int
    workers: int
    max_bad: float
    part: int
    of: int

    def __call__(self, channel: Channel) -> None:
        import cv2

        cv2.setNumThreads(1)
        classifier = self.open()
        with _Deal(self.loader(), self.part, self.of) as loader:
            channel.wait_for_all()
            for answers in _answers(classifier.logits, loader):
                channel.send(answers)

    def open(self) -> Classifier:
        if self.engine is not None:
            return open_file(self.checkpoint, self.engine, threads=1)
        from mgq.engine.classifier.open import open_classifier

        return open_classifier(checkpoint=self.checkpoint, mode=self.mode, image_size=self.image_size)

    def loader(self) -> Loader:
        return Loader(
            self.dataset, self.transform, self.batch_size, workers=self.workers, broken="drop", max_bad=self.max_bad
        )


def _work_of(classifier: Classifier, loader: Loader, folder: Path) -> _Work:
    """What another process needs to do all of it; files that it reads may be written to ``folder``."""
    engine: str | None = None
    if classifier.file is not None:
        checkpoint, engine = classifier.file[0].absolute(), classifier.file[1]
    elif classifier.made_from is not None:
        source, engine = classifier.made_from
        checkpoint = write_for_backend(source, engine, folder)
    else:  # a copy, so that all have the weights that this process has, whatever becomes of the file they came from
        checkpoint = folder / "checkpoint.safetensors"
        classifier.write_checkpoint(checkpoint)
    return _Work(
        checkpoint,
        engine,
        classifier.mode,
        None if classifier.spec.only_size else classifier.image_size,
        loader.dataset,
        loader.transform,
        loader.batch_size,
        loader.workers,
        loader.max_bad,
        part=0,
        of=1,
    )


@dataclass(frozen=True)
class _InTeam:
    """The processes that MPI has started, as a group that measures together."""

    team: Team

    @property
    def share(self) -> tuple[int, int]:
        return self.team.rank, self.team.size

    def gather(self, thing: Thing) -> list[Thing]:
        return self.team.gather(thing)


@dataclass(frozen=True)
class _TeamWork:
    """The same for a process that may be on another machine: with the file's ``content``."""

    work: _Work
    content: bytes

    def __call__(self, team: Team) -> None:
        with temporary_folder() as folder:
            own = folder / self.work.checkpoint.name
            own.write_bytes(self.content)
            work = replace(self.work, checkpoint=own)
            classifier = work.open()
            with work.loader() as loader:
                evaluate_loader(classifier.logits, loader, group=_InTeam(team))


def _evaluate_in_team(
    team: Team, classifier: Classifier, loader: Loader, prepare: Callable[[], None], on_progress: OnProgress
) -> Evaluation:
    with temporary_folder() as folder:
        work = _work_of(classifier, loader, folder)
        send_work(team, _TeamWork(work, work.checkpoint.read_bytes()), prepare)
    return evaluate_loader(classifier.logits, loader, on_progress=on_progress, group=_InTeam(team))


def _evaluate_in_processes(
    classifier: Classifier, loader: Loader, jobs: int, prepare: Callable[[], None], on_progress: OnProgress
) -> Evaluation:
    tally = _Tally(loader, "evaluate", on_progress)
    whole = _Deal(loader, 0, 1)
    with temporary_folder() as folder:
        work = _work_of(classifier, loader, folder)
        tasks: list[Task] = [replace(work, part=part, of=jobs) for part in range(jobs)]
        threads = max(1, usable_cores() // jobs)
        running = run_in_processes(tasks, "the evaluation", threads, prepare, has_own_networks())
        with closing(running) as messages:
            for message in messages:
                if message is None:
                    tally.restart_clock()
                    continue
                tally.add(message)
                whole.refuse_too_many(tally.problems)
    return tally.evaluation(jobs)

"""Classifies images: decodes ahead in threads, runs in batches, gives one answer per image."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from mgq.data.decoding import bundled_cat
from mgq.data.image_sources import Source, expand
from mgq.data.transforms import to_batch
from mgq.deprecation import accept_old_keywords, find_renamed, warn_renamed
from mgq.engine.classifier.classifier import Classifier
from mgq.engine.classifier.network_choice import choose_network
from mgq.engine.classifier.network_options import NetworkOptions, Usage
from mgq.errors import InputError, plural
from mgq.events import OnProgress, Progress, log_progress
from mgq.machine import usable_cores
from mgq.quantization.option_names import Mode, parse_mode

if TYPE_CHECKING:
    from concurrent.futures import Future

BATCH = 16
FEW = 256
"""Up to this many images an engine that starts quickly is done before one that runs faster."""
SHOWN = 5
"""Classes of an answer, by default."""


@dataclass(frozen=True)
class ClassScore:
    """One class of an answer: its index, its name, its probability in 0..1."""

    index: int
    name: str
    probability: float


@dataclass(frozen=True)
class Prediction:
    """What the network says of one ``image`` (its path, not made printable).

    ``error`` says why it could not be asked; there are no ``scores`` then.
    ``milliseconds`` is the network's time for the picture, a batch's time shared evenly; decoding is not in it.
    """

    image: str
    scores: tuple[ClassScore, ...] = ()
    milliseconds: float = 0.0
    error: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain data: the error, or the scores and the time."""
        if self.error is not None:
            return {"picture": self.image, "error": self.error}
        guesses = [
            {"index": score.index, "class": score.name, "probability": round(score.probability, 6)}
            for score in self.scores
        ]
        return {"picture": self.image, "guesses": guesses, "milliseconds": round(self.milliseconds, 3)}

    @property
    def picture(self) -> str:
        """The old name of ``image``."""
        warn_renamed("picture", "image")
        return self.image

    @property
    def guesses(self) -> tuple[ClassScore, ...]:
        """The old name of ``scores``."""
        warn_renamed("guesses", "scores")
        return self.scores


def predict(
    classifier: Classifier, sources: Sequence[Source], topk: int | None = None, batch: int = BATCH
) -> Iterator[Prediction]:
    """One answer for each of ``sources``, in order, the most probable class first: ``topk`` classes, by default
    ``SHOWN`` or all where there are fewer.

    A picture that cannot be read gives an answer with an ``error``; the others are answered all the same. Memory
    does not grow with the number of pictures. Raises InputError for a ``topk`` that the network cannot give.
    """
    topk = check_topk(classifier, topk)
    for group in group_items(read_crops(classifier, sources), batch):
        crops = [crop for _, crop in group if isinstance(crop, np.ndarray)]
        start = time.perf_counter()
        logits = iter(classifier.logits(to_batch(crops)) if crops else ())
        milliseconds = (time.perf_counter() - start) * 1000 / max(1, len(crops))
        for source, crop in group:
            name = str(source.path or source.name)
            if isinstance(crop, InputError):
                yield Prediction(name, error=str(crop))
            else:
                yield Prediction(name, best_scores(next(logits), classifier.classes, topk), milliseconds)


def describe_network(classifier: Classifier) -> dict[str, Any]:
    """What a document of answers says of the network, as plain values."""
    return {
        "arch": classifier.spec.name,
        "mode": classifier.mode.value,
        "weights": classifier.origin,
        "image_size": classifier.image_size,
    }


def check_topk(classifier: Classifier, topk: int | None) -> int:
    """``topk``, or the usual number. Raises InputError where the network has fewer classes, and for less than 1."""
    classes = len(classifier.classes)
    topk = min(SHOWN, classes) if topk is None else topk
    if not 1 <= topk <= classes:
        raise InputError(f"top {topk} of {plural(classes, 'class')} is not possible: give 1 to {classes}")
    return topk


def best_scores(logits: npt.NDArray[np.float32], classes: Sequence[str], topk: int) -> tuple[ClassScore, ...]:
    """The ``topk`` most probable classes of one picture's logits (classes,), by softmax."""
    weights = np.exp(logits - logits.max())
    probabilities = weights / weights.sum()
    order = np.argsort(-logits, kind="stable")[:topk]
    return tuple(ClassScore(int(i), classes[i], float(probabilities[i])) for i in order)


def read_crops(
    classifier: Classifier, sources: Iterable[Source]
) -> Iterator[tuple[Source, npt.NDArray[np.uint8] | InputError]]:
    """Each source with the crop that ``classifier`` takes, uint8 (S, S, 3), or why there is none; decoded ahead."""

    def crop_of(source: Source) -> npt.NDArray[np.uint8] | InputError:
        try:
            return classifier.crop(source.read())
        except InputError as error:
            return error

    if isinstance(sources, list) and len(sources) == 1:
        yield sources[0], crop_of(sources[0])
        return
    from concurrent.futures import ThreadPoolExecutor

    waiting: deque[tuple[Source, Future[npt.NDArray[np.uint8] | InputError]]] = deque()
    with ThreadPoolExecutor(usable_cores()) as pool:
        for source in sources:
            waiting.append((source, pool.submit(crop_of, source)))
            if len(waiting) > 2 * BATCH:
                first, future = waiting.popleft()
                yield first, future.result()
        while waiting:
            first, future = waiting.popleft()
            yield first, future.result()


def group_items(
    items: Iterator[tuple[Source, npt.NDArray[np.uint8] | InputError]], size: int
) -> Iterator[list[tuple[Source, npt.NDArray[np.uint8] | InputError]]]:
    while group := list(islice(items, size)):
        yield group


@accept_old_keywords(pictures="images")
def infer(
    images: Sequence[str | Path] = (),
    arch: str | None = None,
    checkpoint: str | Path | None = None,
    mode: Mode | str | None = None,
    topk: int | None = None,
    on_progress: OnProgress = log_progress,
    key: str | None = None,
    engine: str | None = None,
) -> list[Prediction]:
    """Classify ``images`` (files, folders, glob patterns; by default the bundled cat) with one network.

    The network is chosen as ``mgq infer`` chooses it: ``checkpoint`` (``key``: one of several in it; a deployed file
    runs in ``engine``), else the newest run of ``arch`` under ``runs/``, else the zoo's pretrained weights. ``mode`` is
    int8, or what a deployed file is in, unless it is given. Returns one :class:`Prediction` for each image, in order.
    Raises InputError where there is no such network.
    """
    sources = expand([str(image) for image in images] or [str(bundled_cat())])
    options = NetworkOptions(arch, Path(checkpoint) if checkpoint is not None else None, key, engine=engine)
    usage = Usage(few=len(sources) <= FEW, kept=True)
    classifier = choose_network(options, parse_mode(mode) if mode is not None else None, usage, on_progress)
    found = []
    for answer in predict(classifier, sources, topk):
        found.append(answer)
        on_progress(Progress("classify", len(found), len(sources), "pictures"))
    return found


__getattr__ = find_renamed(__name__, {"Answer": "Prediction", "Guess": "ClassScore"})

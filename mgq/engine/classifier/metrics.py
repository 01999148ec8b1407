"""Cross entropy and top-k accuracy as running means that can be saved and resumed exactly."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mgq.errors import FailureError

Logits = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]

TOP = 5
"""The k of the second accuracy that is always given; less where there are fewer classes."""


def refuse_not_finite(logits: Logits) -> None:
    """Raises FailureError where one of ``logits`` is NaN or infinite: they give no answer."""
    if not np.isfinite(logits).all():
        raise FailureError("the network's answers are not finite numbers: its weights are damaged, take others")


def cross_entropy(logits: Logits, labels: Labels) -> npt.NDArray[np.float64]:
    """Each picture's loss in nats, -log softmax at its label: (N, C) and (N,) -> (N,), summed in float64."""
    shifted = logits.astype(np.float64) - logits.max(1, keepdims=True)
    own = np.take_along_axis(shifted, labels[:, None], 1)[:, 0]
    losses: npt.NDArray[np.float64] = np.log(np.exp(shifted).sum(1)) - own
    return losses


def ranks(logits: Logits, labels: Labels) -> Labels:
    """How many classes come before each picture's own, 0 for a right answer: (N, C) and (N,) -> (N,).

    Of equal logits the class of the lower index comes first. Where a logit is not a number, no answer is right:
    the rank is C.
    """
    own = np.take_along_axis(logits, labels[:, None], 1)
    equal_before = (logits == own) & (np.arange(logits.shape[1]) < labels[:, None])
    before = ((logits > own) | equal_before).sum(1)
    return np.where(np.isnan(logits).any(1), logits.shape[1], before)


@dataclass
class Meter:
    """Running means over pictures.

    ``loss`` is the mean in nats; ``top1`` and ``top5`` are percent, 0..100, ``top5`` for the first min(5, C) of C
    classes. All are NaN before the first picture.
    """

    images: int = 0
    loss_sum: float = 0.0
    correct1: int = 0
    correct5: int = 0

    def add(
        self, loss: float | npt.NDArray[np.float32] | npt.NDArray[np.float64], logits: Logits, labels: Labels
    ) -> None:
        """Count a batch: its mean ``loss`` or that of each picture (N,), float32 (N, C), int64 (N,)."""
        place = ranks(logits, labels)
        self.images += len(labels)
        # fsum rounds once, whatever the order of the pictures in the batch.
        self.loss_sum += float(loss) * len(labels) if np.ndim(loss) == 0 else math.fsum(np.asarray(loss).tolist())
        self.correct1 += int((place < 1).sum())
        self.correct5 += int((place < min(TOP, logits.shape[1])).sum())

    @property
    def loss(self) -> float:
        return self.loss_sum / self.images if self.images else math.nan

    @property
    def top1(self) -> float:
        return 100 * self.correct1 / self.images if self.images else math.nan

    @property
    def top5(self) -> float:
        return 100 * self.correct5 / self.images if self.images else math.nan

    def state(self) -> dict[str, int | float]:
        """All of it as plain numbers, which JSON keeps to the bit."""
        return {
            "images": self.images,
            "loss_sum": self.loss_sum,
            "correct1": self.correct1,
            "correct5": self.correct5,
        }

    @classmethod
    def add_up(cls, parts: Sequence[Meter]) -> Meter:
        """What ``parts`` have counted together."""
        counts = zip(*(part.state().values() for part in parts), strict=True)
        images, loss_sum, correct1, correct5 = (sum(count) for count in counts)
        return cls(int(images), float(loss_sum), int(correct1), int(correct5))

    @classmethod
    def from_state(cls, state: Mapping[str, int | float]) -> Meter:
        """The meter that ``state()`` came from; it goes on to the same numbers."""
        return cls(int(state["images"]), float(state["loss_sum"]), int(state["correct1"]), int(state["correct5"]))


def standard_error(percent: float, images: int) -> float:
    """The standard error of an accuracy of ``percent`` over ``images`` pictures, in points: a binomial's."""
    share = percent / 100
    return 100 * math.sqrt(share * (1 - share) / images) if images else math.nan

"""Finds the preprocessing with which an imported network has more right answers, where it has hardly any."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace

import numpy as np
import numpy.typing as npt
from megengine import Tensor

from mgq.data.datasets import Dataset, subset
from mgq.engine.classifier.classifier import Classifier
from mgq.engine.classifier.evaluate import evaluation_loader
from mgq.engine.classifier.evaluation_result import Evaluation
from mgq.engine.classifier.onnx_import import source_among
from mgq.engine.classifier.open import to_float
from mgq.quantization.modes import Mode
from mgq.zoo.input_contract import CONTRACTS, RAW, InputContract, contract_called

PICTURES = 64
FEWEST = 8
CLEARLY = 2.0
"""Standard errors."""
COLORS = 3


def advise_on_input(classifier: Classifier, dataset: Dataset, found: Evaluation) -> str | None:
    """A line where ``classifier`` was imported and ``found``, its answers to ``dataset``, are at the level of chance.

    It names what gives more on some of the pictures, or says that nothing does. None where all is well, and where it
    cannot be decided: grey images, few of them or of one class, deployed files.
    """
    had = contract_of(classifier)
    if had is None or found.images < FEWEST or not is_chance(found):
        return None
    normal = to_float(classifier) if classifier.fake_quantized is not None else classifier
    takes_pixels = bool(source_among(classifier.options).get("pixels"))
    known = {words_for(other, takes_pixels): other for other in candidates(takes_pixels)}
    shares = measure(normal, subset(dataset, PICTURES), had, known)
    pictures = f"{min(PICTURES, found.images)} of the pictures"
    best = max(shares, key=lambda words: shares[words])
    if shares[best] <= max(found.top1, most_by_chance(found, min(PICTURES, found.images))):
        others = "neither --rgb nor --bgr" if takes_pixels else "no --preprocess"
        return (
            f"top-1 is at the level of chance, and {others} gives more on {pictures}: are the names of the "
            "classes in the order of the outputs (--labels)?"
        )
    return (
        f"top-1 is at the level of chance with the input as {had.describe()}: on {pictures} {best} gives "
        f"{shares[best]:.1f} %; pass it with -c FILE.onnx"
    )


def contract_of(classifier: Classifier) -> InputContract | None:
    """The input contract that an imported color network was opened with."""
    source = source_among(classifier.options)
    wish = source.get("wish")
    is_here = classifier.file is None and (classifier.mode is Mode.NORMAL or classifier.fake_quantized is not None)
    if not is_here or not isinstance(wish, dict) or source.get("channels", COLORS) != COLORS:
        return None
    name = RAW if source.get("pixels") else wish.get("preprocess")
    return contract_called(name, wish.get("mean"), wish.get("std"), wish.get("order"))


def chance_of(found: Evaluation) -> float:
    """Percent of right answers by guessing among the classes of which there were pictures."""
    return 100 / len(np.unique(found.labels))


def most_by_chance(found: Evaluation, images: int) -> float:
    """The percent of right answers to so many ``images`` that is no clear sign of more than guessing."""
    chance = chance_of(found)
    return chance + CLEARLY * float(np.sqrt(chance * (100 - chance) / images))


def is_chance(found: Evaluation) -> bool:
    return len(np.unique(found.labels)) > 1 and found.top1 <= most_by_chance(found, found.images)


def candidates(takes_pixels: bool = False) -> Iterator[InputContract]:
    """What a file may be fed: where it ``takes_pixels``, these alone."""
    for contract in [CONTRACTS[RAW]] if takes_pixels else CONTRACTS.values():
        yield contract
        yield replace(contract, order="bgr" if contract.order == "rgb" else "rgb")


def words_for(contract: InputContract, takes_pixels: bool = False) -> str:
    """The command-line options that mean ``contract``."""
    is_usual = contract.order == CONTRACTS[contract.name].order
    if takes_pixels:
        return f"--{contract.order}"
    return f"--preprocess {contract.name}" + ("" if is_usual else f" --{contract.order}")


def measure(
    classifier: Classifier, dataset: Dataset, had: InputContract, known: dict[str, InputContract]
) -> dict[str, float]:
    """Percent of right answers of the float ``classifier``, whose input is folded as ``had``, with each contract."""
    right, images = dict.fromkeys(known, 0), 0
    with closing(evaluation_loader(classifier, dataset, max_bad=1.0)) as loader:
        for batch in loader:
            images += len(batch.labels)
            for words, other in known.items():
                answers = logits_fed(classifier, batch.images, had, other).argmax(1)
                right[words] += int((answers == batch.labels).sum())
    return {words: 100 * count / max(images, 1) for words, count in right.items()}


def logits_fed(
    classifier: Classifier, images: npt.NDArray[np.uint8], had: InputContract, other: InputContract
) -> npt.NDArray[np.float32]:
    """Logits (N, classes) to ``images``, uint8 (N, 3, H, W) in BGR, as if ``other`` had been folded in, not ``had``.

    It is exact but around pictures. Pixels are changed so that the file's own input is what ``other`` makes of them.
    """
    weight, shift = other.matrix(COLORS)
    own, own_shift = had.matrix(COLORS)
    change = np.linalg.inv(own)
    moved = change @ (shift - own_shift)
    pixels = images.astype(np.float64) - 128
    fed = np.einsum("ck,nkhw->nchw", change @ weight, pixels) + moved[:, None, None]
    result: npt.NDArray[np.float32] = classifier.network(Tensor(fed.astype(np.float32))).numpy()
    return result

"""Options that describe an ONNX file of another program: its preprocessing, size and labels."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from mgq.engine.classifier.import_wish import ImportWish
from mgq.errors import InputError, printable

LARGEST_SIDE = 4096
Preprocess = Annotated[
    str | None,
    typer.Option(
        "--preprocess",
        metavar="torch|tf|caffe|raw",
        help="Preprocessing of the ONNX file: ImageNet's mean and std, -1 to 1, BGR minus the mean, or raw pixels.",
        show_default="torch",
    ),
]
Mean = Annotated[
    str | None,
    typer.Option("--mean", metavar="R,G,B", help="Mean in the preprocessing, for pixels up to 255 or up to 1."),
]
Std = Annotated[
    str | None,
    typer.Option("--std", metavar="R,G,B", help="Standard deviation in it, for pixels up to 255 or up to 1."),
]
Order = Annotated[
    bool | None,
    typer.Option("--rgb/--bgr", help="Order of the channels that the ONNX file takes.", show_default=False),
]
Size = Annotated[
    str | None,
    typer.Option("--size", metavar="HxW", help="Input size of the ONNX file, where that is open: 224, 48x192."),
]
Labels = Annotated[
    Path | None,
    typer.Option("--labels", help="Class names of the ONNX file: one a line, or a list in JSON."),
]
Scores = Annotated[
    str | None,
    typer.Option(
        "--scores", metavar="NAME", help="Output of the ONNX file with a number for each class, where it has several."
    ),
]
KeepInput = Annotated[
    bool,
    typer.Option("--keep-input", help="The int8 file takes the float input that the ONNX file took, not uint8 pixels."),
]


@dataclass(frozen=True, kw_only=True)
class ImportOptions:
    """The options together: each verb that takes a float ONNX file inherits them.

    Their annotations are values here, not text, so that a verb's own module need not know their names.
    """

    preprocess: Preprocess = None
    mean: Mean = None
    std: Std = None
    rgb: Order = None
    size: Size = None
    labels: Labels = None
    scores: Scores = None

    def import_wish(self) -> ImportWish:
        """The options as one value. Raises InputError for numbers and sizes that are none."""
        order = None if self.rgb is None else "rgb" if self.rgb else "bgr"
        mean, std = numbers_in(self.mean, "--mean"), numbers_in(self.std, "--std")
        return ImportWish(self.preprocess, mean, std, order, size_in(self.size), self.labels, self.scores)


def numbers_in(text: str | None, option: str) -> tuple[float, ...] | None:
    if text is None:
        return None
    try:
        numbers = tuple(float(part) for part in text.split(","))
    except ValueError:
        numbers = (math.nan,)
    if not all(map(math.isfinite, numbers)):
        said = printable(text)[:80]
        raise InputError(f"{option} '{said}' are no numbers: write them as 0.485,0.456,0.406")
    return numbers


def size_in(text: str | None) -> tuple[int, int] | None:
    """Height and width. Raises InputError where ``text`` is none."""
    if text is None:
        return None
    parts = text.lower().split("x")
    if len(parts) > 2 or not all(part.isdecimal() and 1 <= int(part[:6]) <= LARGEST_SIDE for part in parts):
        raise InputError(f"--size '{printable(text)[:80]}' is no size: write it as 224, or as 48x192 (height x width)")
    return int(parts[0]), int(parts[-1])

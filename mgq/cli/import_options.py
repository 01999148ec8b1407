"""Options that describe an ONNX file of another program: its preprocessing, size and labels."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from mgq.engine.classifier.import_wish import ImportWish
from mgq.errors import InputError, printable

LARGEST_SIDE = 4096
Preprocess = Annotated[
    str | None,
    typer.Option(
        "--preprocess",
        metavar="torch|tf|caffe|raw",
        help="What it was fed: ImageNet's mean and std, -1 to 1, BGR minus the mean, or pixels as they are.",
        show_default="torch",
    ),
]
Mean = Annotated[
    str | None,
    typer.Option("--mean", metavar="R,G,B", help="Taken off pixels, of 255 or of 1."),
]
Std = Annotated[
    str | None,
    typer.Option("--std", metavar="R,G,B", help="Pixels are divided by it, of 255 or of 1."),
]
Order = Annotated[
    bool | None,
    typer.Option("--rgb/--bgr", help="The order of its channels.", show_default=False),
]
Size = Annotated[
    str | None,
    typer.Option("--size", metavar="HxW", help="Pixels, where the file leaves them open: 224, 48x192."),
]
Labels = Annotated[
    Path | None,
    typer.Option("--labels", help="Names of its classes: one a line, or a list in JSON."),
]


@dataclass(frozen=True, kw_only=True)
class ImportOptions:
    """The options together, for each verb that takes a float ONNX file."""

    preprocess: Preprocess = None
    mean: Mean = None
    std: Std = None
    rgb: Order = None
    size: Size = None
    labels: Labels = None

    def wish(self) -> ImportWish:
        """The options as one value. Raises InputError for numbers and sizes that are none."""
        order = None if self.rgb is None else "rgb" if self.rgb else "bgr"
        mean, std = numbers_in(self.mean, "--mean"), numbers_in(self.std, "--std")
        return ImportWish(self.preprocess, mean, std, order, size_in(self.size), self.labels)


NONE_GIVEN = ImportOptions()
PARAMETER = "imported"


def spread_import_options(verb: Callable[..., Any]) -> Callable[..., Any]:
    """``verb``; where it has a parameter ``imported``, the fields of :class:`ImportOptions` are options of it instead.

    Typer knows plain options alone.
    """
    own = inspect.signature(verb, eval_str=True).parameters
    if PARAMETER not in own:
        return verb
    shared = inspect.signature(ImportOptions, eval_str=True).parameters

    @functools.wraps(verb)
    def command(**given: Any) -> Any:
        imported = ImportOptions(**{name: given.pop(name) for name in shared})
        return verb(**given, **{PARAMETER: imported})

    entries = [entry for name, entry in own.items() if name != PARAMETER] + list(shared.values())
    typed = [entry.replace(kind=entry.KEYWORD_ONLY) for entry in entries]
    command.__annotations__ = {entry.name: entry.annotation for entry in typed}
    command.__signature__ = inspect.Signature(typed)  # type: ignore[attr-defined]
    return command


def numbers_in(text: str | None, option: str) -> tuple[float, ...] | None:
    if text is None:
        return None
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        said = printable(text)[:80]
        raise InputError(f"{option} '{said}' are no numbers: write them as 0.485,0.456,0.406") from None


def size_in(text: str | None) -> tuple[int, int] | None:
    """Height and width. Raises InputError where ``text`` is none."""
    if text is None:
        return None
    parts = text.lower().split("x")
    if len(parts) > 2 or not all(part.isdecimal() and 1 <= int(part[:6]) <= LARGEST_SIDE for part in parts):
        raise InputError(f"--size '{printable(text)[:80]}' is no size: write it as 224, or as 48x192 (height x width)")
    return int(parts[0]), int(parts[-1])

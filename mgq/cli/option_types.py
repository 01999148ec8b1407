"""What options may say: each kind of value refuses what cannot be before anything heavy is loaded, and completes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

from mgq.errors import InputError, no_such, printable

NAME_METAVAR = {"architecture": "arch", "version of pretrained weights": "version"}
"""What help calls a value whose kind has a long name."""


class Named(click.ParamType[str]):
    """One of the names that ``names`` gives, of a ``kind`` of things; ``listed`` says what lists them if they are many.

    They are asked for only when a value is read or completed.
    """

    def __init__(self, kind: str, names: Callable[[], Iterable[str]], listed: str = "") -> None:
        self.name, self.kind, self.names, self.listed = NAME_METAVAR.get(kind, kind), kind, names, listed

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        names = list(self.names())
        if value not in names:
            raise no_such(self.kind, str(value), names, self.listed)
        return value

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        return [CompletionItem(name) for name in self.names() if name.startswith(incomplete)]


class Number(click.ParamType[float]):
    """A finite number from ``least`` to ``most``, whole if these are; ``above``: more than ``least``."""

    def __init__(
        self, kind: type[int] | type[float], least: float = -math.inf, most: float = math.inf, above: bool = False
    ) -> None:
        self.kind, self.least, self.most, self.above = kind, least, most, above
        self.name = "integer" if kind is int else "number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        flag = f"{flag_of(param)} {printable(value)}"
        try:
            number = self.kind(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise InputError(f"{flag} is not a {'whole ' if self.kind is int else ''}number: {self.mend()}")
        if number < self.least or (self.above and number == self.least):
            raise InputError(f"{flag} is too small: {self.mend()}")
        if number > self.most:
            raise InputError(f"{flag} is too large: {self.mend()}")
        return self.checked(number, flag)

    def mend(self) -> str:
        if math.isfinite(self.least) and math.isfinite(self.most):
            return f"give {self.least:g} to {self.most:g}"
        if math.isfinite(self.least):
            return f"give more than {self.least:g}" if self.above else f"give at least {self.least:g}"
        return "give one, such as 3"

    def checked(self, number: float, flag: str) -> float:
        return number


class Pixels(Number):
    """The side of a picture that a network can take."""

    def __init__(self) -> None:
        super().__init__(int)

    def checked(self, number: float, flag: str) -> float:
        from mgq.weights.checkpoint import check_size

        return check_size(int(number))


class Folder(click.Path):
    """A folder that is there or can be made: a file is none."""

    name = "folder"

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        path = Path(value)
        if path.exists() and not path.is_dir():
            raise InputError(f"{flag_of(param)} {printable(path)} is a file: give a folder")
        return path


def flag_of(param: click.Parameter | None) -> str:
    """The long form of an option."""
    return max(param.opts, key=len) if param is not None else "the value"


# ---- names, each from where it is known ----


def archs() -> Iterable[str]:
    from mgq.zoo.registry import specs

    return specs()


def versions() -> Iterable[str]:
    from mgq.zoo.pretrained import DEFAULT_VERSION
    from mgq.zoo.registry import specs

    return dict.fromkeys([DEFAULT_VERSION, *(found for spec in specs().values() for found in spec.versions)])


def modes() -> Iterable[str]:
    from mgq.quantization.option_names import Mode

    return [mode.value for mode in Mode]


def targets() -> Iterable[str]:
    from mgq.quantization.option_names import TARGETS

    return TARGETS


def methods() -> Iterable[str]:
    from mgq.quantization.option_names import METHODS

    return METHODS


def observers() -> Iterable[str]:
    from mgq.quantization.option_names import OBSERVERS

    return OBSERVERS


def qualities() -> Iterable[str]:
    from mgq.quantization.option_names import QUALITIES

    return QUALITIES


def engines() -> Iterable[str]:
    from mgq.runtime.registry import backend_names

    return backend_names()


def formats() -> Iterable[str]:
    from mgq.export.formats import SUFFIXES

    return SUFFIXES


def inputs() -> Iterable[str]:
    from mgq.export.formats import INPUTS

    return INPUTS


def cpus() -> Iterable[str]:
    from mgq.export.native.cpu import cpu_names

    return cpu_names()


def schedules() -> Iterable[str]:
    from mgq.engine.training.recipe import SCHEDULES

    return SCHEDULES


def loads() -> Iterable[str]:
    from mgq.bench.settings import Load

    return [load.value for load in Load]


ARCH = Named("architecture", archs, "`mgq models` lists them all")
PRETRAINED = Named("version of pretrained weights", versions, "`mgq models` lists them")
MODE = Named("mode", modes)
TARGET = Named("target", targets)
METHOD = Named("method", methods)
OBSERVER = Named("observer", observers)
QUALITY = Named("quality", qualities)
ENGINE = Named("engine", engines)
FORMAT = Named("format", formats)
INPUT = Named("input", inputs)
CPU = Named("cpu", cpus)
SCHEDULE = Named("schedule", schedules)
LOAD = Named("load", loads)

COUNT = Number(int, 1)
AT_LEAST_NONE = Number(int, 0)
SHARE = Number(float, 0, 1)
AT_LEAST_ZERO = Number(float, 0)
FACTOR = Number(float, 0, above=True)
PIXELS = Pixels()
FOLDER = Folder()

"""Types of option values: each checks its value before anything heavy is imported, and completes it in the shell."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

from mgq.errors import InputError, no_such, printable
from mgq.io.bounds import ANY, Bounds

NAME_METAVAR = {"architecture": "arch", "version of pretrained weights": "version"}
"""What help calls a value whose kind has a long name."""


class NameOption(click.ParamType[str]):
    """One of the names that ``names`` returns. ``kind`` is what they name, ``listed`` the command that lists them.

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


class ArchName(NameOption):
    """The name of an architecture, or ``FILE.py:FUNCTION``: that file is run, and its network known by the function."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if ".py:" in str(value) or str(value).endswith(".py"):
            from mgq.system.megengine_start import import_megengine

            import_megengine()
            from mgq.zoo.own_networks import register_from_file

            return register_from_file(str(value)).name
        return super().convert(value, param, ctx)


class Number(click.ParamType[float]):
    """A finite number within ``bounds``, whole if ``kind`` is int."""

    def __init__(self, kind: type[int] | type[float], bounds: Bounds = ANY) -> None:
        self.kind, self._bounds = kind, bounds
        self.name = "integer" if kind is int else "number"

    @property
    def bounds(self) -> Bounds:
        return self._bounds

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        flag = flag_of(param)
        try:
            number = self.kind(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            what = "whole number" if self.kind is int else "number"
            raise InputError(f"{flag} {printable(value)} is not a {what}: {self.bounds.mend}")
        self.bounds.refuse_beyond(flag, number)
        return number


class RecipeNumber(Number):
    """The number ``key`` of a recipe, which says what bounds it."""

    def __init__(self, kind: type[int] | type[float], key: str) -> None:
        super().__init__(kind)
        self.key = key

    @property
    def bounds(self) -> Bounds:
        from mgq.engine.training.recipe import Recipe
        from mgq.io.records import bounds_of

        return bounds_of(Recipe)[self.key]


class Pixels(Number):
    """The side of a picture that a network can take."""

    def __init__(self) -> None:
        super().__init__(int)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        from mgq.weights.checkpoint import check_size

        return check_size(super().convert(value, param, ctx))


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


def forms() -> Iterable[str]:
    from mgq.quantization.option_names import ENGINE_FORMS

    return ENGINE_FORMS


def inputs() -> Iterable[str]:
    from mgq.export.formats import INPUTS

    return INPUTS


def cpus() -> Iterable[str]:
    from mgq.export.native.cpu import cpu_names

    return cpu_names()


def schedules() -> Iterable[str]:
    from mgq.engine.training.recipe import SCHEDULES

    return SCHEDULES


def compressions() -> Iterable[str]:
    from mgq.engine.training.recipe import COMPRESSIONS

    return COMPRESSIONS


def loads() -> Iterable[str]:
    from mgq.bench.settings import Load

    return [load.value for load in Load]


ARCH = ArchName("architecture", archs, "`mgq models` lists them all")
PRETRAINED = NameOption("version of pretrained weights", versions, "`mgq models` lists them")
MODE = NameOption("mode", modes)
TARGET = NameOption("target", targets)
METHOD = NameOption("method", methods)
OBSERVER = NameOption("observer", observers)
QUALITY = NameOption("quality", qualities)
ENGINE = NameOption("engine", engines)
FORMAT = NameOption("format", formats)
FORM = NameOption("engine", forms)
INPUT = NameOption("input", inputs)
CPU = NameOption("cpu", cpus)
SCHEDULE = NameOption("schedule", schedules)
LOAD = NameOption("load", loads)
COMPRESSION = NameOption("compression", compressions)

COUNT = Number(int, Bounds(1))
BATCH = Number(int, Bounds(0, 65_536))
PORT = Number(int, Bounds(0, 65535))
AT_LEAST_NONE = Number(int, Bounds(0))
SHARE = Number(float, Bounds(0, 1))
AT_LEAST_ZERO = Number(float, Bounds(0))
FACTOR = Number(float, Bounds(0, above=True))
PIXELS = Pixels()
FOLDER = Folder()

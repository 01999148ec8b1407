"""Makes HTML pages from templates; all text is escaped.

The templates lie in ``templates/``. Modules beside this one make what they show, as plain values.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
from markupsafe import Markup

from mgq.errors import InputError, printable
from mgq.io.atomic import refuse_unwritable_folder

# Okabe and Ito's colours, told apart by the colour-blind, too; in the dark their lighter sisters.
BLUE, ORANGE, GREEN, GREY, RULE = "var(--blue)", "var(--orange)", "var(--green)", "var(--grey)", "var(--rule)"


class Link(NamedTuple):
    """Words that lead to ``href`` on the same page."""

    href: str
    words: str


@dataclass(frozen=True)
class Table:
    """A table that scrolls where it is too wide. Lines of a head are divided by newlines.

    Cells are words, numbers, links or drawings. The first one of a row is its head; ``names`` columns are words.
    """

    caption: str
    heads: Sequence[str]
    rows: Iterable[Sequence[object]]
    names: int = 1


def render(template: str, **values: Any) -> str:
    """The page that ``template`` makes of ``values``: HTML 5, in itself complete."""
    return templates().get_template(template).render(values)


@cache
def templates() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("mgq.reports"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=clean_value,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"fixed": format_fixed, "base64": lambda data: base64.b64encode(data).decode()}
    return environment


def clean_value(value: object) -> object:
    """``value`` as a page can have it, before it is escaped: without control characters."""
    return value if isinstance(value, Markup) else printable(value)


def format_fixed(value: float, digits: int = 1) -> str:
    return f"{value:.{digits}f}"


def check_page_path(path: Path, option: str = "--html") -> Path:
    """``path``, given by ``option``, if a page can be written there: found out before the work, which takes minutes.

    Makes no folder. Raises InputError.
    """
    refuse_unwritable_folder(path.absolute().parent)
    if path.is_dir():
        raise InputError(f"{option} {printable(path)} is a folder: give the name of a file")
    return path

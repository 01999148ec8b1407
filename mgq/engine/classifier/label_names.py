"""The names of an imported network's classes: of a file that the user gives, of the ONNX file itself, or ImageNet's."""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mgq.data.imagenet_classes import imagenet_classes
from mgq.engine.classifier.classifier import class_names
from mgq.errors import InputError, plural, printable
from mgq.io.limited_io import text_of

BACKGROUND = 1001
LONGEST_NAMES = 1 << 22
SHOWN = 3
"""So many names are said."""
KEYS = ("names", "class_names", "classes", "labels", "id2label", "character")
"""Under which exporters keep them in the metadata of a file: Ultralytics the first, Paddle's OCR tools the last."""


def names_for(classes: int, labels: Path | None, metadata: Mapping[str, str]) -> tuple[tuple[str, ...], str | None]:
    """The names in the file ``labels``; else those in the ``metadata`` of the ONNX file, and under which key; else
    ImageNet's for 1,000 outputs, and for 1,001 with a background before them; else numbers.

    Raises InputError where there are not as many names in ``labels``.
    """
    if labels is not None:
        return check_names(names_in_file(labels), labels, classes), None
    for key in KEYS:
        found = names_in_metadata(metadata.get(key, ""))
        if found and len(set(found)) == len(found) == classes:
            return found, key
    if classes == BACKGROUND:
        return ("background", *(entry.name for entry in imagenet_classes())), None
    return class_names(classes), None


def names_in_metadata(text: str) -> tuple[str, ...]:
    """Those in ``text``: a list or a mapping of numbers as JSON or as Python writes it, or a name a line; none where it
    is something else."""
    if len(text) > LONGEST_NAMES:
        return ()
    for read in (json.loads, ast.literal_eval):
        try:
            return names_among(read(text))
        except (ValueError, TypeError, LookupError, SyntaxError, RecursionError, MemoryError):
            continue
    lines = names_in_text(text, False)
    return lines if len(lines) > 1 else ()


def count_names(labels: Path | None, metadata: Mapping[str, str]) -> int | None:
    """How many classes are named by ``labels``, or else in ``metadata``; None where none are."""
    if labels is not None:
        return len(names_in_file(labels))
    return next((len(found) for key in KEYS if (found := names_in_metadata(metadata.get(key, "")))), None)


def names_in_file(path: Path) -> tuple[str, ...]:
    """A name a line, or a list in JSON, or an object of numbers and names."""
    shown = printable(path)
    try:
        text = text_of(path, LONGEST_NAMES)
        return names_in_text(text, path.suffix.lower() == ".json")
    except OSError as error:
        raise InputError(f"cannot read the names {shown}: {error.strerror}; check the path") from None
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        raise InputError(f"{shown} is no list of class names: one a line, or a list in JSON") from None


def check_names(found: tuple[str, ...], path: Path, classes: int) -> tuple[str, ...]:
    """``found`` in the file ``path``. Raises InputError where these are not one for each of ``classes``."""
    if len(found) != classes:
        raise InputError(
            f"{printable(path)} has {plural(len(found), 'name')} for a network of {plural(classes, 'class')}: "
            "give one for each, in the order of its outputs"
        )
    if len(set(found)) != len(found):
        name = next(name for name in found if found.count(name) > 1)
        raise InputError(
            f"{printable(path)} gives the name '{printable(name)}' to {plural(found.count(name), 'class')}: "
            f"tell them apart, as in '{printable(name)} 1' and '{printable(name)} 2'"
        )
    return found


def names_in_text(text: str, is_json: bool) -> tuple[str, ...]:
    if not is_json:
        return tuple(line.strip() for line in text.splitlines() if line.strip())
    return names_among(json.loads(text))


def names_among(body: Any) -> tuple[str, ...]:
    """The names in ``body``: a list of them, or of lists that end in them, or a mapping of numbers. Raises TypeError or
    ValueError for anything else."""
    if isinstance(body, dict):
        body = [body[key] for key in sorted(body, key=int)]
    if not isinstance(body, Sequence) or isinstance(body, str):
        raise TypeError
    names = [entry[-1] if isinstance(entry, list) else entry for entry in body]
    if not all(isinstance(name, str) for name in names):
        raise TypeError
    return tuple(names)


def join_names(names: Sequence[str]) -> str:
    """The first of ``names``, and how many there are more."""
    shown = ", ".join(printable(name) for name in names[:SHOWN])
    return shown if len(names) <= SHOWN else f"{shown} and {len(names) - SHOWN} more"

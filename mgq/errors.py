"""The two ways a command can end badly. Every room raises these; only the command line prints them."""

from __future__ import annotations

import contextlib
import difflib
import re
import unicodedata
from collections.abc import Iterable, Iterator


class MgqError(Exception):
    """Base of the errors whose message is one line for the user: it names the thing and the mend."""

    exit_code = 1
    is_said = False
    """Whether the line stands already where the user sees it."""


class InputError(MgqError):
    """Wrong use or bad input (exit code 2): a file, a name or an option that the user can correct."""

    exit_code = 2


class FailureError(MgqError):
    """The input was fine and the work still failed (exit code 1): a full disk, a check that did not hold."""


@contextlib.contextmanager
def name_in_errors(thing: str) -> Iterator[None]:
    """Inside, the line of an InputError begins with ``thing``, such as a file with an invalid value."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{thing}: {error}") from None


# Control characters, surrogates (bytes of a file name that are not UTF-8), ends of lines and paragraphs.
_UNPRINTABLE = frozenset({"Cc", "Cs", "Zl", "Zp"})
# Those that turn the direction of what follows: a name could show another one.
_TURNING = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def printable(thing: object) -> str:
    """``str(thing)`` as it can stand in a one-line message: control characters and lone surrogates are escaped."""
    return "".join(
        c.encode("unicode_escape").decode() if unicodedata.category(c) in _UNPRINTABLE or c in _TURNING else c
        for c in str(thing)
    )


def shorten(text: str, most: int) -> str:
    """``text``, or as much of it as ``most`` characters hold, with a sign that there is more."""
    return text if len(text) <= most else f"{text[: most - 1]}…"


def plural(number: int, noun: str, form: str = "") -> str:
    """``number``, written as ``form`` says, and ``noun`` as it goes with that: ``1 class``, ``2 classes``."""
    if number != 1:
        noun = f"{noun[:-2]}es" if noun.endswith("is") else f"{noun}es" if noun.endswith(("s", "ch")) else f"{noun}s"
    return f"{number:{form}} {noun}"


def format_size(size: int) -> str:
    """A ``size`` in bytes, in words: as kB where it is so small that MB would say 0."""
    return f"{size / 1e6:.1f} MB" if size >= 100_000 else f"{size / 1e3:.1f} kB"


_ADDRESS = re.compile(r"(?:^|.*/)(https?|ftp|s3|gs|file):/+(.+)", re.DOTALL)
"""The address in a path that was made of one, which leaves a single slash and may put the working folder in front."""


def no_such_path(path: object, mend: str = "check the path") -> InputError:
    """The error for a ``path`` where nothing is; an address is told from a path."""
    found = _ADDRESS.fullmatch(str(path))
    if found is None:
        return InputError(f"{printable(path)} does not exist: {mend}")
    scheme, rest = found.groups()
    if scheme == "file":
        return InputError(printable(f"file:///{rest} is an address and not a path: give the path alone, /{rest}"))
    return InputError(printable(f"{scheme}://{rest} is an address and not a path: download it, then give its path"))


LONGEST_SHOWN = 80
"""The most characters of an unknown name that are compared with known ones."""


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The one of ``known`` that ``name`` may be a slip of; None where it is like none."""
    return next(iter(difflib.get_close_matches(name[:LONGEST_SHOWN], list(known), n=1, cutoff=0.5)), None)


def no_such(kind: str, name: str, known: Iterable[str], listed: str = "") -> InputError:
    """The error for a ``name`` that is none of ``known``: suggests the nearest, lists them or says what does."""
    known = list(known)
    near = nearest(name, known)
    hint = f"did you mean {near}? " if near else ""
    listed = listed or f"choose {', '.join(known)}"
    return InputError(f"there is no {kind} '{printable(name)[:LONGEST_SHOWN]}'; {hint}{listed}")

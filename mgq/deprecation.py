"""Old names of the public interface: they work for one more release, with a warning."""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


def warn_renamed(old: str, new: str, stacklevel: int = 3) -> None:
    """Say where ``old`` is used that it is called ``new`` now; ``stacklevel`` counts from here to that line."""
    line = f"{old} is now called {new}; the old name will be removed in the next release"
    warnings.warn(line, DeprecationWarning, stacklevel=stacklevel)


def find_renamed(module: str, names: Mapping[str, str]) -> Callable[[str], Any]:
    """The ``__getattr__`` of ``module``, for names old -> new of what is in it."""

    def find(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module '{module}' has no attribute '{name}'")
        warn_renamed(f"{module}.{name}", names[name])
        return getattr(sys.modules[module], names[name])

    return find


def accept_old_keywords(**renamed: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Lets a function take its keywords by their old names, too: ``old="new"``."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def call(*args: P.args, **words: P.kwargs) -> R:
            for old in renamed.keys() & words.keys():
                warn_renamed(f"{function.__name__}({old}=)", f"{renamed[old]}=")
                words[renamed[old]] = words.pop(old)
            return function(*args, **words)

        return call

    return decorate

"""Checks numbers against bounds, and words the error for one outside them."""

from __future__ import annotations

import math
from typing import NamedTuple

from mgq.errors import InputError, printable

LONGEST_SHOWN = 40
"""Characters of a number in a line."""


class Bounds(NamedTuple):
    """From ``least`` to ``most``; ``above``: more than ``least``; ``below``: less than ``most``."""

    least: float = -math.inf
    most: float = math.inf
    above: bool = False
    below: bool = False

    @property
    def mend(self) -> str:
        """What to give, in words."""
        if self.least == -math.inf:
            return "give one, such as 3"
        if self.most == math.inf:
            return f"give more than {self.least:,}" if self.above else f"give at least {self.least:,}"
        low = f"more than {self.least:,}" if self.above else f"{self.least:,}"
        return f"give {low} to {'less than ' if self.below else ''}{self.most:,}"

    def refuse_beyond(self, flag: str, number: float) -> None:
        """Raises InputError, which names ``flag``, for a ``number`` that is not within, or not finite."""
        shown = f"{flag} {printable(number)[:LONGEST_SHOWN]}"
        if isinstance(number, float) and not math.isfinite(number):
            raise InputError(f"{shown} is not possible: {self.mend}")
        if number < self.least or (self.above and number == self.least):
            raise InputError(f"{shown} is too small: {self.mend}")
        if number > self.most or (self.below and number == self.most):
            raise InputError(f"{shown} is too large: {self.mend}")


ANY = Bounds()

"""How wide something is that rich draws."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

_ENDLESS = 1_000_000


def measure_unfolded(drawn: RenderableType, to: Console) -> int:
    """The characters that ``drawn`` takes where nothing has to be folded."""
    from rich.measure import Measurement

    return Measurement.get(to, to.options.update(width=_ENDLESS), drawn).maximum

"""How large pictures may be, and how one is refused that is too large, cut short or damaged."""

from __future__ import annotations

MAX_SIDE = 20_000
"""The most pixels a picture may have on a side."""
MAX_PIXELS = 100_000_000
"""The most pixels a picture of any format may have altogether (300 MB decoded)."""
MAX_MEMORY = 800_000_000
"""The most bytes that decoding a picture may take, which sets a lower limit than ``MAX_PIXELS`` to most formats."""
MAX_BYTES = 200_000_000
"""The most bytes a picture's file may have."""


class RefusalError(Exception):
    """Why a picture is not read: the end of a sentence that begins with its name."""


CUT_SHORT = "is cut short: copy or download it again"
DAMAGED = "is damaged or cut short: copy or download it again"
TOO_HEAVY = f"is larger than {MAX_BYTES // 1_000_000} MB, the most that is read: save it smaller"


def admit(cost: int, width: int, height: int) -> None:
    """Refuse a size that no picture has, or that is too large to decode at ``cost`` bytes a pixel."""
    if width < 1 or height < 1:
        raise RefusalError(DAMAGED)
    for way, extent in (("wide", width), ("high", height)):
        if extent > MAX_SIDE:
            raise RefusalError(
                f"is {extent:,} pixels {way}, and at most {MAX_SIDE:,} on a side are read: scale it down"
            )
    most = min(MAX_PIXELS, MAX_MEMORY // cost)
    if width * height > most:
        raise RefusalError(f"is {width:,} x {height:,} pixels, and at most {most:,} in all are read: scale it down")

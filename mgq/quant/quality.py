"""How much time calibration may take: three sets of steps, by name."""

from __future__ import annotations

from dataclasses import dataclass

from mgq.errors import no_such


@dataclass(frozen=True)
class Steps:
    """What calibration does: how ranges are chosen (``method``), and what else is done to the network."""

    method: str
    correct_bias: bool = True
    compensate: bool = True
    equalize: bool = True


QUALITIES: dict[str, tuple[Steps, ...]] = {
    "fast": (Steps("min-max", compensate=False, equalize=False),),
    "balanced": (Steps("mse"),),
    "best": (Steps("mse"), Steps("mse", equalize=False), Steps("min-max"), Steps("histogram")),
}
"""Name -> the ways that are tried; of several, that is kept whose logits are nearest to float's."""
DEFAULT_QUALITY = "balanced"


def steps_of(quality: str) -> tuple[Steps, ...]:
    """Raises InputError, which lists them, where there is no ``quality``."""
    if quality not in QUALITIES:
        raise no_such("quality", quality, QUALITIES)
    return QUALITIES[quality]

"""Formats amounts with their units for progress bars."""

from __future__ import annotations


def counted(amount: float, unit: str) -> str:
    """``amount`` of ``unit``, bytes as kB and MB."""
    if unit == "B":
        from rich.filesize import decimal

        return decimal(int(amount))
    return f"{amount:,.0f}"

"""``mgq models``: the zoo as a table."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from mgq.cli.options import RUNS, AsJson, Save

if TYPE_CHECKING:
    from pathlib import Path

    from mgq.zoo.registry import ModelSpec


def models(as_json: AsJson = False, save: Save = RUNS) -> None:
    """List the zoo: size, cost, accuracy, weights.

    Parameters, multiply-accumulates at 224x224, published ImageNet top-1, and which weights are at hand.

    \b
    Examples:
      mgq models
      mgq models --json
    """
    from mgq.zoo.registry import specs

    entries = [entry_of(spec, save) for spec in specs().values()]
    if as_json:
        print(json.dumps(entries, indent=1))
    else:
        show(entries)


def entry_of(spec: ModelSpec, save: Path) -> dict[str, Any]:
    from mgq.zoo.registry import weights_at_hand

    published = spec.published
    return {
        "name": spec.name,
        "parameters": spec.parameters,
        "macs_224": spec.macs,
        "image_size": spec.image_size,
        "options": dict(spec.options),
        "top1_float": published.top1_float if published else None,
        "top1_int8": published.top1_int8 if published else None,
        "top1_source": published.source if published else None,
        "weights_at_hand": weights_at_hand(spec, save),
        "weights_elsewhere": weights_elsewhere(spec),
    }


def weights_elsewhere(spec: ModelSpec) -> list[str]:
    ways = []
    if spec.packaged and not spec.packaged.path():
        ways.append(spec.packaged.mend())
    if spec.checkpoints:
        ways.append("--pretrained")
    return ways


def show(entries: list[dict[str, Any]]) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from mgq.cli.console import out, show_table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("name", no_wrap=True)
    for heading in ("params", "MACs", "float", "int8"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("weights", overflow="fold")
    for entry in entries:
        at_hand = ", ".join(where.split(": ")[0] for where in entry["weights_at_hand"])
        elsewhere = ", ".join(f"({way})" for way in entry["weights_elsewhere"])
        table.add_row(
            entry["name"],
            f"{entry['parameters'] / 1e6:.2f} M",
            macs(entry["macs_224"]),
            percent(entry["top1_float"]),
            percent(entry["top1_int8"]),
            Text(" ".join(part for part in (at_hand, elsewhere) if part) or "-"),
        )
    show_table(table)
    sources = dict.fromkeys(entry["top1_source"] for entry in entries if entry["top1_source"])
    out.print(
        "MACs: at 224x224. float, int8: ImageNet top-1 (%) as published by "
        + "; ".join(sources)
        + ". Weights in parentheses are not here yet.",
        style="dim",
        markup=False,
    )


def macs(number: int) -> str:
    return f"{number / 1e9:.2f} G" if number >= 1e9 else f"{number / 1e6:.0f} M"


def percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"

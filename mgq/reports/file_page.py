"""Makes the HTML page of a report on a deployed file. Importing this imports no MegEngine."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING

from mgq.bench.tables import format_three_digits
from mgq.errors import format_size, plural
from mgq.reports.engine_rows import ROUNDS
from mgq.reports.html import Table, render
from mgq.reports.measurements import INT8, Measurements
from mgq.reports.report_page import (
    classes,
    conditions_of,
    confusions,
    engines,
    kind_of,
    list_conditions,
    percent,
    problems_of,
)

if TYPE_CHECKING:
    from mgq.reports.contents import FileReport


def page_of(report: FileReport) -> str:
    """HTML 5, in itself complete."""
    found = report.found
    return render(
        "file_report.html",
        title=f"{report.path.name}: report",
        report=report,
        arch=report.classifier.spec.name,
        found=found,
        lead=None if found is None else lead_of(report, found),
        tiles=list(tiles_of(report)),
        facts=facts_of(report),
        accuracy=None if found is None else accuracy(report, found),
        wrong=0 if found is None else int((found.last.predictions != found.last.labels).sum()),
        engines=None if report.engines is None else engines(report.engines, report.runtime.name),
        problems=[] if report.engines is None else problems_of(report.engines),
        rounds=ROUNDS,
        about=json.dumps(report.about, indent=1, ensure_ascii=False, default=str),
        **({} if found is None else {**confusions(found), **classes(found)}),
    )


def lead_of(report: FileReport, found: Measurements) -> str:
    """The result in a sentence."""
    of = f"of {found.images:,} {kind_of(found)} right"
    return f"{report.what} answers {percent(found.last.top1)} {of}, in {report.engine}."


def tiles_of(report: FileReport) -> Iterator[tuple[str, str, str]]:
    found = report.found
    if found is not None:
        yield f"top-1, {report.what}", percent(found.last.top1), f"± {found.last.top1_error:.1f} points"
        if len(found.last.classes) > 5:
            yield f"top-5, {report.what}", percent(found.last.top5), f"on {plural(found.images, 'picture', ',')}"
    yield "file", format_size(report.file_bytes), report.path.name
    best = report.engines.fastest(report.what) if report.engines is not None else None
    if best is not None and best.speed is not None:
        yield f"pictures a second, {report.what}", format_three_digits(best.speed.fps), f"{best.engine}, 1 thread"


def facts_of(report: FileReport) -> Iterator[tuple[str, object]]:
    network, about = report.classifier, report.about
    height, width = network.stretched_to or (network.image_size, network.image_size)
    how = network.preprocessing
    yield "file", str(report.path)
    yield "SHA-256", report.sha256
    yield "architecture", f"{network.spec.name}, {plural(len(network.classes), 'class', ',')}, {width}x{height} pixels"
    if report.what == INT8:
        layers = about.get("float_layers")
        kept = f"; weights of {', '.join(map(str, layers))} stay float32" if isinstance(layers, list) and layers else ""
        yield "target", f"{about.get('target', 'not known')}, mode {network.mode.value}{kept}"
    else:
        yield "mode", network.mode.value
    yield "weights", str(about.get("origin") or "not known")
    if network.stretched_to is not None:
        yield "pictures are", "resized as they are"
    else:
        side = how.shorter_side(network.image_size)
        yield (
            "pictures are",
            f"resized to {side} pixels on the shorter side ({how.interpolation}), their middle cut out",
        )
    if report.found is not None:
        yield from list_conditions(report.found)
    yield "measured in", report.engine
    versions = about.get("versions")
    if isinstance(versions, dict) and versions:
        yield "written by", ", ".join(f"{name} {version}" for name, version in versions.items())
    yield from conditions_of(report.made, report.machine, report.versions)


def accuracy(report: FileReport, found: Measurements) -> Table:
    one, has_top5 = found.last, len(found.last.classes) > 5
    heads = ["network", "top-1", *(["top-5"] if has_top5 else []), "loss", "file"]
    top5 = [percent(one.top5)] if has_top5 else []
    top1 = f"{one.top1:.1f} % ± {one.top1_error:.1f}"
    rows: list[list[object]] = [[report.what, top1, *top5, f"{one.loss:.3f}", format_size(report.file_bytes)]]
    return Table(f"on {found.images:,} {kind_of(found)}; ± one standard error", heads, rows)

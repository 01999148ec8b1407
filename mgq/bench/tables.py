"""A benchmark's report as the texts of table cells, and as a Markdown document."""

from __future__ import annotations

from collections.abc import Sequence

from mgq.bench.report import Report, Row
from mgq.bench.settings import Precision
from mgq.zoo.registry import spec_of

NONE = "-"
MARK = "!"
"""Stands behind the engine of a row whose answers differ from the reference's."""

COLUMNS = ("type", "engine", "FPS", "IQR", "p50", "p90", "p99", "int8/fp32", "MB")
LEGEND = (
    "FPS: pictures a second, median over rounds, and the interquartile range (IQR) of the rounds. "
    "p50, p90, p99: milliseconds of single runs. int8/fp32: median over rounds of the ratio of FPS in the "
    "same engine and round. MB: size of the file that the engine reads."
)
EXAMPLE_COLUMNS = ("model", "top-1 fp32", "FPS fp32", "top-1 int8", "FPS int8")


def cells(row: Row) -> tuple[str, ...]:
    """The texts of ``row`` under ``COLUMNS``."""
    speed = row.speed
    if speed is None:
        return (row.precision.value, row.engine, *[NONE] * (len(COLUMNS) - 2))
    return (
        row.precision.value,
        row.engine if row.sound else f"{row.engine} {MARK}",
        three_digits(speed.fps),
        three_digits(speed.fps_iqr) if len(row.rounds_ns) > 1 else NONE,
        three_digits(speed.p50_ms),
        three_digits(speed.p90_ms),
        three_digits(speed.p99_ms),
        f"{row.speedup.median:.2f}x" if row.speedup else NONE,
        f"{row.file_bytes / 1e6:.1f}" if row.file_bytes is not None else NONE,
    )


def three_digits(value: float) -> str:
    """``value`` to about three significant digits without an exponent: 0.012, 1.23, 12.3, 123, 1234."""
    decimals = 3 if value < 0.1 else 2 if value < 10 else 1 if value < 100 else 0
    return f"{value:.{decimals}f}"


def example_cells(report: Report, network: str) -> tuple[str, ...]:
    """The texts of ``network`` under ``EXAMPLE_COLUMNS``: published accuracy, the best engine's FPS."""
    published = spec_of(network).published
    top1_float = published.top1_float if published else None
    top1_int8 = published.top1_int8 if published else None
    return (
        network,
        NONE if top1_float is None else f"{top1_float}",
        best_fps(report, network, Precision.FP32),
        NONE if top1_int8 is None else f"{top1_int8}",
        best_fps(report, network, Precision.INT8),
    )


def best_fps(report: Report, network: str, precision: Precision) -> str:
    row = report.best(network, precision)
    return f"{three_digits(row.speed.fps)} ({row.engine})" if row and row.speed else NONE


def published_sources(report: Report) -> list[str]:
    """One line a source of published figures: for which networks it is."""
    by_source: dict[str, list[str]] = {}
    for network in report.settings.networks:
        published = spec_of(network).published
        if published is not None:
            by_source.setdefault(published.source, []).append(network)
    return [f"{', '.join(networks)}: {source}" for source, networks in by_source.items()]


def markdown(report: Report) -> str:
    """The whole report as a Markdown document: conditions, all rows, and the public example's own table."""
    weights = [(f"weights of {network}", report.weights_of(network)) for network in report.settings.networks]
    rows = [(row.network, *cells(row)) for row in report.rows]
    example = [example_cells(report, network) for network in report.settings.networks]
    remarks = report.remarks()
    parts = [
        "# mgq bench",
        "## Conditions",
        markdown_list([f"{name}: {value}" for name, value in [*report.conditions(), *weights]]),
        "## Speed",
        markdown_table(("network", *COLUMNS), rows, left=3),
        escaped(LEGEND),
        *([markdown_list(remarks)] if remarks else []),
        "## Published accuracy, measured speed",
        markdown_table(EXAMPLE_COLUMNS, example, left=1),
        "FPS: the fastest engine's, measured here. Top-1: ImageNet accuracy in %, published, not measured.",
        markdown_list([f"published figures of {line}" for line in published_sources(report)] or ["none published"]),
    ]
    return "\n\n".join(parts) + "\n"


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]], left: int) -> str:
    """A table whose first ``left`` columns are aligned left and the others right."""
    rule = ["---" if place < left else "---:" for place in range(len(columns))]
    lines = [[escaped(text) for text in columns], rule, *([escaped(text) for text in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def markdown_list(items: Sequence[str]) -> str:
    return "\n".join(f"- {escaped(item)}" for item in items)


def escaped(text: str) -> str:
    """``text`` with those characters escaped that have a meaning in Markdown."""
    return "".join(f"\\{c}" if c in "\\`*|<[" else c for c in " ".join(text.split()))

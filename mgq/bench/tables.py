"""Formats a benchmark's report: texts of table cells, and a Markdown document."""

from __future__ import annotations

from collections.abc import Sequence

from mgq.bench.benchmark_report import Comparison, Report, Row
from mgq.bench.settings import Precision, pluralize
from mgq.bench.statistics import Speedup
from mgq.zoo.registry import spec_of

NONE = "-"
MARK = "!"
"""Stands behind the engine of a row whose answers differ from the reference's."""

COLUMNS = ("engine", "FPS", "IQR", "p50", "p90", "p99", "int8/fp32", "peak", "MB", "RAM")
LEGEND = (
    "FPS: pictures a second, median over rounds, and the interquartile range (IQR) of the rounds. p50, p90, p99: "
    "milliseconds of single runs. int8/fp32: median over rounds of the ratio of FPS in the same engine (or, where that "
    "ran int8 alone, to the fastest fp32) and its 95 % interval. peak: part of what the processor can multiply and add "
    "(self-test in the same rounds). MB: file that the engine reads. RAM: most MB of its whole process. int8 is "
    "quantized for MegEngine in its own engines, for the target onnx in the others."
)
EXAMPLE_COLUMNS = ("model", "top-1 fp32", "FPS fp32", "top-1 int8", "FPS int8")
EXAMPLE_LEGEND = (
    "FPS: the fastest engine's, measured here on the fewest threads. "
    "Top-1: ImageNet accuracy in %, published and not measured."
)


def cells(row: Row) -> tuple[str, ...]:
    """The texts of ``row`` under ``COLUMNS``."""
    speed = row.speed
    if speed is None:
        return (row.engine, *[NONE] * (len(COLUMNS) - 1))
    return (
        row.engine if row.sound else f"{row.engine} {MARK}",
        format_three_digits(speed.fps),
        format_three_digits(speed.fps_iqr) if len(row.rounds_ns) > 1 else NONE,
        format_three_digits(speed.p50_ms),
        format_three_digits(speed.p90_ms),
        format_three_digits(speed.p99_ms),
        ratio_text(row.speedup) if row.speedup else NONE,
        f"{100 * row.share:.0f}%" if row.share is not None else NONE,
        megabytes_text(row.file_bytes) if row.file_bytes is not None else NONE,
        f"{row.peak_memory / 1e6:.0f}" if row.peak_memory is not None else NONE,
    )


def megabytes_text(size: int) -> str:
    """``size`` in bytes as MB, with more digits where one would say 0."""
    return format_three_digits(size / 1e6) if size < 100_000 else f"{size / 1e6:.1f}"


def ratio_text(speedup: Speedup) -> str:
    """``1.50x`` alone, or with its interval, ``1.50 1.45-1.55``."""
    if speedup.low is None or speedup.high is None:
        return f"{speedup.median:.2f}x"
    return f"{speedup.median:.2f} {speedup.low:.2f}-{speedup.high:.2f}"


def find_group(row: Row) -> str:
    """What the rows of a part of a network's table have in common: ``int8, 2 threads``."""
    what = f"{row.file}, {row.precision.value}" if row.file else row.precision.value
    return f"{what}, {pluralize(row.threads, 'thread')}"


def groups(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """``rows`` by :func:`find_group`, in their order."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(find_group(row), []).append(row)
    return found


def comparison_text(found: Comparison) -> str:
    """``int8 in OpenVINO is 3.45 (3.41-3.49) times fp32 in OpenVINO, 1 thread``."""
    low, high = found.speedup.low, found.speedup.high
    interval = "" if low is None or high is None else f" (95 %: {low:.3f}-{high:.3f})"
    one, other = (f"{row.file or row.precision.value} in {row.engine}" for row in (found.one, found.other))
    threads = pluralize(found.one.threads, "thread")
    return f"{one} is {found.speedup.median:.3f}{interval} times as fast as {other}, {threads}"


def format_three_digits(value: float) -> str:
    """``value`` to about three significant digits without an exponent: 0.012, 1.23, 12.3, 123, 1234."""
    decimals = 3 if value < 0.1 else 2 if value < 10 else 1 if value < 100 else 0
    return f"{value:.{decimals}f}"


def example_cells(report: Report, network: str, engines: bool = True) -> tuple[str, ...]:
    """The texts of ``network`` under ``EXAMPLE_COLUMNS``: published accuracy, the best engine's FPS on the fewest
    threads that were measured, with its name where ``engines``."""
    published = spec_of(network).published
    top1_float = published.top1_float if published else None
    top1_int8 = published.top1_int8 if published else None
    return (
        network,
        NONE if top1_float is None else f"{top1_float}",
        format_best_fps(report, network, Precision.FP32, engines),
        NONE if top1_int8 is None else f"{top1_int8}",
        format_best_fps(report, network, Precision.INT8, engines),
    )


def format_best_fps(report: Report, network: str, precision: Precision, engines: bool) -> str:
    row = report.best(network, precision, min(report.settings.threads))
    if row is None or row.speed is None:
        return NONE
    return format_three_digits(row.speed.fps) + (f" ({row.engine})" if engines else "")


def list_sources(report: Report) -> list[str]:
    """One line for each source of published figures, with its networks."""
    by_source: dict[str, list[str]] = {}
    for network in report.settings.zoo_networks:
        published = spec_of(network).published
        if published is not None:
            by_source.setdefault(published.source, []).append(network)
    return [f"{', '.join(networks)}: {source}" for source, networks in by_source.items()]


def markdown(report: Report) -> str:
    """The whole report as a Markdown document: conditions, all rows, and the public example's own table."""
    weights = [(f"weights of {network}", report.weights_of(network)) for network in report.settings.networks]
    rows = [(row.network, find_group(row), *cells(row)) for row in report.rows]
    compared = [
        f"{network}: {comparison_text(found)}"
        for network in report.settings.networks
        for found in report.comparisons(network)
    ]
    example = [example_cells(report, network) for network in report.settings.zoo_networks]
    remarks = report.remarks()
    parts = [
        "# mgq bench",
        "## Conditions",
        markdown_list([f"{name}: {value}" for name, value in [*report.conditions(), *weights]]),
        "## Speed",
        markdown_table(("network", "what", *COLUMNS), rows, left=3),
        *([markdown_list(compared)] if compared else []),
        escape_markdown(LEGEND),
        *([markdown_list(remarks)] if remarks else []),
    ]
    if example:
        parts += [
            "## Published accuracy, measured speed",
            markdown_table(EXAMPLE_COLUMNS, example, left=1),
            EXAMPLE_LEGEND,
            markdown_list([f"published figures of {line}" for line in list_sources(report)] or ["none published"]),
        ]
    return "\n\n".join(parts) + "\n"


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]], left: int) -> str:
    """A table whose first ``left`` columns are aligned left and the others right."""
    rule = ["---" if place < left else "---:" for place in range(len(columns))]
    lines = [
        [escape_markdown(text) for text in columns],
        rule,
        *([escape_markdown(text) for text in row] for row in rows),
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def markdown_list(items: Sequence[str]) -> str:
    return "\n".join(f"- {escape_markdown(item)}" for item in items)


def escape_markdown(text: str) -> str:
    """``text`` with those characters escaped that have a meaning in Markdown."""
    return "".join(f"\\{c}" if c in "\\`*|<[" else c for c in " ".join(text.split()))

"""``mgq bench``: how fast is it here?"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mgq.errors import FailureError, InputError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from mgq.bench.report import Report, Row
    from mgq.bench.settings import Settings
    from mgq.bench.training import TrainingReport

STDOUT = "-"


def bench(
    arch: Annotated[
        list[str] | None,
        typer.Option("-a", "--arch", help="Architecture, may be repeated; by default those of the example."),
    ] = None,
    int8: Annotated[bool, typer.Option("--int8", help="Only int8 networks.")] = False,
    fp32: Annotated[bool, typer.Option("--fp32", help="Only float32 networks.")] = False,
    training: Annotated[bool, typer.Option("--train", help="Training steps instead, stock kernels and fast.")] = False,
    threads: Annotated[int, typer.Option("--threads", help="Threads of every engine.")] = 1,
    rounds: Annotated[
        int | None,
        typer.Option(
            "--rounds", help="In each round every row has a turn of about 1/4 s.", show_default="10; with --train 3"
        ),
    ] = None,
    batch: Annotated[
        int | None, typer.Option("--batch", help="Pictures a run.", show_default="1; with --train 32")
    ] = None,
    image_size: Annotated[
        int | None,
        typer.Option("--image-size", help="Pixels on a side, a multiple of 32.", show_default="224; with --train 64"),
    ] = None,
    json_file: Annotated[
        str | None,
        typer.Option("--json", metavar="FILE", help="Write all samples and conditions; - is standard output."),
    ] = None,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="A Markdown document.")] = False,
) -> None:
    """Measure pictures a second in every engine.

    Float32 and int8 take shuffled turns in one process; random weights serve where none are at hand.

    \b
    Examples:
      mgq bench
      mgq bench --int8
      mgq bench -a resnet50 --threads 2 --markdown
      mgq bench --train
    """
    if int8 and fp32:
        raise InputError("--int8 and --fp32 exclude each other: leave both out to measure both")
    if as_markdown and json_file == STDOUT:
        raise InputError("--markdown and --json - both want standard output: give --json a file")
    if training:
        if int8 or fp32 or threads != 1:
            raise InputError("--train measures float and qat on all cores: leave out --int8, --fp32 and --threads")
        bench_training(arch or [], rounds, batch, image_size, json_file, as_markdown)
        return
    from mgq.bench.settings import ROUNDS, Precision, settings_for

    precisions = [Precision.INT8] if int8 else [Precision.FP32] if fp32 else []
    rounds = ROUNDS if rounds is None else rounds
    batch, image_size = (1 if batch is None else batch), (224 if image_size is None else image_size)
    settings = settings_for(arch or [], precisions, threads, rounds, batch, image_size)
    report = measured(settings, None if json_file in (None, STDOUT) else Path(str(json_file)))
    if json_file == STDOUT:
        sys.stdout.write(report.to_json())
    elif as_markdown:
        from mgq.bench.tables import markdown

        sys.stdout.write(markdown(report))
    else:
        from mgq.cli.console import out

        show(report, out)
    if not any(row.speed for row in report.rows):
        raise typer.Exit(FailureError.exit_code)


def bench_training(
    arch: list[str],
    rounds: int | None,
    batch: int | None,
    image_size: int | None,
    json_file: str | None,
    as_markdown: bool,
) -> None:
    """``mgq bench --train``."""
    from mgq.cli.console import import_megengine, out, progress
    from mgq.files.atomic import write_text_atomically

    import_megengine(debug=bool(os.environ.get("MGQ_DEBUG")))
    from mgq.bench.training import training_benchmark, training_markdown, training_settings_for

    settings = training_settings_for(arch, rounds, batch, image_size)
    with progress() as on_progress:
        report = training_benchmark(settings, on_progress=on_progress)
    if json_file not in (None, STDOUT):
        write_text_atomically(Path(str(json_file)), report.to_json())
    if json_file == STDOUT:
        sys.stdout.write(report.to_json())
    elif as_markdown:
        sys.stdout.write(training_markdown(report))
    else:
        show_training(report, out)


def show_training(report: TrainingReport, console: Console) -> None:
    """Draw a report of training steps: conditions, one table a network, remarks. Fits 80 columns."""
    from rich.text import Text

    from mgq.bench.training import COLUMNS, LEGEND, cells

    for name, value in report.conditions():
        console.print(Text.assemble((f"{name}: ", "bold"), value))
    for network in report.settings.networks:
        console.print()
        console.print(Text.assemble((network, "bold cyan"), ": random weights (speed only)"))
        console.print(plain_table(COLUMNS, [cells(row) for row in report.rows_of(network)]))
    console.print()
    console.print(Text(LEGEND, style="dim"))
    for remark in report.remarks():
        console.print(Text(f"! {remark}", style="yellow"))


def measured(settings: Settings, json_file: Path | None) -> Report:
    """The report, written to ``json_file`` if there is one: a wrong place is told of at once."""
    from mgq.cli.console import import_megengine, progress
    from mgq.files.atomic import atomic_write

    with contextlib.ExitStack() as stack:
        temporary = stack.enter_context(atomic_write(json_file)) if json_file is not None else None
        import_megengine(debug=bool(os.environ.get("MGQ_DEBUG")))
        from mgq.bench.benchmark import benchmark

        with progress() as on_progress:
            report = benchmark(settings, on_progress)
        if temporary is not None:
            temporary.write_text(report.to_json(), encoding="utf-8")
    return report


def show(report: Report, console: Console) -> None:
    """Draw the report: conditions, one table a network, remarks. Fits 80 columns."""
    from rich.text import Text

    from mgq.bench.tables import LEGEND

    for name, value in report.conditions():
        console.print(Text.assemble((f"{name}: ", "bold"), value))
    for network in report.settings.networks:
        console.print()
        console.print(Text.assemble((network, "bold cyan"), f": {report.weights_of(network)}"))
        console.print(table_of(report.rows_of(network)))
    console.print()
    console.print(Text(LEGEND, style="dim"))
    for remark in report.remarks():
        console.print(Text(f"! {remark}", style="yellow"))


def table_of(rows: tuple[Row, ...]) -> Table:
    from mgq.bench.tables import COLUMNS, cells

    return plain_table(COLUMNS, [cells(row) for row in rows], [None if row.sound else "yellow" for row in rows])


def plain_table(
    columns: Sequence[str], rows: Sequence[Sequence[str]], styles: Sequence[str | None] | None = None
) -> Table:
    """A table without lines whose first two columns are aligned left."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for place, column in enumerate(columns):
        table.add_column(column, justify="left" if place < 2 else "right", no_wrap=True)
    for row, style in zip(rows, styles or [None] * len(rows), strict=True):
        table.add_row(*row, style=style)
    return table

"""``mgq bench``: measures how fast networks run, or train, on this machine."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mgq.cli.help_layout import OWN
from mgq.cli.import_options import ImportOptions
from mgq.cli.option_needs import OF_IMPORT, OF_RUNS, OF_SEVERAL_NETWORKS, Need
from mgq.cli.option_types import ARCH, COUNT, LOAD, PIXELS
from mgq.cli.shared_options import CheckpointFile, KeyName, Save, find_source, prepare_megengine
from mgq.engine.classifier.network_options import RUNS
from mgq.errors import FailureError, InputError
from mgq.io.temporary_folders import temporary_folder

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from mgq.bench.benchmark_report import Report, Row
    from mgq.bench.settings import Settings
    from mgq.bench.training_speed import TrainingReport, TrainingSettings
    from mgq.engine.classifier.import_wish import ImportWish

STDOUT = "-"


@dataclass(frozen=True, kw_only=True)
class BenchCommand(ImportOptions):
    """Measure pictures a second in every engine.

    Each row is a process of its own, pinned to its cores; rows take turns in random order. Networks without
    weights run with random ones.

    \b
    Examples:
      mgq bench --int8
      mgq bench -a resnet18 --int8 --against other.onnx --plot speed.png
      mgq bench network.onnx network.so
      mgq bench --train --no-stock --against torch
    """

    files: Annotated[
        list[Path] | None,
        typer.Argument(help="Deployed files, .onnx and native, to measure instead of networks of the zoo."),
    ] = None
    arch: Annotated[
        list[str] | None,
        typer.Option(
            "-a", "--arch", click_type=ARCH, help="Architecture, may be repeated; by default those of the example."
        ),
    ] = None
    checkpoint: CheckpointFile = None
    key: KeyName = None
    save: Save = RUNS
    int8: Annotated[
        bool, typer.Option("--int8", help="int8 in every engine; float32 in the fastest one, to compare.")
    ] = False
    fp32: Annotated[bool, typer.Option("--fp32", help="Float32 networks only.")] = False
    training: Annotated[bool, typer.Option("--train", help="Training steps: stock and fast kernels.")] = False
    threads: Annotated[
        list[str] | None,
        typer.Option(
            "--threads", help="Threads: a number or all; may be repeated.", show_default="1 and all; with --train 1"
        ),
    ] = None
    load: Annotated[
        str,
        typer.Option(
            "--mode",
            click_type=LOAD,
            rich_help_panel=OWN,
            help="latency: one run at a time; throughput: one a thread, side by side.",
        ),
    ] = "latency"
    against: Annotated[
        list[Path] | None,
        typer.Option(
            "--against", metavar="FILE.onnx", help="Another ONNX model as rows; may be repeated. With --train: torch."
        ),
    ] = None
    torch_python: Annotated[
        Path | None,
        typer.Option(
            "--torch-python", metavar="PYTHON", help="With --train: a Python with PyTorch, which becomes rows."
        ),
    ] = None
    stock: Annotated[
        bool, typer.Option("--stock/--no-stock", help="With --train: MegEngine's own kernels, which are slow, too.")
    ] = True
    rounds: Annotated[
        int | None,
        typer.Option(
            "--rounds",
            click_type=COUNT,
            help="Rounds; in each, every row runs for about 1/8 s.",
            show_default="10; with --train 3",
        ),
    ] = None
    batch: Annotated[
        int | None, typer.Option("--batch", click_type=COUNT, help="Batch size.", show_default="1; with --train 32")
    ] = None
    image_size: Annotated[
        int | None,
        typer.Option(
            "--image-size",
            click_type=PIXELS,
            help="Pixels on a side, a multiple of 32.",
            show_default="224; with --train 64",
        ),
    ] = None
    json_file: Annotated[
        str | None,
        typer.Option("--json", metavar="FILE", help="Write all samples and conditions; - is standard output."),
    ] = None
    as_markdown: Annotated[bool, typer.Option("--markdown", help="A Markdown document.")] = False
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE", help="Draw a bar chart: FILE.png or FILE.svg.")
    ] = None

    needs = (
        OF_SEVERAL_NETWORKS,
        OF_IMPORT,
        Need(
            ("files", "int8", "fp32", "load", "plot", "checkpoint", "save"),
            lambda command: not command.training,
            "is for inference, and --train measures training steps: leave out one of them",
        ),
        Need(("torch_python", "stock"), lambda command: command.training, "belongs to --train: give that, too"),
        Need(("fp32",), lambda command: not command.int8, "and --int8 exclude each other: leave both out for both"),
        Need(
            ("as_markdown",),
            lambda command: command.json_file != STDOUT,
            "wants standard output: give --json a file",
        ),
        Need(
            ("int8", "fp32", "against"),
            lambda command: not command.is_alone(),
            "is for networks of the zoo: files, -c and FILE.py:FUNCTION are measured for themselves, so leave it out",
        ),
        Need(("arch", "save"), lambda command: command.opens_network(), "is for networks, not for files: leave it out"),
        Need(("image_size",), lambda command: command.has_open_size(), "is in the files already: leave it out"),
        Need(
            ("batch",),
            lambda command: not (command.is_alone() and command.opens_network()),
            "is 1 where the files are written for the benchmark: leave it out, or give files of `mgq dump --batch`",
        ),
        OF_RUNS,
        Need(("save",), lambda command: not command.describe_lack(), lambda command: command.describe_lack()),
    )

    def is_alone(self) -> bool:
        """Whether a network or files of the user's own are measured, not networks of the zoo."""
        return not self.training and (bool(self.files) or self.checkpoint is not None or is_own(self.arch or []))

    def opens_network(self) -> bool:
        """Whether there is more to measure than files that are there already."""
        return not self.files or self.checkpoint is not None or is_own(self.arch or [])

    def has_open_size(self) -> bool:
        """Whether anything that is measured takes pictures of more than one size."""
        from mgq.bench.file_cases import read_deployed_file

        return not self.is_alone() or not all(read_deployed_file(path).image_size for path in self.files or [])

    def describe_lack(self) -> str:
        """Why the folder of the runs has none of the networks, as the end of a sentence; empty where it has."""
        from mgq.bench.settings import EXAMPLE_NETWORKS
        from mgq.engine.classifier.run_lookup import describe_lack
        from mgq.quantization.option_names import Mode

        if self.is_alone():
            return ""
        lacks = [
            describe_lack(name, (Mode.QUANTIZED, Mode.NORMAL), self.save) for name in self.arch or EXAMPLE_NETWORKS
        ]
        return lacks[0] if all(lacks) else ""

    def execute(self) -> None:
        """Measure, and write and print the report. The exit code is 1 where nothing could be measured."""
        if self.training:
            bench_training(self.training_settings, self.json_file, self.as_markdown)
        else:
            self.show(self.measure(self.import_wish()))

    def training_settings(self) -> TrainingSettings:
        """What ``--train`` measures. It needs MegEngine."""
        from mgq.bench.training_speed import make_training_settings

        return make_training_settings(
            self.arch or [],
            self.rounds,
            self.batch,
            self.image_size,
            threads=self.threads or [],
            stock=self.stock,
            against=self.against or [],
            python=self.torch_python,
        )

    def measure(self, wish: ImportWish) -> Report:
        """The report on inference; a network of the user's own is written to files first."""
        from mgq.bench.plot import check_plot_path, write_plot
        from mgq.io.atomic import atomic_output

        arch, files = self.arch or [], self.files or []
        share_network = False
        with contextlib.ExitStack() as stack:
            is_written = self.json_file not in (None, STDOUT)
            json_file = stack.enter_context(atomic_output(Path(str(self.json_file)))) if is_written else None
            image = stack.enter_context(atomic_output(check_plot_path(self.plot))) if self.plot is not None else None
            if self.checkpoint is not None or is_own(arch):
                folder, share_network = stack.enter_context(temporary_folder()), not files
                arch, files = [], [*files, *files_of(arch, self.checkpoint, self.save, folder, wish, self.key)]
            report = run_benchmark(replace(self.settings(arch, files), share_network=share_network))
            if json_file is not None:
                json_file.write_text(report.to_json(), encoding="utf-8")
            if image is not None and self.plot is not None:
                write_plot(report, image, self.plot.suffix)
        return report

    def settings(self, arch: list[str], files: list[Path]) -> Settings:
        """What is measured: networks of the zoo, or ``files``."""
        from mgq.bench.file_cases import find_batch
        from mgq.bench.settings import ROUNDS, Precision, make_settings

        return make_settings(
            networks=arch,
            precisions=[Precision.INT8] if self.int8 else [Precision.FP32] if self.fp32 else [],
            threads=self.threads or [],
            rounds=ROUNDS if self.rounds is None else self.rounds,
            batch=find_batch(files, self.batch),
            image_size=224 if self.image_size is None else self.image_size,
            load=self.load,
            against=self.against or [],
            files=files,
            save=self.save,
        )

    def show(self, report: Report) -> None:
        """Print the report as asked for."""
        from mgq.bench.tables import markdown
        from mgq.cli.console import out

        if self.json_file == STDOUT:
            sys.stdout.write(report.to_json())
        elif self.as_markdown:
            sys.stdout.write(markdown(report))
        else:
            show(report, out)
        if not any(row.speed for row in report.rows):
            raise typer.Exit(FailureError.exit_code)


def is_own(arch: list[str]) -> bool:
    """Whether ``arch`` is one network of the user's own. Raises InputError where it is among others."""
    from mgq.zoo.registry import spec_of

    own = [name for name in arch if spec_of(name).is_own]
    if own and len(arch) > 1:
        raise InputError(f"{own[0]} is measured by its files: give it alone")
    return bool(own)


def files_of(
    arch: list[str],
    checkpoint: Path | None,
    save: Path,
    folder: Path,
    wish: ImportWish | None = None,
    key: str | None = None,
) -> list[Path]:
    """Files in ``folder`` of the network that ``arch`` or ``checkpoint`` names: float, and int8 where it is calibrated.

    Raises InputError where it is not.
    """
    from mgq.cli.console import note
    from mgq.errors import printable

    if len(arch) > 1:
        raise InputError("-c is one network: give one -a, or leave it out")
    name = arch[0] if arch else None
    given, checkpoint = checkpoint, prepare_megengine(checkpoint, deployed=False, key=key, save=save, wish=wish)
    from mgq.engine.classifier.deployment import write_candidates
    from mgq.engine.classifier.onnx_import import refuse_other_import
    from mgq.engine.classifier.open import find_newest_run, open_classifier
    from mgq.engine.classifier.parity import make_views
    from mgq.quantization.modes import Mode

    normal = open_classifier(name, checkpoint, Mode.NORMAL, save, key=key)
    int8 = find_newest_run(normal.spec, Mode.QUANTIZED, save)
    if int8 is None:
        said = f"-c {printable(checkpoint)}" if checkpoint is not None else "-a FILE.py:FUNCTION"
        said += "" if key is None else f" --key {printable(key)}"
        raise InputError(f"{normal.spec.name} is not calibrated: `mgq calibrate {said} -d PHOTOS --target onnx` first")
    refuse_other_import(int8, normal.options)
    note(f"int8 from {printable(int8)}")
    calibrated = open_classifier(normal.spec.name, int8, Mode.QUANTIZED, save)
    return write_candidates(normal, calibrated, folder, make_views(normal), find_source(given, checkpoint))


def bench_training(settings_of: Callable[[], TrainingSettings], json_file: str | None, as_markdown: bool) -> None:
    """``mgq bench --train``. ``settings_of`` needs MegEngine."""
    from mgq.cli.console import out, progress
    from mgq.io.atomic import atomic_output
    from mgq.system.megengine_start import import_megengine

    import_megengine()
    from mgq.bench.training_speed import training_benchmark, training_markdown

    settings = settings_of()
    with contextlib.ExitStack() as stack:
        file = None if json_file in (None, STDOUT) else stack.enter_context(atomic_output(Path(str(json_file))))
        with progress() as on_progress:
            report = training_benchmark(settings, on_progress=on_progress)
        if file is not None:
            file.write_text(report.to_json(), encoding="utf-8")
    if json_file == STDOUT:
        sys.stdout.write(report.to_json())
    elif as_markdown:
        sys.stdout.write(training_markdown(report))
    else:
        show_training(report, out)


def show_training(report: TrainingReport, console: Console) -> None:
    """Draw a report of training steps: conditions, one table a network, remarks. Fits 80 columns."""
    from rich.text import Text

    from mgq.bench.training_speed import COLUMNS, LEGEND, cells
    from mgq.cli.console import show_table

    for name, value in report.conditions():
        console.print(Text.assemble((f"{name}: ", "bold"), value))
    for network in report.settings.networks:
        console.print()
        console.print(Text.assemble((network, "bold cyan"), ": random weights (speed only)"))
        show_table(plain_table(COLUMNS, [cells(row) for row in report.rows_of(network)]), console)
    console.print()
    console.print(Text(LEGEND, style="dim"))
    for remark in report.remarks():
        console.print(Text(f"! {remark}", style="yellow"))


def run_benchmark(settings: Settings) -> Report:
    """Run the benchmark. Raises InputError before the first measurement where a file cannot be read."""
    from mgq.bench.file_cases import read_deployed_file
    from mgq.cli.console import progress
    from mgq.export.onnx.onnx_file import read_onnx
    from mgq.system.megengine_start import import_megengine

    for path in settings.against:
        read_onnx(path)
    for path in settings.files:
        read_deployed_file(path)
    if not settings.files:
        import_megengine()
    from mgq.bench.benchmark import benchmark

    with progress() as on_progress:
        return benchmark(settings, on_progress)


def show(report: Report, console: Console) -> None:
    """Draw the report: conditions, one table a network, comparisons, the example's table, remarks. Fits 80 columns."""
    from rich.text import Text

    from mgq.bench.tables import EXAMPLE_COLUMNS, EXAMPLE_LEGEND, LEGEND, comparison_text, example_cells
    from mgq.cli.console import show_table

    for name, value in report.conditions():
        console.print(Text.assemble((f"{name}: ", "bold"), value))
    for network in report.settings.networks:
        console.print()
        console.print(Text.assemble((network, "bold cyan"), f": {report.weights_of(network)}"))
        show_rows(report.rows_of(network), console)
        for found in report.comparisons(network):
            console.print(Text(f"* {comparison_text(found)}"))
    console.print()
    console.print(Text(LEGEND, style="dim"))
    example = [example_cells(report, name, engines=False) for name in report.settings.zoo_networks]
    if example:
        console.print()
        show_table(plain_table(EXAMPLE_COLUMNS, example, left=1), console)
        console.print(Text(EXAMPLE_LEGEND, style="dim"))
    for remark in report.remarks():
        console.print(Text(f"! {remark}", style="yellow"))


def show_rows(rows: tuple[Row, ...], console: Console) -> None:
    """Draw the rows of one network, with a heading for each precision and number of threads."""
    from rich.text import Text

    from mgq.bench.tables import COLUMNS, cells, groups
    from mgq.cli.console import show_table

    parts = groups(rows)
    texts = {title: [cells(row) for row in members] for title, members in parts.items()}
    widths = [
        max(map(len, column)) for column in zip(COLUMNS, *(row for part in texts.values() for row in part), strict=True)
    ]
    for place, (title, members) in enumerate(parts.items()):
        styles = [None if row.sound else "yellow" for row in members]
        console.print(Text(title, style="bold"))
        show_table(plain_table(COLUMNS, texts[title], styles, left=1, gap=1, widths=widths, header=place == 0), console)


def plain_table(
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    styles: Sequence[str | None] | None = None,
    left: int = 2,
    gap: int = 2,
    widths: Sequence[int] | None = None,
    header: bool = True,
) -> Table:
    """A table without lines whose first ``left`` columns are aligned left; ``widths`` are minimum widths."""
    from rich.table import Table

    table = Table(box=None, show_header=header, pad_edge=False, padding=(0, gap, 0, 0), header_style="bold")
    for place, column in enumerate(columns):
        width = widths[place] if widths is not None else None
        table.add_column(column, justify="left" if place < left else "right", no_wrap=True, min_width=width)
    for row, style in zip(rows, styles or [None] * len(rows), strict=True):
        table.add_row(*row, style=style)
    return table

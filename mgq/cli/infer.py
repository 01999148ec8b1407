"""``mgq infer``: classifies images."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from shutil import get_terminal_size
from typing import TYPE_CHECKING, Annotated

import typer

from mgq.cli.network_command import NetworkCommand
from mgq.cli.option_needs import need_run
from mgq.cli.option_types import COUNT
from mgq.cli.shared_options import (
    AsJson,
    EngineName,
    mode_option,
    open_network,
    take_checkpoint,
)
from mgq.engine.classifier.network_options import Usage

if TYPE_CHECKING:
    from rich.table import Table

    from mgq.engine.classifier.classifier import Classifier
    from mgq.engine.classifier.predict import Prediction
    from mgq.events import OnProgress

BAR, BESIDE_BARS = 20, 48
"""Characters of a bar at the most, and of what stands beside it."""
NARROWEST_CLASS = 30
PROBABILITY = "probability"


@dataclass(frozen=True, kw_only=True)
class InferCommand(NetworkCommand):
    """Classify pictures with the int8 network (or another mode).

    Without a picture it takes the bundled cat.

    \b
    Examples:
      mgq infer cat.jpg
      mgq infer photos/ --json
      mgq infer -m normal cat.jpg --dump
    """

    files: Annotated[list[str] | None, typer.Argument(help="Files, folders, globs, or - for standard input.")] = None
    image: Annotated[list[str] | None, typer.Option("-i", "--image", help="A picture, as an option.")] = None
    mode: Annotated[str | None, mode_option("quantized; of a deployed file its own")] = None
    topk: Annotated[
        int | None,
        typer.Option(
            "--topk", click_type=COUNT, help="Classes shown for each picture.", show_default="5, or all of fewer"
        ),
    ] = None
    write: Annotated[
        bool,
        typer.Option("--dump", help="Write the network as a file, as `mgq dump` does, and its checkpoint, too."),
    ] = False
    as_json: AsJson = False
    engine: EngineName = None

    needs = (need_run(lambda command: [command.mode or "quantized"], takes_newest=False),)

    def execute(self) -> None:
        """Print the answers; with ``--dump`` write the network, too. The exit code is 2 where an image has none."""
        from mgq.cli.console import note, print_error, progress
        from mgq.data.decoding import bundled_cat
        from mgq.data.image_sources import expand, leave_out_absent, refuse_hopeless

        sources = expand([*(self.image or []), *(self.files or [])] or [str(bundled_cat())], note)
        there = sources
        if not self.as_json:  # which tells of broken pictures in its document
            if len(sources) == 1:
                refuse_hopeless(sources)
            there = leave_out_absent(sources, print_error)
        absent = len(sources) - len(there)
        if not there:
            note(f"{absent:,} of {absent:,} pictures could not be read")
            raise typer.Exit(2)
        wish, int8 = self.import_wish(), self.mode != "normal"
        checkpoint = take_checkpoint(self.checkpoint, not self.write, self.key, self.save, wish, int8)
        with progress() as on_progress:
            from mgq.engine.classifier.predict import FEW, predict

            usage = Usage(few=len(sources) <= FEW, kept=not self.write)
            classifier = open_network(self.network_options(checkpoint, self.engine), self.mode, on_progress, usage)
            answers = predict(classifier, there, self.topk)
            found = start_predictions(report_progress(answers, len(there), on_progress))
            failed = absent + (show_json(classifier, found) if self.as_json else show_tables(classifier, found))
        if failed and len(sources) > 1:
            note(f"{failed:,} of {len(sources):,} pictures could not be read")
        if self.write:
            write_network(classifier)
        if failed:
            raise typer.Exit(2)


def write_network(classifier: Classifier) -> None:
    """Write the network as ``mgq dump`` does, and its checkpoint; say where."""
    from mgq.cli.console import err, note
    from mgq.cli.dump import FileOptions, write_file

    source = classifier.made_from[0] if classifier.made_from is not None else classifier
    path = write_file(source, FileOptions(), to=err).path
    source.write_checkpoint(path.with_suffix(".safetensors"))
    note(f"{path.with_suffix('.safetensors')}: the weights that it can be rebuilt from")


def start_predictions(found: Iterator[Prediction]) -> Iterator[Prediction]:
    """``found``, with the first answer computed already: an error that concerns all images comes before any output."""
    first = next(found)
    return chain([first], found)


def report_progress(found: Iterator[Prediction], total: int, on_progress: OnProgress) -> Iterator[Prediction]:
    """``found``, with a progress report for each answer; none for a single image."""
    from mgq.events import Progress

    for done, answer in enumerate(found, 1):
        if total > 1:
            on_progress(Progress("classify", done, total, "pictures"))
        yield answer


def show_tables(classifier: Classifier, found: Iterator[Prediction]) -> int:
    """Print a table for each answer, and an error line for each image without one; return the number of errors."""
    from mgq.cli.console import is_pipe, print_error, say, show_table

    failed = shown = 0
    for answer in found:
        if answer.error is not None:
            print_error(answer.error)
            failed += 1
            continue
        if not shown:
            say(headline(classifier), style="dim")
        plain = plain_table(answer, get_terminal_size().columns) if is_pipe("out") else None
        if plain is None:
            show_table(table_of(answer))
        else:
            say(plain)
        shown += 1
    return failed


def headline(classifier: Classifier) -> str:
    kind = {"normal": "float32", "qat": "fake-quantized", "quantized": "int8"}[classifier.mode.value]
    return f"{classifier.spec.name}, mode {classifier.mode.value} ({kind})\nweights: {classifier.origin}"


def plain_table(answer: Prediction, width: int) -> str | None:
    """:func:`table_of` as text of at most ``width`` columns, for pipes; None where it needs folding or non-ASCII text.

    It saves the import of rich, which takes longer than to run the network.
    """
    from mgq.errors import printable

    names = [printable(guess.name) for guess in answer.scores]
    title = f"{printable(answer.image)}  {answer.milliseconds:.1f} ms"
    length = max(NARROWEST_CLASS, *map(len, names))
    bars = max(0, min(BAR, width - BESIDE_BARS))
    if not all(text.isascii() for text in (title, *names)) or length + 3 + len(PROBABILITY) + 3 + bars + 2 > width:
        return None
    lines = [title, "", f" {'class':{length}}   {PROBABILITY}"]
    longest = max(round(guess.probability * bars) for guess in answer.scores)
    lines.append(f" {'─' * (length + 3 + len(PROBABILITY) + (3 + longest if longest else 0))}")
    for name, guess in zip(names, answer.scores, strict=True):
        bar = "█" * round(guess.probability * bars)
        lines.append(f" {name:{length}}   {guess.probability:>{len(PROBABILITY)}.1%}   {bar}".rstrip())
    return "\n".join(lines) + "\n"


def table_of(answer: Prediction) -> Table:
    """The answer to one picture: class, probability and a bar of it."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from mgq.cli.console import out
    from mgq.errors import printable

    title = Text(f"{printable(answer.image)}  ", style="bold")
    title.append(f"{answer.milliseconds:.1f} ms", style="dim")
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", pad_edge=False)
    table.add_column("class", min_width=NARROWEST_CLASS, overflow="fold")
    table.add_column(PROBABILITY, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    length = max(0, min(BAR, out.width - BESIDE_BARS))
    for guess in answer.scores:
        bar = "█" * round(guess.probability * length)
        table.add_row(Text(printable(guess.name)), f"{guess.probability:.1%}", Text(bar, style="green"))
    return table


def show_json(classifier: Classifier, found: Iterator[Prediction]) -> int:
    """Print one JSON document, an entry for each image as it is classified; return the number of errors."""
    from mgq.engine.classifier.predict import describe_network

    head = describe_network(classifier)
    sys.stdout.write(json.dumps(head)[:-1] + ', "answers": [')
    failed = 0
    for number, answer in enumerate(found):
        failed += answer.error is not None
        sys.stdout.write(("," if number else "") + "\n" + json.dumps(answer.to_json()))
    sys.stdout.write(f'\n], "failed": {failed}}}\n')
    return failed

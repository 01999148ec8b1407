"""``mgq doctor``: checks the machine and the installed packages."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

import typer

from mgq.cli.shared_options import AsJson, Save
from mgq.engine.classifier.network_options import RUNS

if TYPE_CHECKING:
    from mgq.bench.doctor import Diagnosis

SIGNS = {"fine": ("ok", "green"), "lacking": ("!", "yellow"), "broken": ("error", "red")}


def doctor(as_json: AsJson = False, save: Save = RUNS) -> None:
    """Check this machine and what is installed.

    Says how to mend what is wrong. Exit code 0 where pictures can be classified, 1 where they cannot. "!" marks
    what is missing but not required.

    \b
    Examples:
      mgq doctor
      mgq doctor --json
    """
    from mgq.bench.doctor import examine
    from mgq.errors import FailureError

    diagnosis = examine(save)
    if as_json:
        sys.stdout.write(json.dumps(diagnosis.to_json(), indent=1) + "\n")
    else:
        show(diagnosis)
    if not diagnosis.works:
        raise typer.Exit(FailureError.exit_code)


def show(diagnosis: Diagnosis) -> None:
    """Draw what was found as a table, with the mend below what is wrong. Fits 80 columns."""
    from rich.table import Table
    from rich.text import Text

    from mgq.cli.console import say, show_table

    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for finding in diagnosis.findings:
        sign, style = SIGNS[finding.state.value]
        text = Text(finding.found)
        if finding.mend:
            text.append(f"\nmend: {finding.mend}", style="bold")
        table.add_row(Text(sign, style=style), finding.name, text)
    show_table(table)
    words = "pictures can be classified here" if diagnosis.works else "mgq cannot work here yet: mend the errors above"
    say(words, style="bold")

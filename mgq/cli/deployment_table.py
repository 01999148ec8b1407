"""Shows an int8 file beside the float one in each engine, with advice where it is slower."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich import box
from rich.table import Table

from mgq.cli.console import note, say, show_table
from mgq.errors import format_size, plural

if TYPE_CHECKING:
    from mgq.engine.classifier.deployment import Deployment


BUSY = 0.2
"""Part of the processor from which on the work of other programs is said to have disturbed the times."""
MOSTLY_SAME = 90.0
"""Percent of the pictures: where int8 answers fewer of them as float does, it is said."""


def show_deployment(deployment: Deployment, else_try: str = "") -> None:
    """Print speed and size of the int8 and the float file in each engine, and advice where int8 is slower.

    ``else_try``: what to try before float there.
    """
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("engine", no_wrap=True)
    for heading in ("float ms", "int8 ms", "faster", "same answer", "logits"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in deployment.rows:
        floats, faster = ("", "") if row.float_ms is None else (f"{row.float_ms:.2f}", f"{row.speedup:.2f}x")
        cells = (floats, f"{row.int8_ms:.2f}", faster, f"{row.same:.1f} %", f"{row.snr:.1f} dB")
        table.add_row(f"{row.engine} {row.version}", *cells)
    show_table(table)
    together = "one picture" if deployment.batch == 1 else plural(deployment.batch, "picture")
    say(
        f"{together} at a time on {plural(deployment.threads, 'core')}, "
        f"{plural(deployment.images, 'picture')} compared; "
        f"{format_size(deployment.float_bytes)} float, {format_size(deployment.int8_bytes)} int8"
    )
    if deployment.others >= BUSY:
        note(
            f"other programs had {deployment.others:.0%} of the processor meanwhile: times are rough, and another file "
            "may be the fastest when nothing else runs"
        )
    for row in deployment.rows:
        if row.float_share:
            note(f"{row.engine} is faster with {row.float_share:.0%} of the layers in float, so its file has them so")
    note_other_answers(deployment)
    if deployment.fastest_by_own:
        sooner = " and ".join(deployment.fastest_by_own)
        note(f"float is the imported file itself in {sooner}, which is faster there than mgq's float file")
    note_slower(deployment, else_try)
    if deployment.own_files_only:
        apart = " and ".join(deployment.own_files_only)
        note(f"{deployment.path} is slower than float in {apart}: take the file for that engine alone there")
    if deployment.is_worthless:
        note(f"not done: {deployment.path} is slower than float in every engine here, and only smaller")
        return
    for path, engines in deployment.files.items():
        its = f", the fastest int8 in {' and '.join(engines)}" if len(deployment.files) > 1 and engines else ""
        say(f"int8 file: {path}{its}")


def note_slower(deployment: Deployment, else_try: str) -> None:
    """Say in which engines int8 is slower than float, and what to do."""
    first = f"{else_try}, or " if else_try else ""
    for is_own, file in ((False, "the float file there (`mgq dump -m normal`)"), (True, "the imported file there")):
        slower = " and ".join(row.engine for row in deployment.rows if row.is_slower and row.is_own_float is is_own)
        if slower:
            note(f"int8 is slower than float in {slower}: {first}run {file}")


def note_other_answers(deployment: Deployment) -> None:
    """Say in which engines int8 often answers otherwise than float."""
    far = " and ".join(row.engine for row in deployment.rows if row.same < MOSTLY_SAME)
    if far:
        note(
            f"int8 answers fewer than {MOSTLY_SAME:.0f} % of the pictures as float does in {far}: `mgq analyze` names "
            "the layers, and --max-drop keeps some of them in float, by labelled pictures"
        )

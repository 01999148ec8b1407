"""Lays out the help of a verb: many options are shown in groups."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import click
import typer.core

from mgq.cli.option_needs import refuse_idle_options

MOST_IN_ONE_LIST = 10
WIDEST = 24
"""Columns for the flags, before their texts; longer ones have a line of their own."""
ARGUMENTS, OWN, DEVICES, OUTPUT = "Arguments", "Options", "Devices", "Output"
GROUPS: dict[str, tuple[str, ...]] = {
    "Network": (
        *("--arch", "--checkpoint", "--key", "--mode", "--target", "--engine", "--pretrained", "--ranges"),
        *("--from-scratch", "--new-head", "--classes", "--image-size", "--width", "--activation"),
    ),
    "Pictures": ("--data", "--image", "--images", "--limit", "--workers", "--jobs", "--max-bad"),
    "Import": ("--preprocess", "--mean", "--std", "--rgb", "--size", "--labels", "--scores"),
    OWN: ("--help",),
    DEVICES: ("--ngpus", "--nnodes", "--node-rank", "--master"),
    OUTPUT: (
        *("--save", "--output", "--html", "--json", "--markdown", "--plot", "--topk", "--worst", "--per-class"),
        *("--confused", "--report-freq", "--tensorboard", "--about"),
    ),
}
"""Which long options belong together, in this order, whatever the verb; all others belong to the verb's own group.

An option's ``rich_help_panel`` says otherwise."""
PRETRAINED_FLAG = "--pretrained"
_GROUP_OF = {flag: group for group, flags in GROUPS.items() for flag in flags}
_PLACES = {flag: place for flags in GROUPS.values() for place, flag in enumerate(flags, 1)}


class Verb(typer.core.TyperCommand):
    """A verb of ``mgq``, with its many options in groups; ``--pretrained`` takes an optional version.

    A verb is a function, or a class whose fields are its options and whose method ``execute`` does it.
    """

    def invoke(self, ctx: click.Context) -> Any:
        with interrupts_told():
            made = super().invoke(ctx)
            if not hasattr(made, "execute"):
                return made
            refuse_idle_options(made)
            return made.execute()

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        with interrupts_told():
            return super().parse_args(ctx, with_versions(args))

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        parameters = self.get_params(ctx)
        grouped = sum(not is_argument(parameter) for parameter in parameters) > MOST_IN_ONE_LIST
        if grouped:
            parameters = sorted(parameters, key=place_in_group)
        sections: dict[str, list[tuple[str, str]]] = {title: [] for title in (ARGUMENTS, *GROUPS)}
        for parameter in parameters:
            record = parameter.get_help_record(ctx)
            if record is not None:
                sections[title_of(parameter, grouped)].append(record)
        flags = [first for title, records in sections.items() if title != ARGUMENTS for first, _ in records]
        width = min(WIDEST, max(map(len, flags)))
        for title, records in sections.items():
            if records:
                with formatter.section(title):  # one column for all of them
                    formatter.write_dl([(first.ljust(width), text) for first, text in records], col_max=width)


@contextlib.contextmanager
def interrupts_told() -> Iterator[None]:
    """Lets Ctrl-C be told: of KeyboardInterrupt typer makes an exit code without a word."""
    try:
        yield
    except KeyboardInterrupt:
        raise click.Abort from None


def with_versions(args: list[str]) -> list[str]:
    """``args`` with ``--pretrained VERSION`` as one word; what is no known version stays an argument of the verb."""
    if PRETRAINED_FLAG not in args:
        return args
    from mgq.cli.option_types import versions
    from mgq.zoo.pretrained import DEFAULT_VERSION

    known = set(versions())
    found: list[str] = []
    waiting = list(args)
    while waiting:
        word = waiting.pop(0)
        if word == "--":
            return [*found, word, *waiting]
        if word == PRETRAINED_FLAG:
            word += f"={waiting.pop(0) if waiting and waiting[0] in known else DEFAULT_VERSION}"
        found.append(word)
    return found


def title_of(parameter: click.Parameter, grouped: bool) -> str:
    if is_argument(parameter):
        return ARGUMENTS
    if not grouped:
        return OWN
    own = getattr(parameter, "rich_help_panel", None)
    return str(own) if own else next((_GROUP_OF[flag] for flag in parameter.opts if flag in _GROUP_OF), OWN)


def place_in_group(parameter: click.Parameter) -> int:
    """Where ``parameter`` stands among those of its group; a verb's own options stay in the verb's order, first."""
    if getattr(parameter, "rich_help_panel", None):
        return 0
    return next((_PLACES[flag] for flag in parameter.opts if flag in _PLACES), 0)


def is_argument(parameter: click.Parameter) -> bool:
    return parameter.param_type_name == "argument"

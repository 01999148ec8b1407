"""Refuses options that were typed and could have no effect beside the others, before any work.

A command class lists its :class:`Need` values in ``needs``; those of its base classes count, too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from mgq.cli.import_options import ImportOptions
from mgq.cli.shared_options import is_onnx_of_others
from mgq.errors import InputError, printable


@dataclass(frozen=True)
class Need:
    """What ``options``, fields of a command, need of it to have an effect.

    ``why`` ends the sentence about an option whose need is not met: what it is for, and the mend.
    """

    options: tuple[str, ...]
    is_met: Callable[[Any], bool]
    why: str | Callable[[Any], str]

    def refuse(self, command: Any, option: click.Parameter) -> None:
        """Raise InputError about ``option``."""
        why = self.why if isinstance(self.why, str) else self.why(command)
        raise InputError(f"{show(option, getattr(command, str(option.name)))} {why}")


def refuse_idle_options(command: Any) -> None:
    """Raises InputError for an option that was typed and that ``command`` cannot heed."""
    context = click.get_current_context(silent=True)
    if context is None:  # called from Python
        return
    typed = {
        parameter.name: parameter
        for parameter in context.command.params
        if context.get_parameter_source(str(parameter.name)) is ParameterSource.COMMANDLINE
    }
    for need in list_needs(type(command)):
        idle = next((typed[name] for name in need.options if name in typed), None)
        if idle is not None and not need.is_met(command):
            need.refuse(command, idle)


def list_needs(kind: type) -> Iterator[Need]:
    """Those of the command class ``kind`` itself first."""
    for base in kind.__mro__:
        yield from vars(base).get("needs", ())


def show(option: click.Parameter, value: object) -> str:
    """``option`` as it was typed; with its ``value`` where that is a path."""
    if isinstance(option, click.Argument):
        return str(option.name).upper()
    flags = option.secondary_opts if value is False and option.secondary_opts else option.opts
    flag = max(flags, key=len)
    return f"{flag} {printable(value)}" if isinstance(value, Path) else flag


def reads_import(command: Any) -> bool:
    """Whether ``-c`` is an ONNX file of another program. Raises InputError where it cannot be read."""
    checkpoint = getattr(command, "checkpoint", None)
    return checkpoint is not None and is_onnx_of_others(checkpoint)


OF_SEVERAL_NETWORKS = Need(
    ("key",),
    lambda command: command.checkpoint is not None,
    lambda command: f"{printable(command.key)} chooses a network in the file of -c: give that, too",
)
OF_IMPORT = Need(
    tuple(field.name for field in fields(ImportOptions)),
    reads_import,
    "is for ONNX files of others: give one by -c, or leave it out",
)
OF_INT8 = Need(
    ("target", "ranges"),
    lambda command: command.mode != "normal",
    "is for int8, and -m normal is float: leave out one of them",
)
OF_ZOO = Need(
    ("pretrained",),
    lambda command: command.checkpoint is None,
    "takes the zoo's weights, and -c takes others: leave out one of them",
)


def describe_absence(command: Any) -> str:
    """That the folder of the runs is not there, as the end of a sentence; empty where it is, or will be made."""
    return "" if command.save.is_dir() or reads_import(command) else "does not exist: check the path"


OF_RUNS = Need(("save",), lambda command: not describe_absence(command), describe_absence)


def need_run(list_modes: Callable[[Any], Sequence[str]], takes_newest: bool = True) -> Need:
    """That the folder of the runs has one that can serve one of ``list_modes``, where the network comes from there.

    ``takes_newest``: the architecture is that of the newest run, where no option says which.
    """

    def describe(command: Any) -> str:
        from mgq.engine.classifier.run_lookup import describe_lack, find_newest_arch
        from mgq.quantization.option_names import parse_mode

        absence = describe_absence(command)
        if absence or command.checkpoint is not None or command.pretrained is not None:
            return absence
        modes = [parse_mode(mode) for mode in list_modes(command)]
        newest = (find_newest_arch(command.save, mode) for mode in modes) if takes_newest else ()
        arch = command.arch or next((arch for arch in newest if arch), None)
        return describe_lack(arch, modes, command.save)

    return Need(("save",), lambda command: not describe(command), describe)

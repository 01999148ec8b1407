"""The ``mgq`` command: finds the verb, runs it, and turns errors into one line and an exit code."""

from __future__ import annotations

import atexit
import contextlib
import errno
import importlib
import io
import os
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import typer
import typer.core
from click import Command, Group
from click.exceptions import ClickException, NoArgsIsHelpError, NoSuchCommand, NoSuchOption

from mgq.cli.help_layout import Verb
from mgq.errors import MgqError, nearest, printable
from mgq.machine import DEBUG_VARIABLE, hush_decoders, is_debugging, package_version, set_library_defaults
from mgq.system.end_signals import END_REQUEST, INTERRUPTED
from mgq.system.mpi_world import World, find_world

# Plain help: rich's takes twice as long to come, and typer's mixture of both prints stray backslashes.
typer.core.HAS_RICH = False

VERBS = {
    "train": "training:TrainCommand",
    "qat": "training:QatCommand",
    "calibrate": "calibrate:CalibrateCommand",
    "eval": "eval:EvalCommand",
    "infer": "infer:InferCommand",
    "analyze": "analyze:AnalyzeCommand",
    "dump": "dump:DumpCommand",
    "bench": "bench:BenchCommand",
    "report": "report:ReportCommand",
    "serve": "serve:ServeCommand",
    "models": "models:ModelsCommand",
    "doctor": "doctor:doctor",
}
"""Verb -> its module in this package, and a class or function in it."""
COMPLETION_VARIABLE = "_MGQ_COMPLETE"


def show_version(wanted: bool) -> None:
    if wanted:
        from mgq.runtime.registry import list_packages

        for name, package in list_packages().items():
            typer.echo(f"{name} {package_version(package) or 'not installed'}")
        typer.echo(f"Python {sys.version.split()[0]}")
        raise typer.Exit


def options(
    version: bool = typer.Option(False, "--version", callback=show_version, is_eager=True, help="Versions, then exit."),
    debug: bool = typer.Option(False, "--debug", help="Tracebacks, and the libraries' own messages."),
) -> None:
    if debug:
        os.environ[DEBUG_VARIABLE] = "1"
    set_library_defaults()
    hush_decoders()


def app_with(names: Iterable[str]) -> typer.Typer:
    """The command with the verbs ``names``. Only their modules are imported."""
    app = typer.Typer(
        name="mgq",
        help="From a float32 image classifier to an int8 network at the speed of the machine.",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(options)
    for name in names:
        module, _, function = VERBS[name].partition(":")
        verb: Callable[..., Any] = getattr(importlib.import_module(f"mgq.cli.{module}"), function)
        app.command(name, cls=Verb)(verb)
    return app


def find_verbs(words: list[str]) -> Iterable[str]:
    """The verb that ``words`` begin with; all verbs for completion, for help, and where there is no such verb."""
    first = next((word for word in words if not word.startswith("-")), "")
    return [first] if first in VERBS and COMPLETION_VARIABLE not in os.environ else VERBS


def run() -> None:
    """Entry point: exit code 2 and one line for wrong use and bad input, 1 and one line for a failure."""
    open_what_is_closed()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a sign that the locale does not have is no failure
            stream.reconfigure(errors="replace")
    world = find_world()
    with END_REQUEST.watch():  # what is half written is taken away
        code = run_alone() if world is None else run_among(world, find_verbs(sys.argv[1:]))
    sys.exit(code)


def open_what_is_closed() -> None:
    """Where the caller closed standard output or errors (``>&-``), what is printed there goes nowhere."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115 (for the whole run)


def run_and_leave() -> None:
    """The installed command: :func:`run`, and where that can be, an end without taking the process apart.

    What the system takes back anyway, numpy's and OpenCV's objects above all, took longer than to run the network.
    """
    try:
        run()
    except SystemExit as end:
        if find_verbs(sys.argv[1:]) == [LEAVES_AT_ONCE] and not needs_farewell():
            leave(end)
        raise


LEAVES_AT_ONCE = "infer"
"""The verb that is over in no time. It has no child, and no file open, when it ends."""


def needs_farewell() -> bool:
    """Whether somebody waits for this process to end in order: a thread that works on, or other processes of MPI."""
    others = (thread for thread in threading.enumerate() if thread is not threading.main_thread())
    return find_world() is not None or not all(thread.daemon for thread in others)


def leave(end: SystemExit) -> None:
    """Exit with the code of ``end``, after what is registered with :mod:`atexit`; return where output is stuck."""
    atexit._run_exitfuncs()
    with contextlib.suppress(OSError, ValueError, AttributeError):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(end.code if isinstance(end.code, int) else 0)


def run_alone() -> int:
    """Run the command line in this process; return the exit code."""
    try:
        code = run_verb()
        sys.stdout.flush()
    except ClickException as error:
        code = report_failure(usage_line(error), 2)
    except MgqError as error:
        if is_debugging():
            traceback.print_exc()
        code = error.exit_code if error.is_said else report_failure(str(error), error.exit_code)
    except BrokenPipeError:  # the reader of our pipe has seen enough
        drop_output()
        code = 0
    except (KeyboardInterrupt, typer.Abort):
        code = report_failure("interrupted", INTERRUPTED)
    except MemoryError:
        if is_debugging():
            raise
        code = report_failure("memory is short: take a smaller --batch, --batch-size or --image-size", 1)
    except Exception as error:
        if is_debugging():
            raise
        if why := why_output_is_stuck(error):
            drop_output()
            return report_failure(f"standard output cannot be written ({why}): send it elsewhere", 1)
        if type(error).__name__ == "ShellDetectionFailure":  # of typer's completion, and it says nothing itself
            return report_failure("the shell was not recognized: run this in the shell that is to complete", 2)
        code = report_failure(f"unexpected {type(error).__name__}: {error}; `mgq --debug ...` shows where", 1)
    return code if isinstance(code, int) else 0


def run_verb() -> Any:
    """Run what the command line asks for; return the verb's result, or 2 where only help could be given."""
    try:
        return app_with(find_verbs(sys.argv[1:]))(prog_name="mgq", standalone_mode=False)
    except NoArgsIsHelpError as error:
        typer.echo(error.format_message())
        return 2
    except SystemExit as end:
        if isinstance(end.__context__, BrokenPipeError):  # for which click and rich have an exit code of their own
            raise end.__context__ from None
        raise
    except Exception as error:
        if is_interrupt(error):
            raise KeyboardInterrupt from error
        raise


def is_interrupt(error: BaseException | None) -> bool:
    """Whether Ctrl-C is behind ``error``: of one that comes while a library is loaded, that makes an ImportError."""
    if END_REQUEST.is_made:
        return True
    while error is not None:
        if isinstance(error, KeyboardInterrupt) or str(error).startswith(KeyboardInterrupt.__name__):
            return True
        error = error.__cause__ or error.__context__
    return False


STUCK = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF})
"""Why standard output may take nothing. A file that is written has its own line, in :mod:`mgq.io.atomic`."""


def why_output_is_stuck(error: Exception) -> str:
    """Why standard output takes nothing, where ``error`` is of that kind; empty where it takes an empty line."""
    if isinstance(error, OSError) and error.errno in STUCK and error.filename is None:
        try:
            print(flush=True)  # with what was not written before, if that was kept
        except OSError as again:
            return again.strerror or type(again).__name__
    return ""


def drop_output() -> None:
    """Let what standard output does not take go nowhere, so that the end of the process can write it out."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


SHARED = {"train", "qat", "eval"}
"""The verbs whose work several processes share that MPI has started."""


def run_among(world: World, names: Iterable[str]) -> int:
    """As :func:`run_alone`, in one of the processes of an MPI job: together with the others, or in the first alone."""
    from mgq.cli import ranks

    if not set(names) <= SHARED:
        return ranks.work_alone(world, run_alone)
    return ranks.work_together(world, run_alone)


def usage_line(error: ClickException) -> str:
    context = getattr(error, "ctx", None)
    verb = context.command_path if context else "mgq"
    said = error.format_message().rstrip(".")
    if isinstance(error, NoSuchOption):
        said = f"`{verb}` has no option {error.option_name}{hint_for(error)}"
    elif isinstance(error, NoSuchCommand):
        near = nearest(error.command_name, verbs())
        said = f"there is no verb '{printable(error.command_name)}'" + (f"; did you mean `mgq {near}`?" if near else "")
    return f"{said[:1].lower() if said.startswith(STARTS) else said[:1]}{said[1:]}; see `{verb} --help`"


STARTS = ("Got", "Missing", "Option", "Invalid")
"""How click's sentences begin; ours stand behind ``error:``."""


def verbs() -> Mapping[str, Command]:
    """The verbs by name."""
    main = typer.main.get_command(app_with(VERBS))
    assert isinstance(main, Group)
    return main.commands


def hint_for(error: NoSuchOption) -> str:
    """For an option that the verb does not have: the file that it names, the verb that has it, or the most similar."""
    flag = error.option_name
    dashed = next((word for word in sys.argv[1:] if word.startswith(flag) and Path(word).is_file()), None)
    if dashed is not None:  # click takes the first letter of it alone
        return f"; for the file of that name write ./{printable(dashed)}"
    if flag in ("--debug", "--version"):
        return f": it comes before the verb, as in `mgq {flag}`"
    own = error.ctx.command.params if error.ctx is not None else []
    near = nearest(flag, [opt for parameter in own for opt in parameter.opts if opt.startswith("--")])
    others = [name for name, verb in verbs().items() if any(flag in parameter.opts for parameter in verb.params)]
    if others:
        return f", which is one of `mgq {others[0]}`"
    return f"; did you mean {near}?" if near else ""


def report_failure(message: str, code: int) -> int:
    from mgq.cli.console import print_error

    print_error(message)
    return code

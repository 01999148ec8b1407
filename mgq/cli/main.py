"""The ``mgq`` command: its verbs, and how every one of them fails."""

from __future__ import annotations

import os
import sys

import typer
import typer.core
from click.exceptions import ClickException, NoArgsIsHelpError

from mgq.cli.analyze import analyze
from mgq.cli.bench import bench
from mgq.cli.calibrate import calibrate
from mgq.cli.dump import dump
from mgq.cli.eval import evaluate
from mgq.cli.infer import infer
from mgq.cli.models import models
from mgq.cli.report import report
from mgq.cli.training import qat, train
from mgq.errors import MgqError

INTERRUPTED = 130

# Plain help: rich's takes twice as long to come, and typer's mixture of both prints stray backslashes.
typer.core.HAS_RICH = False

app = typer.Typer(
    name="mgq",
    help="From a float32 image classifier to an int8 network at the speed of the machine.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for verb in (train, qat, calibrate, infer, analyze, dump, bench, report, models):
    app.command()(verb)
app.command("eval")(evaluate)


def shown_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        packages = ("mgq", "megengine", "numpy", "opencv-python")
        typer.echo("\n".join(f"{name} {version(name)}" for name in packages))
        typer.echo(f"python {sys.version.split()[0]}")
        raise typer.Exit


@app.callback()
def options(
    version: bool = typer.Option(
        False, "--version", callback=shown_version, is_eager=True, help="Versions, then exit."
    ),
    debug: bool = typer.Option(False, "--debug", help="Tracebacks, and the libraries' own messages."),
) -> None:
    if debug:
        os.environ["MGQ_DEBUG"] = "1"


def debugging() -> bool:
    return bool(os.environ.get("MGQ_DEBUG")) or "--debug" in sys.argv


def run() -> None:
    """Entry point: exit code 2 and one line for wrong use and bad input, 1 and one line for a failure."""
    if sys.version_info[:2] != (3, 10):  # MegEngine has no wheel for a later one
        sys.exit(f"error: mgq needs Python 3.10, not {sys.version.split()[0]}; `uv run mgq` finds or fetches it")
    try:
        code = app(standalone_mode=False)
        sys.stdout.flush()
    except NoArgsIsHelpError as error:
        typer.echo(error.format_message())
        code = 2
    except ClickException as error:
        code = failed(usage_line(error), 2)
    except MgqError as error:
        if debugging():
            raise
        code = failed(str(error), error.exit_code)
    except BrokenPipeError:  # the reader of our pipe has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except (KeyboardInterrupt, typer.Abort):
        code = failed("interrupted", INTERRUPTED)
    except Exception as error:
        if debugging():
            raise
        code = failed(f"unexpected {type(error).__name__}: {error}; `mgq --debug ...` shows where", 1)
    sys.exit(code if isinstance(code, int) else 0)


def usage_line(error: ClickException) -> str:
    context = getattr(error, "ctx", None)
    verb = context.command_path if context else "mgq"
    return f"{error.format_message().rstrip('.')}; see `{verb} --help`"


def failed(message: str, code: int) -> int:
    from mgq.cli.console import print_error

    print_error(message)
    return code

"""``mgq serve``: serves a network over HTTP."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mgq.cli.option_needs import Need
from mgq.cli.option_types import AT_LEAST_NONE, AT_LEAST_ZERO, COUNT, FACTOR, PORT
from mgq.cli.shared_options import (
    Arch,
    EngineName,
    is_onnx_of_others,
    open_network,
    take_checkpoint,
)
from mgq.engine.classifier.network_options import RUNS, NetworkOptions, Usage
from mgq.errors import InputError, printable

if TYPE_CHECKING:
    from mgq.service.limits import Limits

WAIT_MS = 2.0
SERVED = (".onnx", ".so")


@dataclass(frozen=True, kw_only=True)
class ServeCommand:
    """Answer over HTTP what is in pictures.

    POST /predict takes one picture as the body, or several as a form. GET / is
    a page to drop a picture on; there are /health and /metrics, too. SIGTERM
    and Ctrl-C end it when what runs is answered.

    \b
    Examples:
      mgq serve
      mgq serve -c net.onnx --port 8080
      mgq serve -c net.so --host 0.0.0.0 --max-requests 64
    """

    checkpoint: Annotated[
        Path | None,
        typer.Option("-c", "--checkpoint", help="An .onnx or .so file of `mgq dump`.", show_default="the built-in one"),
    ] = None
    arch: Arch = None
    engine: EngineName = None
    threads: Annotated[
        int | None,
        typer.Option("--threads", click_type=COUNT, help="Threads of the engine.", show_default="one a core"),
    ] = None
    host: Annotated[str, typer.Option("--host", help="Address to listen on; 0.0.0.0 is every one.")] = "127.0.0.1"
    port: Annotated[int, typer.Option("--port", click_type=PORT, help="Port to listen on; 0 takes a free one.")] = 8000
    descriptor: Annotated[
        int | None,
        typer.Option("--fd", click_type=AT_LEAST_NONE, metavar="NUMBER", help="An inherited socket that listens."),
    ] = None
    batch: Annotated[
        int | None,
        typer.Option("--batch", click_type=COUNT, help="Pictures that run together.", show_default="16; native: 1"),
    ] = None
    wait: Annotated[
        float | None,
        typer.Option(
            "--wait",
            click_type=AT_LEAST_ZERO,
            metavar="MS",
            help="Longest wait for pictures to run together.",
            show_default="2",
        ),
    ] = None
    max_body: Annotated[float, typer.Option("--max-body", click_type=FACTOR, metavar="MB", help="Largest request.")] = (
        20.0
    )
    max_requests: Annotated[
        int, typer.Option("--max-requests", click_type=COUNT, help="Requests at a time; more get status 503.")
    ] = 32
    timeout: Annotated[
        float,
        typer.Option("--timeout", click_type=FACTOR, metavar="S", help="Limit for an upload, and for its answer."),
    ] = 30.0

    needs = (
        Need(
            ("host", "port"),
            lambda command: command.descriptor is None,
            "opens a socket, and --fd is one: leave out one of them",
        ),
    )

    def execute(self) -> None:
        """Open the socket, then the network, and answer until the end."""
        refuse_others(self.checkpoint)
        if self.checkpoint is not None and is_onnx_of_others(self.checkpoint):
            raise InputError(describe_served(self.checkpoint))
        take_checkpoint(self.checkpoint)
        import_server()
        from mgq.cli.console import note, progress, say
        from mgq.quantization.option_names import ONNX
        from mgq.service.application import Service
        from mgq.service.server import open_socket, serve, take_socket

        listening = open_socket(self.host, self.port) if self.descriptor is None else take_socket(self.descriptor)
        # The built-in network's file cannot be kept where a disk is full: it is made anew.
        target = ONNX if self.checkpoint is None else None
        options = NetworkOptions(self.arch, self.checkpoint, engine=self.engine, target=target)
        with progress() as on_progress:
            network = open_network(options, None, on_progress, Usage(kept=True, threads=self.threads))
        note(f"{network.spec.name}, {network.origin}")
        service = Service(network, self.limits(), note)
        self.refuse_idle_batching(service.batcher.most)
        serve(service, listening, lambda address: say(f"{address} answers; Ctrl-C or SIGTERM ends it"))
        note("stopped: every request that had come is answered")

    def refuse_idle_batching(self, most: int) -> None:
        """Raises InputError for options on pictures that run together, where at most ``most`` do."""
        if self.batch is not None and most < self.batch:
            raise InputError(
                "the file takes one picture at a time: leave --batch out, or write it by `mgq dump --batch 0`"
            )
        if self.wait is not None and most == 1:
            mend = "give more by --batch" if self.batch == 1 else "give --batch, where the file takes more"
            raise InputError(
                f"--wait is for pictures that run together, and here each runs alone: {mend}, or leave it out"
            )

    def limits(self) -> Limits:
        """What one client may ask of the service."""
        from mgq.service.limits import MEGA, Limits

        return Limits(
            body_bytes=int(self.max_body * MEGA),
            requests=self.max_requests,
            body_s=self.timeout,
            answer_s=self.timeout,
            batch=self.batch,
            gather_s=(WAIT_MS if self.wait is None else self.wait) / 1000,
        )


def refuse_others(checkpoint: Path | None) -> None:
    """Raises InputError for a file that is not one of those that are served."""
    if checkpoint is not None and checkpoint.suffix.lower() not in SERVED:
        raise InputError(
            f"{printable(checkpoint)} is not served: write an {SERVED[0]} or {SERVED[1]} file by `mgq dump`"
        )


def describe_served(foreign: Path) -> str:
    """What of ``foreign``, another program's file, is served."""
    made = RUNS / f"{foreign.stem}.calibration" / f"{foreign.stem}.int8.onnx"
    name = printable(foreign)
    if made.is_file():
        return f"{name} is another program's file: serve what was made of it, -c {printable(made)}"
    return f"{name} is another program's file: `mgq calibrate -c {name} -d FOLDER` makes one of it that is served"


def import_server() -> None:
    """Raises InputError where the packages of the extra are not installed."""
    from importlib.util import find_spec

    packages = ("starlette", "uvicorn", "python_multipart", "prometheus_client")
    missing = next((package for package in packages if find_spec(package) is None), None)
    if missing is not None:
        raise InputError(f"{missing} is not installed, which serving needs: pip install 'mgq[serve]'")

"""The server around a service: its socket, its connections, and how it stops without losing a request."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from mgq.errors import FailureError, InputError, printable
from mgq.service.application import Service
from mgq.service.limits import CONNECTIONS, HEAD_S, LAST_REQUEST_S

BACKLOG = 1024


def open_socket(host: str, port: int) -> socket.socket:
    """Bind a socket to ``host`` and ``port`` (0: any free one); it does not listen yet.

    Raises InputError where that cannot be, such as for a port in use.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as error:
        raise InputError(f"--host {printable(host)} is not known ({printable(error)}): give another one") from None
    found = socket.socket(family, kind, protocol)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind(address)
    except OSError as error:
        found.close()
        if error.errno == errno.EADDRINUSE:
            raise InputError(f"port {port} of {printable(host)} is in use: give another --port") from None
        why = os.strerror(error.errno) if error.errno else printable(error)
        raise InputError(f"cannot listen on port {port} of {printable(host)} ({why}): give another") from None
    return found


def take_socket(descriptor: int) -> socket.socket:
    """Take over the listening socket that a process manager passed as ``descriptor``. Raises InputError where it is
    none."""
    try:
        found = socket.socket(fileno=os.dup(descriptor))
        if not found.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            raise InputError(f"--fd {descriptor} is a socket on which nobody listens: pass one that listens")
    except OSError:
        raise InputError(f"--fd {descriptor} is no socket: pass the number of a listening one") from None
    return found


def address_of(listening: socket.socket) -> str:
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def make_server(service: Service, on_ready: Callable[[], None]) -> Server:
    """Make the HTTP server for ``service``; it calls ``on_ready`` once it answers."""
    config = uvicorn.Config(
        service.app,
        http=Connection,
        ws="none",
        loop="asyncio",
        lifespan="on",
        log_config=None,
        log_level="critical",
        access_log=False,
        server_header=False,
        backlog=BACKLOG,
        limit_concurrency=CONNECTIONS,
        timeout_graceful_shutdown=stop_seconds(service),
    )
    return Server(config, service, on_ready)


def serve(service: Service, listening: socket.socket, on_ready: Callable[[str], None]) -> None:
    """Answer on ``listening`` until SIGTERM or SIGINT: then nothing more is accepted, and what runs is finished.

    ``on_ready`` gets the address once requests are answered. Raises FailureError where the server cannot start.
    """
    server = make_server(service, lambda: on_ready(address_of(listening)))
    with signals_to(server):
        asyncio.run(server.serve([listening]))
    if not server.started:
        raise FailureError(f"the server did not start on {address_of(listening)}: run it by `mgq --debug serve`")


def stop_seconds(service: Service) -> int:
    """The longest time in seconds that a running request can take."""
    return int(service.limits.body_s + service.limits.answer_s + LAST_REQUEST_S) + 1


class Server(uvicorn.Server):
    """uvicorn's server, which tells the service that it stops, and when it is there."""

    def __init__(self, config: uvicorn.Config, service: Service, on_ready: Callable[[], None]) -> None:
        super().__init__(config)
        self.service, self.on_ready = service, on_ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self.on_ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.service.stopping = True
        await super().shutdown(sockets)


@contextlib.contextmanager
def signals_to(server: uvicorn.Server) -> Iterator[None]:
    """Inside, a signal to end makes ``server`` stop in good order, without an exception."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        server.should_exit = True

    former = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


class Connection(H11Protocol):
    """One connection, closed where no whole head of a request has come for ``HEAD_S`` seconds and no request runs.

    Where the service stops, a connection that is idle may bring one more request: its client may have sent it.
    """

    watch: asyncio.TimerHandle | None = None

    @property
    def answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self.look()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self.look()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self.look()

    def connection_lost(self, exc: Exception | None) -> None:
        self.forget()
        super().connection_lost(exc)

    def shutdown(self) -> None:
        if self.answering:
            super().shutdown()
        else:
            self.loop.call_later(LAST_REQUEST_S, self.close_idle)

    def look(self) -> None:
        """Start the timeout of an idle connection, or stop it."""
        if self.answering or self.transport.is_closing():
            self.forget()
        elif self.watch is None:
            self.watch = self.loop.call_later(HEAD_S, self.close_idle)

    def forget(self) -> None:
        if self.watch is not None:
            self.watch.cancel()
            self.watch = None

    def close_idle(self) -> None:
        if not self.answering and not self.transport.is_closing():
            self.transport.close()

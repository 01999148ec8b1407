"""A server on this machine that can be told to misbehave."""

from __future__ import annotations

import contextlib
import hashlib
import random
import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from mgq.io.download import Source

CONTENT = random.Random(7).randbytes(200_000)


@dataclass
class Asked:
    """One request, and how many bytes of the body it was answered with."""

    headers: dict[str, str]
    sent: int = 0

    @property
    def first_byte(self) -> int | None:
        wanted = self.headers.get("Range")
        return None if wanted is None else int(wanted.removeprefix("bytes=").removesuffix("-"))


Mood = Callable[["Handler", Asked], None]


@dataclass
class Shelf:
    """What the server has, how it answers the next requests (``well`` after the last), and what was asked."""

    content: bytes = CONTENT
    headers: dict[str, str] = field(default_factory=lambda: {"ETag": '"one"'})
    moods: deque[Mood] = field(default_factory=deque)
    asked: list[Asked] = field(default_factory=list)
    port: int = 0
    go_on: threading.Event = field(default_factory=threading.Event)  # for the moods that wait

    def source(self, content: bytes = CONTENT, name: str = "weights.bin") -> Source:
        """Where ``content`` is said to be."""
        digits = hashlib.sha256(content).hexdigest()
        return Source(f"http://127.0.0.1:{self.port}/{name}", name, len(content), digits)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    shelf: Shelf

    def do_GET(self) -> None:
        asked = Asked(dict(self.headers.items()))
        self.shelf.asked.append(asked)
        mood = self.shelf.moods.popleft() if self.shelf.moods else well
        self.close_connection = True
        with contextlib.suppress(ConnectionError):  # the client hung up
            mood(self, asked)

    def do_CONNECT(self) -> None:
        self.send_error(403, "Not from here")

    def log_message(self, *_: object) -> None:
        pass

    def head(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**self.shelf.headers, **headers}.items():
            self.send_header(name, value)
        self.end_headers()

    def body(self, asked: Asked, data: bytes) -> None:
        self.wfile.write(data)
        self.wfile.flush()
        asked.sent += len(data)

    def head_and_rest(self, asked: Asked, heed_if_range: bool = True) -> bytes:
        """Sends the head of a proper answer and returns the body that belongs to it."""
        content, first = self.shelf.content, asked.first_byte
        mark = self.shelf.headers.get("ETag") or self.shelf.headers.get("Last-Modified")
        if heed_if_range and asked.headers.get("If-Range", mark) != mark:
            first = None
        if first is None:
            self.head(200, {"Content-Length": str(len(content))})
            return content
        if first >= len(content):
            self.head(416, {"Content-Range": f"bytes */{len(content)}", "Content-Length": "0"})
            return b""
        total = len(content)
        span = f"bytes {first}-{total - 1}/{total}"
        self.head(206, {"Content-Range": span, "Content-Length": str(total - first)})
        return content[first:]


def well(handler: Handler, asked: Asked) -> None:
    handler.body(asked, handler.head_and_rest(asked))


@pytest.fixture
def shelf() -> Iterator[Shelf]:
    shelf = Shelf()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("ShelfHandler", (Handler,), {"shelf": shelf}))
    shelf.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield shelf
    shelf.go_on.set()
    server.shutdown()
    server.server_close()
    thread.join()

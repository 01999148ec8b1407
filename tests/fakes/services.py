"""A service that answers in a thread of the test's own process."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

from mgq.engine.classifier.classifier import Classifier
from mgq.events import OnMessage, log_message
from mgq.service import server as servers
from mgq.service.application import Service
from mgq.service.limits import Limits
from mgq.service.server import make_server, open_socket

PATIENCE_S = 60


@contextlib.contextmanager
def served(
    classifier: Classifier, limits: Limits | None = None, on_message: OnMessage = log_message
) -> Iterator[tuple[str, Service]]:
    """A service in a thread of this process, and its address."""
    service = Service(classifier, limits or Limits(), on_message)
    listening = open_socket("127.0.0.1", 0)
    ready = threading.Event()
    server = make_server(service, ready.set)
    thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
    address = servers.address_of(listening)
    thread.start()
    assert ready.wait(PATIENCE_S)
    try:
        yield address, service
    finally:
        server.should_exit = True
        thread.join(PATIENCE_S)
        assert not thread.is_alive()

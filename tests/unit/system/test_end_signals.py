"""Signals that end a command: none is lost, and none cuts off what is worth nothing by halves."""

from __future__ import annotations

import contextlib
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mgq.system.end_signals import EndRequest

SENDS_SIGNAL = "import signal\nsignal.raise_signal(signal.SIGTERM)\n"


@pytest.fixture
def request_to_end() -> EndRequest:
    return EndRequest()


@pytest.fixture(autouse=True)
def usual_interrupts() -> Iterator[None]:
    """A shell that starts the tests in the background has Ctrl-C ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def send(number: signal.Signals = signal.SIGTERM) -> None:
    """To this thread: another one would take it at another time."""
    signal.raise_signal(number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_what_runs_and_handlers_are_put_back(request_to_end: EndRequest, number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt), request_to_end.watch():
        send(number)
    assert signal.getsignal(number) == before and request_to_end.is_made


def test_a_signal_while_modules_are_loaded_comes_after_that(
    request_to_end: EndRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A library that catches everything while it is loaded would swallow it."""
    (tmp_path / "sends_signal.py").write_text(SENDS_SIGNAL + "loaded = True\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    loaded = False
    with pytest.raises(KeyboardInterrupt), request_to_end.watch():
        import sends_signal  # type: ignore[import-not-found]

        loaded = sends_signal.loaded
        time.sleep(60)
    assert loaded and sys.modules.pop("sends_signal") is not None
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_a_signal_that_was_swallowed_is_obeyed_later(request_to_end: EndRequest) -> None:
    with pytest.raises(KeyboardInterrupt), request_to_end.watch():
        with contextlib.suppress(KeyboardInterrupt):
            send()
        request_to_end.obey()


def test_a_signal_waits_while_it_is_held(request_to_end: EndRequest) -> None:
    done = []
    with pytest.raises(KeyboardInterrupt), request_to_end.watch():
        with request_to_end.hold():
            send()
            done.append("whole")
        done.append("never")
    assert done == ["whole"]

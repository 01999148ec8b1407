"""Which signals end a command: from the keyboard, from other programs, and from a terminal that is closed."""

from __future__ import annotations

import signal


def end_signals() -> tuple[signal.Signals, ...]:
    """Those that a command catches to end in order. `nohup` and its kin let it live on without its terminal."""
    always = (signal.SIGINT, signal.SIGTERM)
    if not hasattr(signal, "SIGHUP") or signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        return always
    return (*always, signal.SIGHUP)

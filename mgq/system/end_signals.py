"""Which signals end a command: from the keyboard, from other programs, and from a terminal that is closed."""

from __future__ import annotations

import signal


def end_signals() -> tuple[signal.Signals, ...]:
    """Those that a command catches to end in order. `nohup` and its kin let it live on without its terminal."""
    is_kept = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return (signal.SIGINT, signal.SIGTERM) if is_kept else (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

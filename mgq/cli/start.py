"""The start of the ``mgq`` command: Ctrl-C is one line from here on, not a traceback of modules that are being loaded.

It imports next to nothing, so that it is there at once.
"""

from __future__ import annotations

import signal

from mgq.system.end_signals import leave_at_once


def run_and_leave() -> None:
    """The installed command; see :func:`mgq.cli.main.run_and_leave`."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, leave_at_once)
    from mgq.cli import main

    main.run_and_leave()

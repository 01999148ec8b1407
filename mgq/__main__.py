"""``python -m mgq``."""

from mgq.cli.start import run_and_leave

run_and_leave()

"""``python -m mgq``."""

from mgq.cli.main import run_and_leave

run_and_leave()

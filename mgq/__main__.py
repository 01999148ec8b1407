"""``python -m mgq``."""

from mgq.cli.main import run

run()

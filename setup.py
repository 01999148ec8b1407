"""Says what to do under a Python that MegEngine has no wheel for; everything else stands in pyproject.toml."""

import sys

from setuptools import setup

if sys.version_info[:2] != (3, 10):
    sys.exit(
        f"mgq needs Python 3.10 (the newest that MegEngine has wheels for), and this is {sys.version.split()[0]}. "
        "Use `python3.10 -m pip install .`, or `pip install uv && uv run mgq`, which finds or fetches a 3.10 itself."
    )

setup()

"""The fixtures that tests of several rooms share."""

from __future__ import annotations

from tests.fakes.download_server import shelf

__all__ = ["shelf"]

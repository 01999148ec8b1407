"""How MegEngine is started."""

from __future__ import annotations

from megengine.core import get_option

from mgq.system.megengine_start import NEVER, import_megengine


def test_no_tensor_is_ever_listed_to_be_dropped() -> None:
    """Two threads of MegEngine change that list, one of them without a lock."""
    import_megengine()
    assert get_option("dtr_evictee_minimum_size") == NEVER

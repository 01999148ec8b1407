"""Which devices the options of a training mean."""

from __future__ import annotations

import pytest

from mgq.engine.distributed import process_group
from mgq.engine.distributed.process_group import check_cluster
from mgq.errors import InputError


def test_a_gpu_that_megengine_does_not_find_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_group, "gpus", lambda: 0)
    with pytest.raises(InputError, match=r"^-n 1: MegEngine finds no GPU here \(.+\): leave -n out$"):
        check_cluster(1, 1, 0, None)
    assert check_cluster(None, 1, 0, None).devices == check_cluster(0, 1, 0, None).devices

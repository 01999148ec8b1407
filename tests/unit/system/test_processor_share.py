"""What other programs take of the processor is neither idle nor this process's own."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from mgq.system import processor_share
from mgq.system.processor_share import ProcessorTime, read_processor_time, share_of_others


@pytest.mark.parametrize(
    ("idle", "own", "share"), [(2.0, 0.0, 0.0), (1.0, 1.0, 0.0), (0.0, 0.5, 0.75), (0.0, 0.0, 1.0), (1.9, 0.2, 0.0)]
)
def test_the_share_is_what_is_left_of_all_cores(
    monkeypatch: pytest.MonkeyPatch, idle: float, own: float, share: float
) -> None:
    """Two cores for a second; clocks that tick apart may leave less than nothing."""
    before = ProcessorTime(100.0, 40.0, 7.0)
    now = ProcessorTime(102.0, 40.0 + idle, 7.0 + own)
    monkeypatch.setattr(processor_share, "read_processor_time", lambda: now)
    assert share_of_others(before) == pytest.approx(share)


def test_only_cores_that_this_process_may_run_on_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processor_share, "list_usable_cores", lambda: {1, 3})
    cores = [SimpleNamespace(idle=10.0**number, iowait=0.5) for number in range(4)]
    monkeypatch.setattr("psutil.cpu_times", lambda percpu: cores)
    assert read_processor_time().idle == pytest.approx(10 + 1000 + 1)

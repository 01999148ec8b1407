"""Which devices the options of a training mean, and what they compute in."""

from __future__ import annotations

import pytest

from mgq.api import make_train_options
from mgq.engine.distributed import process_group
from mgq.engine.distributed.process_group import check_cluster
from mgq.engine.training import train_options
from mgq.errors import InputError
from mgq.quantization.modes import Mode


def test_a_gpu_that_megengine_does_not_find_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_group, "gpus", lambda: 0)
    with pytest.raises(InputError, match=r"^-n 1: MegEngine finds no GPU here \(.+\): leave -n out$"):
        check_cluster(1, 1, 0, None)
    assert check_cluster(None, 1, 0, None).devices == check_cluster(0, 1, 0, None).devices


@pytest.mark.parametrize(
    "mode, on_processor, has_bfloat16, part",
    [
        (Mode.QAT, True, True, "--bf16 is for float training"),
        (Mode.NORMAL, False, True, "--bf16 is for processors"),
        (Mode.NORMAL, True, False, "--bf16 needs a processor with avx512_bf16"),
        (Mode.NORMAL, True, True, ""),
    ],
)
def test_bfloat16_is_refused_where_it_cannot_be(
    mode: Mode, on_processor: bool, has_bfloat16: bool, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_options, "runs_on_processor", lambda: on_processor)
    monkeypatch.setattr(train_options, "has_bfloat16", lambda: has_bfloat16)
    wanted = make_train_options({"bf16": True})
    if part:
        with pytest.raises(InputError, match=f"^{part}"):
            train_options.all_changes(wanted, mode)
    else:
        assert train_options.all_changes(wanted, mode)["bf16"]

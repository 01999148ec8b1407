"""Processes that find other pictures than the first do not train with it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from mgq.api import make_train_options
from mgq.engine.distributed.process_group import ProcessGroup
from mgq.engine.training.training_process import refuse_other_pictures
from mgq.engine.training.training_run import make_float_job
from mgq.errors import InputError
from mgq.events import NO_CALLBACKS


@dataclass(frozen=True)
class OtherSecond(ProcessGroup):
    """Two processes, of which the second finds one picture less."""

    is_alike: bool = False

    @property
    def share(self) -> tuple[int, int]:
        return 0, 2

    def gather(self, thing: Any) -> list[Any]:
        train, val = thing
        return [thing, thing if self.is_alike else [{**train, "pictures": train["pictures"] - 1}, val]]


def test_a_rank_with_other_pictures_is_named(tmp_path: Path) -> None:
    job = make_float_job(make_train_options({"arch": "shufflenet_v1_x0_5_g3", "save": tmp_path}), NO_CALLBACKS)
    with pytest.raises(InputError, match="rank 1 finds other pictures in synthetic than rank 0"):
        refuse_other_pictures(job, OtherSecond())
    refuse_other_pictures(job, OtherSecond(is_alike=True))
    refuse_other_pictures(job, ProcessGroup())

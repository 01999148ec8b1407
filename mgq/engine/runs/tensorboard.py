"""Writes the metrics of a run for TensorBoard.

tensorboardX's own ``SummaryWriter`` hands events to a thread through a short queue. When that thread dies of a full
disk, the training waits on the queue for ever; and a killed process loses what is in it. So records are appended here,
in TFRecord's format: length, its checksum, data, its checksum.
"""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mgq.io.append import append_whole
from mgq.io.atomic import explain_write_errors

if TYPE_CHECKING:
    from tensorboardX.proto.event_pb2 import Event

TAGS = {
    "loss": "loss/train",
    "val_loss": "loss/val",
    "top1": "top1/train",
    "val_top1": "top1/val",
    "val_top5": "top5/val",
    "lr": "learning_rate",
    "images_per_second": "images_per_second",
}


class EventsFile:
    """One file of scalars in ``folder``, on the disk after every :meth:`add`.

    Methods raise as :func:`mgq.io.atomic.explain_write_errors` does.
    """

    def __init__(self, folder: Path) -> None:
        # TensorBoard reads a folder's files by name, so the name begins with the time.
        now = time.time_ns()
        self.path = folder / f"events.out.tfevents.{now // 10**9}.{socket.gethostname()}.{now}"
        with explain_write_errors(self.path):
            folder.mkdir(exist_ok=True)
        self._write(_event(file_version="brain.Event:2"))

    @classmethod
    def continue_after(cls, folder: Path, earlier: Sequence[Mapping[str, Any]]) -> EventsFile:
        """A new file that goes on after the entries ``earlier``, the only ones to be shown of earlier files.

        Where there are no earlier files, ``earlier`` is written to this one.
        """
        resumed = folder.is_dir()
        file = cls(folder)
        if resumed:
            file._hide_from(step_of(earlier[-1]) + 1 if earlier else 0)
        else:
            for entry in earlier:
                file.add(entry)
        return file

    def add(self, entry: Mapping[str, Any]) -> None:
        """Write the metrics of one epoch."""
        from tensorboardX.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=tag, simple_value=entry[name]) for name, tag in TAGS.items() if name in entry]
        self._write(_event(step=step_of(entry), summary=Summary(value=values)))

    def _hide_from(self, step: int) -> None:
        from tensorboardX.proto.event_pb2 import SessionLog

        self._write(_event(step=step, session_log=SessionLog(status=SessionLog.START)))

    def _write(self, event: Event) -> None:
        from tensorboardX.record_writer import masked_crc32c

        data = event.SerializeToString()
        length = struct.pack("<Q", len(data))
        checksums = [struct.pack("<I", masked_crc32c(part)) for part in (length, data)]
        append_whole(self.path, length + checksums[0] + data + checksums[1])


def step_of(entry: Mapping[str, Any]) -> int:
    """The position of ``entry`` on the x axis: its step, else its epoch."""
    return int(entry.get("step", entry["epoch"]))


def _event(**content: Any) -> Event:
    from tensorboardX.proto.event_pb2 import Event

    return Event(wall_time=time.time(), **content)

"""The options of a calibration, checked before anything heavy is imported."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mgq.engine.classifier.network_options import RUNS
from mgq.errors import InputError
from mgq.quantization.option_names import BALANCED, BY_GPTQ, TO_NEAREST


@dataclass(frozen=True, kw_only=True)
class CalibrateOptions:
    """The options of ``mgq calibrate``; everything may be left out.

    ``images`` of the ``files`` (files, folders, patterns) or of the folder ``data`` are used; without either, those
    that the weights were trained on, and without these, or with ``data_free``, what the batch norms say. ``preset`` is
    how much is tried; ``method`` fixes how ranges are chosen. ``max_drop``: weights of layers stay float32 until int8
    loses no more points of top-1. ``limit`` labelled images at most show the accuracy. ``ranges_file``: ranges for the
    float weights are written to it, too. ``pretrained`` is True or the version of the zoo's weights. ``keep_input``:
    the int8 file of an imported network takes the float input that the imported file took. ``source``: the file that
    ``checkpoint`` was imported from, whose speed is compared, too.
    """

    files: Sequence[str] = ()
    data: Path | None = None
    arch: str | None = None
    checkpoint: Path | None = None
    key: str | None = None
    images: int = 256
    preset: str = BALANCED
    method: str | None = None
    data_free: bool = False
    correct_bias: bool = True
    weight_rounding: str = BY_GPTQ
    max_drop: float | None = None
    target: str | None = None
    save: Path = RUNS
    limit: int | None = None
    workers: int | None = None
    max_bad: float = 0.01
    ranges_file: Path | None = None
    about: str = ""
    pretrained: bool | str = False
    width: float | None = None
    image_size: int | None = None
    keep_input: bool = False
    source: Path | None = None

    @property
    def rounding(self) -> str:
        """Ranges as text fit the float weights: they are rounded to the nearest then."""
        return TO_NEAREST if self.ranges_file is not None else self.weight_rounding

    def refuse_contradictions(self) -> None:
        """Raises InputError for options that exclude each other."""
        looks = self.files or self.method or self.weight_rounding == TO_NEAREST or self.ranges_file is not None
        if self.data_free and looks:
            raise InputError("--data-free looks at no pictures: leave out FILES, --method, --nearest and --ranges")
        if self.max_drop is not None and (self.data_free or self.ranges_file is not None):
            raise InputError("--max-drop measures on pictures: leave out --data-free and --ranges")

"""A finished run whose class names try to break a page."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2

from mgq.quantization.modes import Mode
from tests.conftest import (
    blank,
    classifier_of,
    filled,
    smooth_images,
)

ARCH = "shufflenet_v1_x0_5_g3"
HOSTILE = "<script>alert(1)<&'\""
NAMES = (HOSTILE, *(f"kind {i}" for i in range(1, 10)))
EPOCH = {"epoch": 1, "loss": 1.5, "top1": 40.0, "lr": 0.1, "images_per_second": 9.0}
NOTED = [{**EPOCH, "val_loss": 1.25, "val_top1": 50.5, "val_top5": 80.0}, {**EPOCH, "epoch": 2, "val_top1": None}]


def make_run(root: Path) -> Path:
    """A ``qat`` run whose float network has other weights, so that answers change, and its pictures: 4 of 3 classes."""
    for i, name in enumerate(NAMES[:3]):
        place = root / "set" / "val" / name
        place.mkdir(parents=True)
        for j, image in enumerate(smooth_images(4, 72, 90, seed=i)):
            cv2.imwrite(str(place / f"{j}.png"), image.transpose(1, 2, 0))
    run = root / "runs" / f"{ARCH}.qat"
    run.mkdir(parents=True)
    recipe = {"data": str(root / "set")}
    shown: dict[str, Any] = {"classes": NAMES, "recipe": recipe, "origin": f"made by {HOSTILE}"}
    replace(classifier_of(ARCH, Mode.QAT), **shown).write_checkpoint(run / "checkpoint.safetensors")
    other = replace(classifier_of(ARCH), network=filled(blank(ARCH), seed=6), **shown)
    other.write_checkpoint(run / "float.safetensors")
    (run / "metrics.jsonl").write_text("".join(f"{json.dumps(entry)}\n" for entry in NOTED))
    (run / "recipe.toml").write_text(f'# {HOSTILE}\narch = "{ARCH}"\n')
    return run

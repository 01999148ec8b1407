"""How often is ``mgq infer`` right? ``python -m tests.benchmarks.photos FOLDER``, FOLDER/<wnid>/*.

Prints top-1 of the float and the int8 network on ImageNet photos in folders named by wnid, how often both say the
same, and the standard errors. Pictures that calibrated the int8 network's ranges (every fifth of a sorted list of
500, where that is the folder) are counted apart.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

from mgq.data.imagenet_classes import imagenet_classes


def answers(folder: str, mode: str) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "mgq", "infer", folder, "-m", mode, "--json", "--topk", "1", "--pretrained"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found: list[dict[str, Any]] = json.loads(done.stdout)["answers"]
    return found


def main(folder: str) -> None:
    rank = {entry.wnid: index for index, entry in enumerate(imagenet_classes())}
    said = {mode: answers(folder, mode) for mode in ("normal", "quantized")}
    truth = [rank[Path(answer["picture"]).parent.name] for answer in said["normal"]]
    top1 = {mode: [answer["guesses"][0]["index"] for answer in found] for mode, found in said.items()}
    total = len(truth)
    calibrated = {i * total // 100 for i in range(100)} if total == 500 else set()
    for name, chosen in (
        ("all", set(range(total))),
        ("not used to calibrate", set(range(total)) - calibrated),
    ):
        right = {mode: sum(top1[mode][i] == truth[i] for i in chosen) for mode in top1}
        same = sum(top1["normal"][i] == top1["quantized"][i] for i in chosen)
        count = len(chosen)
        print(f"{name}: {count} pictures")
        for mode, number in right.items():
            share = number / count
            error = math.sqrt(share * (1 - share) / count)
            print(f"  {mode:10s} top-1 {share:.1%} (standard error {error:.1%})")
        print(f"  drop {(right['normal'] - right['quantized']) / count:.1%}, same answer {same / count:.1%}")


if __name__ == "__main__":
    main(sys.argv[1])

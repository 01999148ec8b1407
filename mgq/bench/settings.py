"""What a benchmark is asked to do, checked before anything heavy is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from mgq.bench.environment import free_memory, usable_cores
from mgq.errors import InputError
from mgq.zoo.registry import spec_of

EXAMPLE_NETWORKS = ("resnet18", "shufflenet_v1_x1_5_g3", "mobilenet_v2")
"""The three networks of the public quantization example."""
ROUNDS = 10
"""With turns of a quarter second, 30 rows take about two minutes on two cores."""
MULTIPLE = 32
# The widest activations of the networks, 64 float32 channels at half the size, are 64 bytes an input pixel.
# Engines keep several such arrays each.
BYTES_A_PIXEL = 1024


class Precision(str, Enum):
    """The numbers that a network computes with."""

    FP32 = "fp32"
    INT8 = "int8"


@dataclass(frozen=True)
class Settings:
    """One benchmark: which rows, and how they are measured. Make it by :func:`settings_for`.

    ``image_size`` is in pixels on a side, ``seed`` is that of the shuffled order of turns.
    """

    networks: tuple[str, ...] = EXAMPLE_NETWORKS
    precisions: tuple[Precision, ...] = tuple(Precision)
    threads: int = 1
    rounds: int = ROUNDS
    batch: int = 1
    image_size: int = 224
    seed: int = 0


def settings_for(
    networks: Sequence[str] = (),
    precisions: Sequence[Precision] = (),
    threads: int = 1,
    rounds: int = ROUNDS,
    batch: int = 1,
    image_size: int = 224,
) -> Settings:
    """Checked settings; no ``networks`` means those of the public example, no ``precisions`` both.

    Raises InputError for an unknown network, for more threads than cores, and for what cannot be run.
    """
    for name, value in (("--threads", threads), ("--rounds", rounds), ("--batch", batch)):
        if value < 1:
            raise InputError(f"{name} {value} is too few: give at least 1")
    cores = usable_cores()
    if threads > cores:
        raise InputError(f"--threads {threads} is more than this machine's {cores} cores: give {cores} or fewer")
    if image_size < MULTIPLE or image_size % MULTIPLE:
        raise InputError(f"--image-size {image_size} is not a multiple of {MULTIPLE}: give one, such as 224")
    needed, free = batch * image_size**2 * BYTES_A_PIXEL, free_memory()
    if needed > free:
        raise InputError(
            f"--batch {batch} of {image_size}x{image_size} pixels needs about {needed / 1e9:.1f} GB, "
            f"and {free / 1e9:.1f} GB of memory are free: give a smaller --batch or --image-size"
        )
    names = tuple(dict.fromkeys(spec_of(name).name for name in networks)) or EXAMPLE_NETWORKS
    chosen = tuple(precision for precision in Precision if precision in (precisions or Precision))
    return Settings(names, chosen, threads, rounds, batch, image_size)


def counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"

"""Settings of a benchmark, checked before anything heavy is imported."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from mgq.engine.classifier.network_options import RUNS
from mgq.errors import InputError, plural, printable
from mgq.machine import usable_cores
from mgq.system.environment import free_memory
from mgq.weights.checkpoint import check_size
from mgq.zoo.registry import spec_of

EXAMPLE_NETWORKS = ("resnet18", "shufflenet_v1_x1_5_g3", "mobilenet_v2")
"""The three networks of the public quantization example."""
FILES = "deployed files"
"""What stands for the network where files are measured for themselves."""
ROUNDS = 10
ALL = "all"
# The widest activations of the networks, 64 float32 channels at half the size, are 64 bytes an input pixel.
# Engines keep several such arrays each.
BYTES_A_PIXEL = 1024


class Precision(str, Enum):
    """The numbers that a network computes with."""

    FP32 = "fp32"
    INT8 = "int8"


class Load(str, Enum):
    """How an engine is kept at work: one run at a time on all its threads, or one on each thread at the same time."""

    LATENCY = "latency"
    THROUGHPUT = "throughput"


@dataclass(frozen=True)
class Settings:
    """One benchmark: which rows, and how they are measured. Make it by :func:`make_settings`.

    ``yardstick``: float32 runs in the fastest engine alone, for the ratio. ``threads`` are numbers of threads, each a
    set of rows. ``against`` are other ONNX files, ``files`` deployed ones in the place of networks; where they
    ``share_network``, int8 is measured by the float ones among them. Weights come from the runs under ``save``, where
    it has some. ``image_size`` is in pixels on a side, ``seed`` is that of the shuffled order of turns.
    """

    networks: tuple[str, ...] = EXAMPLE_NETWORKS
    precisions: tuple[Precision, ...] = tuple(Precision)
    threads: tuple[int, ...] = (1,)
    rounds: int = ROUNDS
    batch: int = 1
    image_size: int = 224
    load: Load = Load.LATENCY
    yardstick: bool = False
    against: tuple[Path, ...] = ()
    files: tuple[Path, ...] = ()
    share_network: bool = False
    save: Path = RUNS
    seed: int = 0

    @property
    def zoo_networks(self) -> tuple[str, ...]:
        """Those of the ``networks`` with published figures."""
        return tuple(name for name in self.networks if name != FILES)


def make_settings(
    networks: Sequence[str] = (),
    precisions: Sequence[Precision] = (),
    threads: Sequence[str] = (),
    rounds: int = ROUNDS,
    batch: int = 1,
    image_size: int = 224,
    load: str = Load.LATENCY.value,
    against: Sequence[Path] = (),
    files: Sequence[Path] = (),
    save: Path = RUNS,
) -> Settings:
    """Checked settings; no ``networks`` means those of the public example, no ``precisions`` both, no ``threads`` one
    and all. With int8 alone, float32 runs as the yardstick.

    Raises InputError for an unknown network, for more threads than cores, and for what cannot be run.
    """
    for name, value in (("--rounds", rounds), ("--batch", batch)):
        if value < 1:
            raise InputError(f"{name} {value} is too few: give at least 1")
    check_size(image_size)
    if load not in [kind.value for kind in Load]:
        raise InputError(f"there is no --mode '{printable(load)}'; choose {' or '.join(kind.value for kind in Load)}")
    needed, free = batch * image_size**2 * BYTES_A_PIXEL, free_memory()
    if needed > free:
        raise InputError(
            f"--batch {batch} of {image_size}x{image_size} pixels needs about {needed / 1e9:.1f} GB, "
            f"and {free / 1e9:.1f} GB of memory are free: give a smaller --batch or --image-size"
        )
    for path in [*against, *files]:
        if not path.is_file():
            raise InputError(f"cannot read {printable(path)}: there is no such file; check the path")
    if files and (networks or precisions or against):
        raise InputError("deployed files are measured for themselves: leave out --arch, --int8, --fp32 and --against")
    names = (FILES,) if files else tuple(dict.fromkeys(spec_of(name).name for name in networks)) or EXAMPLE_NETWORKS
    chosen = tuple(precision for precision in Precision if precision in (precisions or Precision))
    return Settings(
        networks=names,
        precisions=tuple(Precision) if chosen == (Precision.INT8,) else chosen,
        threads=parse_threads(threads or ("1", ALL)),
        rounds=rounds,
        batch=batch,
        image_size=image_size,
        load=Load(load),
        yardstick=chosen == (Precision.INT8,),
        against=tuple(dict.fromkeys(against)),
        files=tuple(dict.fromkeys(files)),
        save=save,
    )


def parse_threads(wanted: Sequence[str]) -> tuple[int, ...]:
    """``wanted``, numbers or ``all``, as numbers in rising order. Raises InputError for more than there are cores."""
    cores = usable_cores()
    found = set()
    for word in wanted:
        try:
            number = cores if word == ALL else int(word)
        except ValueError:
            raise InputError(f"--threads {printable(word)} is no number: give 1 to {cores}, or {ALL}") from None
        if number < 1:
            raise InputError(f"--threads {number} is too few: give at least 1")
        if number > cores:
            raise InputError(
                f"--threads {number} is more than this machine's {plural(cores, 'core')}: give {cores} or fewer"
            )
        found.add(number)
    return tuple(sorted(found))


def pluralize(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"

"""Loads a network in a worker's process. It imports no MegEngine: other backends' processes stay small."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mgq.bench.peak import PeakLoop
from mgq.bench.settings import Precision
from mgq.runtime.protocol import Runtime
from mgq.runtime.registry import get_backend


@dataclass(frozen=True)
class CheckpointLoader:
    """Loads MegEngine itself, on a network that is built from a checkpoint: in whatever process it is called."""

    traced: bool
    path: Path
    mode: str
    image_size: int

    def __call__(self, threads: int) -> Runtime:
        from mgq.engine.classifier.open import open_classifier
        from mgq.quantization.modes import parse_mode
        from mgq.runtime.megengine import EagerRuntime, TracedRuntime

        network = open_classifier(checkpoint=self.path, mode=parse_mode(self.mode), image_size=self.image_size).network
        return (TracedRuntime if self.traced else EagerRuntime)(network, threads)


@dataclass(frozen=True)
class FileLoader:
    """Loads an engine on a file: in whatever process it is called."""

    engine: str
    path: Path

    def __call__(self, threads: int) -> Runtime:
        return get_backend(self.engine).load(self.path, threads)


@dataclass(frozen=True)
class Peak:
    """Loads the loop that measures the processor's ceiling."""

    precision: Precision
    features: tuple[str, ...]

    def __call__(self, threads: int) -> Runtime:
        return PeakLoop(self.precision, self.features, threads)

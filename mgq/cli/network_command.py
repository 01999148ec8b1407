"""The options by which a verb chooses its network, said once for the verbs that take all of them."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from mgq.cli.import_options import ImportOptions
from mgq.cli.option_needs import OF_IMPORT, OF_INT8, OF_SEVERAL_NETWORKS, OF_ZOO, Need
from mgq.cli.shared_options import (
    Arch,
    CheckpointFile,
    ImageSize,
    KeyName,
    Pretrained,
    Ranges,
    Save,
    TargetName,
    Width,
)
from mgq.engine.classifier.network_options import RUNS, NetworkOptions


@dataclass(frozen=True, kw_only=True)
class NetworkCommand(ImportOptions):
    """A verb that opens a network: the verbs inherit these options.

    Their annotations are values here, not text, so that a verb's own module need not know their names.
    """

    arch: Arch = None
    checkpoint: CheckpointFile = None
    key: KeyName = None
    target: TargetName = None
    pretrained: Pretrained = None
    ranges: Ranges = None
    image_size: ImageSize = None
    width: Width = None
    save: Save = RUNS

    needs: ClassVar[tuple[Need, ...]] = (OF_SEVERAL_NETWORKS, OF_IMPORT, OF_INT8, OF_ZOO)

    def network_options(self, checkpoint: Path | None, engine: str | None = None) -> NetworkOptions:
        """The options as one value; ``checkpoint`` is the file that ``-c`` stands for, after an import."""
        return NetworkOptions(
            arch=self.arch,
            checkpoint=checkpoint,
            key=self.key,
            save=self.save,
            pretrained=self.pretrained,
            ranges=self.ranges,
            width=self.width,
            image_size=self.image_size,
            target=self.target,
            engine=engine,
        )

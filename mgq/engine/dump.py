"""A network as a file to deploy, with what is known of it inside."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from mgq.data.pictures import bundled_cat, read_picture
from mgq.data.transforms import to_batch
from mgq.deploy.mge import DumpReport, write_megengine
from mgq.engine.networks import Classifier, open_classifier
from mgq.errors import InputError
from mgq.files.atomic import ensure_writable_folder
from mgq.quant.modes import Mode, parse_mode

INPUTS = ("uint8", "int8", "float32")


def dump_classifier(classifier: Classifier, path: Path, input_type: str = "uint8", batch: int = 1) -> DumpReport:
    """Write ``classifier`` to ``path`` as a ``.megengine`` file, checked to the bit on a real picture.

    The file takes (``batch``, 3, S, S) in BGR: raw ``uint8`` pixels, ``int8`` pixels minus 128, or those as
    ``float32``. Raises InputError for another input type or a batch below 1, FailureError where the file does not
    answer as the network in memory does; nothing is left under ``path`` then.
    """
    if input_type not in INPUTS:
        raise InputError(f"a file cannot take '{input_type}' input; choose {', '.join(INPUTS)}")
    if batch < 1:
        raise InputError(f"a batch holds at least 1 picture, not {batch}")
    ensure_writable_folder(path.absolute().parent)
    cat = classifier.crop(read_picture(bundled_cat()))
    return write_megengine(
        classifier.network,
        path,
        image_size=classifier.image_size,
        batch=batch,
        input_type=input_type,
        provenance=asdict(classifier.info()),
        check=to_batch([cat] * batch),
    )


def dump(
    path: str | Path,
    arch: str | None = None,
    checkpoint: str | Path | None = None,
    mode: Mode | str = Mode.QUANTIZED,
    input_type: str = "uint8",
    batch: int = 1,
    **choice: Any,
) -> Path:
    """Write the network that ``mgq dump`` would to ``path``, for MegEngine and MegEngine Lite; returns the path.

    ``choice`` are further arguments of :func:`mgq.engine.networks.open_classifier`, such as ``ranges``. Raises as
    that and :func:`dump_classifier` do.
    """
    mode = mode if isinstance(mode, Mode) else parse_mode(mode)
    classifier = open_classifier(arch, Path(checkpoint) if checkpoint is not None else None, mode, **choice)
    dump_classifier(classifier, Path(path), input_type, batch)
    return Path(path)

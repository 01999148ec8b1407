"""Writes a network as a file to deploy, with its metadata inside."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import megengine.module as M
import numpy as np
import numpy.typing as npt

from mgq.data.decoding import bundled_cat, read_image
from mgq.data.transforms import to_batch
from mgq.engine.classifier.network_options import RUNS
from mgq.engine.classifier.onnx_import import find_float_input
from mgq.engine.classifier.open import Classifier, find_newest_arch, open_classifier
from mgq.errors import FailureError, InputError
from mgq.export.formats import find_format, format_of, refuse_format, refuse_words_of_other_formats
from mgq.export.megengine.writer import write_megengine
from mgq.export.onnx.writer import model_of, plain_graph, write_onnx
from mgq.io.atomic import atomic_write, make_folder_for
from mgq.io.temporary_folders import temporary_folder
from mgq.quantization.modes import Mode, parse_mode
from mgq.quantization.option_names import ANY_ENGINE
from mgq.quantization.targets import MEGENGINE, ONNX


@dataclass(frozen=True)
class Dump:
    """A file that was written: its format, its bytes, and in a sentence how far it was checked. ``takes``: what it is
    fed, where that is the input of an imported file."""

    path: Path
    format: str
    size: int
    checked: str
    takes: str = ""


def format_for(classifier: Classifier, path: Path | None = None, wanted: str | None = None) -> str:
    """The format of a file: as ``wanted``, else as ``path`` ends, else that of what the network was quantized for.

    Raises InputError for an unknown format, and one that the path or the network contradicts.
    """
    is_imported = classifier.spec.is_described
    by_target = "megengine" if classifier.target is MEGENGINE and not is_imported else "onnx"
    found = find_format(path, wanted) or by_target
    refuse_format(found, classifier.mode, classifier.target.name, is_imported)
    return found


def open_for_target(
    open_for: Callable[[str | None], Classifier], path: Path | None, kind: str | None, target: str | None
) -> Classifier:
    """What ``open_for`` gives for ``target``. Where that is open, and an ONNX file or a native library is wanted, the
    target onnx is tried first: ranges that come with float weights may be there for it, too."""
    if target is None and {"onnx", "native"} & {kind, format_of(path)}:
        with contextlib.suppress(InputError):
            return open_for(ONNX.name)
    return open_for(target)


def dump_classifier(
    classifier: Classifier,
    path: Path,
    input_type: str = "uint8",
    batch: int | None = 1,
    kind: str | None = None,
    rewrites: Sequence[str] = (),
    cpu: str | None = None,
    engine: str = ANY_ENGINE,
    keep_input: bool = False,
    float_share: float = 0.0,
) -> Dump:
    """Write ``classifier`` to ``path`` in the format ``kind`` (see :func:`format_for`).

    The file takes (``batch``, 3, S, S) in BGR: raw ``uint8`` pixels, or in the format ``megengine`` also ``int8``
    pixels minus 128, or those as ``float32``. A ``.megengine`` file is checked to the bit on a real picture, an
    ``.onnx`` file by ONNX's own checker; its batch may be None, for any; ``rewrites``, ``engine`` and ``float_share``
    are as in :func:`mgq.export.onnx.writer.write_onnx`, and with ``keep_input`` it takes what the imported ONNX file
    took. A native library takes any number of images, is for processors of the kind ``cpu`` (see
    :func:`mgq.export.native.cpu.get_level`), and is checked where it runs.

    Raises InputError for another input type or a batch below 1, FailureError where the check fails; nothing is left
    under ``path`` then.
    """
    kind = format_for(classifier, path, kind)
    refuse_words_of_other_formats(kind, input_type, batch, cpu, engine, keep_input)
    with make_folder_for(path):
        cat = classifier.crop(read_image(bundled_cat()))
        classifier.logits(to_batch([cat]))  # which refuses answers that are not finite
        if kind == "native":
            return dump_native(classifier, path, cpu)
        if kind == "onnx":
            return dump_onnx(classifier, path, batch, rewrites, engine, keep_input, float_share)
        assert batch is not None
        return dump_megengine(classifier, path, input_type, batch, cat)


def dump_megengine(classifier: Classifier, path: Path, input_type: str, batch: int, cat: npt.NDArray[np.uint8]) -> Dump:
    """A file for MegEngine, checked on ``cat``, a crop (S, S, 3)."""
    report = write_megengine(
        classifier.network,
        path,
        image_size=classifier.image_size,
        batch=batch,
        input_type=input_type,
        provenance=asdict(classifier.info()),
        check=to_batch([cat] * batch),
    )
    checked = f"loaded again in {report.exact_in}, it answers to the bit as the network in memory"
    return Dump(path, "megengine", report.size, checked)


def dump_onnx(
    classifier: Classifier,
    path: Path,
    batch: int | None,
    rewrites: Sequence[str],
    engine: str,
    keep_input: bool,
    float_share: float,
) -> Dump:
    kept = find_float_input(classifier) if keep_input else None
    if kept is not None and classifier.mode is Mode.NORMAL:
        raise InputError("--keep-input is for int8: the float file with its input is the one that was imported")
    form = {"engine": engine, "float_share": float_share}
    report = write_onnx(
        source_of(classifier),
        path,
        image_size=classifier.image_size,
        batch=kept.shape[0] if kept else batch,
        provenance={**provenance_of(classifier), **({} if engine == ANY_ENGINE else form)},
        rewrites=rewrites,
        engine=engine,
        float_share=float_share,
        kept=kept,
    )
    return Dump(path, "onnx", report.size, "ONNX's checker accepts it", kept.describe() if kept else "")


def dump_native(classifier: Classifier, path: Path, cpu: str | None) -> Dump:
    """A shared library, which takes any number of images, and its header. It is checked where it runs."""
    from mgq.export.native.cpu import NATIVE, get_level
    from mgq.export.native.linker import SharedLibrary, write_library
    from mgq.export.native.program import read_program
    from mgq.export.native.reference import run_reference
    from mgq.runtime.library import LibraryRuntime

    level = get_level(cpu or NATIVE)
    about = provenance_of(classifier)
    graph = plain_graph(source_of(classifier), classifier.image_size)
    program = read_program(model_of(graph, classifier.image_size, None, about))
    with temporary_folder() as folder:
        made: SharedLibrary = write_library(program, folder / "network.so", level, about)
        checked = f"for {level.key}, with {path.with_suffix('.h').name}"
        if made.linked_by is None:
            checked += "; no linker found: link it with `cc -shared`, or pip install 'mgq[native]'"
        elif level.runs_here():
            images = to_batch([classifier.crop(read_image(bundled_cat()))])
            wanted, _ = run_reference(program, images)
            if (LibraryRuntime(made.path).run(images) != wanted).any():
                raise FailureError(f"{path} is not written: it answers otherwise than the integers in numpy")
            checked += ", it answers to the bit as the integers in numpy"
        target = path if made.linked_by else path.with_suffix(".o")
        for source, place in ((made.path, target), (made.header, path.with_suffix(".h"))):
            with atomic_write(place) as temporary:
                shutil.copyfile(source, temporary)
    return Dump(target, "native", made.size, checked)


def source_of(classifier: Classifier) -> M.Module:
    """The network with the grids that an int8 file is written from; a float one itself."""
    if classifier.mode is Mode.NORMAL:
        return classifier.network
    assert classifier.fake_quantized is not None
    return classifier.fake_quantized


def provenance_of(classifier: Classifier) -> Mapping[str, Any]:
    return asdict(classifier.info())


def dump(
    path: str | Path,
    arch: str | None = None,
    checkpoint: str | Path | None = None,
    mode: Mode | str = Mode.QUANTIZED,
    input_type: str = "uint8",
    batch: int | None = 1,
    keep_input: bool = False,
    **choice: Any,
) -> Path:
    """Write the network that ``mgq dump`` would to ``path``, an ``.onnx``, ``.megengine`` or ``.so`` file; returns
    the path.

    ``keep_input``: see :func:`dump_classifier`. Without ``arch`` and ``checkpoint`` it is the network of the newest run
    that can serve ``mode``. ``choice`` are further arguments of
    :func:`mgq.engine.classifier.open.open_classifier`, such as ``ranges``. Raises as that and
    :func:`dump_classifier` do.
    """
    mode = mode if isinstance(mode, Mode) else parse_mode(mode)
    if arch is None and checkpoint is None and not choice.get("pretrained"):
        arch = find_newest_arch(Path(choice.get("save", RUNS)), mode)
    target = choice.pop("target", None)

    def open_for(target: str | None) -> Classifier:
        return open_classifier(
            arch, Path(checkpoint) if checkpoint is not None else None, mode, target=target, **choice
        )

    classifier = open_for_target(open_for, Path(path), None, target)
    dump_classifier(classifier, Path(path), input_type, batch, keep_input=keep_input)
    return Path(path)

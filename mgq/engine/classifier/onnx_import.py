"""Imports an ONNX file of another program as a classifier: checks it against the file, and keeps a checkpoint."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from megengine import Tensor

from mgq.engine.classifier.import_wish import NO_WISH, ImportWish
from mgq.engine.classifier.label_names import count_names, join_names, names_for
from mgq.engine.classifier.open import Classifier
from mgq.engine.classifier.run_lookup import RUN_CHECKPOINT, RUNS_FOR, find_newest
from mgq.errors import FailureError, InputError, plural, printable
from mgq.events import OnMessage, log_message
from mgq.export.onnx.float_input import PIXELS, FloatInput
from mgq.export.onnx.foreign_file import ForeignFile, read_foreign
from mgq.export.onnx.onnx_file import import_package
from mgq.graph.onnx_import.constants import attributes_of
from mgq.graph.onnx_import.draft import NetworkDraft
from mgq.graph.onnx_import.input_contract import fold_contract
from mgq.graph.onnx_import.reader import read_network
from mgq.io.atomic import make_folder_for
from mgq.io.download import sha256_of
from mgq.io.records import record_of
from mgq.machine import mute_stderr
from mgq.quantization.modes import Mode
from mgq.weights.checkpoint import info_of
from mgq.weights.state_file import read_state
from mgq.zoo.blueprint import Blueprint
from mgq.zoo.blueprint_network import BlueprintNetwork
from mgq.zoo.input_contract import RAW, InputContract, contract_called
from mgq.zoo.layers import without_initialization
from mgq.zoo.network_state import set_state, state_of
from mgq.zoo.registry import BLUEPRINT, SOURCE, register_blueprint, specs

EQUAL, NEARLY_EQUAL = 1e-4, 1e-3
"""The largest difference of float answers from ONNX Runtime's that is accepted, relative to the largest number in a
tensor; and where ONNX Runtime does not agree with itself better, since the network makes rounding errors grow."""
NEWEST_COMPARED = 21
"""The newest opset of ONNX Runtime 1.20. The next, the newest that is imported, is the same but for bfloat16."""
ULTRALYTICS = InputContract("Ultralytics", "rgb", (0.0, 0.0, 0.0), (255.0, 255.0, 255.0))
"""What its classifiers are fed."""
CHECKPOINT = "checkpoint.safetensors"
IMPORTED = ".imported"
"""How the name of the folder of an imported network ends."""
ENTRY = "entry"
"""The key of what is known of a file's float input."""
SCORES = "scores"
"""The key of the output that was taken of several."""
VERSION = 6
"""Of this import: raised where it makes another network of the same file. 2: floors of grids, 3: joined branches, 4:
floors behind activations, too, 5: layers between others in float stay in float, 6: masks are finite."""
VERSION_OF = "importer"
"""The key of the version that made an import; the first said none."""
SAME = ("sha256", "input", SCORES)
"""What is equal in two imports of one network."""

Array = npt.NDArray[np.float32]


def import_checkpoint(path: Path, save: Path, wish: ImportWish = NO_WISH, on_message: OnMessage = log_message) -> Path:
    """The checkpoint of ``path``, an ONNX file of another program, under ``save``: the one that is there, or a new one.

    One that is there is of the same file, and of the same ``wish`` where anything is wished. One of an earlier version
    of mgq is made again, with the options it was made with; where that fails, it stays. Raises InputError for
    what cannot be imported, FailureError where the network answers otherwise than the file in ONNX Runtime.
    """
    digest = sha256_of(path)
    known = save / f"{name_for(path)}{IMPORTED}" / CHECKPOINT
    source = source_in(known) if known.is_file() else {}
    is_it = ENTRY in source and source.get("sha256") == digest
    if not is_it or not (wish.is_open or source.get("wish") == wish_words(wish)):
        return keep_import(path, known, wish, digest, on_message)
    if is_of_earlier_version(source):
        on_message(f"imported again: {known} was made by an earlier version of mgq ({source.get('input', '')})")
        try:
            return keep_import(path, known, wish_in(source), digest, on_message)
        except (InputError, FailureError) as error:
            on_message(f"{known} stays as an earlier version of mgq imported it: {error}")
    on_message(f"imported before: {known} ({source.get('input', '')})")
    return known


def keep_import(path: Path, known: Path, wish: ImportWish, digest: str, on_message: OnMessage) -> Path:
    """Import ``path``, whose SHA-256 is ``digest``, as the checkpoint ``known``."""
    classifier, remarks = import_classifier(path, wish, digest)
    with make_folder_for(known, "pass -s FOLDER"):
        classifier.write_checkpoint(known)
    for remark in remarks:
        on_message(remark)
    on_message(f"imported: {known}")
    return known


def is_of_earlier_version(source: Mapping[str, Any]) -> bool:
    """Whether an import that says ``source`` of itself was made before :data:`VERSION`."""
    version = source.get(VERSION_OF, 1)
    return not isinstance(version, int) or version < VERSION


def wish_in(source: Mapping[str, Any]) -> ImportWish:
    """The options that an import which says ``source`` of itself was made with. Raises InputError where they are
    damaged."""
    words = dict(source.get("wish") or {})
    for name in ("mean", "std", "size"):
        words[name] = None if words.get(name) is None else tuple(words[name])
    words["labels"] = None if words.get("labels") is None else Path(words["labels"])
    try:
        return ImportWish(**words)
    except TypeError:
        raise InputError("its options are damaged") from None


def wish_words(wish: ImportWish) -> dict[str, Any]:
    """``wish`` as JSON has it."""
    found: dict[str, Any] = json.loads(json.dumps(asdict(wish), default=str))
    return found


def source_in(checkpoint: Path) -> dict[str, Any]:
    """What ``checkpoint`` says of the file that it was imported from; nothing where it is damaged."""
    try:
        info = info_of(read_state(checkpoint).metadata, printable(checkpoint))
    except InputError:
        return {}
    return source_among(info.options) if info is not None else {}


def source_among(options: Mapping[str, Any]) -> dict[str, Any]:
    """The same of the ``options`` of a network; nothing where it was not imported."""
    try:
        found = json.loads(str(options[SOURCE]))
    except (KeyError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def find_int8_of(imported: Path, save: Path) -> Path | None:
    """The newest checkpoint under ``save`` that is int8 of the checkpoint ``imported``; None without one."""
    name, wanted = imported.parent.name.removesuffix(IMPORTED), source_in(imported)

    def is_of_it(path: Path) -> bool:
        source = source_in(path)
        return all(source.get(key) == wanted.get(key) for key in SAME)

    runs = [save / f"{name}.{kind}" / RUN_CHECKPOINT for kind in RUNS_FOR[Mode.QUANTIZED]]
    return find_newest(path for path in runs if path.is_file() and is_of_it(path))


def refuse_other_import(int8: Path, options: Mapping[str, Any]) -> None:
    """Raise InputError where the checkpoint ``int8`` is not of the file that a float network with ``options`` is of, or
    was fed otherwise."""
    its, wanted = source_in(int8), source_among(options)
    if any(its.get(key) != wanted.get(key) for key in SAME):
        had, has = (describe_source(source) for source in (its, wanted))
        raise InputError(f"{printable(int8)} was made from {had}, not from {has}: run `mgq calibrate` again with -c")


def describe_source(source: Mapping[str, Any]) -> str:
    output = f", output {printable(source[SCORES])}" if SCORES in source else ""
    return f"{printable(source.get('file'))}, fed as {source.get('input')}{output}"


def name_for(path: Path) -> str:
    """What the network in ``path`` is called: as the file, in plain letters, and by no name of the zoo."""
    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", path.stem).strip(".-")[:80] or "network"
    known = specs().get(name)
    return f"{name}-onnx" if known is not None and not known.is_described else name


def import_classifier(path: Path, wish: ImportWish, digest: str) -> tuple[Classifier, list[str]]:
    """The float classifier in the ONNX file ``path``, whose SHA-256 is ``digest``, and remarks on how it was read."""
    file = read_foreign(path, wish.size, wish.scores, partial(count_names, wish.labels))
    contract = contract_of(file, wish)
    draft = draft_network(file)
    difference = compare(file, draft)
    fold_contract(draft, contract)
    network = network_of(draft.blueprint(), draft)
    classes, told_by = names_for(network.blueprint.classes, wish.labels, metadata_of(file))
    source: dict[str, Any] = {"sha256": digest, "file": path.name, "opset": file.opset, "input": contract.describe()}
    source |= {"wish": wish_words(wish), "channels": file.image[0], ENTRY: asdict(entry_of(file, draft, contract))}
    source |= {"pixels": file.takes_pixels, VERSION_OF: VERSION}
    if file.choice is not None and file.choice.choice is not None:
        source[SCORES] = file.output
    options = {BLUEPRINT: network.blueprint.to_json(), SOURCE: json.dumps(source)}
    spec = register_blueprint(name_for(path), options)
    origin = f"{printable(path)} (ONNX, opset {file.opset}, input {contract.describe(file.image[0])})"
    classifier = Classifier(network, None, spec, Mode.NORMAL, classes, spec.image_size, origin, options)
    remarks = remarks_on(file, draft, contract, wish, difference)
    if told_by is not None:
        remarks.append(f"names of classes: those that the file has as '{told_by}' ({join_names(classes)})")
    return classifier, remarks


def contract_of(file: ForeignFile, wish: ImportWish) -> InputContract:
    """What ``file`` is fed. Raises InputError where ``wish`` contradicts it, or says what cannot be."""
    if not file.takes_pixels:
        if is_of_ultralytics(file) and wish.preprocess is None and wish.mean is None and wish.std is None:
            return replace(ULTRALYTICS, order=wish.order or ULTRALYTICS.order)
        return contract_called(wish.preprocess, wish.mean, wish.std, wish.order)
    if wish.preprocess not in (None, RAW) or wish.mean is not None or wish.std is not None:
        raise InputError(
            f"{printable(file.path)} takes uint8 pixels and has mean and deviation inside: leave --preprocess, --mean "
            "and --std out (--rgb and --bgr say the order of its channels)"
        )
    return contract_called(RAW, None, None, wish.order)


def is_of_ultralytics(file: ForeignFile) -> bool:
    """Whether Ultralytics wrote ``file``, which says so in it."""
    return metadata_of(file).get("author") == "Ultralytics"


def metadata_of(file: ForeignFile) -> dict[str, str]:
    return {entry.key: entry.value for entry in file.model.metadata_props}


def entry_of(file: ForeignFile, draft: NetworkDraft, contract: InputContract) -> FloatInput:
    """The float input of ``file``, and its answer's name where that is logits already."""
    shape = (1 if file.pictures == 1 else None, *file.shape[1:])
    is_whole = draft.sources[draft.output] == file.output and not draft.has_one_score
    output = file.output if is_whole else "logits"
    scales, kind = (contract.mean, contract.std), PIXELS if file.takes_pixels else "float32"
    return FloatInput(file.input, shape, file.channels_last, contract.order, *scales, output, kind)


def find_float_input(classifier: Classifier) -> FloatInput:
    """The float input of the file that ``classifier`` was imported from. Raises InputError where it was not."""
    source = source_among(classifier.options)
    if not source:
        raise InputError("--keep-input is for int8 of imported ONNX files: leave it out")
    try:
        return record_of(FloatInput, source.get(ENTRY))
    except ValueError:
        raise InputError("this import says nothing of the file's input: calibrate again with -c model.onnx") from None


def remarks_on(
    file: ForeignFile, draft: NetworkDraft, contract: InputContract, wish: ImportWish, difference: float | None
) -> list[str]:
    layers = len(draft.plans)
    equal = "not compared: onnxruntime is not installed"
    if difference is not None:
        equal = f"float answers as ONNX Runtime's (largest difference {difference:.1e} of the largest number)"
    default = (
        "" if not wish.is_open or is_of_ultralytics(file) else ", the default: --preprocess tf, caffe or raw for others"
    )
    fed = f"input as {contract.describe(file.image[0])}{default}"
    if file.takes_pixels:
        channels = "grey" if file.image[0] == 1 else contract.order.upper()
        fed = f"input as uint8 pixels ({channels}); the file has mean and deviation inside"
    found = [f"{plural(layers, 'layer')} of opset {file.opset}, {equal}", fed]
    if file.choice is not None and (chosen := file.choice.remark()) is not None:
        found.append(chosen)
    if file.halves:
        found.append(f"its numbers are {file.halves}; they are taken, and compared, in float32")
    if file.pictures is not None and file.pictures > 1:
        several = plural(file.pictures, "picture")
        found.append(f"it takes {several} at once, and is imported for any number: its answers are the same")
    return found


def draft_network(file: ForeignFile) -> NetworkDraft:
    """The network of ``file``, which takes what the file takes. Raises InputError that names the file."""
    pictures, sample = file.pictures or 1, make_samples(file, 1, 0)
    try:
        return read_network(
            file.model,
            file.constants,
            file.input,
            file.output,
            sample,
            file.channels_last,
            pictures,
            file.takes_pixels,
        )
    except InputError as error:
        raise InputError(f"{printable(file.path)} {error}{at_once(file)}{other_size(file)}") from None


def other_size(file: ForeignFile) -> str:
    """What may be done about ``file`` where it leaves the size of its pictures open; nothing of others."""
    axes = file.model.graph.input[0].type.tensor_type.shape.dim
    if all(axis.dim_value > 0 for axis in list(axes)[1:]):
        return ""
    _, height, width = file.image
    return f"; was it written for another --size than {height}x{width}?"


def at_once(file: ForeignFile) -> str:
    """What may be done about ``file`` where it takes several pictures; nothing of others."""
    if file.pictures is None or file.pictures == 1:
        return ""
    return f"; it takes {plural(file.pictures, 'picture')} at once: export it for one, or for any number"


def make_samples(file: ForeignFile, number: int, seed: int) -> Array:
    """Made-up pictures as ``file`` takes them, float32 (number, C, H, W)."""
    random = np.random.default_rng(seed)
    shape = (number, *file.image)
    made = random.integers(0, 256, shape) if file.takes_pixels else random.standard_normal(shape)
    return made.astype(np.float32)


def network_of(blueprint: Blueprint, draft: NetworkDraft) -> BlueprintNetwork:
    """The network that ``blueprint`` describes, with the weights of ``draft``, in evaluation state."""
    with without_initialization():
        network = BlueprintNetwork(blueprint)
    shapes = {name: value.shape for name, value in state_of(network).items()}
    set_state(network, {name: value.reshape(shapes[name]) for name, value in draft.state.items()})
    network.eval()
    return network


# ---- against ONNX Runtime ----


def leave_out_overhang(node: Any) -> None:
    """Let ``node``, where it averages windows that hang over a picture with nothing around, count what there is: ONNX
    Runtime 1.20 divides by whole windows, where ONNX and later versions do not."""
    given = attributes_of(node) if node.op_type == "AveragePool" else {}
    if given.get("ceil_mode") and not any(given.get("pads", ())):
        for attribute in node.attribute:
            if attribute.name == "count_include_pad":
                attribute.i = 0


def compare(file: ForeignFile, draft: NetworkDraft) -> float | None:
    """The largest difference of the answers of ``draft`` and of ``file`` in ONNX Runtime, in terms of the largest one.

    It is at most ``EQUAL``; or, where the answers of the file as it is and as ONNX Runtime rewrites it differ by more,
    at most as much as these, and ``NEARLY_EQUAL``. None where ONNX Runtime is not installed. Raises FailureError that
    names the first tensor that differs.
    """
    try:
        import_package("onnxruntime")
    except InputError:
        return None
    samples = make_samples(file, file.pictures or 1, 1)
    ends = [0, len(samples) - 1][: len(samples)]
    found: dict[str, Array] = {}
    network = network_of(draft.blueprint(), draft)
    network.run(Tensor(samples[ends]), lambda name, value: found.__setitem__(name, value.numpy()))
    answer = draft.sources[draft.output]
    wanted = reference(file, samples, [answer])
    if not np.isfinite(wanted[answer]).all():
        raise InputError(f"{printable(file.path)} answers with numbers that are not finite: take other weights")
    if draft.has_one_score:
        found[draft.output] = found[draft.output][:, 1:]
    difference, limit, own = relative(found[draft.output], rows_of(wanted[answer], len(samples), ends)), EQUAL, 0.0
    if difference > EQUAL:  # some of its rewrites change answers (1.20: zeros around a max pool), all round otherwise
        plain = reference(file, samples, [answer], as_it_is=True)
        difference = min(difference, relative(found[draft.output], rows_of(plain[answer], len(samples), ends)))
        own = relative(wanted[answer], plain[answer])
        limit = float(np.clip(own, EQUAL, NEARLY_EQUAL))
    if difference <= limit:
        return difference
    if len(samples) > 1:
        raise InputError(f"{printable(file.path)} answers otherwise to single pictures{at_once(file)}")
    off = name_difference(file, draft, samples, found) or f"answers are {difference:.1e}"
    raise FailureError(
        f"{printable(file.path)} is not imported: its {off} off from ONNX Runtime's{describe_doubt(own)}"
    )


def name_difference(file: ForeignFile, draft: NetworkDraft, samples: Array, found: Mapping[str, Array]) -> str | None:
    """The first tensor of those ``found`` in the network of ``draft`` that differs from that of ``file``, and how far;
    None where all are equal."""
    names = {name: source for name, source in draft.sources.items() if source and name in found}
    wanted = reference(file, samples, list(dict.fromkeys(names.values())))
    for name, source in names.items():
        off = relative(found[name], wanted[source])
        if off > EQUAL:
            return f"tensor '{printable(source)[:80]}' is {off:.1e} of its largest number"
    return None


def describe_doubt(own: float) -> str:
    """What is to be said of a file to which ONNX Runtime, with its rewrites and without, answers so far apart."""
    if own <= NEARLY_EQUAL:
        return ""
    return (
        f"; the network magnifies rounding: ONNX Runtime's own answers with and without its rewrites are {own:.1e} "
        "apart: take trained weights"
    )


def rows_of(answers: Array, pictures: int, places: Sequence[int]) -> Array:
    """The answers to the pictures at ``places``, of so many."""
    return answers.reshape(pictures, -1)[places] if answers.size % pictures == 0 else answers


def relative(found: Array, wanted: Array) -> float:
    """The largest difference in terms of the largest number; infinite where the shapes differ."""
    if found.size != wanted.size:
        return float("inf")
    scale = max(float(np.abs(wanted).max()), 1e-30)
    return float(np.abs(found.ravel() - wanted.ravel()).max()) / scale


def reference(file: ForeignFile, samples: Array, names: Sequence[str], as_it_is: bool = False) -> dict[str, Array]:
    """What ONNX Runtime makes of ``samples`` (N, C, H, W) at the tensors ``names`` of ``file``: rewritten by it, or the
    file ``as_it_is``."""
    onnx, runtime = import_package("onnx"), import_package("onnxruntime")
    model = onnx.ModelProto()
    model.CopyFrom(file.model)
    for entry in model.opset_import:
        entry.version = min(entry.version, NEWEST_COMPARED)
    model.graph.initializer.extend(onnx.numpy_helper.from_array(value, name) for name, value in file.constants.items())
    for place, node in enumerate(model.graph.node):
        node.name = f"node_{place}"  # it runs no two of one name
        leave_out_overhang(node)
    del model.graph.output[:]
    model.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in names)
    fed = samples.transpose(0, 2, 3, 1) if file.channels_last else samples
    fed = fed.astype(PIXELS if file.takes_pixels else np.float32)
    content, options = model.SerializeToString(), runtime.SessionOptions()
    options.log_severity_level = 4
    unchanged = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
    if as_it_is:
        options.graph_optimization_level = unchanged
    try:
        with mute_stderr():
            try:
                session = runtime.InferenceSession(content, options, ["CPUExecutionProvider"])
            except Exception:  # of its own rewrites, some break what they change (1.20)
                options.graph_optimization_level = unchanged
                session = runtime.InferenceSession(content, options, ["CPUExecutionProvider"])
            outputs = session.run(list(names), {file.input: np.ascontiguousarray(fed)})
    except Exception as error:
        what = printable(str(error).strip().partition("\n")[0])[:200]
        raise FailureError(f"ONNX Runtime cannot run {printable(file.path)}: {what}") from None
    return dict(zip(names, outputs, strict=True))

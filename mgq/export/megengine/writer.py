"""The writer of ``.megengine`` files, for MegEngine's own loader and MegEngine Lite."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import megengine.module as M
import numpy as np
import numpy.typing as npt
from megengine import Tensor
from megengine.core.tensor import megbrain_graph
from megengine.jit import trace
from megengine.utils.comp_graph_tools import convert_inputs, convert_outputs
from megengine.utils.module_utils import set_expand_structure

from mgq.errors import FailureError, InputError, printable
from mgq.export.megengine.megengine_file import encode_file, read_megengine_file
from mgq.io.atomic import atomic_write
from mgq.quantization.batch_norm_folding import ConvRelu6, FusedConv, activation_of, fold_batch_norms
from mgq.quantization.float_layers import FloatWeights
from mgq.quantization.modes import Mode, mode_of

Logits = npt.NDArray[np.float32]

ROUNDING = 1e-5
"""What summing in another order may change, relative to the largest logit."""
STEP_OFF = 0.1
"""The same where the sums are rounded to int8 again: one step more or less is seen in all layers behind."""

# What the file takes -> how it becomes the network's input, pixels minus 128 in float32.
INPUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "uint8": lambda pixels: pixels.astype("float32") - 128,
    "int8": lambda pixels: pixels.astype("float32"),
    "float32": lambda pixels: pixels,
}


@dataclass(frozen=True)
class DumpReport:
    """What was written, and the bytes of the file.

    ``exact_in`` is the engine in which the file gave the same bits as the network in memory.
    """

    path: Path
    size: int
    exact_in: str


def write_megengine(
    network: M.Module,
    path: Path,
    *,
    image_size: int,
    batch: int,
    input_type: str,
    provenance: Mapping[str, Any],
    check: npt.NDArray[np.uint8],
) -> DumpReport:
    """Write ``network`` to ``path``; the file takes (``batch``, 3, S, S) of ``input_type`` (see ``INPUTS``), BGR.

    A float network is written as :func:`fuse`. The file that was written is loaded again by MegEngine Lite, set up as
    in use, and run on the pictures ``check``, uint8 (batch, 3, S, S): the logits have to equal the network's in memory
    (fused, if float) to the bit. On some processors MKL rounds by where in memory a matrix lies; then Lite may differ
    by what follows from that rounding, and MegEngine's own loader has to give the same bits. Raises FailureError
    otherwise, and nothing is left at ``path``.
    """
    in_memory = fuse(network) if mode_of(network) is Mode.NORMAL else network
    fed = cast_input(check, input_type)
    expected = run_graph(in_memory, fed, input_type)
    about = {
        **provenance,
        "input": {"name": "data", "type": input_type, "shape": [batch, 3, image_size, image_size], "order": "BGR"},
        "output": {"name": "logits"},
    }
    with atomic_write(path) as temporary:
        graph = graph_of(in_memory, fed, input_type)
        temporary.write_bytes(encode_file(graph, about))
        exact_in = find_exact_engine(graph, fed, expected, rounding_in(network))
        if exact_in is None or read_back(temporary, path) != graph:
            raise FailureError(f"{path} is not written: loaded again, it differs from the network in memory")
        size = temporary.stat().st_size
    return DumpReport(path, size, exact_in)


def read_back(temporary: Path, path: Path) -> bytes:
    """The graph in the file ``temporary``, to be ``path``. Raises FailureError where nobody could read that."""
    try:
        return read_megengine_file(temporary).graph
    except InputError as error:
        why = str(error).partition(printable(temporary))[2]
        raise FailureError(f"{path} is not written: loaded again, it{why}") from None


def rounding_in(network: M.Module) -> float:
    """What rounding in another way may change in the logits, relative to the largest."""
    return STEP_OFF if any(isinstance(module, FloatWeights) for module in network.modules()) else ROUNDING


def find_exact_engine(graph: bytes, fed: npt.NDArray[Any], expected: Logits, rounding: float) -> str | None:
    """The engine in which ``graph`` answers ``expected`` to the bit; None where none does, or Lite is far off.

    Lite may be off by ``rounding``, relative to the largest logit.
    """
    in_lite = run_in_lite(graph, fed)
    if same_bits(in_lite, expected):
        return "MegEngine Lite"
    allowed = rounding * float(np.abs(expected).max())
    close = in_lite.shape == expected.shape and bool(np.abs(in_lite - expected).max() <= allowed)
    return "MegEngine" if close and same_bits(run_in_megengine(graph, fed), expected) else None


def same_bits(logits: Logits, expected: Logits) -> bool:
    return logits.shape == expected.shape and logits.tobytes() == expected.tobytes()


def cast_input(images: npt.NDArray[np.uint8], input_type: str) -> npt.NDArray[Any]:
    """``images`` as a file with input ``input_type`` takes them."""
    if input_type == "uint8":
        return images
    centered = images.astype(np.int16) - 128
    return centered.astype(input_type)


def run_graph(network: M.Module, fed: npt.NDArray[Any], input_type: str) -> Logits:
    result: Logits = network(INPUTS[input_type](Tensor(fed))).numpy()
    return result


def graph_of(network: M.Module, fed: npt.NDArray[Any], input_type: str) -> bytes:
    """MegEngine's serialized graph of ``network`` behind its input conversion, optimized for inference.

    That keeps the bits of int8 networks and of float ones that are :func:`fuse`.
    """
    # The file takes one shape: others are numbers in it, not operators.
    traced = trace(
        lambda pixels: network(INPUTS[input_type](pixels)), symbolic=True, capture_as_const=True, symbolic_shape=False
    )
    traced(Tensor(fed)).numpy()
    file = io.BytesIO()
    # MegEngine's own metadata would be a pickle.
    traced.dump(
        file,
        arg_names=["data"],
        output_names=["logits"],
        optimize_for_inference=True,
        enable_fuse_conv_bias_nonlinearity=True,
        enable_metadata=False,
    )
    return file.getvalue()


def run_in_lite(graph: bytes, fed: npt.NDArray[Any]) -> Logits:
    """Load ``graph`` by MegEngine Lite and run it once."""
    return LiteGraph(graph).run(fed)


def run_in_megengine(graph: bytes, fed: npt.NDArray[Any]) -> Logits:
    """Load ``graph`` by MegEngine and run it once, operator by operator as it is written."""
    return CompiledGraph(graph).run(fed)


class CompiledGraph:
    """A serialized graph in MegEngine itself, compiled as it is written, on one thread.

    A function of ``megengine.jit.trace`` computes the same bits at two thirds of the speed: its graph is not optimized
    for inference, and every call checks it against Python.
    """

    def __init__(self, graph: bytes) -> None:
        loaded = megbrain_graph.load_graph(io.BytesIO(graph))
        loaded.graph.options.graph_opt_level = 0
        outputs, inputs = convert_inputs(loaded.output_vars_list)
        outputs, results = convert_outputs(outputs)
        (self.input,), (self.output,) = inputs.values(), results.values()
        self.function = loaded.graph.compile(outputs)

    def run(self, fed: npt.NDArray[Any]) -> Logits:
        """``fed`` has the shape and type that the graph takes. The logits are a copy, and stay as they are."""
        self.input.set_value(Tensor(fed)._dev_tensor())
        self.function.execute()
        self.function.wait()
        logits: Logits = self.output.get_value().numpy().copy()
        return logits


class LiteGraph:
    """A serialized graph in MegEngine Lite, on the CPU, ready to run. ``threads`` must not exceed the cores."""

    def __init__(self, graph: bytes, threads: int = 1) -> None:
        from megenginelite import LiteConfig, LiteNetwork, LiteOptions

        options = LiteOptions()
        # The graph was optimized when it was written. Lite would go on to merge convolutions and sums that are not
        # fused, which changes a float network's last bits.
        options.graph_opt_level = 0
        # Filters are brought into the kernels' order once, at loading.
        options.weight_preprocess = True
        self.network = LiteNetwork(LiteConfig(option=options))
        if threads > 1:
            self.network.threads_number = threads
        else:
            # Computes on the thread that calls, without a queue to another one.
            self.network.enable_cpu_inplace_mode()
        self.network.load(io.BufferedReader(io.BytesIO(graph)))
        self.input = self.network.get_io_tensor(self.network.get_input_name(0))
        self.output = self.network.get_io_tensor(self.network.get_output_name(0))

    def run(self, fed: npt.NDArray[Any]) -> Logits:
        """``fed`` has the shape and type that the graph takes. The logits are a copy, and stay as they are."""
        self.input.set_data_by_copy(np.ascontiguousarray(fed))
        self.network.forward()
        self.network.wait()
        logits: Logits = self.output.to_numpy()
        return logits


def fuse(network: M.Module) -> M.Module:
    """A copy of ``network`` (mode ``normal``) for inference: batch norms folded, each convolution one operator.

    It is equal but for rounding, faster in memory, and its file gives the same bits.
    """
    network = fold_batch_norms(network)
    kinds = (M.Conv2d, M.ConvRelu2d, ConvRelu6)
    found = network._flatten(with_key=True, with_parent=True, predicate=lambda module: type(module) in kinds)
    for name, conv, _ in list(found):
        if conv.bias is not None and conv.padding_mode == "zeros":
            set_expand_structure(network, name, FusedConv(conv, conv.weight, conv.bias, activation_of(conv)))
    network.eval()
    return network

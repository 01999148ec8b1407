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

from mgq.errors import FailureError
from mgq.files.atomic import atomic_write
from mgq.files.sealed import read_sealed, sealed_bytes
from mgq.quant.fold import folded
from mgq.quant.modes import Mode, mode_of

Logits = npt.NDArray[np.float32]

# What the file takes -> how it becomes the network's input, pixels minus 128 in float32.
INPUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "uint8": lambda pixels: pixels.astype("float32") - 128,
    "int8": lambda pixels: pixels.astype("float32"),
    "float32": lambda pixels: pixels,
}


@dataclass(frozen=True)
class DumpReport:
    """What was written: bytes of the file, and how far folding its batch norms moved the logits (0 for int8)."""

    path: Path
    size: int
    folding_difference: float


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

    A float network is written with its batch norms folded. The file that was written is loaded again by MegEngine
    and run, without optimizations that reorder float arithmetic, on the pictures ``check``, uint8 (batch, 3, S, S):
    the logits have to equal the network's in memory (folded, if float) to the bit. Raises FailureError otherwise,
    and nothing is left at ``path``.
    """
    is_float = mode_of(network) is Mode.NORMAL
    in_memory = folded(network) if is_float else network
    fed = as_input(check, input_type)
    expected = answer(in_memory, fed, input_type)
    about = {
        **provenance,
        "input": {"name": "data", "type": input_type, "shape": [batch, 3, image_size, image_size], "order": "BGR"},
        "output": {"name": "logits"},
    }
    with atomic_write(path) as temporary:
        temporary.write_bytes(sealed_bytes(graph_of(in_memory, fed, input_type, optimized=not is_float), about))
        found = run_graph(read_sealed(temporary).graph, fed)
        if found.shape != expected.shape or found.tobytes() != expected.tobytes():
            largest = np.abs(found - expected).max() if found.shape == expected.shape else np.inf
            raise FailureError(f"{path}, loaded again, differs from the network in memory by up to {largest:.3g}")
        size = temporary.stat().st_size
    moved = float(np.abs(answer(network, fed, input_type) - expected).max()) if is_float else 0.0
    return DumpReport(path, size, moved)


def as_input(pictures: npt.NDArray[np.uint8], input_type: str) -> npt.NDArray[Any]:
    """``pictures`` as a file with input ``input_type`` takes them."""
    if input_type == "uint8":
        return pictures
    centered = pictures.astype(np.int16) - 128
    return centered.astype(input_type)


def answer(network: M.Module, fed: npt.NDArray[Any], input_type: str) -> Logits:
    result: Logits = network(INPUTS[input_type](Tensor(fed))).numpy()
    return result


def graph_of(network: M.Module, fed: npt.NDArray[Any], input_type: str, optimized: bool) -> bytes:
    """MegEngine's serialized graph of ``network`` behind its input conversion.

    ``optimized`` lets MegEngine fuse and reorder. That is exact for integers alone; a float network has been
    folded already, which is what speeds it up, and loaders fuse the rest when they load it.
    """
    traced = trace(lambda pixels: network(INPUTS[input_type](pixels)), symbolic=True, capture_as_const=True)
    traced(Tensor(fed)).numpy()
    file = io.BytesIO()
    passes = {"enable_fuse_conv_bias_nonlinearity": True} if optimized else {}
    # MegEngine's own metadata would be a pickle.
    traced.dump(
        file,
        arg_names=["data"],
        output_names=["logits"],
        optimize_for_inference=optimized,
        enable_metadata=False,
        **passes,
    )
    return file.getvalue()


def run_graph(graph: bytes, fed: npt.NDArray[Any]) -> Logits:
    """Load ``graph`` by MegEngine and run it once, operator by operator as it is written."""
    loaded = megbrain_graph.load_graph(io.BytesIO(graph))
    loaded.graph.options.graph_opt_level = 0
    outputs, inputs = convert_inputs(loaded.output_vars_list)
    outputs, results = convert_outputs(outputs)
    function = loaded.graph.compile(outputs)
    for node in inputs.values():
        node.set_value(Tensor(fed)._dev_tensor())
    function.execute()
    function.wait()
    (result,) = results.values()
    logits: Logits = result.get_value().numpy().copy()
    return logits

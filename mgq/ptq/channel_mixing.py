"""Channel mixing: multiplies the channels of a tensor by a matrix, so that one scale fits them all. The output of a
convolution without an activation (or a sum of such outputs) that only convolutions read may be multiplied by any matrix
R if the weights of its readers are multiplied by the inverse. The answers and the graph stay the same. Equalization
scales channels, one by one. It cannot help where the values of a channel have long tails, or where channels vary
together. A mixture of many channels has short tails. (QuaRot, Ashkboos et al. 2024, arXiv:2404.00456, rotates the
channels of language models in this way.)

R = Q M^(1/2). Let S be the mean product of the values of each pair of channels, and G that of the gradients of the
logits. The step of the grid is as large as the mixed channels are, so its noise in the logits is proportional to
trace(M S) trace(G inv(M)), which is least where M S M = G: directions that do not change the logits become small and
take no part of the grid. The orthogonal Q makes all channels equally large.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass

import megengine.module as M
import numpy as np
import numpy.typing as npt
from megengine import Tensor
from megengine.module.conv_bn import _ConvBnActivation2d

from mgq.graph.layer_graph import Add, Convolution, Graph
from mgq.ptq.equalization import sets_of
from mgq.ptq.logit_gradients import Pairs, Reactions
from mgq.quantization.activations import IDENTITY
from mgq.quantization.batch_norm_folding import fold_layer

Values = npt.NDArray[np.float64]

MOST_CHANNELS = 512
"""Of more, matrices take too long."""
SHRINKAGE = 0.1
"""Of the mean, added to the diagonals of S and G as a regularization, because they come from few images. On MobileNetV2
the logits of unseen photos came within 24.7 dB of float's with 0.1, 24.5 with 0.01, and 24.4 with 0.001."""
ROUNDS, SETTLED = 30, 1e-6
LEAST_EIGENVALUE = 1e-12
"""Of the largest: smaller ones are noise of float64."""


@dataclass(frozen=True)
class LinearTensors:
    """Tensors whose ``channels`` can be mixed together, and the convolutions that give and read them, by names."""

    channels: int
    tensors: tuple[str, ...]
    makers: tuple[str, ...]
    readers: tuple[str, ...]


def find_linear_tensors(graph: Graph) -> list[LinearTensors]:
    """List the tensors of ``graph`` that can be mixed: convolutions without an activation give them, convolutions of
    one group read them."""
    of, fixed = sets_of(graph).of, set(sets_of(graph).fixed.tolist())
    for node in graph.nodes:
        if isinstance(node, Convolution) and node.groups == 1:
            fixed |= set() if node.activation is IDENTITY else set(of[node.output].tolist())
        elif not isinstance(node, Add) or node.relu:
            fixed |= {slot for name in (node.output, *node.inputs) for slot in of[name].tolist()}
    keys = {name: tuple(slots.tolist()) for name, slots in of.items()}
    made = [node for node in graph.nodes if isinstance(node, Convolution)]
    free = [key for key in dict.fromkeys(keys.values()) if 1 < len(key) <= MOST_CHANNELS and not fixed & set(key)]
    return [
        LinearTensors(
            len(key),
            tuple(name for name, own in keys.items() if own == key),
            tuple(node.output for node in made if keys[node.output] == key),
            tuple(node.output for node in made if keys[node.inputs[0]] == key),
        )
        for key in free
        if len(set(key)) == len(key)
    ]


def mix_channels(network: M.Module, graph: Graph, reactions: Reactions) -> tuple[M.Module, dict[str, Values]]:
    """A copy of ``network`` (mode ``normal``) that answers the same but for rounding, and by which matrix (C, C) each
    tensor that is mixed is multiplied.

    ``graph`` is its graph, ``reactions`` those of its logits, with ``pairs`` of the tensors that can be mixed; others
    stay as they are.
    """
    mixed = deepcopy(network)
    modules, mixings = dict(mixed.named_modules()), dict[str, Values]()
    for seed, linear in enumerate(find_linear_tensors(graph)):
        pairs = [reactions[name].pairs for name in linear.tensors if name in reactions]
        mixing = find_mixing([pair for pair in pairs if pair is not None and pair.matters], seed)
        if mixing is None or not all(isinstance(modules[name], _ConvBnActivation2d) for name in linear.makers):
            continue
        apply_mixing(modules, linear, mixing)
        mixings |= {name: mixing for name in linear.tensors if name in reactions}
    return mixed, mixings


def apply_mixing(modules: Mapping[str, M.Module], linear: LinearTensors, mixing: Values) -> None:
    """Multiply the channels of ``linear`` by ``mixing`` (C, C), and what reads them by the inverse."""
    inverse = np.linalg.inv(mixing)
    for name in linear.makers:
        mix_outputs(modules[name], mixing)
    for name in linear.readers:
        mix_inputs(modules[name], inverse)


def mix_outputs(module: _ConvBnActivation2d, mixing: Values) -> None:
    """Mix the outputs of ``module``. Its batch norm is folded into the weights, and gets the statistics of a mixture of
    independent channels."""
    bn, plain = module.bn, fold_layer(module)
    weight, bias = plain.weight.numpy().astype(np.float64), flatten(plain.bias)
    set_values(module.conv.weight, mixing @ weight.reshape(len(weight), -1))
    if module.conv.bias is not None:
        set_values(module.conv.bias, np.zeros(len(weight)))
    mean, variance = mixing @ flatten(bn.bias), np.square(mixing) @ np.square(flatten(bn.weight))
    variance = np.maximum(variance, 2 * bn.eps)
    set_values(bn.bias, mean)
    set_values(bn.weight, np.sqrt(variance))
    set_values(bn.running_mean, mean - mixing @ bias)
    set_values(bn.running_var, variance - bn.eps)


def mix_inputs(module: M.Module, inverse: Values) -> None:
    conv = module.conv if isinstance(module, _ConvBnActivation2d) else module
    weight = conv.weight.numpy().astype(np.float64)
    set_values(conv.weight, np.einsum("oihw,ij->ojhw", weight, inverse))


def flatten(tensor: Tensor) -> Values:
    found: Values = np.ravel(tensor.numpy()).astype(np.float64)
    return found


def set_values(tensor: Tensor, new: Values) -> None:
    tensor[...] = Tensor(new.reshape(tensor._tuple_shape).astype(np.float32))


def find_mixing(pairs: Sequence[Pairs], seed: int = 0) -> Values | None:
    """The matrix (C, C) for which a grid behind each of some tensors, of the same channels, makes the least noise.

    None where none of them was measured.
    """
    if not pairs:
        return None
    known = [(shrink(pair.values), shrink(pair.gradients)) for pair in pairs]
    root = power(least_noise(known), 0.5)
    sizes = [root @ values @ root for values, _ in known]
    level = level_diagonal(sum((size / np.trace(size) for size in sizes), np.zeros_like(root)), seed)
    growth = sum(np.trace(size) for size in sizes) / sum(np.trace(values) for values, _ in known)
    mixing: Values = level @ root / np.sqrt(growth)
    return mixing


def least_noise(known: Sequence[tuple[Values, Values]]) -> Values:
    """M (C, C), for the S and G of each tensor: the least sum of trace(M S) trace(G inv(M)) over the tensors."""
    found = np.eye(len(known[0][0]))
    for _ in range(ROUNDS):
        inverse = np.linalg.inv(found)
        values = sum((np.sum(inverse * gradients) * own for own, gradients in known), np.zeros_like(found))
        gradients = sum((np.sum(found * own) * gradients for own, gradients in known), np.zeros_like(found))
        before, found = found, solve_symmetric(values / np.trace(values), gradients / np.trace(gradients))
        if np.abs(found - before).max() < SETTLED * np.abs(found).max():
            break
    return found


def solve_symmetric(values: Values, gradients: Values) -> Values:
    """The symmetric M with M @ ``values`` @ M = ``gradients``."""
    root, inverse = power(values, 0.5), power(values, -0.5)
    found: Values = inverse @ power(root @ gradients @ root, 0.5) @ inverse
    return found


def power(matrix: Values, exponent: float) -> Values:
    """Of a symmetric ``matrix`` without negative eigenvalues, not all 0."""
    eigenvalues, vectors = np.linalg.eigh((matrix + matrix.T) / 2)
    eigenvalues = np.maximum(eigenvalues, eigenvalues.max() * LEAST_EIGENVALUE)
    found: Values = (vectors * eigenvalues**exponent) @ vectors.T
    return found


def shrink(matrix: Values) -> Values:
    found: Values = matrix + SHRINKAGE * np.trace(matrix) / len(matrix) * np.eye(len(matrix))
    return found


def level_diagonal(matrix: Values, seed: int = 0) -> Values:
    """An orthogonal Q, with which the diagonal of Q @ ``matrix`` @ Q.T, symmetric, is the same everywhere.

    It begins with a random one, which mixes all channels. Then each turn of two rows brings one value to the mean.
    """
    random = np.random.default_rng(seed).standard_normal(matrix.shape)
    rows = np.linalg.qr(random)[0]
    turned, mean = rows @ matrix @ rows.T, np.trace(matrix) / len(matrix)
    for _ in range(len(matrix)):
        diagonal = np.diag(turned)
        pair = [int(diagonal.argmax()), int(diagonal.argmin())]
        if diagonal[pair[0]] - diagonal[pair[1]] < SETTLED * abs(mean):
            break
        turn = level_pair(turned[np.ix_(pair, pair)], mean)
        rows[pair] = turn @ rows[pair]
        turned[pair] = turn @ turned[pair]
        turned[:, pair] = turned[:, pair] @ turn.T
    return rows


def level_pair(block: Values, mean: float) -> Values:
    """The turn (2, 2) that makes the first value of the diagonal of ``block`` the ``mean``, which is between both."""
    (first, shared), (_, second) = block
    # (1, t) block (1, t).T = mean (1 + t^2): the smaller of both solutions
    root = np.sqrt(shared**2 + (first - mean) * (mean - second))
    tangent = (first - mean) / (root + abs(shared)) * (1 if shared <= 0 else -1)
    cosine = 1 / np.hypot(1, tangent)
    return np.array([[cosine, cosine * tangent], [-cosine * tangent, cosine]])

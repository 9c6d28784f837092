"""Rotation: turn the channels of residual streams and attention heads by random Hadamard matrices, which spreads an
outlier in one of them over all.

Ashkboos et al., "QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs", NeurIPS 2024, arXiv 2404.00456: with an
orthogonal Q, layers that write a stream get Q W, those that read it W Q^T, the gains of the normalizations between
them having moved into the readers; RMS norms and sums do not notice. The values of attention are turned head by head
in the same way. Everything is folded into the weights, so that inference costs nothing more.

    Q = H diag(s) / sqrt(n),    s random signs, H a Hadamard matrix,

by Sylvester's doubling of those of Paley (1933), for orders 4, 8, 12, 16, 20, 24, 28, ... For an n with no such H, Q
is drawn evenly from all orthogonal matrices (QR of Gaussian noise), which spreads outliers nearly as well.

Differs from the paper: what can be turned is found in the graph (`quantkit.rotations`), also streams of linear
bottlenecks in convolutional networks, queries and keys without rotary positions, and LayerNorms, whose networks the
paper rewrites: here (I - 2 v v^T / v^T v) Q, v = Q 1 - 1, is taken in place of Q and keeps the vector of ones. Turns
that would have to be computed during inference (in front of a layer behind a gate, of keys behind rotary positions) are
not made. A weight that two layers share becomes two.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, fx

from quantkit.errors import InputError
from quantkit.model import Calib, Model
from quantkit.qlayers import QLayer
from quantkit.rotations import Block, find_blocks, turn

CHANGES = frozenset({"float"})


def hadamard(n: int) -> Tensor | None:
    """A Hadamard matrix of order n, entries 1 and -1, float64; None where neither Sylvester nor Paley has one.

    >>> H = hadamard(12)
    >>> bool((H @ H.T == 12 * torch.eye(12)).all()), hadamard(6)
    (True, None)
    """
    if n in (1, 2):
        return torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)[:n, :n]
    if n % 4:
        return None
    if (H := hadamard(n // 2)) is not None:
        return torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), H)
    if (q := n - 1) % 4 == 3 and _prime(q):
        S = _conference(q)
        S[0, 1:], S[1:, 0] = 1, -1
        return S + torch.eye(n)
    if (q := n // 2 - 1) % 4 == 1 and _prime(q):
        whole, corner = torch.tensor([[[1.0, 1.0], [1.0, -1.0]], [[1.0, -1.0], [-1.0, -1.0]]], dtype=torch.float64)
        return torch.kron(_conference(q), whole) + torch.kron(torch.eye(q + 1), corner)
    return None


def _prime(q: int) -> bool:
    return q > 1 and all(q % d for d in range(2, math.isqrt(q) + 1))


def _conference(q: int) -> Tensor:
    """The quadratic character of j - i modulo a prime q, bordered by ones, (q + 1, q + 1)."""
    squares = {k * k % q for k in range(1, q)}
    character = torch.tensor([0.0, *(1.0 if k in squares else -1.0 for k in range(1, q))], dtype=torch.float64)
    S = torch.ones(q + 1, q + 1, dtype=torch.float64)
    S[0, 0] = 0
    S[1:, 1:] = character[(torch.arange(q) - torch.arange(q)[:, None]) % q]
    return S


def rotation(n: int, generator: torch.Generator, centred: bool = False) -> Tensor:
    """Q of the docstring, float64 (n, n); centred: with Q 1 = 1."""
    H = hadamard(n)
    if H is not None:
        Q = H * (2.0 * torch.randint(2, (n,), generator=generator) - 1) / math.sqrt(n)
    else:
        Q, R = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))
        Q = Q * R.diagonal().sign()
    if centred:
        v = Q.sum(dim=1) - 1
        if (square := float(v @ v)) > 1e-12 * n:
            Q = Q - torch.outer(v, v @ Q) * (2 / square)
    return Q


def apply(model: Model, calib: Calib) -> dict[str, float]:
    """Turn every block of channels that a layer with a planned quantizer reads or writes.

    Returns how many blocks there are, the channels of the largest, how many layers read a turned input, and the
    largest change of the outputs on the example input, relative to the largest output. Raises InputError where
    nothing can be turned.
    """
    layers = model.layers()
    for name, layer in model.qlayers().items():
        if layer.q is not None or layer.act is not None:
            raise InputError(f"step 'rotate': layer {name!r} is already quantized; put this step first")
    planned = any(point.plan.act is not None for point in model.points().values())

    def gains(block: Block) -> bool:
        if not block.columns:
            return planned  # queries and keys
        return any(isinstance(layers.get(name), QLayer) for name in (*block.rows, *block.columns))

    blocks = [block for block in find_blocks(model) if gains(block)]
    if not blocks:
        why = "no layers are joined by linear steps alone (a residual stream, values of attention)"
        if not isinstance(model.module, fx.GraphModule):
            why = "it is a policy with activations between its layers, or could not be traced"
        raise InputError(f"step 'rotate': nothing in this network can be rotated: {why}; leave the step out")
    before = model.module(model.example)
    for block in blocks:
        turn(model, block, rotation(block.size, calib.generator, block.centred))
    after = model.module(model.example)
    change = float((after - before).abs().max() / before.abs().max().clamp_min(1e-30))
    if not change < 1e-2:
        raise AssertionError(f"step 'rotate' changed the network's output by {change:.2g} of its largest value")
    return {
        "blocks": float(len(blocks)),
        "largest": float(max(block.size for block in blocks)),
        "layers": float(len({name for block in blocks for name in block.columns})),
        "largest_change": change,
    }

"""Products of two activations, and attention made of them, each operand quantized at its `Point`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from hwmodel import formats
from quantkit.qlayers import BlockAct, Point


class MatMul(nn.Module):
    """A product of two activations, such as queries and keys, each quantized at its `Point`.

    Summed like a layer's: in float64 where whole units could exceed 2^24, or with blocks, which lie along the sum.
    """

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = Point(grid=True), Point(grid=True, axis=-2)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        left, right = self.left.act, self.right.act
        u, v = self.left(a), self.right(b)
        if left is not None and right is not None:
            largest = a.shape[-1] * formats.int_max(left.fmt) * formats.int_max(right.fmt)
            if largest > 2**24 or isinstance(left, BlockAct) or isinstance(right, BlockAct):
                u, v = u.double(), v.double()
        gain = (1.0 if left is None else left.scale) * (1.0 if right is None else right.scale)
        y = torch.matmul(u, v).float()
        return y if left is None and right is None else y * gain


class Attention(nn.Module):
    """softmax(scale q k^T + mask) v with both products as `MatMul`: what `scaled_dot_product_attention` computes.

    q: (..., heads, n, d); k, v: (..., heads or fewer that are repeated, m, d). Where no operand is quantized or
    observed, torch's fused kernel computes it, which never holds all scores.
    """

    def __init__(self, scale: float | None = None, causal: bool = False) -> None:
        super().__init__()
        self.scores, self.values = MatMul(), MatMul()
        self.scale, self.causal = scale, causal

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        if k.dim() > 2 and k.shape[-3] != q.shape[-3]:
            k, v = (t.repeat_interleave(q.shape[-3] // t.shape[-3], dim=-3) for t in (k, v))
        if self.plain() and (mask is None or not self.causal):
            causal = self.causal or (mask is not None and _hides_later(mask, q.shape[-2], k.shape[-2]))
            return F.scaled_dot_product_attention(q, k, v, None if causal else mask, is_causal=causal, scale=self.scale)
        return self._explicit(q, k, v, mask)

    def plain(self) -> bool:
        """Whether both products are plain: nothing stands for a point, has or is asked for a format, or is observed."""
        products = (self.scores, self.values)
        points = [point for product in products for point in (product.left, product.right)]
        if any(part._forward_hooks or part._forward_pre_hooks for part in (*products, *points)):
            return False
        return all(type(point) is Point and point.act is None and point.plan.act is None for point in points)

    def _explicit(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        scores = self.scores(q, k.transpose(-1, -2)) * (q.shape[-1] ** -0.5 if self.scale is None else self.scale)
        if self.causal:
            hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril().logical_not()
            scores = scores.masked_fill(hidden, float("-inf"))
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
        return self.values(scores.softmax(dim=-1), v)


_CAUSAL = WeakTensorKeyDictionary()
"""Masks that have been looked through: (version of the tensor, answer); one mask serves every block and batch."""


def _hides_later(mask: Tensor, n: int, m: int) -> bool:
    """Whether a boolean mask shows every query the keys up to its own and no others; kernels need no mask for that."""
    if mask.dtype != torch.bool or n != m or mask.shape[-2:] != (n, m) or torch.compiler.is_compiling():
        return False
    if mask.is_inference():  # has no version
        return _is_triangle(mask)
    version, known = _CAUSAL.get(mask, (-1, False))
    if version != mask._version:
        known = _is_triangle(mask)
        _CAUSAL[mask] = mask._version, known
    return known


def _is_triangle(mask: Tensor) -> bool:
    return torch.equal(mask, torch.ones(mask.shape[-2:], dtype=torch.bool, device=mask.device).tril().expand_as(mask))

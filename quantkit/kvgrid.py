"""The arithmetic of quantized key and value caches: asymmetric groups, packed codes, exact demotion.

The grid is KIVI's (arXiv 2402.02750, Algorithm 1): a group x has low = min x, scale = (max x - low) / (2^b - 1),
code = round(clamp((x - low) / scale, 0, 2^b - 1)) and value = low + code * scale; low and scale are held in float16.
The level counts 255, 15, 3 divide each other with odd quotients k = 17, 85, 5, and a code divided by an odd number
is never a tie, so from a code c at more bits the code at fewer bits is (c + k // 2) // k and its scale k * scale:
rounding twice gives what rounding once gives (ties too, since k // 2 is even), and a group keeps its metadata.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Literal

import torch
from torch import Tensor

from quantkit.errors import InputError

Axis = Literal["channel", "token", "heads"]
BITS = (8, 4, 2)


@dataclass(frozen=True)
class Packed:
    """Groups of codes. codes: uint8 (batch, heads, rows, groups, size * bits / 8), the first code of a byte lowest.

    scale, low: float16 (batch, heads, rows, groups); scale is that of `made` bits, the width the codes were born with.
    """

    codes: Tensor
    scale: Tensor
    low: Tensor
    bits: int
    made: int

    def __getitem__(self, rows: slice) -> Packed:
        """The groups of some rows, in memory of their own."""
        codes, scale, low = (t[:, :, rows].clone() for t in (self.codes, self.scale, self.low))
        return replace(self, codes=codes, scale=scale, low=low)

    def at(self, batch: Tensor) -> Packed:
        """The groups of the sequences `batch` (indices), in that order."""
        return replace(self, codes=self.codes[batch], scale=self.scale[batch], low=self.low[batch])

    @property
    def nbytes(self) -> int:
        """Bytes of codes and metadata."""
        return sum(t.numel() * t.element_size() for t in (self.codes, self.scale, self.low))


def concat(parts: list[Packed]) -> Packed:
    """Parts of equal bits, one after the other, in new memory."""
    codes, scale, low = (torch.cat([getattr(p, name) for p in parts], dim=2) for name in ("codes", "scale", "low"))
    return replace(parts[0], codes=codes, scale=scale, low=low)


def grouped(x: Tensor, axis: Axis, size: int) -> Tensor:
    """Keys or values (batch, heads, tokens, dim) in groups: (batch, heads, rows, groups, size).

    "channel": `size` neighbouring tokens of one channel, a row every `size` tokens. "token": `size`
    neighbouring channels of one token and head, a row a token. "heads": the same with the heads of a
    token side by side as one (heads becomes 1). Sizes must divide.
    """
    b, h, t, d = x.shape
    if axis == "channel":
        return x.reshape(b, h, t // size, size, d).transpose(3, 4)
    if axis == "heads":
        return x.transpose(1, 2).reshape(b, 1, t, h * d // size, size)
    return x.reshape(b, h, t, d // size, size)


def ungrouped(g: Tensor, axis: Axis, heads: int) -> Tensor:
    """Inverse of `grouped`."""
    b, h, n, m, size = g.shape
    if axis == "channel":
        return g.transpose(3, 4).reshape(b, h, n * size, m)
    if axis == "heads":
        return g.reshape(b, n, heads, m * size // heads).transpose(1, 2)
    return g.reshape(b, h, n, m * size)


def quantize(x: Tensor, bits: int) -> Packed:
    """Groups (..., size) of finite values as codes of `bits` bits.

    A constant group, or one whose scale is below float16, gets codes 0: every value becomes `low`.
    Raises InputError when a value, or the float16 of low or scale, is not finite.
    """
    x = x.float()
    low, high = x.aminmax(dim=-1)
    top = 2**bits - 1
    scale, low = ((high - low) / top).half(), low.half()
    if not (torch.isfinite(scale).all() and torch.isfinite(low).all()):
        raise InputError(f"keys or values to be cached in {bits} bits are NaN or beyond float16 (65504)")
    step = scale.float()
    step = torch.where(step == 0, torch.inf, step)
    codes = ((x - low.float()[..., None]) / step[..., None]).clamp_(0, top).round_()
    return Packed(pack(codes.to(torch.uint8), bits), scale, low, bits, bits)


def dequantize(p: Packed) -> Tensor:
    """The values of the codes: float32 (batch, heads, rows, groups, size)."""
    scale = p.scale.float() * quotient(p.made, p.bits)
    return unpack(p.codes, p.bits).float().mul_(scale[..., None]).add_(p.low.float()[..., None])


def demote(p: Packed, bits: int) -> Packed:
    """The same groups at `bits` bits; `p` itself where it has no more than those."""
    if p.bits <= bits:
        return p
    k = quotient(p.bits, bits)
    codes = (unpack(p.codes, p.bits).to(torch.int16) + k // 2) // k
    return replace(p, codes=pack(codes.to(torch.uint8), bits), bits=bits)


def quotient(bits: int, fewer: int) -> int:
    """Steps of a grid of `bits` bits in one of `fewer` bits: an odd whole number for 8, 4, 2.

    >>> [quotient(8, b) for b in BITS], quotient(4, 2)
    ([1, 17, 85], 5)
    """
    return (2**bits - 1) // (2**fewer - 1)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes (..., size) as bytes (..., size * bits / 8), the first of 8 / bits codes in the lowest bits."""
    if bits == 8:
        return codes
    parts = codes.unflatten(-1, (-1, 8 // bits))
    return (parts << _shifts(bits, codes.device)).sum(-1, dtype=torch.uint8)


def unpack(packed: Tensor, bits: int) -> Tensor:
    """Inverse of `pack`."""
    if bits == 8:
        return packed
    return ((packed[..., None] >> _shifts(bits, packed.device)) & (2**bits - 1)).flatten(-2)


@cache
def _shifts(bits: int, device: torch.device) -> Tensor:
    return torch.arange(0, 8, bits, dtype=torch.uint8, device=device)

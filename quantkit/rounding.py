"""Rounding to a number format: the only file that rounds.

`round_to` is the torch version, `rounder` gives the numpy twin that the rollout simulator
uses; both equal `hwmodel.formats.nearest` on every float. A minifloat rounds in seven
elementwise operations: clamp, take the binade (the exponent bits of the float, exact where
`floor(log2(x))` is not), and add and subtract 1.5 * 2^23 units of the local step, which
makes the float adder itself round half to even.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from hwmodel.formats import Block, Float, Format, Levels, max_value, min_exponent, min_value

_INT_OF = {torch.float32: torch.int32, torch.float64: torch.int64}
_EXPONENT_BITS = {torch.float32: 0x7F800000, torch.float64: 0x7FF0000000000000}
_FRACTION_BITS = {torch.float32: 23, torch.float64: 52}


def round_to(x: Tensor, fmt: Format, *, inplace: bool = False) -> Tensor:
    """The nearest values of `fmt`, ties to even, saturating; same shape and dtype (float32 or float64).

    NaN stays NaN. The argument is not changed, unless `inplace` lets it become scratch, and no gradient is defined.

    >>> round_to(torch.tensor([2.5, 5.0, -9.0]), Float(2, 1)).tolist()
    [2.0, 4.0, -6.0]
    """
    if x.dtype not in _INT_OF:
        raise TypeError(f"round_to takes float32 or float64, not {x.dtype}")
    if isinstance(fmt, Block):
        raise TypeError(f"{fmt} needs scales; round to its element {fmt.elem} in units of them")
    if isinstance(fmt, Levels) and fmt.name == "binary":
        return torch.where(x >= 0, 1.0, torch.where(x < 0, -1.0, x)).to(x.dtype)
    low, high = (-1.0, 1.0) if isinstance(fmt, Levels) else (min_value(fmt), max_value(fmt))
    u = x.clamp_(low, high) if inplace else torch.clamp(x, low, high)
    if not isinstance(fmt, Float):
        return u.round_()
    magic = torch.bitwise_and(u.view(_INT_OF[x.dtype]), _EXPONENT_BITS[x.dtype]).view(x.dtype)
    magic = magic.clamp_min_(2.0 ** min_exponent(fmt)).mul_(1.5 * 2.0 ** (_FRACTION_BITS[x.dtype] - fmt.man))
    return u.add_(magic).sub_(magic)


def all_finite(x: Tensor) -> bool:
    """Whether no number is infinite or NaN: one pass without a temporary, several times faster than torch.isfinite.

    >>> [all_finite(torch.tensor(x)) for x in ([], [1.0, -2.0], [1.0, math.nan], [-math.inf])]
    [True, True, False, False]
    """
    x = as_stored(x[tuple(slice(None) if step else slice(1) for step in x.stride())])  # an expanded one: same numbers
    return not x.numel() or all(bool(torch.isfinite(bound)) for bound in torch.aminmax(x))


def as_stored(x: Tensor) -> Tensor:
    """The same numbers with the dimensions in the order of memory: torch.aminmax copies what is stored otherwise.

    >>> as_stored(torch.zeros(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)).shape
    torch.Size([2, 4, 5, 3])
    """
    return x.permute(sorted(range(x.dim()), key=x.stride, reverse=True))


# The ufunc behind np.clip (whose Python wrapper costs more than the clipping), and constants as
# 0-d arrays: numpy converts a scalar anew in every call.
_clip = (np._core if hasattr(np, "_core") else np.core).umath.clip
_EXPONENT_BITS_F32 = np.array(0x7F800000, np.int32)


def rounder(fmt: Format) -> Callable[[np.ndarray], np.ndarray]:
    """A function that rounds a float32 array to `fmt`, in place, and returns it."""
    if isinstance(fmt, Block):
        raise TypeError(f"{fmt} needs scales; round to its element {fmt.elem} in units of them")
    if isinstance(fmt, Levels) and fmt.name == "binary":

        def sign(u: np.ndarray) -> np.ndarray:
            np.copyto(u, np.where(u >= 0, np.float32(1), np.float32(-1)))
            return u

        return sign
    low, high = (-1.0, 1.0) if isinstance(fmt, Levels) else (min_value(fmt), max_value(fmt))
    f_low, f_high = np.array(low, np.float32), np.array(high, np.float32)
    clip, rint = _clip, np.rint

    def integer(u: np.ndarray) -> np.ndarray:
        clip(u, f_low, f_high, u)
        return rint(u, u)

    if not isinstance(fmt, Float):
        return integer
    smallest = np.array(2.0 ** min_exponent(fmt), np.float32)
    factor = np.array(1.5 * 2.0 ** (23 - fmt.man), np.float32)
    bitwise_and, maximum, multiply, add, subtract = np.bitwise_and, np.maximum, np.multiply, np.add, np.subtract
    i32, f32 = np.int32, np.float32

    def minifloat(u: np.ndarray) -> np.ndarray:
        clip(u, f_low, f_high, u)
        magic = bitwise_and(u.view(i32), _EXPONENT_BITS_F32).view(f32)
        maximum(magic, smallest, out=magic)
        multiply(magic, factor, magic)
        add(u, magic, u)
        return subtract(u, magic, u)

    return minifloat


def pow2_at_least(x: Tensor) -> Tensor:
    """The smallest powers of two not below the positive `x` (by `frexp`, exact)."""
    mantissa, exponent = torch.frexp(x)
    return torch.ldexp(torch.ones_like(x), torch.where(mantissa == 0.5, exponent - 1, exponent))


def is_pow2(x: float) -> bool:
    """Whether a positive number is a power of two."""
    return math.frexp(x)[0] == 0.5

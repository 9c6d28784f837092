"""Rounding to a number format: the only file that rounds.

`round_to` is the torch version, `round_array` the numpy twin that the rollout simulator
uses; both equal `hwmodel.formats.nearest` on every float. A minifloat rounds in seven
elementwise operations: clamp, take the binade (the exponent bits of the float, exact where
`floor(log2(x))` is not), and add and subtract 1.5 * 2^23 units of the local step, which
makes the float adder itself round half to even.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hwmodel.formats import Float, Format, Levels, max_value, min_exponent, min_value

_INT_OF = {torch.float32: torch.int32, torch.float64: torch.int64}
_EXPONENT_BITS = {torch.float32: 0x7F800000, torch.float64: 0x7FF0000000000000}
_FRACTION_BITS = {torch.float32: 23, torch.float64: 52}


def round_to(x: Tensor, fmt: Format) -> Tensor:
    """The nearest values of `fmt`, ties to even, saturating; same shape and dtype (float32 or float64).

    NaN stays NaN. The argument is not changed and no gradient is defined.

    >>> round_to(torch.tensor([2.5, 5.0, -9.0]), Float(2, 1)).tolist()
    [2.0, 4.0, -6.0]
    """
    if x.dtype not in _INT_OF:
        raise TypeError(f"round_to takes float32 or float64, not {x.dtype}")
    if isinstance(fmt, Levels) and fmt.name == "binary":
        return torch.where(x >= 0, 1.0, torch.where(x < 0, -1.0, x)).to(x.dtype)
    low, high = (-1.0, 1.0) if isinstance(fmt, Levels) else (min_value(fmt), max_value(fmt))
    u = torch.clamp(x, low, high)
    if not isinstance(fmt, Float):
        return u.round_()
    magic = torch.bitwise_and(u.view(_INT_OF[x.dtype]), _EXPONENT_BITS[x.dtype]).view(x.dtype)
    magic = magic.clamp_min_(2.0 ** min_exponent(fmt)).mul_(1.5 * 2.0 ** (_FRACTION_BITS[x.dtype] - fmt.man))
    return u.add_(magic).sub_(magic)


_EXPONENT_BITS_F32 = np.int32(0x7F800000)


def round_array(u: np.ndarray, fmt: Format) -> np.ndarray:
    """`round_to` for a float32 array, in place; returns the array."""
    if isinstance(fmt, Levels) and fmt.name == "binary":
        np.copyto(u, np.where(u >= 0, np.float32(1), np.float32(-1)))
        return u
    low, high = (-1.0, 1.0) if isinstance(fmt, Levels) else (min_value(fmt), max_value(fmt))
    return rounder(fmt, low, high)(u)


def rounder(fmt: Format, low: float, high: float) -> Any:
    """A function that clips a float32 array to [low, high] (values of `fmt`) and rounds it, in place."""
    f_low, f_high = np.float32(low), np.float32(high)
    minimum, maximum, rint = np.minimum, np.maximum, np.rint

    def integer(u: np.ndarray) -> np.ndarray:
        minimum(u, f_high, out=u)
        maximum(u, f_low, out=u)
        return rint(u, out=u)

    if not isinstance(fmt, Float):
        return integer
    smallest = np.float32(2.0 ** min_exponent(fmt))
    factor = np.float32(1.5 * 2.0 ** (23 - fmt.man))
    bitwise_and, multiply, add, subtract, i32, f32 = (
        np.bitwise_and,
        np.multiply,
        np.add,
        np.subtract,
        np.int32,
        np.float32,
    )

    def minifloat(u: np.ndarray) -> np.ndarray:
        minimum(u, f_high, out=u)
        maximum(u, f_low, out=u)
        magic = bitwise_and(u.view(i32), _EXPONENT_BITS_F32).view(f32)
        maximum(magic, smallest, out=magic)
        multiply(magic, factor, out=magic)
        add(u, magic, out=u)
        return subtract(u, magic, out=u)

    return minifloat


def pow2_at_least(x: Tensor) -> Tensor:
    """The smallest powers of two not below the positive `x` (by `frexp`, exact)."""
    mantissa, exponent = torch.frexp(x)
    return torch.ldexp(torch.ones_like(x), torch.where(mantissa == 0.5, exponent - 1, exponent))


def is_pow2(x: float) -> bool:
    """Whether a positive number is a power of two."""
    return math.frexp(x)[0] == 0.5

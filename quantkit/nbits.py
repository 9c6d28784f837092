"""Matrices as onnxruntime takes them in MatMulNBits and GatherBlockQuantized: codes of 2, 4 or 8 bits in blocks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from hwmodel import formats
from hwmodel.formats import Format
from hwmodel.spec import PerGroup
from quantkit.qtensor import QTensor, scale_format, values_of


@dataclass(frozen=True)
class Width:
    """How a format is stored: bits of a code, and the code of zero."""

    bits: int
    zero: int


def width_of(fmt: Format) -> Width | None:
    """The narrowest width that holds all values in units of the smallest step, None if 8 bits do not.

    >>> [width_of(formats.parse(f)) for f in ("ternary", "int3", "uint4", "e2m1")]
    [Width(bits=2, zero=2), Width(bits=4, zero=8), Width(bits=4, zero=0), Width(bits=8, zero=128)]
    """
    low, high = (int(v / formats.unit(fmt)) for v in (formats.min_value(fmt), formats.max_value(fmt)))
    for bits in (2, 4, 8):
        half = 2 ** (bits - 1)
        if -half <= low and high < half:
            return Width(bits, half)
        if low >= 0 and high < 2 * half:
            return Width(bits, 0)
    return None


def block_of(columns: int, group: int | None) -> int:
    """The operator's block for rows of `columns` weights that share scales by groups, None: all; 0 if none fits.

    The largest of 128, 64, 32 and 16 that divides a group; for one scale a row, of 128, 64 and 32 the one that leaves
    least of the last block empty.

    >>> block_of(2048, None), block_of(2048, 32), block_of(172, None), block_of(96, 8)
    (128, 32, 64, 0)
    """
    if group is None:
        return min((128, 64, 32), key=lambda block: -columns % block)
    return next((block for block in (128, 64, 32, 16) if group % block == 0), 0)


@dataclass(frozen=True)
class Codes:
    """A matrix of codes as the operator takes it, worth scale * (code - zero).

    codes: uint8 (rows, columns), below 2^bits. zero: uint8 (rows, 1) or (1, 1). scale: float32 (rows or 1, scales), all
    powers of two from 2^-127 on where pow2. group: columns that share a scale, the last of a row perhaps fewer; None:
    all.
    """

    codes: np.ndarray
    bits: int
    zero: np.ndarray
    scale: np.ndarray
    pow2: bool = False
    group: int | None = None

    @property
    def block(self) -> int:
        """`block_of` this matrix."""
        return block_of(self.codes.shape[1], self.group)

    def packed(self, block: int) -> np.ndarray:
        """Codes in blocks, the last filled up with zeros' codes, low bits first: uint8 (rows, blocks, bytes).

        >>> Codes(np.array([[1, 2, 3]], np.uint8), 4, np.array([[8]], np.uint8), np.ones((1, 1))).packed(16).tolist()
        [[[33, 131, 136, 136, 136, 136, 136, 136]]]
        """
        rows, columns = self.codes.shape
        full = np.empty((rows, columns + -columns % block), np.uint8)
        full[:, :columns], full[:, columns:] = self.codes, self.zero
        each = 8 // self.bits
        parts = full.reshape(rows, -1, block // each, each)
        held = parts[..., 0].copy()
        for i in range(1, each):
            held |= parts[..., i] << (i * self.bits)
        return held


def codes_of(q: QTensor) -> Codes:
    """Codes of a weight whose format `width_of` knows; scales count the format's smallest steps, exactly."""
    width, unit = width_of(q.fmt), formats.unit(q.fmt)
    assert width is not None
    codes = (values_of(q) / unit + width.zero).to(torch.uint8).numpy()
    scale = (q.scale * unit).numpy()
    pow2 = scale_format(q.granularity) == "e8m0" and bool(scale.min() >= 2.0**-127)
    return Codes(codes, width.bits, np.full((1, 1), width.zero, np.uint8), scale, pow2, group_of(q))


def group_of(q: QTensor) -> int | None:
    """Columns that share a scale, None where a row has one."""
    return q.granularity.size if isinstance(q.granularity, PerGroup) and q.scale.shape[1] > 1 else None

"""How many bits hold every partial sum of a dot product exactly.

All widths are two's complement, in units of the product of the two formats' smallest steps
(1 for integers, smallest subnormal for minifloats). From loosest to tightest: the bounds of
the papers, `type_bound` (weights unknown), `weight_bound` (sum of magnitudes known) and
`exact_bits` (weights known). Clipping to a range is never assumed.
"""

from __future__ import annotations

import math

import numpy as np

from hwmodel.formats import Float, Format, bits, is_signed, max_value, min_value, unit


def signed_bits(low: int, high: int) -> int:
    """Two's complement bits of a register that holds `low` .. `high`.

    >>> signed_bits(-8, 7), signed_bits(-8, 8), signed_bits(0, 0)
    (4, 5, 1)
    """
    return max(high.bit_length() if high > 0 else 0, (~low).bit_length() if low < 0 else 0) + 1


def unit_range(fmt: Format) -> tuple[int, int]:
    """Smallest and largest value in units of the format's step."""
    step = unit(fmt)
    return int(min_value(fmt) / step), int(max_value(fmt) / step)


def type_bound(weight: Format, act: Format, n: int) -> int:
    """Bits for any `n` products of the two formats: exact for the types, whatever the weights.

    Never more than `bit_length(n * int_max_w * int_max_a) + 1`; one less where the extreme is a
    negative power of two.

    >>> from hwmodel.formats import parse
    >>> type_bound(parse("int8n"), parse("int8n"), 4608), type_bound(parse("e2m1"), parse("e2m1"), 4608)
    (28, 21)
    """
    if n < 1:
        raise ValueError(f"a dot product has at least 1 term, not {n}")
    (w_low, w_high), (a_low, a_high) = unit_range(weight), unit_range(act)
    corners: list[int] = [w * a for w in (w_low, w_high) for a in (a_low, a_high)]
    return signed_bits(n * min(corners), n * max(corners))


def paper_bound(weight: Format, act: Format, n: int) -> int:
    """The width that "Shedding the Bits" (FPL 2024) uses for a pair of one kind; a little loose."""
    log = (n - 1).bit_length()
    if isinstance(weight, Float) and isinstance(act, Float):
        return int(2**weight.exp + weight.man + 2**act.exp + act.man + log - 1)
    if isinstance(weight, Float) or isinstance(act, Float):
        raise ValueError(f"the paper gives no width for {weight} x {act}; type_bound does")
    return bits(weight) + bits(act) + log + 1


def a2q_type_bound(weight: Format, act: Format, n: int) -> int:
    """The data-type bound for integers of A2Q (arXiv 2301.13376)."""
    return _ceil_bits(math.log2(n) + bits(weight) + bits(act) - 1 - is_signed(act))


def weight_bound(weights: np.ndarray, act: Format) -> np.ndarray:
    """The bound of A2Q from the sum of magnitudes of each row: int array (rows,).

    weights: integers (rows, columns) in units of the weight format's step. An all-zero row needs 1 bit.
    The activation is taken as an integer as wide as its range of units.
    """
    low, high = unit_range(act)
    width = signed_bits(low, high) if low < 0 else high.bit_length()
    totals = [sum(abs(int(w)) for w in row) for row in _rows(weights)]
    return np.array([_ceil_bits(math.log2(t) + width - (low < 0)) if t else 1 for t in totals], dtype=np.int64)


def exact_bits(weights: np.ndarray, act: Format) -> np.ndarray:
    """Bits that each row's sum needs, whatever the input: int array (rows,), exact.

    weights: integers (rows, columns) in units of the weight format's step; `object` arrays hold
    integers beyond 64 bits. The layer's accumulator is the maximum over rows.
    """
    low, high = sum_range(_rows(weights), *unit_range(act))
    return np.array([signed_bits(int(a), int(b)) for a, b in zip(low, high, strict=True)], dtype=np.int64)


def sum_range(weights: np.ndarray, low: int | np.ndarray, high: int | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Smallest and largest sum of each row's products with inputs low .. high: Python integers (rows,), exact.

    weights: integers (rows, columns). low, high: numbers, or one of each column.
    """
    most = max((abs(int(v)) for v in np.ravel([low, high]).tolist()), default=0)
    reach = max(abs(int(weights.max())), abs(int(weights.min()))) if weights.size else 0
    small = weights.dtype != object and reach * most * weights.shape[1] < 2**62
    units, a, b = (np.asarray(v, np.int64 if small else object) for v in (weights, low, high))
    return (
        np.minimum(units * a, units * b).sum(axis=1).astype(object),
        np.maximum(units * a, units * b).sum(axis=1).astype(object),
    )


def _rows(weights: np.ndarray) -> np.ndarray:
    weights = np.asarray(weights)
    if weights.ndim != 2:
        raise ValueError(f"weights are a matrix (rows, columns), not of shape {weights.shape}")
    if weights.dtype.kind not in "iuO":
        raise ValueError(f"weights are integers in units of the format's step, not {weights.dtype}")
    return weights


def _ceil_bits(a: float) -> int:
    return math.ceil(a + math.log2(1 + 2.0**-a) + 1)

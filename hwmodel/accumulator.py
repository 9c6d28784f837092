"""How many bits hold every partial sum of a dot product exactly.

All widths are two's complement, in units of the product of the two formats' smallest steps
(1 for integers, smallest subnormal for minifloats): `type_bound` where weights are unknown,
`exact_bits` where they are known. Clipping to a range is never assumed.
"""

from __future__ import annotations

import numpy as np

from hwmodel.formats import Format, max_value, min_value, unit


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

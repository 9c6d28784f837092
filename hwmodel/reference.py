"""One quantized layer in exact integers: the slow truth for torch, the runtime and the RTL.

Bit patterns become integers in units of their format's step, sums are exact (Python integers
when 62 bits do not suffice), and only the finished sum meets the real-valued scales.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hwmodel.accumulator import exact_bits, unit_range
from hwmodel.formats import Format, bits, decode, encode, nearest, unit


@dataclass(frozen=True, slots=True)
class Result:
    """sums: exact integers (batch, out, groups); values: float64 (batch, out); acc_bits: what the sums need."""

    sums: np.ndarray
    values: np.ndarray
    acc_bits: int


def to_units(codes: np.ndarray, fmt: Format) -> np.ndarray:
    """Bit patterns as integers in units of the format's step, same shape; a reserved code raises.

    int64, or `object` where the format reaches beyond 62 bits.
    """
    low, high = unit_range(fmt)
    wide = max(-low, high).bit_length() > 62
    step = unit(fmt)
    table: list[int] = []
    codes = np.asarray(codes)
    different, places = np.unique(codes, return_inverse=True)
    for code in different:
        value = decode(int(code), fmt)
        if not low <= value / step <= high:
            raise ValueError(f"code {int(code)} of {fmt} is {value}, not a number of the format")
        table.append(int(value / step))
    return np.array(table, dtype=object if wide else np.int64)[places].reshape(codes.shape)


def forward(
    weight_codes: np.ndarray,
    weight: Format,
    weight_scale: float | np.ndarray,
    act_codes: np.ndarray,
    act: Format,
    act_scale: float,
    bias: np.ndarray | None = None,
) -> Result:
    """The layer's output: `sum_g scale[o, g] * sum_i w[o, i] x[b, i] * act_scale + bias[o]`.

    weight_codes: (out, in) bit patterns. weight_scale: a number, (out, 1) or (out, groups) with
    groups dividing `in`. act_codes: (batch, in). bias: (out,) real or None.
    """
    w, x = to_units(weight_codes, weight), to_units(act_codes, act)
    if w.ndim != 2 or x.ndim != 2 or w.shape[1] != x.shape[1]:
        raise ValueError(f"weights (out, in) {w.shape} and inputs (batch, in) {x.shape} do not match")
    scale = np.atleast_2d(np.asarray(weight_scale, dtype=np.float64))
    rows, columns = w.shape
    groups = scale.shape[1]
    if scale.shape[0] not in (1, rows) or columns % groups:
        raise ValueError(f"scales of shape {scale.shape} do not match weights of shape {w.shape}")
    w = w.reshape(rows, groups, columns // groups)
    width = max(int(exact_bits(w[:, g], act).max()) for g in range(groups))
    if width > 62:
        w, x = w.astype(object), x.astype(object)
    x = x.reshape(len(x), groups, columns // groups)
    sums = np.stack([x[:, g] @ w[:, g].T for g in range(groups)], axis=-1)
    real = sums.astype(np.float64) * (unit(weight) * unit(act))
    values = (real * scale).sum(axis=-1) * act_scale
    return Result(sums, values if bias is None else values + np.asarray(bias, dtype=np.float64), width)


def quantize(values: np.ndarray, fmt: Format, scale: float) -> np.ndarray:
    """Bit patterns of the nearest numbers of `values / scale`, same shape: int64."""
    values = np.asarray(values, dtype=np.float64)
    codes = [encode(nearest(float(v) / scale, fmt), fmt) for v in values.ravel()]
    assert bits(fmt) < 63
    return np.array(codes, dtype=np.int64).reshape(values.shape)

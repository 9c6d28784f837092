"""Sigmoid, tanh and rounding in the fixed point of recurrent cells (`hwmodel.gru`, `hwmodel.lstm`).

A gate's input counts 2^-fraction; rounded, it is the index of a table of 2^INDEX entries in steps of 2^-G, of sigmoid
on [-2^S_RANGE, 2^S_RANGE) and of tanh on [-2^N_RANGE, 2^N_RANGE).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np

INDEX, G = 10, 10
"""Bits of a table's index, fraction bits of its values."""
S_RANGE, N_RANGE = 3, 2
"""Tables reach from -2^RANGE to 2^RANGE: of sigmoid, of tanh."""


def sigmoid(t: np.ndarray, fraction: int) -> np.ndarray:
    """Sigmoid of t / 2^fraction in steps of 2^-G: int64."""
    return _looked_up(t, fraction, S_RANGE, sigmoid_table())


def tanh(t: np.ndarray, fraction: int) -> np.ndarray:
    """Tanh of t / 2^fraction in steps of 2^-G: int64."""
    return _looked_up(t, fraction, N_RANGE, tanh_table())


def _looked_up(t: np.ndarray, fraction: int, reach: int, table: np.ndarray) -> np.ndarray:
    half = 1 << (INDEX - 1)
    return table[np.clip(halved(t, fraction + reach + 1 - INDEX), -half, half - 1) + half]


def halved(t: np.ndarray, shift: int) -> np.ndarray:
    """t / 2^shift, rounded half to even."""
    floor, rest, half = t >> shift, t & ((1 << shift) - 1), 1 << (shift - 1)
    return floor + ((rest > half) | ((rest == half) & (floor & 1 == 1)))


def stored(t: np.ndarray, shift: int, bits: int) -> np.ndarray:
    """t / 2^shift, rounded half to even and kept within signed numbers of `bits`."""
    return np.clip(halved(t, shift), -(1 << (bits - 1)), (1 << (bits - 1)) - 1)


def _table(function: Callable[[np.ndarray], np.ndarray], reach: int, low: int, high: int) -> np.ndarray:
    at = np.arange(-(1 << (INDEX - 1)), 1 << (INDEX - 1)) * 2.0 ** (reach + 1 - INDEX)
    found = np.clip(np.rint(function(at) * (1 << G)), low, high).astype(np.int64)
    found.flags.writeable = False
    return found


@cache
def sigmoid_table() -> np.ndarray:
    """Entries from -2^S_RANGE up, in steps of 2^-G: int64 (2^INDEX,)."""
    return _table(lambda x: 1 / (1 + np.exp(-x)), S_RANGE, 0, (1 << G) - 1)


@cache
def tanh_table() -> np.ndarray:
    """Entries from -2^N_RANGE up, in steps of 2^-G: int64 (2^INDEX,)."""
    return _table(np.tanh, N_RANGE, -(1 << G), (1 << G) - 1)


def table_error() -> tuple[float, float]:
    """Largest error of sigmoid and of tanh at any input, rounding of the index and ends of the tables included.

    >>> [round(e, 4) for e in table_error()]
    [0.0024, 0.0042]
    """
    t = np.arange(-20 << 14, (20 << 14) + 1, 3, dtype=np.int64)
    x = t / (1 << 14)
    s, n = np.abs(sigmoid(t, 14) / (1 << G) - 1 / (1 + np.exp(-x))), np.abs(tanh(t, 14) / (1 << G) - np.tanh(x))
    return float(s.max()), float(n.max())

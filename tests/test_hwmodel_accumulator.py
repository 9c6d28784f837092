"""Accumulator widths reproduce the published tables and are exact."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hwmodel.accumulator import exact_bits, signed_bits, type_bound, unit_range
from hwmodel.formats import Float, Format, bits, int_max, is_signed, parse

N = 4608  # 512 * 3 * 3: the longest dot product of ResNet-18
# format: the paper's formula, exact; for N products of a same-format pair
MINIFLOATS = {
    "e1m1": (18, 17), "e1m2": (20, 19), "e2m1": (22, 21), "e1m3": (22, 21), "e2m2": (24, 23), "e3m1": (30, 29),
    "e1m4": (24, 24), "e2m3": (26, 25), "e3m2": (32, 31), "e4m1": (46, 45), "e1m5": (26, 26), "e2m4": (28, 28),
    "e3m3": (34, 33), "e4m2": (48, 47), "e5m1": (78, 77), "e1m6": (28, 28), "e2m5": (30, 30), "e3m4": (36, 36),
    "e4m3": (50, 49), "e5m2": (80, 79), "e6m1": (142, 141),
}  # fmt: skip
INTEGERS = {3: (20, 18, 17), 4: (22, 20, 19), 5: (24, 22, 21), 6: (26, 24, 24), 7: (28, 26, 26), 8: (30, 28, 28)}


def paper_bound(weight: Format, act: Format, n: int) -> int:
    """The width that "Shedding the Bits" (FPL 2024) uses for a pair of one kind; a little loose."""
    log = (n - 1).bit_length()
    if isinstance(weight, Float) and isinstance(act, Float):
        return int(2**weight.exp + weight.man + 2**act.exp + act.man + log - 1)
    return bits(weight) + bits(act) + log + 1


def a2q_type_bound(weight: Format, act: Format, n: int) -> int:
    """The data-type bound for integers of A2Q (arXiv 2301.13376)."""
    return _ceil_bits(math.log2(n) + bits(weight) + bits(act) - 1 - is_signed(act))


def weight_bound(weights: np.ndarray, act: Format) -> np.ndarray:
    """The bound of A2Q from the sum of magnitudes of each row: int array (rows,).

    weights: integers (rows, columns) in units of the weight format's step.
    The activation is taken as an integer as wide as its range of units.
    """
    low, high = unit_range(act)
    width = signed_bits(low, high) if low < 0 else high.bit_length()
    totals = [sum(abs(int(w)) for w in row) for row in weights]
    return np.array([_ceil_bits(math.log2(t) + width - (low < 0)) for t in totals], dtype=np.int64)


def _ceil_bits(a: float) -> int:
    return math.ceil(a + math.log2(1 + 2.0**-a) + 1)


@pytest.mark.parametrize("name", MINIFLOATS)
def test_minifloat_table(name: str) -> None:
    """The paper's width and the exact one are those of the table for 4,608 products."""
    fmt = parse(name)
    assert (paper_bound(fmt, fmt, N), type_bound(fmt, fmt, N)) == MINIFLOATS[name]


@pytest.mark.parametrize("width", INTEGERS)
def test_integer_table(width: int) -> None:
    """The paper's formula, A2Q's type bound and the exact narrow width are those of the table."""
    wide, narrow = parse(f"int{width}"), parse(f"int{width}n")
    assert (paper_bound(wide, wide, N), a2q_type_bound(wide, wide, N), type_bound(narrow, narrow, N)) == INTEGERS[width]


@pytest.mark.parametrize(
    ("weight", "act"),
    [("int3", "uint2"), ("int4n", "uint3"), ("e2m1", "int2"), ("ternary", "uint2"), ("uint2", "uint2")],
)
def test_type_bound_is_tight(weight: str, act: str) -> None:
    """The bound is what an enumeration of every extreme dot product needs, signed x unsigned included."""
    w, a = unit_range(parse(weight)), unit_range(parse(act))
    for n in (1, 2, 3, 5, 8):
        sums = [n * x * y for x, y in itertools.product(w, a)]
        assert type_bound(parse(weight), parse(act), n) == signed_bits(min(sums), max(sums))
        assert (
            type_bound(parse(weight), parse(act), n)
            <= (n * int_max(parse(weight)) * int_max(parse(act))).bit_length() + 1
        )


@given(st.lists(st.integers(-7, 7), min_size=1, max_size=5), st.sampled_from(["int3", "uint3", "e2m0", "binary"]))
def test_exact_bits_hold_every_sum_and_no_bit_more(row: list[int], act: str) -> None:
    """Over all inputs of the format, the sums fit the exact width and not one bit less."""
    low, high = unit_range(parse(act))
    sums = [sum(w * x for w, x in zip(row, xs, strict=True)) for xs in itertools.product((low, high), repeat=len(row))]
    assert exact_bits(np.array([row]), parse(act))[0] == signed_bits(min(sums), max(sums))


def test_bounds_are_ordered() -> None:
    """Exact <= weight bound <= a type bound, and 77 bits and more are counted exactly."""
    rng = np.random.default_rng(3)
    weights = rng.integers(-7, 8, size=(16, 100))
    act = parse("uint4")
    exact, bound = exact_bits(weights, act), weight_bound(weights, act)
    assert (exact <= bound).all() and (bound <= a2q_type_bound(parse("int4"), act, 100)).all()
    huge = np.array([[3 * 2**62] * 4608], dtype=object)
    assert exact_bits(huge, parse("e6m1"))[0] == 141


def test_real_weights_are_refused() -> None:
    """Weights that are not integers, or not a matrix, are refused by name."""
    with pytest.raises(ValueError, match="integers"):
        exact_bits(np.ones((2, 2)), parse("int4"))
    with pytest.raises(ValueError, match="matrix"):
        exact_bits(np.ones(2, int), parse("int4"))


def test_a_width_one_too_small_is_noticed() -> None:
    """Sabotage: one bit less than the exact width does not hold the largest sum."""
    weights = np.array([[7, -7, 3]])
    width = exact_bits(weights, parse("int4n"))[0]
    assert 17 * 7 > 2 ** (width - 2) - 1

"""Several products in one DSP: weights of neighbouring rows side by side in the wide port, times one input.

`sum_i w_i 2^(S i) * a = sum_i (w_i a) 2^(S i)`: with S bits for each product the fields of the result are the
products, less one where the fields below are negative, which the adder tree takes as a carry. S and
the number of weights follow from the formats: two of 8 bits, four of 4 bits in a port of 27 bits. The memory
holds the fields of the packed number, so that packing is wiring.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from hwmodel import fabric
from hwmodel.accumulator import signed_bits, unit_range
from hwmodel.cost import Cost
from hwmodel.formats import Format, Int
from hwmodel.mac import tree_cost

WIDE_PORT = {"xc7": 25, "xcup": 27, "versal": 27, "ecp5": 18}
"""Two's complement bits of the wide multiplier port: DSP48E1, DSP48E2, DSP58, MULT18X18D."""
NARROW_PORT = 18
SMALLEST = 11
"""Bits of both operands from which Yosys leaves a product that shares its DSP with none to the DSP."""


def divisors(n: int) -> list[int]:
    """Ascending divisors of n.

    >>> divisors(12)
    [1, 2, 3, 4, 6, 12]
    """
    small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return small + [n // d for d in reversed(small) if d * d != n]


@dataclass(frozen=True, slots=True)
class Packing:
    """lanes: weights in one DSP. spacing: bits from one product to the next. top: the largest product.

    field: bits of a stored weight field. product: two's complement bits of a field of the result.
    """

    lanes: int
    spacing: int
    top: int
    field: int
    product: int


@cache
def packing(weight: Format, act: Format, port: int, rows: int) -> Packing | None:
    """The most weights per DSP for `rows` rows at once (a divisor of them); None where DSPs do not serve.

    >>> from hwmodel.formats import parse
    >>> [packing(parse(w), parse(a), 27, 4).lanes for w, a in (("int8", "int8"), ("int8", "uint8"), ("int4", "int4"))]
    [2, 2, 4]
    >>> packing(parse("int4"), parse("int4"), 25, 12).lanes, packing(parse("int4n"), parse("int4"), 25, 12).lanes
    (3, 4)
    """
    if not isinstance(weight, Int) or not isinstance(act, Int):
        return None
    (w_low, w_high), (a_low, a_high) = unit_range(weight), unit_range(act)
    if signed_bits(a_low, a_high) > NARROW_PORT or signed_bits(w_low, w_high) > port:
        return None
    corners = [w * a for w in (w_low, w_high) for a in (a_low, a_high)]
    low, top = min(corners), max(corners)
    spacing = (top - low + 1).bit_length()
    product = signed_bits(low - 1, top)
    lanes = 1
    for n in divisors(rows):
        ones = sum(1 << (spacing * i) for i in range(n))
        if signed_bits(w_low * ones, w_high * ones) <= port and spacing * n <= port + NARROW_PORT:
            lanes = n
    field = signed_bits(w_low - 1, w_high)
    if lanes == 1 and field + signed_bits(a_low, a_high) < SMALLEST:
        return None
    return Packing(lanes, spacing, top, field, product)


def fields(values: Sequence[int], pack: Packing) -> list[int]:
    """The weights' fields as stored: two's complement in `pack.field` bits."""
    whole = sum(int(w) << (pack.spacing * i) for i, w in enumerate(values))
    mask = (1 << pack.field) - 1
    return [(whole >> (pack.spacing * i)) & mask for i in range(len(values))]


def shared_cost(weight: Format, act: Format, acc_bits: int, lanes: int, port: int = WIDE_PORT["xc7"]) -> Cost | None:
    """One element of `lanes` products among as many as share a DSP; None where DSPs do not serve its formats."""
    pack = packing(weight, act, port, 12)
    return None if pack is None else packed_cost(pack, acc_bits, lanes, pack.lanes) * (1 / pack.lanes)


def packed_cost(pack: Packing, acc_bits: int, lanes: int, rows: int) -> Cost:
    """`rows` elements of `lanes` columns: `rtl/mac_packed.v`.

    The lowest row of those that share DSPs owes nothing. A row that has its DSPs for itself leaves the first additions
    to them, where the sign of a product is that of its field: one of every two products, or the accumulator's.
    """
    dsps, by_sign = rows // pack.lanes * lanes, pack.top < 1 << (pack.spacing - 1)
    shared = fabric.family() == "ecp5"  # synth_ecp5 uses neither the registers nor the adder of a MULT18X18D
    inside = pack.lanes == 1 and by_sign and not shared
    first = _row(pack, acc_bits, lanes, owed=False, inside=inside)
    others = _row(pack, acc_bits, lanes, owed=True, inside=False)
    decode = 0 if by_sign else pack.spacing / 3
    one = first + others * (pack.lanes - 1) + Cost(luts=pack.lanes * lanes * decode)
    held = pack.lanes * pack.spacing if shared else 0
    return one * (rows // pack.lanes) + Cost(dsps=dsps, ffs=dsps * held)


def _row(pack: Packing, acc_bits: int, lanes: int, *, owed: bool, inside: bool) -> Cost:
    """Tree and accumulator of a row whose products are DSPs'."""
    registers = int(fabric.family() == "ecp5")
    tree = tree_cost(lanes, min(pack.product, acc_bits), acc_bits, owed, registers=registers, inside=inside)
    if inside and lanes == 1:
        return tree + Cost(ffs=acc_bits)
    return tree + Cost(luts=fabric.adder(acc_bits, acc_bits, owed), ffs=2 * acc_bits)


def field_columns(pack: Packing, weight: Format, words: int) -> float:
    """Bits of a stored field that are no copy of another, of `words` words of random weights, the mean over the rows.

    A field has a bit more than a weight where one less than the smallest weight needs it. In the lowest row it copies
    the sign; in any other it differs only where the smallest weight owes.
    """
    low, high = unit_range(weight)
    if pack.field == signed_bits(low, high):
        return pack.field
    differs = 1 - (1 - 0.5 / (high - low + 1)) ** words
    return pack.field - 1 + differs * (1 - 1 / pack.lanes)

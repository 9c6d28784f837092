"""Where bits are kept: constants in logic, LUTRAM or 18 Kb block RAMs, by the shapes the device has."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from hwmodel.cost import ZERO, Cost
from hwmodel.fabric import DEEPEST, ram_luts, rom_depth

Kind = Literal["none", "logic", "registers", "lutram", "bram"]

LUTRAM_DEPTH = DEEPEST
"""Deepest memory that goes to LUTs on its own accord: two LUT6 (64 x 1) per bit and a free MUXF7."""


@dataclass(frozen=True, slots=True)
class Memory:
    """A chosen memory: what it is made of, its words and its cost."""

    kind: Kind
    width: int
    depth: int
    cost: Cost


SHAPES = ((1, 16384), (2, 8192), (4, 4096), (9, 2048), (18, 1024), (36, 512))
"""Word widths and depths of an 18 Kb block RAM."""


def bram18(width: int, depth: int) -> int:
    """18 Kb block RAMs for `depth` words of `width` bits: the fewest of one shape.

    >>> bram18(36, 512), bram18(256, 64), bram18(1, 16384), bram18(9, 2049), bram18(26, 2048)
    (1, 8, 1, 2, 3)
    """
    if width <= 0 or depth <= 0:
        return 0
    return min(math.ceil(width / w) * math.ceil(depth / d) for w, d in SHAPES)


def rom(width: int, depth: int, kind: Literal["auto", "lutram", "bram"] = "auto") -> Memory:
    """Constants read one word per cycle, such as weights: as good as random bits, see `rom_columns`.

    Depth 1 is wiring; up to `LUTRAM_DEPTH` LUTs; else block RAM.
    """
    if width <= 0 or depth <= 0:
        return Memory("none", 0, 0, ZERO)
    if depth == 1:
        return Memory("logic", width, depth, ZERO)
    if kind == "lutram" or (kind == "auto" and depth <= LUTRAM_DEPTH):
        return Memory("lutram", width, depth, rom_columns(width, depth))
    return Memory("bram", width, depth, Cost(bram18=bram18(width, depth)))


def rom_columns(columns: float, depth: int) -> Cost:
    """Constants in LUTs whose words have `columns` random bits: equal columns are kept once, constant ones not at all.

    >>> rom_columns(8, 64).luts, round(rom_columns(96, 2).ffs)
    (8.0, 2)
    """
    functions = 2.0 ** min(depth, 64)  # beyond, no two columns are equal anyway
    seen = -math.expm1(columns * math.log1p(-1 / functions))  # chance that a given function of the address occurs
    ffs = (functions - 2) * seen
    wired = (depth - 1).bit_length() * seen  # functions that are a bit of the address
    return Cost(luts=(ffs - wired) * rom_depth(depth), ffs=ffs)


def ram(width: int, depth: int, kind: Literal["auto", "lutram", "bram"] = "auto") -> Memory:
    """A buffer written and read in the same cycle: registers, simple dual-port LUTRAM, or block RAM.

    LUTRAM of 32 words has 6 bits in 4 LUTs (RAM32M), of 64 words 3 bits in 4 LUTs (RAM64M).
    """
    if width <= 0 or depth <= 0:
        return Memory("none", 0, 0, ZERO)
    if depth == 1:
        return Memory("registers", width, depth, Cost(ffs=width))
    if kind == "lutram" or (kind == "auto" and depth <= LUTRAM_DEPTH):
        return Memory("lutram", width, depth, Cost(luts=ram_luts(width, depth), ffs=width))
    return Memory("bram", width, depth, Cost(bram18=bram18(width, depth)))

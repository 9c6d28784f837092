"""Maxima and averages over windows of a map, channel by channel: `rtl/pool.v` behind `rtl/window.v`.

PE channels are in a word, as in a depthwise convolution, and one word is read in a cycle. A "max" gives codes that it
read: where the codes of two numbers stand as the numbers do, it is exact, and takes no converter. An "average" adds up
its codes and brings the sums to the next layer's codes as a mean over a whole map does (`hwmodel.joint`).
"""

from __future__ import annotations

from hwmodel import fabric
from hwmodel.conv import depth, results_cost, stream, window_cost
from hwmodel.convert import Converter, converters
from hwmodel.cost import Cost, HwError
from hwmodel.formats import Float, Format, Int, bits, encode, is_signed, levels
from hwmodel.joint import lanes_of
from hwmodel.layer import address_bits
from hwmodel.spec import LayerSpec

BEHIND = 3
"""Cycles from a position's start to its last word, beside its period, to the sum, and to the result on offer."""


def kind(fmt: Format) -> int:
    """How codes are compared: 0 two's complement, 1 unsigned, 2 sign and magnitude.

    >>> from hwmodel.formats import parse
    >>> kind(parse("int4")), kind(parse("uint4")), kind(parse("e2m1"))
    (0, 1, 2)
    """
    if isinstance(fmt, Float):
        return 2
    return int(bits(fmt) == 1 or not is_signed(fmt))


def least(fmt: Format) -> int:
    """The code of the smallest number, which is outside the map of a "max"."""
    return encode(levels(fmt)[0], fmt)


def options(spec: LayerSpec, pe: int, acc_bits: int) -> list[tuple[Converter, Cost]]:
    """The ways to convert what leaves, each with the cost of the whole layer at `pe` channels at once."""
    fmt = spec.act
    assert fmt is not None and spec.out is not None
    found = stream(spec, pe, 1, pe)
    around = window_cost(spec, found) + _counters(spec.in_features, found.words)
    ways = [Converter("codes", Cost(), 0)]
    if spec.op == "average":
        if not isinstance(fmt, Int):
            raise HwError(f"layer {spec.name!r}: op average in hardware reads integers, not {fmt}")
        ways = list(converters(lanes_of(spec, pe), acc_bits, pe))
        around += Cost(luts=pe * acc_bits, ffs=pe * acc_bits)
    else:
        around += Cost(luts=pe * _compare(bits(fmt), kind(fmt)), ffs=pe * bits(fmt))
    made = []
    for one in ways:
        waits = results_cost(pe * bits(spec.out), depth(found, BEHIND - 1 + one.stages))
        made.append((one, around + one.cost + waits + Cost(ffs=one.stages)))
    return made


def _compare(width: int, how: int) -> float:
    """LUTs that find the greater of two codes."""
    return width + (how == 2) * width


def _counters(taps: int, words: int) -> Cost:
    """`rtl/pool.v` but its channels; what ECP5 takes beyond that was measured, for the window and it together."""
    luts = sum(fabric.counter(n) + 1 for n in (taps, words) if n > 1) + 40 * (fabric.family() == "ecp5")
    ffs = 3 + sum(address_bits(n) for n in (taps, words) if n > 1)
    return Cost(luts=luts + 4, ffs=ffs)

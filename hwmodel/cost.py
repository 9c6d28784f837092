"""What a piece of hardware takes from a device: one small record that adds and scales."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Cost:
    """Logical LUTs (sum of LUT1..LUT6 cells, before packing two into one site), flip-flops, DSPs, 18 Kb block RAMs.

    >>> 2 * Cost(luts=10, ffs=4) + Cost(dsps=1)
    Cost(luts=20, ffs=8, dsps=1, bram18=0)
    """

    luts: float = 0
    ffs: float = 0
    dsps: float = 0
    bram18: float = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.luts + other.luts, self.ffs + other.ffs, self.dsps + other.dsps, self.bram18 + other.bram18)

    def __mul__(self, times: float) -> Cost:
        return Cost(self.luts * times, self.ffs * times, self.dsps * times, self.bram18 * times)

    __rmul__ = __mul__


ZERO = Cost()


class HwError(ValueError):
    """A network, target or device that cannot be costed; the message says which and what would be."""

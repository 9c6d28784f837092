"""Sums as compressor trees, by published counter sizes: for people with Vivado. Published formulas, not measured here.

Partial products of all lanes lie in one heap of bits by weight. Counters of the 7-series and UltraScale fabric (sizes
as in EECS-NTNU/bismo `counters.vhd`, kept in `coeffs.toml`) make it lower stage by stage until two rows are left, and
a ternary adder of one LUT a bit adds these to the accumulator. A gate before the heap counts half a LUT (two AND in
one LUT6), the convention of Hossfeld et al. (10.1145/3645097), whose own generator also hides gates in counters and
comes out up to 16 % lower.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

GATE = 0.5
"""LUTs of a gate of two inputs."""
ROWS = 2
"""Rows that the heap is brought down to."""


@dataclass(frozen=True, slots=True)
class Counter:
    """Bits taken from neighbouring columns and bits given back, the lowest column first, and LUTs.

    >>> Counter((6,), (1, 1, 1), 3).efficiency
    1.0
    """

    takes: tuple[int, ...]
    gives: tuple[int, ...]
    luts: float

    @property
    def efficiency(self) -> float:
        """Bits removed per LUT."""
        return (sum(self.takes) - sum(self.gives)) / self.luts


def heap_luts(heights: Sequence[int], counters: Sequence[Counter]) -> float:
    """LUTs that bring columns of so many bits, the lowest first, down to `ROWS` rows: greedy, efficient counters first.

    Ends if the counters can count a single column of three.

    >>> full_adder = [Counter((3,), (1, 1), 1)]
    >>> [heap_luts(heights, full_adder) for heights in ((2, 2), (3,), (6,))]
    [0.0, 1.0, 2.0]
    """
    order = sorted(counters, key=lambda c: (-c.efficiency, -sum(c.takes)))
    heap, luts = list(heights), 0.0
    while max(heap, default=0) > ROWS:
        heap, used = _stage(heap, order)
        luts += used
    return luts


def _stage(heap: list[int], counters: Sequence[Counter]) -> tuple[list[int], float]:
    """One rank of counters: heights behind it, LUTs."""
    spare = max(len(c.takes) + len(c.gives) for c in counters)
    left, after, luts = [*heap, *[0] * spare], [0] * (len(heap) + spare), 0.0
    for counter in counters:
        for at in range(len(heap)):
            while left[at] + after[at] > ROWS and all(left[at + i] >= n for i, n in enumerate(counter.takes)):
                for i, n in enumerate(counter.takes):
                    left[at + i] -= n
                for i, n in enumerate(counter.gives):
                    after[at + i] += n
                luts += counter.luts
    found = [a + b for a, b in zip(left, after, strict=True)]
    while found[-1] == 0:
        found.pop()
    return found, luts


def partial_products(width: int, height: int, lanes: int) -> list[int]:
    """Bits by column of `lanes` products of two's complement numbers (Baugh-Wooley: as many as of unsigned ones).

    >>> partial_products(3, 2, 4)
    [4, 8, 8, 4]
    """
    heights = [0] * (width + height - 1)
    for i in range(width):
        for j in range(height):
            heights[i + j] += lanes
    return heights

"""What one more design is expected to add to a front of return against cost, from what others of its kind returned.

The front counts by the area that it dominates: over the logarithm of cost, up to the most expensive design, and over
returns between those of a random and of the float policy; what lies outside is of no use. What a design that was not
played would return is not known; those that were played and lost about as much on the calibration states are a sample
of it. So its expected gain is the mean, over these, of the area that it would add with their returns.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

NEAR = 6
"""So many designs that were played stand for one that was not."""


class Front:
    """A front of returns against costs, of what was played so far.

    points: (cost, return). end: the largest cost that counts. floor, top: the returns between which it counts.
    """

    def __init__(self, points: Sequence[tuple[float, float]], end: float, floor: float, top: float) -> None:
        self.floor, self.top, self.unit = floor, top, max(end, 1e-12) / 1000
        self.end = self._scale(end)
        inside = sorted((self._scale(cost), min(value, top)) for cost, value in points if value > floor)
        self.costs = np.array([cost for cost, _ in inside if cost < self.end])
        self.best = np.maximum.accumulate([value for cost, value in inside if cost < self.end])

    def _scale(self, cost: float) -> float:
        """Logarithmic, and finite for a cost of nothing."""
        return math.log2(cost + self.unit)

    def area(self) -> float:
        """What is dominated, in octaves of cost times return."""
        edges = np.append(self.costs, self.end)
        return float(((edges[1:] - edges[:-1]) * (self.best - self.floor)).sum())

    def gain(self, cost: float, value: float) -> float:
        """The area that a design adds.

        >>> front = Front([(10, 3.0), (20, 9.0)], end=40, floor=1.0, top=5.0)
        >>> round(front.area(), 1), round(front.gain(10, 5.0), 1), front.gain(30, 4.0)
        (6.0, 2.0, 0.0)
        """
        edges = np.concatenate(([-math.inf], self.costs, [self.end]))
        levels = np.concatenate(([self.floor], self.best))
        width = np.clip(edges[1:] - np.maximum(edges[:-1], self._scale(cost)), 0.0, None)
        return float((width * np.clip(min(value, self.top) - levels, 0.0, None)).sum())


def likely(loss: float, played: Sequence[tuple[float, float]]) -> list[float]:
    """The returns of the `NEAR` designs of `played`, (loss, return), whose losses' logarithms are nearest.

    >>> likely(0.2, [(0.1, 5.0), (9.0, 0.0), (0.3, 4.0)])[:2]
    [4.0, 5.0]
    """
    where = math.log(max(loss, 1e-12))
    nearest = sorted((abs(math.log(max(other, 1e-12)) - where), value) for other, value in played)
    return [value for _, value in nearest[:NEAR]]

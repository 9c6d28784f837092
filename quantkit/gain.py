"""What one more design is expected to add to a front of return against cost.

The front counts by the area that it dominates: over the logarithm of cost, up to the most expensive design, and over
returns between those of a random and of the float policy; what lies outside is of no use. What a design that was not
played would return is told by `quantkit.regression`, as a normal distribution. Its expected gain is the mean, over
equally likely returns, of the area that it would add with them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import NormalDist

import numpy as np

_FIFTHS = tuple(NormalDist().inv_cdf(p) for p in (0.1, 0.3, 0.5, 0.7, 0.9))


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


def likely(mean: float, deviation: float) -> list[float]:
    """Equally likely values of a normal distribution: the middles of its fifths.

    >>> [round(value, 2) for value in likely(3.0, 1.0)]
    [1.72, 2.48, 3.0, 3.52, 4.28]
    """
    return [mean + z * deviation for z in _FIFTHS]


def greedy(
    costs: Mapping[str, Sequence[float | None]],
    expected: Mapping[str, Sequence[float]],
    played: Sequence[Sequence[tuple[float, float]]],
    floor: float,
    top: float,
    most: int,
    loss: Callable[[str], float],
) -> list[str]:
    """At most so many designs, in order of what they are expected to add to the fronts of all targets.

    costs: of each design on each target, None where it is of no use there. expected: its equally likely returns.
    played: (cost, return) on each target. Each that is taken counts as played then, at its mean expectation, for those
    after it; all of them, where no choice is needed, stand in order of what they add alone. Of equal gains the smaller
    loss comes first.
    """
    points = [list(mine) for mine in played]
    ends = [
        max([c for c, _ in mine] + [c for other in costs.values() if (c := other[place]) is not None], default=1.0)
        for place, mine in enumerate(points)
    ]

    def fronts() -> list[Front]:
        return [Front(mine, end, floor, top) for mine, end in zip(points, ends, strict=True)]

    def promise(name: str, now: list[Front]) -> float:
        values, pairs = expected[name], zip(now, costs[name], strict=True)
        return sum(one.gain(cost, v) for one, cost in pairs if cost is not None for v in values) / len(values)

    now, chosen = fronts(), list[str]()
    bounds = {name: promise(name, now) for name in sorted(costs)}  # gains shrink as others are taken
    if most >= len(bounds):
        return sorted(bounds, key=lambda name: (-bounds[name], loss(name), name))
    while bounds and len(chosen) < most:
        name = max(bounds, key=lambda name: (bounds[name], -loss(name), name))
        fresh = promise(name, now)
        if fresh < bounds[name]:
            bounds[name] = fresh
            continue
        del bounds[name]
        chosen.append(name)
        for mine, cost in zip(points, costs[name], strict=True):
            if cost is not None:
                mine.append((cost, sum(expected[name]) / len(expected[name])))
        now = fronts()
    return chosen

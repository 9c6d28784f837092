"""What one more design is expected to add to a front of return against cost.

The front counts by the area that it dominates: over the logarithm of cost, up to the most expensive design, and over
returns between those of a random and of the float policy; what lies outside is of no use. What a design that was not
played would return is told by `quantkit.regression`, as a normal distribution. Its expected gain is the mean of the
area that it would add (Emmerich et al. 2006, expected improvement of hypervolume, with a cost that is known): never
quite zero, so that among designs of which none is expected to do better the one most likely to comes first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from quantkit.statistics import Floats

_DIGITS = 9


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

    def gains(self, costs: Floats, means: Floats, deviations: Floats) -> Floats:
        """The area that each design is expected to add, (n,); nothing for a cost of nan.

        Its return is normal with that mean and standard deviation, which may be 0.

        >>> front = Front([(10, 3.0), (20, 9.0)], end=40, floor=1.0, top=5.0)
        >>> round(front.area(), 1), front.gains(np.array([10, 30]), np.array([5.0, 4.0]), np.zeros(2)).round(1).tolist()
        (6.0, [2.0, 0.0])
        """
        edges = np.concatenate(([-math.inf], self.costs, [self.end]))
        levels = np.concatenate(([self.floor], self.best))
        begins = np.log2(np.where(np.isnan(costs), math.inf, costs) + self.unit)
        widths = np.clip(edges[1:] - np.maximum(edges[:-1], begins[:, None]), 0.0, None)
        over = _excess(levels, means, deviations) - _excess(np.array([self.top]), means, deviations)
        found: Floats = (widths * over).sum(axis=1)
        return found


def _excess(levels: Floats, means: Floats, deviations: Floats) -> Floats:
    """By how much normal numbers exceed levels on average, (n, levels): max(number - level, 0)."""
    from scipy.special import ndtr

    over = means[:, None] - levels
    spread = np.maximum(deviations, 1e-300)[:, None]
    z = np.clip(over / spread, -40.0, 40.0)
    found: Floats = np.where(z < 40.0, over * ndtr(z) + spread * np.exp(-(z**2) / 2) / math.sqrt(2 * math.pi), over)
    return np.maximum(found, 0.0)


def greedy(
    costs: Mapping[str, Sequence[float | None]],
    expected: Mapping[str, tuple[float, float]],
    played: Sequence[Sequence[tuple[float, float]]],
    floor: float,
    top: float,
    most: int,
    loss: Callable[[str], float],
) -> list[str]:
    """At most so many designs, in order of what they are expected to add to the fronts of all targets.

    costs: of each design on each target, None where it is of no use there. expected: mean and standard deviation of its
    return. played: (cost, return) on each target. Each that is taken counts as played then, at its mean, for those
    after it; all of them, where no choice is needed, stand in order of what they add alone. Of equal gains the smaller
    loss comes first.
    """
    names = sorted(costs)
    rows = [[math.nan if cost is None else cost for cost in costs[name]] for name in names]
    table = np.array(rows, np.float64).reshape(len(names), len(played))
    means, deviations = np.array([expected[name] for name in names], np.float64).reshape(-1, 2).T
    points = [list(mine) for mine in played]
    ends = [
        max([cost for cost, _ in mine] + [cost for cost in column if not math.isnan(cost)], default=1.0)
        for mine, column in zip(points, table.T.tolist(), strict=True)
    ]

    def order() -> list[int]:
        found = np.zeros(len(names))
        for mine, column, end in zip(points, table.T, ends, strict=True):
            found += Front(mine, end, floor, top).gains(column, means, deviations)
        near = (found / (abs(top - floor) or 1.0)).round(_DIGITS)  # what machines add otherwise must not choose
        return sorted(range(len(names)), key=lambda i: (-near[i], loss(names[i]), names[i]))

    if most >= len(names):
        return [names[i] for i in order()]
    chosen: list[int] = []
    while len(chosen) < most:
        chosen.append(next(i for i in order() if i not in chosen))
        for mine, cost in zip(points, table[chosen[-1]].tolist(), strict=True):
            if not math.isnan(cost):
                mine.append((cost, float(means[chosen[-1]])))
    return [names[i] for i in chosen]

"""Laws of fronts and gains: areas are those of a fine grid, and a gain is what the area grows by."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from quantkit.gain import Front, greedy

END, FLOOR, TOP = 900.0, -120.0, 260.0
POINTS = st.lists(st.tuples(st.floats(3.0, 1200.0), st.floats(-300.0, 400.0)), max_size=12)


def by_grid(points: list[tuple[float, float]], cells: int = 4000) -> float:
    """The area left of END, in octaves of cost + END / 1000, between FLOOR and TOP, by sampling costs evenly."""
    unit = END / 1000
    low = np.log2(min([cost for cost, _ in points], default=END) + unit)
    high = np.log2(END + unit)
    if not points or low >= high:
        return 0.0
    at = low + (np.arange(cells) + 0.5) * (high - low) / cells
    costs, values = np.array(points).T
    reached = np.where(np.log2(costs + unit)[:, None] <= at, np.clip(values, FLOOR, TOP)[:, None], FLOOR).max(axis=0)
    return float((reached - FLOOR).mean() * (high - low))


@given(POINTS)
def test_an_area_is_that_of_a_grid(points: list[tuple[float, float]]) -> None:
    """Within a grid's resolution, whatever the order, what is beyond the end, below the floor or above the top."""
    assert Front(points, END, FLOOR, TOP).area() == pytest.approx(by_grid(points), rel=0.01, abs=3.0)


ONE = st.tuples(st.floats(3.0, 1200.0), st.floats(-300.0, 400.0))


def gain(front: Front, cost: float, mean: float, deviation: float = 0.0) -> float:
    """What one design adds."""
    return float(front.gains(np.array([cost]), np.array([mean]), np.array([deviation]))[0])


@given(POINTS, ONE)
def test_a_gain_is_a_difference_of_areas(points: list[tuple[float, float]], one: tuple[float, float]) -> None:
    """What a known return is said to add is what the area grows by; once it is there, it adds nothing more."""
    before, after = Front(points, END, FLOOR, TOP), Front([*points, one], END, FLOOR, TOP)
    assert gain(before, *one) == pytest.approx(after.area() - before.area(), abs=1e-6)
    assert gain(after, *one) == pytest.approx(0.0, abs=1e-9)


@given(POINTS, ONE, st.floats(0.01, 300.0))
def test_an_expected_gain_is_a_mean(points: list[tuple[float, float]], one: tuple[float, float], spread: float) -> None:
    """Of an uncertain return it is the mean of the areas over the quantiles of its normal distribution (scipy)."""
    front, (cost, mean) = Front(points, END, FLOOR, TOP), one
    returns = stats.norm(mean, spread).ppf((np.arange(4000) + 0.5) / 4000)
    by_quantiles = front.gains(np.full(4000, cost), returns, np.zeros(4000)).mean()
    assert gain(front, cost, mean, spread) == pytest.approx(by_quantiles, rel=0.01, abs=0.01 * spread)


def test_what_cannot_be_excluded_is_worth_something() -> None:
    """A design three standard deviations below the front adds more than one four below, and both more than nothing."""
    front = Front([(10.0, 200.0)], END, FLOOR, TOP)
    assert gain(front, 20.0, 170.0, 10.0) > gain(front, 20.0, 160.0, 10.0) > 0.0


COST = st.one_of(st.none(), st.floats(3.0, 800.0))
DESIGN = st.tuples(st.tuples(COST, COST), st.tuples(st.floats(-200.0, 300.0), st.floats(0.0, 100.0)))


@given(st.lists(DESIGN, min_size=1, max_size=6), POINTS, st.integers(1, 6))
def test_choices_are_greedy(designs: list, points: list[tuple[float, float]], most: int) -> None:
    """Each choice adds the most to the two fronts with those before it there, every gain computed anew each time."""
    names = [f"d{i}" for i in range(len(designs))]
    costs = {name: pair for name, (pair, _) in zip(names, designs, strict=True)}
    expected = {name: values for name, (_, values) in zip(names, designs, strict=True)}
    chosen = greedy(costs, expected, [points, []], FLOOR, TOP, most, lambda name: 0.0)
    assert len(chosen) == len(set(chosen)) == min(most, len(names))
    if most >= len(names):
        return
    fronts: list[list[tuple[float, float]]] = [list(points), []]
    ends = [max([c for c, _ in f] + [p[i] for p in costs.values() if p[i] is not None], default=1.0)
            for i, f in enumerate(fronts)]  # fmt: skip

    def both(name: str) -> float:
        return sum(
            gain(Front(mine, end, FLOOR, TOP), cost, *expected[name])
            for mine, end, cost in zip(fronts, ends, costs[name], strict=True)
            if cost is not None
        )

    for i, name in enumerate(chosen):
        assert both(name) >= max(both(other) for other in names if other not in chosen[:i]) - 1e-5
        for mine, cost in zip(fronts, costs[name], strict=True):
            if cost is not None:
                mine.append((cost, expected[name][0]))


def test_sabotage_a_linear_cost_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """If areas were over costs themselves, the law of the grid would fail."""
    monkeypatch.setattr(Front, "_scale", lambda self, cost: cost)
    with pytest.raises(AssertionError):
        test_an_area_is_that_of_a_grid.hypothesis.inner_test([(30.0, 100.0), (200.0, 200.0)])  # type: ignore[attr-defined]

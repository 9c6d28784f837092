"""Laws of fronts and gains: areas are those of a fine grid, and a gain is what the area grows by."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantkit.gain import NEAR, Front, likely

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


@given(POINTS, st.tuples(st.floats(3.0, 1200.0), st.floats(-300.0, 400.0)))
def test_a_gain_is_a_difference_of_areas(points: list[tuple[float, float]], one: tuple[float, float]) -> None:
    """What a design is said to add is what the area grows by; once it is there, it adds nothing more."""
    before, after = Front(points, END, FLOOR, TOP), Front([*points, one], END, FLOOR, TOP)
    assert before.gain(*one) == pytest.approx(after.area() - before.area(), abs=1e-6)
    assert after.gain(*one) == pytest.approx(0.0, abs=1e-9)


def test_what_is_likely_are_the_nearest_losses() -> None:
    """By the ratio of losses, not their difference; fewer where there are fewer; a loss of zero is a loss."""
    played = [(10.0**-i, float(i)) for i in range(12)]
    assert sorted(likely(10.0**-5, played)) == [2.0, 3.0, 4.0, 5.0, 6.0, 7.0] and len(likely(1.0, played)) == NEAR
    assert likely(0.0, played)[0] == 11.0 and likely(0.5, played[:2]) == [0.0, 1.0] and likely(1.0, []) == []


def test_sabotage_a_linear_cost_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """If areas were over costs themselves, the law of the grid would fail."""
    monkeypatch.setattr(Front, "_scale", lambda self, cost: cost)
    with pytest.raises(AssertionError):
        test_an_area_is_that_of_a_grid.hypothesis.inner_test([(30.0, 100.0), (200.0, 200.0)])  # type: ignore[attr-defined]

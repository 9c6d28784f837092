"""Laws of the front and of the design to take, against definitions written out."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from quantkit.errors import InputError
from quantkit.pareto import COLUMNS, front, knee, nondominated, value, why_knee

CLOUDS = st.integers(1, 4).flatmap(
    lambda dims: st.tuples(
        st.lists(st.tuples(*[st.integers(-3, 3).map(float)] * dims), max_size=14),
        st.tuples(*[st.booleans()] * dims),
    )
)
MAYBE = st.none() | st.floats(-5, 5).map(lambda v: round(v, 1)) | st.just(float("nan"))
VERDICTS = st.sampled_from(["non-inferior", "inferior", "undecided"])
ROWS = st.lists(
    st.builds(
        lambda mean, luts, verdict: {"score": {"mean": mean}, "cost": {"luts": luts}, "verdict": {"verdict": verdict}},
        MAYBE,
        MAYBE.map(lambda v: v and abs(v)),
        VERDICTS,
    ),
    max_size=12,
)


def beats(a: Sequence[float], b: Sequence[float], maximize: Sequence[bool]) -> bool:
    """Whether `a` is nowhere worse than `b` and somewhere better."""
    pairs = [(-x, -y) if up else (x, y) for x, y, up in zip(a, b, maximize, strict=True)]
    return all(x <= y for x, y in pairs) and any(x < y for x, y in pairs)


def brute(points: Sequence[tuple[float, ...]], maximize: Sequence[bool]) -> list[int]:
    """The definition, in O(n^2)."""
    return [
        i
        for i, p in enumerate(points)
        if p not in points[:i] and not any(beats(other, p, maximize) for other in points)
    ]


Nondominated = Callable[[Sequence[tuple[float, ...]], Sequence[bool]], list[int]]


def front_law(function: Nondominated) -> None:
    """`function` agrees with the definition on every cloud."""

    @settings(max_examples=250, deadline=None)
    @given(CLOUDS)
    def check(cloud: tuple[list[tuple[float, ...]], tuple[bool, ...]]) -> None:
        points, maximize = cloud
        assert function(points, maximize) == brute(points, maximize)

    check()


def test_the_front_is_the_definition() -> None:
    """In one to four dimensions, with ties and repeated points, the front is what nothing dominates."""
    front_law(nondominated)


@settings(max_examples=100, deadline=None)
@given(CLOUDS, st.randoms())
def test_the_front_does_not_depend_on_order(cloud: Any, random: Any) -> None:
    """Shuffled points have the same front as a set of points."""
    points, maximize = cloud
    shuffled = random.sample(points, len(points))
    assert {points[i] for i in nondominated(points, maximize)} == {
        shuffled[i] for i in nondominated(shuffled, maximize)
    }


@settings(max_examples=150, deadline=None)
@given(ROWS)
def test_along_the_front_both_columns_rise(rows: list[dict[str, Any]]) -> None:
    """Rows without a finite number are left out; from point to point more cost buys more return."""
    chosen = front(rows)
    pairs = [(value(rows[i], "luts"), value(rows[i], "mean")) for i in chosen]
    assert all(x is not None and y is not None for x, y in pairs)
    assert all(a[0] < b[0] and a[1] < b[1] for a, b in itertools.pairwise(pairs))  # type: ignore[operator]
    usable = [row for row in rows if value(row, "luts") is not None and value(row, "mean") is not None]
    assert bool(chosen) == bool(usable)


@settings(max_examples=200, deadline=None)
@given(ROWS, st.floats(-5, 5), st.floats(0, 4))
@example(
    [{"score": {"mean": m}, "cost": {"luts": m + 1}, "verdict": {"verdict": "inferior"}} for m in (0.0, 1.0)], 0.0, 0.0
)
def test_the_knee_is_the_cheapest_that_is_good_enough(
    rows: list[dict[str, Any]], reference: float, margin: float
) -> None:
    """The cheapest proved non-inferior, else the cheapest within the margin, else the best of the front."""
    chosen = front(rows)
    taken = knee(rows, chosen, reference, margin)
    if not chosen:
        assert taken is None
        return
    assert taken in chosen
    luts = {i: rows[i]["cost"]["luts"] for i in chosen}
    means = {i: rows[i]["score"]["mean"] for i in chosen}
    proved = [i for i in chosen if rows[i]["verdict"]["verdict"] == "non-inferior"]
    near = [i for i in chosen if means[i] >= reference - margin]
    for group in (proved, near):
        if group:
            assert luts[taken] == min(luts[i] for i in group)
            return
    assert means[taken] == max(means.values())


def test_a_wider_margin_never_takes_a_dearer_design() -> None:
    """As the margin grows the design taken gets cheaper or stays."""
    rows = [{"score": {"mean": float(m)}, "cost": {"luts": float(m * m)}} for m in range(1, 8)]
    taken = [knee(rows, front(rows), 7.0, margin) for margin in (0.0, 0.5, 1.0, 2.5, 6.0, 99.0)]
    costs = [rows[i]["cost"]["luts"] for i in taken if i is not None]
    assert len(costs) == 6 and costs == sorted(costs, reverse=True)


def test_an_unknown_column_lists_the_known_ones() -> None:
    """A typing error in a column is answered with all columns."""
    with pytest.raises(InputError) as caught:
        value({}, "lutz")
    assert all(name in str(caught.value) for name in COLUMNS)


@pytest.mark.parametrize("row", [{}, {"cost": None}, {"cost": {"error": "no"}}, {"cost": {"luts": "12"}}, {"cost": 3}])
def test_a_row_without_the_number_has_none(row: dict[str, Any]) -> None:
    """Whatever a row holds instead of a number is read as absent."""
    assert value(row, "luts") is None


def test_sabotage_a_front_that_keeps_weakly_dominated_points_is_caught() -> None:
    """The law notices a front that only drops what is worse everywhere."""

    def weak(points: Sequence[tuple[float, ...]], maximize: Sequence[bool]) -> list[int]:
        def everywhere(a: Sequence[float], b: Sequence[float]) -> bool:
            return all((x > y) if up else (x < y) for x, y, up in zip(a, b, maximize, strict=True))

        return [i for i, p in enumerate(points) if not any(everywhere(o, p) for o in points)]

    with pytest.raises(AssertionError):
        front_law(weak)


@settings(max_examples=150, deadline=None)
@given(ROWS, st.floats(-5, 5), st.floats(0, 3))
def test_the_reason_of_the_knee_is_true(rows: Any, reference: float, margin: float) -> None:
    """The words say what holds of the front: the first rule that any of its designs satisfies."""
    on_front = front(rows)
    chosen = knee(rows, on_front, reference, margin)
    if chosen is None:
        return
    proved = any(rows[i]["verdict"]["verdict"] == "non-inferior" for i in on_front)
    near = any((value(rows[i], "mean") or 0.0) >= reference - margin for i in on_front)
    why = why_knee(rows[chosen], reference, margin)
    assert why.startswith("the cheapest non-inferior") == proved
    assert ("within the margin; none there is proved" in why) == (near and not proved)
    assert ("no design is within" in why) == (not near and not proved)


def test_means_over_fewer_episodes_are_on_no_front_of_returns() -> None:
    """A partial row, however good, takes no place among returns; among what episodes do not change it does."""
    rows = [
        {"score": {"mean": 1.0}, "cost": {"luts": 9}, "fidelity": {"agreement": 0.5}},
        {"score": {"mean": 2.0}, "cost": {"luts": 5}, "fidelity": {"agreement": 0.9}, "partial": True},
    ]
    assert front(rows, "luts", "mean") == [0]
    assert front(rows, "luts", "agreement") == [1]

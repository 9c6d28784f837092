"""Laws of races: they end early where episodes decide, are rarely wrong, and say what they are sure of."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantkit.racing import GOOD_FROM, enough, looks, race
from quantkit.statistics import non_inferior


@given(st.integers(1, 3000))
def test_looks_double_and_end_with_all(n: int) -> None:
    """Ascending, the last is all episodes, and there are no more looks than doublings."""
    stops = looks(n)
    assert stops[-1] == n and list(stops) == sorted(set(stops)) and len(stops) <= 2 + np.log2(max(1, n / 5))


def played(differences: np.ndarray, margin: float) -> tuple[int, str]:
    """Episodes and verdict of a race with these differences to a float policy that always returns 100."""
    asked: list[tuple[int, int]] = []

    def play(first: int, count: int) -> np.ndarray:
        asked.append((first, count))
        return 100 + differences[first : first + count]

    returns, verdict = race(np.full(len(differences), 100.0), play, margin)
    assert [first for first, _ in asked] == [0, *np.cumsum([count for _, count in asked])[:-1]]
    np.testing.assert_array_equal(returns, 100 + differences[: len(returns)])
    assert verdict.n == len(returns)
    return len(returns), verdict.verdict


def test_what_is_clear_is_short() -> None:
    """A large loss takes the first look, none at all the first that may call it good, a doubtful one all episodes."""
    noise = np.random.default_rng(3).normal(size=100)
    assert played(noise - 50, 10) == (5, "inferior")
    assert played(noise, 10) == (GOOD_FROM, "non-inferior")
    assert played(3 * noise - 3 * noise.mean() - 10, 10) == (100, "inconclusive")


@given(st.integers(1, 130), st.integers(0, 10**6), st.floats(-20.0, 5.0))
def test_the_undecided_stop_half_way(n: int, seed: int, true: float) -> None:
    """A race that leaves designs undecided is the race itself up to the look where it does."""
    reference, returns = np.zeros(n), np.random.default_rng(seed).normal(true, 20.0, n)

    def play(first: int, count: int) -> np.ndarray:
        return returns[first : first + count]

    whole, verdict = race(reference, play, 10.0)
    short, early = race(reference, play, 10.0, undecided=enough(n))
    limit = next(look for look in looks(n) if look >= min(enough(n), n))
    if len(whole) <= limit:
        assert early == verdict and len(short) == len(whole)
    else:
        assert early.verdict == "inconclusive" and len(short) == early.n == limit and n / 2 <= limit < n


def test_few_good_episodes_are_not_enough() -> None:
    """A policy that fails once in twenty, later than the tenth episode, is not called non-inferior before it fails."""
    differences = np.zeros(40)
    differences[19] = -200.0
    n, verdict = played(differences, 5)
    assert n > 10 and verdict != "non-inferior"


def test_a_race_of_one_look_is_the_plain_test() -> None:
    """With as many episodes as the first look has, the verdict is that of the fixed test."""
    reference, returns = np.array([3.0, 5.0, 4.0, 6.0]), np.array([3.5, 4.0, 4.5, 5.0])
    _, verdict = race(reference, lambda first, count: returns[first : first + count], 2.0)
    assert verdict == non_inferior(reference, returns, 2.0)


@pytest.mark.parametrize(("true", "wrong"), [(-10.0, "non-inferior"), (-10.0, "inferior")])
def test_errors_stay_below_their_level(true: float, wrong: str) -> None:
    """At the margin itself, where both errors are likeliest, each is made in less than 5 % of 2,000 races."""
    rng = np.random.default_rng(7)
    outcomes = [played(rng.normal(true, 25.0, 80), 10.0)[1] for _ in range(2000)]
    assert outcomes.count(wrong) / len(outcomes) < 0.05


@pytest.mark.parametrize("episodes", [40, 100])
def test_rare_failures_are_rarely_missed(episodes: int) -> None:
    """Of policies that equal float but for one episode of seven, which costs eight times the margin, a race calls less
    than 10 % non-inferior: the plain test on 40 episodes 7 %; ten without a failure come with a chance of 21 %."""
    rng = np.random.default_rng(8)
    outcomes = []
    for _ in range(2000):
        differences = rng.normal(0.0, 1.0, episodes) - 80.0 * (rng.random(episodes) < 1 / 7)
        outcomes.append(played(differences, 10.0)[1])
    assert outcomes.count("non-inferior") / len(outcomes) < 0.1


def test_sabotage_looks_without_correction_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error law notices a race that makes each look at the full level."""
    import quantkit.racing

    real = quantkit.racing.non_inferior
    monkeypatch.setattr(quantkit.racing, "non_inferior", lambda a, b, m, level, method: real(a, b, m, level=0.95))
    with pytest.raises(AssertionError):
        test_errors_stay_below_their_level(-10.0, "inferior")

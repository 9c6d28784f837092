"""Statistics of returns against scipy, hand-computed values and simulation."""

import json
import math

import numpy as np
import pytest
from scipy import optimize, stats

from quantkit.errors import InputError
from quantkit.statistics import (
    bootstrap_interval,
    default_margin,
    iqm,
    mean,
    non_inferior,
    paired_shares,
    spread,
    t_probability,
    t_quantile,
)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 7, 8, 20, 33])
def test_iqm_is_scipys_trimmed_mean(n):
    """The interquartile mean cuts floor(n/4) values at each end, along any axis."""
    x = np.random.default_rng(n).normal(3.0, 7.0, size=(5, n))
    np.testing.assert_allclose(iqm(x), stats.trim_mean(x, 0.25, axis=1), rtol=1e-12)
    np.testing.assert_allclose(iqm(x.T, axis=0), iqm(x), rtol=1e-12)


@pytest.mark.parametrize("df", [1, 2, 3, 4, 5, 10, 19, 20, 99, 500])
def test_t_distribution_is_scipys(df):
    """Probabilities and quantiles of Student's t are exact for every number of degrees of freedom."""
    for t in (-3.0, -0.1, 0.0, 0.7, 2.0, 40.0):
        assert t_probability(t, df) == pytest.approx(stats.t.cdf(t, df), abs=1e-13)
    for p in (0.01, 0.3, 0.5, 0.6, 0.95, 0.995):
        assert t_quantile(p, df) == pytest.approx(stats.t.ppf(p, df), rel=1e-9, abs=1e-12)


def test_bootstrap_interval_is_seeded_and_close_to_scipys():
    """The same seed gives the same interval, another seed another, and both agree with scipy's to resampling noise."""
    x = np.random.default_rng(3).gamma(2.0, 30.0, size=37)
    first = bootstrap_interval(x, mean, seed=5)
    assert first == bootstrap_interval(x, mean, seed=5)
    assert first != bootstrap_interval(x, mean, seed=6)
    theirs = stats.bootstrap((x,), np.mean, n_resamples=2000, method="percentile", rng=1).confidence_interval
    np.testing.assert_allclose(first, theirs, rtol=0.05)
    wide, narrow = bootstrap_interval(x, level=0.99), bootstrap_interval(x, level=0.5)
    assert wide[0] < narrow[0] < narrow[1] < wide[1]


def test_equal_values_have_no_spread():
    """Equal values have zero deviation and an interval of no width; a single value has an unknown deviation."""
    assert spread([0.1] * 7) == (0.0, 0.0)
    assert all(math.isnan(v) for v in spread([4.0]))
    assert bootstrap_interval([2.5] * 9) == (2.5, 2.5)
    assert bootstrap_interval([2.5]) == (2.5, 2.5)


def test_spread_is_the_sample_standard_deviation():
    """spread gives the standard deviation with ddof 1 and that over the root of n."""
    x = np.random.default_rng(0).normal(size=11)
    std, stderr = spread(x)
    assert std == pytest.approx(x.std(ddof=1), rel=1e-12)
    assert stderr == pytest.approx(stats.sem(x), rel=1e-12)


def test_verdicts_follow_the_paired_interval():
    """The t bounds are scipy's for paired differences, and the verdict compares them with the margin."""
    rng = np.random.default_rng(4)
    a = rng.normal(240, 80, size=23)
    b = a - 6 + rng.normal(0, 5, size=23)
    verdict = non_inferior(a, b, margin=12.0)
    low, high = stats.t.interval(0.9, 22, loc=np.mean(b - a), scale=stats.sem(b - a))
    assert (verdict.low, verdict.high) == pytest.approx((low, high), rel=1e-9)
    assert verdict.verdict == "non-inferior" and verdict.method == "t" and verdict.n == 23
    assert non_inferior(a, b, margin=3.0).verdict == "inferior"
    assert non_inferior(a, b, margin=-verdict.diff_mean).verdict == "inconclusive"
    boot = non_inferior(a, b, margin=12.0, method="bootstrap", seed=3)
    assert (boot.low, boot.high) == pytest.approx((low, high), abs=0.6) and boot.method == "bootstrap"


def test_pairing_decides_what_unpaired_returns_cannot():
    """A shuffled partner destroys the pairing and with it the verdict."""
    rng = np.random.default_rng(8)
    a = rng.normal(0, 100, size=20)
    b = a - 1 + rng.normal(0, 1, size=20)
    assert non_inferior(a, b, margin=10.0).verdict == "non-inferior"
    assert non_inferior(a, rng.permutation(b), margin=10.0).verdict == "inconclusive"


@pytest.mark.parametrize("method", ["t", "bootstrap"])
def test_equal_differences_are_decided_without_variance(method):
    """Identical returns are non-inferior even with margin zero; a constant loss is compared directly."""
    a = np.array([500.0, 480.5, 0.1, -3.7])
    same = non_inferior(a, a, margin=0.0, method=method)
    assert (same.verdict, same.low, same.high) == ("non-inferior", 0.0, 0.0)
    zeros = np.zeros(5)
    assert non_inferior(zeros, zeros - 7, margin=7.0, method=method).verdict == "non-inferior"
    assert non_inferior(zeros, zeros - 7, margin=6.9, method=method).verdict == "inferior"


def test_one_episode_decides_nothing():
    """A single pair is inconclusive, and its infinite bounds become null in JSON."""
    verdict = non_inferior([5.0], [5.0], margin=100.0)
    assert verdict.verdict == "inconclusive"
    assert json.loads(json.dumps(verdict.to_json(), allow_nan=False))["low"] is None


def test_false_verdicts_are_as_rare_as_the_level_says():
    """With a true loss equal to the margin, "non-inferior" comes out in about 5 % of the trials."""
    rng = np.random.default_rng(11)
    hits = [
        non_inferior(np.zeros(20), rng.normal(-3.0, 4.0, 20), margin=3.0).verdict == "non-inferior" for _ in range(1500)
    ]
    assert 0.03 < np.mean(hits) < 0.07


@pytest.mark.parametrize(
    ("a", "b", "margin", "level", "word"),
    [
        ([1.0, 2.0], [1.0], 1.0, 0.95, "equally long"),
        ([], [], 1.0, 0.95, "equally long"),
        ([1.0, math.nan], [1.0, 2.0], 1.0, 0.95, "NaN"),
        ([1.0, 2.0], [1.0, 2.0], -0.1, 0.95, "margin"),
        ([1.0, 2.0], [1.0, 2.0], math.nan, 0.95, "margin"),
        ([1.0, 2.0], [1.0, 2.0], 1.0, 0.4, "level"),
    ],
)
def test_bad_comparisons_are_refused(a, b, margin, level, word):
    """Unequal lengths, NaN, and senseless margins or levels are input errors that name the trouble."""
    with pytest.raises(InputError, match=word):
        non_inferior(a, b, margin, level=level)


def test_margin_is_a_fraction_of_the_way_from_random():
    """The default margin is 5 % of the distance to a random policy, whichever of the two is better."""
    assert default_margin([250.0], [-150.0]) == pytest.approx(20.0)
    assert default_margin([-150.0], [250.0], fraction=0.1) == pytest.approx(40.0)


def tango(gains, losses, n, level):
    """Tango's limits by his definition: the constrained likelihood is maximized numerically, then the score solved."""

    def score(shift):
        def likelihood(
            share,
        ):  # of answers that only the first has right; those that only the second has: share + shift
            cells = (gains, share + shift), (losses, share), (n - gains - losses, 1 - 2 * share - shift)
            return -sum(count * math.log(max(p, 1e-300)) for count, p in cells if count)

        low, high = max(0.0, -shift), (1 - shift) / 2
        share = optimize.minimize_scalar(likelihood, bounds=(low, high), method="bounded", options={"xatol": 1e-12}).x
        return (gains - losses - n * shift) / math.sqrt(n * (2 * share + shift * (1 - shift)))

    z, center = stats.norm.ppf(level), (gains - losses) / n
    lower = optimize.brentq(lambda v: score(v) - z, -1 + 1e-6, center + 1e-9) if losses < n else -1.0
    return lower, optimize.brentq(lambda v: score(v) + z, center - 1e-9, 1 - 1e-6)


@pytest.mark.parametrize("gains,losses,n", [(3, 7, 64), (7, 3, 64), (1, 20, 128), (0, 5, 40), (43, 37, 300)])
def test_paired_shares_are_tangos(gains, losses, n):
    """Bounds of the difference of two accuracies are those of the score test by its definition."""
    for level in (0.95, 0.995):
        np.testing.assert_allclose(paired_shares(gains, losses, n, level), tango(gains, losses, n, level), atol=1e-5)


def test_paired_shares_keep_their_level():
    """Of simulated pairs with a known difference each bound is passed about as often as it says; few or none that
    differ leave an interval."""
    rng, missed = np.random.default_rng(2), np.zeros(2)
    for gains, losses, _ in rng.multinomial(200, (0.02, 0.05, 0.93), size=2000):
        low, high = paired_shares(int(gains), int(losses), 200, 0.95)
        missed += (low > -0.03, high < -0.03)
    assert (missed / 2000 < 0.065).all() and (missed / 2000 > 0.03).all()
    low, high = paired_shares(0, 0, 10, 0.95)
    assert low == pytest.approx(-high) and high > 0.2

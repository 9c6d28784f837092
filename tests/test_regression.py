"""The regression of returns against the definition of a Gaussian process, and what it is for."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy import stats

import quantkit.regression
from quantkit.regression import LENGTHS, ROUGHNESS, Regression, fit


def drawn(seed: int, n: int = 24) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    """Two groups of features, returns that depend on both, and the variance of their noise."""
    rng = np.random.default_rng(seed)
    groups = [rng.normal(-3.0, 1.5, (n, 1)), rng.integers(1, 8, (n, 4)).astype(float)]
    truth = 1 / (1 + np.exp(-groups[0][:, 0] - 3.0)) + 0.05 * (groups[1][:, 1] - 4)
    noise = rng.uniform(1e-4, 0.02, n)
    return groups, truth + rng.normal(size=n) * np.sqrt(noise), noise


def covariance(a: list[np.ndarray], b: list[np.ndarray], found: Regression) -> np.ndarray:
    """The kernel by loops over the designs."""
    return np.array([
        [
            found.scale * np.exp(-0.5 * sum(
                np.mean((x[i] - y[j]) ** 2) / length**2 for x, y, length in zip(a, b, found.lengths, strict=True)
            ))
            for j in range(len(b[0]))
        ]
        for i in range(len(a[0]))
    ])  # fmt: skip


def test_predictions_are_conditional_normals() -> None:
    """Mean and deviation are those of the joint normal distribution of old and new returns, by its inverse."""
    groups, values, noise = drawn(0)
    old, new = [g[:18] for g in groups], [g[18:] for g in groups]
    found = fit(old, values[:18], noise[:18])
    k, both = covariance(old, old, found), covariance(new, old, found)
    inverse = np.linalg.inv(k + np.diag(noise[:18] + found.roughness))
    mean, deviation = found.predict(new)
    np.testing.assert_allclose(mean, found.mean + both @ inverse @ (values[:18] - found.mean), atol=2e-6)
    spread = covariance(new, new, found) - both @ inverse @ both.T + found.roughness * np.eye(6)
    np.testing.assert_allclose(deviation, np.sqrt(np.diag(spread)), atol=2e-6)


def test_measured_returns_are_drawn_towards_the_regression() -> None:
    """What is expected of a measured design is the conditional mean of its true return; without noise, what it did."""
    groups, values, noise = drawn(1)
    found = fit(groups, values, noise)
    true = covariance(groups, groups, found) + found.roughness * np.eye(len(values))
    expected = found.mean + true @ np.linalg.inv(true + np.diag(noise)) @ (values - found.mean)
    np.testing.assert_allclose(found.smoothed(), expected, atol=2e-6)
    np.testing.assert_allclose(fit(groups, values, 0 * noise).smoothed(), values, atol=2e-6)


def test_lengths_are_the_most_likely_of_the_grid() -> None:
    """No other choice gives the returns a larger density (scipy)."""
    groups, values, noise = drawn(2)
    found = fit(groups, values, noise)

    def density(lengths: tuple[float, ...], roughness: float) -> float:
        one = Regression(**{**vars(found), "lengths": lengths, "roughness": roughness})
        spread = covariance(groups, groups, one) + np.diag(noise + roughness)
        return float(stats.multivariate_normal(np.full(len(values), found.mean), spread).logpdf(values))

    best = density(found.lengths, found.roughness)
    grid = itertools.product(itertools.product(LENGTHS, repeat=2), ROUGHNESS)
    assert all(density(*choice) <= best + 1e-6 for choice in grid)


def test_it_tells_more_than_the_mean_and_smoothing_helps() -> None:
    """On fresh designs its errors are well below those of the mean, and smoothed returns are nearer to the truth."""
    errors, others, raw, smooth = [], [], [], []
    for seed in range(8):
        groups, values, noise = drawn(seed, 60)
        truth = 1 / (1 + np.exp(-groups[0][:, 0] - 3.0)) + 0.05 * (groups[1][:, 1] - 4)
        found = fit([g[:40] for g in groups], values[:40], noise[:40])
        errors += list(found.predict([g[40:] for g in groups])[0] - truth[40:])
        others += list(values[:40].mean() - truth[40:])
        raw += list(values[:40] - truth[:40])
        smooth += list(found.smoothed() - truth[:40])
    assert np.square(errors).mean() < 0.2 * np.square(others).mean()
    assert np.square(smooth).mean() < 0.8 * np.square(raw).mean()


def test_one_return_and_equal_returns_are_enough() -> None:
    """One design, or several that returned the same, give that return everywhere."""
    for n in (1, 5):
        found = fit([np.arange(n)[:, None], np.ones((n, 2))], [0.7] * n, [0.0] * n)
        mean, deviation = found.predict([np.array([[9.0]]), np.ones((1, 2))])
        assert mean == pytest.approx([0.7]) and (deviation > 0).all()


def test_sabotage_a_wrong_noise_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """If predictions forgot what the features do not tell, the law of conditional normals would fail."""
    real = quantkit.regression.fit
    forgets = lambda *given: Regression(**{**vars(real(*given)), "roughness": 0.0})  # noqa: E731
    monkeypatch.setitem(globals(), "fit", forgets)
    with pytest.raises(AssertionError):
        test_predictions_are_conditional_normals()

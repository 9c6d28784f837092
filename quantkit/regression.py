"""What designs that were not played would return: Gaussian-process regression on what others did.

    return = mean + f(features) + w + e,    f ~ GP(0, s k),  w ~ N(0, r),  e ~ N(0, noise of the measured mean)

k is a squared exponential over groups of features, each with a length of its own; w is what the features do not tell
of a design. Lengths and r are those of a grid with the largest marginal likelihood, s is the variance of the returns.
Rasmussen & Williams, Gaussian Processes for Machine Learning, MIT Press 2006, algorithm 2.1.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from quantkit.statistics import Floats

LENGTHS = (0.5, 1.0, 2.0, 4.0)
ROUGHNESS = (0.003, 0.01, 0.03)
"""Values of r, for returns that lie between 0 and 1."""
FITTED = 128
"""Lengths and r are chosen by at most so many of the returns, evenly taken."""
_DIGITS = 6  # what other threads or machines add in another order must not change what is proposed


@dataclass(frozen=True)
class Regression:
    """The posterior of f: what `fit` found. lengths: by group."""

    groups: tuple[Floats, ...]
    values: Floats
    mean: float
    scale: float
    lengths: tuple[float, ...]
    roughness: float
    noise: Floats
    factor: Floats
    weights: Floats

    def predict(self, groups: Sequence[Floats]) -> tuple[Floats, Floats]:
        """Mean and standard deviation (m,) of the true returns of designs with these features, by group (m, features).

        The features of a group are divided by the root of their number.
        """
        kernel = self.scale * _kernel(_distances(groups, self.groups), self.lengths)
        explained = np.linalg.solve(self.factor, kernel.T)
        variance = np.maximum(self.scale - (explained**2).sum(axis=0), 0.0) + self.roughness
        return (self.mean + kernel @ self.weights).round(_DIGITS), np.sqrt(variance).round(_DIGITS)

    def smoothed(self) -> Floats:
        """The expected true returns (n,) of the designs that were measured: drawn towards f, the more the noisier."""
        found: Floats = (self.values - self.noise * self.weights).round(_DIGITS)
        return found


def fit(groups: Sequence[Floats], values: Sequence[float], noise: Sequence[float]) -> Regression:
    """The regression of measured returns (n,), of about 0 to 1, on features by group (n, features).

    noise: the variance of each measured mean. n must be 1 or more.
    """
    y, known = np.asarray(values, np.float64), np.asarray(noise, np.float64)
    given = tuple(np.asarray(group, np.float64) for group in groups)
    mean, scale = float(y.mean()), max(float(y.var()), 1e-3)
    some = np.unique(np.linspace(0, len(y) - 1, min(FITTED, len(y))).astype(int))
    apart = _distances([group[some] for group in given], [group[some] for group in given])

    def evidence(lengths: tuple[float, ...], roughness: float) -> float:
        left = y[some] - mean
        factor = np.linalg.cholesky(scale * _kernel(apart, lengths) + np.diag(known[some] + roughness))
        half = np.linalg.solve(factor, left)
        return round(float(-0.5 * half @ half - np.log(np.diag(factor)).sum()), _DIGITS)

    choices = itertools.product(itertools.product(LENGTHS, repeat=len(given)), ROUGHNESS)
    lengths, roughness = max(choices, key=lambda choice: evidence(*choice))
    kernel = scale * _kernel(_distances(given, given), lengths)
    factor: Floats = np.linalg.cholesky(kernel + np.diag(known + roughness)).astype(np.float64)
    weights = np.linalg.solve(factor.T, np.linalg.solve(factor, y - mean))
    return Regression(given, y, mean, scale, lengths, roughness, known, factor, weights)


def _distances(a: Sequence[Floats], b: Sequence[Floats]) -> list[Floats]:
    """Mean squared differences of the features, (n, m) for each group."""
    return [((x[:, None, :] - y[None, :, :]) ** 2).mean(axis=2) for x, y in zip(a, b, strict=True)]


def _kernel(apart: Sequence[Floats], lengths: tuple[float, ...]) -> Floats:
    total = sum(distance / length**2 for distance, length in zip(apart, lengths, strict=True))
    found: Floats = np.exp(-0.5 * np.asarray(total))
    return found

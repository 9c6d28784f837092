"""Statistics of episode returns: spread, robust mean with interval, paired non-inferiority. Numpy only.

References: Agarwal et al., "Deep Reinforcement Learning at the Edge of the Statistical Precipice",
NeurIPS 2021, https://arxiv.org/abs/2108.13264 (interquartile mean, bootstrap, probability of
improvement); Abramowitz & Stegun 26.7.3-4 (Student's t); Tango, "Equivalence test and confidence interval for the
difference in proportions for the paired-sample design", Statistics in Medicine 17, 1998.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from quantkit.errors import InputError

Floats = NDArray[np.float64]
Method = Literal["t", "bootstrap", "shares"]
"""How bounds of paired differences are found: Student's t, the bootstrap, or, of zeros and ones, `paired_shares`."""


def iqm(values: ArrayLike, axis: int = -1) -> Any:
    """Interquartile mean: the mean without the floor(n/4) smallest and largest values along `axis`.

    The same cut as `scipy.stats.trim_mean(values, 0.25)`; below four values it is the mean.

    >>> float(iqm([-900.0, 10.0, 11.0, 12.0, 13.0]))
    11.0
    """
    ordered = np.sort(np.asarray(values, np.float64), axis=axis)
    n = ordered.shape[axis]
    return np.take(ordered, np.arange(n // 4, n - n // 4), axis=axis).mean(axis=axis)


def mean(values: ArrayLike, axis: int = -1) -> Any:
    """Mean in float64, with the signature `bootstrap_interval` wants."""
    return np.asarray(values, np.float64).mean(axis=axis)


def spread(values: ArrayLike) -> tuple[float, float]:
    """Standard deviation (ddof 1) and standard error of the mean; both NaN for a single value."""
    x = np.asarray(values, np.float64)
    if x.size < 2:
        return math.nan, math.nan
    std = float(x.std(ddof=1)) if (x != x[0]).any() else 0.0
    return std, std / math.sqrt(x.size)


def bootstrap_interval(
    values: ArrayLike,
    statistic: Callable[..., Any] = iqm,
    *,
    n: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> tuple[float, float]:
    """Two-sided percentile bootstrap interval of `statistic(samples, axis)` at confidence `level`.

    The same seed gives the same interval. Equal values, or one value, give an interval of no width.
    With few episodes (below about 20) percentile intervals are somewhat too narrow.
    """
    x = np.asarray(values, np.float64)
    resampled = x[np.random.default_rng(seed).integers(x.size, size=(n, x.size))]
    low, high = np.quantile(statistic(resampled, axis=-1), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def t_probability(t: float, df: int) -> float:
    """P(T <= t) for Student's t with an integer number of degrees of freedom (finite series, exact).

    >>> round(t_probability(2.093, 19), 4)
    0.975
    """
    theta = math.atan2(abs(t), math.sqrt(df))
    s, c2 = math.sin(theta), math.cos(theta) ** 2
    if df % 2:
        term = math.cos(theta)
        total = 0.0
        for k in range(1, df - 1, 2):  # cos + (2/3) cos^3 + (2*4)/(3*5) cos^5 + ...
            total += term
            term *= c2 * (k + 1) / (k + 2)
        inside = 2 / math.pi * (theta + s * total)
    else:
        term, total = 1.0, 0.0
        for k in range(0, df - 1, 2):  # 1 + (1/2) cos^2 + (1*3)/(2*4) cos^4 + ...
            total += term
            term *= c2 * (k + 1) / (k + 2)
        inside = s * total
    return 0.5 + math.copysign(inside / 2, t)


def t_quantile(p: float, df: int) -> float:
    """The t with P(T <= t) = p, 0 < p < 1, by bisection to float64 precision.

    >>> round(t_quantile(0.95, 19), 4)
    1.7291
    """
    if p == 0.5:
        return 0.0
    if p < 0.5:
        return -t_quantile(1 - p, df)
    low, high = 0.0, 1.0
    while t_probability(high, df) < p:
        low, high = high, 2 * high
    for _ in range(200):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        low, high = (middle, high) if t_probability(middle, df) < p else (low, middle)
    return high


def paired_shares(gains: int, losses: int, n: int, level: float) -> tuple[float, float]:
    """One-sided bounds, each at `level`, of the difference of two shares of the same n answers: Tango's score interval.

    gains, losses: how many answers only the second, and only the first, has right. Unlike Student's t it holds for few
    answers and for none that differs.

    >>> [round(v, 4) for v in paired_shares(0, 0, 100, 0.975)]
    [-0.037, 0.037]
    """
    z = NormalDist().inv_cdf(level)

    def score(shift: float) -> float:
        """(gains - losses - n shift) over its standard deviation, were the true difference `shift`."""
        b = -gains - losses + (2 * n - gains + losses) * shift
        root = math.sqrt(max(0.0, b * b + 8 * n * losses * shift * (1 - shift)))
        share = (root - b) / (4 * n)  # of answers that only the first has right, as likely as can be
        variance = n * (2 * share + shift * (1 - shift))
        return (gains - losses - n * shift) / math.sqrt(variance) if variance > 0 else 0.0

    def crossing(low: float, high: float, target: float) -> float:
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if score(middle) > target else (low, middle)
        return (low + high) / 2

    center = (gains - losses) / n
    return crossing(-1.0, center, z), crossing(center, 1.0, -z)


@dataclass(frozen=True)
class Verdict:
    """Outcome of a paired non-inferiority test of quantized against float returns.

    diff_mean: mean of quantized - float. low, high: one-sided confidence bounds of it, each at
    `level`. verdict: "non-inferior" when low >= -margin, "inferior" when high < -margin, otherwise
    "inconclusive": run more episodes.
    """

    verdict: Literal["non-inferior", "inferior", "inconclusive"]
    diff_mean: float
    low: float
    high: float
    margin: float
    level: float
    n: int
    method: Method

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; an unbounded or unknown number becomes None."""
        return {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in asdict(self).items()
        }


def non_inferior(
    float_returns: ArrayLike,
    quant_returns: ArrayLike,
    margin: float,
    *,
    level: float = 0.95,
    method: Method = "t",
    seed: int = 0,
) -> Verdict:
    """Whether the quantized policy loses at most `margin` return against the float one, seed by seed.

    The returns are paired: entry i of both comes from the same environment seed. Differences
    have a much smaller variance than returns, so fewer episodes decide. Method "t" (the default)
    is Student's t interval on the differences; "bootstrap" is the percentile bootstrap of their
    mean, which assumes no shape but is too narrow for few or very skewed episodes; "shares" is for answers that are
    right (1) or not (0).

    Differences that are all equal have bounds equal to their mean, and one episode decides nothing
    (bounds at infinity), except of shares. Raises InputError on unequal numbers, NaN or a negative margin.
    """
    a, b = np.asarray(float_returns, np.float64), np.asarray(quant_returns, np.float64)
    if a.shape != b.shape or a.ndim != 1 or a.size == 0:
        raise InputError(f"paired returns must be two equally long lists, got shapes {a.shape} and {b.shape}")
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise InputError("returns contain NaN or infinity")
    if not margin >= 0:
        raise InputError(f"the non-inferiority margin must be at least 0, got {margin}")
    if not 0.5 < level < 1:
        raise InputError(f"the confidence level must lie between 0.5 and 1, got {level}")
    diff = b - a
    center, n = float(diff.mean()), diff.size
    if method == "shares":
        low, high = paired_shares(int((diff > 0).sum()), int((diff < 0).sum()), n, level)
    elif n == 1:
        low, high = -math.inf, math.inf
    elif (diff == diff[0]).all():
        low = high = center = float(diff[0])
    elif method == "bootstrap":
        low, high = bootstrap_interval(diff, mean, n=10_000, level=2 * level - 1, seed=seed)
    else:
        half = t_quantile(level, n - 1) * spread(diff)[1]
        low, high = center - half, center + half
    verdict: Literal["non-inferior", "inferior", "inconclusive"] = "inconclusive"
    if low >= -margin:
        verdict = "non-inferior"
    elif high < -margin:
        verdict = "inferior"
    return Verdict(verdict, center, low, high, float(margin), level, n, method)


def default_margin(float_returns: ArrayLike, random_returns: ArrayLike, fraction: float = 0.05) -> float:
    """`fraction` of the distance between the mean returns of the float and of a random policy.

    >>> round(default_margin([240.0, 260.0], [-190.0, -170.0]), 6)
    21.5
    """
    return fraction * abs(float(mean(float_returns)) - float(mean(random_returns)))

"""Shared families of test instances: every format, and numbers where rounding is decided."""

from __future__ import annotations

import itertools
import math

import numpy as np

from hwmodel.formats import Format, all_names, levels, max_value, min_value, parse

ALL_FORMATS: list[Format] = [parse(name) for name in all_names()]
WEIGHT_FORMATS = ["int8", "int4", "int4n", "int3", "e2m1", "e1m2", "e3m0", "e4m3fn", "ternary", "binary"]


def midpoints(fmt: Format) -> list[float]:
    """Halfway between neighbouring values; exact in float64."""
    values = levels(fmt)
    return [(a + b) / 2 for a, b in itertools.pairwise(values)]


def boundary_numbers(fmt: Format, limit: int = 200) -> np.ndarray:
    """Values, midpoints, their neighbours in float32, powers of two from below, and what saturates; float32."""
    chosen = [*levels(fmt), *midpoints(fmt)]
    if len(chosen) > limit:
        chosen = [chosen[i] for i in np.linspace(0, len(chosen) - 1, limit).astype(int)]
    centers = np.array(chosen, dtype=np.float32)
    powers = np.array([2.0**k for k in range(-40, 41)], dtype=np.float32)
    centers = np.concatenate([centers, powers, -powers])
    infinity = np.float32(np.inf)
    top = np.array([max_value(fmt), min_value(fmt), 1e30, -1e30, np.inf, -np.inf, 0.0, -0.0], dtype=np.float32)
    below, above = np.nextafter(centers, -infinity), np.nextafter(centers, infinity)
    return np.concatenate([centers, below, above, top, top * np.float32(1.3)])


def random_numbers(fmt: Format, count: int, seed: int) -> np.ndarray:
    """Float32 numbers spread over all binades of the format and beyond."""
    rng = np.random.default_rng(seed)
    scale = max_value(fmt) or 1.0
    uniform = rng.uniform(-1.2, 1.2, count // 2) * scale
    smallest = min(abs(v) for v in levels(fmt) if v != 0)
    low, high = math.log2(smallest) - 2, math.log2(max(scale, smallest)) + 1
    spread = np.exp2(rng.uniform(low, high, count - count // 2)) * rng.choice([-1, 1], count - count // 2)
    return np.concatenate([uniform, spread]).astype(np.float32)

"""Arithmetic that says exactly what a layer's thresholds say: `t = sum * factor + offset`, and a few patches.

Behind `t` stands either rounding to the output format (half to even, clipped) or a search among
levels that all rows share, which is what a curved activation needs. The thresholds come from a
float32 pipeline whose rounding noise no integer formula repeats at every sum, so some sums of a row are
*patched*: listed with their codes. `solve` finds the smallest factors for which factors and
patches together reproduce every threshold; the proof is exact, on the thresholds themselves.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

import numpy as np

from hwmodel.accumulator import signed_bits
from hwmodel.convert import csd_adds
from hwmodel.formats import BINARY, Float, Levels, encode, levels, nearest, unit
from hwmodel.network import Layer, Network
from hwmodel.spec import CURVED, PerTensor, Rescale

Kind = Literal["constant", "shift", "runtime"]
MAX_PATCHES = 32
"""Patched sums of one row; beyond, thresholds in memory are the better way."""
MAX_FACTOR_BITS = 32
MAX_BITS = 62
"""Bits of t: everything here is computed in int64."""
SHIFT_REACH = 7
"""Largest difference of the shifts of two rows: three bits."""


@dataclass(frozen=True, slots=True, eq=False)
class Affine:
    """Integers of the arithmetic behind a layer's sums.

    kind: factors all equal, all powers of two, or any. factors, offsets: (rows,) int64, factors >= 0.
    bits: two's complement bits of every t. shift: t counts steps of the output format / 2^shift (0 with bounds).
    low, high: smallest and largest code rank that leaves. bounds: (levels - 1,) int64, the smallest t
    above each level; None where t is rounded. patches: for each row the sums and code ranks to replace.
    """

    kind: Kind
    factors: np.ndarray
    offsets: np.ndarray
    bits: int
    shift: int
    low: int
    high: int
    bounds: np.ndarray | None
    patches: tuple[tuple[tuple[int, int], ...], ...]

    @property
    def factor_bits(self) -> int:
        """Bits of the factors; of a shift, of its amount."""
        if self.kind == "shift":
            spread = self.factors[self.factors > 0]
            return max(1, int(int(spread.max()) // int(spread.min())).bit_length() - 1).bit_length()
        return max(1, int(self.factors.max()).bit_length())

    @property
    def patch_slots(self) -> int:
        """The most patches of any row."""
        return max(len(row) for row in self.patches)


def solve(layer: Layer) -> Affine | None:
    """The arithmetic of the layer with the fewest LUTs, or None: thresholds alone can hold what follows its sums."""
    spec = layer.spec
    if layer.thresholds is None or isinstance(spec.out, Levels) or layer.formats == (BINARY, BINARY):
        return None
    problem = _problem(layer)
    found = list(_searched(layer, problem) if spec.activation in CURVED else _rounded(layer, problem))
    return min(found, key=lambda a: _effort(a, layer), default=None)


def solved(network: Network) -> Network:
    """The network, its specs saying for each layer which exact arithmetic there is (`LayerSpec.rescale`)."""
    layers = (solved_layer(layer) if isinstance(layer, Layer) else layer for layer in network.layers)
    return Network(tuple(layers), network.host)


def unsolved(network: Network) -> bool:
    """Whether `solved` has anything to find."""
    return any(
        isinstance(layer, Layer) and layer.thresholds is not None and layer.spec.rescale is None
        for layer in network.layers
    )


def solved_layer(layer: Layer) -> Layer:
    """`solved` of one layer."""
    found = solve(layer)
    return replace(layer, spec=replace(layer.spec, rescale=Rescale("none") if found is None else facts_of(found)))


def facts_of(found: Affine) -> Rescale:
    """What the cost model needs."""
    adds = csd_adds(int(found.factors[0])) if found.kind == "constant" else 0
    kind = "plain" if found.kind == "constant" and adds == 0 else found.kind
    return Rescale(kind, found.factor_bits, adds, found.bits, found.shift, found.patch_slots)


def ranks(found: Affine, layer: Layer, row: int, sums: np.ndarray) -> np.ndarray:
    """Code ranks that the arithmetic gives the sums of one row: int64, the same shape."""
    t = sums * int(found.factors[row]) + int(found.offsets[row])
    bounds = _boundaries(layer, found.shift) if found.bounds is None else found.bounds
    rank = np.clip(np.searchsorted(bounds, t, side="right"), found.low, found.high)
    for at, code in found.patches[row]:
        rank = np.where(sums == at, code, rank)
    return rank


# ---------------------------------------------------------------------------------------------------
# Search


@dataclass(frozen=True, slots=True, eq=False)
class _Problem:
    """low, high: sums of each row (rows,). table: thresholds inside low .. high + 1. first, last: ranks that occur."""

    low: np.ndarray
    high: np.ndarray
    table: np.ndarray
    first: int
    last: int


def _problem(layer: Layer) -> _Problem:
    assert layer.thresholds is not None
    low, high = (bound.astype(np.int64) for bound in layer.sum_range)
    table = np.clip(layer.thresholds.astype(object), low[:, None], high[:, None] + 1).astype(np.int64)
    first = int((table == low[:, None]).sum(axis=1).min())
    last = int((table <= high[:, None]).sum(axis=1).max())
    return _Problem(low, high, table, first, last)


def _boundaries(layer: Layer, shift: int) -> np.ndarray:
    """The smallest t above each level but the last, where 2^shift is one step of the format."""
    fmt = layer.spec.out
    assert fmt is not None
    values = levels(fmt)
    grid = np.array([round(v / unit(fmt)) for v in values], dtype=np.int64)
    up = np.array([nearest((a + b) / 2, fmt) == b for a, b in pairwise(values)])
    return (grid[1:] + grid[:-1]) * (1 << (shift - 1)) + ~up


def _slopes(layer: Layer, problem: _Problem) -> np.ndarray:
    """Real factor of each row, in steps of the output per sum, that violates its thresholds least: float64 (rows,).

    Rows with one threshold or none are free: they get no more than the others.
    """
    columns = slice(problem.first, problem.last)
    table, bound = problem.table[:, columns].astype(float), _boundaries(layer, 1)[columns] / 2
    low, high = problem.low[:, None].astype(float), problem.high[:, None].astype(float)
    inside = ((table > low) & (table <= high)).sum(axis=1)

    def slack(m: np.ndarray) -> np.ndarray:
        least = np.where(table <= high, bound - table * m[:, None], -np.inf).max(axis=1, initial=-np.inf)
        most = np.where(table > low, bound - (table - 1) * m[:, None], np.inf).min(axis=1, initial=np.inf)
        return most - least

    def best(limit: float) -> np.ndarray:
        a, b = np.zeros(len(table)), np.full(len(table), limit)
        for _ in range(120):
            x, y = a + (b - a) / 3, b - (b - a) / 3
            right = slack(x) < slack(y)
            a, b = np.where(right, x, a), np.where(right, b, y)
        return (a + b) / 2

    width = float(np.ptp(_boundaries(layer, 1))) + 2 if len(bound) else 1.0
    found = best(width)
    sure = inside > 2
    if sure.any() and not sure.all():
        found = np.where(sure, found, best(float(found[sure].max())))
    return np.where(inside > 0, found, 0.0)


def _rounded(layer: Layer, problem: _Problem) -> Iterator[Affine]:
    """Arithmetic with rounding, for activations that are straight between two clips."""
    slopes = _slopes(layer, problem) if layer.line is None else layer.line[:, 0] / layer.line[:, 2]
    if (slopes < 0).any():
        return
    top = float(slopes.max())
    if top <= 0:
        slopes, top = np.ones_like(slopes), 1.0
    shared = isinstance(layer.spec.granularity, PerTensor) and not layer.spec.out_factors
    middle = float(np.median(slopes[slopes > 0]))
    reach = max(abs(round(v / unit(layer.spec.out))) for v in levels(layer.spec.out)).bit_length()  # type: ignore[arg-type]
    for size in range(1, MAX_FACTOR_BITS + 1):
        shift = size - 1 - int(np.floor(np.log2(top)))
        if shift < (2 if isinstance(layer.spec.out, Float) else 1):  # `rtl/jam.v` looks two bits below a step
            continue
        if max(shift + reach + 2, size + layer.acc_bits + 1) > MAX_BITS:
            break
        scaled = slopes * 2.0**shift
        tries: list[tuple[Kind, np.ndarray]] = [("runtime", np.rint(scaled))]
        if shared:
            one = np.rint(middle * 2.0**shift)
            tries = [("constant", np.full_like(scaled, max(1.0, one)))]
        elif layer.spec.scale_pow2:
            power = np.where(slopes > 0, 2.0 ** np.rint(np.log2(np.maximum(scaled, 2.0**-60))), top * 2.0**shift)
            power = 2.0 ** np.rint(np.log2(power))
            if power.min() >= 1 and power.max() / power.min() <= 2**SHIFT_REACH:
                tries.append(("shift", power))
        exact = False
        for kind, factors in tries:
            bound = _boundaries(layer, shift)
            found = _fitted(problem, factors.astype(np.int64), bound)
            if found is not None:
                offsets, patches, width = found
                width = max(width, shift + 2)
                yield Affine(
                    kind, factors.astype(np.int64), offsets, width, shift, problem.first, problem.last, None, patches
                )
                exact |= not any(patches)
        if exact:  # larger factors only cost more
            return


def _fitted(
    problem: _Problem, factors: np.ndarray, bound: np.ndarray
) -> tuple[np.ndarray, tuple[tuple[tuple[int, int], ...], ...], int] | None:
    """For each row the offset that keeps the most thresholds, the sums left to patch, and the bits of t."""
    columns = slice(problem.first, problem.last)
    offsets: list[int] = []
    patches: list[tuple[tuple[int, int], ...]] = []
    for m, low, high, table in zip(
        map(int, factors), map(int, problem.low), map(int, problem.high), problem.table, strict=True
    ):
        part, b = table[columns], bound[columns]
        if not len(part):
            offsets.append(0)
            patches.append(())
            continue
        least = (b - part * m)[part <= high]
        most = (b - 1 - (part - 1) * m)[part > low]
        offset = _most_covered(least, most)
        row = _patches(m, offset, low, high, table, bound, problem.first, problem.last)
        if row is None:
            return None
        offsets.append(offset)
        patches.append(row)
    every = np.array(offsets, dtype=np.int64)
    ends = np.concatenate([problem.low * factors + every, problem.high * factors + every])
    return every, tuple(patches), signed_bits(int(ends.min()), int(ends.max()))


def _most_covered(least: np.ndarray, most: np.ndarray) -> int:
    """A number in as many of the intervals as can be, each given by its lower or upper end or both."""
    if not len(least):
        return int(most.min())
    least, most = np.sort(least), np.sort(most)
    satisfied = np.arange(1, len(least) + 1) - np.searchsorted(most, least, side="left")
    at = int(satisfied.argmax())
    ends = most[most >= least[at]]
    top = min([int(ends[0])] if len(ends) else [int(least[at])])
    if at + 1 < len(least):
        top = min(top, int(least[at + 1]))
    return (int(least[at]) + top) // 2


def _patches(
    m: int, offset: int, low: int, high: int, table: np.ndarray, bound: np.ndarray, first: int, last: int
) -> tuple[tuple[int, int], ...] | None:
    """Sums of one row where the arithmetic is wrong, with their ranks; None if they are too many."""
    if m == 0:
        constant = min(max(int(np.searchsorted(bound, offset, side="right")), first), last)
        made = np.where(np.arange(len(table)) < constant, low, high + 1)
    else:
        made = np.clip(-((offset - bound) // m), low, high + 1)  # ceil((bound - offset) / m)
        made[:first], made[last:] = low, high + 1
    wrong: set[int] = set()
    for a, b in zip(table[made != table], made[made != table], strict=True):
        if abs(int(a) - int(b)) > MAX_PATCHES:
            return None
        wrong.update(range(min(int(a), int(b)), max(int(a), int(b))))
    if len(wrong) > MAX_PATCHES:
        return None
    return tuple((s, int(np.searchsorted(table, s, side="right"))) for s in sorted(wrong))


def _searched(layer: Layer, problem: _Problem) -> Iterator[Affine]:
    """Arithmetic that brings the sums of all rows to one scale, and one list of levels for all rows."""
    if layer.line is None or layer.spec.out_factors:
        return
    gain, bias = layer.line[:, 0], layer.line[:, 1]
    if (gain <= 0).any():
        return
    for size in range(2, MAX_FACTOR_BITS + 1):
        shift = size - 1 - int(np.floor(np.log2(gain.max())))
        factors = np.rint(gain * 2.0**shift)
        reach = np.abs(np.rint(bias * 2.0**shift)) + np.maximum(np.abs(problem.low), problem.high) * factors
        if reach.max() >= 2.0 ** (MAX_BITS - 1) or factors.min() < 1:
            continue
        m, b = factors.astype(np.int64), np.rint(bias * 2.0**shift).astype(np.int64)
        bounds = _common(problem, m, b)
        patches = []
        for row in range(len(m)):
            one = _patches(
                int(m[row]), int(b[row]), int(problem.low[row]), int(problem.high[row]), problem.table[row], bounds,
                problem.first, problem.last,
            )  # fmt: skip
            if one is None:
                break
            patches.append(one)
        else:
            ends = np.concatenate([problem.low * m + b, problem.high * m + b])
            width = signed_bits(int(ends.min()), int(ends.max()))
            kind: Kind = "constant" if (m == m[0]).all() else "runtime"
            yield Affine(kind, m, b, width, 0, problem.first, problem.last, bounds, tuple(patches))
            if not any(patches):  # larger factors only cost more
                return


def _common(problem: _Problem, m: np.ndarray, b: np.ndarray) -> np.ndarray:
    """One bound for each level that keeps the thresholds of as many rows as can be, ascending."""
    low, high = problem.low, problem.high
    bounds = np.empty(problem.table.shape[1], np.int64)
    for k, column in enumerate(problem.table.T):
        least = ((column - 1) * m + b + 1)[column > low]
        most = (column * m + b)[column <= high]
        bounds[k] = _most_covered(least, most)
    return np.maximum.accumulate(bounds)


def _effort(a: Affine, layer: Layer) -> float:
    """About the LUTs of the arithmetic: only to choose among exact ones."""
    acc = layer.acc_bits
    k = a.factor_bits
    multiply = {"constant": 0.4 * acc * k, "shift": 1.0 * acc * k, "runtime": (k // 2 + 1) * (acc + 2)}[a.kind]
    one = int(a.factors[0])
    if a.kind == "constant" and one & (one - 1) == 0:
        multiply = 0.0
    search = 0 if a.bounds is None else 2.3 * a.bits * (len(a.bounds) + 1).bit_length()
    return float(multiply + 2 * a.bits + search + a.patch_slots * 1.4 * acc)


def code_of(layer: Layer, rank: int) -> int:
    """Bit pattern of the level of this rank."""
    fmt = layer.spec.out
    assert fmt is not None
    return encode(levels(fmt)[rank], fmt)

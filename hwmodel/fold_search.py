"""The best folds of the layers of a chain: the fewest LUTs within a latency, or the fewest cycles within LUTs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hwmodel.cost import HwError
from hwmodel.fabric import kept
from hwmodel.folding import Fold, buffer_cost, chained, end_cost, folds, predict
from hwmodel.spec import LayerSpec


@kept
def front(spec: LayerSpec, port: int | None = None) -> tuple[Fold, ...]:
    """The folds that no other beats in cycles and LUTs wherever they stand, by ascending cycles.

    Buffers depend on the columns at once and, behind the layer, on its converters: only folds equal in both compare.
    """
    kept: list[Fold] = []
    least: dict[tuple[int, int], float] = {}
    for fold in sorted(folds(spec, port), key=lambda f: (f.cycles, f.cost.luts, f.cost.bram18)):
        if fold.cost.luts < least.get((fold.simd, fold.units), math.inf):
            least[fold.simd, fold.units] = fold.cost.luts
            kept.append(fold)
    return tuple(kept)


Ports = Sequence[int | None] | None
"""For each layer the `port` of `folding.layer_fold`; None: no DSPs anywhere."""


def fronts_of(specs: Sequence[LayerSpec], ports: Ports) -> list[tuple[Fold, ...]]:
    """The front of each layer."""
    return [front(spec, port) for spec, port in zip(specs, ports or [None] * len(specs), strict=True)]


def search_folding(
    specs: Sequence[LayerSpec],
    *,
    latency_us: float | None = None,
    luts: float | None = None,
    clock_mhz: float = 100.0,
    ports: Ports = None,
) -> tuple[Fold, ...]:
    """The fewest LUTs within `latency_us`, or the fewest cycles within `luts`.

    With neither, the fewest LUTs within `default_cycles`, or the fastest there is if that is slower.
    Exact over the folds, the buffers between the layers included: partial sums of (cycles, LUTs) are dropped only when
    another with as many converters at its end is no worse in both. `HwError` names the nearest design and what binds
    where the target cannot be met.
    """
    if latency_us is not None and luts is not None:
        raise HwError("give a latency or a LUT budget, not both")
    if not specs:
        raise HwError("there are no layers to fold")
    if latency_us is not None:
        return cheapest(specs, math.floor(latency_us * clock_mhz + 1e-9), clock_mhz=clock_mhz, ports=ports)
    if luts is None:
        quickest = sum(options[0].cycles for options in fronts_of(specs, ports))
        return cheapest(specs, max(default_cycles(specs), quickest), clock_mhz=clock_mhz, ports=ports)
    return fastest(specs, luts, clock_mhz=clock_mhz, ports=ports)


def default_cycles(specs: Sequence[LayerSpec]) -> int:
    """The latency aimed at when none is asked for: 64 multiply-accumulates per cycle, but 1,000 cycles at least."""
    return max(1000, math.ceil(sum(spec.macs for spec in specs) / 64))


def whole(count: float) -> int:
    """A count of cells, rounded up."""
    return math.ceil(count - 1e-9)


def cheapest(
    specs: Sequence[LayerSpec], cycles: int, *, clock_mhz: float = 100.0, ports: Ports = None
) -> tuple[Fold, ...]:
    """The folds with the fewest LUTs whose cycles add up to at most `cycles`."""
    fronts = fronts_of(specs, ports)
    quickest = [options[0].cycles for options in fronts]
    points = _combine(_tables(tuple(specs), _key(ports)), max_cycles=max(cycles, sum(quickest)))
    found = _trace(fronts, points, int(np.lexsort((points[-1].cycles, points[-1].luts))[0]))
    if sum(quickest) > cycles:
        slow = max(range(len(specs)), key=lambda i: quickest[i])
        raise HwError(
            f"{cycles / clock_mhz:g} us at {clock_mhz:g} MHz cannot be met: "
            f"the nearest is {sum(quickest) / clock_mhz:g} us "
            f"({sum(quickest)} cycles, {_luts(found)} LUTs), "
            f"bound by layer {specs[slow].name!r} with {quickest[slow]} cycles at full parallelism"
        )
    return found


def fastest(
    specs: Sequence[LayerSpec], luts: float, *, clock_mhz: float = 100.0, ports: Ports = None
) -> tuple[Fold, ...]:
    """The folds with the fewest cycles whose LUTs add up to at most `luts`."""
    fronts = fronts_of(specs, ports)
    tables = _tables(tuple(specs), _key(ports))
    points = _combine(tables, max_luts=luts)
    if len(points[-1].luts) == 0:
        every = _combine(tables)
        found = _trace(fronts, every, int(np.argmin(every[-1].luts)))
        big = max(found, key=lambda fold: fold.cost.luts)
        raise HwError(
            f"{luts:g} LUTs cannot be met: the nearest is {_luts(found)} LUTs "
            f"({sum(fold.cycles for fold in found) / clock_mhz:g} us), bound by layer {big.spec.name!r} with "
            f"{whole(big.cost.luts)} LUTs at PE = {big.pe}, SIMD = {big.simd}"
        )
    return _trace(fronts, points, int(np.lexsort((points[-1].luts, points[-1].cycles))[0]))


def _luts(chosen: Sequence[Fold]) -> int:
    return sum(whole(cost.luts) for cost in predict(chosen))


@dataclass(frozen=True, slots=True, eq=False)
class Points:
    """Sums over the layers so far, one array element each: how they came about, and the converters at their end."""

    cycles: np.ndarray
    luts: np.ndarray
    before: np.ndarray
    fold: np.ndarray
    units: np.ndarray


@dataclass(frozen=True, slots=True, eq=False)
class _Table:
    """The front of one layer as arrays (folds,); luts (numbers of converters that may write to it, folds).

    known: these numbers, ascending.
    """

    cycles: np.ndarray
    units: np.ndarray
    known: np.ndarray
    luts: np.ndarray


def _combine(tables: Sequence[_Table], max_cycles: float = math.inf, max_luts: float = math.inf) -> list[Points]:
    """After each layer, the nondominated sums of (cycles, LUTs) that can still meet the limit."""
    left_cycles = sum(int(table.cycles[0]) for table in tables)
    left_luts = sum(int(table.luts.min()) for table in tables)
    zero = np.zeros(1, np.int64)
    last = Points(zero, zero, zero, zero, zero)
    points: list[Points] = []
    for table in tables:
        left_cycles -= int(table.cycles[0])
        left_luts -= int(table.luts.min())
        cycles = (last.cycles[:, None] + table.cycles).ravel()
        luts = (last.luts[:, None] + table.luts[np.searchsorted(table.known, last.units)]).ravel()
        units = np.tile(table.units, len(last.cycles))
        alive = np.flatnonzero((cycles + left_cycles <= max_cycles) & (luts + left_luts <= max_luts))
        order = alive[np.lexsort((luts[alive], cycles[alive], units[alive]))]
        keep = order[_descents(units[order], luts[order])]
        last = Points(cycles[keep], luts[keep], keep // len(table.cycles), keep % len(table.cycles), units[keep])
        points.append(last)
    return points


def _descents(group: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Whether each value is below all before it in its group (groups stand together): bool, the same shape.

    >>> _descents(np.array([1, 1, 1, 2, 2]), np.array([5, 7, 4, 9, 9])).tolist()
    [True, False, True, True, False]
    """
    if not len(values):
        return np.zeros(0, bool)
    span = int(values.max()) + 1
    falling = values - np.cumsum(np.diff(group, prepend=group[0]) != 0) * span  # every group lies below the one before
    least = np.minimum.accumulate(falling)
    return np.concatenate(([True], falling[1:] < least[:-1]))


@kept
def _tables(specs: tuple[LayerSpec, ...], ports: tuple[int | None, ...] | None) -> tuple[_Table, ...]:
    """For each layer what `_combine` adds up: the same for every target."""
    fronts = fronts_of(specs, ports)
    linear, end = chained(specs), fronts[-1][0]
    found = []
    for i, options in enumerate(fronts):
        alone = [whole(fold.cost.luts) for fold in options]
        known = np.unique([fold.units for fold in fronts[i - 1]]) if i else np.zeros(1, np.int64)
        more = np.zeros((len(known), len(options)), np.int64)
        if linear and i == 0:
            first = [buffer_cost(fold, fold.simd) + end_cost(fold, end.spec, end.acc_bits) for fold in options]
            more[0] = [whole(cost.luts) for cost in first]
        elif linear:
            more[:] = [[whole(buffer_cost(fold, int(write)).luts) for fold in options] for write in known]
        cycles = np.array([fold.cycles for fold in options])
        found.append(_Table(cycles, np.array([fold.units for fold in options]), known, more + alone))
    return tuple(found)


def _key(ports: Ports) -> tuple[int | None, ...] | None:
    return None if ports is None else tuple(ports)


def _trace(fronts: list[tuple[Fold, ...]], points: list[Points], index: int) -> tuple[Fold, ...]:
    chosen: list[Fold] = []
    for options, at in zip(reversed(fronts), reversed(points), strict=True):
        chosen.append(options[int(at.fold[index])])
        index = int(at.before[index])
    return tuple(reversed(chosen))

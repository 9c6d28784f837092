"""How many rows (PE) and columns (SIMD) of each layer work at once, and the best choice of all.

A layer of R x C weights at PE x SIMD takes, for `positions` outputs, without overlap of layers,

    cycles = (R / PE) * (C / SIMD) * positions + fill
    fill   = 1 (memory) + product and tree stages + converter stages + results waiting per converter

and the network's latency is the sum over layers: a layer starts when the one before it is done.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import numpy as np

from hwmodel.accumulator import type_bound
from hwmodel.convert import Converter, converters, group_cost, group_scale_bits
from hwmodel.cost import ZERO, Cost, HwError
from hwmodel.devices import Device
from hwmodel.formats import Block, Format, bits
from hwmodel.layer import frame, operands, sequencer, stream_ends, sum_codes, threshold_cost
from hwmodel.mac import Mapping, mac_cost, pipeline_stages
from hwmodel.memory import Memory, ram, rom
from hwmodel.spec import LayerSpec, PerGroup

BRAM_IN_LUTS = 288
"""LUT6 that hold the bits of one 18 Kb block RAM: only for choosing between converters."""


@dataclass(frozen=True, slots=True)
class Fold:
    """One layer at one parallelism: cost of everything it needs, its cycles, and what was chosen.

    units: converters, each serving pe / units elements in turn.
    """

    spec: LayerSpec
    pe: int
    simd: int
    cost: Cost
    cycles: int
    weights: Memory
    converter: str
    acc_bits: int
    units: int


def divisors(n: int) -> list[int]:
    """Ascending divisors of n.

    >>> divisors(12)
    [1, 2, 3, 4, 6, 12]
    """
    small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return small + [n // d for d in reversed(small) if d * d != n]


def acc_bits(spec: LayerSpec) -> int:
    """Bits of the layer's accumulator: given, or the type bound over one row (one group of a row)."""
    weight, act = _formats(spec)
    if spec.acc_bits is not None:
        return spec.acc_bits
    length = spec.granularity.size if isinstance(spec.granularity, PerGroup) else spec.in_features
    return type_bound(weight, act, length)


def _formats(spec: LayerSpec) -> tuple[Format, Format]:
    if spec.weight is None or spec.act is None:
        side = "weights" if spec.weight is None else "inputs"
        raise HwError(
            f"layer {spec.name!r}: its {side} are in floating point, which this model does not cost; "
            "accepted: int1..int8, int16, uint1..uint8, uint16, minifloats such as e2m1, ternary, binary"
        )
    for side, fmt in (("inputs", spec.act), ("outputs", spec.out)):
        if isinstance(fmt, Block):
            raise HwError(
                f"layer {spec.name!r}: its {side} are scaled in blocks at run time ({fmt}), which this model does not "
                f"cost; accepted: formats with one fixed scale such as {fmt.elem}"
            )
    return spec.weight, spec.act


@cache
def folds(spec: LayerSpec, mapping: Mapping = "lut") -> tuple[Fold, ...]:
    """Every fold of a layer whose PE divides its rows and whose SIMD divides its columns (and its groups)."""
    columns = spec.in_features
    if isinstance(spec.granularity, PerGroup):
        if columns % spec.granularity.size:
            raise HwError(f"layer {spec.name!r}: groups of {spec.granularity.size} do not divide {columns} columns")
        columns = spec.granularity.size
    return tuple(
        layer_fold(spec, pe, simd, mapping) for simd in divisors(columns) for pe in divisors(spec.out_features)
    )


@cache
def layer_fold(spec: LayerSpec, pe: int, simd: int, mapping: Mapping = "lut") -> Fold:
    """The layer with `pe` rows and `simd` columns at once."""
    weight, act = _formats(spec)
    if spec.out_features % pe or spec.in_features % simd:
        raise HwError(f"layer {spec.name!r}: {pe} x {simd} does not divide {spec.out_features} x {spec.in_features}")
    width = acc_bits(spec)
    row_folds, column_folds = spec.out_features // pe, spec.in_features // simd
    words = row_folds * column_folds
    stages = pipeline_stages(weight, act, simd)

    grouping, sum_bits = group_cost(spec, width, mapping)
    extra = (mac_cost(weight, act, width, simd, mapping) * pe) + grouping * pe
    if group_bits := group_scale_bits(spec):
        groups = spec.in_features // spec.granularity.size  # type: ignore[union-attr]
        extra += rom(pe * group_bits, row_folds * groups).cost
    if spec.positions > 1:  # a buffer of two columns and one more counter: nothing emits convolutions yet
        extra += ram(simd * bits(act), 2 * column_folds).cost
        counted = (spec.positions - 1).bit_length()
        extra += Cost(luts=counted, ffs=counted)
    else:
        extra += operands(bits(act), simd, column_folds, 1)

    fill = 1 + stages + (2 if grouping.luts else 0)
    best: tuple[float, Cost, int, str, int] | None = None
    fewest = next(n for n in divisors(pe) if n * column_folds >= pe)
    for units in {fewest, pe}:
        around = extra + frame(spec, pe, simd, units, sum_bits)
        for unit in converters(spec, sum_bits, mapping):
            total = around + _converting(spec, sum_bits, units, unit)
            key = total.luts + BRAM_IN_LUTS * total.bram18
            if best is None or key < best[0]:
                best = (key, total, units, unit.method, unit.stages)
    assert best is not None
    _, cost, units, method, converter_stages = best
    cycles = words * spec.positions + fill + converter_stages + pe // units - 1
    weights = rom(pe * simd * bits(weight), words)
    return Fold(spec, pe, simd, cost, cycles, weights, method, width, units)


def _converting(spec: LayerSpec, sum_bits: int, units: int, unit: Converter) -> Cost:
    """All converters of a layer with the memories they read."""
    if unit.method == "thresholds":
        return threshold_cost(spec, sum_bits, units)
    if unit.method == "sum":
        return sum_codes(spec, sum_bits) * units
    one = unit.cost
    for memory_width, per_row in unit.memory:
        one += rom(memory_width, spec.out_features // units * per_row).cost
    return one * units


def stream_costs(chosen: Sequence[Fold]) -> list[Cost]:
    """What each layer of a chain of linear layers takes beyond its fold's own cost.

    A fold is priced with an input buffer that is written one code at a time; in the chain, the layer before it
    writes as many codes as it has converters, and the host as many as the first layer reads. The last layer
    also has the stream's counters and the output register. All zero where the layers are no such chain.
    """
    specs = [fold.spec for fold in chosen]
    chained = all(a.out_features == b.in_features and a.out is not None for a, b in pairwise(specs))
    if not chained or any(spec.positions > 1 for spec in specs):
        return [ZERO] * len(chosen)
    found = []
    for i, fold in enumerate(chosen):
        width, columns = bits(_formats(fold.spec)[1]), fold.spec.in_features // fold.simd
        write = fold.simd if i == 0 else chosen[i - 1].units
        assumed = operands(width, fold.simd, columns, 1)
        found.append(operands(width, fold.simd, columns, write) + assumed * -1)
    first, last = chosen[0], chosen[-1]
    if last.spec.out is None:
        beats = first.spec.in_features // first.simd
        found[-1] += stream_ends(beats, last.acc_bits * last.spec.out_features)
    return found


def control(column_folds: int, row_folds: int, positions: int) -> Cost:
    """Counters and addresses of a folded layer."""
    counted = (positions - 1).bit_length()
    return sequencer(column_folds, row_folds) + Cost(luts=counted, ffs=counted)


@cache
def front(spec: LayerSpec, mapping: Mapping = "lut") -> tuple[Fold, ...]:
    """The folds that no other beats in cycles and LUTs: ascending cycles, strictly descending LUTs."""
    kept: list[Fold] = []
    for fold in sorted(folds(spec, mapping), key=lambda f: (f.cycles, f.cost.luts, f.cost.bram18)):
        if not kept or fold.cost.luts < kept[-1].cost.luts:
            kept.append(fold)
    return tuple(kept)


def search_folding(
    specs: Sequence[LayerSpec],
    device: Device,
    *,
    latency_us: float | None = None,
    luts: float | None = None,
    clock_mhz: float = 100.0,
    mapping: Mapping = "lut",
) -> tuple[Fold, ...]:
    """The fewest LUTs within `latency_us`, or the fewest cycles within `luts` (default: all of the device's).

    Exact: partial sums of (cycles, LUTs) are dropped only when another is no worse in both.
    """
    if latency_us is not None and luts is not None:
        raise HwError("give a latency or a LUT budget, not both")
    if not specs:
        raise HwError("there are no layers to fold")
    if latency_us is not None:
        return cheapest(specs, math.floor(latency_us * clock_mhz + 1e-9), clock_mhz=clock_mhz, mapping=mapping)
    return fastest(specs, device.luts if luts is None else luts, clock_mhz=clock_mhz, mapping=mapping)


def cheapest(
    specs: Sequence[LayerSpec], cycles: int, *, clock_mhz: float = 100.0, mapping: Mapping = "lut"
) -> tuple[Fold, ...]:
    """The folds with the fewest LUTs whose cycles add up to at most `cycles`."""
    fronts = [front(spec, mapping) for spec in specs]
    quickest = [f[0].cycles for f in fronts]
    if sum(quickest) > cycles:
        slow = max(range(len(specs)), key=lambda i: quickest[i])
        raise HwError(
            f"{cycles / clock_mhz:g} us at {clock_mhz:g} MHz cannot be met: "
            f"the nearest is {sum(quickest) / clock_mhz:g} us "
            f"({sum(quickest)} cycles, {math.ceil(sum(f[0].cost.luts for f in fronts))} LUTs), "
            f"bound by layer {specs[slow].name!r} with {quickest[slow]} cycles at full parallelism"
        )
    points = _combine(fronts, max_cycles=cycles)
    return _trace(fronts, points, len(points[-1][0]) - 1)  # most cycles, hence fewest LUTs


def fastest(
    specs: Sequence[LayerSpec], luts: float, *, clock_mhz: float = 100.0, mapping: Mapping = "lut"
) -> tuple[Fold, ...]:
    """The folds with the fewest cycles whose LUTs add up to at most `luts`."""
    fronts = [front(spec, mapping) for spec in specs]
    smallest = [f[-1].cost.luts for f in fronts]
    if math.ceil(sum(smallest)) > luts:
        big = max(range(len(specs)), key=lambda i: smallest[i])
        cycles = sum(f[-1].cycles for f in fronts)
        raise HwError(
            f"{luts:g} LUTs cannot be met: the nearest is {math.ceil(sum(smallest))} LUTs ({cycles / clock_mhz:g} us), "
            f"bound by layer {specs[big].name!r} with {math.ceil(smallest[big])} LUTs at PE = {fronts[big][-1].pe}, "
            f"SIMD = {fronts[big][-1].simd}"
        )
    points = _combine(fronts, max_luts=luts)
    return _trace(fronts, points, 0)


Points = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]  # cycles, luts, index before, index of the fold


def _combine(fronts: list[tuple[Fold, ...]], max_cycles: float = math.inf, max_luts: float = math.inf) -> list[Points]:
    """After each layer, the nondominated sums of (cycles, LUTs) that can still meet the limit."""
    cycles, luts = np.zeros(1), np.zeros(1)
    left_cycles = sum(f[0].cycles for f in fronts)
    left_luts = sum(f[-1].cost.luts for f in fronts)
    points: list[Points] = []
    for options in fronts:
        left_cycles -= options[0].cycles
        left_luts -= options[-1].cost.luts
        all_cycles = np.add.outer(cycles, [f.cycles for f in options])
        all_luts = np.add.outer(luts, [f.cost.luts for f in options])
        flat_cycles, flat_luts = all_cycles.ravel(), all_luts.ravel()
        alive = np.flatnonzero((flat_cycles + left_cycles <= max_cycles) & (flat_luts + left_luts <= max_luts + 1e-6))
        order = alive[np.lexsort((flat_luts[alive], flat_cycles[alive]))]
        sorted_luts = flat_luts[order]
        best_before = np.minimum.accumulate(np.concatenate(([math.inf], sorted_luts[:-1])))
        keep = order[sorted_luts < best_before - 1e-9]
        cycles, luts = flat_cycles[keep], flat_luts[keep]
        points.append((cycles, luts, keep // len(options), keep % len(options)))
    return points


def _trace(fronts: list[tuple[Fold, ...]], points: list[Points], index: int) -> tuple[Fold, ...]:
    chosen: list[Fold] = []
    for options, (_, _, before, fold) in zip(reversed(fronts), reversed(points), strict=True):
        chosen.append(options[int(fold[index])])
        index = int(before[index])
    return tuple(reversed(chosen))

"""How many rows (PE) and columns (SIMD) of each layer work at once, and the best choice of all.

A layer of R x C weights at PE x SIMD takes, for `positions` outputs, without overlap of layers,

    cycles = (R / PE) * (C / SIMD) * positions + fill
    fill   = 1 (memory) + product and tree stages + converter stages + results waiting per converter

(of a convolution whose window is known, `conv.waits` more and the cycles in which input is missing: `conv`)
and the network's latency is the sum over layers: a layer starts when the one before it is done.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from hwmodel import conv, gru, joint, lstm, pool
from hwmodel.accumulator import type_bound
from hwmodel.convert import converters, group_cost, group_scale_bits
from hwmodel.cost import ZERO, Cost, HwError
from hwmodel.devices import Device
from hwmodel.fabric import kept
from hwmodel.formats import Block, Format, bits
from hwmodel.layer import choice, elements, frame, operands, slack_beside, stream_ends
from hwmodel.mac import mac_cost, pipeline_stages
from hwmodel.memory import Memory, ram, rom
from hwmodel.packing import Packing, divisors, field_columns, packed_cost, packing
from hwmodel.spec import CELL_GATES, LayerSpec, PerGroup, links

BRAM_IN_LUTS = 288
"""LUT6 that hold the bits of one 18 Kb block RAM: only for choosing between converters."""


@dataclass(frozen=True, slots=True)
class Fold:
    """One layer at one parallelism: cost of everything it needs, its cycles, and what was chosen.

    units: converters, each serving pe / units elements in turn. pack: how products share DSPs whose wide port has
    `port` bits; None where they are made of LUTs. unrolled: weights are in the logic (`hwmodel.unroll`). parts: of a
    recurrent cell the products with its input, whose SIMD this one has, and with its state, for one unit at a time.
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
    pack: Packing | None = None
    port: int = 25
    unrolled: bool = False
    parts: tuple[Fold, Fold] | None = None

    @property
    def row_folds(self) -> int:
        """Rows that an element computes one after the other."""
        return self.spec.out_features // self.pe

    @property
    def column_folds(self) -> int:
        """Cycles of one dot product."""
        return self.spec.in_features // self.simd

    @property
    def lanes(self) -> int:
        """Input codes read at once: SIMD, or PE where every row has a channel of its own."""
        return self.pe if self.spec.joint or self.spec.pool or conv.depthwise(self.spec) else self.simd

    @property
    def stream(self) -> conv.Stream:
        """How the window of the layer streams."""
        if self.spec.joint:
            return joint.stream(self.spec, self.pe)
        return conv.stream(self.spec, self.pe, self.simd, self.units)

    @property
    def schedule(self) -> conv.Schedule:
        """When the positions of the layer's window start."""
        if self.spec.joint:
            return conv.Schedule(1, 0, joint.beats(self.spec, self.pe))
        found, window = self.stream, self.spec.window
        assert window is not None
        return conv.schedule(window, found.words, found.lines, found.period, self.share)

    @property
    def depth(self) -> int:
        """Results of a layer with a window that wait at most."""
        if self.spec.joint:
            return self.cycles - self.schedule.input_beats + 1
        found = self.stream
        rest = self.cycles - self.schedule.stalls - self.spec.positions * found.period - conv.waits(self.spec)
        return conv.depth(found, rest)

    @property
    def stage(self) -> conv.Stage:
        """The layer with its window as a stage of `flow`."""
        found, window = self.stream, self.spec.window
        assert window is not None
        tail = self.cycles - self.schedule.stalls - self.spec.positions * found.period - 1
        return conv.Stage(window, found, tail, self.row_folds, self.share, self.depth)

    @property
    def share(self) -> int:
        """Elements that take turns at one converter."""
        return self.pe // self.units


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


@kept
def folds(spec: LayerSpec, port: int | None = None) -> tuple[Fold, ...]:
    """Every fold of a layer whose PE divides its rows and whose SIMD divides its columns (and its groups).

    With a window only those that its words allow (`conv.foldable`).

    With DSPs only those whose rows at once fill them: as many products share each DSP as the formats allow.
    """
    if spec.joint:
        return tuple(joint_fold(spec, pe) for pe in divisors(spec.out_features))
    if spec.pool:
        return tuple(pool_fold(spec, pe) for pe in divisors(spec.out_features))
    if spec.recurrence is not None:
        return tuple(
            cell_fold(spec, x, h, port) for h in divisors(spec.out_features) for x in divisors(spec.in_features)
        )
    columns = spec.in_features
    if isinstance(spec.granularity, PerGroup):
        columns = math.gcd(columns, spec.granularity.size)
    rows = divisors(spec.out_features)
    if port is not None:
        packs = [packing(*_formats(spec), port, pe) for pe in rows]
        lanes = [1 if pack is None else pack.lanes for pack in packs]
        rows = [pe for pe, n in zip(rows, lanes, strict=True) if n == max(lanes)]
    pairs = [(pe, simd) for simd in divisors(columns) for pe in rows]
    if spec.window is not None:
        pairs = [pair for pair in pairs if conv.foldable(spec, *pair)]
    return tuple(layer_fold(spec, pe, simd, port) for pe, simd in pairs)


@kept
def cell_fold(spec: LayerSpec, simd: int, state_simd: int, port: int | None = None) -> Fold:
    """A GRU or an LSTM with `simd` columns of its input and `state_simd` of its state at once.

    The state's product starts `lead` units before the input's ends, and the gates follow the last unit of it.
    """
    kept, gates = spec.recurrence, CELL_GATES[spec.op]
    rows, kind = gates * spec.out_features, lstm if spec.op == "lstm" else gru
    _formats(spec)
    assert kept is not None
    sides = (
        (spec.in_features, simd, spec.act, spec.acc_bits),
        (spec.out_features, state_simd, kept.state, kept.acc_bits),
    )
    products = []
    for name, (columns, at_once, act, width) in zip(("input", "state"), sides, strict=True):
        product = LayerSpec(f"{spec.name}.{name}", "linear", rows, columns, weight=spec.weight, act=act, acc_bits=width)
        products.append(layer_fold(product, gates, at_once, port, gates))
    x, h = products
    cost = x.cost + h.cost + kind.gates_cost(spec)
    cost += operands(kept.state.bits, state_simd, h.column_folds, 1) * -1  # the state is its own buffer
    cost += Cost(luts=choice(h.column_folds) * state_simd * kept.state.bits, ffs=state_simd * kept.state.bits)
    cycles = x.cycles - lead(x, h) * x.column_folds + h.cycles - 2 + kind.GATES + kept.coded + (spec.out is None)
    return Fold(spec, 1, simd, cost, cycles, x.weights, "gates", kept.state.bits, 1, parts=(x, h))


@kept
def joint_fold(spec: LayerSpec, pe: int) -> Fold:
    """An "add" or a "mean" with `pe` channels a beat."""
    width = acc_bits(spec)
    found, cost = min(joint.options(spec, pe, width), key=lambda one: one[1].luts + BRAM_IN_LUTS * one[1].bram18)
    cycles = joint.beats(spec, pe) + joint.depth(found) - 1
    return Fold(spec, pe, 1, cost, cycles, Memory("none", 0, 0, ZERO), found.method, width, pe)


@kept
def pool_fold(spec: LayerSpec, pe: int) -> Fold:
    """A "max" or an "average" with `pe` channels at once."""
    width = acc_bits(spec)
    found, cost = min(pool.options(spec, pe, width), key=lambda one: one[1].luts + BRAM_IN_LUTS * one[1].bram18)
    at = conv.stream(spec, pe, 1, pe)
    assert spec.window is not None
    stalls = conv.schedule(spec.window, at.words, at.lines, at.period, 1).stalls
    cycles = spec.positions * at.period + stalls + pool.BEHIND + 1 + found.stages
    return Fold(spec, pe, 1, cost, cycles, Memory("none", 0, 0, ZERO), found.method, width, pe)


def lead(x: Fold, h: Fold) -> int:
    """Units whose input products are still to come when the first product with the state may start.

    As many as let every unit's sum with the input be there a cycle before its sum with the state.
    """
    return min(x.row_folds - 1, (h.cycles - 2) // x.column_folds)


@kept
def layer_fold(spec: LayerSpec, pe: int, simd: int, port: int | None = None, units: int | None = None) -> Fold:
    """The layer with `pe` rows and `simd` columns at once.

    port: bits of the wide port of the DSPs that multiply where their packing serves the formats; None: all in LUTs.
    units: converters; None: the cheapest number of them.
    """
    weight, act = _formats(spec)
    if spec.out_features % pe or spec.in_features % simd:
        raise HwError(f"layer {spec.name!r}: {pe} x {simd} does not divide {spec.out_features} x {spec.in_features}")
    if spec.window is not None and not conv.foldable(spec, pe, simd):
        raise HwError(
            f"layer {spec.name!r}: {pe} x {simd} does not divide the rows and channels of its window's groups"
        )
    width = acc_bits(spec)
    row_folds, column_folds = spec.out_features // pe, spec.in_features // simd
    words = row_folds * column_folds
    stages = pipeline_stages(weight, act, simd)

    own = conv.depthwise(spec)
    pack = None if port is None or own else packing(weight, act, port, pe)
    grouping, sum_bits = group_cost(spec, width)
    distinct = None if pack is None else field_columns(pack, weight, words)
    if pack is None:
        stored, extra = bits(weight), mac_cost(weight, act, width, simd) * pe if own else ZERO
    else:
        stored, extra = pack.field, packed_cost(pack, width, simd, pe)
    extra += grouping * pe
    if group_bits := group_scale_bits(spec):
        groups = -(-spec.in_features // spec.granularity.size)  # type: ignore[union-attr]
        extra += rom(pe * group_bits, row_folds * groups).cost
    if spec.window is not None:
        extra += conv.window_cost(spec, conv.stream(spec, pe, simd, pe))
    elif spec.positions > 1:  # a buffer of two columns and one more counter: without its window none is emitted
        extra += ram(simd * bits(act), 2 * column_folds).cost
        counted = (spec.positions - 1).bit_length()
        extra += Cost(luts=counted, ffs=counted)
    else:
        extra += operands(bits(act), simd, column_folds, 1)

    fill = 1 + stages + (2 if grouping.luts else 0)
    fewest = next(n for n in divisors(pe) if n * column_folds >= pe)
    choices = []
    for n in sorted({fewest, pe} if units is None else {units}):
        around = extra + frame(spec, pe, simd, n, sum_bits, stored, distinct)
        for found in converters(spec, sum_bits, n):
            cost = around + found.cost
            if pack is None and not own:
                cost += elements(weight, act, width, pe, simd, slack_beside(found.method, sum_bits))
            if spec.window is not None:
                leaving = n * (sum_bits if spec.out is None else bits(spec.out))
                rest = fill + found.stages + pe // n - 1
                cost += conv.results_cost(leaving, conv.depth(conv.stream(spec, pe, simd, n), rest))
            choices.append((cost.luts + BRAM_IN_LUTS * cost.bram18, n, found, cost))
    _, units, found, cost = min(choices, key=lambda choice: choice[0])
    cycles = words * spec.positions + fill + found.stages + pe // units - 1
    if spec.window is not None:
        at = conv.stream(spec, pe, simd, units)
        cycles += conv.waits(spec) + conv.schedule(spec.window, at.words, at.lines, at.period, pe // units).stalls
    weights = rom(pe * simd * stored, words)
    return Fold(spec, pe, simd, cost, cycles, weights, found.method, width, units, pack, port or 25)


def stream_costs(chosen: Sequence[Fold]) -> list[Cost]:
    """What each layer of a chain of linear layers takes beyond its fold's own cost.

    A fold is priced with an input buffer that is written one code at a time; in the chain, the layer before it
    writes as many codes as it has converters, and the host as many as the first layer reads. The last layer
    also has the stream's counters and the output register. Of layers with windows, beats are regrouped before all but
    the first. On ECP5 a layer's products are smaller where another layer's path is slower than its own. All zero where
    the layers are no such chain.
    """
    if all(fold.spec.window is not None for fold in chosen):
        return _between_windows(chosen)
    if not _chained([fold.spec for fold in chosen]):
        return [ZERO] * len(chosen)
    found = [
        _buffer(fold, fold.simd if i == 0 else before.units)
        for i, (before, fold) in enumerate(zip([chosen[0], *chosen], chosen, strict=False))
    ]
    found[-1] += _ends(chosen[0], chosen[-1].spec, chosen[-1].acc_bits)
    slack = max(slack_beside(fold.converter, fold.acc_bits) for fold in chosen)
    return [more + _relaxed(fold, slack) for more, fold in zip(found, chosen, strict=True)]


def _between_windows(chosen: Sequence[Fold]) -> list[Cost]:
    """What brings each layer its input from the layers that it reads, and the parting of what several read."""
    reads = links([fold.spec for fold in chosen])
    readers = [sum(found.count(source) for found in reads) for source in range(-1, len(chosen))]
    costs = [ZERO for _ in chosen]
    for i, (sources, fold) in enumerate(zip(reads, chosen, strict=True)):
        for source, act in zip(sources, (fold.spec.act, fold.spec.second), strict=False):
            assert act is not None
            given = chosen[0].lanes if source < 0 else chosen[source].units
            costs[i] += conv.regroup_cost(bits(act), given, fold.lanes) if i or source >= 0 else ZERO
        for source in {*sources}:
            first = next(j for j, found in enumerate(reads) if source in found)
            costs[i] += joint.branch_cost(readers[source + 1]) if first == i else ZERO
    return costs


def queues_of(chosen: Sequence[Fold], depths: Sequence[Sequence[int]]) -> list[Cost]:
    """What the queues of these `depths` (`flow.Flow`) take of each layer."""
    found = []
    for fold, words in zip(chosen, depths, strict=True):
        acts = (fold.spec.act, fold.spec.second)
        each = [joint.queue_cost(fold.lanes * bits(a), n) for a, n in zip(acts, words, strict=False) if a is not None]
        found.append(sum(each, ZERO))
    return found


def _relaxed(fold: Fold, slack_ns: float) -> Cost:
    """What a path of `slack_ns` elsewhere changes in a fold that was priced beside its own converter."""
    own = slack_beside(fold.converter, fold.acc_bits)
    if fold.pack is not None or fold.unrolled or slack_ns <= own:
        return ZERO
    args = (*_formats(fold.spec), fold.acc_bits, fold.pe, fold.simd)
    return elements(*args, slack_ns) + elements(*args, own) * -1


def _chained(specs: Sequence[LayerSpec]) -> bool:
    fits = all(a.out_features == b.in_features and a.out is not None for a, b in pairwise(specs))
    return fits and all(spec.positions == 1 and spec.window is None for spec in specs)


def _buffer(fold: Fold, write: int) -> Cost:
    """What an input buffer written `write` codes at a time takes beyond the one that the fold has."""
    width = bits(_formats(fold.spec)[1])
    assumed = operands(width, fold.simd, fold.column_folds, 1)
    return operands(width, fold.simd, fold.column_folds, write) + assumed * -1


def _ends(first: Fold, last: LayerSpec, width: int) -> Cost:
    return ZERO if last.out is not None else stream_ends(first.column_folds, width * last.out_features)


def predict(chosen: Sequence[Fold]) -> tuple[Cost, ...]:
    """Each layer's cost in the network, the buffers and streams between the layers included, but queues before adds."""
    return tuple(fold.cost + more for fold, more in zip(chosen, stream_costs(chosen), strict=True))


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
"""For each layer the `port` of `layer_fold`; None: no DSPs anywhere."""


def fronts_of(specs: Sequence[LayerSpec], ports: Ports) -> list[tuple[Fold, ...]]:
    """The front of each layer."""
    return [front(spec, port) for spec, port in zip(specs, ports or [None] * len(specs), strict=True)]


def search_folding(
    specs: Sequence[LayerSpec],
    device: Device,
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
    chained = _chained(specs)
    end = fronts[-1][0]
    found = []
    for i, options in enumerate(fronts):
        alone = [whole(fold.cost.luts) for fold in options]
        known = np.unique([fold.units for fold in fronts[i - 1]]) if i else np.zeros(1, np.int64)
        more = np.zeros((len(known), len(options)), np.int64)
        if chained and i == 0:
            more[0] = [whole((_buffer(fold, fold.simd) + _ends(fold, end.spec, end.acc_bits)).luts) for fold in options]
        elif chained:
            more[:] = [[whole(_buffer(fold, int(write)).luts) for fold in options] for write in known]
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

"""Layers with some rows (PE) and columns (SIMD) at work at once: what they take, alone and behind each other.

A layer of R x C weights at PE x SIMD takes, for `positions` outputs, without overlap of layers,

    cycles = (R / PE) * (C / SIMD) * positions + fill
    fill   = 1 (memory) + product and tree stages + converter stages + results waiting per converter

(of a convolution whose window is known, `conv.waits` more and the cycles in which input is missing: `conv`)
and the network's latency is the sum over layers: a layer starts when the one before it is done. `fold_search` chooses.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from hwmodel import conv, gru, joint, lstm, pool
from hwmodel.accumulator import type_bound
from hwmodel.convert import converters, group_cost, group_scale_bits
from hwmodel.cost import ZERO, Cost, HwError
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
    if not chained([fold.spec for fold in chosen]):
        return [ZERO] * len(chosen)
    found = [
        buffer_cost(fold, fold.simd if i == 0 else before.units)
        for i, (before, fold) in enumerate(zip([chosen[0], *chosen], chosen, strict=False))
    ]
    found[-1] += end_cost(chosen[0], chosen[-1].spec, chosen[-1].acc_bits)
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


def chained(specs: Sequence[LayerSpec]) -> bool:
    """Whether each layer reads what the one before it gives, without windows between them."""
    fits = all(a.out_features == b.in_features and a.out is not None for a, b in pairwise(specs))
    return fits and all(spec.positions == 1 and spec.window is None for spec in specs)


def buffer_cost(fold: Fold, write: int) -> Cost:
    """What an input buffer written `write` codes at a time takes beyond the one that the fold has."""
    width = bits(_formats(fold.spec)[1])
    assumed = operands(width, fold.simd, fold.column_folds, 1)
    return operands(width, fold.simd, fold.column_folds, write) + assumed * -1


def end_cost(first: Fold, last: LayerSpec, width: int) -> Cost:
    """The stream's counters and the output register of a chain that ends in sums of `width` bits."""
    return ZERO if last.out is not None else stream_ends(first.column_folds, width * last.out_features)


def predict(chosen: Sequence[Fold]) -> tuple[Cost, ...]:
    """Each layer's cost in the network, the buffers and streams between the layers included, but queues before adds."""
    return tuple(fold.cost + more for fold, more in zip(chosen, stream_costs(chosen), strict=True))

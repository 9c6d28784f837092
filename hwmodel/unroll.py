"""A layer at full parallelism with its weights in the logic: a product is a few shifted adds, nothing is stored.

Each weight is its canonical signed digits. Two neighbouring digits are one sum (2^k +- 1) x that all rows of the column
share, and a tree over the columns adds up what is left: one registered adder of two operands for each sum that
differs from all others, so that no flow merges them back into multiplications, and rows with equal parts share them.
Cost is counted from these sums, that is from the weights themselves.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from hwmodel import fabric
from hwmodel.accumulator import signed_bits, unit_range
from hwmodel.affine import solve, solved, unsolved
from hwmodel.convert import Converter, affine, converters, csd_adds
from hwmodel.cost import Cost, HwError
from hwmodel.devices import Device
from hwmodel.fabric import pricing
from hwmodel.folding import BRAM_IN_LUTS, Fold
from hwmodel.formats import Int, bits
from hwmodel.memory import Memory
from hwmodel.network import Layer, Network

Kind = Literal["input", "wait", "plus", "minus", "rest"]


@dataclass(frozen=True, slots=True)
class Node:
    """A value between low and high, and the registers before it since the inputs.

    kind: input number b; node `a` one cycle later ("wait"); or a + (b << shift), a - (b << shift) where no `a` is zero,
    (b << shift) - a ("rest").
    """

    kind: Kind
    a: int | None
    b: int
    shift: int
    low: int
    high: int
    stage: int

    @property
    def signed(self) -> bool:
        """Whether two's complement is needed."""
        return self.low < 0

    @property
    def width(self) -> int:
        """Bits of its register."""
        return signed_bits(self.low, self.high) - (not self.signed)


@dataclass(frozen=True, slots=True)
class Term:
    """sign * (node << shift)."""

    node: int
    sign: int
    shift: int


@dataclass(slots=True)
class Sums:
    """All sums of a layer: nodes, each after those it reads, and for each row its term, None where all weights are 0.

    stages: registers from the inputs to the sums.
    """

    nodes: list[Node] = field(default_factory=list)
    rows: list[Term | None] = field(default_factory=list)
    stages: int = 0
    known: dict[tuple[Kind, int | None, int, int], int] = field(default_factory=dict)

    def node(self, kind: Kind, a: int | None, b: int, shift: int, ends: tuple[int, int], stage: int) -> int:
        """The number of this node, the same for the same operation."""
        key = (kind, a, b, shift)
        if key not in self.known:
            self.known[key] = len(self.nodes)
            self.nodes.append(Node(kind, a, b, shift, *ends, stage))
        return self.known[key]

    def late(self, node: int, stage: int) -> int:
        """The node's value at a stage."""
        while self.nodes[node].stage < stage:
            at = self.nodes[node]
            node = self.node("wait", node, 0, 0, (at.low, at.high), at.stage + 1)
        return node

    def add(self, x: Term, y: Term, positive: bool) -> Term:
        """x + y. positive: rather than few adders, a term with sign 1 wherever one of the two has it."""
        stage = max(self.nodes[x.node].stage, self.nodes[y.node].stage)
        x, y = (replace(t, node=self.late(t.node, stage)) for t in (x, y))
        if (x.shift, x.node) > (y.shift, y.node):
            x, y = y, x
        if positive and x.shift == y.shift and x.sign < y.sign:
            x, y = y, x
        shift = y.shift - x.shift
        a, b = self.nodes[x.node], self.nodes[y.node]
        low, high = b.low << shift, b.high << shift
        if x.sign == y.sign:
            made = self.node("plus", x.node, y.node, shift, (a.low + low, a.high + high), stage + 1)
        elif positive and x.sign < 0:
            made = self.node("rest", x.node, y.node, shift, (low - a.high, high - a.low), stage + 1)
            return Term(made, 1, x.shift)
        else:
            made = self.node("minus", x.node, y.node, shift, (a.low - high, a.high - low), stage + 1)
        return Term(made, x.sign, x.shift)


def digits(value: int) -> list[tuple[int, int]]:
    """Canonical signed digits (sign, position), ascending, no two adjacent.

    >>> digits(7), digits(-6)
    ([(-1, 0), (1, 3)], [(1, 1), (-1, 3)])
    """
    found, at = [], 0
    while value:
        if value & 1:
            sign = 2 - (value & 3)
            found.append((sign, at))
            value -= sign
        value >>= 1
        at += 1
    return found


def sums_of(layer: Layer, read: np.ndarray | None = None) -> Sums:
    """The sums of a layer. read: bool (rows,), which rows are wanted, by default all.

    `HwError` for inputs that are no integers.
    """
    act = layer.formats[1]
    if not isinstance(act, Int):
        raise HwError(
            f"layer {layer.spec.name!r}: unrolled layers read integers (int1..int16, uint1..uint16), not {act}"
        )
    weights = layer.units.tolist()
    columns = layer.spec.in_features
    found = Sums()
    inputs = [found.node("input", None, j, 0, unit_range(act), 0) for j in range(columns)]

    def block(row: Sequence[int], first: int, count: int, positive: int) -> Term | None:
        """The sum over a block of columns. positive: levels of the tree above which signs do not matter."""
        if count == 1:
            parts = digits(int(row[first]))
            terms = []
            for i in range(0, len(parts), 2):
                one, *other = (Term(inputs[first], sign, at) for sign, at in parts[i : i + 2])
                terms.append(found.add(one, other[0], False) if other else one)
            while len(terms) > 1:
                ahead = terms[::2][len(terms) // 2 :]  # the odd one
                pairs = zip(terms[::2], terms[1::2], strict=False)
                terms = [found.add(x, y, positive > 0) for x, y in pairs] + ahead
            return terms[0] if terms else None
        half = 1 << (count - 1).bit_length() - 1
        x, y = block(row, first, half, positive - 1), block(row, first + half, count - half, positive - 1)
        if x is None or y is None:
            return x or y
        return found.add(x, y, positive > 0)

    for row, wanted in zip(weights, [True] * len(weights) if read is None else read, strict=True):
        term = block(row, 0, columns, 2) if wanted else None
        if term is not None and term.sign < 0:
            at = found.nodes[term.node]
            term = Term(found.node("minus", None, term.node, 0, (-at.high, -at.low), at.stage + 1), 1, term.shift)
        found.rows.append(term)
    found.stages = max((found.nodes[t.node].stage for t in found.rows if t is not None), default=0)
    found.rows = [t and replace(t, node=found.late(t.node, found.stages)) for t in found.rows]
    return found


def adder_luts(found: Sums, node: Node) -> int:
    """LUTs of a node."""
    if node.kind in ("input", "wait"):
        return 0
    b = found.nodes[node.b]
    if node.a is None:
        return fabric.adder(node.width, b.width, False)
    a = found.nodes[node.a]
    if node.kind == "rest":
        return fabric.adder(node.width, max(a.width, b.width + node.shift), False)
    above = max(a.width - node.shift, int(a.signed))
    if above == 0 and node.kind == "plus":
        return 0
    return fabric.adder(node.width - node.shift, max(above, b.width), False)


def sums_cost(found: Sums) -> Cost:
    """Adders, registers, and the shift registers that xc7 makes of three registers in a row."""
    luts = sum(adder_luts(found, node) for node in found.nodes)
    ffs = sum(node.width for node in found.nodes if node.kind != "input")
    if fabric.shift_registers():
        for length, width in _chains(found):
            if length >= 3:
                luts += width
                ffs -= length * width
    return Cost(luts=luts, ffs=ffs)


def _chains(found: Sums) -> Iterator[tuple[int, int]]:
    """Registers in a row of which each but the last is read by the next alone: how many, of how many bits."""
    readers: dict[int, list[int | None]] = {i: [] for i in range(len(found.nodes))}
    for i, node in enumerate(found.nodes):
        for read in _reads(node):
            readers[read].append(i)
    for term in found.rows:
        if term is not None:
            readers[term.node].append(None)
    length: dict[int, int] = {}
    for i, node in enumerate(found.nodes):
        if node.kind == "input":
            continue
        follows = node.kind == "wait" and found.nodes[node.a or 0].kind != "input" and len(readers[node.a or 0]) == 1
        length[i] = 1 + (length[node.a or 0] if follows else 0)
        (only,) = readers[i] if len(readers[i]) == 1 else (None,)
        if only is None or found.nodes[only].kind != "wait":
            yield length[i], node.width


def _reads(node: Node) -> list[int]:
    match node.kind:
        case "input":
            return []
        case "wait":
            return [node.a]  # type: ignore[list-item]
        case _:
            return [node.b] if node.a is None else [node.a, node.b]


def unrolled_fold(layer: Layer, after: Layer | None = None) -> Fold:
    """The layer unrolled, as a `Fold` of all rows and columns at once.

    Rows that the layer after it multiplies by nothing but zeros cost nothing: synthesis finds that no one reads them.
    """
    spec, act = layer.spec, layer.formats[1]
    rows, columns, acc = spec.out_features, spec.in_features, layer.acc_bits
    read = np.ones(rows, bool) if after is None else (after.units != 0).any(axis=0)
    stages = sums_of(layer).stages
    around = sums_cost(sums_of(layer, read)) + Cost(luts=1, ffs=stages + 1 + columns * bits(act))
    options = [_own_factors(layer, one) for one in converters(spec, acc, rows)]
    best = min(options, key=lambda one: one.cost.luts + BRAM_IN_LUTS * one.cost.bram18)
    cost = around + best.cost * float(read.mean())
    weights = Memory("logic", 0, 1, Cost())
    return Fold(spec, rows, columns, cost, 1 + stages + best.stages, weights, best.method, acc, rows, unrolled=True)


def _own_factors(layer: Layer, one: Converter) -> Converter:
    """The converter of all rows, where each row's factor is a constant of its own."""
    facts = layer.spec.rescale
    if facts is None or not one.method.startswith(("runtime", "shift")):
        return one
    found = solve(layer)
    assert found is not None
    each = affine(facts, layer.acc_bits) * -1
    cost = one.cost
    for factor in found.factors.tolist():
        adds = csd_adds(factor) if factor else 0
        own = replace(facts, kind="constant" if adds else "plain", adds=adds, factor_bits=factor.bit_length())
        cost += each + affine(own, layer.acc_bits)
    return replace(one, cost=cost)


def plan_unrolled(network: Network, device: Device, *, fit: bool = True) -> tuple[Fold, ...]:
    """Every layer unrolled, with exact arithmetic behind its sums.

    fit: `HwError` where the design does not fit the device.
    """
    if unsolved(network):
        network = solved(network)
    with pricing(device.family):
        every = network.products
        plans = tuple(unrolled_fold(layer, after) for layer, after in zip(every, [*every[1:], None], strict=True))
    luts = sum(plan.cost.luts for plan in plans)
    if fit and luts > device.luts:
        raise HwError(
            f"unrolled, the design needs about {luts:,.0f} LUTs, but {device.name} has {device.luts:,}; "
            "leave out --unroll, or choose a larger part"
        )
    return plans


def sum_lines(layer: Layer) -> tuple[int, list[str]]:
    """Registers from `acts` to `values`, and the Verilog between the two."""
    found = sums_of(layer)
    acc, width = layer.acc_bits, bits(layer.formats[1])
    lines = []
    for i, node in enumerate(found.nodes):
        range_ = f"{'signed ' * node.signed}[{node.width - 1}:0]"
        if node.kind == "input":
            lines.append(f"  wire {range_} n{i} = acts[{node.b * width} +: {width}];")
        else:
            lines += [f"  reg {range_} n{i};", *_sum(found, i)]
    for r, term in enumerate(found.rows):
        if term is None:
            lines.append(f"  wire [{acc - 1}:0] row{r} = {acc}'d0;")
        else:
            zeros = f", {term.shift}'d0" if term.shift else ""
            lines.append(f"  wire [{acc - 1}:0] row{r} = {{{_fitted(found, term.node, acc - term.shift)}{zeros}}};")
    values = ", ".join(f"row{r}" for r in reversed(range(len(found.rows))))
    return found.stages, [*lines, f"  wire [{acc * len(found.rows) - 1}:0] values = {{{values}}};"]


def _sum(found: Sums, i: int) -> list[str]:
    """The register of node i."""
    node = found.nodes[i]
    b = _part(found, node.b, 0)
    if node.a is None:
        made = f"-{b}"
    elif node.kind == "wait":
        made = f"n{node.a}"
    elif node.kind == "rest":
        made = f"({b} <<< {node.shift}) - {_part(found, node.a, 0)}"
    elif node.shift == 0:
        made = f"{_part(found, node.a, 0)} {'+' if node.kind == 'plus' else '-'} {b}"
    else:  # the low bits of a stay as they are
        upper = node.width - node.shift
        low = _fitted(found, node.a, node.shift)
        above = f"{_part(found, node.a, node.shift)} {'+' if node.kind == 'plus' else '-'} {b}"
        return [
            f"  wire {'signed ' * node.signed}[{upper - 1}:0] h{i} = {above};",
            f"  always @(posedge clk) n{i} <= {{h{i}, {low}}};",
        ]
    return [f"  always @(posedge clk) n{i} <= {made};"]


def _part(found: Sums, i: int, shift: int) -> str:
    """Node i without its lowest bits, as a signed operand."""
    node = found.nodes[i]
    if shift == 0:
        return f"n{i}" if node.signed else f"$signed({{1'b0, n{i}}})"
    if node.width <= shift:
        return f"$signed(n{i}[{node.width - 1}])" if node.signed else "1'sb0"
    bits_ = f"n{i}[{node.width - 1}:{shift}]"
    return f"$signed({bits_})" if node.signed else f"$signed({{1'b0, {bits_}}})"


def _fitted(found: Sums, i: int, width: int) -> str:
    """Node i cut or extended to `width` bits."""
    node = found.nodes[i]
    if width <= node.width:
        return f"n{i}[{width - 1}:0]"
    fill = f"n{i}[{node.width - 1}]" if node.signed else "1'b0"
    return f"{{{{{width - node.width}{{{fill}}}}}, n{i}}}"

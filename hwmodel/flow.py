"""How layers with windows, sums and means overlap in one design: the registers that decide what moves, by the cycle.

Layers read the network's input or each other's results (`spec.links`). What several read goes to each at its own pace
(`rtl/branch.v`), in beats of as many codes as the reader takes (`rtl/regroup.v`). Of an add's operands the one that
comes first waits in `rtl/queue.v`, whose depth is the least that never refuses a beat while input is offered and
results are taken in every cycle. Pauses cannot bring the design to a standstill that this walk does not meet: every
part reads and writes in an order that no timing changes, and the tokens of such a network, rooms included, are the
same whenever they move (Kahn, "The semantics of a simple language for parallel programming", 1974).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from hwmodel import conv, joint
from hwmodel.cost import HwError
from hwmodel.fabric import kept
from hwmodel.folding import Fold
from hwmodel.spec import links

WIRES = 0
"""Depth of an operand that goes straight to its add."""
ENDLESS = 1 << 60


@dataclass(frozen=True, slots=True)
class Flow:
    """cycles: from the input beat that completes the first layer's first window to the last result. quiet: from there
    until the last beat that nothing reads has gone. depths: for each layer those of its operands' queues, (2,) of an
    add and () of any other; 0 are wires."""

    cycles: int
    quiet: int
    depths: tuple[tuple[int, ...], ...]


@kept
def flow(plans: tuple[Fold, ...]) -> Flow:
    """The design of these folds. Where that costs no cycle, the operand of an add that waits less has no queue: its
    source has room for its results meanwhile."""
    adds = [i for i, plan in enumerate(plans) if plan.spec.op == "add"]
    first = run(plans, {i: (ENDLESS, ENDLESS) for i in adds})
    if not adds:
        return first
    wired = {i: (ENDLESS, WIRES) if a >= b else (WIRES, ENDLESS) for i, (a, b) in ((i, first.depths[i]) for i in adds)}
    try:
        second = run(plans, wired)
    except HwError:  # it does need its queue
        return first
    return second if second.cycles <= first.cycles else first


def queue_depths(plans: Sequence[Fold]) -> tuple[tuple[int, ...], ...]:
    """`Flow.depths` of the design."""
    if all(plan.spec.op != "add" for plan in plans):
        return ((),) * len(plans)
    return flow(tuple(plans)).depths


def run(plans: Sequence[Fold], depths: dict[int, tuple[int, int]]) -> Flow:
    """The design with queues of these depths before its adds; of endless ones `Flow.depths` says what they held.

    `HwError` where it comes to a standstill.
    """
    return _Machine(plans, depths).run()


class _Edge:
    """What one layer gives another: `rtl/regroup.v` and, before an add, `rtl/queue.v`."""

    def __init__(self, source: int, given: int, reader: int, read: int, depth: int | None) -> None:
        part = math.gcd(given, read)
        self.source, self.reader, self.depth = source, reader, depth
        self.splits, self.collects = given // part, read // part
        self.split = self.collect = 0
        self.done = False  # the beat on offer has gone here, but not everywhere
        self.held, self.valid, self.most = 0, False, 0

    @property
    def closes(self) -> bool:
        """Whether the next part completes a beat of the reader."""
        return self.collect == self.collects - 1


class _Joint:
    """The registers of an add or a mean that decide what moves, for one map."""

    def __init__(self, plan: Fold) -> None:
        self.latency = plan.depth - 1
        self.depth = plan.depth
        self.beats = joint.beats(plan.spec, plan.pe)
        self.silent = 0 if plan.spec.op == "add" else self.beats - plan.spec.out_features // plan.pe
        self.total = self.reserved = 0
        self.results: deque[int] = deque()

    @property
    def open(self) -> bool:
        return self.reserved < self.depth

    @property
    def done(self) -> bool:
        return self.total == self.beats and not self.results

    def offers(self, at: int) -> bool:
        return bool(self.results) and self.results[0] <= at

    def accept(self, at: int) -> None:
        self.total += 1
        if self.total > self.silent:
            self.results.append(at + self.latency)


class _Machine:
    def __init__(self, plans: Sequence[Fold], depths: dict[int, tuple[int, int]]) -> None:
        self.plans = plans
        self.parts = [_Joint(plan) if plan.spec.joint else conv.State(plan.stage) for plan in plans]
        self.edges: list[_Edge] = []
        self.readers: dict[int, list[_Edge]] = {i: [] for i in range(-1, len(plans) - 1)}
        self.operands: dict[int, list[_Edge]] = {}
        for i, sources in enumerate(links([plan.spec for plan in plans])):
            for slot, source in enumerate(sources):
                given = plans[0].lanes if source < 0 else plans[source].units
                edge = _Edge(source, given, i, plans[i].lanes, depths[i][slot] if i in depths else None)
                self.edges.append(edge)
                self.readers[source].append(edge)
                if i in depths:
                    self.operands.setdefault(i, []).append(edge)
        self.lead, self.inputs = plans[0].schedule.lead, plans[0].schedule.input_beats

    def run(self) -> Flow:
        parts, edges, operands = self.parts, self.edges, self.operands
        joints = [(i, part) for i, part in enumerate(parts) if isinstance(part, _Joint)]
        windows = [(i, part) for i, part in enumerate(parts) if not isinstance(part, _Joint)]
        final = len(parts) - 1
        plan = self.plans[-1]
        left, sent = plan.spec.positions * plan.stream.beats, 0
        at = begin = end = 0
        still = 0
        while True:
            offers = [part.offers(at) for part in parts]
            offers.append(sent < self.inputs)  # of the network's input, number -1
            opened = [part.open for part in parts]
            starts = [part.starts(at) for _, part in windows]
            moved = any(starts)
            adding: dict[int, bool] = {}
            for i, pair in operands.items():
                adding[i] = opened[i] and all(
                    edge.valid if edge.depth else offers[edge.source] and not edge.done and edge.closes for edge in pair
                )
                moved |= adding[i]
            finished: list[_Edge] = []
            for edge in edges:
                write = False
                if offers[edge.source] and not edge.done:
                    closes = edge.closes
                    if closes:
                        if edge.depth is None:
                            ready = opened[edge.reader]
                        elif edge.depth:
                            ready = edge.held < edge.depth
                        else:
                            ready = adding[edge.reader]
                    if not closes or ready:
                        moved = True
                        edge.collect = 0 if closes else edge.collect + 1
                        if closes and edge.depth is None:
                            self._accept(edge.reader, at)
                        write = closes and bool(edge.depth)
                        edge.split += 1
                        if edge.split == edge.splits:
                            edge.split = 0
                            finished.append(edge)
                if edge.depth:
                    read = edge.held > 0 and (not edge.valid or adding[edge.reader])
                    moved |= read
                    if write:
                        edge.most = max(edge.most, edge.held + 1)
                    edge.held += write - read
                    edge.valid = read or (edge.valid and not adding[edge.reader])
            for i, add in adding.items():
                if add:
                    self._accept(i, at)
            for edge in finished:
                edge.done = True
            taken = [False] * len(parts)
            for source in {edge.source for edge in finished}:
                if all(edge.done for edge in self.readers[source]):
                    for edge in self.readers[source]:
                        edge.done = False
                    if source < 0:
                        sent += 1
                        if sent == self.lead:
                            begin = at
                    else:
                        taken[source] = True
            if offers[final]:
                taken[final] = moved = True
                left -= 1
                end = at
            for i, one in joints:
                if taken[i]:
                    one.results.popleft()
                    one.reserved -= 1
            for (i, part), start in zip(windows, starts, strict=True):
                part.step(at, start, taken[i])
            if not left and sent == self.inputs and all(p.done for p in parts) and not any(e.held for e in edges):
                break
            if moved:
                at, still = at + 1, 0
                continue
            wakes = [t for part in parts for t in self._waits(part, at)]
            still += 1
            if not wakes and still > 2:
                raise HwError(f"layer {plan.spec.name!r} waits for results that never come: a queue is too short")
            at = min(wakes, default=at + 1)
        depths = tuple(
            tuple(edge.most if edge.depth == ENDLESS else edge.depth or 0 for edge in operands.get(i, ()))
            for i in range(len(parts))
        )
        return Flow(end - begin, at + 1 - end, depths)

    def _accept(self, reader: int, at: int) -> None:
        part = self.parts[reader]
        if isinstance(part, _Joint):
            part.accept(at)
            part.reserved += part.total > part.silent
        else:
            part.accept()

    @staticmethod
    def _waits(part: object, at: int) -> list[int]:
        if isinstance(part, _Joint):
            return [part.results[0]] if part.results and part.results[0] > at else []
        assert isinstance(part, conv.State)
        return part.waits(at)

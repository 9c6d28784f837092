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
from collections.abc import Mapping, Sequence
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
        self.source, self.reader, self.depth = source, reader, depth  # depth: None where no add reads
        self.splits, self.collects = given // part, read // part
        self.split = self.collect = 0
        self.done = False  # the beat on offer has gone here, but not everywhere
        self.held, self.valid, self.most = 0, False, 0
        self.moved = False

    def ready(self, offers: Sequence[bool]) -> bool:
        """Whether an add has this operand on offer."""
        if self.depth:
            return self.valid
        return offers[self.source] and not self.done and self.collect == self.collects - 1

    def move(self, offers: Sequence[bool], opened: Sequence[bool], adding: Mapping[int, bool]) -> bool:
        """One cycle; whether a whole beat went to the reader, or into the queue before it."""
        gave = self.moved = False
        if offers[self.source] and not self.done:
            closes = self.collect == self.collects - 1
            if self.depth is None:
                room = opened[self.reader]
            else:
                room = self.held < self.depth if self.depth else adding[self.reader]
            if room or not closes:
                gave, self.moved = closes, True
                self.collect = 0 if closes else self.collect + 1
                self.done = self.split == self.splits - 1
                self.split = 0 if self.done else self.split + 1
        if self.depth:
            take = adding[self.reader]
            read = self.held > 0 and (take or not self.valid)
            if gave:
                self.most = max(self.most, self.held + 1)
            self.held += gave - read
            self.valid = read or (self.valid and not take)
            self.moved |= read
        return gave


class _Joint:
    """The registers of an add or a mean that decide what moves, for one map: as `conv.State`."""

    def __init__(self, plan: Fold) -> None:
        self.latency, self.depth = plan.depth - 1, plan.depth
        self.beats = joint.beats(plan.spec, plan.pe)
        self.silent = 0 if plan.spec.op == "add" else self.beats - plan.spec.out_features // plan.pe
        self.total = self.reserved = 0
        self.results: deque[int] = deque()

    @property
    def open(self) -> bool:
        """Whether there is room for what a beat may give."""
        return self.reserved < self.depth

    @property
    def done(self) -> bool:
        """Whether nothing of the map is left."""
        return self.total == self.beats and not self.results

    def offers(self, at: int) -> bool:
        """Whether a result is on offer."""
        return bool(self.results) and self.results[0] <= at

    def accept(self, at: int) -> None:
        """One beat in, of both operands."""
        self.total += 1
        if self.total > self.silent:
            self.results.append(at + self.latency)
            self.reserved += 1

    def step(self, at: int, start: bool, taken: bool) -> None:
        """The end of the cycle."""
        if taken:
            self.results.popleft()
            self.reserved -= 1

    def waits(self, at: int) -> list[int]:
        """Cycles behind this one in which something may happen."""
        return [self.results[0]] if self.results and self.results[0] > at else []


class _Machine:
    """A design in one inference: its parts, and the edges between them."""

    def __init__(self, plans: Sequence[Fold], depths: dict[int, tuple[int, int]]) -> None:
        self.plans = plans
        self.parts = [_Joint(plan) if plan.spec.joint else conv.State(plan.stage) for plan in plans]
        self.edges: list[_Edge] = []
        self.readers: dict[int, list[_Edge]] = {i: [] for i in range(-1, len(plans) - 1)}
        self.operands: dict[int, list[_Edge]] = {i: [] for i in depths}
        for i, sources in enumerate(links([plan.spec for plan in plans])):
            for slot, source in enumerate(sources):
                given = plans[0].lanes if source < 0 else plans[source].units
                edge = _Edge(source, given, i, plans[i].lanes, depths[i][slot] if i in depths else None)
                self.edges.append(edge)
                self.readers[source].append(edge)
                if i in depths:
                    self.operands[i].append(edge)
        self.sent = 0  # input beats

    def run(self) -> Flow:
        """All cycles of one inference, those without any move left out."""
        first, last = self.plans[0].schedule, self.plans[-1]
        left, final = last.spec.positions * last.stream.beats, len(self.parts) - 1
        at = begin = end = still = 0
        while True:
            offers = [part.offers(at) for part in self.parts]
            offers.append(self.sent < first.input_beats)  # of the network's input, number -1
            opened = [part.open for part in self.parts]
            starts = [isinstance(part, conv.State) and part.starts(at) for part in self.parts]
            adding = {i: opened[i] and all(edge.ready(offers) for edge in pair) for i, pair in self.operands.items()}
            moved = [edge.move(offers, opened, adding) for edge in self.edges]
            for edge, gave in zip(self.edges, moved, strict=True):
                if gave and edge.depth is None:
                    self._accept(edge.reader, at)
            for i, add in adding.items():
                if add:
                    self._accept(i, at)
            anything = any(starts) or any(adding.values()) or any(edge.moved for edge in self.edges) or offers[final]
            before = self.sent
            taken = self._taken()
            if before < first.lead == self.sent:
                begin = at
            if offers[final]:
                taken[final] = True
                left -= 1
                end = at
            for part, start, gone in zip(self.parts, starts, taken, strict=True):
                part.step(at, start, gone)
            if not left and self.sent == first.input_beats and self._silent():
                return Flow(end - begin, at + 1 - end, self._depths())
            if anything:
                at, still = at + 1, 0
                continue
            wakes, still = [t for part in self.parts for t in part.waits(at)], still + 1
            if not wakes and still > 2:
                raise HwError(f"layer {last.spec.name!r} waits for results that never come: a queue is too short")
            at = min(wakes, default=at + 1)

    def _accept(self, reader: int, at: int) -> None:
        part = self.parts[reader]
        if isinstance(part, _Joint):
            part.accept(at)
        else:
            part.accept()

    def _taken(self) -> list[bool]:
        """Which parts' beats have gone to all their readers in this cycle."""
        taken = [False] * len(self.parts)
        for source, edges in self.readers.items():
            if all(edge.done for edge in edges):
                for edge in edges:
                    edge.done = False
                if source < 0:
                    self.sent += 1
                else:
                    taken[source] = True
        return taken

    def _silent(self) -> bool:
        return all(part.done for part in self.parts) and not any(edge.held or edge.valid for edge in self.edges)

    def _depths(self) -> tuple[tuple[int, ...], ...]:
        pairs = [self.operands.get(i, []) for i in range(len(self.parts))]
        return tuple(tuple(e.most if e.depth == ENDLESS else e.depth or WIRES for e in pair) for pair in pairs)

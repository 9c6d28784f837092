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
from functools import lru_cache
from heapq import heappop, heappush

from hwmodel import conv, joint
from hwmodel.cost import HwError
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


@dataclass(frozen=True, slots=True)
class Joint:
    """What decides when an add or a mean moves: `beats` of one map, of which the first `silent` give nothing; a result
    is on offer `latency` cycles behind its beat, and `depth` of them have room."""

    latency: int
    depth: int
    beats: int
    silent: int


@dataclass(frozen=True, slots=True)
class Shape:
    """What decides when anything in a design moves: formats and weights are not in it, so that many designs share one.

    parts, links, adds: the layers, what each reads (`spec.links`), which are adds. reads, gives: codes in a beat of
    each layer's operands and of its results. codes: in a beat of the network's input, of which one map has `beats`; the
    first window is complete with number `lead`. leaving: beats of results of one map.
    """

    parts: tuple[conv.Stage | Joint, ...]
    links: tuple[tuple[int, ...], ...]
    adds: tuple[int, ...]
    reads: tuple[int, ...]
    gives: tuple[int, ...]
    codes: int
    beats: int
    lead: int
    leaving: int


def shape_of(plans: Sequence[Fold]) -> Shape:
    """The shape of the design of these folds."""
    specs, first, last = [plan.spec for plan in plans], plans[0].schedule, plans[-1]
    return Shape(
        tuple(_joint(plan) if plan.spec.joint else plan.stage for plan in plans),
        links(specs),
        tuple(i for i, spec in enumerate(specs) if spec.op == "add"),
        tuple(plan.lanes for plan in plans),
        tuple(plan.units for plan in plans),
        plans[0].lanes,
        first.input_beats,
        first.lead,
        last.spec.positions * last.stream.beats,
    )


def _joint(plan: Fold) -> Joint:
    beats = joint.beats(plan.spec, plan.pe)
    silent = 0 if plan.spec.op == "add" else beats - plan.spec.out_features // plan.pe
    return Joint(plan.depth - 1, plan.depth, beats, silent)


def flow(plans: Sequence[Fold]) -> Flow:
    """The design of these folds. Where that costs no cycle, the operand of an add that waits less has no queue: its
    source has room for its results meanwhile."""
    return _flow(shape_of(plans))


@lru_cache(maxsize=4096)
def _flow(shape: Shape) -> Flow:
    first = _Machine(shape, {i: (ENDLESS, ENDLESS) for i in shape.adds}).run()
    if not shape.adds:
        return first
    held = ((i, first.depths[i]) for i in shape.adds)
    wired = {i: (ENDLESS, WIRES) if a >= b else (WIRES, ENDLESS) for i, (a, b) in held}
    try:
        second = _Machine(shape, wired).run()
    except HwError:  # it does need its queue
        return first
    return second if second.cycles <= first.cycles else first


def queue_depths(plans: Sequence[Fold]) -> tuple[tuple[int, ...], ...]:
    """`Flow.depths` of the design."""
    if all(plan.spec.op != "add" for plan in plans):
        return ((),) * len(plans)
    return flow(plans).depths


def run(plans: Sequence[Fold], depths: dict[int, tuple[int, int]]) -> Flow:
    """The design with queues of these depths before its adds; of endless ones `Flow.depths` says what they held.

    `HwError` where it comes to a standstill.
    """
    return _Machine(shape_of(plans), depths).run()


def interval(plans: Sequence[Fold]) -> int:
    """Cycles from the last result of one map to that of the next where map follows map, input is offered and results
    are taken in every cycle: those of the third."""
    return _interval(shape_of(plans))


@lru_cache(maxsize=4096)
def _interval(shape: Shape) -> int:
    depths = _flow(shape).depths if shape.adds else ()
    machine = _Machine(shape, {i: (depths[i][0], depths[i][1]) for i in shape.adds}, maps=3)
    machine.run()
    return machine.ends[-1] - machine.ends[-2]


class _Edge:
    """What one layer gives another: `rtl/regroup.v` and, before an add, `rtl/queue.v`."""

    def __init__(self, source: int, given: int, reader: int, read: int, depth: int | None) -> None:
        part = math.gcd(given, read)
        self.source, self.reader, self.depth = source, reader, depth  # depth: None where no add reads
        self.splits, self.collects = given // part, read // part
        self.split = self.collect = 0
        self.done = False  # the beat on offer has gone here, but not everywhere
        self.held, self.valid, self.most = 0, False, 0

    def ready(self, offers: Sequence[bool]) -> bool:
        """Whether an add has this operand on offer."""
        if self.depth:
            return self.valid
        return offers[self.source] and not self.done and self.collect == self.collects - 1

    def give(self, room: bool) -> int:
        """What is on offer moves, if there is room: 0 nothing, 1 a part of a beat, 2 a whole one to the reader."""
        closes = self.collect == self.collects - 1
        if closes and not room:
            return 0
        self.collect = 0 if closes else self.collect + 1
        self.done = self.split == self.splits - 1
        self.split = 0 if self.done else self.split + 1
        return 2 if closes else 1

    def queue(self, gave: bool, take: bool) -> bool:
        """The end of a cycle of the queue; whether a word moved to its output."""
        read = self.held > 0 and (take or not self.valid)
        if gave:
            self.most = max(self.most, self.held + 1)
        self.held += gave - read
        self.valid = read or (self.valid and not take)
        return read


class _Joint:
    """The registers of an add or a mean that decide what moves, for `maps` maps: as `conv.State`."""

    def __init__(self, part: Joint, maps: int = 1) -> None:
        self.latency, self.depth, self.beats, self.silent = part.latency, part.depth, part.beats, part.silent
        self.total = self.reserved = 0
        self.maps = maps
        self.results: deque[int] = deque()

    @property
    def open(self) -> bool:
        """Whether there is room for what a beat may give."""
        return self.reserved < self.depth

    @property
    def done(self) -> bool:
        """Whether nothing of the last map is left."""
        return self.total == self.beats * self.maps and not self.results

    def starts(self, at: int) -> bool:
        """Never: it takes beats as they come."""
        return False

    def accept(self, at: int) -> None:
        """One beat in, of both operands."""
        self.total += 1
        if (self.total - 1) % self.beats >= self.silent:
            self.results.append(at + self.latency)
            self.reserved += 1

    def step(self, at: int, start: bool, taken: bool) -> list[int]:
        """The end of the cycle."""
        if taken:
            self.results.popleft()
            self.reserved -= 1
        return []


class _Machine:
    """A design in some inferences, its parts and the edges between them; a cycle looks only at what may change."""

    def __init__(self, shape: Shape, depths: dict[int, tuple[int, int]], maps: int = 1) -> None:
        self.shape, self.maps, size = shape, maps, len(shape.parts)
        self.parts = [_Joint(p, maps) if isinstance(p, Joint) else conv.State(p, maps) for p in shape.parts]
        self.ends: list[int] = []  # the cycle of each map's last result
        self.edges: list[_Edge] = []
        self.readers: dict[int, list[_Edge]] = {i: [] for i in range(-1, size)}
        self.operands: dict[int, list[_Edge]] = {i: [] for i in depths}
        for i, sources in enumerate(shape.links):
            for slot, source in enumerate(sources):
                given = shape.codes if source < 0 else shape.gives[source]
                edge = _Edge(source, given, i, shape.reads[i], depths[i][slot] if i in depths else None)
                self.edges.append(edge)
                self.readers[source].append(edge)
                if i in depths:
                    self.operands[i].append(edge)
        self.queues = [edge for edge in self.edges if edge.depth]
        self.sent = 0  # input beats
        self.wakes: dict[int, set[int]] = {}  # parts to look at in a cycle
        self.times: list[int] = []  # these cycles, a heap
        self.offers = [False] * size + [True]  # of the network's input, number -1

    def run(self) -> Flow:
        """All cycles, those without any move left out."""
        parts, offers, shape = self.parts, self.offers, self.shape
        adds = [(i, parts[i], a, b) for i, (a, b) in self.operands.items()]
        lead, beats, final, each = shape.lead, shape.beats * self.maps, len(parts) - 1, shape.leaving
        left = each * self.maps
        live = [edge for edge in self.readers[-1] if not edge.depth]  # whose beat on offer has not gone there
        looked = set(range(len(parts)))  # parts that may start
        begin = end = at = 0
        while True:
            woken = self.wakes.pop(at, set())
            for i in woken:
                if parts[i].results and parts[i].results[0] == at and not offers[i]:
                    offers[i] = True
                    live += [edge for edge in self.readers[i] if not edge.depth]
            started = {i for i in looked | woken if parts[i].starts(at)}
            adding = {i: part.open and a.ready(offers) and b.ready(offers) for i, part, a, b in adds}
            moved = False
            accepted: list[int] = []
            finished: list[_Edge] = []
            waiting: list[_Edge] = []
            for edge in live:
                plain = edge.depth is None
                how = edge.give(parts[edge.reader].open if plain else adding[edge.reader])
                moved |= how > 0
                if how == 2 and plain:
                    accepted.append(edge.reader)
                (finished if edge.done else waiting).append(edge)
            live = waiting
            for edge in self.queues:
                how = edge.give(edge.held < edge.depth) if offers[edge.source] and not edge.done else 0  # type: ignore[operator]
                moved |= edge.queue(how == 2, adding[edge.reader]) or how > 0
                if how and edge.done:
                    finished.append(edge)
            accepted += [i for i, add in adding.items() if add]
            for i in accepted:
                parts[i].accept(at)
            taken = {e.source for e in finished if len(self.readers[e.source]) == 1 or self._gone(e.source)}
            if offers[final]:
                taken.add(final)
                left -= 1
                end = at
                if left % each == 0:
                    self.ends.append(at)
            for source in taken:
                for edge in self.readers[source]:
                    edge.done = False
            if -1 in taken:
                taken.discard(-1)
                self.sent += 1
                begin = at if self.sent == lead else begin
                offers[-1] = self.sent < beats
                live += [edge for edge in self.readers[-1] if not edge.depth] if offers[-1] else []
            looked = {*accepted, *taken}
            for i in looked | started | woken:
                self._wake(i, parts[i].step(at, i in started, i in taken))
                if i in taken or not offers[i]:
                    offers[i] = self._offering(i, at + 1)
                    live += [edge for edge in self.readers[i] if not edge.depth] if offers[i] else []
            if not left and self.sent == beats and self._silent():
                return Flow(end - begin, at + 1 - end, self._depths())
            if moved or started or accepted or taken or woken:
                at += 1
                while self.times and self.times[0] < at:
                    heappop(self.times)
            elif self.times:
                at = heappop(self.times)
            else:
                raise HwError("the last layer waits for results that never come: a queue is too short")

    def _gone(self, source: int) -> bool:
        return all(edge.done for edge in self.readers[source])

    def _wake(self, part: int, times: Sequence[int]) -> None:
        for time in times:
            if time not in self.wakes:
                self.wakes[time] = set()
                heappush(self.times, time)
            self.wakes[time].add(part)

    def _offering(self, part: int, at: int) -> bool:
        """Whether a result is on offer in this cycle; if there is a later one, the part is looked at then."""
        results = self.parts[part].results
        if not results:
            return False
        if results[0] > at:
            self._wake(part, [results[0]])
        return results[0] <= at

    def _silent(self) -> bool:
        return all(part.done for part in self.parts) and not any(edge.held or edge.valid for edge in self.edges)

    def _depths(self) -> tuple[tuple[int, ...], ...]:
        pairs = [self.operands.get(i, []) for i in range(len(self.parts))]
        return tuple(tuple(e.most if e.depth == ENDLESS else e.depth or WIRES for e in pair) for pair in pairs)

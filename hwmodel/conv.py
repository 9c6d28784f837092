"""Convolutions position by position: how a window streams (`rtl/window.v`), its cycles and its cost.

A layer with a `Window` reads each output position as the matrix-vector product that it is. Its columns come from a ring
of lines in the order kernel line, kernel column, channel, so that a word of SIMD channels of one input position is one
address. A depthwise layer has PE channels in a word instead, one for each row at work.

One position takes `period` = rows / PE * columns / SIMD cycles. From the beat that completes the first window to the
last result, with input offered and results taken in every cycle,

    cycles = positions * period + stalls + fill

where the fill is that of `folding` and `waits`, and stalls are the cycles in which the layer waits for input:
`schedule` counts them exactly.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

import numpy as np

from hwmodel import fabric
from hwmodel.cost import Cost
from hwmodel.fabric import kept
from hwmodel.formats import bits
from hwmodel.layer import address_bits, choice
from hwmodel.memory import Memory, ram
from hwmodel.spec import LayerSpec, Window


@dataclass(frozen=True, slots=True)
class Stream:
    """A window at one folding, in words of `codes` channels: the parameters of `rtl/window.v`.

    words: of one input position. taps: of one kernel element. groups: of channels, read one after the other.
    repeats: row folds of each group. lines: of the ring. beats: results of one output position.
    """

    codes: int
    words: int
    taps: int
    groups: int
    repeats: int
    lines: int
    beats: int
    period: int


def depthwise(spec: LayerSpec) -> bool:
    """Whether every row reads a channel of its own."""
    window = spec.window
    return window is not None and spec.groups > 1 and spec.groups == window.channels == spec.out_features


def foldable(spec: LayerSpec, pe: int, simd: int) -> bool:
    """Whether PE divides the rows of a group and SIMD its channels; of a depthwise layer, PE the channels at SIMD 1."""
    window = spec.window
    assert window is not None
    if depthwise(spec):
        return simd == 1 and spec.out_features % pe == 0
    rows, channels = spec.out_features // spec.groups, window.channels // spec.groups
    return rows % pe == 0 and channels % simd == 0


def stream(spec: LayerSpec, pe: int, simd: int, units: int) -> Stream:
    """The layer's window at `pe` rows, `simd` columns and `units` converters at once."""
    window = spec.window
    assert window is not None
    kh, kw = window.kernel
    lines = min(window.height, kh + window.stride[0])
    beats = spec.out_features // units
    if depthwise(spec):
        groups = window.channels // pe
        return Stream(pe, groups, 1, groups, 1, lines, beats, groups * kh * kw)
    taps, repeats = window.channels // spec.groups // simd, spec.out_features // spec.groups // pe
    period = spec.groups * repeats * kh * kw * taps
    return Stream(simd, window.channels // simd, taps, spec.groups, repeats, lines, beats, period)


def waits(spec: LayerSpec) -> int:
    """Cycles from a window complete to its start, and of codes to their leaving: that of sums `folding` counts."""
    return 1 + (spec.out is not None)


@dataclass(frozen=True, slots=True)
class Schedule:
    """lead: input beats up to the first window complete, that one included. stalls: cycles without work for lack of
    input between the first position and the last. input_beats: of one map."""

    lead: int
    stalls: int
    input_beats: int


@kept
def schedule(window: Window, words: int, lines: int, period: int, share: int) -> Schedule:
    """When positions start where a beat of `words` per input position is offered in every cycle: exact.

    Position p starts in the cycle after its last beat at the earliest, `period` cycles behind position p - 1, or
    `share` cycles later, as sums wait for their turn at a converter. Beats wait while the ring of `lines` is full,
    until a position started that leaves the oldest line.
    """
    (kh, kw), (sh, sw), (top, _, left, _) = window.kernel, window.stride, window.padding
    line = window.width * words
    full = lines >= window.height
    columns = np.arange(window.out_width)
    needed = np.minimum((columns * sw - left + kw) * words, line) - 1  # beat of its last line that completes each
    line_start: list[int] = []  # the cycle of each line's first beat
    row_start: list[int] = []  # the cycle in which the first position of each row starts
    free, before = 0, -1
    first = lead = 0
    for row in range(window.out_height):
        below = row * sh - top + kh - 1
        last = min(window.height - 1, below)
        while len(line_start) <= last:
            opened = 0 if full else _opened(len(line_start), row_start, sh, top, lines)
            line_start.append(max(free, opened))
            free = line_start[-1] + line
        ready = line_start[last] + (needed + 1 if below == last else np.full_like(needed, line))
        if row == 0:
            first = int(ready[0])
            lead = first - line_start[last] + last * line
        starts = []
        for want in ready.tolist():
            due = before + period
            before = want if before < 0 else due if want <= due else max(want, due + share)
            starts.append(before)
        row_start.append(starts[0])
    stalls = before - first - (window.out_height * window.out_width - 1) * period
    return Schedule(lead, stalls, window.height * line)


def _opened(line: int, row_start: list[int], stride: int, top: int, lines: int) -> int:
    """The first cycle in which the ring takes a line: it is `lines` below the top of the row that started last."""
    if line < lines - top:
        return 0
    row = -(-(line + 1 - lines + top) // stride)
    return row_start[row] + 1


@dataclass(frozen=True, slots=True)
class Stage:
    """What `flow` needs of a stage: its window and stream; `tail` cycles from a position's last word to its
    last result on offer; `folds` row folds of `share` beats each; room for `depth` results."""

    window: Window
    stream: Stream
    tail: int
    folds: int
    share: int
    depth: int


class State:
    """The registers of `rtl/window.v` and `rtl/fifo.v` that decide what moves, for `maps` maps."""

    def __init__(self, stage: Stage, maps: int = 1) -> None:
        self.stage, self.stream, self.window = stage, stage.stream, stage.window
        self.line = stage.window.width * self.stream.words
        self.beats = stage.window.height * self.line
        self.rows, self.columns = stage.window.out_height, stage.window.out_width
        fold, done = self.stream.period // stage.folds, stage.tail - stage.share + 1
        self.turns = [done + (f + 1) * fold + turn for f in range(stage.folds) for turn in range(stage.share)]
        self.free = 0  # the cycle from which the next position may start for what runs before it
        self.reserved = 0
        self.results: deque[int] = deque()  # cycles from which they are on offer
        self.full = self.stream.lines >= stage.window.height
        self.ended = -1  # the cycle of the map's last beat
        self.maps = maps  # this one and those to come
        self._begin()

    def _begin(self) -> None:
        """The state before a map."""
        self.total = 0  # beats in
        self.row = self.column = 0  # the position to start next
        kh, top = self.window.kernel[0], self.window.padding[0]
        self.last = kh - 1 - top  # its last line
        self.limit = self.last + self.stream.lines - kh + 1
        self.needed = self._needed()
        self.open = True

    def _needed(self) -> int:
        """Beats that the position to start next waits for; more than there are if there is none."""
        window, words = self.window, self.stream.words
        if self.row == self.rows:
            return self.beats + 1
        if self.last >= window.height:
            return self.beats
        columns = self.column * window.stride[1] - window.padding[2] + window.kernel[1]
        return self.last * self.line + min(columns * words, self.line)

    @property
    def done(self) -> bool:
        """Whether nothing of the last map is left: no beat to come, no position and no result."""
        return self.maps == 1 and self.total == self.beats and self.row == self.rows and not self.results

    def starts(self, at: int) -> bool:
        """Whether a position starts in this cycle."""
        if self.total < self.needed or at < self.free or self.reserved > self.stage.depth - self.stream.beats:
            return False
        return at == self.free or at >= self.free + (self.stage.share if self.free else 0)

    def accept(self, at: int) -> None:
        """One beat in."""
        self.total += 1
        if self.total == self.beats:
            self.ended = at

    def step(self, at: int, start: bool, taken: bool) -> list[int]:
        """The end of the cycle; cycles behind it in which something else may change than a beat in or out makes."""
        wakes: list[int] = []
        if taken:
            self.results.popleft()
            self.reserved -= 1
        if start:
            self.reserved += self.stream.beats
            self.results.extend([at + turn for turn in self.turns])
            self.limit = self.last + self.stream.lines - self.window.kernel[0] + 1
            self.free = at + self.stream.period
            self.column += 1
            if self.column == self.columns:
                self.column, self.row, self.last = 0, self.row + 1, self.last + self.window.stride[0]
            self.needed = self._needed()
            wakes = [self.free, self.free + self.stage.share]
        drained = self.row == self.rows and at >= self.free
        self.open = self.total < self.beats and (self.full or self.total // self.line < self.limit or drained)
        if self.maps > 1 and self.total == self.beats:
            if at == self.ended:
                wakes = [*wakes, at + 1]
            elif drained:
                self.maps -= 1
                self._begin()
        return wakes


def regroup_cost(width: int, units: int, codes: int) -> Cost:
    """Between beats of `units` and beats of `codes` codes of `width` bits (`rtl/regroup.v`)."""
    part = math.gcd(units, codes)
    split, collect = units // part, codes // part
    luts = sum(fabric.counter(n) for n in (split, collect) if n > 1) + (
        choice(split) * part * width if split > 1 else 0
    )
    ffs = sum(address_bits(n) for n in (split, collect) if n > 1) + (collect - 1) * part * width
    return Cost(luts=luts + 2, ffs=ffs)


def depth(found: Stream, rest: int) -> int:
    """Results that wait at most while no position is kept waiting: of those on their way, `rest` cycles behind."""
    return found.beats * (2 + math.ceil((rest + 2) / found.period))


WINDOW_LUTS = {"xc7": (5.34, 3.94, 2.7, -0.08, 3.03, 28.77), "ecp5": (16.92, 26.07, 3.13, 2.59, 6.43, -19.14)}
WINDOW_FFS = (5.23, 6.85, -1.14, 0.81, 3.5, 11.73)
"""Cells for each of `window_bits`: benchmarks/conv_window.py fits them to Yosys' counts, flip-flops for 7 series, whose
coefficients are no worse on ECP5 than ECP5's own."""


def window_bits(spec: LayerSpec, found: Stream) -> tuple[int, ...]:
    """What the size of `rtl/window.v` but its ring goes by: bits of an address of the ring, of a line's number, of
    the results that wait, of the counters inside a position, of a place in a padded map; and 1."""
    window = spec.window
    assert window is not None
    (kh, kw), line = window.kernel, window.width * found.words
    steps = (found.taps, kw, kh, found.repeats, found.groups)
    place = address_bits(window.width + kw) + address_bits(window.height + kh) if any(window.padding) else 0
    counted = sum((n - 1).bit_length() for n in steps)
    rows = (window.height + kh).bit_length()
    return address_bits(line * found.lines), rows, (3 * found.beats).bit_length(), counted, place, 1


def ring(spec: LayerSpec, found: Stream) -> Memory:
    """The memory of a window's lines."""
    assert spec.window is not None and spec.act is not None
    return ram(found.codes * bits(spec.act), found.lines * spec.window.width * found.words)


def window_cost(spec: LayerSpec, found: Stream) -> Cost:
    """The window with its ring, as `rtl/window.v` writes it."""
    size = window_bits(spec, found)
    both = WINDOW_LUTS[fabric.family()], WINDOW_FFS
    luts, ffs = (sum(a * b for a, b in zip(size, each, strict=True)) for each in both)
    return ring(spec, found).cost + Cost(luts=luts, ffs=ffs)


def results_cost(width: int, words: int) -> Cost:
    """The results that wait for the receiver (`rtl/fifo.v`): `words` of `width` bits."""
    count = address_bits(words)
    return Cost(luts=fabric.ram_luts(width, words) + 5 * count + 2, ffs=4 * count + 1)

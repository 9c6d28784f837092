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
from dataclasses import dataclass

import numpy as np

from hwmodel import fabric
from hwmodel.cost import Cost
from hwmodel.fabric import kept
from hwmodel.formats import bits
from hwmodel.layer import address_bits
from hwmodel.memory import ram
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
def schedule(window: Window, words: int, lines: int, period: int) -> Schedule:
    """When positions start where a beat of `words` per input position is offered in every cycle: exact.

    Position p starts in the cycle after its last beat at the earliest, and `period` cycles behind position p - 1; beats
    wait while the ring of `lines` is full, which is until a position started that leaves the oldest line.
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
        earliest = np.maximum.accumulate(ready - columns * period)
        starts = np.maximum(earliest, before + period if row else earliest) + columns * period
        row_start.append(int(starts[0]))
        before = int(starts[-1])
    stalls = before - first - (window.out_height * window.out_width - 1) * period
    return Schedule(lead, stalls, window.height * line)


def _opened(line: int, row_start: list[int], stride: int, top: int, lines: int) -> int:
    """The first cycle in which the ring takes a line: it is `lines` below the top of the row that started last."""
    if line < lines - top:
        return 0
    row = -(-(line + 1 - lines + top) // stride)
    return row_start[row] + 1


def depth(found: Stream, rest: int) -> int:
    """Results that wait at most while no position is kept waiting: of those on their way, `rest` cycles behind."""
    return found.beats * (2 + math.ceil((rest + 2) / found.period))


def window_cost(spec: LayerSpec, found: Stream) -> Cost:
    """The window with its ring, as `rtl/window.v` writes it: counters and comparisons counted from the structure."""
    window = spec.window
    assert window is not None and spec.act is not None
    (kh, kw), width = window.kernel, found.codes * bits(spec.act)
    line = window.width * found.words
    cells = line * found.lines
    address = address_bits(cells)
    ring = ram(width, cells)
    x, y = address_bits(window.width + kw), address_bits(window.height + kh)
    beats = (window.out_width * window.stride[1] + kw) * found.words
    counted = (found.taps, kw, kh, found.repeats, found.groups, window.out_width, window.out_height, line, cells)
    counters = sum(fabric.counter(n) for n in counted if n > 1)
    luts = counters + 2 * x + 2 * y + 4 * address + 2 * address_bits(beats) + 3 * y
    ffs = sum(address_bits(n) for n in counted if n > 1) + 3 * (x + y) + 6 * address + address_bits(beats)
    return ring.cost + Cost(luts=luts, ffs=ffs + (width if ring.kind == "bram" else 0))


def results_cost(width: int, words: int) -> Cost:
    """The results that wait for the receiver (`rtl/fifo.v`): `words` of `width` bits."""
    count = address_bits(words)
    return Cost(luts=fabric.ram_luts(width, words) + 2 * fabric.counter(words) + 2 * count, ffs=3 * count + 1)

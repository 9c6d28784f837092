"""Layers without weights in a stream: the sum of two maps and the mean of every channel of a map.

Both take PE codes a beat, a beat a cycle, and bring their sums to the next layer's codes as any layer does
(`hwmodel.convert`), at one factor for all channels. An "add" (`rtl/add.v`) adds its operands' codes times powers of
two; a "mean" (`rtl/mean.v`) adds up a channel's codes, and the division is part of the factor. Results wait in
`rtl/fifo.v`, whose room `rtl/credit.v` counts. The operand of an add that comes first waits in `rtl/queue.v`
(`hwmodel.flow`).
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from hwmodel import fabric
from hwmodel.conv import Stream, results_cost
from hwmodel.convert import Converter, converters
from hwmodel.cost import Cost, HwError
from hwmodel.formats import Int, bits
from hwmodel.layer import address_bits
from hwmodel.memory import Memory, ram
from hwmodel.network import Layer
from hwmodel.spec import LayerSpec

FACTORS, ONES = Int(8, signed=False), Int(1, signed=False)
"""Formats of what an "add" and a "mean" have in the place of weights: 1 to 128, and ones."""


def lanes_of(spec: LayerSpec, pe: int) -> LayerSpec:
    """The same for a map of `pe` channels."""
    assert spec.window is not None
    return replace(spec, out_features=pe, groups=pe, window=replace(spec.window, channels=pe))


def widened(layer: Layer, channels: int) -> Layer:
    """A layer of one channel, as it is for each of `channels`."""

    def rows(values: np.ndarray | None) -> np.ndarray | None:
        return None if values is None else np.repeat(values[:1], channels, axis=0)

    codes = np.repeat(layer.codes[:1], channels, axis=0)
    return Layer(lanes_of(layer.spec, channels), codes, rows(layer.thresholds), rows(layer.line))


def operands(spec: LayerSpec) -> tuple[Int, ...]:
    """The formats that it reads; `HwError` for other than integers."""
    found = [fmt for fmt in (spec.act, spec.second) if fmt is not None]
    for fmt in found:
        if not isinstance(fmt, Int):
            raise HwError(f"layer {spec.name!r}: op {spec.op} in hardware reads integers, not {fmt}")
    return tuple(found)  # type: ignore[arg-type]


def stream(spec: LayerSpec, pe: int) -> Stream:
    """`conv.stream` without a ring: words of PE channels."""
    words = spec.out_features // pe
    return Stream(pe, words, 1, words, 1, 0, words, words)


def depth(found: Converter) -> int:
    """Results on their way or waiting at most, of a beat a cycle."""
    return found.stages + 3


def beats(spec: LayerSpec, pe: int) -> int:
    """Beats in one inference, of each operand."""
    window = spec.window
    assert window is not None
    return window.height * window.width * spec.out_features // pe


def options(spec: LayerSpec, pe: int, acc_bits: int) -> list[tuple[Converter, Cost]]:
    """The ways to convert the sums, each with the cost of the whole layer at `pe` channels a beat."""
    operands(spec)
    leaving = pe * (acc_bits if spec.out is None else bits(spec.out))
    words = spec.out_features // pe
    around = _add(pe, acc_bits) if spec.op == "add" else _mean(words, spec.in_features, pe, acc_bits)
    found = []
    for one in converters(lanes_of(spec, pe), acc_bits, pe):
        waits = depth(one)
        cost = around + one.cost + results_cost(leaving, waits) + _credit(waits) + Cost(ffs=1 + one.stages)
        found.append((one, cost))
    return found


def _add(pe: int, acc_bits: int) -> Cost:
    """`rtl/add.v`: bits that only one operand has take no LUT."""
    return Cost(luts=pe * (acc_bits - 2), ffs=pe * acc_bits)


def _mean(words: int, count: int, pe: int, acc_bits: int) -> Cost:
    """`rtl/mean.v`; Yosys keeps the number of a word twice."""
    luts = pe * (acc_bits + 4) + fabric.counter(count) + 2
    ffs = pe * acc_bits + address_bits(count)
    if words > 1:
        luts += fabric.ram_luts(pe * acc_bits, words) + fabric.counter(words)
        ffs += 2 * address_bits(words)
    return Cost(luts=luts, ffs=ffs)


def _credit(waits: int) -> Cost:
    size = waits.bit_length()
    return Cost(luts=2 * size + 1, ffs=size)


def branch_cost(readers: int) -> Cost:
    """One stream to several readers (`rtl/branch.v`)."""
    return Cost(luts=5 * (readers - 1), ffs=readers) if readers > 1 else Cost()


def queue(width: int, words: int) -> Memory:
    """The memory of `rtl/queue.v`."""
    return ram(width, max(2, words))


def queue_cost(width: int, words: int) -> Cost:
    """An operand that waits (`rtl/queue.v`): `words` of `width` bits; none are wires."""
    if not words:
        return Cost()
    memory, address, held = queue(width, words), address_bits(words), words.bit_length()
    luts = memory.cost.luts + 3 * address + held + 5
    return Cost(luts=luts, ffs=2 * address + held + 1 + width * (memory.kind == "lutram"), bram18=memory.cost.bram18)

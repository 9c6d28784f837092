"""A layer as `emit` writes it, piece by piece: what each module of `rtl/` takes inside the layer.

Registers part the pieces, so the layer is their sum. Flip-flops, block RAMs, buffers and multiplexers are
counted from the structure; products, comparisons and counters have measured coefficients (`coeffs.toml`).
A constant memory costs the columns of bits that differ from each other: rows of a handful of words repeat.
"""

from __future__ import annotations

import math

from hwmodel import fabric
from hwmodel.coeffs import coefficients
from hwmodel.cost import ZERO, Cost
from hwmodel.fabric import kept
from hwmodel.formats import BINARY, TERNARY, Float, Format, Int, bits, levels, unit
from hwmodel.mac import mac_cost, operand, pipeline_stages, product_bits, product_cost, shift_bits
from hwmodel.memory import rom, rom_columns
from hwmodel.spec import LayerSpec


def address_bits(n: int) -> int:
    """Bits that count to n - 1, at least one.

    >>> [address_bits(n) for n in (1, 2, 3, 8, 9)]
    [1, 1, 2, 3, 4]
    """
    return max(1, (n - 1).bit_length())


@kept
def operands(width: int, simd: int, folds: int, write: int) -> Cost:
    """The input buffer: `folds` words of `simd` codes of `width` bits, `write` codes per write (`rtl/operands.v`)."""
    codes = simd * folds
    if folds == 1:
        return Cost(ffs=codes * width)
    if simd % write:
        return Cost(luts=codes * width, ffs=(codes + simd) * width)
    parts = simd // write
    chosen = parts if parts > 1 else 0
    if folds > (256 if fabric.family() == "xc7" else 128):  # Yosys' own limits for memories in LUTs
        return Cost(
            luts=fabric.counter(folds) + chosen,
            ffs=address_bits(folds) + chosen,
            bram18=parts * rom(write * width, folds, "bram").cost.bram18,
        )
    luts = parts * fabric.ram_luts(write * width, folds) + fabric.counter(folds) + chosen
    return Cost(luts=luts, ffs=simd * width + address_bits(folds) + chosen)


@kept
def sequencer(column_folds: int, row_folds: int) -> Cost:
    """Counters of a layer's columns and addresses (`rtl/sequencer.v`)."""
    fit = coefficients()["glue"]["sequencer"]
    words = column_folds * row_folds
    counted = (column_folds - 1).bit_length() + (words - 1).bit_length()
    ffs = 3 + address_bits(column_folds) + address_bits(words)
    luts = fit["one"] + fit["bits"] * counted + fit.get("chains", 0) * fabric.chains(column_folds, words)
    return Cost(luts=luts, ffs=ffs)


@kept
def drain(share: int, count: int) -> Cost:
    """Turns of `share` elements at one converter that takes `count` sums in all (`rtl/drain.v`)."""
    fit = coefficients()["glue"]["drain"]
    slots = (share - 1).bit_length()
    luts = fit["one"] + fit["rows"] * (count - 1).bit_length() + fit["slots"] * slots + fit["shared"] * (share > 1)
    luts += fit.get("chains", 0) * fabric.chains(count)
    return Cost(luts=luts, ffs=address_bits(count) + slots)


def search_step(width: int, first: bool) -> float:
    """LUTs of one comparison of a threshold search, its choice between two levels included (`rtl/search.v`)."""
    fit = coefficients()["glue"]["first step" if first else "step"]
    return float(fit["bits"] * width + fit["one"])


def slack_beside(method: str, acc_bits: int) -> float:
    """Time that a converter's slowest path leaves the rest of a layer, as the mapper of ECP5 counts; else 0.

    Arithmetic takes longer than any product.
    """
    if fabric.family() != "ecp5" or method == "sum":
        return 0.0
    if method != "thresholds":
        return math.inf
    fit = coefficients()["timing"]["step"]["mapped"]
    return float(fit["bits"] * acc_bits + fit["one"])


def interval_code(out: Format) -> int:
    """LUTs that make a code from an interval's number (`rtl/interval_code.v`)."""
    match out:
        case Int():
            return int(out.signed)
        case Float():
            if fabric.family() == "ecp5":
                return int(coefficients()["glue"]["float code"][str(bits(out))])
            return 2 * bits(out) - 2 if bits(out) > 3 else bits(out) - 1
        case _:
            return int(out == TERNARY)


@kept
def level_columns(spec: LayerSpec, acc_bits: int) -> float:
    """Bits of a threshold that are not copies of its sign.

    A sum reaches about its standard deviation, sqrt(n) rms(w) rms(a), of the n max(w) max(a) it is sized for.
    """
    assert spec.act is not None and spec.weight is not None
    if spec.weight == spec.act == BINARY:
        return float(acc_bits)
    spare = 0.5 * math.log2(spec.in_features) + math.log2(_peak(spec.act)) - 1
    return max(1.0, acc_bits - max(0.0, spare))


@kept
def _peak(fmt: Format) -> float:
    """Largest magnitude over the root mean square of the levels."""
    steps = [level / unit(fmt) for level in levels(fmt)]
    return max(map(abs, steps)) / math.sqrt(sum(s * s for s in steps) / len(steps))


@kept
def threshold_cost(spec: LayerSpec, acc_bits: int, units: int) -> Cost:
    """`units` converters that search thresholds, memories included."""
    assert spec.out is not None
    steps, rows = bits(spec.out), spec.out_features // units
    columns = level_columns(spec, acc_bits)
    one = Cost(luts=interval_code(spec.out), ffs=(steps - 1) * acc_bits + steps * (steps + 1) // 2)
    for step in range(steps):
        words, wide = rows << max(0, step - 1), 1 if step == 0 else 2
        one += constants(wide * acc_bits, words, wide * columns)
        compare = search_step(acc_bits, step == 0)
        one += Cost(luts=compare / (4 if step else 2) if words == 1 else compare)  # constant levels leave that much
    return one * units


def constants(width: int, words: int, columns: float) -> Cost:
    """A memory of `words` constants of `width` bits, `columns` of which are no copies of others by design."""
    kept = rom(width, words)
    return rom_columns(columns, words) if kept.kind == "lutram" else kept.cost


def sum_codes(spec: LayerSpec, acc_bits: int) -> Cost:
    """What turns a last layer's accumulator into the sum that leaves: of binary pairs, agreements into +-1."""
    return Cost(luts=acc_bits - 1) if spec.weight == spec.act == BINARY else ZERO


@kept
def shared_decoding(weight: Format, act: Format, pe: int, simd: int, slack_ns: float = 0.0) -> Cost:
    """What elements save because they read the same inputs: registers of the input's shift and significand.

    Binary weights on ECP5, whose LUTs are too small to shift and negate at once, share the shifted number, too.
    """
    if pe == 1 or not shift_bits(weight, act) or operand(weight).reach:
        return ZERO
    a = operand(act)
    ffs = shift_bits(weight, act) + (a.sig if weight == BINARY else 0)
    luts: float = a.exp
    if weight == BINARY and fabric.family() == "ecp5":
        luts = max(luts, product_cost(weight, act, slack_ns).luts - product_bits(weight, act) - 1)
    return Cost(luts=luts, ffs=ffs) * ((pe - 1) * simd)


@kept
def elements(weight: Format, act: Format, acc_bits: int, pe: int, simd: int, slack_ns: float = 0.0) -> Cost:
    """The multiply-accumulates of all rows at once, their products in LUTs, beside a path of `slack_ns`."""
    return mac_cost(weight, act, acc_bits, simd, slack_ns) * pe + shared_decoding(weight, act, pe, simd, slack_ns) * -1


@kept
def frame(
    spec: LayerSpec, pe: int, simd: int, units: int, acc_bits: int, stored: int, columns_of_one: float | None = None
) -> Cost:
    """A layer at `pe` rows and `simd` columns at once but its elements, its converters and its input buffer.

    Weights of `stored` bits each, of which `columns_of_one` (None: all) are no copies of others, counters, delays, and
    the multiplexers by which pe / units elements take turns at a converter.
    """
    weight, act = spec.weight, spec.act
    assert weight is not None and act is not None
    rows, columns, share = spec.out_features // pe, spec.in_features // simd, pe // units
    word = pe * simd * stored
    delays = 2 * (pipeline_stages(weight, act, simd) - 1) + 1
    return (
        constants(word, rows * columns, word if columns_of_one is None else pe * simd * columns_of_one)
        + sequencer(columns, rows)
        + drain(share, spec.out_features // units)
        + Cost(luts=2 + choice(share) * acc_bits * units, ffs=delays)
    )


def choice(n: int) -> float:
    """LUTs of one bit of a multiplexer of n: four inputs in a LUT6; of LUT4s as measured, between sizes the mean."""
    if fabric.family() == "xc7":
        return math.ceil((n - 1) / 3)
    table = {int(size): luts for size, luts in coefficients()["glue"]["choice"].items()}
    if n == 1:
        return 0
    most = max(table)
    near = max(s for s in table if s <= n), min((s for s in table if s >= n), default=most)
    return max(1.0, n / most) * sum(table[s] for s in near) / 2


def stream_ends(beats: int, out_bits: int) -> Cost:
    """Around the layers: counter of input beats, handshakes, output register."""
    count = (beats - 1).bit_length()
    counted = fabric.counter(beats) if fabric.chains(beats) else count
    return Cost(luts=4 + counted + fabric.constants(), ffs=2 + count + out_bits)

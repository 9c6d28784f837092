"""What happens to a finished sum: bias, scale, rounding, activation, the next layer's format.

Two ways are priced, the cheaper is taken, and both are what `emit` writes, bit for bit the reference:

    thresholds   binary search over 2^B - 1 levels per row (`rtl/search.v`); the levels hold bias, scale and
                 any monotone activation, and cost memory instead of a multiplier
    arithmetic   times a factor (shift, constant or run-time), plus an offset (`rtl/affine.v`); then, for straight
                 activations, round half to even and clip (`rtl/round_clip.v`) or convert to a minifloat
                 (`rtl/jam.v`, `to_float.v`); for curved ones, a search among levels that all rows share.
                 The few sums for which this is not exact are listed (`rtl/patch.v`)

How many bits that takes is found by `hwmodel.affine` once weights and scales are known
(`LayerSpec.rescale`); until then `usual_rescale` is assumed.
"""

from __future__ import annotations

from dataclasses import dataclass

from hwmodel.coeffs import coefficients
from hwmodel.cost import ZERO, Cost
from hwmodel.fabric import kept
from hwmodel.formats import BINARY, Float, Format, Levels, bits, int_max
from hwmodel.formats import scale_bits as stored_scale_bits
from hwmodel.layer import address_bits, constants, interval_code, search_step, sum_codes, threshold_cost
from hwmodel.mac import booth_rows
from hwmodel.spec import CURVED, LayerSpec, PerGroup, PerTensor, Rescale

NOT_MONOTONE = ("gelu", "silu")
POW2_BITS = 3
"""Bits of a per-row shift: power-of-two scales of one layer span eight binades."""


@dataclass(frozen=True, slots=True)
class Converter:
    """A way to convert a layer's sums: its name, cost of all units with their memories, cycles from sum to output."""

    method: str
    cost: Cost
    stages: int


@kept
def converters(spec: LayerSpec, acc_bits: int, units: int) -> tuple[Converter, ...]:
    """Every way in which `units` units turn the layer's sums (`acc_bits` bits) into its output format.

    Without an output format the sum leaves as it is; its bias and an activation after it are the reader's.
    """
    if spec.out is None:
        return (Converter("sum", sum_codes(spec, acc_bits) * units, 1),)
    if spec.activation in NOT_MONOTONE:
        return (_tabled(spec, acc_bits, units),)
    found = [_thresholds(spec, acc_bits, units)]
    binary = spec.weight == spec.act == BINARY
    shared = spec.activation not in CURVED or not spec.out_factors  # factors behind a curve differ from row to row
    possible = spec.rescale is None or spec.rescale.kind != "none"
    if not isinstance(spec.out, Levels) and not binary and shared and possible:
        found.append(_arithmetic(spec, acc_bits, units))
    return tuple(found)


def usual_rescale(spec: LayerSpec, acc_bits: int) -> Rescale:
    """What `hwmodel.affine` finds for such a layer in most policies."""
    assert spec.out is not None
    out, kind = bits(spec.out), scale_kind(spec)
    curved = spec.activation in CURVED
    match kind:
        case "plain":
            return Rescale("plain", 2, 0, acc_bits + 2, 0 if curved else max(2, acc_bits - out), 0)
        case "shift":
            return Rescale("shift", 2, 0, acc_bits + 2, 0 if curved else max(2, acc_bits - out), 0)
        case _:
            factor = 2 * out + 3
            total = acc_bits + factor
            return Rescale(kind, factor, factor // 3, total, 0 if curved else max(2, total - out - 2), 1)


def _thresholds(spec: LayerSpec, acc_bits: int, units: int) -> Converter:
    assert spec.out is not None
    steps, rows = bits(spec.out), spec.out_features // units
    waits = max(0, steps - 2) * address_bits(rows) if rows > 1 else 0  # row numbers on their way to later levels
    return Converter("thresholds", threshold_cost(spec, acc_bits, units) + Cost(ffs=2 * steps + waits), steps)


def _arithmetic(spec: LayerSpec, acc_bits: int, units: int) -> Converter:
    out = spec.out
    assert out is not None
    found = spec.rescale or usual_rescale(spec, acc_bits)
    width, rows = bits(out), spec.out_features // units
    one = affine(found, acc_bits) + constants(found.bits, rows, found.bits)
    if found.kind in ("runtime", "shift"):
        one += constants(found.factor_bits, rows, found.factor_bits)
    if spec.activation in CURVED:
        one += shared_search(out, found.bits)
        stages, method = 2 + width, f"{found.kind} + search"
    elif isinstance(out, Float):
        one += jam(found, out) + to_float(out)
        stages, method = 7, f"{found.kind} + float"
    else:
        one += round_clip(found, width)
        stages, method = 4, found.kind
    if found.patches:
        entries = found.patches * (acc_bits + width)
        one += patch(found.patches, acc_bits, width) + constants(entries, rows, entries)
    return Converter(method, one * units + Cost(ffs=2 * stages), stages)


def affine(found: Rescale, acc_bits: int) -> Cost:
    """Factor and offset (`rtl/affine.v`): the product's bits that are not copies are registered, then t."""
    known = coefficients()["convert"]
    kind = "constant" if found.kind == "plain" else found.kind
    reach = 2**found.factor_bits - 1 if kind == "shift" else found.factor_bits
    product = min(found.bits, acc_bits + reach)
    adder = found.bits
    if found.kind == "plain":  # the factor's zeros leave bits of the offset alone
        product, adder = product - found.factor_bits, adder - found.factor_bits + 1
    fit = known[kind]
    luts = fit["t"] * adder + fit["one"]
    match kind:
        case "constant":
            luts += (fit["rows"] * acc_bits + fit.get("chains", 0)) * found.adds
        case "runtime":
            luts += fit["rows"] * booth_rows(acc_bits, True, found.factor_bits, False) + fit["acc"] * acc_bits
            luts += fit.get("chains", 0) * factor_rows(acc_bits, found.factor_bits)
        case _:
            luts += fit["moved"] * found.factor_bits * (acc_bits + reach)
    return Cost(luts=luts, ffs=product + found.bits)


def factor_rows(acc_bits: int, factor_bits: int) -> int:
    """Rows of the Booth multiplier of a sum and a run-time factor (`rtl/affine.v` takes the cheaper recoding)."""
    by_factor, by_sum = factor_bits // 2 + 1, (acc_bits + 1) // 2
    return by_factor if by_factor * (acc_bits + 2) <= by_sum * (factor_bits + 2) else by_sum


def round_clip(found: Rescale, out_bits: int) -> Cost:
    """Rounding and clipping to an integer (`rtl/round_clip.v`)."""
    fit = coefficients()["convert"]["round_clip"]
    q = found.bits - found.shift
    luts = fit["shift"] * found.shift + fit["q"] * q + fit["out"] * out_bits + fit["one"]
    return Cost(luts=luts, ffs=max(q + 1, out_bits + 2) + out_bits)


def jam(found: Rescale, out: Float) -> Cost:
    """Rounding to quarters of the smallest step (`rtl/jam.v`)."""
    fit = coefficients()["convert"]["jam"]
    x = to_float_bits(out)
    luts = fit["shift"] * found.shift + fit["q"] * (found.bits - found.shift) + fit["x"] * x + fit["one"]
    return Cost(luts=luts, ffs=x)


def patch(count: int, acc_bits: int, out_bits: int) -> Cost:
    """`count` listed sums (`rtl/patch.v`); the code found waits in shift registers of LUTs."""
    fit = coefficients()["convert"]["patch"]
    luts = fit["match"] * count * acc_bits + fit["codes"] * count * out_bits + fit["out"] * out_bits + fit["one"]
    return Cost(luts=luts)


def shared_search(out: Format, width: int) -> Cost:
    """A search among levels of `width` bits that all rows share."""
    steps = bits(out)
    one = Cost(luts=interval_code(out), ffs=(steps - 1) * width + steps * (steps + 1) // 2)
    for step in range(steps):
        words, wide = 1 << max(0, step - 1), 1 if step == 0 else 2
        one += constants(wide * width, words, wide * width)
        compare = search_step(width, step == 0)
        one += Cost(luts=compare / 2 if words == 1 else compare)
    return one


def _tabled(spec: LayerSpec, acc_bits: int, units: int) -> Converter:
    """An activation that is not monotone: rounded to at most 8 bits, then a table. Priced only, not written."""
    assert spec.out is not None
    out, rows = bits(spec.out), spec.out_features // units
    index = min(out + 2, 8)
    found = usual_rescale(spec, acc_bits)
    one = affine(found, acc_bits) + round_clip(found, index) + table(out) + constants(found.bits, rows, found.bits)
    if found.kind in ("runtime", "shift"):
        one += constants(found.factor_bits, rows, found.factor_bits)
    stages, method = 5, f"{found.kind} + table"
    if spec.out_factors:  # a table serves all rows, so factors behind it are multiplied on its output
        more = Rescale("runtime", out + 4, 0, 2 * out + 4, out + 2, 0)
        one += affine(more, out) + round_clip(more, out) + constants(out + 4, rows, out + 4)
        stages, method = stages + 4, f"{method} + factor"
    return Converter(method, one * units + Cost(ffs=2 * stages), stages)


def table(out_bits: int) -> Cost:
    """A curved activation as a table of at most 256 words; beyond 8 bits a word costs by its bits."""
    fitted = coefficients()["convert"]["table"]
    return Cost(luts=fitted[str(min(out_bits, 8))] * max(1.0, out_bits / 8), ffs=out_bits)


def scale_kind(spec: LayerSpec) -> str:
    """Which arithmetic a layer's scales need: "plain", "constant", "shift" or "runtime".

    Group scales are applied inside the dot product (`group_cost`) and leave only a shift. Factors
    behind a straight activation merge with the scale of their row.
    """
    match spec.granularity:
        case PerGroup() if not spec.out_factors or spec.activation in CURVED:
            return "plain"
        case PerTensor() if not spec.out_factors or spec.activation in CURVED:
            return "plain" if spec.scale_pow2 else "constant"
        case _:
            return "shift" if spec.scale_pow2 else "runtime"


def to_float_bits(fmt: Float) -> int:
    """Bits that a minifloat converter reads: sign, and quarters of the smallest step up to the largest value.

    >>> to_float_bits(Float(2, 1))
    7
    """
    return max(int_max(fmt).bit_length() + 3, fmt.exp + fmt.man + 3)


def csd_adds(factor: int) -> int:
    """Adders that multiply by a positive constant (`rtl/multiply_const.v`).

    One for each nonzero digit of its canonical signed form but the first, which takes one where it is negative.

    >>> [csd_adds(n) for n in (1, 8, 5, 7)]
    [0, 0, 1, 2]
    """
    odd = factor // (factor & -factor)
    return (odd ^ 3 * odd).bit_count() - 1 + (odd % 4 == 3)


def to_float(fmt: Float) -> Cost:
    """Fixed point to minifloat; special codes saturate alike and cost the same."""
    table = coefficients()["convert"]["to_float"]
    entry = table.get(f"e{fmt.exp}m{fmt.man}")
    if entry is None:  # beyond five exponent bits the shifter doubles with the range
        widest = max((e for e in table if e.endswith(f"m{fmt.man}")), key=lambda name: table[name][0])
        wide = to_float_bits(fmt) / to_float_bits(Float(int(widest[1]), fmt.man))
        entry = [table[widest][0] * wide * 1.2, table[widest][1] * wide]
    return Cost(luts=entry[0], ffs=entry[1])


@kept
def group_cost(spec: LayerSpec, acc_bits: int) -> tuple[Cost, int]:
    """Per element: scale each group's partial sum and add it up; and the bits of the total. Priced only, not written.

    A power-of-two scale is a shift by the same reach as a per-row one.
    """
    if not isinstance(spec.granularity, PerGroup):
        return ZERO, acc_bits
    factor = group_scale_bits(spec)
    shifts = spec.scale_pow2 or spec.granularity.scale == "e8m0"
    reach = 2**POW2_BITS - 1 if shifts else factor
    total = acc_bits + reach + (-(-spec.in_features // spec.granularity.size)).bit_length()
    adder = Cost(luts=total, ffs=2 * total)
    if shifts:
        return adder + Cost(luts=(acc_bits + reach) * 1.5, ffs=acc_bits + reach), total
    return adder + Cost(luts=booth_rows(acc_bits, True, factor, False), ffs=acc_bits + reach), total


def group_scale_bits(spec: LayerSpec) -> int:
    """Stored bits of one group scale, 0 if there are none."""
    if not isinstance(spec.granularity, PerGroup):
        return 0
    if spec.granularity.scale is not None:
        return stored_scale_bits(spec.granularity.scale)
    return POW2_BITS if spec.scale_pow2 else 4 + (bits(spec.out) if spec.out is not None else 8)

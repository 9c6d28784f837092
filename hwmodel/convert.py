"""What happens to a finished sum: bias, scale, rounding, activation, the next layer's format.

Two ways are priced and the cheaper is taken (`rtl/requantize.v`, `to_float.v`, `threshold.v`):

    thresholds   binary search over 2^B - 1 levels per row; the levels hold bias, scale and any
                 monotone activation exactly, and cost memory instead of a multiplier
    arithmetic   bias add, scale (shift, constant or run-time multiplier), round half to even,
                 clip; then fixed point to minifloat, or a table for a curved activation

A run-time or constant factor has B + 4 bits for a B-bit output: its rounding stays below a
quarter of a step, and rows may differ in scale by four without losing that.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from hwmodel.cost import ZERO, Cost
from hwmodel.formats import Float, bits, int_max
from hwmodel.formats import scale_bits as stored_scale_bits
from hwmodel.mac import Mapping, booth_rows, coefficients
from hwmodel.spec import LayerSpec, PerGroup, PerTensor

CURVED = ("tanh", "sigmoid", "elu", "leaky_relu", "gelu", "silu")
NOT_MONOTONE = ("gelu", "silu")
POW2_BITS = 3
"""Bits of a per-row shift: power-of-two scales of one layer span eight binades."""


@dataclass(frozen=True, slots=True)
class Converter:
    """One unit that takes a finished sum per cycle.

    memory: (width, words per row) of each constant memory it reads. stages: cycles from sum to output.
    """

    method: str
    cost: Cost
    stages: int
    memory: tuple[tuple[int, int], ...] = ()


def scale_bits(out_bits: int) -> int:
    """Bits of a requantization factor."""
    return out_bits + 4


@cache
def converters(spec: LayerSpec, acc_bits: int, mapping: Mapping = "lut") -> tuple[Converter, ...]:
    """Every way to turn the layer's sums (`acc_bits` bits) into its output format.

    Without an output format the sum leaves as it is, its bias added; an activation after it is the reader's.
    """
    if spec.out is None:
        return (Converter("sum", Cost(luts=acc_bits, ffs=acc_bits), 1, ((acc_bits, 1),)),)
    found = [_arithmetic(spec, acc_bits, mapping)]
    if spec.activation not in NOT_MONOTONE:
        found.append(_thresholds(spec, acc_bits))
    return tuple(found)


def _thresholds(spec: LayerSpec, acc_bits: int) -> Converter:
    assert spec.out is not None
    out = bits(spec.out)
    fit = coefficients()["convert"]["threshold"]
    luts = fit["compare"] * acc_bits * out + fit["out"] * out + fit["one"]
    if isinstance(spec.out, Float):
        luts += out  # interval number -> sign and magnitude
    memory = tuple((acc_bits, 2**stage) for stage in range(out))
    return Converter("thresholds", Cost(luts=luts, ffs=out * (acc_bits + 1)), out, memory)


def _arithmetic(spec: LayerSpec, acc_bits: int, mapping: Mapping) -> Converter:
    assert spec.out is not None
    out = bits(spec.out)
    curved = spec.activation in CURVED
    clipped = min(out + 2, 8) if curved else float_input_bits(spec.out) if isinstance(spec.out, Float) else out
    kind, factor = scale_kind(spec), scale_bits(out)
    cost = requantizer(kind, acc_bits, clipped, factor, mapping)
    memory = [(acc_bits, 1)]
    if kind == "runtime":
        memory.append((factor, 1))
    elif kind == "shift":
        memory.append((POW2_BITS, 1))
    stages, method = 4, kind
    if curved:
        cost += table(out)
        stages, method = stages + 1, f"{kind} + table"
        if spec.out_factors:  # a table serves all rows, so factors behind it are multiplied on its output
            cost += requantizer("runtime", clipped, out, factor, mapping)
            memory.append((factor, 1))
            stages, method = stages + 4, f"{method} + factor"
    elif isinstance(spec.out, Float):
        cost += to_float(spec.out)
        stages, method = stages + 4, f"{kind} + float"
    return Converter(method, cost, stages, tuple(memory))


def table(out_bits: int) -> Cost:
    """A curved activation as a table of at most 256 words; beyond 8 bits a word costs by its bits."""
    fitted = coefficients()["convert"]["table"]
    return Cost(luts=fitted[str(min(out_bits, 8))] * max(1.0, out_bits / 8), ffs=out_bits)


def scale_kind(spec: LayerSpec) -> str:
    """Which of the fitted requantizers a layer's scales need: "plain", "constant", "shift" or "runtime".

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


def requantizer(kind: str, acc_bits: int, out_bits: int, factor_bits: int, mapping: Mapping = "lut") -> Cost:
    """Bias, scale, round, clip. With DSPs the run-time multiplication takes one (two beyond 25 x 18 bits)."""
    fit = coefficients()["convert"][kind]
    luts = fit["acc"] * acc_bits + fit["out"] * out_bits + fit["one"]
    reach = {"plain": 0, "shift": 2**POW2_BITS - 1}.get(kind, factor_bits)
    ffs = acc_bits + (acc_bits + reach) + (out_bits + 4) + out_bits
    dsps = 0
    match kind:
        case "plain":
            luts += acc_bits  # the fitted unit has no bias
        case "constant":
            luts += fit["products"] * acc_bits * factor_bits
        case "runtime" if mapping == "lut":
            luts += fit["rows"] * booth_rows(acc_bits, True, factor_bits, False)
        case "runtime":
            dsps = 1 if acc_bits <= 25 and factor_bits < 18 else 2
    return Cost(luts=luts, ffs=ffs, dsps=dsps)


def float_input_bits(fmt: Float) -> int:
    """Bits that a minifloat converter reads: sign, two below the smallest step, two above the largest value."""
    return int_max(fmt).bit_length() + 5


def to_float(fmt: Float) -> Cost:
    """Fixed point to minifloat; special codes saturate alike and cost the same."""
    table = coefficients()["convert"]["to_float"]
    entry = table.get(f"e{fmt.exp}m{fmt.man}")
    if entry is None:  # beyond five exponent bits the shifter doubles with the range
        widest = max((e for e in table if e.endswith(f"m{fmt.man}")), key=lambda name: table[name][0])
        wide = float_input_bits(fmt) / float_input_bits(Float(int(widest[1]), fmt.man))
        entry = [table[widest][0] * wide * 1.2, table[widest][1] * wide]
    return Cost(luts=entry[0], ffs=entry[1])


@cache
def group_cost(spec: LayerSpec, acc_bits: int, mapping: Mapping = "lut") -> tuple[Cost, int]:
    """Per element: scale each group's partial sum and add it up; and the bits of the total.

    A power-of-two scale is a shift by the same reach as a per-row one.
    """
    if not isinstance(spec.granularity, PerGroup):
        return ZERO, acc_bits
    factor = scale_bits(bits(spec.out) if spec.out is not None else 8)
    shifts = spec.scale_pow2 or spec.granularity.scale == "e8m0"
    reach = 2**POW2_BITS - 1 if shifts else factor
    total = acc_bits + reach + (spec.in_features // spec.granularity.size).bit_length()
    adder = Cost(luts=total, ffs=2 * total)
    if shifts:
        return adder + Cost(luts=(acc_bits + reach) * 1.5, ffs=acc_bits + reach), total
    if mapping == "dsp":
        return adder + Cost(dsps=1 if acc_bits <= 25 else 2), total
    return adder + Cost(luts=booth_rows(acc_bits, True, factor, False), ffs=acc_bits + reach), total


def group_scale_bits(spec: LayerSpec) -> int:
    """Stored bits of one group scale, 0 if there are none."""
    if not isinstance(spec.granularity, PerGroup):
        return 0
    if spec.granularity.scale is not None:
        return stored_scale_bits(spec.granularity.scale)
    return POW2_BITS if spec.scale_pow2 else scale_bits(bits(spec.out) if spec.out is not None else 8)

"""The clock that a folded network reaches on ECP5: the slowest of its pieces between registers, each by its structure.

A piece's delay is that of its template (`coeffs.toml`, [ecp5.timing]: `hwmodel fit` synthesizes it and adds up LUTs,
carry chains and mean wires, `netlist.slowest`), or is counted here from hops and chains. What placement and routing
make of the slowest piece, longer wires in larger designs and greater fan-out among it, is fitted to whole designs
([ecp5.clock]). Other families have no place and route here, so no clock.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from hwmodel import fabric
from hwmodel.coeffs import coefficients
from hwmodel.convert import factor_rows, usual_rescale
from hwmodel.fabric import kept
from hwmodel.folding import Fold
from hwmodel.formats import BINARY, Float, Format, bits
from hwmodel.layer import address_bits
from hwmodel.mac import does, format_of, owes, pair_key
from hwmodel.netlist import PLACED
from hwmodel.spec import CURVED, PerGroup, Rescale

HOP = PLACED.wire + PLACED.lut
"""One wire and one LUT."""
DSP_NS = 3.93
"""Through a MULT18X18D without its own registers, by nextpnr."""
JOINED = HOP + 2 * PLACED.join
"""One wire and a LUT of six inputs."""


def clock_mhz(chosen: Sequence[Fold], luts: float) -> tuple[float, str] | None:
    """MHz and the slowest piece ("layer: piece") of a design of so many LUTs; None where nobody could have judged it.

    That is a family without [clock] coefficients, unrolled layers, convolutions, tables and scales per group.
    """
    fit = coefficients().get("clock")
    judged = all(
        not fold.unrolled
        and fold.spec.positions == 1
        and not isinstance(fold.spec.granularity, PerGroup)
        and "table" not in fold.converter
        for fold in chosen
    )
    if fit is None or not judged:
        return None
    ns, name = max((ns, f"{fold.spec.name}: {piece}") for fold in chosen for piece, ns in pieces(fold))
    return 1000 / placed_ns(ns, luts, fit), name


def placed_ns(piece_ns: float, luts: float, fit: dict[str, float]) -> float:
    """The clock's period when the slowest piece takes `piece_ns` on mean wires in a design of so many LUTs."""
    return fit["one"] + piece_ns * (fit["piece"] + fit["size"] * math.log2(max(luts, 1.0)))


def chain_ns(width: int) -> float:
    """From registers through a sum of `width` bits."""
    if width < fabric.CARRIED:
        return PLACED.ff + JOINED
    return PLACED.ff + PLACED.wire + PLACED.enter + PLACED.pair * (math.ceil(width / 2) - 1) + PLACED.leave


def pieces(fold: Fold) -> Iterator[tuple[str, float]]:
    """Names and nanoseconds, on mean wires, of what stands between two ranks of registers of a layer."""
    weight, act = fold.spec.weight, fold.spec.act
    assert weight is not None and act is not None
    late = PLACED.ram - PLACED.ff
    waits = late if fold.weights.kind == "bram" or fold.column_folds > fabric.DEEPEST else 0.0
    if fold.pack is not None:
        yield "products in DSPs", PLACED.ff + 2 * PLACED.wire + DSP_NS + waits
    elif weight == act == BINARY:
        yield "agreements", PLACED.ff + (HOP if fold.simd == 1 else 2 * JOINED) + waits
    else:
        first, second = product_ns(weight, act)
        yield "product", first + waits
        yield "shifted product", second
    yield "sum", chain_ns(fold.acc_bits + owes(weight, act))
    yield "sequencer", _fitted("sequencer", "inner", bits=_counted(fold), one=1)
    rows = fold.spec.out_features // fold.units
    turns = _fitted(
        "drain",
        "inner",
        rows=(rows - 1).bit_length(),
        slots=(fold.share - 1).bit_length(),
        shared=fold.share > 1,
        one=1,
    )
    yield "turns", turns
    yield from _converter(fold, rows, turns)


def _counted(fold: Fold) -> int:
    return (fold.column_folds - 1).bit_length() + (fold.column_folds * fold.row_folds - 1).bit_length()


def _converter(fold: Fold, rows: int, turns: float) -> Iterator[tuple[str, float]]:
    spec, acc = fold.spec, fold.acc_bits
    chosen = choice_ns(fold.share)
    if spec.out is None:
        yield "turns at the output", PLACED.ff + chosen + HOP
        return
    late, steps = PLACED.ram - PLACED.ff, bits(spec.out)
    if fold.converter == "thresholds":
        for step in range(steps):
            words = rows << max(0, step - 1)
            waits = late if words > fabric.DEEPEST else 0.0
            first = _fitted("first step", "entry", bits=acc, one=1)
            if step == 0:
                yield "first comparison", max(first + chosen, first + waits)
            else:
                yield "comparison", _fitted("step", "entry", bits=acc, one=1) + waits
            if step == 0 and 1 < words <= fabric.DEEPEST:
                yield "address of levels", turns + JOINED + PLACED.join * max(0, address_bits(words) - 6)
        return
    found = spec.rescale or usual_rescale(spec, acc)
    kind = "constant" if found.kind == "plain" else found.kind
    yield f"{kind} factor", chosen + _fitted(kind, "entry", **factor_facts(found, acc))
    yield "offset", _fitted(kind, "inner", **factor_facts(found, acc))
    if found.patches:
        yield "patches", chosen + _fitted("patch", "entry", **patch_facts(found.patches, acc))
    if spec.activation in CURVED:
        yield "first comparison", _fitted("first step", "entry", bits=found.bits, one=1)
        yield "comparison", _fitted("step", "entry", bits=found.bits, one=1)
    elif isinstance(spec.out, Float):
        yield "jam", _fitted("jam", "entry", **round_facts(found.bits, found.shift))
        yield "minifloat", float_ns(spec.out)
    else:
        yield "rounding", _fitted("round_clip", "entry", **round_facts(found.bits, found.shift))
        yield "clipping", _fitted("round_clip", "inner", **round_facts(found.bits, found.shift))


def factor_facts(found: Rescale, acc_bits: int) -> dict[str, float]:
    """What the delay of `rtl/affine.v` depends on."""
    rows = factor_rows(acc_bits, found.factor_bits) if found.kind == "runtime" else 0
    return {
        "rows": rows,
        "adds": found.adds,
        "stages": found.factor_bits if found.kind == "shift" else 0,
        "bits": found.bits,
        "one": 1,
    }


def patch_facts(count: int, acc_bits: int) -> dict[str, float]:
    """What the delay of `rtl/patch.v` depends on: a comparison and a choice, both trees of LUTs."""
    return {"match": math.log2(acc_bits), "listed": math.log2(1 + count), "one": 1}


def round_facts(width: int, shift: int) -> dict[str, float]:
    """What the delay of `rtl/round_clip.v` and `jam.v` depends on."""
    return {"sticky": math.log2(max(1, shift)), "bits": width - shift, "one": 1}


def _fitted(kind: str, start: str, **facts: float) -> float:
    fit = coefficients()["timing"][kind][start]
    return float(sum(fit.get(name, 0.0) * value for name, value in facts.items()))


def choice_ns(n: int) -> float:
    """What a multiplexer of n adds to a path."""
    if n == 1:
        return 0.0
    table = {int(size): ns for size, ns in coefficients()["timing"]["choice"].items()}
    return table[min((size for size in table if size >= n), default=max(table))]


def float_ns(out: Float) -> float:
    """The slowest stage of `rtl/to_float.v`; beyond the table that of its widest exponent."""
    table = coefficients()["timing"]["to_float"]
    found = table.get(f"e{out.exp}m{out.man}")
    return float(found if found is not None else max(table.values()))


@kept
def product_ns(weight: Format, act: Format) -> tuple[float, float]:
    """First and second stage of a product; of a pair that was not synthesized, the slowest it can stand in for."""
    table = coefficients()["timing"]["products"]
    found = table.get(pair_key(weight, act))
    if found is None:
        less = [
            times
            for key, times in table.items()
            for x, y in [tuple(map(format_of, key.split()))]
            if (does(weight, x) and does(act, y)) or (does(weight, y) and does(act, x))
        ]
        found = [max((times[i] for times in less), default=0.0) for i in range(4)]
    return float(found[2]), float(found[3])

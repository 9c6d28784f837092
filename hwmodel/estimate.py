"""What a quantized network takes on a device: the one entry for callers above."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from hwmodel import flow, timing
from hwmodel.coeffs import coefficients, published
from hwmodel.cost import Cost, HwError
from hwmodel.devices import Device
from hwmodel.fabric import pricing
from hwmodel.fold_search import search_folding, whole
from hwmodel.folding import Fold, predict
from hwmodel.formats import Float, Format, Levels
from hwmodel.mac import pair_key
from hwmodel.network import Network, design_folders
from hwmodel.packing import WIDE_PORT
from hwmodel.plan import RESOURCES, chains_of, layer_costs, plan_streams, tightest, total_cycles
from hwmodel.spec import LayerSpec, PerGroup
from hwmodel.unroll import plan_unrolled

Mapping = Literal["lut", "dsp", "auto"]


@dataclass(frozen=True, slots=True)
class LayerEstimate:
    """One layer: its fold, resources, cycles alone (pipeline fill included), where weights lie, its converter."""

    name: str
    pe: int
    simd: int
    luts: int
    ffs: int
    dsps: int
    bram18: int
    cycles: int
    memory: str
    converter: str
    acc_bits: int


@dataclass(frozen=True, slots=True)
class Estimate:
    """A network on a device, one inference at a time.

    cycles: of a whole inference, those of the plan of `quantkit rtl` for specs that know their exact arithmetic. Layers
    with windows overlap (`hwmodel.flow`) from the input beat that completes the first window to the last result; any
    other layers run one after the other. interval: cycles from one result to the next where maps follow each other
    (`flow.interval`); None of layers without windows, and where it was not asked for.
    luts: logical LUTs (LUT1..LUT6 cells, before packing). fits: within every resource of the device.
    binding: the resource of which the largest share is used. residual: 90th percentile of the relative LUT
    error on synthesized designs of the kind `residual_of` that no coefficient was fitted to; None where sums are
    priced by published counters. fmax_mhz: the clock
    that place and route reaches, with fmax_residual, its error likewise, and the slowest piece of the design; None
    where no such tool has judged it (`timing.clock_mhz`): clock_mhz is an assumption.
    """

    device: str
    luts: int
    ffs: int
    dsps: int
    bram18: int
    cycles: int
    interval: int | None
    latency_us: float
    clock_mhz: float
    mapping: str
    fits: bool
    binding: str | None
    residual: float | None
    residual_of: str
    fmax_mhz: float | None
    fmax_residual: float | None
    slowest: str | None
    layers: tuple[LayerEstimate, ...]

    def to_json(self) -> dict[str, Any]:
        """A dictionary of JSON values."""
        return asdict(self) | {"layers": [asdict(layer) for layer in self.layers]}

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> Estimate:
        """Inverse of `to_json`, whatever else the record and its layers hold; KeyError where something is missing."""
        layers = tuple(
            LayerEstimate(**{f.name: layer[f.name] for f in fields(LayerEstimate)}) for layer in record["layers"]
        )
        return cls(**{f.name: record[f.name] for f in fields(cls)} | {"layers": layers})


def estimate(
    specs: Sequence[LayerSpec],
    device: Device,
    *,
    latency_us: float | None = None,
    luts: int | None = None,
    clock_mhz: float = 100.0,
    mapping: Mapping = "lut",
    interval: bool = True,
) -> Estimate:
    """Resources and latency of the best folding.

    Of layers with windows that feed each other it is that of `plan.plan_streams`, of any other of `search_folding`.

    latency_us: find the fewest LUTs within this latency. luts: find the lowest latency within this
    budget. With neither, `default_cycles` (or the fastest there is, if slower). mapping: "lut" never
    uses DSPs, "dsp" packs the products of every layer of integers into them, "auto" only if the LUT mapping
    does not fit. interval: without it that of layers with windows, whose maps are walked through, is left out.
    Raises `HwError` for a floating-point layer, and for a target that cannot be met, naming the
    nearest that can. A result that exceeds the device is returned with `fits` false.
    """
    specs = tuple(specs)
    if clock_mhz <= 0:
        raise HwError(f"a clock has more than 0 MHz, not {clock_mhz:g}")
    if mapping not in ("lut", "dsp", "auto"):
        raise HwError(f"unknown mapping {mapping!r}; accepted: lut, dsp, auto")
    if mapping == "auto":
        in_luts = _estimate(specs, device, latency_us, luts, clock_mhz, "lut", interval)
        in_dsps = in_luts if in_luts.fits else _estimate(specs, device, latency_us, luts, clock_mhz, "dsp", interval)
        return in_dsps if in_dsps.fits else in_luts
    return _estimate(specs, device, latency_us, luts, clock_mhz, mapping, interval)


def estimate_unrolled(network: Network, device: Device, *, clock_mhz: float = 100.0) -> Estimate:
    """Resources and latency with every weight in the logic (`hwmodel.unroll`): counted from the weights themselves.

    `HwError` for inputs of a layer that are no integers.
    """
    if clock_mhz <= 0:
        raise HwError(f"a clock has more than 0 MHz, not {clock_mhz:g}")
    chosen = plan_unrolled(network, device, fit=False)
    with pricing(device.family):
        return _summary(chosen, predict(chosen), sum(fold.cycles for fold in chosen), device, clock_mhz, "lut")


def of_plans(plans: Sequence[Fold], device: Device, *, clock_mhz: float = 100.0) -> Estimate:
    """What a design takes that was planned already, as `emit.write` and `emit_conv.write` write it."""
    with pricing(device.family):
        costs = layer_costs(plans)
        mapping: Mapping = "dsp" if any(cost.dsps for cost in costs) else "lut"
        found = _summary(plans, costs, total_cycles(plans), device, clock_mhz, mapping)
        streams = all(fold.spec.window is not None for fold in plans)
        return replace(found, interval=flow.interval(plans)) if streams else found


RECURRENT = "recurrent policies"
"""The kind of designs with GRUs or LSTMs, whose errors `benchmarks/validate_recurrent.py` measures."""
PLAN = "plan.json"
"""The file of an emitted design with what `of_plans` told of it, among other facts."""


def read_design(folder: Path, device: Device) -> Estimate | None:
    """What was told of the design in a directory of `quantkit rtl` when it was written, of several their sum.

    None for a design of older versions, and for one that was written for another device.
    """
    found: list[Estimate] = []
    for one in design_folders(folder):
        path = one / PLAN
        if not path.is_file():
            return None
        try:
            found.append(Estimate.from_json(json.loads(path.read_text())))
        except KeyError:
            return None
        except (TypeError, ValueError) as error:
            raise HwError(f"{path} is damaged: {' '.join(str(error).split())[:200]}") from None
    if any(one.device != device.name for one in found):
        return None
    return found[0] if len(found) == 1 else _sum(found, device)


def _sum(found: Sequence[Estimate], device: Device) -> Estimate:
    """Designs that follow each other on one device; the error is that of the worst, of clocks nothing is known."""
    worst = max(found, key=lambda one: one.residual or 0.0)
    used = {name: sum(getattr(one, name) for one in found) for name in RESOURCES}
    binding, share = tightest(used, device)
    intervals = [one.interval for one in found]
    return replace(
        worst,
        **used,
        cycles=sum(one.cycles for one in found),
        interval=None if None in intervals else sum(i for i in intervals if i is not None),
        latency_us=sum(one.latency_us for one in found),
        mapping="dsp" if used["dsps"] else "lut",
        fits=share <= 1,
        binding=binding if share > 0 else None,
        fmax_mhz=None,
        fmax_residual=None,
        slowest=None,
        layers=tuple(layer for one in found for layer in one.layers),
    )


@lru_cache(maxsize=4096)
def _estimate(
    specs: tuple[LayerSpec, ...],
    device: Device,
    latency_us: float | None,
    luts: int | None,
    clock_mhz: float,
    mapping: Mapping,
    interval: bool,
) -> Estimate:
    if chains := chains_of(specs):
        dsp = "all" if mapping == "dsp" else "none"
        plans = plan_streams(chains, device, latency_us=latency_us, luts=luts, clock_mhz=clock_mhz, dsp=dsp, fit=False)
        with pricing(device.family):
            costs = [cost for plan in plans for cost in layer_costs(plan)]
            found = _summary(
                [fold for plan in plans for fold in plan],
                costs,
                sum(map(total_cycles, plans)),
                device,
                clock_mhz,
                mapping,
            )
            return replace(found, interval=sum(map(flow.interval, plans))) if interval else found
    ports = [WIDE_PORT[device.family]] * len(specs) if mapping == "dsp" else None
    with pricing(device.family):
        chosen = search_folding(specs, latency_us=latency_us, luts=luts, clock_mhz=clock_mhz, ports=ports)
        return _summary(chosen, predict(chosen), sum(fold.cycles for fold in chosen), device, clock_mhz, mapping)


def _summary(
    chosen: Sequence[Fold], costs: Sequence[Cost], cycles: int, device: Device, clock_mhz: float, mapping: Mapping
) -> Estimate:
    layers = tuple(
        LayerEstimate(
            fold.spec.name,
            fold.pe,
            fold.simd,
            whole(cost.luts),
            whole(cost.ffs),
            whole(cost.dsps),
            whole(cost.bram18),
            fold.cycles,
            fold.weights.kind,
            fold.converter,
            fold.acc_bits,
        )
        for fold, cost in zip(chosen, costs, strict=True)
    )
    total = {name: sum(getattr(layer, name) for layer in layers) for name in RESOURCES}
    binding, share = tightest(total, device)
    kind, band = residual_band(chosen)
    clock = timing.clock_mhz(chosen, total["luts"])
    known = coefficients()["residual"].get(f"fmax {kind}")
    return Estimate(
        device=device.name,
        **total,
        cycles=cycles,
        interval=None,
        latency_us=cycles / clock_mhz,
        clock_mhz=clock_mhz,
        mapping=mapping,
        fits=share <= 1,
        binding=binding if share > 0 else None,
        residual=band,
        residual_of=kind,
        fmax_mhz=round(clock[0], 1) if clock and known else None,
        fmax_residual=float(known["p90"]) if clock and known else None,
        slowest=clock[1] if clock and known else None,
        layers=layers,
    )


def residual_band(chosen: Sequence[Fold]) -> tuple[str, float | None]:
    """Kind and 90th percentile of the error to expect: of whole designs where they were judged, else of the MACs.

    Whole designs were judged as the emitter writes them: linear layers without scales per group or tables, and
    recurrent cells. None by published counters, and of maxima and averages alone: no band was fitted to either.
    """
    if published():
        return "published counters", None
    known = coefficients()["residual"]
    kind = "layers" if len(chosen) == 1 else "policies"
    if any(fold.parts is not None for fold in chosen):
        kind = RECURRENT
    if chosen[0].unrolled and "unrolled" in known:
        kind = "unrolled"
    emitted = all(
        fold.spec.positions == 1 and not isinstance(fold.spec.granularity, PerGroup) and "table" not in fold.converter
        for fold in chosen
    )
    if emitted and kind in known:
        return kind, float(known[kind]["p90"])
    macs = [residual(f.spec.weight, f.spec.act) for f in chosen if f.spec.macs]  # type: ignore[arg-type]
    if not macs:
        return "pooling units", None
    return "units", max(band for band in macs if band is not None)


def mac_kind(weight: Format, act: Format) -> str:
    """The name under which the fit reports errors of such MACs."""
    if isinstance(weight, Levels) or isinstance(act, Levels):
        return "mac ternary/binary"
    if pair_key(weight, act) not in coefficients()["products"]:
        return "mac off-table"
    floats = isinstance(weight, Float) + isinstance(act, Float)
    return ("mac int", "mac mixed", "mac minifloat")[floats]


def residual(weight: Format, act: Format) -> float | None:
    """90th percentile of the relative LUT error of MACs of this kind on held-out units; None by published counters."""
    if published():
        return None
    return float(coefficients()["residual"][mac_kind(weight, act)]["p90"])

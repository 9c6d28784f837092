"""What a quantized network takes on a device: the one entry for callers above."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

from hwmodel.cost import Cost, HwError
from hwmodel.devices import Device
from hwmodel.folding import Fold, cheapest, front, search_folding, stream_costs
from hwmodel.formats import Float, Format, Levels
from hwmodel.mac import Mapping, coefficients, pair_key
from hwmodel.spec import LayerSpec

__all__ = ["Estimate", "HwError", "LayerEstimate", "default_cycles", "estimate"]


@dataclass(frozen=True, slots=True)
class LayerEstimate:
    """One layer: its fold, resources, cycles (pipeline fill included), where weights lie, how sums are converted."""

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
    """A network on a device, one inference at a time, layer after layer.

    luts: logical LUTs (LUT1..LUT6 cells, before packing). fits: within every resource of the device.
    binding: the resource of which the largest share is used. residual: 90th percentile of the relative LUT
    error on synthesized designs of the kind `residual_of` that no coefficient was fitted to.
    """

    device: str
    luts: int
    ffs: int
    dsps: int
    bram18: int
    cycles: int
    latency_us: float
    clock_mhz: float
    mapping: str
    fits: bool
    binding: str | None
    residual: float
    residual_of: str
    layers: tuple[LayerEstimate, ...]

    def to_json(self) -> dict[str, Any]:
        """A dictionary of JSON values."""
        return asdict(self) | {"layers": [asdict(layer) for layer in self.layers]}


def default_cycles(specs: Sequence[LayerSpec]) -> int:
    """The latency aimed at when none is asked for: 64 multiply-accumulates per cycle, but 1,000 cycles at least."""
    return max(1000, math.ceil(sum(spec.macs for spec in specs) / 64))


def estimate(
    specs: Sequence[LayerSpec],
    device: Device,
    *,
    latency_us: float | None = None,
    luts: int | None = None,
    clock_mhz: float = 100.0,
    mapping: Mapping = "lut",
) -> Estimate:
    """Resources and latency of the best folding.

    latency_us: find the fewest LUTs within this latency. luts: find the lowest latency within this
    budget. With neither, `default_cycles` (or the fastest there is, if slower). mapping: "lut" never
    uses DSPs, "dsp" uses them wherever synthesis would, "auto" only if the LUT mapping does not fit.
    Raises `HwError` for a floating-point layer, and for a target that cannot be met, naming the
    nearest that can. A result that exceeds the device is returned with `fits` false.
    """
    specs = tuple(specs)
    if clock_mhz <= 0:
        raise HwError(f"a clock has more than 0 MHz, not {clock_mhz:g}")
    if mapping == "auto":
        in_luts = estimate(specs, device, latency_us=latency_us, luts=luts, clock_mhz=clock_mhz, mapping="lut")
        if in_luts.fits:
            return in_luts
        in_dsps = estimate(specs, device, latency_us=latency_us, luts=luts, clock_mhz=clock_mhz, mapping="dsp")
        return in_dsps if in_dsps.fits else in_luts
    return _estimate(specs, device, latency_us, luts, clock_mhz, mapping)


@lru_cache(maxsize=4096)
def _estimate(
    specs: tuple[LayerSpec, ...],
    device: Device,
    latency_us: float | None,
    luts: int | None,
    clock_mhz: float,
    mapping: Mapping,
) -> Estimate:
    if latency_us is None and luts is None:
        if not specs:
            raise HwError("there are no layers to estimate")
        quickest = sum(front(spec, mapping)[0].cycles for spec in specs)
        chosen = cheapest(specs, max(default_cycles(specs), quickest), clock_mhz=clock_mhz, mapping=mapping)
        return _summary(chosen, device, clock_mhz, mapping)
    budget = luts
    while True:
        chosen = search_folding(specs, device, latency_us=latency_us, luts=budget, clock_mhz=clock_mhz, mapping=mapping)
        found = _summary(chosen, device, clock_mhz, mapping)
        if luts is None or budget is None or found.luts <= luts:
            return found
        budget -= max(1, found.luts - luts)  # the buffers between the layers were not in the search


def predict(chosen: Sequence[Fold]) -> tuple[Cost, ...]:
    """Each layer's cost in the network, the buffers and streams between the layers included."""
    return tuple(fold.cost + more for fold, more in zip(chosen, stream_costs(chosen), strict=True))


def _summary(chosen: Sequence[Fold], device: Device, clock_mhz: float, mapping: Mapping) -> Estimate:
    layers = tuple(
        LayerEstimate(
            fold.spec.name,
            fold.pe,
            fold.simd,
            *_whole(cost),
            fold.cycles,
            fold.weights.kind,
            fold.converter,
            fold.acc_bits,
        )
        for fold, cost in zip(chosen, predict(chosen), strict=True)
    )
    total = {name: sum(getattr(layer, name) for layer in layers) for name in ("luts", "ffs", "dsps", "bram18")}
    share = {name: used / getattr(device, name) for name, used in total.items()}
    tightest = max(share, key=lambda name: share[name])
    cycles = sum(layer.cycles for layer in layers)
    kind, band = residual_band(chosen)
    return Estimate(
        device=device.name,
        **total,
        cycles=cycles,
        latency_us=cycles / clock_mhz,
        clock_mhz=clock_mhz,
        mapping=mapping,
        fits=max(share.values()) <= 1,
        binding=tightest if share[tightest] > 0 else None,
        residual=band,
        residual_of=kind,
        layers=layers,
    )


def _whole(cost: Cost) -> tuple[int, int, int, int]:
    return math.ceil(cost.luts - 1e-9), math.ceil(cost.ffs - 1e-9), math.ceil(cost.dsps), math.ceil(cost.bram18)


def residual_band(chosen: Sequence[Fold]) -> tuple[str, float]:
    """Kind and 90th percentile of the error to expect: of whole designs where they were judged, else of the MACs.

    Whole designs were judged as the emitter writes them: linear layers whose sums thresholds convert.
    """
    known = coefficients()["residual"]
    kind = "layers" if len(chosen) == 1 else "policies"
    emitted = all(fold.spec.positions == 1 and fold.converter in ("thresholds", "sum") for fold in chosen)
    if emitted and kind in known:
        return kind, float(known[kind]["p90"])
    macs = [residual(fold.spec.weight, fold.spec.act) for fold in chosen]  # type: ignore[arg-type]
    return "units", max(macs)


def mac_kind(weight: Format, act: Format) -> str:
    """The name under which the fit reports errors of such MACs."""
    if isinstance(weight, Levels) or isinstance(act, Levels):
        return "mac ternary/binary"
    if pair_key(weight, act) not in coefficients()["products"]:
        return "mac off-table"
    floats = isinstance(weight, Float) + isinstance(act, Float)
    return ("mac int", "mac mixed", "mac minifloat")[floats]


def residual(weight: Format, act: Format) -> float:
    """90th percentile of the relative LUT error of MACs of this kind on held-out units."""
    return float(coefficients()["residual"][mac_kind(weight, act)]["p90"])

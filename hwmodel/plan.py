"""How a network is folded for the Verilog that `emit` writes: what it costs and how many cycles it takes.

All converters are thresholds here. The cycles of a layer are

    words + 1 (memory) + MAC stages + converter stages + results waiting per converter

from the last input beat accepted to `out_valid`, summed over layers, because a layer starts when
the one before it has delivered its last code.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hwmodel.convert import converters
from hwmodel.cost import Cost, HwError
from hwmodel.devices import Device
from hwmodel.estimate import default_cycles
from hwmodel.folding import BRAM_IN_LUTS, control, divisors
from hwmodel.formats import bits
from hwmodel.mac import mac_cost, pipeline_stages
from hwmodel.memory import ram, rom
from hwmodel.network import Network
from hwmodel.spec import LayerSpec


@dataclass(frozen=True, slots=True)
class Plan:
    """One layer at one parallelism. units: converters, each serving pe / units elements in turn."""

    spec: LayerSpec
    pe: int
    simd: int
    units: int
    cost: Cost
    cycles: int

    @property
    def row_folds(self) -> int:
        """Rows that an element computes one after the other."""
        return self.spec.out_features // self.pe

    @property
    def column_folds(self) -> int:
        """Cycles of one dot product."""
        return self.spec.in_features // self.simd

    @property
    def share(self) -> int:
        """Elements that take turns at one converter."""
        return self.pe // self.units


def plan_layer(spec: LayerSpec, pe: int, simd: int) -> Plan:
    """The layer with `pe` rows and `simd` columns at once, its sums converted by thresholds."""
    weight, act, width = spec.weight, spec.act, spec.acc_bits
    assert weight is not None and act is not None and width is not None
    row_folds, column_folds = spec.out_features // pe, spec.in_features // simd
    cost = mac_cost(weight, act, width, simd) * pe
    cost += rom(pe * simd * bits(weight), row_folds * column_folds).cost + ram(simd * bits(act), column_folds).cost
    cost += control(column_folds, row_folds, 1)
    unit = next(c for c in converters(spec, width) if c.method in ("thresholds", "sum"))
    fewest = next(n for n in divisors(pe) if n * column_folds >= pe)
    options = []
    for units in sorted({fewest, pe}):
        share = pe // units
        one = unit.cost
        if share > 1:
            one += Cost(luts=math.ceil((share - 1) / 3) * width + 1, ffs=share)
        for step in range(0 if spec.out is None else bits(spec.out)):  # two levels per word, but for the first step
            rows = spec.out_features // units
            one += (rom(2 * width, rows << (step - 1)) if step else rom(width, rows)).cost
        options.append((units, one * units))
    units, converting = min(options, key=lambda option: option[1].luts + BRAM_IN_LUTS * option[1].bram18)
    fill = 1 + pipeline_stages(weight, act, simd) + unit.stages + pe // units - 1
    return Plan(spec, pe, simd, units, cost + converting, row_folds * column_folds + fill)


def plan_network(
    network: Network,
    device: Device,
    *,
    latency_us: float | None = None,
    luts: int | None = None,
    clock_mhz: float = 100.0,
) -> tuple[Plan, ...]:
    """The folding with the fewest LUTs within `latency_us`, or the fewest cycles within `luts`.

    With neither, the fewest LUTs within `default_cycles`. Exact over all divisors; `HwError` names
    the nearest design and what binds where the target cannot be met.
    """
    if latency_us is not None and luts is not None:
        raise HwError("give a latency or a LUT budget, not both")
    fronts = [_front(spec) for spec in network.specs]
    limit = luts if latency_us is None and luts is not None else None
    if limit is not None:
        found = min(
            (c for c in _choices(fronts) if _luts(c) <= limit), key=lambda c: (total_cycles(c), _luts(c)), default=None
        )
        if found is None:
            small = tuple(f[-1] for f in fronts)
            big = max(small, key=lambda p: p.cost.luts)
            raise HwError(
                f"{luts} LUTs cannot be met: the nearest is {math.ceil(_luts(small))} LUTs "
                f"({total_cycles(small) / clock_mhz:g} us), bound by layer {big.spec.name!r} with "
                f"{math.ceil(big.cost.luts)} LUTs"
            )
        return found
    quickest = tuple(f[0] for f in fronts)
    if latency_us is None:
        cycles = max(default_cycles(network.specs), total_cycles(quickest))
    else:
        cycles = math.floor(latency_us * clock_mhz + 1e-9)
    found = min(
        (c for c in _choices(fronts) if total_cycles(c) <= cycles),
        key=lambda c: (_luts(c), total_cycles(c)),
        default=None,
    )
    if found is None:
        slow = max(quickest, key=lambda p: p.cycles)
        raise HwError(
            f"{cycles / clock_mhz:g} us at {clock_mhz:g} MHz cannot be met: the nearest is "
            f"{total_cycles(quickest) / clock_mhz:g} us ({total_cycles(quickest)} cycles, "
            f"{math.ceil(_luts(quickest))} LUTs), "
            f"bound by layer {slow.spec.name!r} with {slow.cycles} cycles at full parallelism"
        )
    share = {name: getattr(total(found), name) / getattr(device, name) for name in ("luts", "ffs", "bram18")}
    tightest = max(share, key=lambda name: share[name])
    if share[tightest] > 1:
        raise HwError(
            f"the design needs {math.ceil(getattr(total(found), tightest))} {tightest}, but {device.name} has "
            f"{getattr(device, tightest)}; allow more latency or choose a larger part"
        )
    return found


def _front(spec: LayerSpec) -> list[Plan]:
    """Plans that no other beats in cycles and LUTs: ascending cycles, descending LUTs."""
    every = [plan_layer(spec, pe, simd) for pe in divisors(spec.out_features) for simd in divisors(spec.in_features)]
    return _nondominated([(p,) for p in every], lambda c: c[0])


def _choices(fronts: list[list[Plan]]) -> list[tuple[Plan, ...]]:
    """Nondominated choices of one plan per layer."""
    chosen: list[tuple[Plan, ...]] = [()]
    for options in fronts:
        chosen = _nondominated([(*c, p) for c in chosen for p in options], lambda c: c)
    return chosen


def _nondominated(choices: list[tuple[Plan, ...]], keep: Any) -> list[Any]:
    kept: list[Any] = []
    fewest = math.inf
    for choice in sorted(choices, key=lambda c: (total_cycles(c), _luts(c))):
        if _luts(choice) < fewest:
            fewest = _luts(choice)
            kept.append(keep(choice))
    return kept


def total_cycles(plans: Sequence[Plan]) -> int:
    """Cycles of one inference."""
    return sum(p.cycles for p in plans)


def _luts(plans: Sequence[Plan]) -> float:
    return sum(p.cost.luts for p in plans)


def total(plans: Sequence[Plan]) -> Cost:
    """Resources of all layers."""
    return sum((p.cost for p in plans), Cost())


# ---------------------------------------------------------------------------------------------------
# Memories

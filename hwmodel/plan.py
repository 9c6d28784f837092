"""How a network is folded for the Verilog that `emit` writes: the folds that `estimate` chooses, and nothing else.

So the price of a design and its cycles are those of the estimate, given the same target and specs that
know their exact arithmetic (`affine.solved`). The cycles of a layer are

    words + 1 (memory) + MAC stages + converter stages + results waiting per converter

from the last input beat accepted to `out_valid`, summed over layers, because a layer starts when
the one before it has delivered its last code.
"""

from __future__ import annotations

from collections.abc import Sequence

from hwmodel.affine import solved
from hwmodel.conv import chain_cycles
from hwmodel.cost import Cost, HwError
from hwmodel.devices import Device
from hwmodel.fabric import pricing
from hwmodel.folding import Fold, predict, search_folding, whole
from hwmodel.network import Network
from hwmodel.packing import WIDE_PORT
from hwmodel.spec import LayerSpec


def plan_network(
    network: Network,
    device: Device,
    *,
    latency_us: float | None = None,
    luts: int | None = None,
    clock_mhz: float = 100.0,
    dsp: str = "none",
) -> tuple[Fold, ...]:
    """`folding.search_folding` of the network with the exact arithmetic behind its sums.

    dsp: "none", "all", or names of layers, separated by commas, whose products go into DSPs where their formats can.
    `HwError` names what is exceeded where the design does not fit the device.
    """
    if any(layer.thresholds is not None and layer.spec.rescale is None for layer in network.layers):
        network = solved(network)
    return plan_specs(network.specs, device, latency_us=latency_us, luts=luts, clock_mhz=clock_mhz, dsp=dsp)


def plan_specs(
    specs: Sequence[LayerSpec],
    device: Device,
    *,
    latency_us: float | None = None,
    luts: int | None = None,
    clock_mhz: float = 100.0,
    dsp: str = "none",
) -> tuple[Fold, ...]:
    """`plan_network` of layers that need not follow each other in one design, but share the device and the target."""
    names = {spec.name for spec in specs} if dsp == "all" else set() if dsp == "none" else set(dsp.split(","))
    if unknown := sorted(names - {spec.name for spec in specs}):
        known = ", ".join(spec.name for spec in specs)
        raise HwError(f"there is no layer {unknown[0]!r} to put into DSPs; accepted: none, all, {known}")
    ports = [WIDE_PORT[device.family] if spec.name in names else None for spec in specs]
    with pricing(device.family):
        found = search_folding(specs, device, latency_us=latency_us, luts=luts, clock_mhz=clock_mhz, ports=ports)
        cost = total(found)
    share = {name: getattr(cost, name) / max(1, getattr(device, name)) for name in ("luts", "ffs", "dsps", "bram18")}
    tightest = max(share, key=lambda name: share[name])
    if share[tightest] > 1:
        raise HwError(
            f"the design needs {getattr(cost, tightest)} {tightest}, but {device.name} has "
            f"{getattr(device, tightest)}; allow more latency or choose a larger part"
        )
    return found


def layer_costs(plans: Sequence[Fold]) -> tuple[Cost, ...]:
    """Whole cells of each layer in the network: the counts of `estimate`."""
    return tuple(Cost(*(whole(count) for count in (c.luts, c.ffs, c.dsps, c.bram18))) for c in predict(plans))


def total(plans: Sequence[Fold]) -> Cost:
    """Resources of all layers."""
    return sum(layer_costs(plans), Cost())


def total_cycles(plans: Sequence[Fold]) -> int:
    """Cycles of one inference; of layers with windows, which overlap, `conv.chain_cycles`."""
    if all(p.spec.window is not None for p in plans) and len(plans) > 1:
        return chain_cycles([p.stage for p in plans], [p.units for p in plans])[0]
    return sum(p.cycles for p in plans)

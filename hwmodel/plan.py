"""How a network is folded for the Verilog that `emit` writes: the folds that `estimate` chooses, and nothing else.

So the price of a design and its cycles are those of the estimate, given the same target and specs that
know their exact arithmetic (`affine.solved`). The cycles of a layer are

    words + 1 (memory) + MAC stages + converter stages + results waiting per converter

from the last input beat accepted to `out_valid`, summed over layers, because a layer starts when
the one before it has delivered its last code. In a recurrent cell the product with the state overlaps the
one with the input (`folding.lead`), and the gates add theirs once.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations

from hwmodel.affine import solved, unsolved
from hwmodel.cost import Cost, HwError
from hwmodel.devices import Device
from hwmodel.fabric import pricing
from hwmodel.flow import flow, queue_depths
from hwmodel.fold_search import default_cycles, fronts_of, search_folding, whole
from hwmodel.folding import Fold, predict, queues_of
from hwmodel.network import Network, inputs_of, outputs_of
from hwmodel.packing import WIDE_PORT
from hwmodel.spec import LayerSpec, links


def plan_network(
    network: Network,
    device: Device,
    *,
    latency_us: float | None = None,
    luts: int | None = None,
    clock_mhz: float = 100.0,
    dsp: str = "none",
) -> tuple[Fold, ...]:
    """`fold_search.search_folding` of the network with the exact arithmetic behind its sums.

    dsp: "none", "all", or names of layers, separated by commas, whose products go into DSPs where their formats can.
    `HwError` names what is exceeded where the design does not fit the device.
    """
    if unsolved(network):
        network = solved(network)
    ports = ports_of(network.specs, device, dsp)
    with pricing(device.family):
        found = search_folding(network.specs, latency_us=latency_us, luts=luts, clock_mhz=clock_mhz, ports=ports)
        check_fit(total(found), device)
    return found


def ports_of(specs: Sequence[LayerSpec], device: Device, dsp: str) -> list[int | None]:
    """The `port` of `layer_fold` for each layer; `HwError` for a name that no layer has."""
    able = {spec.name for spec in specs if not spec.joint and not spec.pool}
    names = able if dsp == "all" else set() if dsp == "none" else set(dsp.split(","))
    if unknown := sorted(names - able):
        known = ", ".join(spec.name for spec in specs if spec.name in able)
        raise HwError(f"there is no layer {unknown[0]!r} to put into DSPs; accepted: none, all, {known}")
    return [WIDE_PORT[device.family] if spec.name in names else None for spec in specs]


RESOURCES = ("luts", "ffs", "dsps", "bram18")


def tightest(used: Mapping[str, float], device: Device) -> tuple[str, float]:
    """The resource of which the largest share is used, and that share of what the device has; 1 is all of it."""
    share = {name: used[name] / max(getattr(device, name), 1e-9) for name in RESOURCES}  # of none, one is too many
    name = max(share, key=lambda name: share[name])
    return name, share[name]


def exceeded(cost: Cost, device: Device) -> str | None:
    """The resource of which a design needs most beyond what the device has; None where it fits."""
    name, share = tightest(asdict(cost), device)
    return name if share > 1 else None


def check_fit(cost: Cost, device: Device) -> None:
    """`HwError` names what is exceeded where a design does not fit the device."""
    if (name := exceeded(cost, device)) is not None:
        raise HwError(
            f"the design needs {getattr(cost, name):g} {name}, but {device.name} has "
            f"{getattr(device, name)}; allow more latency or choose a larger part"
        )


def plan_streams(
    chains: Sequence[Sequence[LayerSpec]],
    device: Device,
    *,
    latency_us: float | None = None,
    luts: int | None = None,
    clock_mhz: float = 100.0,
    dsp: str = "none",
    fit: bool = True,
) -> tuple[tuple[Fold, ...], ...]:
    """Folds of chains of layers with windows, which run one chain after the other and share the device.

    In a chain that overlaps, the slowest layer decides: its layers are as cheap as one limit of cycles allows. The
    limits of the chains go by one price of a cycle in LUTs: the lowest that meets the latency (with no target,
    `default_cycles` or the fastest that the device holds) or the highest that meets the LUTs. That is near the best
    and not proved to be it. `HwError` names the nearest design where the target cannot be met, and with `fit` what is
    exceeded where the device is too small.
    """
    if latency_us is not None and luts is not None:
        raise HwError("give a latency or a LUT budget, not both")
    specs = [spec for chain in chains for spec in chain]
    ports = iter(ports_of(specs, device, dsp))
    with pricing(device.family):
        designs = _Designs([_options(fronts_of(chain, [next(ports) for _ in chain])) for chain in chains])
        indices = range(len(designs.prices))
        if luts is None:
            wanted = default_cycles(specs) if latency_us is None else math.floor(latency_us * clock_mhz + 1e-9)
            least = bisect_left(indices, -wanted, key=lambda index: -designs.bound(index))
            best = _first(least, len(indices), lambda index: designs.cycles(index) <= wanted)
            if best == len(indices) and latency_us is not None:
                raise HwError(
                    f"{latency_us:g} us at {clock_mhz:g} MHz cannot be met: the nearest is "
                    f"{designs.told(best - 1, clock_mhz)}, {designs.slowest(best - 1)}"
                )
            if latency_us is None:
                best = min(best, len(indices) - 1)
                if designs.luts(best) > device.luts:
                    best = max(0, bisect_right(indices[:best], device.luts, key=designs.luts) - 1)
        else:
            most = bisect_right(indices, luts, key=designs.bare) - 1
            best = most - _first(0, most + 1, lambda back: designs.luts(most - back) <= luts)
            if best < 0:
                raise HwError(
                    f"{luts} LUTs cannot be met: the nearest is {designs.told(0, clock_mhz)}, {designs.largest(0)}"
                )
        if fit:
            try:
                check_fit(designs.cost(best), device)
            except HwError as error:
                raise HwError(f"{error}; {designs.nearest(best, device, clock_mhz)}") from None
        return designs.folds(best)


class _Designs:
    """The designs of chains of layers by ascending price of a cycle: the first has the fewest LUTs."""

    def __init__(self, options: Sequence[Sequence[_Option]]) -> None:
        self.options = options
        self.prices = sorted({price for rows in options for price in _prices(rows)})
        self.known: dict[tuple[int, int], int] = {}

    def rows(self, index: int) -> list[int]:
        """The number of the option of each chain."""
        price = self.prices[index] * (1 + 1e-9) if index else 0.0
        return [min(range(len(rows)), key=lambda i: rows[i].luts + price * rows[i].cycles) for rows in self.options]

    def picked(self, index: int) -> list[_Option]:
        """The option of each chain."""
        return [rows[i] for rows, i in zip(self.options, self.rows(index), strict=True)]

    def folds(self, index: int) -> tuple[tuple[Fold, ...], ...]:
        """The folds of each chain."""
        return tuple(option.folds for option in self.picked(index))

    def cycles(self, index: int) -> int:
        """Cycles of one inference, walked through."""
        for key in enumerate(self.rows(index)):
            if key not in self.known:
                self.known[key] = total_cycles(self.options[key[0]][key[1]].folds)
        return sum(self.known[key] for key in enumerate(self.rows(index)))

    def bound(self, index: int) -> int:
        """No more than its cycles."""
        return sum(option.bound for option in self.picked(index))

    def cost(self, index: int) -> Cost:
        """Its resources."""
        return sum(map(total, self.folds(index)), Cost())

    def luts(self, index: int) -> int:
        """Its LUTs."""
        return whole(self.cost(index).luts)

    def bare(self, index: int) -> int:
        """Its LUTs without queues, no more than all of them."""
        return sum(whole(cost.luts) for folds in self.folds(index) for cost in predict(folds))

    def told(self, index: int, clock_mhz: float) -> str:
        """Its latency and size in words."""
        cycles = self.cycles(index)
        return f"{cycles / clock_mhz:g} us ({cycles} cycles, {self.cost(index).luts:g} LUTs)"

    def slowest(self, index: int) -> str:
        """The layer that decides how fast it is, in words."""
        fold = max((fold for folds in self.folds(index) for fold in folds), key=lambda fold: fold.cycles)
        return f"bound by layer {fold.spec.name!r} with {fold.cycles} cycles at PE = {fold.pe}, SIMD = {fold.simd}"

    def largest(self, index: int) -> str:
        """The layer with the most LUTs, in words."""
        every = [pair for folds in self.folds(index) for pair in zip(folds, layer_costs(folds), strict=True)]
        fold, cost = max(every, key=lambda pair: pair[1].luts)
        return f"bound by layer {fold.spec.name!r} with {cost.luts:g} LUTs at PE = {fold.pe}, SIMD = {fold.simd}"

    def nearest(self, index: int, device: Device, clock_mhz: float) -> str:
        """The fastest design with fewer LUTs than this one that fits the device, in words; or that none does."""
        most = bisect_right(range(index), device.luts, key=self.luts) - 1
        for at in range(most, -1, -1):
            if not exceeded(self.cost(at), device):
                return f"the nearest that fits takes {self.told(at, clock_mhz)}, {self.slowest(at)}"
        name = exceeded(self.cost(0), device) or "luts"
        return f"none fits: the smallest needs {getattr(self.cost(0), name):g} {name}, {self.largest(0)}"


def chains_of(specs: Sequence[LayerSpec]) -> tuple[tuple[LayerSpec, ...], ...]:
    """Specs with windows as designs that run one after the other: sums that leave end a design.

    () where they are no such designs: a layer without a window, or one that reads other maps than it is given.
    """
    found: list[tuple[LayerSpec, ...]] = []
    rest = list(specs)
    while rest:
        ends = [i for i, spec in enumerate(rest) if spec.out is None]
        size = ends[0] + 1 if ends else len(rest)
        found.append(tuple(rest[:size]))
        rest = rest[size:]
    return tuple(found) if all(map(_meet, found)) else ()


def _meet(chain: Sequence[LayerSpec]) -> bool:
    """Whether every layer has a window and reads what the layers before it give."""
    if any(spec.window is None or spec.act is None for spec in chain):
        return False
    try:
        reads = links(chain)
    except ValueError:
        return False
    first = chain[0]
    for spec, sources in zip(chain, reads, strict=True):
        if len(sources) != 1 + (spec.op == "add"):
            return False
        for source, act in zip(sources, (spec.act, spec.second), strict=False):
            given = (first.act, inputs_of(first)) if source < 0 else (chain[source].out, outputs_of(chain[source]))
            if given != (act, inputs_of(spec)):
                return False
    return True


@dataclass(frozen=True, slots=True)
class _Option:
    """A chain at one limit. cycles: of its slowest layer; bound: no more than those of the chain, which a layer beside
    the first may begin before; luts: of its layers."""

    cycles: int
    bound: int
    luts: float
    folds: tuple[Fold, ...]


def _options(fronts: Sequence[Sequence[Fold]]) -> list[_Option]:
    """A chain at every limit that changes it, by ascending cycles and descending LUTs."""
    found: list[_Option] = []
    reads = links([options[0].spec for options in fronts])
    bound = [i for i, sources in enumerate(reads) if i == 0 or -1 not in sources]
    slowest = max(options[0].cycles for options in fronts)
    for limit in sorted({slowest, *(fold.cycles for options in fronts for fold in options if fold.cycles > slowest)}):
        folds = tuple(min((f for f in options if f.cycles <= limit), key=_luts) for options in fronts)
        cost = sum(map(_luts, folds))
        if not found or cost < found[-1].luts:
            found.append(_Option(max(f.cycles for f in folds), max(folds[i].cycles for i in bound), cost, folds))
    return found


def _first(low: int, high: int, holds: Callable[[int], bool]) -> int:
    """The first of low .. high - 1 from which on something holds, tried first near `low`; `high` if it never does.

    >>> _first(2, 100, lambda i: i >= 9)
    9
    """
    step = 1
    while low < high and not holds(min(low + step, high) - 1):
        low, step = min(low + step, high), 2 * step
    return low + bisect_left(range(low, min(low + step, high) - 1), True, key=holds) if low < high else high


def _prices(rows: Sequence[_Option]) -> Iterator[float]:
    """Prices of a cycle in LUTs at which the best option may change: the slopes between all pairs; and none."""
    yield 0.0
    for fast, slow in combinations(rows, 2):
        yield (fast.luts - slow.luts) / (slow.cycles - fast.cycles)


def _luts(fold: Fold) -> float:
    return fold.cost.luts


def layer_costs(plans: Sequence[Fold]) -> tuple[Cost, ...]:
    """Whole cells of each layer in the network: the counts of `estimate`."""
    costs = predict(plans)
    costs = tuple(cost + more for cost, more in zip(costs, queues_of(plans, queue_depths(plans)), strict=True))
    return tuple(Cost(*(whole(count) for count in (c.luts, c.ffs, c.dsps, c.bram18))) for c in costs)


def total(plans: Sequence[Fold]) -> Cost:
    """Resources of all layers."""
    return sum(layer_costs(plans), Cost())


def total_cycles(plans: Sequence[Fold]) -> int:
    """Cycles of one inference; of layers with windows, which overlap, `flow.flow`."""
    if all(p.spec.window is not None for p in plans) and len(plans) > 1:
        return flow(plans).cycles
    return sum(p.cycles for p in plans)

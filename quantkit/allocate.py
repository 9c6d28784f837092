"""Mixed precision under budgets: which formats each layer gets, as a mixed-integer program.

One binary x for each layer l, cell (formats of weights w and inputs a, granularity), format o of the layer's output
and fold f, a number of rows and columns at work at once:

    minimize    sum of x * loss(l, w, a)
    subject to  sum of x = 1 for each layer
                o of a layer = a of the next one, for each format
                sum of x * cost(l, w, a, o, f) <= budget, for each budget: LUTs, DSPs, BRAM, cycles, KiB of weights

Assumed: losses of layers add up (see `sensitivity`), and so do costs. The second holds but for the buffers between
layers, whose width depends on both neighbours. Embeddings have weights and no inputs: one takes memory alone, and the
layers before and behind it follow each other. So an allocation is a proposal: its cost is that of `hwmodel.estimate`
and its return that of episodes, as of any design. Options that another of the same formats a and o beats or equals
everywhere are left out before, which changes no optimum. Solved by HiGHS (scipy.optimize.milp).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from hwmodel.cost import HwError
from hwmodel.fabric import kept
from hwmodel.fold_search import default_cycles, front, whole
from hwmodel.formats import Format
from quantkit.errors import InputError
from quantkit.sensitivity import Cell

RESOURCES = ("luts", "dsps", "bram18", "latency_us", "weight_kib")
"""What can have a budget."""
_GAP = 1e-6
_FIRST = 256
"""Variables of the first integer program."""


@dataclass(frozen=True)
class Allocation:
    """A cell for each layer, the sum of their losses, and what they are predicted to take, by resource."""

    cells: tuple[Cell, ...]
    loss: float
    costs: Mapping[str, float]


@dataclass(frozen=True)
class Problem:
    """Options of all layers: arrays of one element per option, `uses` (options, RESOURCES).

    act, out: numbers of formats among those of the layer and of the one behind it; -1 of an embedding.
    """

    cells: tuple[Cell, ...]
    layer: np.ndarray
    act: np.ndarray
    out: np.ndarray
    uses: np.ndarray

    @property
    def loss(self) -> np.ndarray:
        """The loss of each option."""
        return np.array([cell.loss for cell in self.cells])


def problem(
    cells: Mapping[str, Sequence[Cell]],
    *,
    on: Collection[str] = RESOURCES,
    clock_mhz: float = 100.0,
    port: int | None = None,
) -> Problem:
    """All options worth having of a chain of layers, in order.

    on: the resources that will have a budget or be minimized; LUTs (memory, where nothing is priced) always count.
    port: the DSPs' wide port where they multiply; None: all products in LUTs. If a cell is one that the cost model
    refuses, such as float inputs, nothing is priced: there are no LUTs, DSPs, block RAM or latency, only memory.
    """
    layers = [list(options) for options in cells.values()]
    chain = [index for index, options in enumerate(layers) if options[0].spec is not None]
    behind = dict(itertools.pairwise(chain))
    ids = [{name: i for i, name in enumerate(dict.fromkeys(cell.acts for cell in options))} for options in layers]
    resolved: list[dict[str, Format | None]] = [
        {cell.acts: None if cell.spec is None else cell.spec.act for cell in options} for options in layers
    ]
    specs = [cell.spec for options in layers for cell in options if cell.spec is not None]
    priced = all(spec.weight is not None and spec.act is not None for spec in specs)
    counted = [RESOURCES.index(name) for name in {*on, "luts" if priced else "weight_kib"}]
    rows: list[tuple[Cell, int, int, int, tuple[float, ...]]] = []
    for index, options in enumerate(layers):
        following, table = behind.get(index), index not in chain
        outs: dict[str, int] = {"": -1 if table else 0} if following is None else ids[following]
        for name, out in outs.items():
            for acts, act in ids[index].items():
                mine = [cell for cell in options if cell.acts == acts]
                found: list[tuple[Cell, tuple[float, ...]]] = []
                for cell in mine:
                    kib = cell.bits / 8192
                    if not priced or cell.spec is None:
                        found.append((cell, (0.0, 0.0, 0.0, 0.0, kib)))
                        continue
                    spec = replace(cell.spec, out=None if following is None else resolved[following][name])
                    found += [(cell, (*uses, kib)) for uses in _folds(spec, port, clock_mhz)]
                keep = _undominated(np.array([[cell.loss, *(uses[i] for i in counted)] for cell, uses in found]))
                rows += [(found[i][0], index, -1 if table else act, out, found[i][1]) for i in keep]
    chosen, layer, act_ids, out_ids, uses_ = zip(*rows, strict=True)
    return Problem(chosen, np.array(layer), np.array(act_ids), np.array(out_ids), np.array(uses_, np.float64))


@kept
def _folds(spec: object, port: int | None, clock_mhz: float) -> tuple[tuple[float, ...], ...]:
    """LUTs, DSPs, BRAM18 and latency of each fold worth having."""
    return tuple(
        (
            float(whole(fold.cost.luts)),
            float(whole(fold.cost.dsps)),
            float(whole(fold.cost.bram18)),
            fold.cycles / clock_mhz,
        )
        for fold in front(spec, port)  # type: ignore[arg-type]
    )


def _undominated(points: np.ndarray) -> list[int]:
    """Indices of points (n, d) that no other one is at most everywhere; the first of equal ones."""
    order = np.lexsort(points.T[::-1])
    kept: list[int] = []
    best = np.empty((0, points.shape[1]))
    for i in order:
        if not (best <= points[i]).all(axis=1).any():
            kept.append(int(i))
            best = np.vstack([best, points[i]])
    return sorted(kept)


def allocate(given: Problem, budgets: Mapping[str, float], minimize: str = "loss") -> Allocation:
    """The options with the least loss (or of one resource the least use) within the budgets, to a gap of 1e-6.

    Among equal losses the one with fewer LUTs, or less memory. InputError for an unknown resource, and for budgets
    that nothing meets, with the nearest that something does.
    """
    for name in (*budgets, *([] if minimize == "loss" else [minimize])):
        if name not in RESOURCES:
            raise InputError(f"unknown budget {name!r}; budgets: {', '.join(RESOURCES)}")
    found = _solve(given, budgets, minimize)
    if found is None:
        raise InputError(_nearest(given, budgets))
    return found


def budget_front(
    given: Problem, resource: str, budgets: Mapping[str, float] | None = None, points: int = 12
) -> list[Allocation]:
    """The front of loss against one resource: its budget swept by equal ratios up to the use of the least loss.

    budgets: of the other resources, and the most of this one. Ascending use; no two equal. Raises as `allocate`.
    """
    budgets = dict(budgets or {})
    column = RESOURCES.index(resource)
    low = allocate(given, budgets, resource).costs[resource]
    high = allocate(given, budgets).costs[resource]
    if not given.uses[:, column].any() or high <= low:
        return [allocate(given, budgets | {resource: high})]
    limits = np.geomspace(max(low, 1e-9), high, points)
    found: dict[tuple[Cell, ...], Allocation] = {}
    for limit in limits:
        limit = math.ceil(limit * (1 + 1e-9)) if resource in ("luts", "dsps", "bram18") else limit * (1 + 1e-9)
        best = allocate(given, budgets | {resource: limit})
        found.setdefault(tuple(_names(best.cells)), best)  # type: ignore[arg-type]
    return sorted(found.values(), key=lambda a: (a.costs[resource], -a.loss))


def _names(cells: Iterable[Cell]) -> list[tuple[str, str, str]]:
    return [(cell.weights, cell.acts, cell.granularity) for cell in cells]


def _solve(given: Problem, budgets: Mapping[str, float], minimize: str) -> Allocation | None:
    """None if nothing is within the budgets."""
    from scipy.sparse import csr_array

    layers = int(given.layer.max(initial=-1)) + 1
    given = _within(given, budgets)
    n = len(given.cells)
    if len(np.unique(given.layer)) < layers or not n:
        return None
    tie = given.uses[:, 0] if given.uses[:, 0].any() else given.uses[:, -1]
    tie = tie / max(1e-30, tie.max() * layers)
    if minimize == "loss":
        loss = given.loss
        objective = loss / max(float(loss.max()), 1e-30) + 1e-6 * tie
    else:
        use = given.uses[:, RESOURCES.index(minimize)]
        objective = use / max(float(use.max()), 1e-30) + 1e-6 * given.loss / max(float(given.loss.max()), 1e-30)
    rows, columns, values = list[np.ndarray](), list[np.ndarray](), list[np.ndarray]()
    low, high = list[float](), list[float]()

    def add(members: np.ndarray, weights: np.ndarray, least: float, most: float) -> None:
        rows.append(np.full(len(members), len(low)))
        columns.append(members)
        values.append(weights)
        low.append(least)
        high.append(most)

    for layer in range(layers):
        mine = np.flatnonzero(given.layer == layer)
        add(mine, np.ones(len(mine)), 1, 1)
    for layer, behind in itertools.pairwise(np.unique(given.layer[given.act >= 0])):
        mine, following = np.flatnonzero(given.layer == layer), np.flatnonzero(given.layer == behind)
        for fmt in np.unique(np.concatenate((given.out[mine], given.act[following]))):
            out, act = mine[given.out[mine] == fmt], following[given.act[following] == fmt]
            add(np.concatenate((out, act)), np.concatenate((np.ones(len(out)), -np.ones(len(act)))), 0, 0)
    for name, budget in budgets.items():
        use = given.uses[:, RESOURCES.index(name)]
        unit = max(float(use.max()), 1e-30)
        add(np.arange(n), use / unit, -np.inf, budget * (1 + 1e-12) / unit)
    matrix = csr_array((np.concatenate(values), (np.concatenate(rows), np.concatenate(columns))), shape=(len(low), n))
    solution = _least(objective, matrix, np.array(low), np.array(high))
    if solution is None:
        return None
    chosen = np.flatnonzero(solution > 0.5)
    chosen = chosen[np.argsort(given.layer[chosen])]
    cells = tuple(given.cells[i] for i in chosen)
    costs = dict(zip(RESOURCES, given.uses[chosen].sum(axis=0).tolist(), strict=True))
    return Allocation(cells, sum(cell.loss for cell in cells), costs)


def _least(objective: np.ndarray, matrix: Any, low: np.ndarray, high: np.ndarray) -> np.ndarray | None:
    """Binaries x that minimize objective @ x with low <= matrix @ x <= high; None if there are none.

    A program without integrality gives a bound and each variable's reduced cost, by how much at least the objective
    exceeds the bound if that variable is 1. The integer program over the few with the smallest gives a solution; those
    whose reduced cost is above its distance from the bound cannot be in a better one. No limit of time: the
    same program has the same solution on any machine.
    """
    from scipy.optimize import Bounds, LinearConstraint, linprog, milp

    equal = low == high
    relaxed = linprog(
        objective, A_eq=matrix[equal], b_eq=high[equal], A_ub=matrix[~equal] if (~equal).any() else None,
        b_ub=high[~equal] if (~equal).any() else None, method="highs",
    )  # fmt: skip
    if relaxed.x is None:
        return None
    prices = np.zeros(len(low))
    prices[equal] = relaxed.eqlin.marginals
    if (~equal).any():
        prices[~equal] = relaxed.ineqlin.marginals
    reduced = objective - matrix.T @ prices
    order = np.argsort(reduced, kind="stable")
    count = _FIRST
    while True:
        some = np.sort(order[:count])
        result = milp(
            objective[some],
            constraints=LinearConstraint(matrix[:, some], low, high),
            integrality=np.ones(len(some)),
            bounds=Bounds(0, 1),
            options={"mip_rel_gap": _GAP},
        )
        enough = len(some) == len(objective)
        if result.x is not None:
            possible = int((reduced <= result.fun - relaxed.fun + _GAP * abs(result.fun)).sum())
            if enough or possible <= count:
                found = np.zeros(len(objective))
                found[some] = result.x
                return found
            count = possible
        elif enough:
            return None
        else:
            count *= 4


def _within(given: Problem, budgets: Mapping[str, float]) -> Problem:
    """Without the options that exceed a budget together with the least use of all other layers."""
    alive = np.ones(len(given.cells), bool)
    for name, budget in budgets.items():
        use = given.uses[:, RESOURCES.index(name)]
        least = np.array([use[given.layer == layer].min() for layer in range(int(given.layer.max()) + 1)])
        alive &= use + least.sum() - least[given.layer] <= budget * (1 + 1e-9)
    cells = tuple(cell for cell, kept in zip(given.cells, alive, strict=True) if kept)
    return Problem(cells, given.layer[alive], given.act[alive], given.out[alive], given.uses[alive])


def _nearest(given: Problem, budgets: Mapping[str, float]) -> str:
    """Which budget cannot be met, and the least that can: given the others, or else alone."""
    asked = ", ".join(f"{name} <= {limit:g}" for name, limit in budgets.items())
    for name in budgets:
        rest = {key: limit for key, limit in budgets.items() if key != name}
        if best := _solve(given, rest, name):
            with_rest = " with the other budgets" if rest else ""
            return f"no formats meet {asked}; the nearest{with_rest} is {name} = {best.costs[name]:g}"
    least = {name: _solve(given, {}, name) for name in budgets}
    each = ", ".join(f"{name} = {best.costs[name]:g}" for name, best in least.items() if best)
    return f"no formats meet {asked}; the nearest of each alone is {each}"


def default_latency(cells: Mapping[str, Sequence[Cell]], clock_mhz: float = 100.0) -> float | None:
    """The latency in microseconds that an estimate aims at when none is asked for; None if nothing can be priced."""
    specs = [[cell.spec for cell in options if cell.spec is not None] for options in cells.values()]
    specs = [options for options in specs if options]
    try:
        quickest = sum(min(front(spec)[0].cycles for spec in options) for options in specs)
    except HwError:
        return None
    return max(default_cycles([options[0] for options in specs]), quickest) / clock_mhz

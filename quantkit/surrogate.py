"""A design's loss and cost without evaluating it: losses of its cells added up, and the cost model on their specs."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from hwmodel.cost import HwError
from hwmodel.spec import LayerSpec
from quantkit.pareto import COLUMNS, value
from quantkit.sensitivity import Cell
from quantkit.study import Settings
from quantkit.targets import Target


@dataclass(frozen=True)
class Prediction:
    """loss: the sum over the layers. row: what is predicted of the design's row: cost, weight memory, bits."""

    loss: float
    row: dict[str, Any]

    def cost(self, column: str) -> float | None:
        """A cost column of `quantkit.pareto`; None where there is none, as the latency of a float layer."""
        return value(self.row, column)


def predict(cells: Sequence[Cell], settings: Settings) -> Prediction:
    """The prediction for one cell per layer, in the order of the layers of a chain.

    What a design takes in the end differs where a method changes what lies between the layers, such as factors that
    SmoothQuant leaves behind, and where weights are rounded along with those of the layers before. Embeddings take
    memory, and nothing else that is priced.
    """
    alone = [cell.spec for cell in cells if cell.spec is not None]
    specs = [*(replace(a, out=b.act) for a, b in itertools.pairwise(alone)), *alone[-1:]]
    bits = sum(cell.bits for cell in cells)
    weights = sum(cell.size for cell in cells)
    row: dict[str, Any] = {"weight_kib": bits / 8192, "bits_per_weight": bits / weights, "cost": None}
    costs = [_cost(target, tuple(specs)) for target in settings.targets]
    if costs:
        row["cost"] = costs[0]
    if settings.also:
        row["costs"] = {str(target): cost for target, cost in zip(settings.also, costs[1:], strict=True)}
    return Prediction(sum(cell.loss for cell in cells), row)


def _cost(target: Target, specs: Sequence[LayerSpec]) -> dict[str, Any]:
    try:
        found = target.price(specs, interval=False)
    except HwError as error:
        return {"error": str(error)}
    return {name: getattr(found, name) for name in _NAMES}


_NAMES = [path.removeprefix("cost.") for path, _, _ in COLUMNS.values() if path.startswith("cost.")]

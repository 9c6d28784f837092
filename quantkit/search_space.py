"""What a search chooses from: formats for each layer, budgets, and the designs made of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from hwmodel.formats import Format, bits, element, levels
from quantkit.allocate import Problem
from quantkit.pareto import value
from quantkit.recipe import Recipe, Step, step_text
from quantkit.sensitivity import Cell
from quantkit.statistics import Floats
from quantkit.study import design_id


@dataclass(frozen=True)
class SearchSpace:
    """What may be chosen: formats of weights and inputs for each layer, one granularity and one pipeline for all."""

    weights: tuple[str, ...]
    acts: tuple[str, ...]
    granularities: tuple[str, ...] = ("row",)
    pipelines: tuple[tuple[Step, ...], ...] = ((),)
    seed: int = 0


@dataclass(frozen=True)
class Limits:
    """What a design may use at most, by resource of `quantkit.allocate`."""

    budgets: Mapping[str, float]

    def cost(self, row: Mapping[str, Any], column: str) -> float | None:
        """A column of a row, or of a prediction of one, on its target; None where it has none or is over a budget."""
        found = {name: value(row, name) for name in (column, *self.budgets)}
        over = any((use := found[name]) is None or use > most for name, most in self.budgets.items())
        return None if over else found[column]


@dataclass(frozen=True)
class Candidate:
    """A design that may be played: its cells, one per layer, and the number of its pipeline."""

    recipe: Recipe
    cells: tuple[Cell, ...]
    pipeline: int

    @cached_property
    def id(self) -> str:
        """The id of its row."""
        return design_id(self.recipe)


Tables = list[dict[tuple[str, str, str, str], Cell]]
"""For each pipeline the cells by layer, formats of weights and inputs, and granularity."""
Programs = list[list[tuple[Problem, dict[str, float]]]]
"""For each pipeline and target what `allocate` takes."""


def features(designs: Sequence[Candidate], losses: Sequence[float], pipelines: int) -> tuple[Floats, ...]:
    """What a regression knows of designs, (designs, features) by group.

    The logarithm of each one's loss; the octaves of its layers' formats, with one feature for each further pipeline;
    the logarithms of its layers' losses alone.
    """
    cells = [one.cells for one in designs]
    plans = [[cell.spec or cell.plan() for cell in mine] for mine in cells]
    formats = [[_octaves(fmt) for plan in mine for fmt in (plan.weight, plan.act)] for mine in plans]
    others = [[4.0 * (one.pipeline == kind) for kind in range(1, pipelines)] for one in designs]
    alone = [[_log(cell.loss) for cell in mine] for mine in cells]
    return (
        np.array([[_log(loss)] for loss in losses]),
        np.hstack([np.array(formats), np.array(others)]),
        np.array(alone),
    )


def _log(loss: float) -> float:
    return math.log(max(loss, 1e-12))


def _octaves(fmt: Format | None) -> float:
    """The logarithm to base 2 of how many values a format has; 24 of float."""
    if fmt is None:
        return 24.0
    width = bits(element(fmt))
    return math.log2(len(levels(element(fmt)))) if width <= 8 else float(width)


def pipeline_text(steps: tuple[Step, ...]) -> str:
    """The text of a pipeline as rows have it."""
    return "+".join(step_text(step) for step in steps) or "rtn"

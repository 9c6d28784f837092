"""What to try against what `quantkit.analyze` found: each finding with the option as the command line takes it.

Rules on the measures of places, nothing else: whether an option helps is for the caller to try.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hwmodel import formats
from hwmodel.formats import Float, Format
from hwmodel.spec import PerRow, PerTensor
from quantkit import shelves
from quantkit.qlayers import LayerPlan
from quantkit.recipe import Recipe, Step, format_name, parse_format, step_text

if TYPE_CHECKING:
    from quantkit.analyze import Place

SATURATED = 0.01
"""Fraction of inputs outside the format's range that is a finding."""
OUTLIERS = 8.0
"""Largest input over the 99.9 percentile that is a finding where the scale follows the largest."""
SPREAD = 4.0
"""Largest row (or input channel) over the geometric mean of all that is a finding."""
DOMINANT = 0.4
"""Share of one place in the noise of all that is a finding; of two, three or four places 80, 67 or 50 %."""
COARSE_DB = 20.0
"""Weight SQNR below which another rounding than to nearest is tried."""


@dataclass(frozen=True)
class Advice:
    """A problem of some places, the option against it as the command line takes it, and the recipe it leads to."""

    places: tuple[str, ...]
    problem: str
    option: str
    recipe: Recipe


def candidates(places: Sequence[Place], recipe: Recipe, linked: frozenset[str] = frozenset()) -> list[Advice]:
    """What the measures suggest, one advice for each problem and option, not yet tried.

    linked: layers whose rows can be rescaled into the next layer. Several options against one problem have
    the same text of `problem`.
    """
    found: list[Advice] = []
    present = _options_of(recipe, "act_scales").get("scale", "mse")
    named = {name for name, _ in recipe.steps}

    def add(some: Sequence[Place], problem: str, changed: Recipe, option: str | None = None) -> None:
        if some and changed != recipe:
            option = option or " ".join(f"--step {step_text(step)}" for step in changed.steps)
            found.append(Advice(tuple(p.name for p in some), problem, option, changed))

    clipped = [p for p in places if (p.saturation or 0.0) > SATURATED]
    wild = [p for p in places if present == "absmax" and p.act != "float" and (p.outliers or 0.0) > OUTLIERS]
    for some, problem in (
        (clipped, f"up to {_most(clipped, 'saturation'):.1%} of the inputs saturate"),
        (wild, f"the largest input is up to {_most(wild, 'outliers'):.3g} times the 99.9 percentile"),
    ):
        for rule in ("percentile", "mse", "absmax"):
            if rule != present:
                add(some, problem, _with_act_scales(recipe, rule))

    uneven = [p for p in places if (p.weight_spread or 0.0) > SPREAD and p.granularity == str(PerTensor())]
    problem = f"the largest weights of a row are up to {_most(uneven, 'weight_spread'):.3g} times those of a usual one"
    if "equalize" not in named and any(p.name in linked for p in uneven):
        add(uneven, problem, _first(recipe, ("equalize", {})))
    add(uneven, problem, _per_row(recipe), "--granularity row")

    ranges = [p for p in places if p.op != "point" and p.act != "float" and (p.act_spread or 0.0) > SPREAD]
    if "smoothquant" not in named:
        problem = f"an input channel is up to {_most(ranges, 'act_spread'):.3g} times as large as a usual one"
        add(ranges, problem, _first(recipe, ("smoothquant", {})))

    coarse = [p for p in places if p.weight_sqnr_db is not None and p.weight_sqnr_db < COARSE_DB]
    if not any("weights" in shelves.methods()[name].CHANGES for name in named - {"rtn"}):
        steps = (*(s for s in recipe.steps if s[0] != "rtn"), ("gptq", {}))
        lowest = min((p.weight_sqnr_db or 0.0 for p in coarse), default=0.0)
        problem = f"weights keep as little as {lowest:.1f} dB when rounded to nearest"
        add(coarse, problem, dataclasses.replace(recipe, steps=steps))

    for place in places if len(places) > 1 else ():
        if place.share > max(DOMINANT, min(0.8, 2 / len(places))) and (plan := _wider(place)) is not None:
            text = f"{place.name}={format_name(plan.weight)}/{format_name(plan.act)}"
            entry = (place.name, dataclasses.replace(plan, granularity=recipe.plan[0][1].granularity))
            changed = dataclasses.replace(recipe, plan=(*recipe.plan, entry))
            add([place], f"it makes {place.share:.0%} of the error", changed, f"--layer '{text}'")
    return found


def _most(places: Sequence[Place], field: str) -> float:
    return max((getattr(p, field) for p in places), default=0.0)


def _options_of(recipe: Recipe, step: str) -> dict[str, Any]:
    return next((options for name, options in recipe.steps if name == step), {})


def _first(recipe: Recipe, step: Step) -> Recipe:
    return dataclasses.replace(recipe, steps=(step, *recipe.steps))


def _with_act_scales(recipe: Recipe, rule: str) -> Recipe:
    """The recipe with another scale rule for inputs, its other options kept but the old rule's percentile."""
    kept = {k: v for k, v in _options_of(recipe, "act_scales").items() if k not in ("scale", "percentile")}
    step: Step = ("act_scales", {"scale": rule, **kept})
    steps = [step if name == "act_scales" else (name, options) for name, options in recipe.steps]
    if step not in steps:
        changes = [shelves.methods()[name].CHANGES for name, _ in recipe.steps]
        steps.insert(next((i for i, c in enumerate(changes) if "weights" in c), len(steps)), step)
    return dataclasses.replace(recipe, steps=tuple(steps))


def _per_row(recipe: Recipe) -> Recipe:
    plan = tuple((pattern, dataclasses.replace(entry, granularity=PerRow())) for pattern, entry in recipe.plan)
    return dataclasses.replace(recipe, plan=plan)


def _wider(place: Place) -> LayerPlan | None:
    """8 bits in the same family where there were fewer; None where nothing would change."""

    def widened(fmt: Format | None) -> Format | None:
        if fmt is None or formats.bits(fmt) > 8 or (isinstance(fmt, Float) and formats.bits(fmt) == 8):
            return fmt
        return formats.parse("e4m3" if isinstance(fmt, Float) else "int8")  # becomes unsigned by itself

    old = [parse_format(name) for name in (place.weight, place.act)]
    same = all(fmt is None or formats.bits(fmt) >= 8 for fmt in old)
    plan = LayerPlan(widened(old[0]), widened(old[1]))
    if place.op == "point" and plan.act is not None:
        plan = LayerPlan(plan.act, plan.act)  # a point has no weight; the option wants two formats
    return None if same else plan

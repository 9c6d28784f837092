"""`Recipe`: what to do to a model, as plain data; `quantize` does it.

A recipe is a list of (pattern, LayerPlan) and a list of steps. Patterns are globs over layer
names, or the words `first` and `last`; later entries win. Two steps are implied where the
recipe names none of their kind: `act_scales` before the first step that sets weights, and
`rtn` at the end.
"""

from __future__ import annotations

import contextlib
import difflib
import fnmatch
import inspect
import math
import types
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from hwmodel import formats
from hwmodel.formats import Block
from hwmodel.spec import PerGroup, PerRow, parse_granularity
from quantkit import shelves
from quantkit.arithmetic import one_thread
from quantkit.capture import captured
from quantkit.errors import InputError
from quantkit.model import Calib, Model
from quantkit.qlayers import LayerPlan, QLayer
from quantkit.rounding import all_finite
from quantkit.walk import Visit, visit

Step = tuple[str, dict[str, Any]]

LIMITS: dict[str, tuple[float, float]] = {
    "alpha": (0, 1),
    "batch": (1, math.inf),
    "beta_end": (0, math.inf),
    "beta_start": (0, math.inf),
    "block": (1, math.inf),
    "damp": (0, math.inf),
    "lr": (0, math.inf),
    "percentile": (0, 100),
    "reg": (0, math.inf),
    "ridge": (0, math.inf),
    "rounds": (1, math.inf),
    "slow": (0, math.inf),
    "states": (1, math.inf),
    "steps": (0, math.inf),
    "sweeps": (1, math.inf),
    "tolerance": (0, math.inf),
    "warmup": (0, 1),
}
"""Least and largest value of the options of these names, whichever method has them; `samples` is 1 or more, or 0 (all)
where that is the default. A method may ask for more."""


EARLIER: dict[str, dict[str, Any]] = {"tequila": {"constant": "lambda"}}
"""Options whose defaults have changed, by step, with what they were: a record that does not name them means these."""


@dataclass(frozen=True)
class Recipe:
    """plan: (pattern, LayerPlan) pairs. steps: (method name, options) in order. seed: of every random choice."""

    plan: tuple[tuple[str, LayerPlan], ...]
    steps: tuple[Step, ...] = ()
    seed: int = 0

    def to_json(self) -> dict[str, Any]:
        """JSON values; `from_json` is the inverse. Options of `EARLIER` are in them whether they were given or not."""
        plan = [
            {
                "layers": pattern,
                "weight": format_name(entry.weight),
                "act": format_name(entry.act),
                "granularity": str(entry.granularity),
            }
            for pattern, entry in self.plan
        ]
        steps = [[name, _defaults(name) | options] for name, options in self.steps]
        return {"plan": plan, "steps": steps, "seed": self.seed}

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> Recipe:
        """Inverse of `to_json`."""
        plan = tuple((e["layers"], make_plan(e["weight"], e["act"], e["granularity"])) for e in record["plan"])
        steps = tuple((name, EARLIER.get(name, {}) | options) for name, options in record["steps"])
        return cls(plan, steps, record["seed"])

    def plan_for(self, name: str, index: int, count: int) -> LayerPlan:
        """The plan of the layer `name`, which is number `index` of `count`."""
        found = LayerPlan()
        for pattern, entry in self.plan:
            position = {"first": 0, "last": count - 1}.get(pattern)
            if position == index or (position is None and fnmatch.fnmatchcase(name, pattern)):
                found = entry
        return found


def _defaults(step: str) -> dict[str, Any]:
    """The options of `EARLIER` that a step has, as they are now when nobody gives them."""
    options = step_options(step) if step in EARLIER else {}
    return {option: options[option].default for option in EARLIER.get(step, {})}


def format_name(fmt: formats.Format | None) -> str:
    """A format's name, or "float"."""
    return "float" if fmt is None else str(fmt)


def parse_format(text: str) -> formats.Format | None:
    """A format by name; "float" means not quantized. InputError suggests the nearest name."""
    if text.strip().lower() in ("float", "fp32", "float32"):
        return None
    try:
        return formats.parse(text)
    except formats.FormatError as error:
        raise InputError(str(error)) from None


def make_plan(weight: str, act: str, granularity: str = "row") -> LayerPlan:
    """A LayerPlan of three texts; a block format of weights sets the granularity, in place of "row" only."""
    fmt, acts = parse_format(weight), parse_format(act)
    try:
        scales = parse_granularity(granularity)
    except ValueError as error:
        raise InputError(str(error)) from None
    if isinstance(fmt, Block):
        own = PerGroup(fmt.size, fmt.scale)
        if scales not in (PerRow(), own):
            raise InputError(f"weights in {fmt} have scales per {own}, not per {scales}; leave the granularity out")
        fmt, scales = fmt.elem, own
    return LayerPlan(fmt, acts, scales)


def parse_step(text: str) -> Step:
    """`gptq:damp=0.02,act_order=true` -> ("gptq", {"damp": 0.02, "act_order": True}), checked against the method.

    Raises InputError with the nearest name for an unknown method or option.
    """
    name, _, rest = text.partition(":")
    name = name.strip()
    if name not in shelves.method_names():
        near = difflib.get_close_matches(name, shelves.method_names(), n=1, cutoff=0.0)
        known = ", ".join(shelves.method_names())
        raise InputError(f"unknown step {name!r}; did you mean {near[0]!r}? Steps: {known}")
    accepted = step_options(name)
    options: dict[str, Any] = {}
    for item in filter(None, (part.strip() for part in rest.split(","))):
        key, equals, value = item.partition("=")
        if key not in accepted:
            raise InputError(_no_option(name, key))
        if not equals:
            raise InputError(f"step {name!r}, option {key!r} has no value; write {key}={accepted[key].default}")
        options[key] = _convert(value, accepted[key], f"step {name!r}, option {key!r}")
    check_options(name, options)
    return name, options


def check_options(name: str, options: dict[str, Any]) -> None:
    """Raise InputError for an option that the method does not have, and for a number beyond its limits."""
    accepted = step_options(name)
    for key, value in options.items():
        if key not in accepted:
            raise InputError(_no_option(name, key))
        least, most = LIMITS.get(key, (-math.inf, math.inf))
        if key == "samples":
            least = min(1, accepted[key].default)
        if isinstance(value, int | float) and not least <= value <= most:
            wanted = f"{least:g} or more" if most == math.inf else f"{least:g} to {most:g}"
            raise InputError(f"step {name!r}: {key}={value}; accepted: {wanted}")


def _no_option(name: str, key: str) -> str:
    accepted = step_options(name)
    near = difflib.get_close_matches(key, accepted, n=1)
    meant = f"did you mean {near[0]!r}? Its" if near else "its"
    return f"step {name!r} has no option {key!r}; {meant} options: {', '.join(accepted) or 'none'}"


def step_text(step: Step) -> str:
    """The text that `parse_step` reads: ("gptq", {"damp": 0.02}) -> "gptq:damp=0.02"."""
    name, options = step
    return name + (":" + ",".join(f"{k}={v}" for k, v in options.items()) if options else "")


def step_options(name: str) -> dict[str, inspect.Parameter]:
    """The keyword-only parameters of a method's `apply`, by name."""
    signature = inspect.signature(shelves.methods()[name].apply, eval_str=True)
    return {p.name: p for p in signature.parameters.values() if p.kind is p.KEYWORD_ONLY}


def _convert(text: str, parameter: inspect.Parameter, where: str) -> Any:
    kind = parameter.annotation
    if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union:
        if text.lower() in ("none", ""):
            return None
        kind = next(arg for arg in typing.get_args(kind) if arg is not type(None))
    if typing.get_origin(kind) is typing.Literal:
        choices = typing.get_args(kind)
        if text not in choices:
            raise InputError(f"{where}: {text!r} is not one of {', '.join(map(str, choices))}")
        return text
    if kind is bool:
        if text.lower() not in ("true", "false", "1", "0", "yes", "no", "on", "off"):
            raise InputError(f"{where}: {text!r} is not true or false")
        return text.lower() in ("true", "1", "yes", "on")
    try:
        value = kind(text)
    except (TypeError, ValueError):
        raise InputError(f"{where}: {text!r} is not a {getattr(kind, '__name__', kind)}") from None
    if isinstance(value, float) and not math.isfinite(value):
        raise InputError(f"{where}: {text!r} is not a finite number")
    return value


def full_steps(recipe: Recipe) -> tuple[Step, ...]:
    """The steps of the recipe with the implied ones added; InputError for an unknown one or one with bad options."""
    methods = shelves.methods()
    for name, options in recipe.steps:
        if name not in methods:
            raise InputError(f"unknown step {name!r}; steps: {', '.join(methods)}")
        check_options(name, options)
    changes = [methods[name].CHANGES for name, _ in recipe.steps]
    for kind in ("weights", "bias"):
        twice = [name for (name, _), c in zip(recipe.steps, changes, strict=True) if kind in c][1:]
        if twice:
            raise InputError(f"step {twice[0]!r} would set {kind} that an earlier step has set; give one of them")
    steps = list(recipe.steps)
    if not any("weights" in c for c in changes):
        last_float = max((i for i, c in enumerate(changes) if c & {"float", "acts"}), default=-1)
        steps.insert(last_float + 1, ("rtn", {}))
    if not any("acts" in c for c in changes):
        first = next(i for i, (name, _) in enumerate(steps) if "weights" in methods[name].CHANGES)
        steps.insert(first, ("act_scales", {}))
    return tuple(steps)


@dataclass
class StepReport:
    """One executed step: its name, options and diagnostics."""

    name: str
    options: dict[str, Any]
    diagnostics: dict[str, float] = field(default_factory=dict)


def quantize(
    model: Model, recipe: Recipe, calib: Calib, progress: Callable[[str, int, int], None] | None = None
) -> Model:
    """A quantized copy of the model; the argument is not changed.

    A layer that cannot be quantized stays in float, with the reason in `meta["float_layers"]`. Raises InputError for a
    non-finite weight or input, and a plan that matches no layer.
    `progress(step name, done, total)` is called before each step. The result does not depend on the number of threads.
    """
    result = captured(model)
    check(result, recipe)
    _check_calibration(calib)
    give_plans(result, recipe)
    result.module.eval()
    calib.generator.manual_seed(recipe.seed)
    steps = full_steps(recipe)
    reports: list[StepReport] = []
    trains = {name for name, _ in steps if "refined" in shelves.methods()[name].CHANGES}
    shown = calib.rest() if trains and calib.visit is None else calib  # what training is judged by, no step has fitted
    with torch.no_grad(), one_thread(), _channels_last(result):
        for index, together in _groups(result, steps):
            if progress:
                progress(steps[index][0], index, len(steps))
            together = tuple((name, {**_scale_rule(recipe, name), **options}) for name, options in together)
            if len(together) == 1:
                ((name, options),) = together
                diagnostics = [shelves.methods()[name].apply(result, calib if name in trains else shown, **options)]
            else:
                visits = [shelves.methods()[name].each(result, shown, **options) for name, options in together]
                visit(result, shown, visits)
                diagnostics = [step.report for step in visits]
            for (name, options), found in zip(together, diagnostics, strict=True):
                reports.append(StepReport(name, dict(options), found))
    if progress:
        progress("done", len(steps), len(steps))
    for name, qlayer in result.qlayers().items():
        if qlayer.plan.weight is not None and qlayer.q is None:
            raise AssertionError(f"no step quantized layer {name!r}")
    result.meta["recipe"] = recipe.to_json()
    result.meta["steps"] = [vars(report) for report in reports]
    return result


@contextlib.contextmanager
def _channels_last(model: Model) -> Iterator[None]:
    """Images with their channels last, in a graph: unlike a network's own code it asks no tensor for its layout."""
    layers = model.qlayers().values() if isinstance(model.module, fx.GraphModule) else ()
    for layer in layers:
        layer.channels_last = True
    yield
    for layer in layers:
        layer.channels_last = False


def give_plans(model: Model, recipe: Recipe) -> None:
    """Put a QLayer with its plan where a layer is to be quantized, and its plan into every point, in place.

    A layer that cannot be quantized stays, with the reason in `meta["float_layers"]`.
    """
    layers = model.layers()
    left: dict[str, str] = dict(model.meta.get("float_layers", {}))
    for index, (name, layer) in enumerate(layers.items()):
        plan = recipe.plan_for(name, index, len(layers))
        if isinstance(layer, QLayer) or (plan.weight is None and plan.act is None):
            continue
        try:
            wrapped = QLayer(layer, plan)
        except ValueError as error:
            left[name] = str(error)
            continue
        model.replace(name, wrapped)
    if left:
        model.meta["float_layers"] = left
    for name, point in model.points().items():
        point.plan = LayerPlan(act=recipe.plan_for(name, -1, len(layers)).act)


def one_walk(model: Model, recipe: Recipe, calib: Calib) -> list[tuple[StepReport, Visit]] | None:
    """The steps as visits of a single walk that meets every layer as those before it left it; None if they are not.

    `quantize` does these steps in this walk. The model's layers have their plans.
    """
    groups = [*_groups(model, full_steps(recipe))]
    methods = shelves.methods()
    if len(groups) > 1 or any(point.plan.act is not None for point in model.points().values()):
        return None
    if not all(hasattr(methods[name], "each") for name, _ in groups[0][1]):
        return None
    found = []
    for name, own in groups[0][1]:
        options = {**_scale_rule(recipe, name), **own}
        step = methods[name].each(model, calib, **options)
        found.append((StepReport(name, dict(options), step.report), step))
    return None if any(step.inputs and not step.sequential for _, step in found) else found


def _groups(model: Model, steps: tuple[Step, ...]) -> Iterator[tuple[int, tuple[Step, ...]]]:
    """(number of the first, steps) of steps to be done together: in a graph, neighbours that go layer by layer.

    They share one walk, so that a layer is finished before the next is looked at: fewer passes over the calibration
    set, and better scales and corrections, as each layer meets what the finished ones make.
    """
    methods, first = shelves.methods(), 0

    def joins(step: Step) -> bool:
        name, options = step
        return hasattr(methods[name], "each") and options.get("sequential", True)

    traced = isinstance(model.module, fx.GraphModule)
    while first < len(steps):
        end = first + 1
        while traced and joins(steps[first]) and end < len(steps) and joins(steps[end]):
            end += 1
        yield first, steps[first:end]
        first = end


def _scale_rule(recipe: Recipe, name: str) -> dict[str, Any]:
    """A step's default scale rule where group scales have a format: results of block formats say which they used."""
    blocks = any(isinstance(p.granularity, PerGroup) and p.granularity.scale is not None for _, p in recipe.plan)
    options = step_options(name)
    return {"scale": options["scale"].default} if blocks and "scale" in options and name != "act_scales" else {}


def check(model: Model, recipe: Recipe) -> None:
    """Raise InputError if the recipe cannot be applied to the model; costs nothing."""
    full_steps(recipe)
    layers = model.layers()
    if not layers:
        reasons = "".join(f"; {name}: {why}" for name, why in model.meta.get("float_layers", {}).items())
        raise InputError(f"the network has no linear layer, convolution or embedding to quantize{reasons}")
    if model.qlayers():
        raise InputError("the network is already quantized; start from the checkpoint it came from")
    names = [*layers, *model.points()]
    for pattern, _ in recipe.plan:
        if pattern not in ("first", "last") and not any(fnmatch.fnmatchcase(n, pattern) for n in names):
            raise InputError(f"no layer matches {pattern!r}; layers: {', '.join(names)}")
    for index, (name, layer) in enumerate(layers.items()):
        plan = recipe.plan_for(name, index, len(layers))
        _check_range(name, plan, layer.weight[0].numel())
        parameters = [("weight", layer.weight), ("bias", getattr(layer, "bias", None))]
        for kind, tensor in parameters:
            if tensor is not None and not all_finite(tensor):
                where = tuple((~torch.isfinite(tensor)).nonzero()[0].tolist())
                raise InputError(
                    f"layer {name!r}: {kind} is {tensor[where].item()} in channel {where[0]}, first at index {where};"
                    " all weights must be finite"
                )


def _check_range(name: str, plan: LayerPlan, columns: int) -> None:
    if plan.weight is None or plan.act is None:
        return
    if columns * formats.max_value(plan.weight) * formats.max_value(plan.act) > torch.finfo(torch.float32).max:
        raise InputError(
            f"layer {name!r}: sums of {plan.weight} x {plan.act} products can exceed float32; "
            "take fewer exponent bits on one side"
        )


def _check_calibration(calib: Calib) -> None:
    if not torch.isfinite(calib.inputs.float()).all():
        where = tuple((~torch.isfinite(calib.inputs.float())).nonzero()[0].tolist())
        raise InputError(f"calibration input is not finite at index {where}")


def uniform(weights: str, acts: str, granularity: str = "row", steps: tuple[Step, ...] = (), seed: int = 0) -> Recipe:
    """The recipe with one plan for all layers."""
    return Recipe((("*", make_plan(weights, acts, granularity)),), steps, seed)

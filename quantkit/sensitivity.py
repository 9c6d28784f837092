"""What one layer's formats cost the network's outputs, measured with this layer quantized alone.

A `Cell` is one layer in one pair of formats, with one granularity and one pipeline of methods, on the calibration
states of a study; every other layer stays in float. It holds the errors of the outputs and what the cost model needs
to know of the layer. Cells are kept in the study's `sensitivity.jsonl` under a digest of all that they depend on, so
that each is measured once, whatever asks for it. Networks that are no policies are measured on the first INPUTS of
their calibration set. Steps that train the whole network are left out of the pipeline: the
cells tell what formats cost before training repairs it.

An embedding looks rows up and multiplies nothing: its cells differ in weights alone, have no spec, and cost memory.

The loss of a cell (`Cell.loss`) is a mean square, or a divergence that is one to leading order. Losses of independent
small errors add up. That sum is what allocation minimizes; where errors are large or hit the same outputs, it is not
the network's loss, which is why designs found with it are evaluated.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hwmodel.spec import LayerSpec
from quantkit import shelves
from quantkit.analyze import damage
from quantkit.claims import Claims
from quantkit.errors import InputError
from quantkit.model import Calib, Model
from quantkit.policy import Head, Policy
from quantkit.qlayers import LayerPlan, shape_of
from quantkit.recipe import Recipe, Step, make_plan, quantize, step_text
from quantkit.results import Row, append_row, read_rows
from quantkit.sources import source_digest
from quantkit.specs import layer_specs, run_order
from quantkit.study import Study, outputs_of, visited_states
from quantkit.tasks.episodes import Progress
from quantkit.tasks.fidelity import compare_on_states

INPUTS = 256


@dataclass(frozen=True)
class Cell:
    """One layer in one pair of formats. errors: by metric. size: weights, stored in so many bits.

    spec: for the cost model, its `out` unset; None of an embedding, whose `acts` are "float".
    """

    layer: str
    weights: str
    acts: str
    granularity: str
    errors: Mapping[str, float]
    spec: LayerSpec | None
    bits: int
    size: int

    @property
    def loss(self) -> float:
        """What adds up: a KL, or else the square of the action error, or else of the output error."""
        for name in ("action_kl", "output_kl"):
            if name in self.errors:
                return self.errors[name]
        return self.errors.get("action_error", self.errors["output_error"]) ** 2

    def plan(self) -> LayerPlan:
        """The layer's entry in a recipe."""
        return make_plan(self.weights, self.acts, self.granularity)


def measure(
    study: Study,
    folder: Path,
    weights: Sequence[str],
    acts: Sequence[str],
    granularities: Sequence[str] = ("row",),
    steps: tuple[Step, ...] = (),
    progress: Progress | None = None,
) -> dict[str, list[Cell]]:
    """The cells of every layer: all pairs of formats and granularities that fit it, by layer in `run_order`.

    Each that is not in the folder's `sensitivity.jsonl` is measured and written there; of several processes, one
    measures and the others wait. InputError if no pair fits a layer, with the reason of the last.
    """
    steps = untrained(steps)
    names = run_order(study.model)
    tables = {name for name, part in study.model.layers().items() if shape_of(part).op == "embedding"}
    wanted = [
        (name, *formats)
        for name in names
        for formats in itertools.product(weights, ("float",) if name in tables else acts, granularities)
    ]
    context = _context(study)
    found: dict[str, list[Cell]] = {name: [] for name in names}
    problem = ""
    with Claims(folder) as claims:
        claims.wait("")
        path = folder / "sensitivity.jsonl"
        known: dict[str, list[Row]] = {}
        for row in read_rows(path):
            known.setdefault(row["key"], []).append(row)
        for index, (layer, weight, act, granularity) in enumerate(wanted):
            if progress:
                progress(index, len(wanted))
            try:
                recipe = Recipe(((layer, make_plan(weight, act, granularity)),), steps)
                key = _digest([context, recipe.to_json()])
                if not any("spec" in row for row in known.get(key, ())):
                    known[key] = _measured(study, recipe, layer, weight, act, granularity, key)
                    for row in known[key]:
                        append_row(path, row)
            except InputError as error:
                problem = str(error)
                continue
            found[layer].append(_cell(known[key]))
        if progress:
            progress(len(wanted), len(wanted))
    for layer, cells in found.items():
        if not cells:
            raise InputError(f"layer {layer!r}: none of the formats fits it: {problem}")
    return found


def untrained(steps: tuple[Step, ...]) -> tuple[Step, ...]:
    """The steps without those that train the network as a whole."""
    training = {"refined", "trained"}
    return tuple(step for step in steps if not shelves.methods()[step[0]].CHANGES & training)


def assemble(cells: Iterable[Cell], steps: tuple[Step, ...] = (), seed: int = 0) -> Recipe:
    """The recipe that gives each layer its cell's formats: the most frequent plan for all, exceptions by name.

    So layers that agree give the recipe of a sweep, and equal choices give equal recipes. The format of inputs that an
    embedding takes from the others' plan means nothing to it.
    """
    every = list(cells)
    plans = [cell.plan() for cell in every if cell.spec is not None] or [cell.plan() for cell in every]
    base = max(plans, key=lambda plan: (plans.count(plan), -plans.index(plan)))
    table = replace(base, act=None)
    rest = tuple((c.layer, c.plan()) for c in every if c.plan() != (table if c.spec is None else base))
    return Recipe((("*", base), *rest), steps, seed)


def errors_of(study: Study, quantized: Model) -> dict[str, float]:
    """The errors of a quantized network's outputs on the study's states, by metric.

    output_error: RMS error over RMS output. action_error: the same of actions, over their range. action_kl, of a
    network's classes output_kl: mean KL in nats. q_error: mean |error| of Q-values.
    """
    states = _states(study)
    outputs = outputs_of(quantized, states)
    reference = study.float_outputs[: len(outputs)]
    plain = damage(torch.from_numpy(outputs), torch.from_numpy(reference), None)
    found = {"output_error": plain.error}
    if not isinstance(quantized.module, Policy):
        record = compare_on_states(reference, outputs, Head("discrete", (outputs.shape[1],)))
        return found | {"output_kl": record["kl"]}
    head = quantized.module.head
    if head.kind == "box":
        return found | {"action_error": damage(torch.from_numpy(outputs), torch.from_numpy(reference), head).error}
    values = study.model.meta.get("algo") in ("dqn", "qrdqn")
    record = compare_on_states(reference, outputs, head, q_values=values)
    return found | ({"q_error": record["q_error"]} if values else {"action_kl": record["kl"]})


def _states(study: Study) -> np.ndarray:
    return study.states if study.labelled is None else study.states[:INPUTS]


def _measured(study: Study, recipe: Recipe, layer: str, weight: str, act: str, granularity: str, key: str) -> list[Row]:
    """One row per metric; the last carries what the cost model needs, and so ends what a kill may have cut short."""
    visit = visited_states if study.labelled is None else None
    quantized = quantize(study.model, recipe, Calib(torch.from_numpy(_states(study)), visit=visit))
    if layer in quantized.meta.get("float_layers", {}):
        raise InputError(f"layer {layer!r} stays in float: {quantized.meta['float_layers'][layer]}")
    part = quantized.layers()[layer]
    q = getattr(part, "q", None)
    spec = next((spec for spec in layer_specs(quantized) if spec.name == layer), None)
    if spec is None and shape_of(part).op != "embedding":
        raise InputError(f"layer {layer!r} is quantized in bands, which a search cannot price; leave that step out")
    common = {"layer": layer, "weights": weight, "acts": act, "granularity": granularity}
    common["steps"] = "+".join(step_text(step) for step in recipe.steps) or "rtn"
    rows = [
        {"id": _digest([key, metric]), **common, "metric": metric, "value": value, "key": key}
        for metric, value in errors_of(study, quantized).items()
    ]
    size = part.weight.numel()
    rows[-1] |= {"spec": spec and spec.to_json(), "bits": 32 * size if q is None else q.bits, "size": size}
    return rows


def _cell(rows: Sequence[Row]) -> Cell:
    last = next(row for row in rows if "spec" in row)
    return Cell(
        last["layer"],
        last["weights"],
        last["acts"],
        last["granularity"],
        errors={row["metric"]: row["value"] for row in rows},
        spec=last["spec"] and LayerSpec.from_json(last["spec"]),
        bits=last["bits"],
        size=last["size"],
    )


def _context(study: Study) -> str:
    """A digest of all that a cell depends on besides its recipe: network, head, states, our own source."""
    model = study.model
    tensors = hashlib.sha256()
    for name, tensor in model.module.state_dict().items():
        tensors.update(name.encode() + tensor.detach().numpy().tobytes())
    head = repr(model.module.head) if isinstance(model.module, Policy) else ""
    states = hashlib.sha256(_states(study).tobytes()).hexdigest()
    return _digest([tensors.hexdigest(), head, model.meta.get("algo"), states, source_digest()])


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]

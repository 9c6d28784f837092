"""One design of a study: quantize, evaluate, compare with float, cost -> Row.

`Study` is what all designs share: the float policy, its score, a random policy's score,
calibration states and the target device. It is computed once and handed to every worker.
"""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

import hwmodel
from hwmodel.devices import Device
from hwmodel.estimate import HwError, estimate
from hwmodel.formats import Float, Format
from quantkit.errors import InputError
from quantkit.model import Calib, EnvSpec, Model
from quantkit.policy import Policy
from quantkit.recipe import Recipe, format_name, quantize
from quantkit.results import Row, versions
from quantkit.simulate import compile_policy
from quantkit.specs import bits_per_weight, layer_specs
from quantkit.tasks import episodes as episodes_task
from quantkit.tasks.episodes import Progress, Score

CALIBRATION_STATES = 2048


@dataclass(frozen=True)
class Study:
    """What every design of a study shares.

    states: observations of float rollouts; calibration and fidelity use them. margin: the return
    that a quantized policy may lose and still count as non-inferior. latency_us or luts: the target
    that folds the hardware; both None = the estimate's default.
    """

    model: Model
    states: np.ndarray
    reference: Score
    random: Score
    margin: float
    episodes: int
    seed: int
    device: Device | None
    latency_us: float | None = None
    luts: int | None = None


def policy_of(model: Model) -> tuple[Policy, EnvSpec]:
    """The policy and its environment, or InputError saying what is missing."""
    if not isinstance(model.module, Policy):
        raise InputError("this network is not a policy; episodes need a Stable-Baselines3 agent")
    if model.env is None:
        raise InputError("the checkpoint does not tell its environment; give it with --env ID")
    return model.module, model.env


def calibration_states(model: Model, n: int = CALIBRATION_STATES, progress: Progress | None = None) -> np.ndarray:
    """Observations from rollouts of the policy, disjoint in seeds from every evaluation."""
    policy, spec = policy_of(model)
    act = episodes_task.act_of(policy)
    return episodes_task.collect_states(act, spec, n, episodes=8, progress=progress)


def calib_of(states: np.ndarray) -> Calib:
    """The states as a calibration set."""
    return Calib(torch.from_numpy(states))


def prepare(
    model: Model,
    *,
    episodes: int,
    seed: int,
    device: Device | None,
    latency_us: float | None = None,
    luts: int | None = None,
    margin_fraction: float = 0.05,
    progress: Progress | None = None,
) -> Study:
    """Score the float and a random policy and collect calibration states."""
    policy, spec = policy_of(model)
    reference = episodes_task.evaluate_policy(policy, spec, episodes=episodes, seed=seed, progress=progress)
    random = episodes_task.random_score(spec, episodes=episodes, seed=seed, progress=progress)
    margin = margin_fraction * abs(reference.mean - random.mean)
    states = calibration_states(model, progress=progress)
    return Study(model, states, reference, random, margin, episodes, seed, device, latency_us, luts)


def design_id(recipe: Recipe) -> str:
    """A short name of a recipe's content."""
    text = json.dumps(recipe.to_json(), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def family(recipe: Recipe) -> str:
    """ "integer", "minifloat" or "mixed", over all formats of the recipe."""
    used: list[Format] = [f for _, plan in recipe.plan for f in (plan.weight, plan.act) if f is not None]
    floats = sum(isinstance(f, Float) for f in used)
    return "integer" if floats == 0 else "minifloat" if floats == len(used) else "mixed"


def evaluate_design(study: Study, recipe: Recipe) -> Row:
    """The row of one design. What the design itself makes impossible is recorded in `error`."""
    began = time.perf_counter()
    weights, acts = _format_texts(recipe)
    row: Row = {
        "id": design_id(recipe),
        "weights": weights,
        "acts": acts,
        "granularity": str(recipe.plan[0][1].granularity),
        "steps": "+".join(name for name, _ in recipe.steps) or "rtn",
        "family": family(recipe),
        "recipe": recipe.to_json(),
        "checkpoint_sha256": study.model.meta.get("sha256"),
        "seeds": [study.seed, study.seed + study.episodes - 1],
        "versions": versions(),
    }
    try:
        quantized = quantize(study.model, recipe, calib_of(study.states))
    except InputError as error:
        return row | {"error": str(error), "seconds": time.perf_counter() - began}
    policy, spec = policy_of(quantized)
    float_policy, _ = policy_of(study.model)
    row["bits_per_weight"] = bits_per_weight(quantized)
    row["weight_kib"] = row["bits_per_weight"] * sum(m.weight.numel() for m in quantized.layers().values()) / 8192
    row["quantize_seconds"] = time.perf_counter() - began
    row["cost"] = hardware_cost(quantized, study)
    row["fidelity"] = episodes_task.compare_on_states(
        compile_policy(float_policy)(study.states),
        compile_policy(policy)(study.states),
        policy.head,
        q_values=study.model.meta.get("algo") in ("dqn", "qrdqn"),
    )
    result = episodes_task.evaluate(episodes_task.act_of(policy), spec, episodes=study.episodes, seed=study.seed)
    row["score"] = result.to_json()
    row["verdict"] = episodes_task.compare_scores(study.reference, result, margin=study.margin).to_json()
    return row | {"seconds": time.perf_counter() - began}


def hardware_cost(model: Model, study: Study) -> dict[str, Any] | None:
    """LUTs, FFs, DSPs, BRAM18, cycles and latency on the study's device; None without a device.

    A design that cannot be built gives {"error": reason}.
    """
    if study.device is None:
        return None
    try:
        result = estimate(layer_specs(model), study.device, latency_us=study.latency_us, luts=study.luts)
    except HwError as error:
        return {"error": str(error)}
    record = result.to_json()
    record["model"] = hwmodel.__version__
    return record


def _format_texts(recipe: Recipe) -> tuple[str, str]:
    """Formats of the first entry, with the exceptions behind: "int4 first=int8"."""
    base = recipe.plan[0][1]
    weights, acts = [format_name(base.weight)], [format_name(base.act)]
    for pattern, plan in recipe.plan[1:]:
        weights.append(f"{pattern}={format_name(plan.weight)}")
        acts.append(f"{pattern}={format_name(plan.act)}")
    return " ".join(weights), " ".join(acts)

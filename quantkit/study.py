"""One design of a study: quantize, evaluate, compare with float, cost -> Row.

`Study` is what all designs share: the float policy, its score, a random policy's score,
calibration states and the target device. It is computed once and handed to every worker.
"""

from __future__ import annotations

import hashlib
import json
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from hwmodel.devices import Device
from hwmodel.estimate import Mapping
from hwmodel.formats import Float, Format, element
from quantkit.errors import InputError
from quantkit.files import read_inputs
from quantkit.model import Calib, EnvSpec, Model, Visits
from quantkit.policy import Head, Policy
from quantkit.qlayers import shape_of
from quantkit.racing import enough, race
from quantkit.recipe import Recipe, format_name, quantize, step_text
from quantkit.results import Row, versions
from quantkit.seeds import CALIBRATION, EVALUATION_SEED, FRESH, check_evaluation, visit
from quantkit.simulate import compile_policy
from quantkit.specs import bits_per_weight, layer_specs
from quantkit.statistics import Floats, Verdict, default_margin
from quantkit.targets import Target
from quantkit.tasks import episodes as episodes_task
from quantkit.tasks.accuracy import Labelled, answers, as_score, read_labels
from quantkit.tasks.environments import refuse_masks
from quantkit.tasks.episodes import Progress, Score
from quantkit.tasks.fidelity import compare_on_states
from quantkit.tasks.states import collect_sequences, collect_visits

if TYPE_CHECKING:
    from quantkit.verify import Agreement

CALIBRATION_STATES = 2048
MARGIN_FRACTION = 0.05
ACCURACY_FRACTION = 0.01
"""Of the distance between the float network and one that always gives the most frequent class."""

USEFUL_FRACTION = 0.2
"""What a network may lose of the same distance and still be worth proposing: `Study.floor`."""

Origin = Literal["sweep", "allocation", "search"]


@dataclass(frozen=True)
class Settings:
    """How designs are measured: what must be equal for two rows to be comparable.

    Of a network measured on labelled inputs `episodes` is how many there are, and `seed` is 0.

    latency_us or luts: the target that folds the hardware; both None = the estimate's default. mapping: what makes the
    products, as of `hwmodel.estimate`. also: more targets; each design is priced for all of them, and plays once.
    """

    episodes: int = 20
    seed: int = EVALUATION_SEED
    device: Device | None = None
    latency_us: float | None = None
    luts: int | None = None
    mapping: Mapping = "lut"
    also: tuple[Target, ...] = ()

    @property
    def targets(self) -> tuple[Target, ...]:
        """All targets, the first one first; () without a device."""
        if self.device is None:
            return ()
        return (Target(self.device, self.latency_us, self.luts, self.mapping), *self.also)


def settings_for(targets: tuple[Target, ...], episodes: int = 20, seed: int = EVALUATION_SEED) -> Settings:
    """Settings with these targets, the first of which leads."""
    if not targets:
        return Settings(episodes, seed)
    first, *others = targets
    return Settings(episodes, seed, first.device, first.latency_us, first.luts, first.mapping, tuple(others))


@dataclass(frozen=True)
class Study:
    """What every design of a study shares.

    states: observations of float rollouts; calibration and fidelity use them. margin: the return
    that a quantized policy may lose and still count as non-inferior.

    labelled: what a network that is no policy is measured on. Then states are the inputs that calibrate, returns are
    1 or 0 for each labelled input, `random` always answers the most frequent class, and an episode is an input.
    """

    model: Model
    settings: Settings
    states: np.ndarray
    reference: Score
    random: Score
    labelled: Labelled | None = None

    @property
    def margin(self) -> float:
        """5 % of the distance between the float and the random policy, 1 % of that between accuracies."""
        fraction = MARGIN_FRACTION if self.labelled is None else ACCURACY_FRACTION
        return default_margin(self.reference.returns, self.random.returns, fraction)

    @property
    def floor(self) -> float:
        """The mean from which on a search finds designs worth having.

        A random policy's; of a network, what has lost a fifth of the float accuracy beyond the most frequent class.
        """
        if self.labelled is None:
            return self.random.mean
        return self.reference.mean - USEFUL_FRACTION * (self.reference.mean - self.random.mean)

    def race(self, play: Callable[[int, int], Floats]) -> tuple[Floats, Verdict]:
        """`quantkit.racing.race` against the float model's returns: those played until decided, and the verdict.

        Episodes cost more than answers to inputs: what they leave undecided stops after `racing.enough`.
        """
        if self.labelled is not None:
            return race(self.reference.returns, play, self.margin, shares=True)
        return race(self.reference.returns, play, self.margin, undecided=enough(len(self.reference.returns)))

    @cached_property
    def float_outputs(self) -> np.ndarray:
        """The float model's outputs on the states, (states, outputs): the same for every design."""
        return outputs_of(self.model, self.states)


def outputs_of(model: Model, states: np.ndarray) -> np.ndarray:
    """Outputs (states, outputs) of a policy or of any network; of a recurrent policy every step is a state."""
    if isinstance(model.module, Policy):
        out = compile_policy(model.module)(states)
        return out.reshape(-1, out.shape[-1])
    rows = torch.from_numpy(states).to(model.example.dtype)
    with torch.inference_mode():
        return torch.cat([model.module(part) for part in rows.split(128)]).float().numpy()


def policy_of(model: Model) -> tuple[Policy, EnvSpec]:
    """The policy and its environment, or InputError saying what is missing."""
    if not isinstance(model.module, Policy):
        raise InputError("this network is not a policy; episodes need a Stable-Baselines3 agent")
    if model.env is None:
        problem = model.meta.get("env_problem") or "the checkpoint does not tell its environment"
        raise InputError(f"{problem}; give it with --env ID")
    if model.meta.get("algo") == "maskableppo":
        refuse_masks(model.env)
    return model.module, model.env


def calibration_states(model: Model, n: int = CALIBRATION_STATES, progress: Progress | None = None) -> np.ndarray:
    """Observations from rollouts of the policy, of episodes whose seeds are `seeds.CALIBRATION`.

    Of a recurrent policy sequences with about n observations, (sequences, time, *obs_shape).
    """
    return _met(model, n, CALIBRATION.start, progress)[0]


def _met(
    model: Model, n: int, seed: int, progress: Progress | None = None, episodes: int = 8
) -> tuple[np.ndarray, ...]:
    """n observations of rollouts, of a recurrent policy in sequences; the returns and lengths of their episodes."""
    policy, spec = policy_of(model)
    act, options = episodes_task.act_of(policy), {"seed": seed, "episodes": episodes, "progress": progress}
    if not policy.recurrent:
        return collect_visits(act, spec, n, **options)  # type: ignore[arg-type]
    time = model.example.shape[1]
    return collect_sequences(act, spec, -(-n // time), time, **options)  # type: ignore[arg-type]


def visited_states(model: Model, n: int, seed: int, episodes: int = 8) -> Visits:
    """`Calib.visit`: n observations of the model's own rollouts, of the episodes `seeds.visit(seed)`."""
    return Visits(*map(torch.from_numpy, _met(model, n, visit(seed).start, episodes=episodes)))


def calib_for(model: Model, n: int | None, progress: Progress | None = None, inputs: Path | None = None) -> Calib:
    """A calibration set: the first `n` rows of a .npy or .npz file, else `n` states from rollouts of the policy.

    n: None for all rows of the file, of a policy for CALIBRATION_STATES.
    """
    if inputs is None:
        if not isinstance(model.module, Policy):
            raise InputError("this network is not a policy; give inputs for it with --inputs FILE.npy")
        n = CALIBRATION_STATES if n is None else n
        return Calib(torch.from_numpy(calibration_states(model, n, progress)), visit=visited_states)
    array = read_inputs(inputs)
    shape = tuple(model.example.shape[1:])
    if array.shape[1:] != shape:
        raise InputError(
            f"{inputs}: inputs of shape {array.shape} do not fit the network's (n, {', '.join(map(str, shape))})"
        )
    if not model.example.is_floating_point():
        _check_tokens(model, array, inputs)
    return Calib(torch.from_numpy(array[:n]).to(model.example.dtype))


def _check_tokens(model: Model, ids: np.ndarray, path: Path) -> None:
    """Raise InputError, naming the file, for ids that are not whole or that no embedding of the network has."""
    if ids.dtype.kind == "f" and (ids != np.floor(ids)).any():
        raise InputError(
            f"{path}: holds numbers such as {ids[ids != np.floor(ids)][0]:g}; the network takes whole ones"
        )
    rows = [layer.weight.shape[0] for layer in model.layers().values() if shape_of(layer).op == "embedding"]
    if rows and (ids.min() < 0 or ids.max() >= max(rows)):
        raise InputError(f"{path}: holds {ids.min()}..{ids.max()}; the network's embedding has 0..{max(rows) - 1}")


def labelled_inputs(model: Model, inputs: Path, labels: Path, calibration: Path) -> Labelled:
    """What a network is measured on, from .npy or .npz files; InputError for misfits, naming the file.

    The inputs are put in an order of chance, always the same one: files are often sorted by class, and races look at
    the first ones.
    """
    found, classes = calib_for(model, None, inputs=inputs).inputs, read_labels(labels)
    if len(classes) != len(found):
        raise InputError(f"{labels} has {len(classes)} labels for the {len(found)} inputs of {inputs}")
    order = np.random.default_rng(0).permutation(len(found))
    others = calib_for(model, CALIBRATION_STATES, inputs=calibration).inputs
    return Labelled(found[torch.from_numpy(order)], classes[order], others)


def fresh_states(model: Model, n: int | None, inputs: Path | None = None, *, behind: int = 0) -> torch.Tensor:
    """`n` inputs to measure on: of the episodes `seeds.FRESH`, which no method plays, or rows of a file.

    Of a file those behind the first `behind`, which calibrate; if there are none, the first ones. n: None is 2048 of
    a policy and 256 of a file.
    """
    if inputs is None and isinstance(model.module, Policy):
        return torch.from_numpy(_met(model, CALIBRATION_STATES if n is None else n, FRESH.start)[0])
    rows = calib_for(model, None, inputs=inputs).inputs
    rows = rows[behind:] if len(rows) > behind else rows
    return rows[: 256 if n is None else n]


def verify_export(
    model: Model, path: Path, *, episodes: int, seed: int, inputs: Path | None = None, progress: Progress | None = None
) -> Agreement:
    """`quantkit.verify.verify` on 512 states of the quantized policy's own rollouts and on whole episodes.

    A network that is no policy is compared on `inputs` only.
    """
    from quantkit.verify import verify

    states = calib_for(model, 512, inputs=inputs).inputs.numpy()
    episodes = episodes if isinstance(model.module, Policy) else 0

    def count(_name: str, done: int, total: int) -> None:
        if progress:
            progress(done, total)

    return verify(model, path, states=states, episodes=episodes, seed=seed, progress=count)


def prepare(
    model: Model,
    settings: Settings,
    progress: Progress | None = None,
    labelled: Labelled | None = None,
) -> Study:
    """Score the float and a random policy and collect calibration states, or those of `labelled` inputs.

    InputError for seeds that `seeds.check_evaluation` refuses.
    """
    if labelled is not None:
        reference = labelled.score(model.module, progress)
        return Study(model, settings, labelled.calibration.numpy(), reference, labelled.constant(), labelled)
    policy, spec = policy_of(model)
    check_evaluation(settings.seed, settings.episodes)
    options: dict[str, Any] = {"episodes": settings.episodes, "seed": settings.seed, "progress": progress}
    reference = episodes_task.evaluate_policy(policy, spec, **options)
    random = episodes_task.random_score(spec, **options)
    return Study(model, settings, calibration_states(model, progress=progress), reference, random)


def design_id(recipe: Recipe) -> str:
    """A short name of a recipe's content."""
    text = json.dumps(recipe.to_json(), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def family(recipe: Recipe) -> str:
    """ "integer", "minifloat" or "mixed", over all formats of the recipe."""
    used: list[Format] = [f for _, plan in recipe.plan for f in (plan.weight, plan.act) if f is not None]
    floats = sum(isinstance(element(f), Float) for f in used)
    return "integer" if floats == 0 else "minifloat" if floats == len(used) else "mixed"


@dataclass(frozen=True)
class Task:
    """One design to evaluate. origin: who asked for it. race: stop its episodes as soon as they decide.

    screen: no episodes at all, see `screen_design`. known: returns and lengths of its first episodes, played before.
    """

    recipe: Recipe
    origin: Origin = "sweep"
    race: bool = False
    screen: bool = False
    known: tuple[tuple[float, ...], tuple[int, ...]] = ((), ())

    @property
    def id(self) -> str:
        """The id of its row."""
        return design_id(self.recipe)


def attempt(study: Study, task: Task) -> Row:
    """The row of a task, whatever happens. What the design makes impossible is in `error`.

    What crashed, most likely the environment, is there as well, and `failure` says in a few words what kind it was:
    such designs are worth another try.
    """
    began = time.perf_counter()
    try:
        if task.screen:
            return screen_design(study, task.recipe)
        return evaluate_design(study, task.recipe, task.race, task.known) | {"origin": task.origin}
    except InputError as error:
        problem = {"error": str(error)}
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        kind = f"{type(error).__name__} in {Path(where.filename).name}, {where.name}"
        problem = {"error": f"{type(error).__name__}: {error} ({where.filename}:{where.lineno})", "failure": kind}
    return (
        describe_design(study, task.recipe) | problem | {"origin": task.origin, "seconds": time.perf_counter() - began}
    )


def describe_design(study: Study, recipe: Recipe) -> Row:
    """What of a row is known before anything was measured."""
    settings = study.settings
    return describe_recipe(recipe) | {
        "checkpoint_sha256": study.model.meta.get("sha256"),
        "seeds": [settings.seed, settings.seed + settings.episodes - 1],
        "versions": versions(),
    }


def describe_recipe(recipe: Recipe) -> Row:
    """What a row says of its recipe: id, formats of weights and inputs, granularity, steps, family."""
    weights, acts = _format_texts(recipe)
    return {
        "id": design_id(recipe),
        "weights": weights,
        "acts": acts,
        "granularity": str(recipe.plan[0][1].granularity),
        "steps": "+".join(step_text(step) for step in recipe.steps) or "rtn",
        "family": family(recipe),
        "recipe": recipe.to_json(),
    }


def evaluate_design(
    study: Study,
    recipe: Recipe,
    raced: bool = False,
    known: tuple[tuple[float, ...], tuple[int, ...]] = ((), ()),
) -> Row:
    """The row of one design. What the design itself makes impossible is recorded in `error`.

    raced: play only as many of the episodes as decide about non-inferiority (`quantkit.racing`); `episodes` tells.
    known: as of `Task`; these are not played again. `played`: how many were, for this row.
    """
    began = time.perf_counter()
    row = describe_design(study, recipe)
    try:
        quantized = _quantized(study, recipe)
    except InputError as error:
        return row | {"error": str(error), "seconds": time.perf_counter() - began}
    row["float_layers"] = quantized.meta.get("float_layers", {})
    row |= _measured(study, quantized) | {"quantize_seconds": time.perf_counter() - began}
    result, verdict = _scored(study, quantized, raced, known)
    row["seeds"] = [result.seed, result.seed + result.n - 1]
    played = result.n - (0 if raced else len(known[0]))
    row |= {"score": result.to_json(), "verdict": verdict.to_json(), "episodes": result.n, "played": played}
    return row | {"seconds": time.perf_counter() - began}


def _scored(
    study: Study, quantized: Model, raced: bool, known: tuple[tuple[float, ...], tuple[int, ...]]
) -> tuple[Score, Verdict]:
    """What the design scores on the labelled inputs, or in the episodes, and how that compares with float."""
    if study.labelled is not None:
        if raced:
            return _raced_answers(study, study.labelled, quantized)
        result = study.labelled.score(quantized.module, known=known[0])
    else:
        policy, spec = policy_of(quantized)
        act = episodes_task.act_of(policy)
        if raced:
            return _raced(study, act, spec)
        result = _whole(study, act, spec, known)
    return result, episodes_task.compare_scores(study.reference, result, study.margin)


def screen_design(study: Study, recipe: Recipe) -> Row:
    """What of a design's row is known without an episode: memory, cost, and fidelity on the study's states."""
    return {"id": design_id(recipe), **_measured(study, _quantized(study, recipe))}


def _quantized(study: Study, recipe: Recipe) -> Model:
    visit = visited_states if study.labelled is None else None
    return quantize(study.model, recipe, Calib(torch.from_numpy(study.states), visit=visit))


def _measured(study: Study, quantized: Model) -> Row:
    bits = bits_per_weight(quantized)
    return {
        "bits_per_weight": bits,
        "weight_kib": bits * sum(m.weight.numel() for m in quantized.layers().values()) / 8192,
        **hardware_costs(quantized, study.settings),
        "fidelity": fidelity(quantized, study.states, study.float_outputs),
    }


def fidelity(quantized: Model, states: np.ndarray, reference: np.ndarray) -> dict[str, float]:
    """`compare_on_states` of a quantized model with the float outputs on the states; a network's are classes."""
    found, module = outputs_of(quantized, states), quantized.module
    head = module.head if isinstance(module, Policy) else Head("discrete", (found.shape[1],))
    q_values = quantized.meta.get("algo") in ("dqn", "qrdqn")
    return compare_on_states(reference, found, head, q_values=q_values)


def _whole(
    study: Study, act: episodes_task.Actor, spec: EnvSpec, known: tuple[tuple[float, ...], tuple[int, ...]]
) -> Score:
    """The score on all episodes; those that are known are not played."""
    settings, n = study.settings, len(known[0])
    if not n:
        return episodes_task.evaluate(act, spec, episodes=settings.episodes, seed=settings.seed)
    rest = episodes_task.rollout(act, spec, episodes=settings.episodes - n, seed=settings.seed + n)
    returns, lengths = (np.concatenate(pair) for pair in zip(known, (rest.returns, rest.lengths), strict=True))
    return episodes_task.score(episodes_task.Rollout(returns, lengths.astype(np.int64), settings.seed, rest.seconds))


def _raced(study: Study, act: episodes_task.Actor, spec: EnvSpec) -> tuple[Score, Verdict]:
    """The score on the episodes that a race played, and its verdict."""
    parts: list[episodes_task.Rollout] = []

    def play(first: int, count: int) -> Floats:
        parts.append(episodes_task.rollout(act, spec, episodes=count, seed=study.settings.seed + first))
        return parts[-1].returns

    returns, verdict = study.race(play)
    lengths, seconds = np.concatenate([part.lengths for part in parts]), sum(part.seconds for part in parts)
    return episodes_task.score(episodes_task.Rollout(returns, lengths, study.settings.seed, seconds)), verdict


def _raced_answers(study: Study, labelled: Labelled, quantized: Model) -> tuple[Score, Verdict]:
    """The accuracy on the inputs that a race needed, and its verdict."""
    began = time.perf_counter()

    def answer(first: int, count: int) -> Floats:
        rows = slice(first, first + count)
        return answers(quantized.module, labelled.inputs[rows], labelled.labels[rows]).astype(np.float64)

    right, verdict = study.race(answer)
    return as_score(right == 1.0, time.perf_counter() - began), verdict


def hardware_costs(model: Model, settings: Settings) -> dict[str, Any]:
    """{"cost": that of the first target, None without a device}; of several also "costs": {target: cost}, the others'.

    A cost has LUTs, FFs, DSPs, BRAM18, cycles and latency; a design that cannot be built gives {"error": reason}.
    """
    if not settings.targets:
        return {"cost": None}
    specs = layer_specs(model)
    first, *others = (target.cost(specs) for target in settings.targets)
    names = [str(target) for target in settings.also]
    return {"cost": first} | ({"costs": dict(zip(names, others, strict=True))} if others else {})


def _format_texts(recipe: Recipe) -> tuple[str, str]:
    """Formats of the first entry, with the exceptions behind: "int4 first=int8".

    One with the first entry's format is told only if it may be an exception to another exception.
    """

    def text(side: str) -> str:
        (_, base), *others = [(pattern, format_name(getattr(plan, side))) for pattern, plan in recipe.plan]
        told: list[tuple[str, str]] = []
        for pattern, name in others:
            if name != base or any(p == pattern or _many(p) or _many(pattern) for p, _ in told):
                told.append((pattern, name))
        return " ".join([base, *(f"{pattern}={name}" for pattern, name in told)])

    return text("weight"), text("act")


def _many(pattern: str) -> bool:
    """Whether it may name a layer that has another name."""
    return pattern in ("first", "last") or any(mark in pattern for mark in "*?[")

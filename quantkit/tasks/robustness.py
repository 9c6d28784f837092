"""Robustness: the same episodes under observation noise, delayed actions and changed dynamics.

Every condition is played on the seeds of the plain score, so a quantized policy can be paired with the
float one, condition by condition. Level 0 of noise or delay, and factor 1 of a dynamics, are the plain
episodes to the last bit.

noise    Gaussian, added to what the policy sees; its standard deviation is the level times that of the
         observation's component over the reference policy's states. Number t of an episode is the same
         for every policy. Appended inputs (time feature, zeros) stay clean.
delay    the action decided at step t acts at step t + level; until the first arrives it is held.
others   dynamics of the environment, multiplied by the level before the first reset: `knobs`. "wind" of
         LunarLander is its wind power.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantkit.errors import InputError
from quantkit.model import EnvSpec
from quantkit.policy import Head, Policy
from quantkit.seeds import EVALUATION_SEED
from quantkit.statistics import mean, non_inferior
from quantkit.tasks.environments import bare_env, check_fits, make_env
from quantkit.tasks.episodes import Actor, Change, Progress, Score, act_of, chooser, rollout, score
from quantkit.tasks.states import collect_visits

SPREAD_STATES = 2048
LEVELS: dict[str, tuple[float, ...]] = {
    "noise": (0.05, 0.1, 0.2),
    "delay": (1, 2),
    "gravity": (0.85, 1.15),
    "mass": (0.8, 1.25),
    "friction": (0.5, 1.5),
    "wind": (15.0,),
}
"""The levels that are tried when none are asked for."""


@dataclass(frozen=True)
class Condition:
    """What is done to an episode, and how much: see the module."""

    kind: str
    level: float

    def __str__(self) -> str:
        return "plain" if self.kind == "plain" else f"{self.kind}={self.level:g}"


PLAIN = Condition("plain", 0.0)


@dataclass(frozen=True)
class Stress:
    """What a policy does under a condition.

    worst_decile: mean of the lowest tenth of the returns (at least one). chatter: how much actions move
    from one step to the next, averaged over steps, then episodes: |difference| in parts of the range (of
    1 where there is none), of discrete actions the share that changes. Episodes of one step count 0.
    """

    condition: Condition
    score: Score
    worst_decile: float
    chatter: float

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        numbers = self.score.to_json()
        kept = {key: numbers[key] for key in ("mean", "std", "stderr", "iqm", "n", "returns", "lengths")}
        return kept | {"worst_decile": self.worst_decile, "chatter": self.chatter}


def worst_decile(returns: Sequence[float] | NDArray[np.float64]) -> float:
    """Mean of the lowest tenth, rounded up.

    >>> worst_decile([5.0, 1.0, 9.0, 2.0, *[7.0] * 16])
    1.5
    """
    ordered = np.sort(np.asarray(returns, np.float64))
    return float(mean(ordered[: math.ceil(ordered.size / 10)]))


def knobs(env: Any) -> dict[str, Callable[[float], None]]:
    """What can be changed in an unwrapped environment: {name: function of the level}; {} where nothing is known."""
    names = {cls.__name__ for cls in type(env).__mro__}
    if "MujocoEnv" in names:
        return {name: lambda level, name=name: _mujoco(env, name, level) for name in ("mass", "friction", "gravity")}  # type: ignore[misc]
    if "LunarLander" in names:
        return {"gravity": lambda level: _scale(env, level, "gravity"), "wind": lambda level: _wind(env, level)}
    if "BipedalWalker" in names:
        return {"gravity": lambda level: _world(env, level)}
    if "PendulumEnv" in names:
        return {"gravity": lambda level: _scale(env, level, "g"), "mass": lambda level: _scale(env, level, "m")}
    if "CartPoleEnv" in names:
        return {"gravity": lambda level: _scale(env, level, "gravity"), "mass": lambda level: _cart(env, level)}
    if "AcrobotEnv" in names:
        links = ("LINK_MASS_1", "LINK_MASS_2", "LINK_MOI")
        return {"mass": lambda level: _scale(env, level, *links)}
    return {}


def _scale(env: Any, level: float, *names: str) -> None:
    for name in names:
        setattr(env, name, getattr(env, name) * level)


def _world(env: Any, level: float) -> None:
    x, y = env.world.gravity
    env.world.gravity = (x * level, y * level)


def _wind(env: Any, level: float) -> None:
    env.enable_wind, env.wind_power = level > 0 or env.enable_wind, level


def _cart(env: Any, level: float) -> None:
    _scale(env, level, "masscart", "masspole")
    env.total_mass, env.polemass_length = env.masscart + env.masspole, env.masspole * env.length


def _mujoco(env: Any, name: str, level: float) -> None:
    if level == 1:
        return  # not even constants are derived again
    model = env.model
    match name:
        case "mass":
            model.body_mass[:] *= level
            model.body_inertia[:] *= level
            importlib.import_module("mujoco").mj_setConst(model, env.data)
        case "friction":
            model.geom_friction[:] *= level
        case _:
            model.opt.gravity[:] *= level


def default_conditions(spec: EnvSpec) -> tuple[Condition, ...]:
    """Plain episodes, noise, delay, and every dynamics that the environment lets change, at `LEVELS`."""
    env, _ = bare_env(spec)
    kinds = ["noise", "delay", *knobs(env.unwrapped)]
    env.close()
    return (PLAIN, *(Condition(kind, level) for kind in kinds for level in LEVELS[kind]))


def parse_condition(text: str, spec: EnvSpec) -> Condition:
    """The condition that `noise=0.1` or `gravity=0.9` stands for; InputError names what the environment allows."""
    env, _ = bare_env(spec)
    known = ["noise", "delay", *knobs(env.unwrapped)]
    env.close()
    kind, equals, number = (part.strip() for part in text.partition("="))
    try:
        level = float(number)
    except ValueError:
        level = math.nan
    if text.strip() == "plain":
        return PLAIN
    if kind not in known or not equals:
        raise InputError(f"unknown condition {text!r}; accepted of {spec.id}: {'=X, '.join(known)}=X, plain")
    if not (math.isfinite(level) and level >= 0) or (kind == "delay" and level != int(level)):
        wanted = "a whole number of steps" if kind == "delay" else "a number"
        raise InputError(f"condition {text!r}: {number!r} is not {wanted} from 0 on")
    if kind in ("mass", "friction") and level == 0:
        raise InputError(f"condition {text!r}: nothing moves with {kind} 0; give a factor above 0")
    return Condition(kind, level)


def observation_spread(act: Actor, spec: EnvSpec) -> NDArray[np.float32]:
    """Standard deviation of each component over states of the policy's own rollouts; 0 for appended inputs."""
    states = collect_visits(act, spec, SPREAD_STATES, episodes=8)[0]
    spread = states.std(axis=0, dtype=np.float64).astype(np.float32)
    if spec.time_feature is not None:
        spread[-1] = 0
    return spread


def stress(
    policy: Policy,
    spec: EnvSpec,
    condition: Condition,
    *,
    spread: NDArray[np.float32],
    episodes: int = 20,
    seed: int = EVALUATION_SEED,
    progress: Progress | None = None,
) -> Stress:
    """Play `episodes` episodes under a condition. spread: of the observations, shaped as one (`observation_spread`)."""
    noise = condition.level if condition.kind == "noise" else 0.0
    delay = int(condition.level) if condition.kind == "delay" else 0
    disturbed = _Disturbed(act_of(policy), policy.head, episodes, seed, noise * spread if noise else None, delay)
    change: Change | None = None
    if condition.kind not in ("plain", "noise", "delay"):

        def change(env: Any) -> None:
            knobs(env)[condition.kind](condition.level)

    result = rollout(
        disturbed, spec, episodes=episodes, seed=seed, progress=progress, record=disturbed.record, change=change
    )
    moved = disturbed.moved / np.maximum(result.lengths - 1, 1)
    return Stress(condition, score(result), worst_decile(result.returns), float(mean(moved)))


class _Disturbed:
    """`act` with noise before and a delay behind it; sums up in `moved`, by episode, how far actions move."""

    def __init__(
        self, act: Actor, head: Head, episodes: int, seed: int, noise: NDArray[np.float32] | None, delay: int
    ) -> None:
        self.choose, self.seed, self.noise, self.delay = chooser(act), seed, noise, delay
        self.streams: dict[int, np.random.Generator] = {}
        self.numbers: list[int] = []
        self.steps = np.zeros(0, np.int64)
        self.held: np.ndarray | None = None  # (episodes, delay + 1, action): the decisions under way, and the last
        self.moved = np.zeros(episodes)
        self.span: np.ndarray | None = None
        if head.kind == "box":
            span = np.asarray(head.high, np.float64) - np.asarray(head.low, np.float64)
            self.span = np.where(np.isfinite(span) & (span > 0), span, 1.0)
        self.last: np.ndarray | None = None

    def record(self, obs: np.ndarray, numbers: Sequence[int], steps: Sequence[int]) -> None:
        """Which rows the next call has."""
        self.numbers, self.steps = list(numbers), np.array(steps)

    def __call__(self, obs: np.ndarray) -> np.ndarray:
        if self.noise is not None:
            obs = self._noisy(obs, self.noise)
        actions = np.asarray(self.choose(obs, self.numbers))
        numbers, steps = self.numbers, self.steps
        if self.held is None:
            shape = actions.shape[1:]
            self.held = np.zeros((len(self.moved), self.delay + 1, *shape), actions.dtype)
            self.last = np.zeros((len(self.moved), *shape), actions.dtype)
        assert self.last is not None
        if self.delay:
            self.held[numbers, steps % (self.delay + 1)] = actions
            actions = self.held[numbers, np.maximum(steps - self.delay, 0) % (self.delay + 1)]
        before = self.last[numbers]
        if self.span is None:
            moved = (actions != before).reshape(len(actions), -1).any(axis=1).astype(np.float64)
        else:
            apart = np.abs(actions.astype(np.float64) - before).reshape(len(actions), -1)
            moved = (apart / self.span).mean(axis=1)
        self.moved[numbers] += np.where(steps > 0, moved, 0.0)
        self.last[numbers] = actions
        return actions

    def _noisy(self, obs: np.ndarray, noise: NDArray[np.float32]) -> np.ndarray:
        drawn = np.empty(obs.shape, np.float32)
        for row, number in enumerate(self.numbers):
            if number not in self.streams:
                self.streams[number] = np.random.default_rng([self.seed + number, 3])
            drawn[row] = self.streams[number].standard_normal(obs.shape[1:], np.float32)
        if obs.dtype == np.uint8:
            return np.clip(np.rint(obs + drawn * noise), 0, 255).astype(np.uint8)
        return (obs + drawn * noise).astype(obs.dtype)


def compare(
    policy: Policy,
    spec: EnvSpec,
    conditions: Sequence[Condition],
    *,
    reference: Policy | None = None,
    episodes: int = 20,
    seed: int = EVALUATION_SEED,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """A policy under each condition, and a reference on the same seeds and noise: JSON values.

    `rows` has one record for each condition: its Stress, and with a reference that one's (`reference`) and the
    paired `difference` policy - reference: mean, and one-sided 95 % bounds low and high (None for one episode).
    """
    env = make_env(spec)
    for one in (policy, reference):
        if one is not None:
            check_fits(env, one)
    env.close()
    spread = observation_spread(act_of(reference or policy), spec)
    total, done = len(conditions) * episodes * (1 if reference is None else 2), 0

    def play(one: Policy, condition: Condition) -> Stress:
        nonlocal done
        base = done

        def count(finished: int, _: int) -> None:
            if progress:
                progress(base + finished, total)

        found = stress(one, spec, condition, spread=spread, episodes=episodes, seed=seed, progress=count)
        done += episodes
        return found

    rows = []
    for condition in conditions:
        ours = play(policy, condition)
        row: dict[str, Any] = {"condition": str(condition), "kind": condition.kind, "level": condition.level}
        row |= ours.to_json()
        if reference is not None:
            theirs = play(reference, condition)
            found = non_inferior(theirs.score.returns, ours.score.returns, 0.0).to_json()
            row["reference"] = theirs.to_json()
            row["difference"] = {"mean": found["diff_mean"], "low": found["low"], "high": found["high"]}
        rows.append(row)
    return {"env": spec.id, "episodes": episodes, "seed": seed, "rows": rows}

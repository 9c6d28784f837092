"""Episodes: deterministic rollouts of many environments stepped together, one batched forward per step.

Episode i is `env.reset(seed=seed + i)` on a fresh environment, so float and quantized policies
meet the same episodes and their returns can be compared in pairs. Environments are made anew for
each episode because some of them remember: BipedalWalker-v3 (gymnasium 1.4) keeps its Box2D
world across resets, and a second episode in it differs from the same seed in a new one.

An episode depends on its seed and on the actions only, never on `n_envs` or on its neighbours in
the batch. A policy whose rows depend on the batch size in the last bit (BLAS picks other kernels
for other shapes) may still change an action at a tie; quantized policies whose sums are exact
cannot. With the default `n_envs` the batch sizes are a function of the episodes alone, so
the same call always gives the same result.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from quantkit.errors import InputError
from quantkit.model import EnvSpec
from quantkit.policy import Policy
from quantkit.seeds import EVALUATION_SEED
from quantkit.simulate import compile_policy, compile_step
from quantkit.statistics import Method, Verdict, bootstrap_interval, iqm, non_inferior, spread
from quantkit.tasks.environments import bare_env, check_fits, input_shape, make_env

Act = Callable[[np.ndarray], np.ndarray]
"""Observations (batch, *obs_shape) -> actions (batch,) or (batch, k). Must not keep or change its argument."""
Choose = Callable[[np.ndarray, Sequence[int]], np.ndarray]
"""Observations and the numbers of their episodes -> actions."""
Progress = Callable[[int, int], None]
"""Called with (episodes done, episodes in all)."""
Record = Callable[[np.ndarray, Sequence[int], Sequence[int]], None]
"""Called before each forward with (observations, episode numbers, step numbers); copies what it keeps."""
Change = Callable[[Any], None]
"""Called with each fresh environment, unwrapped, before its reset: it may alter the dynamics."""

_WIDTH = 32
_NEVER = 1_000_000


@dataclass(frozen=True)
class Rollout:
    """Episode i, started with seed + i: returns[i] (undiscounted, float64) and lengths[i] in steps."""

    returns: NDArray[np.float64]
    lengths: NDArray[np.int64]
    seed: int
    seconds: float


@dataclass(frozen=True)
class Score:
    """What a policy scored over n episodes.

    std has ddof 1; std and stderr are NaN for one episode. iqm: interquartile mean, with its
    95 % percentile bootstrap interval. returns and lengths are in order of seeds seed, seed + 1, ...
    """

    metric: str
    mean: float
    std: float
    stderr: float
    n: int
    iqm: float
    iqm_low: float
    iqm_high: float
    returns: tuple[float, ...]
    lengths: tuple[int, ...]
    seed: int
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; NaN becomes None."""
        plain = asdict(self) | {"returns": list(self.returns), "lengths": list(self.lengths)}
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in plain.items()}


@dataclass(frozen=True)
class Recalling:
    """An actor with a memory of each episode.

    step: observations (batch, *obs_shape) and states -> actions and the next states; states are arrays (cells, batch,
    size), and `sizes` has cells and size of each. Episodes begin with zeros.
    """

    step: Callable[[np.ndarray, tuple[np.ndarray, ...]], tuple[np.ndarray, tuple[np.ndarray, ...]]]
    sizes: tuple[tuple[int, int], ...]

    def chooser(self) -> Choose:
        """The actor of one rollout, in which an episode's number is its own."""
        held: tuple[np.ndarray, ...] = tuple(np.zeros((cells, 0, size), np.float32) for cells, size in self.sizes)
        rows: list[int] = []

        def choose(obs: np.ndarray, numbers: Sequence[int]) -> np.ndarray:
            nonlocal held, rows
            if rows != list(numbers):
                place = {number: row for row, number in enumerate(rows)}
                found = [place.get(number, len(rows)) for number in numbers]  # the last row is a new episode's
                held = tuple(np.pad(s, ((0, 0), (0, 1), (0, 0)))[:, found] for s in held)
                rows = list(numbers)
            actions, held = self.step(obs, held)
            return actions

        return choose


Actor = Act | Recalling


def act_of(policy: Policy) -> Actor:
    """The policy's deterministic actions as a numpy function; compile again after changing the policy."""
    head = policy.head
    if not policy.recurrent:
        forward = compile_policy(policy)
        return lambda obs: head.actions(forward(obs))
    step, cells = compile_step(policy), policy.cells

    def act(obs: np.ndarray, states: tuple[np.ndarray, ...]) -> tuple[np.ndarray, tuple[np.ndarray, ...]]:
        out, states = step(obs, (states[0], states[1]))
        return head.actions(out), states

    return Recalling(act, ((len(cells), cells[0].hidden),) * 2)


def chooser(act: Actor) -> Choose:
    """The actor with its memory, if it has one, for one rollout."""
    return act.chooser() if isinstance(act, Recalling) else lambda obs, _: act(obs)


def rollout(
    act: Actor,
    spec: EnvSpec,
    *,
    episodes: int,
    seed: int = EVALUATION_SEED,
    n_envs: int | None = None,
    progress: Progress | None = None,
    record: Record | None = None,
    change: Change | None = None,
) -> Rollout:
    """Run `episodes` episodes, at most `n_envs` (default: all, up to 32) at a time.

    A finished environment leaves the batch or starts the next episode, so no step is wasted.
    Raises InputError on actions that are not finite and on an episode without an end.
    """
    return _run(chooser(act), spec, episodes, seed, n_envs, progress, record, change)


def evaluate(
    act: Actor,
    spec: EnvSpec,
    *,
    episodes: int = 20,
    seed: int = EVALUATION_SEED,
    n_envs: int | None = None,
    progress: Progress | None = None,
) -> Score:
    """Score of `act` over the episodes seed, ..., seed + episodes - 1."""
    return score(rollout(act, spec, episodes=episodes, seed=seed, n_envs=n_envs, progress=progress))


def evaluate_policy(
    policy: Policy,
    spec: EnvSpec,
    *,
    episodes: int = 20,
    seed: int = EVALUATION_SEED,
    n_envs: int | None = None,
    progress: Progress | None = None,
) -> Score:
    """`evaluate` of a policy module, after checking that it fits the environment."""
    env = make_env(spec)
    check_fits(env, policy)
    env.close()
    return evaluate(act_of(policy), spec, episodes=episodes, seed=seed, n_envs=n_envs, progress=progress)


def random_score(
    spec: EnvSpec,
    *,
    episodes: int = 20,
    seed: int = EVALUATION_SEED,
    n_envs: int | None = None,
    progress: Progress | None = None,
) -> Score:
    """Score of uniformly random actions (from the action space, one seeded stream per episode)."""
    env, _ = bare_env(spec)
    space, streams = env.action_space, {}
    env.close()

    def choose(obs: np.ndarray, numbers: Sequence[int]) -> np.ndarray:
        for number in numbers:
            if number not in streams:
                streams[number] = copy.deepcopy(space)
                # Not the episode's own seed: gymnasium would give both the same stream of bits.
                streams[number].seed(int(np.random.SeedSequence([seed + number, 1]).generate_state(1)[0]))
        return np.stack([streams[number].sample() for number in numbers])

    return score(_run(choose, spec, episodes, seed, n_envs, progress, None))


def score(result: Rollout) -> Score:
    """Summary of a rollout."""
    std, stderr = spread(result.returns)
    low, high = bootstrap_interval(result.returns, iqm)
    return Score(
        metric="return",
        mean=float(result.returns.mean()),
        std=std,
        stderr=stderr,
        n=result.returns.size,
        iqm=float(iqm(result.returns)),
        iqm_low=low,
        iqm_high=high,
        returns=tuple(result.returns.tolist()),
        lengths=tuple(result.lengths.tolist()),
        seed=result.seed,
        seconds=result.seconds,
    )


def compare_scores(reference: Score, quantized: Score, margin: float) -> Verdict:
    """Paired non-inferiority of two scores on the same seeds, or of accuracies on the same inputs.

    Raises InputError when the seeds differ.
    """
    if (reference.seed, reference.n) != (quantized.seed, quantized.n):
        raise InputError(
            f"scores are not paired: {reference.n} episodes from seed {reference.seed}, "
            f"{quantized.n} from seed {quantized.seed}"
        )
    method: Method = "shares" if reference.metric == "accuracy" else "t"
    return non_inferior(reference.returns, quantized.returns, margin, method=method)


def _run(
    choose: Choose,
    spec: EnvSpec,
    episodes: int,
    seed: int,
    n_envs: int | None,
    progress: Progress | None,
    record: Record | None,
    change: Change | None = None,
) -> Rollout:
    """The loop: rows 0..live-1 of `obs` belong to running episodes; a finished row is refilled or closed up."""
    if episodes < 1 or (n_envs is not None and n_envs < 1):
        raise InputError(f"episodes and n_envs must be at least 1, got {episodes} and {n_envs}")
    if seed < 0:
        raise InputError(f"the seed must not be negative, got {seed}")
    began = time.perf_counter()
    width = min(episodes, n_envs or _WIDTH)

    def fresh() -> tuple[Any, int | None]:
        env, limit = bare_env(spec)
        if change is not None:
            change(env.unwrapped)
        return env, limit

    env, limit = fresh()
    shape = input_shape(env, spec)
    space = cast(Any, env.observation_space)
    obs = np.zeros((width, *shape), np.uint8 if space.dtype == np.uint8 else np.float32)
    rows = [row[: space.shape[0]] if len(shape) == 1 else row for row in obs]
    continuous = bool(np.issubdtype(cast(Any, env.action_space).dtype, np.floating))
    action_shape = env.action_space.shape or ()
    horizon, last_step = spec.time_feature, _NEVER if limit is None else limit

    returns, lengths = np.zeros(episodes), np.zeros(episodes, np.int64)
    envs, numbers, steps, totals = [env], [0] * width, [0] * width, [0.0] * width
    live, started, done = width, 0, 0

    def start(row: int) -> None:
        nonlocal started
        rows[row][...] = envs[row].reset(seed=seed + started)[0]
        numbers[row], steps[row], totals[row] = started, 0, 0.0
        started += 1

    try:
        for row in range(width):
            if row:
                envs.append(fresh()[0])
            start(row)
        advance = [env.step for env in envs]
        while live:
            if horizon is not None:
                obs[:live, -1] = 1 - np.array(steps[:live]) / horizon
            if record is not None:
                record(obs[:live], numbers[:live], steps[:live])
            actions = np.asarray(choose(obs[:live], numbers[:live]))
            if continuous:
                if not np.isfinite(actions).all():
                    raise InputError(f"the policy gave actions that are not finite in {spec.id!r}")
                actions = actions.reshape(live, *action_shape)
            finished = []
            for row, action in enumerate(actions):
                observation, reward, terminated, truncated, _ = advance[row](action)
                totals[row] += float(reward)
                steps[row] += 1
                if terminated or truncated or steps[row] >= last_step:
                    finished.append(row)
                else:
                    rows[row][...] = observation
            for row in reversed(finished):  # backwards: the row that closes a gap is never a finished one
                if limit is None and steps[row] >= _NEVER:
                    raise InputError(
                        f"an episode of {spec.id!r} has no end after {_NEVER:,} steps; "
                        "give max_episode_steps in the environment's kwargs"
                    )
                returns[numbers[row]], lengths[numbers[row]] = totals[row], steps[row]
                envs[row].close()
                done += 1
                if started < episodes:
                    envs[row] = fresh()[0]
                    advance[row] = envs[row].step
                    start(row)
                else:
                    live -= 1
                    if row != live:
                        obs[row] = obs[live]
                        envs[row], advance[row] = envs[live], advance[live]
                        numbers[row], steps[row], totals[row] = numbers[live], steps[live], totals[live]
                if progress is not None:
                    progress(done, episodes)
    finally:
        for env in envs[:live]:
            env.close()
    return Rollout(returns, lengths, seed, time.perf_counter() - began)

"""Robustness against plain gymnasium loops written out, its laws, and the physics that the knobs claim to change."""

from __future__ import annotations

import itertools
import json
from collections import deque
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from test_cli import call, document, error

from quantkit.errors import InputError
from quantkit.loading import load_checkpoint
from quantkit.model import EnvSpec
from quantkit.policy import Policy
from quantkit.study import policy_of
from quantkit.tasks.episodes import act_of, evaluate_policy
from quantkit.tasks.robustness import (
    PLAIN,
    Condition,
    compare,
    default_conditions,
    knobs,
    observation_spread,
    parse_condition,
    stress,
    worst_decile,
)

AGENTS = Path(__file__).parents[1] / "benchmarks/agents"
LANDER, PENDULUM = AGENTS / "ppo/LunarLander-v3.zip", AGENTS / "sac/Pendulum-v1.zip"
SEED = 300


def agent(path: Path) -> tuple[Policy, EnvSpec, np.ndarray]:
    """A policy, its environment, and a spread for its observations."""
    policy, spec = policy_of(load_checkpoint(path))
    return policy, spec, np.linspace(0.1, 0.5, policy.obs_shape[0]).astype(np.float32)


def plain_loop(policy: Policy, env: Any, seed: int, noise: Any = 0.0, delay: int = 0) -> tuple[float, list[Any]]:
    """Return and actions of one episode as anyone would write it: a queue for the delay, noise from one stream."""
    act, stream = act_of(policy), np.random.default_rng([seed, 3])
    obs, _ = env.reset(seed=seed)
    queue: deque[Any] = deque()
    total, over, taken = 0.0, False, []
    while not over:
        seen = np.asarray(obs, np.float32)
        if np.any(noise):
            seen = seen + stream.standard_normal(seen.shape, np.float32) * noise
        decided = act(seen[None])[0]
        queue.extend([decided] * (1 if queue else delay + 1))
        action = queue.popleft()
        taken.append(action)
        obs, reward, terminated, truncated, _ = env.step(action)
        total, over = total + float(reward), terminated or truncated
    return total, taken


def chatter_of(taken: list[Any], span: float | None) -> float:
    """The definition: mean over steps behind the first."""
    pairs = list(itertools.pairwise(taken))
    moves = [float(np.any(a != b)) if span is None else float(np.mean(np.abs(a - b)) / span) for a, b in pairs]
    return sum(moves) / len(moves)


@pytest.mark.parametrize("path", [LANDER, PENDULUM], ids=["discrete", "box"])
@pytest.mark.parametrize(("noise", "delay"), [(0.0, 0), (0.3, 0), (0.0, 1), (0.0, 3)])
def test_returns_are_those_of_a_plain_loop(path: Path, noise: float, delay: int) -> None:
    """Return, chatter and worst tenth of noisy and of delayed episodes equal those of one environment at a time.

    The batch is one episode wide there, so a policy whose sums depend on the batch size may differ by rounding.
    """
    policy, spec, spread = agent(path)
    condition = Condition("noise", noise) if noise else Condition("delay", delay)
    found = stress(policy, spec, condition, spread=spread, episodes=3, seed=SEED)
    span = None if path == LANDER else 4.0
    expected = [plain_loop(policy, gymnasium.make(spec.id), SEED + i, noise * spread, delay) for i in range(3)]
    assert found.score.returns == pytest.approx([total for total, _ in expected], rel=1e-5)
    assert found.chatter == pytest.approx(np.mean([chatter_of(taken, span) for _, taken in expected]), rel=1e-5)
    assert found.worst_decile == min(found.score.returns)


@pytest.mark.parametrize("path", [LANDER, PENDULUM], ids=["discrete", "box"])
def test_nothing_done_is_the_plain_score(path: Path) -> None:
    """Noise 0, delay 0 and factor 1 of every dynamics give the plain returns to the last bit."""
    policy, spec, spread = agent(path)
    expected = evaluate_policy(policy, spec, episodes=4, seed=SEED).returns
    factors = [Condition(kind, 1.0) for kind in ("gravity", "mass") if kind in knobs(gymnasium.make(spec.id).unwrapped)]
    assert factors
    for condition in (PLAIN, Condition("noise", 0.0), Condition("delay", 0), *factors):
        assert stress(policy, spec, condition, spread=spread, episodes=4, seed=SEED).score.returns == expected


@pytest.mark.parametrize("path", [LANDER, PENDULUM], ids=["discrete", "box"])
def test_every_condition_does_something(path: Path) -> None:
    """Each default condition of an environment changes the returns."""
    policy, spec, spread = agent(path)
    plain = evaluate_policy(policy, spec, episodes=2, seed=SEED).returns
    conditions = default_conditions(spec)
    assert {c.kind for c in conditions} >= {"plain", "noise", "delay", "gravity"}
    for condition in conditions[1:]:
        found = stress(policy, spec, condition, spread=spread, episodes=2, seed=SEED)
        assert found.score.returns != plain, condition


def test_knobs_equal_the_arguments_of_the_environment() -> None:
    """Gravity and wind of a lander are those of `gymnasium.make`'s own arguments, return by return."""
    policy, spec, spread = agent(LANDER)
    for condition, kwargs in (
        (Condition("gravity", 0.85), {"gravity": -8.5}),
        (Condition("wind", 12.0), {"enable_wind": True, "wind_power": 12.0}),
    ):
        found = stress(policy, spec, condition, spread=spread, episodes=2, seed=SEED)
        expected = evaluate_policy(policy, EnvSpec(spec.id, kwargs), episodes=2, seed=SEED)
        assert found.score.returns == pytest.approx(expected.returns)


def test_a_changed_cheetah_obeys_newton() -> None:
    """In the air a cheetah falls with the factor of gravity; twice the mass falls alike and gains half from a push."""
    mujoco = pytest.importorskip("mujoco")

    def fall(kind: str, level: float, push: float) -> float:
        env: Any = gymnasium.make("HalfCheetah-v5").unwrapped
        env.reset(seed=0)
        knobs(env)[kind](level)
        mujoco.mj_resetData(env.model, env.data)
        env.data.qpos[1] = 10.0
        env.data.xfrc_applied[1, 2] = push  # at the torso: the joints give way, so only ratios are compared
        mujoco.mj_forward(env.model, env.data)
        mujoco.mj_subtreeVel(env.model, env.data)
        before = env.data.subtree_linvel[0, 2]
        for _ in range(20):
            mujoco.mj_step(env.model, env.data)
        mujoco.mj_forward(env.model, env.data)
        mujoco.mj_subtreeVel(env.model, env.data)
        return float((env.data.subtree_linvel[0, 2] - before) / (20 * env.model.opt.timestep))

    assert fall("gravity", 1.5, 0.0) == pytest.approx(1.5 * -9.81, rel=1e-3)
    assert fall("mass", 2.0, 0.0) == pytest.approx(-9.81, rel=1e-3)
    single, double = (fall("mass", level, 50.0) + 9.81 for level in (1.0, 2.0))
    assert single == pytest.approx(2 * double, rel=1e-2)


def test_a_time_feature_stays_clean() -> None:
    """The appended time is no sensor: its spread is 0, that of the rest is not."""
    policy, spec, _ = agent(PENDULUM)
    act = act_of(policy)
    timed = EnvSpec(spec.id, spec.kwargs, time_feature=200)
    spread = observation_spread(lambda obs: act(np.ascontiguousarray(obs[:, :3])), timed)
    assert spread.shape == (4,) and spread[3] == 0 and (spread[:3] > 0).all()


def test_worst_decile_is_the_lowest_tenth() -> None:
    """Of 1, 10, 11 and 30 returns the lowest 1, 1, 2 and 3."""
    for n, k in ((1, 1), (10, 1), (11, 2), (30, 3)):
        values = np.random.default_rng(n).permutation(n).astype(float)
        assert worst_decile(values) == np.arange(k).mean()


def test_a_policy_against_itself_differs_by_nothing() -> None:
    """The reference plays the same episodes with the same noise: all differences are exactly 0."""
    policy, spec, _ = agent(PENDULUM)
    chosen = (PLAIN, Condition("noise", 0.2), Condition("delay", 1))
    ticks: list[tuple[int, int]] = []
    found = compare(policy, spec, chosen, reference=policy, episodes=3, progress=lambda *t: ticks.append(t))
    assert [row["condition"] for row in found["rows"]] == ["plain", "noise=0.2", "delay=1"]
    for row in found["rows"]:
        assert row["difference"] == {"mean": 0.0, "low": 0.0, "high": 0.0}
        assert row["returns"] == row["reference"]["returns"] and row["chatter"] == row["reference"]["chatter"]
    assert ticks[-1] == (18, 18) and [t[0] for t in ticks] == sorted(t[0] for t in ticks)
    assert json.loads(json.dumps(found, allow_nan=False)) == found


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("nose=0.1", "accepted of Pendulum-v1: noise=X, delay=X, gravity=X, mass=X, plain"),
        ("wind=3", "accepted of Pendulum-v1"),
        ("noise", "accepted"),
        ("noise=-1", "not a number from 0 on"),
        ("noise=nan", "not a number"),
        ("delay=1.5", "not a whole number of steps"),
        ("mass=0", "give a factor above 0"),
    ],
)
def test_a_condition_that_is_none_is_refused(text: str, hint: str) -> None:
    """One line that names the text and what the environment allows."""
    with pytest.raises(InputError, match=hint) as caught:
        parse_condition(text, EnvSpec("Pendulum-v1"))
    assert repr(text) in str(caught.value)


def test_the_command_keeps_its_contract(tmp_path: Path) -> None:
    """Plain comes first and equals `evaluate`; --against pairs; a table without --json; bad input is one line."""
    assert call("quantize", PENDULUM, "-o", tmp_path / "q", "--weights", "int4", "--acts", "int4").exit_code == 0
    found = document("robustness", tmp_path / "q", "--against", PENDULUM, "--condition", "noise=0.1", "-n", "3")
    assert [row["condition"] for row in found["rows"]] == ["plain", "noise=0.1"]
    plain = found["rows"][0]
    for path, row in ((tmp_path / "q", plain), (PENDULUM, plain["reference"])):
        expected = document("evaluate", path, "-n", "3")
        assert (row["mean"], row["returns"]) == (expected["mean"], expected["returns"])
    assert plain["difference"]["mean"] == pytest.approx(plain["mean"] - plain["reference"]["mean"])
    shown = call("robustness", PENDULUM, "--condition", "delay=1", "-n", "2")
    assert shown.exit_code == 0 and "delay=1" in shown.stdout and "worst tenth" in shown.stdout
    assert "'x=1'" in error("robustness", PENDULUM, "--condition", "x=1")
    assert "observations of shape" in error("robustness", tmp_path / "q", "--against", LANDER, "-n", "2")

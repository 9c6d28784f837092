"""Agents that observe dictionaries, integers or bits act in their environments as under SB3."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import tiny_agents as tiny
from gymnasium import spaces

from quantkit.errors import InputError
from quantkit.export import export_onnx, open_session
from quantkit.loading import describe_checkpoint, load_checkpoint
from quantkit.model import EnvSpec, Model
from quantkit.policy import Field, Policy
from quantkit.recipe import quantize, uniform
from quantkit.study import calib_for, fresh_states, policy_of, verify_export
from quantkit.tasks.environments import check_fits, make_env
from quantkit.tasks.episodes import evaluate_policy

pytest.importorskip("stable_baselines3")
pytest.importorskip("sb3_contrib")


class Goal(gymnasium.Env[Any, Any]):
    """A point that is to reach a goal: float64 numbers under three keys, an integer and bits under two more."""

    observation_space = spaces.Dict(
        {
            "observation": spaces.Box(-9.0, 9.0, (2, 2), np.float64),
            "goal": spaces.Box(-1.0, 1.0, (2,), np.float64),
            "achieved": spaces.Box(-9.0, 9.0, (2,), np.float64),
            "mode": spaces.Discrete(3),
            "bits": spaces.MultiBinary(2),
        }
    )
    action_space = spaces.Box(-1.0, 1.0, (2,), np.float32)

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.at, self.speed = self.np_random.uniform(-1, 1, 2), np.zeros(2)
        self.goal, self.t = self.np_random.uniform(-1, 1, 2), 0
        return self.seen(), {}

    def seen(self) -> dict[str, Any]:
        bits = (self.at > self.goal).astype(np.int8)
        full = np.stack([self.at, self.speed])
        return {"observation": full, "goal": self.goal, "achieved": self.at, "mode": self.t % 3, "bits": bits}

    def step(self, action: Any) -> Any:
        self.speed = 0.9 * self.speed + 0.1 * np.asarray(action, np.float64)
        self.at, self.t = np.clip(self.at + self.speed, -9, 9), self.t + 1
        return self.seen(), -float(np.abs(self.at - self.goal).sum()), False, self.t >= 30, {}


class Coded(gymnasium.Env[Any, Any]):
    """Two integers that an action moves; actions may be masked."""

    observation_space = spaces.MultiDiscrete([4, 3])
    action_space = spaces.Discrete(3)

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.state, self.t = self.np_random.integers(0, [4, 3]), 0
        return self.state.copy(), {}

    def step(self, action: Any) -> Any:
        self.state, self.t = (self.state + np.array([action, 1 + action])) % [4, 3], self.t + 1
        return self.state.copy(), float(self.state.sum()), False, self.t >= 20, {}


class Masked(Coded):
    def action_masks(self) -> np.ndarray:
        return np.array([True, True, False])


ENVS = {"TinyGoal-v0": Goal, "TinyCoded-v0": Coded, "TinyMasked-v0": Masked}
CASES = (
    ("SAC", "MultiInputPolicy", "TinyGoal-v0"),
    ("PPO", "MultiInputPolicy", "TinyGoal-v0"),
    ("PPO", "MlpPolicy", "TinyCoded-v0"),
    ("DQN", "MlpPolicy", "TinyCoded-v0"),
    ("RecurrentPPO", "MultiInputLstmPolicy", "TinyGoal-v0"),
    ("MaskablePPO", "MlpPolicy", "TinyCoded-v0"),
)


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    for name, cls in ENVS.items():
        gymnasium.register(name, cls)
    yield
    for name in ENVS:
        gymnasium.registry.pop(name, None)


def agent_of(algorithm: str, policy: str, env: str, folder: Path) -> tuple[Any, Model]:
    """SB3's agent with random weights, and what we load of it."""
    from stable_baselines3.common.vec_env import DummyVecEnv

    kwargs: dict[str, Any] = {"policy_kwargs": {"net_arch": [8]}}
    if "Lstm" in policy:
        kwargs["policy_kwargs"]["lstm_hidden_size"] = 6
    venv = DummyVecEnv([lambda: gymnasium.make(env, disable_env_checker=True)])
    agent = tiny.make_agent(algorithm, policy, ("box",), ("box",), kwargs, venv)
    agent.save(folder / f"{env}.zip")
    return agent, load_checkpoint(folder / f"{env}.zip")


@pytest.mark.parametrize(("algorithm", "policy", "env"), CASES)
def test_returns_equal_sb3s_own(algorithm: str, policy: str, env: str, tmp_path: Path) -> None:
    """Whole episodes have the returns of SB3's evaluate_policy."""
    from stable_baselines3.common.evaluation import evaluate_policy as theirs
    from stable_baselines3.common.monitor import Monitor
    from stable_baselines3.common.vec_env import DummyVecEnv

    agent, model = agent_of(algorithm, policy, env, tmp_path)
    venv = DummyVecEnv([lambda: Monitor(gymnasium.make(env, disable_env_checker=True))] * 4)
    venv.seed(1000)
    expected, _ = theirs(agent, venv, n_eval_episodes=4, return_episode_rewards=True, deterministic=True)
    module, spec = policy_of(model)
    found = evaluate_policy(module, spec, episodes=4, seed=1000)
    np.testing.assert_allclose(sorted(found.returns), sorted(expected), rtol=1e-4)
    assert len(set(found.returns)) > 1


@pytest.mark.parametrize(("algorithm", "policy", "env"), CASES)
def test_quantized_and_exported(algorithm: str, policy: str, env: str, tmp_path: Path) -> None:
    """Quantized on its own episodes, the exported file plays like the artifact, and says what its input is made of."""
    _, model = agent_of(algorithm, policy, env, tmp_path)
    small = quantize(model, uniform("int6", "int6"), calib_for(model, 128))
    export_onnx(small, tmp_path / "a.onnx", postprocess=True)
    found = verify_export(small, tmp_path / "a.onnx", episodes=2, seed=3)
    assert found.ok and found.mean == pytest.approx(found.mean_torch, rel=1e-6)  # libraries' tanh differ
    facts = open_session(tmp_path / "a.onnx").get_modelmeta().custom_metadata_map
    first = '"key": "achieved"' if "MultiInput" in policy else '"sizes": [4, 3]'
    places = describe_checkpoint(small)["made_of"]
    assert places == {"": "0..6 one-hot"} if "sizes" in first else places["mode"] == "6..8 one-hot"
    assert first in facts["fields"] and fresh_states(small, 10).shape[-1] == sum(f.width for f in fields_of(small))


def fields_of(model: Model) -> tuple[Field, ...]:
    assert isinstance(model.module, Policy)
    return model.module.fields


def test_other_keys_do_not_fit(tmp_path: Path) -> None:
    """A vector of the right length from other parts is refused, with both."""
    _, model = agent_of("PPO", "MlpPolicy", "TinyCoded-v0", tmp_path)
    gymnasium.register("Seven-v0", lambda: _Seven())
    try:
        env = make_env(EnvSpec("Seven-v0"))
        with pytest.raises(InputError, match=r"gives integers \(7,\), the policy takes integers \(4, 3\)"):
            check_fits(env, policy_of(model)[0])
    finally:
        gymnasium.registry.pop("Seven-v0")


class _Seven(Coded):
    observation_space = spaces.Discrete(7)  # type: ignore[assignment]


def test_masks_are_refused(tmp_path: Path) -> None:
    """Episodes of MaskablePPO in an environment with masks are refused in a line that says so."""
    _, model = agent_of("MaskablePPO", "MlpPolicy", "TinyMasked-v0", tmp_path)
    with pytest.raises(InputError, match="'TinyMasked-v0' masks actions"):
        policy_of(model)


def test_integers_out_of_range_are_refused(tmp_path: Path) -> None:
    """predict takes no integer that the space does not have, and no dictionary without its keys."""
    coded = policy_of(agent_of("PPO", "MlpPolicy", "TinyCoded-v0", tmp_path)[1])[0]
    with pytest.raises(InputError, match=r"not below \(4, 3\)"):
        coded.predict(np.array([4, 0]))
    goal = policy_of(agent_of("PPO", "MultiInputPolicy", "TinyGoal-v0", tmp_path)[1])[0]
    with pytest.raises(InputError, match="a dictionary with achieved, bits, goal, mode, observation"):
        goal.predict({"goal": np.zeros(2)})
    with pytest.raises(InputError, match=r"observation 'goal' of shape \(3,\)"):
        goal.predict({f.key: np.zeros(3 if f.key == "goal" else f.shape) for f in goal.fields})

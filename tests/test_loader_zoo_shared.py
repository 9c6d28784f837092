"""The published rl-zoo agents act as SB3's own modules; needs QUANTKIT_SHARED_DATA to name their folder."""

from __future__ import annotations

import io
import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_agents as tiny
import torch
from torch import nn

from quantkit.loaders.vecnormalize import read_pickle
from quantkit.loading import load_checkpoint
from quantkit.policy import Policy

SHARED = os.environ.get("QUANTKIT_SHARED_DATA")
ROOT = Path(SHARED) / "rl-zoo" if SHARED else Path("/nonexistent")
FOLDERS = sorted(p for p in ROOT.glob("*/*_1") if p.is_dir())
pytestmark = pytest.mark.skipif(not FOLDERS, reason="QUANTKIT_SHARED_DATA names no folder with rl-zoo")

# What SB3's class must be told, copied from the agents' config.yml by hand.
KWARGS: dict[str, dict[str, Any]] = {
    "a2c/BipedalWalker-v3_1": {"use_sde": True},
    "dqn/Acrobot-v1_1": {"net_arch": [256, 256]},
    "dqn/MountainCar-v0_1": {"net_arch": [256, 256]},
    "ppo/Hopper-v3_1": {"activation_fn": nn.ReLU, "net_arch": {"pi": [256, 256], "vf": [256, 256]}},
    "sac/Pendulum-v1_1": {"use_sde": True, "net_arch": [64, 64]},
}
SCALES = {"Pendulum-v1": 2.0}


@pytest.mark.parametrize("mode", ["stage", "fold"])
@pytest.mark.parametrize("folder", FOLDERS, ids=lambda p: f"{p.parent.name}/{p.name}")
def test_zoo_agent_acts_as_sb3(folder: Path, mode: Any) -> None:
    """SB3's policy class with the published tensors, behind a normalizer done in float64, gives the same actions."""
    pytest.importorskip("sb3_contrib")
    from gymnasium import spaces
    from sb3_contrib.ars.policies import ARSLinearPolicy
    from stable_baselines3.common.policies import ActorCriticPolicy
    from stable_baselines3.dqn.policies import DQNPolicy
    from stable_baselines3.sac.policies import SACPolicy

    key = f"{folder.parent.name}/{folder.name}"
    env = folder.name.rpartition("_")[0]
    model = load_checkpoint(folder, normalize=mode)
    assert isinstance(model.module, Policy) and model.env is not None
    assert model.meta["algo"] == folder.parent.name

    inputs = model.example.shape[1]
    observation = spaces.Box(-np.inf, np.inf, (inputs,))
    head = model.module.head
    scale = SCALES.get(env, 1.0)
    action = spaces.Discrete(head.outputs) if head.kind == "discrete" else spaces.Box(-scale, scale, (head.outputs,))
    cls = {"dqn": DQNPolicy, "sac": SACPolicy, "ars": ARSLinearPolicy}.get(folder.parent.name, ActorCriticPolicy)
    given = (observation, action) if cls is ARSLinearPolicy else (observation, action, lambda _: 1e-3)
    policy = cls(*given, **KWARGS.get(key, {}))
    tensors = torch.load(
        io.BytesIO(tiny.read_zip(folder / f"{env}.zip")["policy.pth"]), map_location="cpu", weights_only=True
    )
    if cls is ARSLinearPolicy:
        tensors = {"action_net.0.weight": tensors["action_net.weight"]}
    policy.load_state_dict(tensors)

    raw, seen = _observations(folder / env / "vecnormalize.pkl", inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = policy.predict(seen, deterministic=True)[0]
    actual = model.module.predict(raw)[0]
    if head.kind == "discrete":
        np.testing.assert_array_equal(actual, expected)
    else:
        # folding and the float32 stage round differently from float64: a few units of the last place of |obs / std|
        np.testing.assert_allclose(actual, expected, atol=2e-5 if mode == "fold" else 1e-5)
    assert len(np.unique(expected)) > 1


def _observations(pickle_path: Path, inputs: int) -> tuple[np.ndarray, np.ndarray]:
    """Raw float32 observations spread as in training (some beyond the clip), and what VecNormalize makes of them."""
    rng = np.random.default_rng(0)
    if not pickle_path.is_file():
        raw = rng.normal(0.0, 1.0, (512, inputs)).astype(np.float32)
        return raw, raw
    from quantkit.loaders.vecnormalize import as_array

    state = read_pickle(pickle_path.read_bytes()).state
    stats = state["obs_rms"].state
    std = np.sqrt(as_array(stats["var"]) + as_array(state["epsilon"]))
    mean, clip = as_array(stats["mean"]), as_array(state["clip_obs"])
    raw = (mean + std * rng.standard_t(2, (512, inputs))).astype(np.float32)
    seen = np.clip((raw - mean) / std, -clip, clip).astype(np.float32)
    assert (np.abs(seen) == clip).any()
    return raw, seen

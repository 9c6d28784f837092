"""Tiny agents for the loader tests: real Stable-Baselines3 ones, and zips written by hand without it.

Nothing here imports stable_baselines3 at module level; `AGENTS` entries are built by `make_agent`.
"""

from __future__ import annotations

import io
import json
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

# name -> (algorithm, policy, observation, action, keyword arguments); spaces are made by `_space`.
_BOX5, _BOX3 = ("box", (5,), -3.0, 3.0), ("box", (3,), -1.0, 1.0)
_WIDE = ("box", (2,), [-2.0, -1.5], [3.0, 2.25])
_IMAGE = ("image", (36, 36, 3))
_SMALL_CNN = {"features_extractor_kwargs": {"features_dim": 16}}
_GOAL = (
    "dict",
    {"observation": _BOX5, "achieved_goal": ("box", (2,), -2.0, 2.0), "desired_goal": ("box", (2,), -2.0, 2.0)},
)
_MIXED = ("dict", {"z": ("box", (2, 3), -2.0, 2.0), "mode": ("discrete", 4), "bits": ("multibinary", 3)})
_LSTM = {"lstm_hidden_size": 8, "net_arch": [9]}
AGENTS: dict[str, tuple[str, str, tuple[Any, ...], tuple[Any, ...], dict[str, Any]]] = {
    "ppo-discrete": ("PPO", "MlpPolicy", _BOX5, ("discrete", 4), {}),
    "ppo-box": ("PPO", "MlpPolicy", _BOX5, _WIDE, {"policy_kwargs": {"net_arch": {"pi": [7, 9], "vf": [6]}}}),
    "ppo-linear": ("PPO", "MlpPolicy", _BOX5, _BOX3, {"policy_kwargs": {"net_arch": []}}),
    "ppo-multidiscrete": (
        "PPO",
        "MlpPolicy",
        _BOX5,
        ("multidiscrete", [2, 5, 3]),
        {"policy_kwargs": {"net_arch": [9]}},
    ),
    "ppo-multibinary": (
        "PPO",
        "MlpPolicy",
        ("multibinary", 6),
        ("multibinary", 4),
        {"policy_kwargs": {"net_arch": [9]}},
    ),
    "ppo-matrix-observation": (
        "PPO",
        "MlpPolicy",
        ("box", (3, 4), -3.0, 3.0),
        _BOX3,
        {"policy_kwargs": {"net_arch": [9]}},
    ),
    "ppo-discrete-start": ("PPO", "MlpPolicy", _BOX5, ("discrete", 4, 3), {}),
    "ppo-sde": ("PPO", "MlpPolicy", _BOX5, _WIDE, {"use_sde": True}),
    "ppo-sde-squash": ("PPO", "MlpPolicy", _BOX5, _WIDE, {"use_sde": True, "policy_kwargs": {"squash_output": True}}),
    "ppo-cnn": ("PPO", "CnnPolicy", _IMAGE, ("discrete", 4), {"policy_kwargs": _SMALL_CNN}),
    "ppo-cnn-separate": (
        "PPO",
        "CnnPolicy",
        _IMAGE,
        _WIDE,
        {"policy_kwargs": {"share_features_extractor": False, "net_arch": [8], **_SMALL_CNN}},
    ),
    "ppo-cnn-raw": (
        "PPO",
        "CnnPolicy",
        _IMAGE,
        ("discrete", 4),
        {"policy_kwargs": {"normalize_images": False, **_SMALL_CNN}},
    ),
    "ppo-mlp-image": ("PPO", "MlpPolicy", ("image", (6, 6, 1)), ("discrete", 4), {"policy_kwargs": {"net_arch": [9]}}),
    "a2c": ("A2C", "MlpPolicy", _BOX5, _BOX3, {"policy_kwargs": {"net_arch": [8, 8, 8]}}),
    "trpo": ("TRPO", "MlpPolicy", _BOX5, ("discrete", 3), {}),
    "dqn": ("DQN", "MlpPolicy", _BOX5, ("discrete", 3), {"policy_kwargs": {"net_arch": [16, 8]}}),
    "dqn-cnn": ("DQN", "CnnPolicy", _IMAGE, ("discrete", 4), {"policy_kwargs": _SMALL_CNN}),
    "qrdqn": ("QRDQN", "MlpPolicy", _BOX5, ("discrete", 3), {"policy_kwargs": {"n_quantiles": 7, "net_arch": [9]}}),
    "qrdqn-cnn": ("QRDQN", "CnnPolicy", _IMAGE, ("discrete", 3), {"policy_kwargs": {"n_quantiles": 5, **_SMALL_CNN}}),
    "ars": ("ARS", "MlpPolicy", _BOX5, _WIDE, {}),
    "ars-clipped": ("ARS", "MlpPolicy", _BOX5, _WIDE, {"policy_kwargs": {"squash_output": False, "with_bias": False}}),
    "ars-linear": ("ARS", "LinearPolicy", _BOX5, _WIDE, {}),
    "ars-linear-squash": (
        "ARS",
        "LinearPolicy",
        _BOX5,
        _WIDE,
        {"policy_kwargs": {"squash_output": True, "with_bias": True}},
    ),
    "ars-discrete": ("ARS", "MlpPolicy", _BOX5, ("discrete", 3), {"policy_kwargs": {"net_arch": [8]}}),
    "sac": ("SAC", "MlpPolicy", _BOX5, _WIDE, {"policy_kwargs": {"net_arch": {"pi": [8, 9], "qf": [4]}}}),
    "sac-linear": ("SAC", "MlpPolicy", _BOX5, _WIDE, {"policy_kwargs": {"net_arch": []}}),
    "sac-sde": (
        "SAC",
        "MlpPolicy",
        _BOX5,
        _WIDE,
        {"use_sde": True, "policy_kwargs": {"net_arch": [8], "clip_mean": 0.75}},
    ),
    "sac-sde-unclipped": (
        "SAC",
        "MlpPolicy",
        _BOX5,
        _WIDE,
        {"use_sde": True, "policy_kwargs": {"net_arch": [8], "clip_mean": 0.0}},
    ),
    "sac-cnn": ("SAC", "CnnPolicy", _IMAGE, _WIDE, {"policy_kwargs": {"net_arch": [8], **_SMALL_CNN}}),
    "td3": ("TD3", "MlpPolicy", _BOX5, _WIDE, {"policy_kwargs": {"net_arch": [8, 8]}}),
    "td3-cnn": ("TD3", "CnnPolicy", _IMAGE, _WIDE, {"policy_kwargs": {"net_arch": [8], **_SMALL_CNN}}),
    "ddpg": ("DDPG", "MlpPolicy", _BOX5, _WIDE, {"policy_kwargs": {"net_arch": [8, 8]}}),
    "tqc": ("TQC", "MlpPolicy", _BOX5, _WIDE, {"policy_kwargs": {"net_arch": [8, 8]}}),
    "ppo-state": ("PPO", "MlpPolicy", ("discrete", 6), ("discrete", 3), {"policy_kwargs": {"net_arch": [9]}}),
    "ppo-states": ("PPO", "MlpPolicy", ("multidiscrete", [3, 4]), _WIDE, {"policy_kwargs": {"net_arch": [9]}}),
    "dqn-state": ("DQN", "MlpPolicy", ("discrete", 6), ("discrete", 3), {"policy_kwargs": {"net_arch": [9]}}),
    "ppo-goal": ("PPO", "MultiInputPolicy", _GOAL, _WIDE, {"policy_kwargs": {"net_arch": [9]}}),
    "ppo-mixed": ("PPO", "MultiInputPolicy", _MIXED, ("discrete", 3), {"policy_kwargs": {"net_arch": [9]}}),
    "a2c-mixed": ("A2C", "MultiInputPolicy", _MIXED, _WIDE, {"policy_kwargs": {"net_arch": [9]}}),
    "dqn-goal": ("DQN", "MultiInputPolicy", _GOAL, ("discrete", 3), {"policy_kwargs": {"net_arch": [9]}}),
    "qrdqn-goal": ("QRDQN", "MultiInputPolicy", _GOAL, ("discrete", 3), {"policy_kwargs": {"net_arch": [9]}}),
    "sac-goal": ("SAC", "MultiInputPolicy", _GOAL, _WIDE, {"policy_kwargs": {"net_arch": [8, 8]}}),
    "td3-goal": ("TD3", "MultiInputPolicy", _GOAL, _WIDE, {"policy_kwargs": {"net_arch": [8, 8]}}),
    "tqc-goal": ("TQC", "MultiInputPolicy", _GOAL, _WIDE, {"policy_kwargs": {"net_arch": [8, 8]}}),
    "maskable": ("MaskablePPO", "MlpPolicy", _BOX5, ("discrete", 4), {}),
    "maskable-multi": (
        "MaskablePPO",
        "MlpPolicy",
        _BOX5,
        ("multidiscrete", [2, 3]),
        {"policy_kwargs": {"net_arch": [9]}},
    ),
    "maskable-mixed": (
        "MaskablePPO",
        "MultiInputPolicy",
        _MIXED,
        ("discrete", 3),
        {"policy_kwargs": {"net_arch": [9]}},
    ),
    "crossq": ("CrossQ", "MlpPolicy", _BOX5, _WIDE, {"policy_kwargs": {"net_arch": [8, 9]}}),
    "crossq-sde": ("CrossQ", "MlpPolicy", _BOX5, _WIDE, {"use_sde": True, "policy_kwargs": {"net_arch": [8]}}),
    "crossq-plain": ("CrossQ", "MlpPolicy", _BOX5, _WIDE, {"policy_kwargs": {"net_arch": [8], "batch_norm": False}}),
    "crossq-epsilon": (
        "CrossQ",
        "MlpPolicy",
        _BOX5,
        _WIDE,
        {"policy_kwargs": {"net_arch": [8], "batch_norm_eps": 0.25}},
    ),
    "dqn-linear": ("DQN", "MlpPolicy", _BOX5, ("discrete", 3), {"policy_kwargs": {"net_arch": []}}),
    "td3-linear": ("TD3", "MlpPolicy", _BOX5, _WIDE, {"policy_kwargs": {"net_arch": []}}),
    "ppo-no-actor-layers": ("PPO", "MlpPolicy", _BOX5, _WIDE, {"policy_kwargs": {"net_arch": {"pi": [], "vf": [4]}}}),
    "dqn-little-memory": (
        "DQN",
        "MlpPolicy",
        _BOX5,
        ("discrete", 3),
        {"optimize_memory_usage": True, "replay_buffer_kwargs": {"handle_timeout_termination": False}},
    ),
    "sac-cnn-shared": (
        "SAC",
        "CnnPolicy",
        _IMAGE,
        _WIDE,
        {"policy_kwargs": {"net_arch": [8], "share_features_extractor": True, **_SMALL_CNN}},
    ),
    "a2c-cnn-floats": (
        "A2C",
        "CnnPolicy",
        ("box", (3, 36, 36), 0.0, 1.0),
        _WIDE,
        {
            "policy_kwargs": {
                "normalize_images": False,
                "net_arch": [8],
                "features_extractor_kwargs": {"features_dim": 16, "normalized_image": True},
            }
        },
    ),
    "lstm-discrete": ("RecurrentPPO", "MlpLstmPolicy", _BOX5, ("discrete", 4), {"policy_kwargs": _LSTM}),
    "lstm-box": ("RecurrentPPO", "MlpLstmPolicy", _BOX5, _WIDE, {"policy_kwargs": {**_LSTM, "n_lstm_layers": 2}}),
    "lstm-shared": (
        "RecurrentPPO",
        "MlpLstmPolicy",
        _BOX5,
        _WIDE,
        {"policy_kwargs": {**_LSTM, "shared_lstm": True, "enable_critic_lstm": False}},
    ),
    "lstm-alone": (
        "RecurrentPPO",
        "MlpLstmPolicy",
        ("box", (3, 2), -3.0, 3.0),
        _WIDE,
        {"policy_kwargs": {**_LSTM, "net_arch": [], "enable_critic_lstm": False, "lstm_kwargs": {"bias": False}}},
    ),
    "lstm-sde": (
        "RecurrentPPO",
        "MlpLstmPolicy",
        _BOX5,
        _WIDE,
        {"use_sde": True, "policy_kwargs": {**_LSTM, "squash_output": True}},
    ),
    "lstm-goal": ("RecurrentPPO", "MultiInputLstmPolicy", _GOAL, ("discrete", 3), {"policy_kwargs": _LSTM}),
    "lstm-state": ("RecurrentPPO", "MlpLstmPolicy", ("discrete", 6), ("multibinary", 3), {"policy_kwargs": _LSTM}),
    "tqc-sde": ("TQC", "MlpPolicy", _BOX5, _WIDE, {"use_sde": True, "policy_kwargs": {"net_arch": [8, 8]}}),
}


def _space(spec: tuple[Any, ...]) -> Any:
    from gymnasium import spaces

    match spec:
        case ("box", shape, low, high):
            broadcast = [np.broadcast_to(np.asarray(b, np.float32), shape).copy() for b in (low, high)]
            return spaces.Box(*broadcast, dtype=np.float32)
        case ("image", shape):
            return spaces.Box(0, 255, shape, np.uint8)
        case ("discrete", n, *start):
            return spaces.Discrete(n, start=start[0] if start else 0)
        case ("multidiscrete", nvec):
            return spaces.MultiDiscrete(nvec)
        case ("multibinary", n):
            return spaces.MultiBinary(n)
        case ("dict", inner):
            return spaces.Dict({key: _space(entry) for key, entry in inner.items()})
    raise AssertionError(spec)


def make_venv(observation: tuple[Any, ...], action: tuple[Any, ...], seed: int = 11) -> Any:
    """A vectorized environment that gives random observations and never ends."""
    import gymnasium
    from stable_baselines3.common.vec_env import DummyVecEnv

    class Noise(gymnasium.Env[Any, Any]):
        def __init__(self) -> None:
            self.observation_space, self.action_space = _space(observation), _space(action)
            self.observation_space.seed(seed)

        def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
            return self.observation_space.sample(), {}

        def step(self, action: Any) -> Any:
            return self.observation_space.sample(), 0.0, False, False, {}

    return DummyVecEnv([Noise])


def make_agent(
    algorithm: str,
    policy: str,
    observation: tuple[Any, ...],
    action: tuple[Any, ...],
    kwargs: dict[str, Any],
    venv: Any = None,
) -> Any:
    """A real agent without learning; noise on every weight, so that biases and outputs are not trivial."""
    import sb3_contrib
    import stable_baselines3

    cls = getattr(stable_baselines3, algorithm, None) or getattr(sb3_contrib, algorithm)
    if algorithm in ("DQN", "QRDQN", "SAC", "TD3", "DDPG", "TQC", "CrossQ"):
        kwargs = {"buffer_size": 10, **kwargs}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        agent = cls(policy, venv or make_venv(observation, action), seed=5, device="cpu", **kwargs)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in agent.policy.parameters():
            spread = 0.3 if parameter.ndim < 4 else 0.05
            parameter += spread * torch.randn(parameter.shape, generator=generator)
        for name, buffer in agent.policy.named_buffers():
            if name.endswith(("ra_mean", "ra_var")):
                buffer += 0.6 * torch.rand(buffer.shape, generator=generator)
    if observation[0] != "box" and action[0] == "discrete":
        _balance(agent, algorithm)
    return agent


def _balance(agent: Any, algorithm: str) -> None:
    """Shift the last bias so that no action wins on every observation."""
    policy = agent.policy
    nets = {"DQN": lambda: policy.q_net.q_net[-1], "QRDQN": lambda: policy.quantile_net.quantile_net[-1]}
    last = nets.get(algorithm, lambda: policy.action_net)()
    seen: list[torch.Tensor] = []
    hook = last.register_forward_hook(lambda *call: seen.append(call[2]))
    agent.predict(observations(agent.observation_space), deterministic=True)
    hook.remove()
    with torch.no_grad():
        last.bias -= seen[0].mean(dim=0)


def observations(space: Any, n: int = 64, seed: int = 3) -> Any:
    """Random observations of a space, images, bits, integers and dictionaries included."""
    from gymnasium import spaces

    rng = np.random.default_rng(seed)
    if isinstance(space, spaces.Dict):
        return {key: observations(part, n, seed + i) for i, (key, part) in enumerate(space.spaces.items())}
    if isinstance(space, spaces.Discrete | spaces.MultiDiscrete):
        return rng.integers(0, space.n if isinstance(space, spaces.Discrete) else space.nvec, (n, *space.shape))
    if space.dtype == np.uint8:
        bright = rng.integers(0, 256, (n, space.shape[0], 1, 1)) * rng.integers(0, 2, (n, 1, *space.shape[1:]))
        return np.minimum(bright + rng.integers(0, 40, (n, *space.shape)), 255).astype(np.uint8)
    if space.dtype == np.int8:
        return rng.integers(0, 2, (n, *space.shape)).astype(np.int8)
    return rng.normal(0.3, 1.7, (n, *space.shape)).astype(np.float32)


# --- zips written by hand -----------------------------------------------------------------------


def box_fields(low: Any, high: Any, dtype: str = "float32") -> dict[str, Any]:
    """A Box as SB3 prints it."""
    low, high = np.asarray(low, dtype), np.asarray(high, dtype)
    return {
        ":type:": "<class 'gymnasium.spaces.box.Box'>",
        ":serialized:": "gAWVAA==",
        "dtype": dtype,
        "_shape": list(low.shape),
        "low": str(low),
        "high": str(high),
    }


def discrete_fields(n: int) -> dict[str, Any]:
    """A Discrete as SB3 prints it."""
    return {":type:": "<class 'gymnasium.spaces.discrete.Discrete'>", "n": str(n), "_shape": [], "dtype": "int64"}


def ppo_data(**changes: Any) -> dict[str, Any]:
    """The JSON fields of a PPO agent with 3 inputs, 4 and 5 hidden units and 2 actions."""
    data = {
        "policy_class": {
            ":type:": "<class 'abc.ABCMeta'>",
            "__module__": "stable_baselines3.common.policies",
            "__init__": "<function ActorCriticPolicy.__init__ at 0x7f0000000000>",
        },
        "policy_kwargs": {"net_arch": {"pi": [4, 5], "vf": [4]}},
        "observation_space": box_fields([-1.0, -2.0, -np.inf], [1.0, 2.0, np.inf]),
        "action_space": discrete_fields(2),
        "clip_range": {":type:": "<class 'function'>", ":serialized:": "gAWVAA=="},
        "use_sde": False,
    }
    return data | changes


def ppo_tensors(**changes: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """The actor's tensors of the same agent; a change of None removes a tensor ('.' is written '__')."""
    generator = torch.Generator().manual_seed(1)
    shapes = {
        "mlp_extractor.policy_net.0": (4, 3),
        "mlp_extractor.policy_net.2": (5, 4),
        "action_net": (2, 5),
    }
    tensors: dict[str, Any] = {}
    for name, shape in shapes.items():
        tensors[f"{name}.weight"] = torch.randn(shape, generator=generator)
        tensors[f"{name}.bias"] = torch.randn(shape[0], generator=generator)
    for name, value in changes.items():
        tensors[name.replace("__", ".")] = value
    return {name: value for name, value in tensors.items() if value is not None}


def torch_bytes(value: Any) -> bytes:
    """`torch.save` to bytes."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def members(data: Any = None, tensors: Any = None) -> dict[str, bytes]:
    """The members of a hand-made agent."""
    return {
        "data": json.dumps(ppo_data() if data is None else data).encode(),
        "policy.pth": torch_bytes(ppo_tensors() if tensors is None else tensors),
        "_stable_baselines3_version": b"2.9.2",
    }


def write_zip(path: Path, content: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    """A zip of these members at `path`, folders made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, blob in content.items():
            archive.writestr(name, blob)
    return path


def read_zip(path: Path) -> dict[str, bytes]:
    """The members of a zip."""
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}

"""CleanRL's files: the actor acts as CleanRL's own modules do, rebuilt here; what the file does not tell is said."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from test_cli import call, document, error
from torch import Tensor, nn

from quantkit.errors import InputError
from quantkit.loaders.cleanrl import CLIP, estimate_statistics
from quantkit.loading import load_checkpoint
from quantkit.model import EnvSpec
from quantkit.policy import Head, InputStage, Policy


def mlp(*widths: int, act: type[nn.Module]) -> nn.Sequential:
    """Linear layers with `act` between them, numbered as CleanRL's are."""
    modules: list[nn.Module] = []
    for a, b in pairwise(widths):
        modules += [nn.Linear(a, b), act()]
    return nn.Sequential(*modules[:-1])


class Squashed(nn.Module):
    """The actor of ddpg, td3 (mu) and sac (mean, logstd) scripts."""

    def __init__(self, inputs: int, low: np.ndarray, high: np.ndarray, sac: bool) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(inputs, 32), nn.Linear(32, 32)
        setattr(self, "fc_mean" if sac else "fc_mu", nn.Linear(32, len(low)))
        if sac:
            self.fc_logstd = nn.Linear(32, len(low))
        self.register_buffer("action_scale", torch.tensor((high - low) / 2, dtype=torch.float32))
        self.register_buffer("action_bias", torch.tensor((high + low) / 2, dtype=torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        """The deterministic action."""
        x = torch.relu(self.fc2(torch.relu(self.fc1(x))))
        last: Any = self.fc_mean if hasattr(self, "fc_mean") else self.fc_mu
        scale: Any = self.action_scale
        bias: Any = self.action_bias
        found: Tensor = torch.tanh(last(x)) * scale + bias
        return found


class Gaussian(nn.Module):
    """The agent of ppo_continuous_action."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.critic = mlp(inputs, 16, 1, act=nn.Tanh)
        self.actor_mean = mlp(inputs, 16, 16, outputs, act=nn.Tanh)
        self.actor_logstd = nn.Parameter(torch.full((1, outputs), -1.0))


class Discrete(nn.Module):
    """The agent of ppo (actor, critic) or dqn (network)."""

    def __init__(self, inputs: int, actions: int, ppo: bool) -> None:
        super().__init__()
        if ppo:
            self.critic = mlp(inputs, 16, 1, act=nn.Tanh)
            self.actor = mlp(inputs, 16, 16, actions, act=nn.Tanh)
        else:
            self.network = mlp(inputs, 24, 12, actions, act=nn.ReLU)


class Atari(nn.Module):
    """The agent of ppo_atari, or the network of dqn_atari."""

    def __init__(self, actions: int, ppo: bool) -> None:
        super().__init__()
        trunk = [nn.Conv2d(4, 32, 8, 4), nn.ReLU(), nn.Conv2d(32, 64, 4, 2), nn.ReLU(), nn.Conv2d(64, 64, 3), nn.ReLU()]
        trunk += [nn.Flatten(), nn.Linear(3136, 512), nn.ReLU()]
        self.network = nn.Sequential(*trunk, *([] if ppo else [nn.Linear(512, actions)]))
        if ppo:
            self.actor, self.critic = nn.Linear(512, actions), nn.Linear(512, 1)


def saved(folder: Path, run: str, state: Any, name: str = "agent") -> Path:
    """The file a script leaves in runs/RUN."""
    place = folder / "runs" / run
    place.mkdir(parents=True)
    torch.save(state, place / f"{name}.cleanrl_model")
    return place / f"{name}.cleanrl_model"


@pytest.fixture(autouse=True)
def seeded() -> None:
    """The modules' weights are the same each time."""
    torch.manual_seed(0)


@pytest.mark.parametrize(("critics", "sac", "algo"), [(1, False, "ddpg"), (2, False, "td3"), (2, True, "sac")])
def test_squashed_actors_act_alike(critics: int, sac: bool, algo: str, tmp_path: Path) -> None:
    """Actions are those of the script's own forward pass; bounds are the file's; the folder names the environment."""
    low, high = np.array([-2.0, 0.0]), np.array([2.0, 5.0])
    actor = Squashed(6, low, high, sac)
    file = saved(tmp_path, "Hopper-v4__td3__1__170", (actor.state_dict(), *[{"fc1.weight": torch.zeros(1)}] * critics))
    model = load_checkpoint(file)
    assert (model.meta["algo"], model.env.id if model.env else None) == (algo, "Hopper-v4")
    x = torch.randn(50, 6) * 3
    assert isinstance(model.module, Policy)
    np.testing.assert_allclose(model.module.predict(x.numpy())[0], actor(x).detach(), atol=2e-6)


@pytest.mark.parametrize("ppo", [True, False])
def test_discrete_agents_act_alike(ppo: bool, tmp_path: Path) -> None:
    """Logits or Q-values are those of the script's network, from the file or its folder."""
    agent = Discrete(4, 2, ppo)
    file = saved(tmp_path, "CartPole-v1-dqn-seed1", agent.state_dict())
    model = load_checkpoint(file.parent)
    x = torch.randn(20, 4)
    expected = agent.actor(x) if ppo else agent.network(x)
    torch.testing.assert_close(model.module(x), expected)
    assert (model.meta["algo"], model.env.id if model.env else None) == ("ppo" if ppo else "dqn", "CartPole-v1")


@pytest.mark.parametrize("ppo", [True, False])
def test_image_agents_act_alike(ppo: bool, tmp_path: Path) -> None:
    """Images are divided by 255; the convolutions, the Linear and the head are the script's. Atari needs a package."""
    agent = Atari(6, ppo)
    file = saved(tmp_path, "BreakoutNoFrameskip-v4__ppo_atari__1__170", agent.state_dict())
    model = load_checkpoint(file)
    x = torch.randint(0, 256, (3, 4, 84, 84), dtype=torch.uint8)
    out = agent.network(x / 255.0)
    torch.testing.assert_close(model.module(x), agent.actor(out) if ppo else out, atol=1e-5, rtol=1e-4)
    assert model.env is None and "ale-py" in model.meta["env_problem"]


def test_missing_statistics_are_estimated_and_said(tmp_path: Path) -> None:
    """`stage` and `fold` act alike, `none` as the bare network; all clip to the environment's bounds."""
    agent = Gaussian(3, 1)
    file = saved(tmp_path, "Pendulum-v1__ppo_continuous_action__1__170", agent.state_dict())
    stage, fold, none = (load_checkpoint(file, normalize=how) for how in ("stage", "fold", "none"))  # type: ignore[arg-type]
    assert "estimated from 20,000 steps in Pendulum-v1" in stage.meta["normalizer"]["estimated"]
    assert "estimated from 20,000" in document("inspect", file)["estimated"]
    assert none.meta["normalizer"] == {"mode": "none"}
    x = torch.randn(40, 3)
    torch.testing.assert_close(stage.module(x), fold.module(x), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(none.module(x), agent.actor_mean(x))
    assert isinstance(none.module, Policy) and (none.module.head.low, none.module.head.high) == ((-2.0,), (2.0,))


def test_statistics_are_those_of_gymnasiums_wrapper() -> None:
    """The running mean and variance over the same steps are those of NormalizeObservation, up to its first count."""
    torch.manual_seed(1)
    policy = Policy(InputStage(), nn.Sequential(nn.Linear(3, 1)), Head("box", low=(-2.0,), high=(2.0,)), (3,)).eval()
    mean, std = estimate_statistics(policy, EnvSpec("Pendulum-v1"), np.array([0.5], np.float32), steps=600)
    env = gymnasium.wrappers.NormalizeObservation(gymnasium.make("Pendulum-v1"))
    rng = np.random.default_rng(0)
    obs, _ = env.reset(seed=0)
    for _ in range(599):
        seen = torch.from_numpy(np.clip(obs, -CLIP, CLIP).astype(np.float32))
        out = policy.net(seen).detach().numpy() + (np.float32(0.5) * rng.standard_normal(1)).astype(np.float32)
        obs, _, terminated, truncated, _ = env.step(np.clip(out, -2, 2))
        if terminated or truncated:
            obs, _ = env.reset()
    np.testing.assert_allclose(mean, env.obs_rms.mean, atol=0.02)
    np.testing.assert_allclose(std, np.sqrt(env.obs_rms.var), rtol=0.02)


def test_it_goes_all_the_way(tmp_path: Path) -> None:
    """Quantized, evaluated, exported and verified like any agent."""
    file = saved(tmp_path, "CartPole-v1__dqn__1__170", Discrete(4, 2, False).state_dict())
    assert document("inspect", file)["algo"] == "dqn"
    made = tmp_path / "agent.q"
    assert call("quantize", file, "-o", made, "--weights", "int4", "--acts", "int8").exit_code == 0
    assert document("evaluate", made, "-n", "3")["metric"] == "return"
    assert call("export", made, "-o", tmp_path / "agent.onnx").exit_code == 0
    assert call("verify", made, tmp_path / "agent.onnx", "-n", "2").exit_code == 0


@pytest.mark.parametrize(
    ("state", "named"),
    [
        ({"model_weights": {"a": torch.zeros(1)}, "args": {}}, "C51"),
        ({"encoder.weight": torch.zeros(2, 2)}, "encoder.weight"),
        ([1, 2], "holds a list"),
        ({"network.0.weight": torch.zeros(3, 4)}, "network.0.bias"),
        ({"fc_mu.weight": torch.zeros(1, 2), "fc_mu.bias": torch.zeros(1)}, "fc1.weight"),
        ({"actor_mean.0.weight": torch.zeros(1, 2), "actor_mean.0.bias": torch.zeros(1)}, "environment"),
        ({"network.0.weight": torch.full((2, 4), torch.nan), "network.0.bias": torch.zeros(2)}, "finite"),
    ],
)
def test_what_cannot_be_read_is_named(state: Any, named: str, tmp_path: Path) -> None:
    """One line names the file and the tensor or the reason."""
    file = tmp_path / "x.cleanrl_model"
    torch.save(state, file)
    message = error("inspect", file)
    assert named in message and str(file) in message


def test_flax_files_are_refused(tmp_path: Path) -> None:
    """A file of a *_jax script is no torch file, and said to be none."""
    file = tmp_path / "dqn_jax.cleanrl_model"
    file.write_bytes(b"\x81\xa6params\x80")
    with pytest.raises(InputError, match="jax"):
        load_checkpoint(file)

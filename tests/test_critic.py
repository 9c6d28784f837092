"""Q-functions of a checkpoint, what they say that an error costs, and distillation that listens to them."""

from __future__ import annotations

from pathlib import Path

import pytest
import small_policies
import tiny_agents as tiny
import torch
from torch import Tensor, nn

from quantkit.critic import drops
from quantkit.loaders.sb3_actor import build_critics
from quantkit.loading import load_checkpoint
from quantkit.methods import distill
from quantkit.policy import Head
from quantkit.recipe import quantize, uniform

OFF_POLICY = [name for name, (algo, *_) in tiny.AGENTS.items() if algo in ("SAC", "TD3", "DDPG", "TQC")]


class Quadratic(nn.Module):
    """-sum_i k_i (a_i - m)^2, whatever the observation."""

    def __init__(self, k: list[float], m: float = 0.0) -> None:
        super().__init__()
        self.k, self.m = torch.tensor(k), m

    def forward(self, obs: Tensor, action: Tensor) -> Tensor:
        return -(self.k * (action - self.m).square()).sum(dim=1)


@pytest.mark.parametrize("name", OFF_POLICY)
def test_values_are_those_of_sb3(name: str, tmp_path: Path) -> None:
    """The mean of SB3's own Q-functions, quantiles included; beside a NatureCNN none are read."""
    pytest.importorskip("stable_baselines3")
    pytest.importorskip("sb3_contrib")
    agent = tiny.make_agent(*tiny.AGENTS[name])
    agent.save(tmp_path / "agent.zip")
    model = load_checkpoint(tmp_path / "agent.zip")
    if tiny.AGENTS[name][1] == "CnnPolicy":
        assert model.critic is None
        return
    obs = torch.as_tensor(tiny.observations(agent.observation_space)).float()
    action = torch.rand(len(obs), agent.action_space.shape[0], generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        values = agent.critic(obs, action)
        values = torch.cat(values, dim=1) if isinstance(values, tuple) else values.flatten(1)
        assert model.critic is not None
        assert torch.allclose(model.critic(obs, action), values.mean(dim=1), rtol=1e-4, atol=1e-5)
    assert model.copy().critic is model.critic


def test_others_have_none() -> None:
    """Q-functions that do not fit are left out, and the agent is one without."""
    assert small_policies.cartpole().critic is None
    tensors = {"critic.qf0.0.weight": torch.ones(1, 4), "critic.qf0.0.bias": torch.zeros(1)}
    assert len(build_critics(tensors, "relu", 4, "")) == 1
    assert build_critics(tensors, "relu", 5, "") == build_critics({}, "relu", 4, "") == []
    assert build_critics(tensors | {"critic.qf0.0.bias": torch.full((1,), torch.nan)}, "relu", 4, "") == []


def test_drops() -> None:
    """Of a quadratic: k step^2 at its top, and half of it on the edge, where one side cannot be left."""
    obs, top = torch.zeros(2, 3), torch.tensor([[0.0, 0.5], [0.2, 0.0]])
    assert torch.allclose(drops(Quadratic([1.0, 4.0]), obs, 0 * top, 0.5), torch.tensor([[0.25, 1.0]] * 2))
    edge = drops(Quadratic([1.0, 4.0], 1.0), obs, torch.ones(2, 2), 0.5)
    assert torch.allclose(edge, torch.tensor([[0.125, 0.5]] * 2))


@pytest.mark.parametrize("where", [0, 1])
def test_bits_go_where_they_matter(where: int) -> None:
    """The part of the action that the Q-function is sensitive to comes out closer, next to the other, than without."""
    model = small_policies.mlp((5, 24, 24, 2), head=Head("box", low=(-1.0, -1.0), high=(1.0, 1.0), squash=True))
    calib, ratios = small_policies.calib(model, 512), []
    k = [0.0, 0.0]
    k[where] = 1.0
    with torch.no_grad():
        target = torch.tanh(model.module(calib.inputs))
    for critic in (None, Quadratic(k)):
        model.critic = critic
        steps = (("act_scales", {}), ("rtn", {}), ("distill", {"steps": 300, "rounds": 1, "lr": 0.02}))
        done = quantize(model, uniform("int2", "int3", steps=steps), calib)
        with torch.no_grad():
            error = (torch.tanh(done.module(calib.inputs)) - target).abs().mean(dim=0)
            ratios.append(float(error[where] / error[1 - where]))
    assert ratios[1] < 0.9 * ratios[0]


def test_a_useless_critic_changes_nothing() -> None:
    """One that is the same everywhere leaves the usual loss."""
    model = small_policies.mlp((5, 8, 2), head=Head("box", low=(-1.0, -1.0), high=(1.0, 1.0), squash=True))
    calib = small_policies.calib(model, 64)
    plain = distill._aim(model, calib.inputs)
    model.critic = Quadratic([0.0, 0.0])
    assert distill._aim(model, calib.inputs)[0] is plain[0] is model.module

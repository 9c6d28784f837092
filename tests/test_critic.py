"""Q-functions of a checkpoint, what they say that an error costs, and distillation that listens to them."""

from __future__ import annotations

from pathlib import Path

import pytest
import small_policies
import tiny_agents as tiny
import torch
from torch import Tensor, nn

from quantkit.aim import aim
from quantkit.critic import drops
from quantkit.loaders.sb3_actor import build_critics
from quantkit.loading import load_checkpoint
from quantkit.losses import loss_for
from quantkit.model import Model
from quantkit.policy import Head, to_vectors
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
    seen = tiny.observations(agent.observation_space)
    vector = to_vectors(model.module.fields, seen) if isinstance(seen, dict) else seen
    obs = torch.as_tensor(vector).float()
    theirs = {key: torch.as_tensor(part).float() for key, part in seen.items()} if isinstance(seen, dict) else obs
    action = torch.rand(len(obs), agent.action_space.shape[0], generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        values = agent.critic(theirs, action)
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


def test_errors_count_by_what_they_cost() -> None:
    """Three tenths of the error count everywhere; what the critic says is lost counts in units of the mean drop, here
    3 * 0.3^2 / 2, and as much as an error of 0.3 for each; what it gains does not count."""
    model = squashed()
    inputs = 0.5 * small_policies.calib(model, 256).inputs
    with torch.no_grad():
        label, loss, _ = aim(model, inputs, Quadratic([0.0, 3.0]))
        y = model.module(inputs)
        assert torch.tanh(y).abs().max() < 0.7, "no action may be moved over the edge, else the sums differ"
        a, t, plain = torch.tanh(y), label(inputs), loss_for(model.module.head, y)
        assert torch.allclose(t, torch.cat([y, -3 * a[:, 1:].square()], dim=1), atol=1e-5)
        unit = 2 * 0.05**2 * (37**0.5 - 1)
        for i in (0, 1):
            off = y.clone()
            off[:, i] += 0.3
            lost = 3 * (torch.tanh(off[:, 1]).square() - a[:, 1].square()).clamp_min(0)
            expected = 0.3 * plain(off, y) + unit * lost / (3 * 0.09 / 2)
            assert torch.allclose(loss(inputs, off, t), expected, rtol=1e-3)
            assert (lost > 0).any() == bool(i)


def test_a_useless_critic_changes_nothing() -> None:
    """One that is the same everywhere, or none, leaves the usual loss on the float outputs."""
    model = squashed()
    inputs = small_policies.calib(model, 64).inputs
    for critic in (Quadratic([0.0, 0.0]), None):
        assert aim(model, inputs, critic)[0] is model.module


def test_only_a_policy_that_acts_listens() -> None:
    """Without visits the same model comes out with a critic as without."""
    codes = []
    for critic in (None, Quadratic([0.0, 1.0])):
        model = squashed()
        model.critic = critic
        steps = (("act_scales", {}), ("rtn", {}), ("distill", {"steps": 20, "rounds": 1}))
        done = quantize(model, uniform("int3", "int4", steps=steps), small_policies.calib(model, 64))
        codes.append([layer.q.codes for layer in done.qlayers().values()])
    assert all(torch.equal(a, b) for a, b in zip(*codes, strict=True))


def squashed() -> Model:
    """A policy of two actions behind tanh."""
    head = Head("box", low=(-1.0, -1.0), high=(1.0, 1.0), squash=True)
    return small_policies.mlp((5, 24, 24, 2), head=head)

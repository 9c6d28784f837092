"""What an action is worth to the agent that a policy comes from: its Q-functions, and what an error in an action costs.

How much a policy that acts differently earns less is the mean, over the states that it visits itself, of how much less
its actions are worth to the old policy (Kakade, Langford, "Approximately Optimal Approximate Reinforcement Learning",
ICML 2002, Lemma 6.1). No reward is asked for: the Q-functions are in the checkpoint.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Critic(nn.Module):
    """Observations (n, *obs_shape) and actions (n, k) in [-1, 1] -> values (n,), the mean of all Q-functions."""

    def __init__(self, stage: nn.Module, nets: list[nn.Module]) -> None:
        """stage: of raw observations. nets: (n, observation + action) -> (n, values)."""
        super().__init__()
        self.stage = stage
        self.nets = nn.ModuleList(nets)

    def forward(self, obs: Tensor, action: Tensor) -> Tensor:
        x = torch.cat([self.stage(obs).flatten(1), action], dim=1)
        return torch.cat([net(x) for net in self.nets], dim=1).mean(dim=1)


def drops(critic: nn.Module, obs: Tensor, action: Tensor, step: float = 0.3) -> Tensor:
    """How much less an action is worth with one of its parts moved by `step`, the mean of both sides: (n, k).

    A part is moved no further than -1 and 1. Below zero where the critic would move it.
    """
    here, columns = critic(obs, action), []
    for i in range(action.shape[1]):
        sides = []
        for move in (step, -step):
            moved = action.clone()
            moved[:, i] = (moved[:, i] + move).clamp(-1, 1)
            sides.append(here - critic(obs, moved))
        columns.append((sides[0] + sides[1]) / 2)
    return torch.stack(columns, dim=1)

"""Which of several policies earns most, told from episodes that none of them was trained in."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from quantkit.model import Model, Visits
from quantkit.statistics import spread, t_quantile

HEATS = ((1,), (2,), (3, 4, 5, 6))
"""`visit`'s seeds of the episodes that they are compared in; training takes the later ones."""


class Contest:
    """Which of several models earns most, in episodes that none was trained in."""

    def __init__(self, visit: Callable[..., Visits], teacher: Model) -> None:
        self.visit = visit
        self.goals = [self.returns(teacher, heat) for heat in HEATS]
        self.gains = torch.zeros(0)
        """How much more than the float policy the best so far earned, (episodes,); empty before there is one."""

    def returns(self, model: Model, heat: tuple[int, ...]) -> Tensor:
        """What it earns in the episodes of these seeds, (episodes,)."""
        return torch.cat([self.visit(model, 1, seed).returns for seed in heat])

    def won(self, model: Model) -> bool:
        """Whether the model takes the place of the best so far: its `sure` gain must be greater in the end, and after
        each heat the mean of its gains greater than that."""
        gains, best = torch.zeros(0), sure(self.gains) if len(self.gains) else -math.inf
        for goal, heat in zip(self.goals, HEATS, strict=True):
            gains = torch.cat([gains, self.returns(model, heat) - goal])
            if not float(gains.mean()) > best:
                return False
        if not sure(gains) > best:
            return False
        self.gains = gains
        return True


def sure(gains: Tensor) -> float:
    """What their mean is at least, with 95 % confidence: the lower bound of `quantkit.statistics.non_inferior`.

    >>> sure(torch.tensor([2.0, 2.0, 2.0]))
    2.0
    """
    return float(gains.mean()) - t_quantile(0.95, len(gains) - 1) * spread(gains.numpy())[1]

"""The contest of policies against its docstring."""

from __future__ import annotations

import pytest
import torch

from quantkit.contest import Contest, sure
from quantkit.model import Visits
from quantkit.statistics import non_inferior


def test_a_contest_is_won_by_what_is_sure():
    """The model kept has the greatest lower bound of what it earns more than the float policy; one whose mean is behind
    that after a heat does not play the next, and one that is level changes nothing."""
    earn = {
        "teacher": lambda seed: torch.full((8,), 10.0 * seed),
        "even": lambda seed: torch.full((8,), 10.0 * seed - 1),
        "tied": lambda seed: torch.full((8,), 10.0 * seed - 1),
        "often": lambda seed: 10.0 * seed + torch.tensor([3.0, 3, 3, 3, 3, 3, 3, -20]),
        "early": lambda seed: torch.full((8,), 10.0 * seed - 100 * (seed > 2)),
        "last": lambda seed: torch.full((8,), -500.0),
    }
    asked = []

    def visit(name, n, seed):
        assert n == 1
        asked.append((name, seed))
        return Visits(torch.zeros(1), earn[name](seed), torch.ones(8).long())

    contest = Contest(visit, "teacher")
    won = [contest.won(name) for name in ("last", "often", "early", "even", "tied")]
    assert won == [True, True, False, True, False] and contest.gains.tolist() == [-1.0] * 48
    heats = {name: {seed for other, seed in asked if other == name} for name in earn}
    assert heats["often"] == heats["teacher"] == set(range(1, 7)) and heats["early"] == {1, 2, 3, 4, 5, 6}
    assert heats["tied"] == {1}
    sample = torch.randn(50, generator=torch.Generator().manual_seed(0)).double()
    assert sure(sample) == pytest.approx(non_inferior(sample.numpy() * 0, sample.numpy(), 1).low, rel=1e-12)

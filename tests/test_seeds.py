"""Laws of the seeds: no episode serves two ends."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from gymnasium.envs.classic_control import CartPoleEnv
from torch import nn

from quantkit import seeds
from quantkit.errors import InputError
from quantkit.model import EnvSpec, Model
from quantkit.policy import Head, InputStage, Policy
from quantkit.product import confirm_policy
from quantkit.study import Settings, calibration_states, fresh_states, prepare, visited_states


def cartpole() -> Model:
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(4, 2)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(2, 4, generator=generator))
        layer.bias.zero_()
    policy = Policy(InputStage(), nn.Sequential(layer), Head("discrete", nvec=(2,)), (4,))
    return Model(policy, torch.zeros(1, 4), EnvSpec("CartPole-v1"), {})


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """The seeds of all episodes that are begun."""
    found: set[int] = set()
    reset = CartPoleEnv.reset

    def noted(self: CartPoleEnv, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        if seed is not None:
            found.add(seed)
        return reset(self, seed=seed, options=options)

    monkeypatch.setattr(CartPoleEnv, "reset", noted)
    return found


def test_no_episode_serves_two_ends(played: set[int]) -> None:
    """Scores, calibration, each visit of a training policy, measured states and confirmation play episodes of their
    own, each in its range."""
    model = cartpole()
    prepare(model, Settings(episodes=3), None)
    both, evaluations = set(played), {1000, 1001, 1002}
    ends: dict[str, set[int]] = {"evaluation": evaluations, "calibration": both - evaluations}
    assert evaluations <= both and ends["calibration"] <= set(seeds.CALIBRATION)
    uses: dict[str, tuple[range, Callable[[], Any]]] = {
        f"visit {k}": (seeds.visit(k), lambda k=k: visited_states(model, 300, k)) for k in (1, 2, 3, 4, 12)
    }
    uses["fresh"] = (seeds.FRESH, lambda: fresh_states(model, 300))
    uses["confirm"] = (seeds.CONFIRM, lambda: confirm_policy(model, model, 1.0, 4, seeds.CONFIRM.start, None))
    for name, (allowed, use) in uses.items():
        played.clear()
        use()
        assert played and min(played) == allowed.start and max(played) in allowed, name
        ends[name] = set(played)
    for one, other in itertools.combinations(ends, 2):
        assert not ends[one] & ends[other], (one, other)
    played.clear()
    calibration_states(model, 300)
    assert played <= ends["calibration"]


def test_the_ranges_do_not_meet() -> None:
    """Neither those of fixed uses nor those of visits, and each begins at its first seed."""
    ranges = [seeds.CALIBRATION, seeds.CONFIRM, seeds.FRESH, *(seeds.visit(k) for k in range(1, 40))]
    ordered = sorted(ranges, key=lambda found: found.start)
    assert all(a.stop <= b.start for a, b in itertools.pairwise(ordered))
    assert all(len(found) >= 100_000 for found in ranges)


@pytest.mark.parametrize(
    ("seed", "episodes", "use"),
    [
        (9_990, 11, "calibration"),
        (10_000, 1, "calibration"),
        (499_990, 20, "confirmation"),
        (900_500, 5, "measurement"),
        (1_010_000, 5, "training"),
        (77_000_000, 5, "training"),
        (0, 2_000_000, "calibration"),
    ],
)
def test_a_study_takes_no_seeds_of_others(seed: int, episodes: int, use: str) -> None:
    """Its episodes are refused before any is played, with the use they would meet and what is free."""
    with pytest.raises(InputError, match=rf"--seed {seed} .* seeds of {use} .*0\.\.9999 and 200000\.\.499999"):
        prepare(cartpole(), Settings(episodes=episodes, seed=seed))


@pytest.mark.parametrize(("seed", "episodes"), [(0, 10_000), (1000, 20), (7000, 20), (200_000, 300_000)])
def test_free_seeds_are_taken(seed: int, episodes: int) -> None:
    """All of what the message calls free may be used."""
    seeds.check_evaluation(seed, episodes)

"""The training of a policy that acts: laps of rounds, a contest of what came out of them, and a climb of the return.

Rounds alternate (Ross, Gordon, Bagnell, "A Reduction of Imitation Learning and Structured Prediction to No-Regret
Online Learning", AISTATS 2011, arXiv 1011.0686): the policy quantized so far acts, each time in new episodes, the
states that it visits join the ones seen before, the float policy labels them, and training goes on. (Differs from the
paper: no mixing with the float policy's actions while collecting.)

The return decides which model is kept (`Contest`), and whether more rounds follow, and moves what is not a weight on
from there (`uphill`): a small error at the wrong place ends an episode and a large one may not matter, so that of a
hopper's rounds, all of nearly the same loss, one earned an eighth of the float policy's return and one all but a
fortieth.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from quantkit.aim import Label
from quantkit.contest import HEATS, Contest, sure
from quantkit.course import Course, Pool
from quantkit.model import Model, Visits

FINALISTS = 6
"""How many models of the smallest loss, and how many of the greatest return where they were trained, are compared."""
CLIMB = 1000
"""`visit`'s first seed of the episodes that are climbed in."""
DIRECTIONS, WIDTH, PLAYED = 32, 0.02, 2
"""How many directions a step of climbing tries, how far, and in how many episodes on each side."""
LENGTHS = (0.04, 0.02, 0.01)
"""How far it goes up the slope."""

Tour = Callable[[Model, int], tuple[Pool, float]]
"""(model, number) -> the states that it visits, labelled, and what an episode earns; each number has its episodes."""


def tour_of(visit: Callable[..., Visits], states: int, label: Label) -> Tour:
    """Tours of so many states, in episodes that are not those of a contest."""

    def tour(model: Model, number: int) -> tuple[Pool, float]:
        seen = visit(model, states, HEATS[-1][-1] + 1 + number)
        return Pool.of(seen.states, label), float(seen.returns.mean())

    return tour


def best_acting(
    course: Course,
    lap: Callable[[], Iterator[Model]],
    tour: Tour,
    contest: Contest,
    earned: float,
    laps: int,
    budget: int,
) -> tuple[Model, dict[str, float]]:
    """The model that earns most of the course's laps and the climb behind them, and `distill`'s report of it.

    lap: the models of its rounds, from where the course is. earned: what the start did on its tour, whose states the
    course has. laps: how many at the most, each from the smallest loss, while the best surely earns less than the
    float policy and the last lap took a twentieth off that loss. budget: of `uphill`.
    """
    models, latent, returns = [course.start], [course.latent()], [earned]
    losses: list[float] = []
    kept = 0
    for _ in range(max(1, laps)):
        first = len(losses)
        if first:
            course.load(latent[losses.index(min(losses))])
        for model in lap():
            states, gained = tour(model, len(models))
            models.append(model)
            latent.append(course.latent())
            returns.append(gained)
            course.pool = course.pool.plus(states)
        losses = [course.error(m) for m in models]
        kept = kept if first else losses.index(min(losses))
        kept = _choose(contest, models, losses, returns, first, kept)
        if sure(contest.gains) >= 0 or (first and min(losses[first:]) > 0.95 * min(losses[:first])):
            break
    course.load(latent[kept])
    best = uphill(course, contest, models[kept], course.generator, budget)
    report = {"gain": float(contest.gains.mean()), "loss_before": losses[0], "loss_after": course.error(best)}
    return best, report | {"round": float(kept)}


def _choose(
    contest: Contest, candidates: list[Model], losses: list[float], earned: list[float], first: int, kept: int
) -> int:
    """The number of the candidate that the contest is won by, of those from `first` on and `kept`, the best so far."""
    order = sorted(range(first, len(candidates)), key=lambda i: losses[i])
    rich = sorted(order, key=lambda i: -earned[i])
    for i in [i for i in rich if i in order[:FINALISTS] or i in rich[:FINALISTS]]:
        kept = i if contest.won(candidates[i]) else kept
    return kept


def uphill(course: Course, contest: Contest, best: Model, generator: torch.Generator, budget: int) -> Model:
    """The best of a contest after steps up the slope of the return, which start where `course` is.

    The slope is the mean of (R(p + w d) - R(p - w d)) d / std R over normal d, w = WIDTH, where R is the mean return of
    PLAYED episodes, new ones for each d, and p are scales, biases and the input stage, in the units that they are
    trained in: what earns much with small errors everywhere is sought. (Mania, Guy, Recht, "Simple Random Search
    Provides a Competitive Approach to Reinforcement Learning", 2018, arXiv 1803.07055, its version V1.) p moves by the
    first of LENGTHS times the slope that wins the contest. It stays where none does, and DIRECTIONS more make the slope
    better known: so steps are as small, and slopes as sure, as the return demands. (Differs from the paper, whose steps
    are all of one length and all taken.) It ends after `budget` steps of the environment beside those of the contest,
    where no direction changes anything, and once the best surely earns as much as the float policy.
    """
    place, played, seed = [p.detach().clone() for p in course.soft], 0, CLIMB
    found: list[tuple[float, float, list[Tensor]]] = []
    while played < budget and sure(contest.gains) < 0:
        for _ in range(DIRECTIONS):
            d = [torch.randn(p.shape, generator=generator) for p in place]
            up, down = (contest.visit(course.put(place, w, d), 1, seed, PLAYED) for w in (WIDTH, -WIDTH))
            played += int(up.lengths.sum() + down.lengths.sum())
            found.append((float(up.returns.mean()), float(down.returns.mean()), d))
            seed += 1
        spread = float(torch.tensor([r for *rs, _ in found for r in rs]).std(unbiased=False))
        if not spread > 0:
            break
        slope = [torch.zeros_like(p) for p in place]
        for high, low, d in found:
            slope = [s + (high - low) / (spread * len(found)) * v for s, v in zip(slope, d, strict=True)]
        for length in LENGTHS:
            model = course.put(place, length, slope)
            if contest.won(model):
                best, place, found = model, [p.detach().clone() for p in course.soft], []
                break
    return best

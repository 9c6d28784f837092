"""One plain training loop, for every method that trains, and the estimator that lets gradients through rounding."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hwmodel.formats import levels
from quantkit.qlayers import ActQuant, BlockAct
from quantkit.rounding import round_to

Schedule = Callable[[float], float]
"""Fraction of the run that is done, 0 to 1 -> factor of the learning rates."""
Progress = Callable[[int, int, float], None]
"""(steps done, of how many, loss of the last) -> None."""


class Straight(torch.autograd.Function):
    """`values` in the forward pass, bit for bit; the gradient goes to `x` where `open` holds (None: everywhere).

    `x + (values - x).detach()`, the usual way to write it, is off by rounding in an eighth of the entries.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, open: Tensor | None = None) -> Tensor:
        ctx.open = open
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return grad if ctx.open is None else grad * ctx.open, None, None


def rounded(act: ActQuant | BlockAct | None, axis: int, x: Tensor) -> Tensor:
    """What a QLayer or Point multiplies with, grid values of x, with the gradient of x / scale inside the range."""
    match act:
        case None:
            return x
        case BlockAct():
            values: Tensor = Straight.apply(x, act.values(x, axis))
        case ActQuant():
            u, grid = x / act.scale, levels(act.fmt)
            values = Straight.apply(u, round_to(u, act.fmt), (u >= grid[0]) & (u <= grid[-1]))
    return values


def cosine(warmup: float = 0.05) -> Schedule:
    """From zero to one along a line in the first `warmup` of the run, then to zero along a cosine.

    >>> [round(cosine(0.1)(t), 3) for t in (0.05, 0.1, 0.55, 1.0)]
    [0.5, 1.0, 0.5, 0.0]
    """

    def factor(done: float) -> float:
        if done < warmup:
            return done / warmup
        return 0.5 * (1 + math.cos(math.pi * (done - warmup) / (1 - warmup)))

    return factor


def train(
    loss: Callable[[Tensor], Tensor],
    optimizer: torch.optim.Optimizer,
    steps: range,
    *,
    total: int,
    samples: int,
    batch: int,
    generator: torch.Generator,
    schedule: Schedule | None = None,
    progress: Progress | None = None,
) -> list[float]:
    """Steps of the optimizer; the loss of each.

    loss: indices of samples (batch,) int64 -> a scalar; every pass over the `samples` is in a new random order of
    `generator`. steps: the numbers of these steps in a run of `total`, at which `schedule` multiplies the learning
    rates that the optimizer came with. A step whose loss or gradient is not finite is counted and not taken.
    """
    groups = optimizer.param_groups
    for group in groups:
        group.setdefault("initial_lr", group["lr"])
    losses: list[float] = []
    order = torch.empty(0, dtype=torch.int64)
    for step in steps:
        while len(order) < min(batch, samples):
            order = torch.cat([order, torch.randperm(samples, generator=generator)])
        chosen, order = order[:batch], order[batch:]
        factor = 1.0 if schedule is None else schedule((step + 0.5) / total)
        for group in groups:
            group["lr"] = group["initial_lr"] * factor
        optimizer.zero_grad(set_to_none=True)
        value = loss(chosen)
        value.backward()
        losses.append(float(value.detach()))
        gradients = [p.grad for group in groups for p in group["params"] if p.grad is not None]
        if math.isfinite(losses[-1]) and all(bool(g.isfinite().all()) for g in gradients):
            optimizer.step()
        if progress is not None:
            progress(len(losses), len(steps), losses[-1])
    return losses

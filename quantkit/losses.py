"""How far a quantized network's outputs are from the float ones, as an action sees it; differentiable.

Per state, with y the outputs and t the float ones:

    box        h((y - t) / (half the range of the action)), summed over actions, h the square near zero and linear
               far from it; of tanh of both if the head squashes. Where the float action is clipped only a y that is
               not clipped there counts.
    discrete   KL(softmax(t / T) || softmax(y / T)), summed over parts, T half the mean gap between the best two
               outputs, so that Q-values are treated like logits.
    binary     the same with logits (0, y), T half the mean magnitude.
    otherwise  (y - t)^2 over the variance of t, averaged over outputs.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from quantkit.policy import Head

Loss = Callable[[Tensor, Tensor], Tensor]
"""(outputs, float outputs), both (states, outputs) -> loss per state (states,)."""


def gap(y: Tensor, parts: tuple[int, ...]) -> float:
    """Mean distance between the largest two outputs of each part, at least 1e-6; 1 where no part has two.

    >>> gap(torch.tensor([[1.0, 3.0, 9.0, 7.0, 8.0]]), (2, 3))
    1.5
    """
    tops = [part.topk(2, dim=1).values for part in y.split(parts, dim=1) if part.shape[1] > 1]
    return max(1e-6, float(torch.stack([t[:, 0] - t[:, 1] for t in tops]).mean())) if tops else 1.0


def _huber(error: Tensor, width: float = 0.05) -> Tensor:
    """error^2 near zero, 2 width |error| far from it (pseudo-Huber)."""
    return ((1 + (error / width).square()).sqrt() - 1) * (2 * width**2)


def _kl(y: Tensor, target: Tensor) -> Tensor:
    log_p = F.log_softmax(target, dim=1)
    return (log_p.exp() * (log_p - F.log_softmax(y, dim=1))).sum(dim=1)


def loss_for(head: Head | None, target: Tensor) -> Loss:
    """The loss of the docstring for a head; `target` are float outputs on the calibration set.

    Of a recurrent policy's outputs (sequences, time, outputs) it is the mean over time, one loss per sequence.
    """
    if head is not None and target.dim() == 3:
        each = loss_for(head, target.flatten(0, 1))
        return lambda y, t: each(y.flatten(0, 1), t.flatten(0, 1)).reshape(y.shape[:2]).mean(dim=1)
    if head is None:
        spread = target.double().var(dim=0, unbiased=False)
        weight = (1 / (spread + 1e-3 * spread.mean()).clamp_min(1e-12)).float()
        return lambda y, t: ((y - t).square() * weight).mean(dim=1)
    match head.kind:
        case "multibinary":
            temperature = max(1e-6, float(target.abs().mean())) / 2
            return lambda y, t: (
                F.binary_cross_entropy_with_logits(
                    y / temperature, torch.sigmoid(t / temperature), reduction="none"
                ).sum(dim=1)
                - F.binary_cross_entropy_with_logits(
                    t / temperature, torch.sigmoid(t / temperature), reduction="none"
                ).sum(dim=1)
            )
        case "discrete" | "multidiscrete":
            parts = head.nvec
            scale = 2 / gap(target, parts)
            return lambda y, t: torch.stack(
                [_kl(a, b) for a, b in zip((y * scale).split(parts, 1), (t * scale).split(parts, 1), strict=True)]
            ).sum(dim=0)
        case "box":
            errors = errors_of(head)
            return lambda y, t: errors(y, t).sum(dim=1)


def errors_of(head: Head) -> Loss:
    """What the loss of a box head sums: (outputs, float outputs) -> loss per state and action (states, actions)."""
    if head.squash:
        return lambda y, t: _huber(torch.tanh(y) - torch.tanh(t))
    low, high = torch.tensor(head.low), torch.tensor(head.high)
    half = torch.where(torch.isfinite(high - low), (high - low) / 2, torch.ones_like(low))

    def clipped(y: Tensor, t: Tensor) -> Tensor:
        error = y - torch.minimum(torch.maximum(t, low), high)
        same = ((t >= high) & (y >= high)) | ((t <= low) & (y <= low))
        return _huber((error / half).masked_fill(same, 0.0))

    return clipped

"""Inputs with a random box of another's: what a network is trained on besides the few inputs that there are.

(Yun et al., "CutMix", ICCV 2019, arXiv 1905.04899, where labels are mixed, too; here a network labels what comes out.)
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantkit.aim import Label


@torch.no_grad()
def half_mixed(x: Tensor, target: Tensor, label: Label, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A batch (n, ...) and its labels where the first n // 2 inputs are `mixtures` with the others, labelled anew."""
    n = len(x) // 2
    if n == 0:
        return x, target
    new = mixtures(x[:n], x[-n:], generator)
    return torch.cat([new, x[n:]]), torch.cat([label(new), target[n:]])


def mixtures(x: Tensor, other: Tensor, generator: torch.Generator) -> Tensor:
    """x (n, channels, ...) with a box of `other` at the same place, its share of the volume and its corner uniform.

    The box has all channels; inputs (n, features) have none, and a run of their features is the box.
    """
    axes = range(2 if x.dim() > 2 else 1, x.dim())
    share = torch.rand(len(x), generator=generator) ** (1 / max(1, len(axes)))
    inside = torch.ones([1] * x.dim(), dtype=torch.bool)
    for axis in axes:
        size = x.shape[axis]
        length = (share * size).round()
        begin = (torch.rand(len(x), generator=generator) * (size - length + 1)).floor()
        at = torch.arange(size)
        run = (at >= begin[:, None]) & (at < (begin + length)[:, None])
        inside = inside & run.reshape([len(x) if a == 0 else size if a == axis else 1 for a in range(x.dim())])
    return torch.where(inside, other, x)

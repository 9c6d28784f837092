"""Continuing a prompt with a causal language model, greedily or by sampling, through any cache."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn

from quantkit.errors import InputError


def generate(
    model: nn.Module,
    prompts: Tensor,
    tokens: int,
    *,
    cache: Callable[[], Any] | None = None,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
    stop: Collection[int] = (),
) -> Tensor:
    """Prompts (batch, length) of token ids with `tokens` more: (batch, length + tokens), on the model's device.

    temperature 0 takes the likeliest token (the first of several), above 0 samples from softmax(logits /
    temperature) with `generator`. cache: makes an empty cache; with `room()` the prompt is fed in such pieces, so that
    it meets aged keys as the continuation does, otherwise (as in transformers' own `generate`) at once. All sequences
    run to the end, which comes early once each has made a token of `stop`.
    """
    if prompts.ndim != 2 or 0 in prompts.shape or tokens < 1:
        raise InputError(
            f"prompts of shape {tuple(prompts.shape)} and {tokens} tokens; accepted: (batch, length), 1 or more"
        )
    if temperature < 0:
        raise InputError(f"temperature={temperature} is negative")
    device = next(model.parameters()).device
    ids = prompts.to(device)
    with torch.inference_mode():
        held: Any = None if cache is None else cache()
        fed, ends = 0, torch.tensor(sorted(stop), device=device)
        while ids.shape[1] < prompts.shape[1] + tokens:
            last = min(ids.shape[1], fed + held.room()) if hasattr(held, "room") else ids.shape[1]
            output = model(ids[:, fed:last], past_key_values=held, use_cache=True)
            held, fed = output.past_key_values, last
            if fed == ids.shape[1]:
                ids = torch.cat([ids, _chosen(output.logits[:, -1], temperature, generator)], dim=1)
                if torch.isin(ids[:, prompts.shape[1] :], ends).any(dim=1).all():
                    break
    return ids


def _chosen(logits: Tensor, temperature: float, generator: torch.Generator | None) -> Tensor:
    """One token id a row, (batch, 1)."""
    if temperature == 0:
        return logits.argmax(dim=1, keepdim=True)
    return torch.multinomial((logits.double() / temperature).softmax(dim=1), 1, generator=generator)

"""Perplexity of a causal language model on documents, with the cache of keys and values it would decode with."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quantkit.errors import InputError

SEPARATOR = "<|endoftext|>"
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Perplexity:
    """Perplexity over n documents, `tokens` predicted tokens in all.

    mean: exp of the mean loss, every token counting the same. stderr: of `mean`, over documents (see `summary`), NaN
    for one. losses: nats of each document, summed, and lengths: its predicted tokens, in the order given.
    """

    metric: str
    mean: float
    stderr: float
    n: int
    tokens: int
    losses: tuple[float, ...]
    lengths: tuple[int, ...]
    seconds: float


def read_documents(path: Path) -> list[str]:
    """The documents of a text file, split at `<|endoftext|>` and stripped; InputError if there is none."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as UTF-8 text ({type(error).__name__})") from None
    documents = [part for part in (piece.strip() for piece in text.split(SEPARATOR)) if part]
    if not documents:
        raise InputError(f"{path}: holds no text")
    return documents


def encode(tokenizer: Any, documents: Sequence[str], context: int) -> list[Tensor]:
    """Token ids (int64) of each document, cut at `context` tokens; documents of fewer than 2 tokens are left out.

    tokenizer: a `tokenizers.Tokenizer`, or a transformers one.
    """
    lists = (getattr(ids := tokenizer.encode(text), "ids", ids)[:context] for text in documents)
    return [torch.tensor(ids) for ids in lists if len(ids) > 1]


def evaluate(
    model: nn.Module,
    documents: Sequence[Tensor],
    *,
    batch: int = 32,
    cache: Callable[[], Any] | None = None,
    progress: Progress | None = None,
) -> Perplexity:
    """Perplexity of a transformers causal LM on documents of token ids, each from its own beginning.

    cache: makes an empty cache with `room()`, such as `make_cache` gives; tokens are then fed in pieces of
    `room()`, so that every query meets keys and values as it would when decoding token by token. Without one the
    documents go through in one pass. `batch` documents of similar lengths run together, padded on the right, which
    no token of a document can see.
    """
    if batch < 1:
        raise InputError(f"batch={batch}; accepted: 1 or more")
    if not documents or min(map(len, documents)) < 2:
        raise InputError("perplexity needs documents of at least 2 tokens each")
    began = time.perf_counter()
    losses = [0.0] * len(documents)
    order = sorted(range(len(documents)), key=lambda i: len(documents[i]))
    device = next(model.parameters()).device
    with torch.inference_mode():
        for first in range(0, len(order), batch):
            some = order[first : first + batch]
            ids = nn.utils.rnn.pad_sequence([documents[i] for i in some], batch_first=True).to(device)
            real = torch.arange(ids.shape[1]) < torch.tensor([len(documents[i]) for i in some])[:, None]
            nats = _losses(model, ids, cache).cpu() * real[:, 1:]
            for i, loss in zip(some, nats.sum(1).tolist(), strict=True):
                losses[i] = loss
            if progress is not None:
                progress(first + len(some), len(order))
    return summary(losses, [len(d) - 1 for d in documents], time.perf_counter() - began)


def _losses(model: nn.Module, ids: Tensor, cache: Callable[[], Any] | None) -> Tensor:
    """Nats (batch, tokens - 1) of every token but the first, in float64."""
    if cache is None:
        logits = model(ids, use_cache=False).logits
        return _nats(logits[:, :-1], ids[:, 1:])
    held, pieces, first = cache(), [], 0
    while first < ids.shape[1] - 1:
        last = min(first + held.room(), ids.shape[1] - 1)
        logits = model(ids[:, first:last], past_key_values=held, use_cache=True).logits
        pieces.append(_nats(logits, ids[:, first + 1 : last + 1]))
        first = last
    return torch.cat(pieces, dim=1)


def _nats(logits: Tensor, target: Tensor) -> Tensor:
    """Minus the log-probability of `target` (batch, tokens), in float64; by rows, as strided ones take four times as
    long."""
    return F.cross_entropy(logits.flatten(0, 1).double(), target.flatten(), reduction="none").reshape(target.shape)


def summary(losses: Sequence[float], lengths: Sequence[int], seconds: float = math.nan) -> Perplexity:
    """From the summed nats and the predicted tokens of each document.

    The mean loss is a ratio of sums over documents, r = sum(loss) / sum(length); its standard error is
    sqrt(n / (n - 1) * sum((loss - r * length)^2)) / sum(length), that of a ratio estimator, and the one of exp(r) is
    exp(r) times that (delta method).
    """
    n, tokens = len(losses), sum(lengths)
    rate = math.fsum(losses) / tokens
    mean = math.exp(rate) if rate < 700 else math.inf
    squares = math.fsum((a - rate * b) ** 2 for a, b in zip(losses, lengths, strict=True))
    stderr = mean * math.sqrt(n / (n - 1) * squares) / tokens if n > 1 else math.nan
    return Perplexity("perplexity", mean, stderr, n, tokens, tuple(losses), tuple(lengths), seconds)


def compare(reference: Perplexity, other: Perplexity) -> tuple[float, float]:
    """(ratio of perplexities other / reference, its standard error), paired by document.

    Raises InputError when the documents are not the same.
    """
    if reference.lengths != other.lengths:
        raise InputError("perplexities are not paired: they come from different documents")
    paired = summary([b - a for a, b in zip(reference.losses, other.losses, strict=True)], reference.lengths)
    return paired.mean, paired.stderr

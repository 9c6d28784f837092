"""Verifiable rewards of a language policy: prompts, the answers it decodes, a program that judges them.

A task is a list of prompts and a verifier; `arithmetic` makes one from a seed. What is evaluated is any module called
as transformers' causal language models are: `module(ids).logits`, with `past_key_values` where its `forward` has them.
"""

from __future__ import annotations

import inspect
import math
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quantkit.errors import InputError
from quantkit.statistics import spread, t_quantile
from quantkit.tasks.accuracy import summary as wilson

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Task:
    """verify: (prompt, answer without its end token) -> reward, 1 for a right answer and less for others.

    tokens: the most an answer may take, its end token included; an answer without one is judged as far as it goes.
    """

    name: str
    prompts: tuple[str, ...]
    verify: Callable[[str, str], float]
    tokens: int


@dataclass(frozen=True)
class Reward:
    """Mean reward over n prompts, one answer each.

    stderr: of `mean`, over prompts; low, high: its 95 % interval by Student's t. exact_match: fraction of answers of
    reward 1, exact_low and exact_high: its 95 % Wilson interval. temperature: 0 for greedy decoding. rewards, answers:
    of each prompt, in order.
    """

    metric: str
    mean: float
    stderr: float
    low: float
    high: float
    n: int
    exact_match: float
    exact_low: float
    exact_high: float
    temperature: float
    rewards: tuple[float, ...]
    answers: tuple[str, ...]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, without the lists; an unknown error becomes None."""
        kept = {k: v for k, v in asdict(self).items() if k not in ("rewards", "answers")}
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in kept.items()}


def arithmetic(n: int, seed: int = 0) -> Task:
    """n sums and differences, equally often, of two numbers below 10, 100 or 1000; of a difference the larger is first.

    Each of the three bounds is as likely. An answer is the number with its last digit first, as one adds on paper:
    `58+7=` is answered by `56`. It is worth 1 if right, 0.1 if it is digits and nothing else, and 0 otherwise. Fewer
    prompts of a seed are the first of more.

    >>> arithmetic(3).prompts
    ('97+5=', '497-38=', '74+8=')
    >>> [verify_arithmetic("58+7=", answer) for answer in ("56", "65", "5 6")]
    [1.0, 0.1, 0.0]
    """
    if n < 1:
        raise InputError(f"{n} prompts; accepted: 1 or more")
    draw = random.Random(seed)
    return Task("arithmetic", tuple(_sum(draw) for _ in range(n)), verify_arithmetic, tokens=6)


def _sum(draw: random.Random) -> str:
    a, b = (draw.randrange(10 ** draw.randint(1, 3)) for _ in range(2))
    return f"{a}+{b}=" if draw.random() < 0.5 else f"{max(a, b)}-{min(a, b)}="


def solution(prompt: str) -> str:
    """The right answer to a prompt of `arithmetic`.

    >>> solution("123-45=")
    '87'
    """
    sign = "+" if "+" in prompt else "-"
    a, b = map(int, prompt.rstrip("=").split(sign))
    return str(a + b if sign == "+" else a - b)[::-1]


def verify_arithmetic(prompt: str, answer: str) -> float:
    """The reward of an answer, as `arithmetic` says."""
    if answer == solution(prompt):
        return 1.0
    return 0.1 if answer.isascii() and answer.isdigit() else 0.0


TASKS: dict[str, Callable[[int, int], Task]] = {"arithmetic": arithmetic}
"""What makes n prompts of a seed, by the name of the task."""


def evaluate(
    module: nn.Module,
    tokenizer: Any,
    task: Task,
    *,
    end: int,
    temperature: float = 0.0,
    seed: int = 0,
    batch: int = 256,
    progress: Progress | None = None,
) -> Reward:
    """Rewards of the answers to the task's prompts, decoded as `decode` does.

    tokenizer: a `tokenizers.Tokenizer`. end: the token that ends an answer. `batch` prompts of one length run together;
    samples (temperature above 0) depend on it and on `seed`. `progress(prompts done, of how many)`.
    """
    began, answers = time.perf_counter(), [""] * len(task.prompts)
    for some, length, made in _decoded(module, tokenizer, task, end, temperature, seed, batch, progress):
        for i, row in zip(some, made[:, length:].tolist(), strict=True):
            answers[i] = tokenizer.decode(row[: row.index(end)] if end in row else row)
    rewards = [task.verify(prompt, answer) for prompt, answer in zip(task.prompts, answers, strict=True)]
    return summary(rewards, answers, temperature, time.perf_counter() - began)


def summary(
    rewards: Sequence[float], answers: Sequence[str] = (), temperature: float = 0.0, seconds: float = math.nan
) -> Reward:
    """Of the reward of each prompt; stderr, low and high are NaN for a single one.

    >>> r = summary([1.0, 0.1, 1.0, 1.0])
    >>> round(r.mean, 3), round(r.stderr, 3), r.exact_match
    (0.775, 0.225, 0.75)
    """
    n, exact = len(rewards), wilson(sum(r == 1 for r in rewards), len(rewards))
    mean, stderr = statistics.fmean(rewards), spread(rewards)[1]
    half = t_quantile(0.975, n - 1) * stderr if n > 1 else math.nan
    return Reward(
        "reward", mean, stderr, mean - half, mean + half, n, exact.mean, exact.low, exact.high, temperature,
        tuple(rewards), tuple(answers), seconds,
    )  # fmt: skip


def compare(reference: Reward, other: Reward) -> tuple[float, float]:
    """(mean reward of other - reference, its standard error), paired by prompt; InputError if their numbers differ."""
    if reference.n != other.n:
        raise InputError(f"rewards are not paired: {reference.n} and {other.n} prompts")
    differences = [b - a for a, b in zip(reference.rewards, other.rewards, strict=True)]
    return statistics.fmean(differences), spread(differences)[1]


def kl(
    module: nn.Module,
    reference: nn.Module,
    tokenizer: Any,
    task: Task,
    *,
    end: int,
    temperature: float = 0.0,
    seed: int = 0,
    batch: int = 256,
    progress: Progress | None = None,
) -> tuple[float, float]:
    """(KL(reference || module) in nats per token, its standard error over prompts), on the reference's own answers.

    Tokens that count are those of the answers, the end token included. The standard error is that of a ratio of sums,
    NaN for one prompt.
    """
    nats, lengths = [0.0] * len(task.prompts), [0] * len(task.prompts)
    for some, length, made in _decoded(reference, tokenizer, task, end, temperature, seed, batch, progress):
        answer = made[:, length:]
        counts = (answer == end).cumsum(1) - (answer == end).long() == 0
        with torch.inference_mode():
            p, q = (m(made[:, :-1], use_cache=False).logits[:, length - 1 :] for m in (reference, module))
            log_p, log_q = (x.double().log_softmax(dim=-1) for x in (p, q))
        each = (log_p.exp() * (log_p - log_q)).sum(dim=-1) * counts
        for i, total, count in zip(some, each.sum(1).tolist(), counts.sum(1).tolist(), strict=True):
            nats[i], lengths[i] = total, count
    n, rate = len(nats), math.fsum(nats) / sum(lengths)
    squares = math.fsum((a - rate * b) ** 2 for a, b in zip(nats, lengths, strict=True))
    return rate, math.sqrt(n / (n - 1) * squares) / sum(lengths) if n > 1 else math.nan


def decode(
    module: nn.Module,
    ids: Tensor,
    tokens: int,
    *,
    end: int,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Prompts (batch, length) of token ids with at most `tokens` more each, on the module's device.

    temperature 0 takes the likeliest token, above 0 it is drawn from softmax(logits / temperature). Behind a row's
    `end` follow more of them, until all rows have one. A module without `past_key_values` sees all anew for each token.
    """
    if temperature < 0:
        raise InputError(f"temperature={temperature} is negative")
    call: Any = module
    cached, held = "past_key_values" in inspect.signature(module.forward).parameters, None
    ids, ended = ids.to(next(module.parameters()).device), None
    with torch.inference_mode():
        for _ in range(tokens):
            if cached:
                output = call(ids if held is None else ids[:, -1:], past_key_values=held, use_cache=True)
                held = output.past_key_values
            else:
                output = call(ids)
            logits = output.logits[:, -1]
            if temperature == 0:
                token = logits.argmax(dim=1)
            else:
                weights = (logits.double() / temperature).softmax(dim=1)
                token = torch.multinomial(weights, 1, generator=generator)[:, 0]
            token = token if ended is None else torch.where(ended, end, token)
            ids, ended = torch.cat([ids, token[:, None]], dim=1), token == end
            if ended.all():
                break
    return ids


def rollouts(
    module: nn.Module,
    tokenizer: Any,
    task: Task,
    *,
    end: int,
    temperature: float = 1.0,
    seed: int = 0,
    batch: int = 256,
) -> Tensor:
    """Prompts with the answers that the module gives them (prompts, tokens), int64: what to calibrate on.

    Rows are filled up with `end` behind their answer, as `decode` leaves them.
    """
    width = task.tokens + max(len(tokenizer.encode(prompt).ids) for prompt in task.prompts)
    rows = torch.full((len(task.prompts), width), end)
    for some, _, made in _decoded(module, tokenizer, task, end, temperature, seed, batch, None):
        rows[some, : made.shape[1]] = made.cpu()
    kept = int((rows != end).any(dim=0).nonzero().max()) + 2
    return rows[:, :kept]


def _decoded(
    module: nn.Module,
    tokenizer: Any,
    task: Task,
    end: int,
    temperature: float,
    seed: int,
    batch: int,
    progress: Progress | None,
) -> Iterator[tuple[list[int], int, Tensor]]:
    """(which prompts, their length, they and the module's answers as `decode` leaves them), batch by batch."""
    generator = torch.Generator(next(module.parameters()).device).manual_seed(seed)
    for some, ids in _batches(tokenizer, task, batch, progress):
        made = decode(module, ids, task.tokens, end=end, temperature=temperature, generator=generator)
        yield some, ids.shape[1], made


def _batches(tokenizer: Any, task: Task, batch: int, progress: Progress | None) -> Iterator[tuple[list[int], Tensor]]:
    """(which prompts, their ids): prompts of one length together, so that none is padded."""
    if batch < 1:
        raise InputError(f"batch={batch}; accepted: 1 or more")
    encoded = [tokenizer.encode(prompt).ids for prompt in task.prompts]
    if not all(encoded):
        raise InputError(
            f"task {task.name}: the tokenizer makes no token of the prompt {task.prompts[encoded.index([])]!r}"
        )
    done = 0
    for length in sorted({len(ids) for ids in encoded}):
        members = [i for i, ids in enumerate(encoded) if len(ids) == length]
        for first in range(0, len(members), batch):
            some = members[first : first + batch]
            yield some, torch.tensor([encoded[i] for i in some])
            done += len(some)
            if progress is not None:
                progress(done, len(encoded))

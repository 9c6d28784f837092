"""Reward tasks: verifiers against arithmetic, decoding against transformers, errors and divergences by formula."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from test_cli import call, document, error
from tiny_lm import VOCABULARY, llama, tokens
from torch import nn

from quantkit.errors import InputError
from quantkit.language import causal_lm
from quantkit.loaders import hf
from quantkit.model import Calib
from quantkit.recipe import Recipe, make_plan, quantize
from quantkit.tasks.reward import (
    Task,
    arithmetic,
    compare,
    decode,
    evaluate,
    kl,
    rollouts,
    solution,
    summary,
    verify_arithmetic,
)

POLICY = Path(__file__).parent.parent / "benchmarks" / "agents" / "arithmetic"
CURVE = Path(__file__).parent.parent / "reports" / "language" / "arithmetic_training.csv"
END = 1


class Letters:
    """A tokenizer of one id a letter, from 2 on, for the random models."""

    class Ids(list):
        """What `encode` gives."""

        ids = property(list)

    def encode(self, text):
        """Ids."""
        return self.Ids(2 + ord(c) % (VOCABULARY - 2) for c in text)

    def decode(self, ids):
        """One letter an id."""
        return "".join(chr(65 + i) for i in ids)


class Graph(nn.Module):
    """A language model that takes tokens and no cache, as a captured graph does."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, ids, use_cache=False):
        """Logits."""
        return self.inner(ids, use_cache=False)


LETTERS = Task("letters", ("abc", "de", "fgh", "z", "abcde", "xy"), lambda _, answer: float("A" in answer), 7)


@pytest.fixture(scope="module")
def policy():
    """(model of the repository, tokenizer)."""
    return hf.load(POLICY), hf.read_tokenizer(POLICY)


def test_prompts_come_from_their_seed():
    """A seed gives the same prompts, fewer are the first of more, another seed gives others; the distribution is so."""
    task = arithmetic(3000, 5)
    assert task.prompts == arithmetic(3000, 5).prompts and task.prompts[:7] == arithmetic(7, 5).prompts
    assert task.prompts != arithmetic(3000, 6).prompts
    numbers = [re.fullmatch(r"(\d{1,3})([+-])(\d{1,3})=", p).groups() for p in task.prompts]
    assert all(sign == "+" or int(a) >= int(b) for a, sign, b in numbers)
    assert abs(sum(sign == "+" for _, sign, _ in numbers) - 1500) < 5 * math.sqrt(750)
    below_ten = sum(int(n) < 10 for a, _, b in numbers for n in (a, b)) / 6000
    wanted = (1 + 1 / 10 + 1 / 100) / 3
    assert abs(below_ten - wanted) < 5 * math.sqrt(wanted * (1 - wanted) / 6000)
    with pytest.raises(InputError, match="0 prompts"):
        arithmetic(0)


def test_the_verifier_knows_arithmetic():
    """Of all digit strings only the reversed result is worth 1, other digits 0.1, anything else 0."""
    for prompt in arithmetic(300, 3).prompts:
        result = eval(re.sub(r"\b0+(?=\d)", "", prompt.rstrip("=")))
        assert solution(prompt) == str(result)[::-1]
        for answer in {*map(str, range(0, 2000, 37)), str(result), str(result)[::-1], str(result)[::-1] + "0"}:
            wanted = 1.0 if answer == str(result)[::-1] else 0.1
            assert verify_arithmetic(prompt, answer) == wanted
        for bad in ("", " 1", "1=", "-1", "1 2", "²", "٣", "<pad>"):
            assert verify_arithmetic(prompt, bad) == 0.0


@pytest.mark.parametrize("wrap", [lambda m: m, Graph])
def test_greedy_decoding_is_transformers_generate(wrap):
    """Rows end as transformers' own generate ends them, with a cache and without one."""
    model, prompts = llama(torch.float64), tokens(5, 9)
    end = int(model.generate(prompts, max_new_tokens=3, do_sample=False)[2, -1])
    wanted = model.generate(
        prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=12, do_sample=False, eos_token_id=end,
        pad_token_id=end,
    )  # fmt: skip
    assert (wanted[:, 9:] == end).any() and torch.equal(decode(wrap(model), prompts, 12, end=end), wanted)


def test_answers_do_not_depend_on_the_batch():
    """Prompts of unequal lengths have the same answers alone and together, cut at the end token."""
    model = llama(torch.float64)
    together = evaluate(model, Letters(), LETTERS, end=END, batch=4)
    for prompt, answer, reward in zip(LETTERS.prompts, together.answers, together.rewards, strict=True):
        alone = evaluate(Graph(model), Letters(), Task("", (prompt,), LETTERS.verify, 7), end=END)
        assert alone.answers == (answer,) and alone.rewards == (reward,)
        assert len(answer) <= 7 and chr(65 + END) not in answer


def test_samples_follow_their_seed():
    """A seed gives the same answers, another one others; the temperature goes to zero as greedy decoding."""
    model = llama()
    draw = lambda **k: evaluate(model, Letters(), LETTERS, end=END, **k).answers  # noqa: E731
    assert draw(temperature=1.0, seed=3) == draw(temperature=1.0, seed=3) != draw(temperature=1.0, seed=4)
    assert draw(temperature=1e-6, seed=3) == draw()
    with pytest.raises(InputError, match="temperature"):
        draw(temperature=-1.0)


def test_progress_counts_every_prompt():
    """Progress ends at the number of prompts and never goes back."""
    seen = []
    evaluate(llama(), Letters(), LETTERS, end=END, batch=2, progress=lambda done, total: seen.append((done, total)))
    assert seen == sorted(seen) and seen[-1] == (6, 6)


def test_intervals():
    """The interval of the mean covers it 95 times of 100; stderr is numpy's; exact match counts rewards of 1 only."""
    rng, inside = np.random.default_rng(0), 0
    values, p = np.array([0.0, 0.1, 1.0]), np.array([0.2, 0.3, 0.5])
    for _ in range(600):
        rewards = rng.choice(values, 60, p=p)
        found = summary(rewards.tolist())
        assert found.stderr == pytest.approx(rewards.std(ddof=1) / math.sqrt(60))
        assert found.exact_match == (rewards == 1).mean() and found.exact_low <= found.exact_match <= found.exact_high
        inside += found.low <= values @ p <= found.high
    assert abs(inside / 600 - 0.95) < 4 * math.sqrt(0.95 * 0.05 / 600)
    alone = summary([0.1])
    assert math.isnan(alone.stderr) and alone.to_json()["low"] is None
    json.dumps(found.to_json(), allow_nan=False)


def test_comparison_is_paired():
    """A constant difference has no error; unequal numbers of prompts are refused."""
    a, b = summary([0.0, 0.5, 0.25]), summary([0.25, 0.75, 0.5])
    assert compare(a, b) == (pytest.approx(0.25), 0.0)
    with pytest.raises(InputError, match="not paired"):
        compare(a, summary([1.0]))


def test_divergence_is_the_sum_over_answers():
    """KL is that of each answer token, summed here one by one; zero to the model itself, and of two it is positive."""
    p, q = llama(torch.float64), llama(torch.float64, seed=1)
    assert kl(p, p, Letters(), LETTERS, end=END) == (0.0, 0.0)
    end, each = decode(p, torch.tensor([Letters().encode("abc").ids]), 3, end=-1)[0, -1].item(), []
    for prompt in LETTERS.prompts:
        ids, nats, length = torch.tensor([Letters().encode(prompt).ids]), 0.0, 0
        for _ in range(LETTERS.tokens):
            with torch.inference_mode():
                a, b = (m(ids).logits[0, -1].log_softmax(0) for m in (p, q))
            nats, length = nats + float((a.exp() * (a - b)).sum()), length + 1
            ids = torch.cat([ids, a.argmax().reshape(1, 1)], 1)
            if a.argmax() == end:
                break
        each.append((nats, length))
    total, count = map(sum, zip(*each, strict=True))
    found, error = kl(Graph(q), p, Letters(), LETTERS, end=end, batch=2)
    assert (
        count < len(LETTERS.prompts) * LETTERS.tokens and found == pytest.approx(total / count, rel=1e-9) and found > 0
    )
    without = [(total - a) / (count - b) for a, b in each]
    jackknife = math.sqrt(5 / 6 * sum((r - np.mean(without)) ** 2 for r in without))
    assert error == pytest.approx(jackknife, rel=0.3)


def test_rollouts_are_prompts_with_answers():
    """Each row is a prompt, the answer to it and end tokens, the longest one with a single one of them."""
    model = llama()
    rows = rollouts(model, Letters(), LETTERS, end=END, temperature=0.0)
    answers = evaluate(model, Letters(), LETTERS, end=END).answers
    for prompt, answer, row in zip(LETTERS.prompts, answers, rows.tolist(), strict=True):
        made = [*Letters().encode(prompt).ids, *(ord(c) - 65 for c in answer)]
        assert row[: len(made)] == made[: len(row)] and set(row[len(made) :]) <= {END}


def test_the_policy_of_the_repository_has_its_accuracy(policy):
    """Greedy answers of the committed policy to fresh problems are as often right as its training recorded."""
    model, tokenizer = policy
    recorded = pd.read_csv(CURVE, comment="#").exact_match.iloc[-1]
    score = evaluate(model.module, tokenizer, arithmetic(300, 77), end=model.module.config.eos_token_id)
    noise = math.sqrt(recorded * (1 - recorded) * (1 / 300 + 1 / 500))
    assert recorded > 0.9 and score.exact_match > recorded - 4 * noise
    assert score.mean == pytest.approx(score.exact_match + 0.1 * (1 - score.exact_match))


def test_reinforcement_raised_the_reward():
    """The curve of the committed policy rises from imitation to reinforcement by many standard errors."""
    curve = pd.read_csv(CURVE, comment="#")
    taught, last = curve[curve.phase == "careless"].iloc[-1], curve.iloc[-1]
    assert last.phase == "grpo" and last.reward - taught.reward > 5 * math.hypot(last.stderr, taught.stderr)


def test_eight_bits_keep_the_reward(policy):
    """The policy in int8 weights answers within the interval of the float policy; its KL is small and positive."""
    model, tokenizer = policy
    task, end = arithmetic(200, 78), model.module.config.eos_token_id
    reference = evaluate(model.module, tokenizer, task, end=end)
    recipe = Recipe((("model.layers.*", make_plan("int8", "float")),))
    small = causal_lm(quantize(model, recipe, Calib(torch.arange(8)[None])))
    score = evaluate(small, tokenizer, task, end=end)
    assert reference.low <= score.mean <= reference.high
    assert 0 < kl(small, model.module, tokenizer, task, end=end)[0] < 0.01


def test_the_command_measures_the_same(policy):
    """`evaluate --task` reports what the functions give, in JSON and in words, with the KL to a reference."""
    model, tokenizer = policy
    options = {"end": model.module.config.eos_token_id, "temperature": 1.0, "seed": 5}
    wanted = evaluate(model.module, tokenizer, arithmetic(40, 5), **options)
    told = ("evaluate", str(POLICY), "--task", "arithmetic", "--episodes", "40", "--seed", "5", "--sample")
    found = document(*told, "--reference", POLICY)
    assert found["metric"] == "reward" and found["kl"] == 0.0 == found["kl_stderr"]
    for key in ("mean", "stderr", "n", "exact_match", "exact_low", "exact_high", "temperature"):
        assert found[key] == pytest.approx(getattr(wanted, key))
    said = call(*told).stdout
    assert f"{wanted.mean:.4f}" in said and "drawn answers" in said


def test_the_command_refuses_what_does_not_fit(tmp_path):
    """Unknown tasks, tasks with text, options without a task and policies without an end token are one line each."""
    here = ("evaluate", str(POLICY))
    assert "accepted: arithmetic" in error(*here, "--task", "geometry")
    assert "--task" in error(*here, "--sample")
    assert "alone" in error(*here, "--task", "arithmetic", "--text", str(tmp_path / "t.txt"))
    assert "--task arithmetic" in error(*here)
    endless = shutil.copytree(POLICY, tmp_path / "endless")
    config = json.loads((endless / "config.json").read_text()) | {"eos_token_id": None}
    (endless / "config.json").write_text(json.dumps(config))
    assert "eos_token_id" in error("evaluate", str(endless), "--task", "arithmetic")


def test_bad_requests_are_refused():
    """Batches of none and prompts without a token are errors."""
    with pytest.raises(InputError, match="batch=0"):
        evaluate(llama(), Letters(), LETTERS, end=END, batch=0)
    with pytest.raises(InputError, match="no token"):
        evaluate(llama(), Letters(), Task("", ("a", ""), LETTERS.verify, 2), end=END)

"""Perplexity of language models: documents apart, padding unseen, errors of the mean, caches met as in decoding."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from tiny_lm import llama, tokens, transformers

from quantkit.caches import make_cache
from quantkit.errors import InputError
from quantkit.tasks.perplexity import compare, encode, evaluate, read_documents, summary


def documents(seed=0, n=9):
    """Token ids of unequal lengths."""
    return [tokens(1, 5 + 7 * i % 60, seed=seed + i)[0] for i in range(n)]


def alone(model, ids):
    """Summed loss of one document by transformers' own loss."""
    with torch.inference_mode():
        return model(ids[None], labels=ids[None]).loss.item() * (len(ids) - 1)


@pytest.mark.parametrize("batch", [1, 4, 100])
@pytest.mark.parametrize("cache", [None, "saq:levels=16-8-4,block=16,group=8", "kivi:bits=2,residual=16,group=8"])
def test_documents_are_independent(batch, cache):
    """Losses of a document are the same alone, in a batch, padded and in any order, with caches too."""
    model, docs = llama(torch.float64), documents()
    make = None if cache is None else lambda: make_cache(cache, model.config)
    score = evaluate(model, docs, batch=batch, cache=make)
    assert score.lengths == tuple(len(d) - 1 for d in docs) and score.tokens == sum(score.lengths)
    for loss, doc in zip(score.losses, docs, strict=True):
        assert loss == pytest.approx(evaluate(model, [doc], cache=make).losses[0], rel=1e-9)
    backwards = evaluate(model, docs[::-1], batch=batch, cache=make)
    assert backwards.losses[::-1] == pytest.approx(score.losses, rel=1e-9)


def test_losses_are_transformers_own():
    """Without a cache the losses are those of the model's own loss, and the mean is exp of their mean per token."""
    model, docs = llama(torch.float64), documents()
    score = evaluate(model, docs, batch=4)
    wanted = [alone(model, d) for d in docs]
    assert score.losses == pytest.approx(wanted, rel=1e-6)
    assert score.mean == pytest.approx(math.exp(sum(wanted) / sum(len(d) - 1 for d in docs)), rel=1e-6)


def test_a_cache_is_met_as_in_decoding():
    """With a cache the loss is that of decoding token by token, and differs from one pass."""
    model, doc = llama(torch.float64), tokens(1, 70)
    text = "saq:levels=16-4-2,block=16,group=8,sink=2"
    score = evaluate(model, [doc[0]], cache=lambda: make_cache(text, model.config))
    cache, total = make_cache(text, model.config), 0.0
    with torch.inference_mode():
        for i in range(69):
            logits = model(doc[:, i : i + 1], past_key_values=cache).logits[0, -1]
            total -= torch.log_softmax(logits, 0)[doc[0, i + 1]].item()
    assert score.losses[0] == pytest.approx(total, rel=1e-9)
    assert abs(total - alone(model, doc[0])) > 1e-3


def test_standard_error_is_the_jackknifes():
    """The standard error of the perplexity agrees with the jackknife over documents."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(40, 300, 60).tolist()
    losses = [float(n * rng.normal(1.5, 0.2)) for n in lengths]
    score = summary(losses, lengths)
    without = [math.exp((sum(losses) - a) / (sum(lengths) - b)) for a, b in zip(losses, lengths, strict=True)]
    jackknife = math.sqrt(59 / 60 * sum((p - np.mean(without)) ** 2 for p in without))
    assert score.stderr == pytest.approx(jackknife, rel=0.03)
    assert math.isnan(summary(losses[:1], lengths[:1]).stderr)


def test_comparison_is_paired():
    """The ratio of two perplexities has the error of the paired losses: none where they differ by a constant rate."""
    lengths = [10, 20, 40]
    a = summary([11.0, 25.0, 50.0], lengths)
    b = summary([11.0 + 1, 25.0 + 2, 50.0 + 4], lengths)
    ratio, error = compare(a, b)
    assert ratio == pytest.approx(b.mean / a.mean) and error == pytest.approx(0, abs=1e-12)
    with pytest.raises(InputError, match="different documents"):
        compare(a, summary([1.0, 2.0], [10, 20]))


class Letters:
    """A tokenizer: one id a letter."""

    def encode(self, text):
        """Ids."""
        return [ord(c) % 50 for c in text]


def test_text_is_split_and_cut(tmp_path):
    """Documents are split at the separator and stripped, empty ones dropped, tokens cut at the context."""
    path = tmp_path / "t.txt"
    path.write_text(" ab cd <|endoftext|>\n\n<|endoftext|>x<|endoftext|>efghij")
    texts = read_documents(path)
    assert texts == ["ab cd", "x", "efghij"]
    ids = encode(Letters(), texts, 4)
    assert [d.tolist() for d in ids] == [[ord(c) % 50 for c in t] for t in ("ab c", "efgh")]
    for bad in ("", " <|endoftext|> "):
        path.write_text(bad)
        with pytest.raises(InputError, match="holds no text"):
            read_documents(path)
    with pytest.raises(InputError, match=r"absent\.txt"):
        read_documents(tmp_path / "absent.txt")


def test_nothing_to_predict_is_refused():
    """No documents, one token, and batches of none are errors."""
    model = llama()
    for docs, batch in (([], 4), ([tokens(1, 1)[0]], 4), (documents(), 0)):
        with pytest.raises(InputError):
            evaluate(model, docs, batch=batch)


def test_other_architectures_are_measured_too():
    """A GPT-2 has no grouped queries and learned positions; its perplexity through 16 bits is that without a cache."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 61, "n_positions": 128, "n_embd": 32, "n_layer": 2, "n_head": 4}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).double().eval()
    docs = documents()
    plain = evaluate(model, docs)
    cached = evaluate(model, docs, cache=lambda: make_cache("saq:levels=16", model.config))
    assert cached.losses == pytest.approx(plain.losses, rel=1e-3)

"""Decoding: greedy is transformers' own, sampling follows its generator, caches are met aged."""

from __future__ import annotations

import pytest
import torch
from tiny_lm import VOCABULARY, llama, tokens

from quantkit.caches import make_cache
from quantkit.errors import InputError
from quantkit.tasks.generation import generate


def test_greedy_is_transformers_generate():
    """Greedy decoding gives the tokens of transformers' generate, without a cache text and with 16 bits."""
    model, prompts = llama(torch.float64), tokens(3, 17)
    wanted = model.generate(prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=30, do_sample=False)
    assert torch.equal(generate(model, prompts, 30), wanted)


def test_a_prompt_meets_aged_keys():
    """With a cache, what follows a prompt is what follows when its tokens are fed one by one."""
    model, prompts = llama(torch.float64), tokens(2, 50)
    text = "saq:levels=16-2,block=8,group=8"
    out = generate(model, prompts, 12, cache=lambda: make_cache(text, model.config))
    cache, ids = make_cache(text, model.config), prompts
    with torch.inference_mode():
        for i in range(61):
            logits = model(ids[:, i : i + 1], past_key_values=cache).logits[:, -1]
            if i >= 49:
                ids = torch.cat([ids, logits.argmax(1, keepdim=True)], 1)
    assert torch.equal(out, ids)


def test_sampling_follows_its_generator():
    """The same seed gives the same tokens, another seed others, and their frequencies are the softmax's."""
    model = llama()
    draw = lambda seed: generate(  # noqa: E731
        model, tokens(1, 9), 20, temperature=0.9, generator=torch.Generator().manual_seed(seed)
    )
    assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))
    prompts = tokens(1, 9).repeat(4000, 1)
    out = generate(model, prompts, 1, temperature=0.5, generator=torch.Generator().manual_seed(0))[:, -1]
    with torch.inference_mode():
        wanted = (model(prompts[:1]).logits[0, -1] / 0.5).softmax(0)
    seen = torch.bincount(out, minlength=VOCABULARY) / 4000
    assert ((seen - wanted).abs() < 4.5 * (wanted * (1 - wanted) / 4000).sqrt() + 1e-3).all()


@pytest.mark.parametrize(("length", "n", "temperature"), [(0, 3, 0.0), (4, 0, 0.0), (4, 3, -1.0)])
def test_bad_requests_are_refused(length, n, temperature):
    """Empty prompts, nothing to generate and negative temperatures are errors."""
    with pytest.raises(InputError):
        generate(llama(), tokens(1, length), n, temperature=temperature)

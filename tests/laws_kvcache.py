"""Laws of every cache in quantkit/kvcache: what is held, what it costs, what transformers may do with it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny_lm import config, llama, states, tokens, transformers

from quantkit.caches import cache_names, make_cache, parse_cache
from quantkit.errors import InputError
from quantkit.kvgrid import Packed

CACHES = (
    "saq:levels=16",
    "saq:levels=16-4,block=16,group=8",
    "saq:levels=16-8-4-2,block=16,group=8,values=heads",
    "saq:levels=16-8-4,block=24,group=8,sink=3",
    "saq:levels=16-8-2,block=16,group=16,sink=1,values=heads",
    "kivi:bits=2,residual=24,group=8",
    "kivi:bits=4,residual=16,group=16,values=heads",
)
EXACT = "saq:levels=16"
each = pytest.mark.parametrize("text", CACHES)


def layer_of(text, **sizes):
    """The first layer of an empty cache."""
    return make_cache(text, config(**sizes)).layers[0]


def feed(layer, keys, values, first=0, last=None, step=None):
    """Tokens first, ..., last - 1 in pieces of `step`, or all at once."""
    last = keys.shape[2] if last is None else last
    step = step or max(last - first, 1)
    for i in range(first, last, step):
        j = min(i + step, last)
        layer.update(keys[:, :, i:j], values[:, :, i:j])
    return layer


def held(value):
    """Every tensor that an object holds, however deep, in a fixed order."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, list | tuple):
        return [t for item in value for t in held(item)]
    if isinstance(value, Packed):
        return [value.codes, value.scale, value.low]
    if hasattr(value, "__dict__"):
        return [t for name in sorted(vars(value)) for t in held(vars(value)[name])]
    return []


def same(a, b):
    """Whether two layers hold the same tensors, bit for bit."""
    a, b = held(a), held(b)
    return len(a) == len(b) and all(x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_every_cache_stands_under_the_laws():
    """No file of the folder is left out."""
    assert {parse_cache(text)[0] for text in CACHES} == set(cache_names())


@each
def test_a_prompt_equals_its_tokens(text):
    """A prompt leaves the same codes, metadata and residuals as its tokens one by one, or in uneven pieces."""
    keys, values = states(2, 83)
    for length in (1, 7, 15, 16, 17, 19, 23, 24, 25, 27, 32, 33, 48, 49, 64, 72, 75, 80, 83):
        whole = feed(layer_of(text), keys, values, 0, length)
        assert same(whole, feed(layer_of(text), keys, values, 0, length, step=1)), length
        assert same(whole, feed(layer_of(text), keys, values, 0, length, step=11)), length
        assert whole.get_seq_length() == length


@each
def test_bytes_held_are_real(text):
    """`bytes_held` is the memory behind every tensor of the cache, views and leftovers included."""
    keys, values = states(3, 90)
    cache = make_cache(text, config())
    assert cache.bytes_held() == 0
    for length in (5, 16, 30, 80, 90):
        cache = make_cache(text, config())
        for layer in cache.layers:
            feed(layer, keys, values, 0, 4)
            feed(layer, keys, values, 4, length)
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held(cache.layers)}
        assert cache.bytes_held() == sum(storages.values())


@each
def test_new_tokens_are_seen_in_16_bits(text):
    """`update` returns all tokens in order, the new ones rounded to float16 at most, in the model's dtype."""
    keys, values = states(2, 70)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        layer = layer_of(text)
        k, v = keys.to(dtype), values.to(dtype)
        half = torch.float16 if dtype == torch.float32 else dtype
        for first, last in ((0, 40), (40, 41), (41, 70)):
            seen = layer.update(k[:, :, first:last], v[:, :, first:last])
            for got, given in zip(seen, (k, v), strict=True):
                assert got.dtype == dtype and got.shape[2] == last
                assert torch.equal(got[:, :, first:], given[:, :, first:last].to(half).to(dtype))


@each
def test_old_tokens_are_near(text):
    """No cached value is farther from its own than half a step of its group and 16-bit rounding allow."""
    keys, values = states(2, 70)
    layer = feed(layer_of(text), keys, values, step=1)
    span = max((x.amax() - x.amin()).item() for x in (keys, values))
    bits = min([2] if text.startswith("kivi:bits=2") else [4] if text.startswith("kivi") else layer.bits_held())
    bound = 0.51 * span / (2**bits - 1) + 0.02
    for got, given in zip(layer.dequantized(), (keys, values), strict=True):
        assert got.shape == given.shape
        assert (got - given).abs().max() <= bound


@each
def test_sequences_do_not_mix(text):
    """A sequence has the same codes alone as in a batch."""
    keys, values = states(3, 61)
    together = feed(layer_of(text), keys, values)
    alone = feed(layer_of(text), keys[1:2], values[1:2])
    together.batch_select_indices(torch.tensor([1]))
    assert same(together, alone)


@pytest.mark.parametrize("text", [t for t in CACHES if "values=heads" not in t])
def test_heads_do_not_mix(text):
    """Unless values=heads says so, nothing of one head changes with another."""
    keys, values = states(1, 61)
    before = feed(layer_of(text), keys, values).dequantized()
    other = (torch.cat([x[:, :1], 5 * x[:, 1:] - 1], 1) for x in (keys, values))
    after = feed(layer_of(text), *other).dequantized()
    assert all(torch.equal(a[:, 0], b[:, 0]) for a, b in zip(before, after, strict=True))


@each
def test_reorder_is_feeding_in_that_order(text):
    """Beam reordering, selection and repetition give the cache of the sequences so arranged, also for what follows."""
    keys, values = states(3, 77)
    order = torch.tensor([2, 0, 0, 1])
    for length in (9, 50, 64):
        layer = feed(layer_of(text), keys, values, 0, length)
        layer.reorder_cache(order)
        wanted = feed(layer_of(text), keys[order], values[order], 0, length)
        assert same(layer, wanted)
        feed(layer, keys[order], values[order], length)
        assert same(layer, feed(wanted, keys[order], values[order], length))
        layer = feed(layer_of(text), keys, values, 0, length)
        layer.batch_repeat_interleave(2)
        twice = torch.tensor([0, 0, 1, 1, 2, 2])
        assert same(layer, feed(layer_of(text), keys[twice], values[twice], 0, length))


@each
def test_crop_keeps_the_oldest(text):
    """After a crop to any length the values left stand as they were but for 16 bits, and the cache goes on."""
    keys, values = states(2, 79)
    whole = feed(layer_of(text), keys, values).dequantized()
    for keep in (78, 70, 64, 63, 49, 48, 40, 24, 17, 16, 4, 3, 2, 1, 0):
        layer = feed(layer_of(text), keys, values)
        layer.crop(keep - 79)
        assert layer.get_seq_length() == keep
        for got, was in zip(layer.dequantized(), whole, strict=True):
            torch.testing.assert_close(got, was[:, :, :keep], rtol=2**-11, atol=1e-6)
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held(layer)}
        assert layer.bytes_held() == sum(storages.values())
        feed(layer, keys, values, keep, step=1)
        assert layer.get_seq_length() == 79
        assert all(got.shape == x.shape for got, x in zip(layer.dequantized(), (keys, values), strict=True))
    layer.crop(0)
    assert layer.get_seq_length() == 79
    layer.crop(-200)
    assert layer.get_seq_length() == 0
    with pytest.raises(ValueError, match="minus"):
        layer.crop(3)


@each
def test_reset_is_a_new_cache(text):
    """After reset a cache holds nothing and takes another batch size."""
    keys, values = states(2, 50)
    layer = feed(layer_of(text), keys, values)
    layer.reset()
    assert (layer.get_seq_length(), layer.bytes_held(), layer.is_initialized) == (0, 0, False)
    assert same(feed(layer, keys[:1], values[:1]), feed(layer_of(text), keys[:1], values[:1]))


@each
def test_constant_groups_keep_their_value(text):
    """Constant keys and values, zero among them, come back as themselves and never as NaN."""
    for constant in (0.0, -2.5, 1e-7, 3e4):
        x = torch.full((1, 2, 64, 8), constant)
        for got in feed(layer_of(text), x, x).dequantized():
            assert torch.equal(got, x.half().float())


@pytest.mark.parametrize("text", [t for t in CACHES if t != EXACT])
def test_nan_and_overflow_are_refused(text):
    """What cannot be held is an error when it is quantized, not a silent NaN."""
    for bad in (float("nan"), float("inf"), 1e5):
        keys, values = states(1, 64)
        keys[0, 0, 5, 3] = bad
        with pytest.raises(InputError, match="beyond float16"):
            feed(layer_of(text), keys, values)


@each
def test_room_is_decoding(text):
    """A model fed in pieces of `room()` gives the logits of one token at a time; larger pieces show it fresher keys."""
    model, ids = llama(torch.float64), tokens(2, 75)
    with torch.inference_mode():
        cache = make_cache(text, model.config)
        stepped = torch.cat([model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(75)], 1)
        cache, first, pieces = make_cache(text, model.config), 0, []
        while first < 75:
            last = min(first + cache.room(), 75)
            pieces.append(model(ids[:, first:last], past_key_values=cache).logits)
            first = last
        torch.testing.assert_close(torch.cat(pieces, 1), stepped, rtol=1e-9, atol=1e-9)
        at_once = model(ids, past_key_values=make_cache(text, model.config)).logits
        assert torch.allclose(at_once, stepped, rtol=1e-9, atol=1e-9) == (text == EXACT)


@each
@pytest.mark.parametrize("beams", [1, 3])
def test_generate_takes_it(text, beams):
    """transformers' generate decodes with it, beams and left padding included, one cache entry a token."""
    model, prompts = llama(), tokens(2, 21)
    prompts[0, :4] = 0
    mask = (prompts != 0).long()
    cache = make_cache(text, model.config)
    out = model.generate(
        prompts, attention_mask=mask, past_key_values=cache, max_new_tokens=45, num_beams=beams, do_sample=False
    )
    assert out.shape == (2, 66)
    assert cache.get_seq_length() == 65
    assert all(torch.isfinite(x).all() for layer in cache.layers for x in layer.dequantized())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("beams", [1, 3])
def test_16_bits_are_the_identity(dtype, beams):
    """With the one level of 16 bits a 16-bit model generates what it does with transformers' own cache."""
    model, prompts = llama(dtype), tokens(2, 19)
    options = {"max_new_tokens": 40, "num_beams": beams, "do_sample": False, "attention_mask": torch.ones_like(prompts)}
    ours = model.generate(prompts, past_key_values=make_cache(EXACT, model.config), **options)
    theirs = model.generate(prompts, past_key_values=transformers.DynamicCache(config=model.config), **options)
    assert torch.equal(ours, theirs)


def gemma(kind, dtype=torch.float32):
    """A random network in which every other layer, from the first or the second, has a window of 7 tokens."""
    torch.manual_seed(0)
    types = ["sliding_attention", "full_attention"] * 2
    sizes = {"vocab_size": 61, "hidden_size": 48, "intermediate_size": 40, "num_hidden_layers": 4, "head_dim": 8}
    sizes |= {"num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 256, "sliding_window": 7}
    types = types if kind == "gemma2" else types[::-1]
    options = sizes | {"layer_types": types, "eos_token_id": None, "bos_token_id": 1}
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(kind, **options)).eval()
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.data *= 12
        layer.self_attn.v_proj.weight.data *= 12
    return model.to(dtype)


both = pytest.mark.parametrize("kind", ["gemma2", "gemma3_text"])


@both
@pytest.mark.parametrize("beams", [1, 3])
def test_16_bits_beside_windows_are_the_identity(kind, beams):
    """Far past the window, a 16-bit network generates what it does with transformers' own cache."""
    model, prompts = gemma(kind, torch.bfloat16), tokens(2, 19)
    options = {"max_new_tokens": 40, "num_beams": beams, "do_sample": False, "attention_mask": torch.ones_like(prompts)}
    ours = model.generate(prompts, past_key_values=make_cache(EXACT, model.config), **options)
    theirs = model.generate(prompts, past_key_values=transformers.DynamicCache(config=model.config), **options)
    assert torch.equal(ours, theirs)


@both
@pytest.mark.parametrize("text", [CACHES[2], CACHES[5]])
def test_windows_stay_in_16_bits(kind, text):
    """Layers with a window hold its tokens but one in 2 bytes a number, and pieces of `room()` change no logit."""
    model, ids = gemma(kind, torch.float64), tokens(2, 60)
    with torch.inference_mode():
        cache = make_cache(text, model.config)
        stepped = torch.cat([model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(60)], 1)
        windows = [layer for layer in cache.layers if layer.is_sliding]
        assert [layer.is_sliding for layer in cache.layers] == [t[0] == "s" for t in model.config.layer_types]
        assert [layer.bytes_held() for layer in windows] == [2 * 2 * (2 * 6 * 2 * 8)] * 2
        assert cache.bytes_held() == sum(layer.bytes_held() for layer in cache.layers)
        assert all(t.untyped_storage().nbytes() == 2 * t.numel() for w in windows for t in (w.keys, w.values))
        cache, first, pieces = make_cache(text, model.config), 0, []
        while first < 60:
            last = min(first + cache.room(), 60)
            pieces.append(model(ids[:, first:last], past_key_values=cache).logits)
            first = last
        at_once = model(ids, past_key_values=make_cache(text, model.config)).logits
    near = 1e-5 if kind == "gemma2" else 1e-9  # whose softmax is float32
    torch.testing.assert_close(torch.cat(pieces, 1), stepped, rtol=0, atol=near * float(stepped.abs().max()))
    assert (at_once - stepped).abs().max() > 100 * near * stepped.abs().max()


def test_sabotage_a_forgotten_tensor_is_caught(monkeypatch):
    """Reordering that leaves the metadata behind, and a view in place of a copy, break laws."""
    keep = lambda self, batch: replace(self, codes=self.codes[batch])  # noqa: E731
    text = CACHES[2]
    with monkeypatch.context() as patch, pytest.raises((AssertionError, RuntimeError)):
        patch.setattr(Packed, "at", keep)
        test_reorder_is_feeding_in_that_order(text)
    view = lambda self, rows: replace(  # noqa: E731
        self, codes=self.codes[:, :, rows], scale=self.scale[:, :, rows], low=self.low[:, :, rows]
    )
    with monkeypatch.context() as patch, pytest.raises(AssertionError):
        patch.setattr(Packed, "__getitem__", view)
        test_bytes_held_are_real(text)

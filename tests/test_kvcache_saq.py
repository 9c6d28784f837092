"""SAQ against a slow reference in numpy, its schedule, its bytes, and KIVI as its two-level case."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from laws_kvcache import feed, layer_of
from tiny_lm import config, llama, states, tokens, transformers

from quantkit.caches import make_cache
from quantkit.errors import InputError
from quantkit.kvcache import saq


def bits_by_age(length, levels, block, sink):
    """Bits of each token, oldest first, from the definition: how many whole blocks have been completed after it."""
    after = max(length - sink, 0)
    return [
        16
        if i < sink or i - sink >= after // block * block
        else levels[min(1 + after // block - 1 - (i - sink) // block, len(levels) - 1)]
        for i in range(length)
    ]


def slow(keys, values, levels, block, group, sink, width):
    """Keys and values (tokens, channels) of one head after all tokens, one number at a time.

    Scale and minimum of a group are as in the cache (float16, made at levels[1]); the first code of a number then
    goes to the nearest of the levels that its age has.
    """
    length, channels = keys.shape
    ages = bits_by_age(length, levels, block, sink)
    top = 2 ** levels[1] - 1
    out = [x.astype(np.float16).astype(np.float64) for x in (keys, values)]
    given = [x.astype(np.float16).astype(np.float32) for x in (keys, values)]
    done = sink + (length - sink) // block * block
    cells = [(0, [(t, c) for t in range(g, g + group)]) for g in range(sink, done, group) for c in range(channels)]
    cells += [(1, [(t, c) for c in range(g, g + width)]) for t in range(sink, done) for g in range(0, channels, width)]
    for which, cell in cells:
        numbers = [given[which][at] for at in cell]
        low = np.float16(min(numbers))
        scale = np.float16(np.float32(max(numbers) - min(numbers)) / np.float32(top))
        for at, number in zip(cell, numbers, strict=True):
            code = np.rint(np.clip((number - np.float32(low)) / np.float32(scale), 0, top)) if scale else 0
            k = top // (2 ** ages[at[0]] - 1)
            level = min(range(top // k + 1), key=lambda j, code=code, k=k: abs(code - j * k))
            out[which][at] = float(low) + level * k * float(scale)
    return out


@pytest.mark.parametrize(
    ("levels", "block", "group", "sink"),
    [("16-8-4-2", 16, 8, 0), ("16-8-4", 24, 8, 3), ("16-4", 16, 16, 1), ("16-8-2", 8, 8, 5), ("16-4-2", 16, 8, 0)],
)
def test_arithmetic_equals_the_slow_reference(levels, block, group, sink):
    """Every cached number is the slow reference's, for 1 to 6 blocks of tokens, stepped one by one."""
    text = f"saq:levels={levels},block={block},group={group},sink={sink}"
    keys, values = states(1, 6 * block + 5)
    layer, done = layer_of(text, kv_heads=2), 0
    for length in (sink + block, sink + 2 * block + 1, sink + 3 * block - 1, 4 * block + 3, 6 * block + 5):
        feed(layer, keys, values, done, length, step=1)
        done = length
        got = layer.dequantized()
        for head in range(2):
            wanted = slow(
                *(x[0, head, :length].numpy() for x in (keys, values)), saq.parse_levels(levels), block, group, sink, 8
            )
            for g, w in zip(got, wanted, strict=True):
                np.testing.assert_allclose(g[0, head].numpy(), w, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("text", ["16-8-4-2", "16-8-4", "16-4-2", "16-2", "16-8-2"])
@pytest.mark.parametrize("sink", [0, 3])
def test_bits_go_by_age(text, sink):
    """After each of the first 6 blocks of tokens the bits of every token are those of its age, and order is kept."""
    levels, block = saq.parse_levels(text), 8
    layer = layer_of(f"saq:levels={text},block={block},group=8,sink={sink}")
    ramp = torch.arange(6 * block + 4.0)[None, None, :, None].expand(1, 2, -1, 8) * 16
    for t in range(1, ramp.shape[2] + 1):
        feed(layer, ramp, ramp, t - 1, t)
        assert layer.bits_held() == bits_by_age(t, levels, block, sink), t
        assert layer.get_seq_length() == t
        assert layer.room() == (sink + block - t if t < sink else block - (t - sink) % block)
    order = layer.dequantized()[1][0, 0, :, 0]
    assert torch.equal(order, ramp[0, 0, :, 0])  # constant over a token's channels, so values are exact


@pytest.mark.parametrize("values", ["token", "heads"])
@pytest.mark.parametrize("levels", ["16", "16-8-4", "16-8-4-2", "16-4"])
def test_bytes_follow_the_formula(levels, values):
    """Bytes held are numbers * bits / 8 by age, and 4 a group of quantized numbers: 32 / group bits each."""
    heads, dim, layers, batch, block, group, sink = 4, 16, 3, 2, 32, 32, 2
    sizes = config(heads=4, kv_heads=heads, dim=dim, layers=layers)
    text = f"saq:levels={levels},block={block},group={group},sink={sink},values={values}"
    width = 32 if values == "heads" else 16
    for length in (1, 2, 33, 34, 66, 130, 161):
        cache = make_cache(text, sizes)
        k, v = states(batch, length, heads=heads, dim=dim)
        for layer in cache.layers:
            feed(layer, k, v)
        bits = bits_by_age(length, saq.parse_levels(levels), block, sink) if levels != "16" else [16] * length
        keys = sum(b + (32 / group if b < 16 else 0) for b in bits)
        vals = sum(b + (32 / width if b < 16 else 0) for b in bits)
        assert cache.bytes_held() == layers * batch * heads * dim * (keys + vals) / 8


def test_two_levels_are_kivi():
    """With two levels the keys are KIVI's, number for number; SAQ moves values with them, KIVI keeps the newest."""
    keys, values = states(2, 101)
    ours = feed(layer_of("saq:levels=16-2,block=24,group=8"), keys, values, step=1)
    theirs = feed(layer_of("kivi:bits=2,residual=24,group=8"), keys, values, step=1)
    assert torch.equal(ours.dequantized()[0], theirs.dequantized()[0])
    assert torch.equal(ours.dequantized()[1][:, :, : 101 - 24], theirs.dequantized()[1][:, :, : 101 - 24])
    assert torch.equal(ours.floor.keys.codes, theirs.old_keys.codes)


def test_the_way_down_does_not_show():
    """How a block came down does not show: 16-8-4-2 and 16-8-2 end in the same codes and metadata."""
    keys, values = states(2, 64)
    a = feed(layer_of("saq:levels=16-8-4-2,block=8,group=8"), keys, values, step=1)
    b = feed(layer_of("saq:levels=16-8-2,block=8,group=8"), keys, values, step=1)
    rows = slice(0, a.floor.keys.codes.shape[2])
    assert torch.equal(a.floor.keys.codes, b.floor.keys.codes[:, :, rows])
    assert torch.equal(a.floor.keys.scale, b.floor.keys.scale[:, :, rows])


def test_blocks_keep_their_bits_after_a_crop():
    """A crop gives no bits back: the stair starts anew behind what is left."""
    layer = feed(layer_of("saq:levels=16-8-4-2,block=8,group=8"), *states(1, 50))
    assert layer.bits_held() == [2] * 32 + [4] * 8 + [8] * 8 + [16] * 2
    layer.crop(-13)  # 37 left: 4 blocks at 2 bits and 5 tokens of one at 4
    assert layer.bits_held() == [2] * 32 + [16] * 5
    feed(layer, *states(1, 11, seed=1))
    assert layer.bits_held() == [2] * 32 + [4] * 8 + [8] * 8


def test_old_keys_change_the_model_less_with_more_bits():
    """Logits through the cache are nearer to those without it the more bits its levels have."""
    model, ids = llama(), tokens(2, 96)
    with torch.inference_mode():
        wanted = model(ids).logits
        errors = []
        for levels in ("16", "16-8", "16-8-4", "16-8-4-2", "16-2"):
            cache = make_cache(f"saq:levels={levels},block=16,group=8", model.config)
            parts = [model(piece, past_key_values=cache).logits for piece in ids.split(16, dim=1)]
            errors.append((torch.cat(parts, 1) - wanted).square().mean().item())
    assert errors == sorted(errors) and errors[0] < 0.1 * errors[1]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("levels=16-8-3", "16-8-4 or 16-8-4-2"),
        ("levels=8-4", "16, then"),
        ("levels=16-4-8", "fewer"),
        ("levels=16--4", "accepted"),
        ("levels=", "accepted"),
        ("block=100", "multiple of group=32"),
        ("block=0", "multiple of group"),
        ("group=12", "multiples of 8"),
        ("group=0", "multiples of 8"),
        ("sink=-1", "negative"),
        ("group=64,block=64,values=heads", "16 channels"),
    ],
)
def test_bad_options_are_named(text, says):
    """Options that do not fit are refused with what is accepted."""
    with pytest.raises(InputError, match=says):
        make_cache(f"saq:{text}", config())


def test_networks_of_windows_alone_are_refused():
    """Where every layer has a sliding window there is nothing to pack."""
    sliding = transformers.MistralConfig(num_hidden_layers=2, sliding_window=16)
    with pytest.raises(InputError, match="sliding_attention alone; accepted: some of full_attention"):
        make_cache("saq:levels=16-8-4", sliding)

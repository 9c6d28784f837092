"""KIVI: which tokens are quantized when, its bytes, and refusals."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from laws_kvcache import feed, layer_of
from tiny_lm import config, states

from quantkit.caches import make_cache
from quantkit.errors import InputError


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_residuals_are_as_published(bits):
    """Keys: all but the newest t mod R; values: all but the newest R; both stay exact in 16 bits until then."""
    residual, keys, values = 24, *states(1, 80)
    layer = layer_of(f"kivi:bits={bits},residual={residual},group=8")
    for t in range(1, 81):
        feed(layer, keys, values, t - 1, t)
        k, v = layer.dequantized()
        first_key, first_value = t // residual * residual, max(t - residual, 0)
        assert torch.equal(k[:, :, first_key:], keys[:, :, first_key:t].half().float())
        assert torch.equal(v[:, :, first_value:], values[:, :, first_value:t].half().float())
        assert layer.keys.shape[2] == t - first_key and layer.values.shape[2] == t - first_value


@pytest.mark.parametrize("bits", [2, 4])
def test_arithmetic_is_the_papers(bits):
    """Quantized keys (groups of 8 tokens of a channel) and values (8 channels of a token) are those of the formula."""
    keys, values = states(2, 48)
    layer = feed(layer_of(f"kivi:bits={bits},residual=16,group=8"), keys, values)
    k, v = (x.numpy() for x in layer.dequantized())

    def formula(x):  # groups along the last axis
        low, scale = x.min(-1, keepdims=True), np.ptp(x, axis=-1, keepdims=True) / np.float32(2**bits - 1)
        low, scale = (m.astype(np.float16).astype(np.float32) for m in (low, scale))
        return np.rint(np.clip((x - low) / scale, 0, 2**bits - 1)) * scale + low

    x = keys.half().float().numpy().reshape(2, 2, 6, 8, 8)
    np.testing.assert_allclose(
        k.reshape(x.shape), np.moveaxis(formula(np.moveaxis(x, 3, 4)), 4, 3), rtol=1e-6, atol=1e-6
    )
    x = values.half().float().numpy()
    np.testing.assert_allclose(v[:, :, :32], formula(x[:, :, :32]), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("values", ["token", "heads"])
def test_bytes_follow_the_formula(values):
    """16 bits a recent number, `bits` + 32 / group an old one."""
    heads, dim, batch, residual = 4, 16, 2, 64
    width = 32 if values == "heads" else 16
    for length in (3, 64, 65, 128, 150):
        cache = make_cache(f"kivi:bits=2,residual={residual},values={values}", config(kv_heads=heads, heads=4, dim=dim))
        for layer in cache.layers:
            feed(layer, *states(batch, length, heads=heads, dim=dim))
        old_keys, old_values = length // residual * residual, max(length - residual, 0)
        bits = 16 * (length - old_keys) + (2 + 32 / 32) * old_keys
        bits += 16 * (length - old_values) + (2 + 32 / width) * old_values
        assert cache.bytes_held() == 2 * batch * heads * dim * bits / 8


@pytest.mark.parametrize(
    ("text", "says"),
    [("bits=3", "8, 4, 2"), ("residual=100", "multiple of group"), ("residual=0", "multiple"), ("group=4", "of 8")],
)
def test_bad_options_are_named(text, says):
    """Options that do not fit are refused with what is accepted."""
    with pytest.raises(InputError, match=says):
        make_cache(f"kivi:{text}", config())

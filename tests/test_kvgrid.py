"""Grids of the key-value caches: halving the bits of a code is exact, codes pack, groups stay apart."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantkit.errors import InputError
from quantkit.kvgrid import BITS, demote, dequantize, grouped, pack, quantize, quotient, ungrouped, unpack


def divide(codes, bits, fewer):
    """Codes at fewer bits, as a cache does it."""
    k = quotient(bits, fewer)
    return (codes + k // 2) // k


def shifted(codes, n):
    """PM-KVQ's division-free form of 2n -> n bits (arXiv 2505.18610)."""
    q = codes
    return ((q << 2 * n) - (q << n) + q + (1 << 3 * n - 1) - (1 << 2 * n - 1) + (1 << n - 1)) >> 3 * n


def test_chains_agree_with_one_step():
    """For each of the 256 codes 8 -> 4 -> 2 gives what 8 -> 2 gives at once, by 17, 5 and 85."""
    c = np.arange(256)
    four = divide(c, 8, 4)
    two = divide(four, 4, 2)
    assert np.array_equal(four, (c + 8) // 17)
    assert np.array_equal(two, (c + 42) // 85) and np.array_equal(two, divide(c, 8, 2))


@pytest.mark.parametrize("n", [1, 2, 4, 8])
def test_division_equals_the_published_shift(n):
    """Dividing by 2^n + 1 with rounding is PM-KVQ's shift for every code of 2n bits, 16 included."""
    c = np.arange(2 ** (2 * n), dtype=np.int64)
    assert np.array_equal(shifted(c, n), (c + 2 ** (n - 1)) // (2**n + 1))


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=50, deadline=None)
def test_a_cascade_is_the_direct_grid(seed):
    """In float64 the codes of 8 -> 4 -> 2 bits are those of direct quantization, exact half-way points included."""
    rng = np.random.default_rng(seed)
    low, span = rng.normal() * 10, np.exp(rng.normal() * 3)
    x = rng.random(48)
    x[:20] = (rng.integers(0, 510, 20) + rng.integers(0, 2, 20)) / 510  # steps and half steps of 8 bits
    codes = {b: np.rint(x * (2**b - 1)).astype(int) for b in BITS}
    assert np.array_equal(divide(codes[8], 8, 4), codes[4])
    assert np.array_equal(divide(codes[4], 4, 2), codes[2])
    p = quantize(torch.tensor(low + span * x, dtype=torch.float32).reshape(1, 1, 1, 1, 48), 8)
    once, twice = demote(p, 2), demote(demote(p, 4), 2)
    assert torch.equal(once.codes, twice.codes) and torch.equal(once.scale, p.scale) and torch.equal(once.low, p.low)


@pytest.mark.parametrize("bits", [4, 2])
def test_a_demoted_code_is_the_nearest(bits):
    """After demotion each value is the level nearest to the 8-bit value it had."""
    x = torch.randn(2, 3, 4, 5, 16, generator=torch.Generator().manual_seed(3)) * 3 + 20
    p = quantize(x, 8)
    lower = demote(p, bits)
    levels = p.low.double()[..., None, None] + (
        torch.arange(2**bits) * quotient(8, bits) * p.scale.double()[..., None, None]
    )
    best = (levels - dequantize(p).double()[..., None]).abs().amin(-1)
    error = (dequantize(lower).double() - dequantize(p).double()).abs()
    torch.testing.assert_close(error, best, rtol=0, atol=1e-5)


@pytest.mark.parametrize("bits", BITS)
def test_codes_pack_and_unpack(bits):
    """All codes survive packing, 8 / bits in a byte, the first lowest."""
    codes = torch.arange(2**bits, dtype=torch.uint8).repeat(8).reshape(2, -1)
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8 and packed.numel() * 8 == codes.numel() * bits
    assert torch.equal(unpack(packed, bits), codes)
    assert packed[0, 0] == sum(int(c) << (i * bits) for i, c in enumerate(codes[0, : 8 // bits].tolist()))


@pytest.mark.parametrize("axis", ["channel", "token", "heads"])
def test_groups_are_what_they_say(axis):
    """A group holds neighbours of one channel, of one token and head, or of one token; ungrouping undoes it."""
    b, h, t, d = 2, 3, 16, 8
    x = torch.arange(b * h * t * d).reshape(b, h, t, d)
    g = grouped(x, axis, 8)
    assert torch.equal(ungrouped(g, axis, h), x)
    where = torch.stack(torch.unravel_index(g, x.shape))  # (4, ..., size): sequence, head, token, channel
    fixed = {"channel": (0, 1, 3), "token": (0, 1, 2), "heads": (0, 2)}[axis]
    assert all((where[i] == where[i][..., :1]).all() for i in fixed)
    rows = where[2].amin((3, 4))[0, 0]
    assert (rows[1:] > rows[:-1]).all()  # rows go with time


@pytest.mark.parametrize("bits", BITS)
def test_values_are_within_half_a_step(bits):
    """Quantization errs by half a step at most, but for float16 scales and minima; extremes are codes 0 and top."""
    x = torch.randn(1, 2, 6, 4, 32, generator=torch.Generator().manual_seed(bits)) * 2 + 1
    p = quantize(x, bits)
    step = p.scale.float()[..., None]
    assert ((dequantize(p) - x).abs() <= 0.5 * step + 2**-10 * x.abs().amax() * 2).all()
    codes = unpack(p.codes, bits)
    assert codes.amin() == 0 and codes.amax() == 2**bits - 1


def test_tiny_ranges_become_their_minimum():
    """A range below float16's smallest scale gives codes 0 and the float16 minimum."""
    x = 0.25 + torch.linspace(0, 1e-9, 8).reshape(1, 1, 1, 1, 8)
    p = quantize(x, 8)
    assert not p.codes.any() and torch.equal(dequantize(p), torch.full_like(x, 0.25))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -7e4])
def test_what_float16_cannot_hold_is_refused(bad):
    """NaN, infinity and minima beyond float16 raise."""
    with pytest.raises(InputError, match="float16"):
        quantize(torch.tensor([0.0, bad] * 4).reshape(1, 1, 1, 1, 8), 4)


def test_sabotage_a_shift_and_a_third_bit_are_caught(monkeypatch):
    """Plain shifts in place of the division, and a step through 3 bits, break the chain."""
    c = np.arange(256)
    assert not np.array_equal(c >> 4, divide(c, 8, 4))
    assert not np.array_equal(divide(c, 8, 4) >> 2, divide(c, 8, 2))
    seven = np.rint(c * 7 / 255).astype(int)
    assert not np.array_equal(np.rint(seven * 3 / 7).astype(int), divide(c, 8, 2))
    monkeypatch.setitem(globals(), "divide", lambda codes, bits, fewer: codes >> (bits - fewer))
    with pytest.raises(AssertionError):
        test_chains_agree_with_one_step()

"""The integer reference agrees with floating point where that is exact, and is exact beyond."""

from __future__ import annotations

import numpy as np
import pytest

from hwmodel.formats import bits, decode, parse
from hwmodel.reference import forward, quantize, to_units


@pytest.mark.parametrize(
    ("weight", "act"), [("int4", "uint8"), ("e2m1", "e3m2"), ("ternary", "int8"), ("int3", "e2m2")]
)
def test_forward_is_the_matrix_product(weight: str, act: str) -> None:
    """Scaled integer sums equal the float64 product of the decoded, scaled operands."""
    rng = np.random.default_rng(1)
    w, a = parse(weight), parse(act)
    wv, xv = quantize(rng.normal(size=(5, 12)), w, 0.3), quantize(rng.normal(size=(7, 12)), a, 0.1)
    scale = rng.uniform(0.5, 2, size=(5, 3))
    result = forward(wv, w, scale, xv, a, 0.25, bias=np.arange(5.0))
    dense = np.vectorize(lambda c: decode(int(c), w))(wv) * np.repeat(scale, 4, axis=1)
    inputs = np.vectorize(lambda c: decode(int(c), a))(xv) * 0.25
    np.testing.assert_allclose(result.values, inputs @ dense.T + np.arange(5.0), rtol=1e-12, atol=1e-12)


def test_sums_beyond_64_bits_are_exact() -> None:
    """Sums of the widest minifloats are Python integers and lose nothing."""
    fmt = parse("e6m1")
    top = np.full((1, 4), 2 ** (bits(fmt) - 1) - 1)
    result = forward(top, fmt, 1.0, top, fmt, 1.0)
    assert result.sums[0, 0, 0] == 4 * (3 * 2**62) ** 2
    assert result.acc_bits == (4 * (3 * 2**62) ** 2).bit_length() + 1


def test_reserved_codes_are_refused() -> None:
    """A code that is no number raises, naming it."""
    with pytest.raises(ValueError, match="code 2 of ternary"):
        to_units(np.array([2]), parse("ternary"))

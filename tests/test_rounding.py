"""Rounding: what the tensor functions promise beyond the laws of formats."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from strategies import ALL_FORMATS

from hwmodel.formats import parse
from quantkit.rounding import is_pow2, pow2_at_least, round_to, rounder


@pytest.mark.parametrize("fmt", ALL_FORMATS, ids=str)
def test_argument_stays(fmt):
    """round_to leaves its argument alone and keeps shape and dtype."""
    for dtype in (torch.float32, torch.float64):
        x = torch.linspace(-3.3, 3.7, 24, dtype=dtype).reshape(2, 3, 4)
        before = x.clone()
        y = round_to(x, fmt)
        assert torch.equal(x, before)
        assert y.shape == x.shape and y.dtype == dtype


@pytest.mark.parametrize("fmt", ALL_FORMATS, ids=str)
def test_nan_stays(fmt):
    """NaN stays NaN and does not spread."""
    y = round_to(torch.tensor([float("nan"), 0.3]), fmt)
    assert y[0].isnan() and not y[1].isnan()


@pytest.mark.parametrize("name", ["int4", "e2m1", "ternary", "binary"])
def test_empty_and_strided(name):
    """Empty tensors and transposed views round like any other."""
    fmt = parse(name)
    assert round_to(torch.empty(0, 3), fmt).shape == (0, 3)
    x = torch.randn(5, 7, generator=torch.Generator().manual_seed(1)) * 3
    assert torch.equal(round_to(x.T, fmt), round_to(x, fmt).T)


def test_other_dtypes_are_refused():
    """Half precision and integers raise TypeError naming the dtype."""
    for dtype in (torch.float16, torch.int32):
        with pytest.raises(TypeError, match=str(dtype)):
            round_to(torch.zeros(2, dtype=dtype), parse("int4"))


@pytest.mark.parametrize("name", ["int4", "uint3n", "e4m3fn", "ternary", "binary"])
def test_in_place(name):
    """What rounder gives writes into the array it is given and returns it."""
    x = np.linspace(-9, 9, 37, dtype=np.float32)
    expected = round_to(torch.from_numpy(x.copy()), parse(name)).numpy()
    y = x.copy()
    assert rounder(parse(name))(y) is y
    assert np.array_equal(y, expected)


def test_pow2_at_least():
    """The smallest power of two not below x, exact one ulp around every power of two."""
    powers = torch.exp2(torch.arange(-120, 121).double()).float()
    above = torch.nextafter(powers, torch.tensor(float("inf")))
    below = torch.nextafter(powers, torch.tensor(0.0))
    assert torch.equal(pow2_at_least(powers), powers)
    assert torch.equal(pow2_at_least(below), powers)
    assert torch.equal(pow2_at_least(above), powers * 2)
    assert is_pow2(0.125) and is_pow2(3 * 2.0**-1 - 0.5) and not is_pow2(0.75)

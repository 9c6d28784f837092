"""QTensor: codes, scales, packing."""

from __future__ import annotations

import pytest
import torch
from strategies import ALL_FORMATS, WEIGHT_FORMATS

from hwmodel import formats
from hwmodel.formats import levels, parse
from hwmodel.spec import PerGroup, PerRow, PerTensor
from quantkit.errors import InputError
from quantkit.qtensor import (
    decode,
    dequantize,
    encode,
    expand_scale,
    fit_scale,
    pack,
    quantize,
    units_of,
    unpack,
    values_of,
)
from quantkit.rounding import is_pow2, round_to

GRANULARITIES = [PerTensor(), PerRow(), PerGroup(3)]


def weight(rows=5, columns=12, seed=11):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.37


@pytest.mark.parametrize("fmt", ALL_FORMATS, ids=str)
def test_codes_are_those_of_the_specification(fmt):
    """Vectorized encode and decode equal the scalar ones on every value."""
    values = torch.tensor(levels(fmt)[:: max(1, len(levels(fmt)) // 700)])
    codes = encode(values, fmt)
    assert codes.tolist() == [formats.encode(v, fmt) for v in values.tolist()]
    assert torch.equal(decode(codes, fmt), values)


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
@pytest.mark.parametrize("name", WEIGHT_FORMATS)
def test_scale_shapes_and_fixed_points(name, granularity):
    """Scales have the documented shape, and a quantized weight is quantized to itself."""
    fmt, w = parse(name), weight()
    scale = fit_scale(w, fmt, granularity, "mse")
    shapes = {"tensor": (1, 1), "row": (5, 1), "group3": (5, 4)}
    assert tuple(scale.shape) == shapes[str(granularity)]
    q = quantize(w, scale, fmt, granularity)
    again = quantize(dequantize(q), scale, fmt, granularity)
    assert torch.equal(q.codes, again.codes)
    assert q.bits == 60 * formats.bits(fmt) + 32 * scale.numel()


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
@pytest.mark.parametrize("name", WEIGHT_FORMATS)
def test_mse_is_not_worse_than_absmax(name, granularity):
    """The scale of least squared error has no larger error than absmax, percentile, or scales beside it."""
    fmt, w = parse(name), weight(seed=23)

    def error(scale):
        return (dequantize(quantize(w, scale, fmt, granularity)) - w).square().sum().item()

    best = fit_scale(w, fmt, granularity, "mse")
    for rule in ("absmax", "percentile"):
        assert error(best) <= error(fit_scale(w, fmt, granularity, rule, percentile=90)) * (1 + 1e-6)


def test_absmax_lands_on_the_largest_value():
    """With absmax the largest weight of every row becomes the largest value."""
    w = weight()
    q = quantize(w, fit_scale(w, parse("e2m1"), PerRow(), "absmax"), parse("e2m1"), PerRow())
    assert values_of(q).abs().amax(dim=1).tolist() == [6.0] * 5


def test_binary_scale_is_the_mean_magnitude():
    """The least squared error of a binary row is at the mean of its magnitudes."""
    w = weight()
    assert torch.allclose(fit_scale(w, parse("binary"), PerRow(), "mse")[:, 0], w.abs().mean(dim=1))


@pytest.mark.parametrize("rule", ["absmax", "mse", "percentile"])
@pytest.mark.parametrize("name", WEIGHT_FORMATS)
def test_pow2(name, rule):
    """pow2 gives powers of two, the better of the two around the fitted scale."""
    scale = fit_scale(weight(), parse(name), PerRow(), rule, pow2=True)
    assert all(is_pow2(v) for v in scale.flatten().tolist())


@pytest.mark.parametrize("rule", ["absmax", "mse", "percentile"])
def test_zero_rows_get_scale_one(rule):
    """A row of zeros has scale 1 and stays zero."""
    w = weight()
    w[2] = 0
    scale = fit_scale(w, parse("int4"), PerRow(), rule)
    assert scale[2].item() == 1.0
    assert not dequantize(quantize(w, scale, parse("int4"), PerRow()))[2].any()


def test_importance_favours_important_columns():
    """Weighting a column's error more makes the error of that column smaller."""
    w = weight(6, 40)
    w[:, 3] = 2.2 * w.abs().max()
    heavy = torch.ones(40)
    heavy[3] = 1e4
    fmt = parse("int3")
    plain = quantize(w, fit_scale(w, fmt, PerRow(), "importance", importance=torch.ones(40)), fmt, PerRow())
    chosen = quantize(w, fit_scale(w, fmt, PerRow(), "importance", importance=heavy), fmt, PerRow())
    assert (dequantize(chosen) - w)[:, 3].square().sum() < (dequantize(plain) - w)[:, 3].square().sum()
    same = fit_scale(w, fmt, PerRow(), "mse")
    assert torch.equal(same, fit_scale(w, fmt, PerRow(), "importance", importance=torch.ones(40)))


def test_bad_rules_are_named():
    """An unknown rule, and one that lacks what it weighs by, are InputErrors that say so."""
    with pytest.raises(InputError, match="unknown scale rule 'max'"):
        fit_scale(weight(), parse("int4"), PerRow(), "max")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="importance"):
        fit_scale(weight(), parse("int4"), PerRow(), "importance")


def test_expand_scale():
    """Group scales repeat over their columns."""
    scale = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert expand_scale(scale, 6, PerGroup(3))[1].tolist() == [3, 3, 3, 4, 4, 4]


@pytest.mark.parametrize("fmt", ALL_FORMATS, ids=str)
def test_pack_round_trip(fmt):
    """unpack is the inverse of pack, and no bit is wasted."""
    width = formats.bits(fmt)
    codes = torch.randint(0, 2**width, (7, 11), generator=torch.Generator().manual_seed(2))
    codes = codes.to(torch.uint8 if width <= 8 else torch.int32)
    packed = pack(codes, width)
    assert packed.nbytes == -(-77 * width // 8)
    assert torch.equal(unpack(packed, width, (7, 11)), codes)


def test_packing_order():
    """The first code takes the most significant bits."""
    assert pack(torch.tensor([1, 2, 3]), 4).tolist() == [0x12, 0x30]


@pytest.mark.parametrize("fmt", [f for f in ALL_FORMATS if formats.int_max(f) < 2**63], ids=str)
def test_units_are_whole(fmt):
    """Weights in units of the smallest step are whole numbers (of 64 bits: not for e6m1) that give the values back."""
    w = weight()
    q = quantize(w, fit_scale(w, fmt, PerRow(), "absmax"), fmt, PerRow())
    assert torch.equal(torch.from_numpy(units_of(q)).double() * formats.unit(fmt), values_of(q).double())


def test_convolution_weights_keep_their_shape():
    """A convolution's weight is a matrix (out, in * kh * kw) inside and its own shape outside."""
    w = torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(3))
    q = quantize(w, fit_scale(w, parse("int5"), PerGroup(4), "mse"), parse("int5"), PerGroup(4))
    assert q.codes.shape == (4, 12) and q.scale.shape == (4, 3)
    assert dequantize(q).shape == w.shape
    assert torch.equal(values_of(q), round_to(w.flatten(1) / expand_scale(q.scale, 12, PerGroup(4)), parse("int5")))

"""What every number format satisfies, and its agreement with ml_dtypes and gfloat.

The slow scalar functions of `hwmodel.formats` are the specification; everything fast is compared
with them, and they with two libraries that were written without them.
"""

from __future__ import annotations

import math

import gfloat
import ml_dtypes
import numpy as np
import pytest
import torch
from strategies import ALL_FORMATS, boundary_numbers, midpoints, random_numbers

from hwmodel import formats
from hwmodel.formats import BINARY, Float, Int, decode, encode, levels, max_value, min_value, nearest, parse
from quantkit.rounding import round_to, rounder

FLOATS = [f for f in ALL_FORMATS if isinstance(f, Float)]
FINITE = [f for f in FLOATS if f.special == "none"]


@pytest.mark.parametrize("fmt", ALL_FORMATS, ids=str)
def test_name_round_trip(fmt):
    """parse is the inverse of str."""
    assert parse(str(fmt)) == fmt


@pytest.mark.parametrize("fmt", ALL_FORMATS, ids=str)
def test_levels_are_fixed_points(fmt):
    """Every value rounds to itself, and its code decodes to it."""
    for value in levels(fmt) if len(levels(fmt)) < 1000 else levels(fmt)[::97]:
        assert nearest(value, fmt) == value
        assert decode(encode(value, fmt), fmt) == value


@pytest.mark.parametrize("fmt", [f for f in ALL_FORMATS if len(levels(f)) < 1000 and f != BINARY], ids=str)
def test_midpoints_go_to_even_and_their_neighbours_to_the_nearer(fmt):
    """A midpoint rounds to the even multiple of the step above it; one ulp aside, the nearer value wins."""
    values = levels(fmt)
    for low, high, middle in zip(values[:-1], values[1:], midpoints(fmt), strict=True):
        step = high - low
        even = low if round(low / step) % 2 == 0 and low / step == round(low / step) else high
        if isinstance(fmt, Float) and fmt.man == 0 and middle != 0 and abs(middle) > 2 ** formats.min_exponent(fmt):
            even = max(low, high, key=abs)  # one significand, 1.0: halfway to 2.0, which counts as even
        assert nearest(middle, fmt) == even
        assert nearest(math.nextafter(middle, -math.inf), fmt) == low
        assert nearest(math.nextafter(middle, math.inf), fmt) == high


@pytest.mark.parametrize("fmt", ALL_FORMATS, ids=str)
def test_saturation(fmt):
    """Beyond the largest and smallest value, both infinities included, the result is that value."""
    for x in (1.0001 * max_value(fmt) + 1, 1e300, math.inf):
        assert nearest(x, fmt) == max_value(fmt) == levels(fmt)[-1]
        assert nearest(-x if min_value(fmt) else -abs(x), fmt) == min_value(fmt) == levels(fmt)[0]


@pytest.mark.parametrize("fmt", ALL_FORMATS, ids=str)
def test_nearest_is_nearest(fmt):
    """No value is closer than the one chosen."""
    values = np.array(levels(fmt))
    for x in random_numbers(fmt, 60, seed=5).astype(float):
        assert abs(nearest(x, fmt) - x) == np.abs(values - x).min()


@pytest.mark.parametrize("fmt", ALL_FORMATS, ids=str)
def test_fast_rounding_equals_the_specification(fmt):
    """round_to in float32 and float64 and `rounder` equal `nearest` at every boundary and at random numbers."""
    x = np.concatenate([boundary_numbers(fmt), random_numbers(fmt, 300, seed=17)])
    expected = np.array([nearest(float(v), fmt) for v in x])
    assert np.array_equal(round_to(torch.from_numpy(x), fmt).numpy(), expected)
    assert np.array_equal(round_to(torch.from_numpy(x.astype(np.float64)), fmt).numpy(), expected)
    assert np.array_equal(rounder(fmt)(x.copy()), expected)


@pytest.mark.parametrize("fmt", ALL_FORMATS, ids=str)
def test_one_ulp_in_float64(fmt):
    """round_to in float64 tells a midpoint from its float64 neighbours."""
    middle = np.array(midpoints(fmt)[:500])
    x = np.concatenate([middle, np.nextafter(middle, -np.inf), np.nextafter(middle, np.inf)])
    expected = np.array([nearest(float(v), fmt) for v in x])
    assert np.array_equal(round_to(torch.from_numpy(x), fmt).numpy(), expected)


@pytest.mark.parametrize("fmt", FLOATS, ids=str)
def test_just_below_every_power_of_two(fmt):
    """nextafter(2^k, 0) is in the binade below 2^k for every k, where floor(log2(x)) in float32 is not."""
    x = np.nextafter(np.exp2(np.arange(-126, 128)).astype(np.float32), np.float32(0))
    expected = np.array([nearest(float(v), fmt) for v in x])
    assert np.array_equal(round_to(torch.from_numpy(x), fmt).numpy(), expected)
    assert np.array_equal(round_to(torch.from_numpy(-x), fmt).numpy(), -expected)


TABLE = """
e1m1 0 3 1 3            e1m5 0 3.9375 2^-4 63
e1m2 0 3.5 .5 7         e2m4 1 7.75 2^-4 124
e2m1 1 6 .5 12          e3m3 3 30 2^-5 960
e1m3 0 3.75 .25 15      e4m2 7 448 2^-8 114688
e2m2 1 7 .25 28         e5m1 15 98304 2^-15 3*2^30
e3m1 3 24 .125 192      e1m6 0 3.96875 2^-5 127
e1m4 0 3.875 .125 31    e2m5 1 7.875 2^-5 252
e2m3 1 7.5 .125 60      e3m4 3 31 2^-6 1984
e3m2 3 28 2^-4 448      e4m3 7 480 2^-9 245760
e4m1 7 384 2^-7 49152   e5m2 15 114688 2^-16 492608*2^14
e6m1 31 3*2^31 2^-31 3*2^62
"""
ROWS = [entry.split() for line in TABLE.strip().splitlines() for entry in line.split("   ") if entry.strip()]


def test_table_of_formats():
    """Bias, largest value, smallest subnormal and largest integer are those of shared/design/minifloat_fpga.md."""
    assert len(ROWS) == 21
    for name, bias, top, smallest, int_max in ROWS:
        fmt = parse(name)
        numbers = [eval(text.replace("^", "**")) for text in (bias, top, smallest, int_max)]
        computed = [formats.bias(fmt), max_value(fmt), formats.unit(fmt), formats.int_max(fmt)]
        if name == "e5m2":  # the table gives it to five digits
            assert computed[:3] == numbers[:3]
            assert computed[3] == 114688 * 2**16
        else:
            assert computed == numbers


VALUES = {
    "e1m1": "0 1 2 3",
    "e1m2": "0 .5 1 1.5 2 2.5 3 3.5",
    "e2m1": "0 .5 1 1.5 2 3 4 6",
    "e2m2": "0 .25 .5 .75 1 1.25 1.5 1.75 2 2.5 3 3.5 4 5 6 7",
    "e3m1": "0 .125 .25 .375 .5 .75 1 1.5 2 3 4 6 8 12 16 24",
}


@pytest.mark.parametrize("name", VALUES)
def test_published_values(name):
    """The positive values are the published ones, and the negative ones mirror them."""
    positive = [float(v) for v in VALUES[name].split()]
    assert list(levels(parse(name))) == sorted({s * v for v in positive for s in (-1, 1)})


@pytest.mark.parametrize("man", range(1, 7))
def test_e1_is_a_narrow_integer(man):
    """E1My has the values of the narrow integer of y + 2 bits times 2^(1 - y)."""
    integers = levels(Int(man + 2, narrow=True))
    assert levels(Float(1, man)) == tuple(v * 2.0 ** (1 - man) for v in integers)


ORACLES = {
    "float8_e4m3fn": "e4m3fn",
    "float8_e5m2": "e5m2ieee",
    "float8_e3m4": "e3m4ieee",
    "float8_e4m3": "e4m3ieee",
    "float6_e2m3fn": "e2m3",
    "float6_e3m2fn": "e3m2",
    "float4_e2m1fn": "e2m1",
    "int4": "int4",
    "uint4": "uint4",
    "int2": "int2",
    "uint2": "uint2",
}


@pytest.mark.parametrize("theirs", ORACLES)
def test_ml_dtypes_decodes_alike(theirs):
    """Every bit pattern has the value that ml_dtypes gives it, infinities and NaN included."""
    fmt = parse(ORACLES[theirs])
    width = formats.bits(fmt)
    codes = np.arange(2**width, dtype=np.uint8)
    if isinstance(fmt, Int):  # its integers are converted by value, not viewed
        signed = np.where((codes >= 2 ** (width - 1)) & fmt.signed, codes.astype(int) - 2**width, codes)
        expected = signed.astype(getattr(ml_dtypes, theirs)).astype(np.float64)
    else:
        expected = codes.view(getattr(ml_dtypes, theirs)).astype(np.float64)
    assert np.array_equal(np.array([decode(int(c), fmt) for c in codes]), expected, equal_nan=True)


@pytest.mark.parametrize("theirs", [t for t in ORACLES if t.startswith("float")])
def test_ml_dtypes_rounds_alike(theirs):
    """Within the range, rounding equals ml_dtypes' (which overflows to infinity or NaN where we saturate)."""
    fmt = parse(ORACLES[theirs])
    x = np.concatenate([boundary_numbers(fmt, 400), random_numbers(fmt, 4000, seed=3)])
    x = x[np.abs(x) <= max_value(fmt)]
    expected = x.astype(getattr(ml_dtypes, theirs)).astype(np.float32)
    assert np.array_equal(round_to(torch.from_numpy(x), fmt).numpy(), expected)


def gfloat_info(fmt: Float) -> gfloat.FormatInfo:
    """The format in gfloat's terms."""
    nans = {"none": 0, "fn": 1, "ieee": 2**fmt.man - 1}[fmt.special]
    return gfloat.FormatInfo(
        name=str(fmt),
        k=formats.bits(fmt),
        precision=fmt.man + 1,
        bias=formats.bias(fmt),
        is_signed=True,
        domain=gfloat.Domain.Extended if fmt.special == "ieee" else gfloat.Domain.Finite,
        has_nz=True,
        num_high_nans=nans,
        has_subnormals=True,
        is_twos_complement=False,
    )


@pytest.mark.parametrize("fmt", FLOATS, ids=str)
def test_gfloat_decodes_alike(fmt):
    """Every bit pattern has the value that gfloat gives it."""
    codes = range(2 ** formats.bits(fmt))
    expected = [gfloat.decode_float(gfloat_info(fmt), code).fval for code in codes]
    assert np.array_equal([decode(code, fmt) for code in codes], expected, equal_nan=True)


@pytest.mark.parametrize("fmt", [f for f in FLOATS if f.man > 0], ids=str)
def test_gfloat_rounds_alike(fmt):
    """Rounding equals gfloat's to nearest even with saturation, scalar and array."""
    x = np.concatenate([boundary_numbers(fmt, 100), random_numbers(fmt, 200, seed=4)]).astype(np.float64)
    info, even = gfloat_info(fmt), gfloat.RoundMode.TiesToEven
    ours = round_to(torch.from_numpy(x), fmt).numpy()
    assert np.array_equal(ours, [gfloat.round_float(info, float(v), even, sat=True) for v in x])
    assert np.array_equal(ours, gfloat.round_ndarray(info, x, even, sat=True))


@pytest.mark.parametrize("fmt", [f for f in FINITE if f.man == 0], ids=str)
def test_gfloat_differs_only_at_ties_without_significand(fmt):
    """At M = 0 gfloat (IEEE P3109) breaks a tie to the even exponent field; we, like Brevitas, to the larger value."""
    x = np.concatenate([boundary_numbers(fmt, 100), random_numbers(fmt, 200, seed=4)]).astype(np.float64)
    theirs = gfloat.round_ndarray(gfloat_info(fmt), x, gfloat.RoundMode.TiesToEven, sat=True)
    ours = round_to(torch.from_numpy(x), fmt).numpy()
    ties = np.isin(np.abs(x), midpoints(fmt))
    assert np.array_equal(ours[~ties], theirs[~ties])
    assert (ours[ties] != theirs[ties]).any()


def test_sabotage():
    """The laws can fail: truncation breaks nearness, and floor(log2) in float32 the law of powers of two."""

    def truncate(x, fmt):
        return math.trunc(x)

    with pytest.raises(AssertionError):
        values = np.array(levels(parse("int4")))
        for x in random_numbers(parse("int4"), 60, seed=5).astype(float):
            assert abs(truncate(x, None) - x) == np.abs(values - x).min()
    x = np.nextafter(np.exp2(np.arange(-126, 128)).astype(np.float32), np.float32(0))
    assert (np.floor(np.log2(x)) != np.array([math.frexp(v)[1] - 1 for v in x])).any()

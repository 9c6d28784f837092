"""Published formulas give the figures that their documents print."""

from __future__ import annotations

import pytest

from hwmodel.baselines import best_scale, bops, compressor, ebops, finn, finn_mac
from hwmodel.formats import parse

# LUT per MAC of 32 lanes with an accumulator of W + A + 13 bits, computed from the released source.
FINN = {
    (1, 1): 7.0, (2, 2): 13.6, (3, 3): 20.2, (4, 4): 44.4, (5, 5): 55.4, (6, 6): 66.4, (8, 8): 123.6,
    (2, 8): 55.4, (4, 8): 66.4, (1, 8): 49.9,
}  # fmt: skip


@pytest.mark.parametrize(("pair", "want"), FINN.items())
def test_finn_luts_per_product(pair: tuple[int, int], want: float) -> None:
    """The formula's figures for a fully parallel 32-lane element, its constant of 300 left out."""
    w, a = pair
    assert finn_mac(w, a, 32, w + a + 13) / 32 == pytest.approx(want, abs=0.07)


def test_finn_memory_and_dsps() -> None:
    """Weights deeper than 128 words go to block RAM, shallower ones to LUTRAM; products to DSPs when told."""
    deep, shallow = finn(4, 4, 64, 64, 1, 8, 14), finn(4, 4, 64, 64, 8, 8, 14)
    assert deep.bram18 == 1 and shallow.bram18 == 0
    parallel = finn(4, 4, 64, 64, 64, 64, 14)
    assert parallel.bram18 == 0 and parallel.luts == pytest.approx(300 + 1.1 * 64 * (64 * 24 + 8 * 127 + 14))
    assert finn(8, 8, 8, 8, 2, 4, 20, dsp=True).dsps == 8 and finn(8, 8, 8, 8, 2, 4, 20).dsps == 0
    assert finn(4, 4, 8, 8, 2, 4, 14, 4).luts - finn(4, 4, 8, 8, 2, 4, 14).luts == pytest.approx(1.1 * 2 * 2 * 15 * 14)


def test_bit_operations() -> None:
    """BOPs count a minifloat as an integer of its width; EBOPs by its significand and sign."""
    assert bops(parse("e4m3"), parse("int8"), 10) == bops(parse("int8"), parse("int8"), 10) == 640
    assert ebops(parse("e4m3"), parse("int8"), 1) == 40 and ebops(parse("int4"), parse("uint4"), 4) == 64


def test_compressor_table_is_symmetric_and_ascends() -> None:
    """More bits on either side never cost less, and operands may swap; unknown pairs have no figure."""
    for w in (1, 2, 3, 4, 5, 6, 8):
        row = [compressor(parse(f"int{w}"), parse(f"int{a}")) for a in (1, 2, 3, 4, 5, 6, 8)]
        assert None not in row and row == sorted(row)  # type: ignore[type-var]
        assert row == [compressor(parse(f"int{a}"), parse(f"int{w}")) for a in (1, 2, 3, 4, 5, 6, 8)]
    assert compressor(parse("e2m1"), parse("e2m1")) == 17.9 and compressor(parse("e2m1"), parse("int4")) is None


def test_the_best_scale_is_the_median_ratio() -> None:
    """A model that is off by one factor is right once scaled, whatever a single outlier says."""
    assert best_scale([1, 2, 3, 4, 5], [2, 4, 6, 8, 1000]) == 2
    assert best_scale([1, 1], [1, 3]) == 2

"""Counters keep the sum, trees cost what a published generator's do, and the set says what it is."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import pytest
from typer.testing import CliRunner

from hwmodel import fabric
from hwmodel.baselines import _COMPRESSOR
from hwmodel.cli import app
from hwmodel.coeffs import COMPRESSOR, document, use_coefficients
from hwmodel.compressor import Counter, heap_luts
from hwmodel.cost import HwError
from hwmodel.devices import find_device
from hwmodel.estimate import estimate
from hwmodel.formats import Int, parse
from hwmodel.mac import mac_cost
from hwmodel.spec import LayerSpec


@pytest.fixture(autouse=True)
def published() -> Iterator[None]:
    """Price by the published counters, and by ours again behind the test."""
    use_coefficients(Path(COMPRESSOR))
    yield
    use_coefficients(None)


def known() -> list[Counter]:
    return [Counter(tuple(t), tuple(g), luts) for t, g, luts in document()[COMPRESSOR]["counters"]]


def test_counters_have_room_for_what_they_count() -> None:
    """The largest sum of the bits taken is no larger than the bits given can say, and fewer bits leave than enter."""
    for counter in known():
        taken, given = (sum(n << i for i, n in enumerate(side)) for side in (counter.takes, counter.gives))
        assert taken <= given and sum(counter.gives) < sum(counter.takes) and counter.efficiency >= 1


def test_popcounts_cost_what_is_published() -> None:
    """0.75 to 0.86 LUT per bit on 7-series (and a little less for few), as the published generator has it."""
    for n in (64, 128, 256, 512):
        assert 0.74 < heap_luts([n], known()) / n < 0.87


def test_trees_cost_what_the_generator_makes() -> None:
    """Dot products of 32 lanes lie within 16 % in nine of ten of its figures; it hides gates, so ours lie above."""
    off = [mac_cost(Int(w), Int(a), w + a + 13, 32).luts / 32 / luts - 1 for (w, a), luts in _COMPRESSOR.items()]
    assert sum(abs(e) <= 0.16 for e in off) >= 0.9 * len(off) and 0 < median(off) < 0.16


def test_more_lanes_and_bits_cost_more() -> None:
    """LUTs ascend with lanes and with the width of either factor."""
    lanes = [mac_cost(Int(4), Int(4), 24, n).luts for n in (1, 2, 4, 8, 16)]
    widths = [mac_cost(Int(w), Int(4), 24, 8).luts for w in range(2, 9)]
    assert lanes == sorted(lanes) and widths == sorted(widths) and lanes[0] < lanes[-1]


def test_the_set_says_that_it_was_not_measured() -> None:
    """No error band in an estimate or a unit, the words in the text, and no ECP5."""
    one = LayerSpec("a", "linear", 16, 16, weight=Int(4), act=Int(4), out=None, acc_bits=16)
    assert estimate([one], find_device("xc7a35t")).residual is None
    with pytest.raises(HwError, match="7-series"), fabric.pricing("ecp5"):
        mac_cost(Int(4), Int(4), 16, 4)
    words = ["cost", "--weights", "int4", "--acts", "int4", "--coeffs", "compressor"]
    assert "not measured" in CliRunner().invoke(app, words).stdout
    assert json.loads(CliRunner().invoke(app, [*words, "--json"]).stdout)["residual"] is None


def test_ours_come_back() -> None:
    """Behind the published set, None prices by our own coefficients as before."""
    fmt = parse("int8")
    theirs = mac_cost(fmt, fmt, 24, 8)
    use_coefficients(None)
    ours = mac_cost(fmt, fmt, 24, 8)
    assert ours.luts != theirs.luts and ours.ffs == theirs.ffs

"""Laws of the MAC and converter costs: monotone, positive, the same for the same hardware."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from hwmodel.accumulator import type_bound
from hwmodel.coeffs import coefficients
from hwmodel.convert import converters, to_float
from hwmodel.cost import Cost
from hwmodel.formats import Float, Format, Int, all_names, bits, minifloats, parse
from hwmodel.mac import format_of, mac_cost, pair_key, product_cost, product_ffs
from hwmodel.spec import LayerSpec, PerGroup, PerRow, PerTensor

ACTS = [
    "int1",
    "uint1",
    "int2",
    "uint3",
    "int4",
    "uint4",
    "int8",
    "uint8",
    "int16",
    "e1m2",
    "e2m1",
    "e3m0",
    "e3m2",
    "e4m3",
    "e5m2",
    "ternary",
    "binary",
]


def chains() -> list[list[Format]]:
    """Formats in which each does at least what the one before does."""
    ints = [Int(b) for b in (1, 2, 3, 4, 5, 6, 7, 8, 16)]
    uints = [Int(b, signed=False) for b in (1, 2, 3, 4, 5, 6, 7, 8, 16)]
    wide_exp = [[Float(e, m) for e in range(1, 7) if 3 <= 1 + e + m <= 8] for m in range(0, 6)]
    wide_man = [[Float(e, m) for m in range(0, 7) if 3 <= 1 + e + m <= 8] for e in range(1, 7)]
    return [ints, uints, *wide_exp, *wide_man]


@pytest.mark.parametrize("act", ACTS)
def test_mac_is_monotone_in_the_weight(act: str) -> None:
    """More bits, exponent bits or significand bits never cost fewer LUTs, in either operand and any lanes."""
    a = parse(act)
    for chain in chains():
        for narrow, wide in itertools.pairwise(chain):
            for lanes in (1, 4, 9):
                less = mac_cost(narrow, a, type_bound(narrow, a, 64 * lanes), lanes).luts
                more = mac_cost(wide, a, type_bound(wide, a, 64 * lanes), lanes).luts
                assert less <= more, f"{narrow} -> {wide} x {a}, {lanes} lanes"
                assert mac_cost(a, narrow, 100, lanes).luts <= mac_cost(a, wide, 100, lanes).luts


@pytest.mark.parametrize(
    ("weight", "act"), [("int4", "uint4"), ("e3m2", "e2m1"), ("ternary", "int8"), ("binary", "binary")]
)
def test_mac_is_monotone_in_accumulator_and_lanes(weight: str, act: str) -> None:
    """More accumulator bits or more lanes never cost less; lanes never cost more than as many separate MACs."""
    w, a = parse(weight), parse(act)
    for acc in range(16, 40):
        assert mac_cost(w, a, acc, 4).luts <= mac_cost(w, a, acc + 1, 4).luts
    for lanes in range(1, 40):
        assert mac_cost(w, a, 30, lanes).luts <= mac_cost(w, a, 30, lanes + 1).luts
    assert mac_cost(w, a, 30, 8).luts <= 8 * mac_cost(w, a, 30, 1).luts


def test_every_pair_has_a_cost() -> None:
    """Any format times any other has positive LUTs and flip-flops, and no DSPs."""
    names = [parse(n) for n in all_names()]
    for w, a in itertools.product(names, names):
        cost = mac_cost(w, a, type_bound(w, a, 16), 4)
        assert cost.luts >= 1 and cost.ffs >= 1 and cost.dsps == 0


def test_codes_that_change_nothing_cost_nothing() -> None:
    """Special codes, narrow ranges and the order of operands leave the product's hardware alone."""
    assert product_cost(parse("e4m3fn"), parse("int8n")) == product_cost(parse("int8"), parse("e4m3"))


def test_known_units() -> None:
    """Wide int4 and int8 dot products stand near the published compressor trees of 16 and 60 LUT per lane."""
    assert mac_cost(parse("int4"), parse("int4"), 20, 32).luts / 32 == pytest.approx(22, abs=3)
    assert mac_cost(parse("int8"), parse("int8"), 28, 32).luts / 32 == pytest.approx(60, abs=5)


def test_bad_requests_are_refused() -> None:
    """Zero lanes raise."""
    with pytest.raises(ValueError, match="lane"):
        mac_cost(parse("int4"), parse("int4"), 16, 0)


SPEC = LayerSpec("l", "linear", 8, 8, weight=parse("int4"), act=parse("int4"), out=parse("uint4"), activation="relu")


@pytest.mark.parametrize("granularity", [PerTensor(), PerRow(), PerGroup(4)])
@pytest.mark.parametrize("out", ["uint4", "int8", "e2m1", "e4m3", "e6m1", "ternary", "binary", None])
@pytest.mark.parametrize("activation", ["none", "relu", "tanh", "gelu"])
def test_converters_exist_for_everything(granularity: object, out: str | None, activation: str) -> None:
    """Every output format, granularity and activation has a converter; thresholds only where monotone."""
    from dataclasses import replace

    spec = replace(SPEC, granularity=granularity, out=out and parse(out), activation=activation)
    found = converters(spec, 16, 4)
    assert found and all(c.cost.luts >= 0 and c.stages > 0 for c in found)
    assert ("thresholds" in {c.method for c in found}) == (out is not None and activation != "gelu")


def test_converters_grow_with_the_sum() -> None:
    """A wider sum never converts for less; power-of-two scales never cost more than others."""
    from dataclasses import replace

    arithmetic = lambda spec, acc: converters(spec, acc, 1)[-1].cost.luts  # noqa: E731
    for acc in range(12, 30):
        assert arithmetic(SPEC, acc) <= arithmetic(SPEC, acc + 1)
        assert arithmetic(replace(SPEC, scale_pow2=True), acc) <= arithmetic(SPEC, acc)
        assert converters(SPEC, acc, 1)[0].cost.luts <= converters(SPEC, acc + 1, 1)[0].cost.luts
    for fmt in minifloats(6):
        assert to_float(fmt).luts > bits(fmt)


def test_costs_add() -> None:
    """Costs add and scale field by field."""
    assert Cost(1, 2, 3, 4) + 2 * Cost(1, 1, 1, 1) == Cost(3, 4, 5, 6)


def test_the_fit_says_where_it_comes_from() -> None:
    """The coefficients carry tool, date, command and residuals, and MACs in the table are within 5 % in the median."""
    fit = coefficients()["fit"]
    assert fit["yosys"].startswith("Yosys 0.") and fit["command"] and fit["date"]
    assert coefficients()["residual"]["mac all in table"]["median"] <= 0.05


def test_a_cheaper_wide_product_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sabotage: a table in which a wide product is free fails the monotone law."""
    product_cost.cache_clear()
    mac_cost.cache_clear()
    monkeypatch.setitem(coefficients()["products"], "s4 s8", [0.0, 1.0, 0])
    try:
        with pytest.raises(AssertionError):
            test_mac_is_monotone_in_the_weight("int4")
    finally:
        product_cost.cache_clear()
        mac_cost.cache_clear()


def test_flip_flops_follow_from_the_structure() -> None:
    """For every product that was synthesized the count is Yosys' own."""
    for key, (_, ffs, _) in coefficients()["products"].items():
        weight, act = map(format_of, key.split())
        assert product_ffs(weight, act) == product_ffs(act, weight) == ffs, key


def test_products_between_measured_ones_are_near_them() -> None:
    """Of products of an integer and a minifloat left out one by one, each between two that the table keeps, half are
    within 3 % of Yosys' count and nine of ten within 8 %."""
    table, off = coefficients()["products"], []
    for key in [key for key in table if key[0] == "e" and key.split()[1][0] in "su"]:
        other, one = map(format_of, key.split())
        assert isinstance(one, Int)
        near = [n for n in range(1, 9) if n != one.bits and pair_key(other, Int(n, one.signed)) in table]
        if near and min(near) < one.bits < max(near):
            measured = table.pop(key)
            product_cost.cache_clear()  # type: ignore[attr-defined]
            try:
                off.append(abs(product_cost(one, other).luts / measured[0] - 1))
            finally:
                table[key] = measured
                product_cost.cache_clear()  # type: ignore[attr-defined]
    assert len(off) > 80
    assert np.median(off) < 0.03 and np.quantile(off, 0.9) < 0.08

"""Folding is exact, targets are met, and the errors say what would be possible."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace

import pytest

from hwmodel.cost import HwError
from hwmodel.devices import find_device
from hwmodel.estimate import Estimate, estimate
from hwmodel.fold_search import cheapest, default_cycles, fastest
from hwmodel.folding import Fold, folds, predict
from hwmodel.formats import parse
from hwmodel.packing import divisors
from hwmodel.spec import LayerSpec, PerGroup, PerRow, PerTensor

SMALL = find_device("xc7a35t")


def policy(weight: str = "int4", act: str = "int4", hidden: int = 64) -> list[LayerSpec]:
    """A three-layer policy: 8 observations, two hidden layers, 4 actions."""
    sizes = [(hidden, 8), (hidden, hidden), (4, hidden)]
    return [
        LayerSpec(
            f"layer{i}", "linear", rows, columns, weight=parse(weight), act=parse(act),
            out=None if i == 2 else parse(act), activation="none" if i == 2 else "tanh",
        )
        for i, (rows, columns) in enumerate(sizes)
    ]  # fmt: skip


MIXED = [
    LayerSpec("a", "linear", 6, 4, weight=parse("int4"), act=parse("e2m1"), out=parse("uint4"), activation="relu"),
    LayerSpec(
        "b",
        "conv2d",
        4,
        18,
        positions=9,
        weight=parse("ternary"),
        act=parse("uint4"),
        out=parse("e3m2"),
        granularity=PerTensor(),
    ),
    LayerSpec("c", "linear", 5, 8, weight=parse("e3m2"), act=parse("e3m2"), granularity=PerGroup(4)),
]


CHAIN = [
    LayerSpec("a", "linear", 6, 4, weight=parse("int4"), act=parse("int8"), out=parse("uint4"), activation="relu"),
    LayerSpec("b", "linear", 8, 6, weight=parse("ternary"), act=parse("uint4"), out=parse("int5"), activation="tanh"),
    LayerSpec("c", "linear", 3, 8, weight=parse("int6"), act=parse("int5")),
]


def counted(chosen: tuple[Fold, ...]) -> int:
    """LUTs of all layers in the network, each rounded up."""
    return sum(math.ceil(cost.luts - 1e-9) for cost in predict(chosen))


@pytest.mark.parametrize("port", [None, 25])
@pytest.mark.parametrize("specs", [MIXED, CHAIN], ids=["apart", "chain"])
def test_folding_equals_brute_force(specs: list[LayerSpec], port: int | None) -> None:
    """For every target, the search finds exactly what trying every combination finds, buffers between layers included.

    Layers apart are a convolution between linear layers, which no stream connects.
    """
    ports = [port] * len(specs)
    sums = [(sum(f.cycles for f in c), counted(c)) for c in itertools.product(*(folds(s, port) for s in specs))]
    for limit in (20, 30, 60, 80, 100, 137, 200, 400, 1000, 5000):
        best = min((s[1] for s in sums if s[0] <= limit), default=None)
        if best is None:
            with pytest.raises(HwError):
                cheapest(specs, limit, ports=ports)
            continue
        found = cheapest(specs, limit, ports=ports)
        assert counted(found) == best and sum(f.cycles for f in found) <= limit
    for budget in (300, 350, 500, 700, 900, 1500, 3000, 10000):
        best = min((s[0] for s in sums if s[1] <= budget), default=None)
        if best is None:
            with pytest.raises(HwError):
                fastest(specs, budget, ports=ports)
            continue
        found = fastest(specs, budget, ports=ports)
        assert sum(f.cycles for f in found) == best and counted(found) <= budget


def test_cycles_follow_the_formula() -> None:
    """A layer takes (rows / PE) * (columns / SIMD) * positions cycles and a fill of some tens at most."""
    for spec in MIXED:
        for fold in folds(spec):
            steady = spec.out_features // fold.pe * (spec.in_features // fold.simd) * spec.positions
            assert 0 < fold.cycles - steady < 40
            assert spec.out_features % fold.pe == 0 and spec.in_features % fold.simd == 0
    assert all(4 % f.simd == 0 for f in folds(MIXED[2])), "a group is never split across cycles"


def test_default_target() -> None:
    """Without a target, the latency is 64 MACs per cycle but at least 1,000 cycles."""
    assert default_cycles(policy()) == 1000
    assert default_cycles(policy(hidden=512)) == (512 * 8 + 512 * 512 + 4 * 512) // 64
    assert estimate(policy(), SMALL).cycles <= 1000


def test_targets_trade() -> None:
    """A tighter latency costs more LUTs, and the LUT target gives back the latency target's answer."""
    found = [estimate(policy(), SMALL, latency_us=t) for t in (2, 4, 8, 16, 32)]
    assert all(a.luts >= b.luts and a.latency_us <= t for a, b, t in zip(found, found[1:], (2, 4, 8, 16), strict=False))
    for one in found:
        again = estimate(policy(), SMALL, luts=one.luts)
        assert again.cycles <= one.cycles and again.luts <= one.luts
        assert estimate(policy(), SMALL, latency_us=one.latency_us * 2, clock_mhz=50.0).luts == one.luts


def test_fewer_bits_cost_less() -> None:
    """At one latency, LUTs fall with the bits of weights and activations."""
    luts = [estimate(policy(f"int{b}", f"int{b}"), SMALL, latency_us=10).luts for b in (2, 3, 4, 5, 6, 8)]
    assert luts == sorted(luts)


def test_totals_and_json() -> None:
    """Totals are the sums over layers, and the JSON document holds everything."""
    found = estimate(policy(), SMALL)
    for name in ("luts", "ffs", "dsps", "bram18", "cycles"):
        assert getattr(found, name) == sum(getattr(layer, name) for layer in found.layers)
    document = json.loads(json.dumps(found.to_json()))
    assert document["layers"][0]["name"] == "layer0" and set(document) == set(Estimate.__dataclass_fields__)
    assert found.fits and found.binding in ("luts", "ffs", "dsps", "bram18") and 0 < found.residual < 0.3


def test_float_layers_are_refused() -> None:
    """A layer whose weights or inputs stay in float raises, naming the layer and what is accepted."""
    for side in ("weight", "act"):
        with pytest.raises(HwError, match=r"'layer1'.*accepted: int1"):
            estimate([policy()[0], replace(policy()[1], **{side: None})], SMALL)


def test_impossible_targets_say_what_is_possible() -> None:
    """The nearest achievable latency, or LUT count, is in the message, with the layer that binds."""
    with pytest.raises(HwError, match=r"nearest is ([\d.]+) us .*bound by layer 'layer"):
        estimate(policy(), SMALL, latency_us=0.1)
    with pytest.raises(HwError, match=r"nearest is \d+ LUTs .*bound by layer 'layer1'"):
        estimate(policy(), SMALL, luts=50)
    with pytest.raises(HwError, match="not both"):
        estimate(policy(), SMALL, luts=5000, latency_us=5)
    with pytest.raises(HwError, match="no layers"):
        estimate([], SMALL)


def test_a_device_can_be_too_small() -> None:
    """A result beyond the device does not fit, names what binds, and "auto" then goes to DSPs if that helps."""
    big = policy("int8", "int8", hidden=128)
    full = estimate(big, SMALL, latency_us=1.0)
    assert not full.fits and full.binding == "luts" and full.luts > SMALL.luts
    assert estimate(policy("int8", "int8"), find_device("xczu9eg"), latency_us=3, mapping="dsp").dsps > 0
    assert estimate(policy(), SMALL, mapping="auto").mapping == "lut"


@pytest.mark.parametrize("weight", ["int2", "e4m3", "ternary", "binary", "int16", "e6m1"])
@pytest.mark.parametrize("act", ["uint8", "e2m1", "binary", "e5m2ieee"])
def test_every_pair_of_kinds_is_estimated(weight: str, act: str) -> None:
    """Any pair of formats, with given accumulators, stored bits and power-of-two scales too, is estimated."""
    for granularity in (PerTensor(), PerRow(), PerGroup(8)):
        layers = [
            replace(s, granularity=granularity, scale_pow2=granularity == PerRow(), acc_bits=40)
            for s in policy(weight, act)
        ]
        assert estimate(layers, SMALL, luts=10**7).luts > 0


def test_json_specs_round_trip() -> None:
    """A layer specification survives JSON and costs the same."""
    again = [LayerSpec.from_json(json.loads(json.dumps(s.to_json()))) for s in MIXED]
    assert again == MIXED and estimate(again, SMALL) == estimate(MIXED, SMALL)


def test_divisors() -> None:
    """Divisors are all, once, ascending."""
    for n in range(1, 200):
        assert divisors(n) == [d for d in range(1, n + 1) if n % d == 0]


def test_a_greedy_search_is_noticed() -> None:
    """Sabotage: giving every layer its own smallest fold misses targets that the search meets."""
    smallest = [min(folds(spec), key=lambda f: f.cost.luts) for spec in MIXED]
    assert sum(f.cycles for f in smallest) > 400 >= sum(f.cycles for f in cheapest(MIXED, 400))

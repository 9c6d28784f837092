"""Hardware in the loop: episodes equal Python's, and the first difference is named."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hwmodel.devices import find_device
from hwmodel.emit import write
from hwmodel.estimate import estimate
from hwmodel.plan import plan_network, total_cycles
from quantkit.artifact import save_artifact
from quantkit.cli import app
from quantkit.errors import InputError
from quantkit.loading import load_checkpoint
from quantkit.model import Model
from quantkit.recipe import Recipe, make_plan, quantize
from quantkit.rtl_episodes import Pilot, fly
from quantkit.rtl_export import network_of
from quantkit.study import calib_for, policy_of
from quantkit.tasks.episodes import act_of, rollout

AGENT = Path(__file__).parents[1] / "benchmarks" / "agents" / "sac" / "Pendulum-v1.zip"
pytestmark = [
    pytest.mark.sim,
    pytest.mark.slow,
    pytest.mark.skipif(not shutil.which("iverilog"), reason="iverilog is not installed (apt-get install iverilog)"),
]


def design(weights: str, acts: str, folder: Path, latency_us: float) -> tuple[Model, int]:
    """A quantized pendulum, its Verilog in `folder`, and the estimate's cycles."""
    model = load_checkpoint(AGENT)
    model = quantize(model, Recipe((("*", make_plan(weights, acts, "row")),), (), 0), calib_for(model, 256))
    network, _ = network_of(model)
    device = find_device("xc7a35t")
    plans = plan_network(network, device, latency_us=latency_us)
    folder.mkdir()
    write(network, plans, folder, device)
    cycles = estimate(network.specs, device, latency_us=latency_us).cycles
    assert cycles == total_cycles(plans)
    return model, cycles


@pytest.mark.parametrize(("weights", "acts"), [("int3", "int4"), ("int8", "int8")])
def test_an_episode_is_pythons_in_the_estimated_cycles(weights: str, acts: str, tmp_path: Path) -> None:
    """Every decision equals the simulator's, so does the return; a decision takes the cycles of the estimate."""
    model, cycles = design(weights, acts, tmp_path / "d", 3.0)
    policy, env = policy_of(model)
    flight = fly(model, tmp_path / "d", env, episodes=1, seed=5, tool="iverilog")
    assert flight.difference is None
    assert (flight.cycles_min, flight.cycles_max) == (cycles, cycles)
    assert flight.decisions == 200
    assert flight.returns == tuple(rollout(act_of(policy), env, episodes=1, seed=5).returns)


def test_a_difference_ends_the_flight_with_its_place(tmp_path: Path) -> None:
    """Sabotage: one flipped weight bit gives vector, cycle and signal, and exit code 1; another policy is refused."""
    model, _ = design("int4", "int4", tmp_path / "d", 3.0)
    save_artifact(model, tmp_path / "p.q")
    memory = tmp_path / "d" / "layer0_weights.mem"
    words = memory.read_text().split()
    memory.write_text("\n".join(f"{int(word, 16) ^ 2:0{len(word)}x}" for word in words) + "\n")
    arguments = ["rtl-episodes", str(tmp_path / "p.q"), str(tmp_path / "d"), "-n", "1", "--tool", "iverilog", "--json"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1, result.output
    difference = json.loads(result.stdout)["difference"]
    assert all(word in difference for word in ("vector", "cycle", "out_sums[", "but Python has"))
    other = quantize(load_checkpoint(AGENT), Recipe((("*", make_plan("int5", "int4", "row")),), (), 0),
                     calib_for(load_checkpoint(AGENT), 64))  # fmt: skip
    with pytest.raises(InputError, match="was not written from this policy"):
        Pilot(other, tmp_path / "d", "iverilog")


def test_hwmodel_drives_the_environment_with_what_rtl_wrote(tmp_path: Path) -> None:
    """`hwmodel simulate OUT --env ENV` finds the policy of the design and plays `quantkit rtl-episodes`' episodes."""
    model = quantize(load_checkpoint(AGENT), Recipe((("*", make_plan("int3", "int4", "row")),), (), 0),
                     calib_for(load_checkpoint(AGENT), 64))  # fmt: skip
    save_artifact(model, tmp_path / "p.q")
    design = tmp_path / "p_rtl"
    made = CliRunner().invoke(app, ["rtl", str(tmp_path / "p.q"), "-o", str(design), "--latency-us", "3"])
    assert made.exit_code == 0 and f"hwmodel simulate {design} --env Pendulum-v1" in " ".join(made.output.split())
    command = [sys.executable, "-m", "hwmodel.cli", "simulate", str(design), "--env", "Pendulum-v1", "-n", "1"]
    done = subprocess.run([*command, "--tool", "iverilog", "--json"], capture_output=True, text=True, check=True)
    policy, env = policy_of(model)
    found = json.loads(done.stdout)
    assert found["difference"] is None and found["decisions"] == 200
    assert found["returns"] == rollout(act_of(policy), env, episodes=1, seed=1000).returns.tolist()

    (tmp_path / "p.q").rename(tmp_path / "elsewhere.q")
    lost = subprocess.run(command, capture_output=True, text=True, check=False)
    assert lost.returncode == 2 and "is not there; give it by --policy DIR" in lost.stderr
    memory = design / "layer0_weights.mem"
    memory.write_text("".join(f"{int(w, 16) ^ 2:0{len(w)}x}\n" for w in memory.read_text().split()))
    other = [*command, "--policy", str(tmp_path / "elsewhere.q"), "--tool", "iverilog"]
    broken = subprocess.run(other, capture_output=True, text=True, check=False)
    assert broken.returncode == 1 and "differs: vector 0" in broken.stdout

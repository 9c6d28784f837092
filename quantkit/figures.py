"""Pictures of a study: quality against cost, the front drawn, the design to take labeled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from quantkit.files import new_file
from quantkit.pareto import COLUMNS, front, knee, value
from quantkit.statistics import t_quantile

Row = Mapping[str, Any]

FAMILIES = {
    "integer": ("#2166ac", "o", "integer"),
    "minifloat": ("#d6604d", "D", "minifloat"),
    "mixed": ("#5aae61", "s", "integer × minifloat"),
}
_STYLE: Any = {
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
    """Every design as a point with its 95 % confidence interval, families told apart, the front as a staircase.

    The float policy is a line with its interval as a band, the non-inferiority margin a dashed line,
    and the design to take (see `pareto.knee`) is labeled with its formats.
    """
    with plt.rc_context(_STYLE):
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
        _reference(axes, reference, margin, y)
    for family, (color, marker, label) in FAMILIES.items():
        members = [i for i, row in enumerate(drawable) if row.get("family") == family]
        if not members:
            continue
        for chosen, alpha, size in ((False, 0.38, 22), (True, 1.0, 52)):
            some = [i for i in members if (i in on_front) == chosen]
            some = members if len(some) == len(members) else some
            if not some:
                continue
            xs = [value(drawable[i], x) or 0.0 for i in some]
            ys = [value(drawable[i], y) or 0.0 for i in some]
            if y == "mean":
                bars = [_interval(drawable[i]) for i in some]
                axes.errorbar(
                    xs,
                    ys,
                    yerr=bars,
                    fmt="none",
                    ecolor=color,
                    alpha=0.16 if not chosen else 0.7,
                    elinewidth=1.1,
                    zorder=2,
                )
            axes.scatter(
                xs, ys, s=size, c=color, marker=marker, alpha=alpha, zorder=4 if chosen else 3,
                edgecolors="white", linewidths=0.7, label=label if some is members or chosen else None,
            )  # fmt: skip
    if on_front:
        xs = [value(drawable[i], x) or 0.0 for i in on_front]
        ys = [value(drawable[i], y) or 0.0 for i in on_front]
        axes.step(xs, ys, where="post", color="#333333", linewidth=1.3, zorder=3, label="Pareto front")
    _axes(axes, drawable, x, y, reference if is_return else None)
    best = knee(drawable, on_front, reference["mean"], margin, x) if is_return else None
    if best is not None:
        _label(axes, drawable[best], x, y)
    if drawable or is_return:
        axes.legend(loc="lower right", frameon=True, framealpha=0.92, edgecolor="none", fontsize=9)


def _interval(row: Row) -> float:
    score = row["score"]
    if not score.get("stderr") or score["n"] < 2:
        return 0.0
    return float(score["stderr"] * t_quantile(0.975, score["n"] - 1))


def _reference(axes: Axes, reference: Mapping[str, Any], margin: float, y: str) -> None:
    center = reference[y]
    half = (reference.get("stderr") or 0.0) * t_quantile(0.975, reference["n"] - 1) if reference["n"] > 1 else 0.0
    axes.axhspan(center - half, center + half, color="#999999", alpha=0.16, linewidth=0, zorder=1)
    axes.axhline(center, color="#555555", linewidth=1.2, zorder=1, label=f"float policy ({center:.4g})")
    axes.axhline(
        center - margin,
        color="#555555",
        linewidth=1.0,
        linestyle=(0, (4, 3)),
        zorder=1,
        label=f"margin (−{margin:.3g})",
    )


def _axes(axes: Axes, rows: Sequence[Row], x: str, y: str, reference: Mapping[str, Any] | None) -> None:
    axes.set_xlabel(COLUMNS[x][1])
    axes.set_ylabel(COLUMNS[y][1])
    xs = [value(row, x) or 0.0 for row in rows]
    if xs and min(xs) > 0 and max(xs) / min(xs) > 4:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,.0f}" if v >= 10 else f"{v:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
    ys = sorted(value(row, y) or 0.0 for row in rows)
    if reference is not None and ys:
        top = max(ys[-1], reference["mean"])
        floor = ys[len(ys) // 4] if ys[len(ys) // 4] < top else ys[0]
        span = max(top - floor, reference.get("stderr") or 0.0, 1e-9)
        low = max(ys[0] - 0.3 * span, floor - 1.5 * span)
        axes.set_ylim(low, top + 0.55 * (top - low))
        hidden = sum(v < low for v in ys)
        if hidden:
            text = f"{hidden} design{'s' if hidden > 1 else ''} below"
            axes.text(0.01, 0.015, text, transform=axes.transAxes, fontsize=8.5, color="#777777")


def _label(axes: Axes, row: Row, x: str, y: str) -> None:
    px, py = value(row, x) or 0.0, value(row, y) or 0.0
    text = f"W {row['weights']} · A {row['acts']}\n{row['steps']}, per {row['granularity']}\n{px:,.0f} {COLUMNS[x][1]}"
    axes.scatter([px], [py], s=190, facecolors="none", edgecolors="black", linewidths=1.5, zorder=6)
    axes.annotate(
        text, (px, py), xytext=(0, 30), textcoords="offset points", ha="center", va="bottom", fontsize=9, zorder=7,
        bbox={"boxstyle": "round,pad=0.35", "fc": "white", "ec": "#888888", "lw": 0.8},
        arrowprops={"arrowstyle": "-", "color": "#444444", "lw": 1.0, "shrinkB": 8},
    )  # fmt: skip


def save_figure(figure: Figure, stem: Path) -> list[Path]:
    """Write STEM.png and STEM.svg (replacing old ones) and close the figure; the paths written."""
    written = []
    try:
        for suffix in (".png", ".svg"):
            path = stem.with_name(stem.name + suffix)
            with new_file(path, force=True) as temporary, plt.rc_context(_STYLE):
                figure.savefig(temporary, metadata={"Date": None} if suffix == ".svg" else None)
            written.append(path)
    finally:
        plt.close(figure)
    return written

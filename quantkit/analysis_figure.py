"""The picture of a diagnosis: what reaches every quantizer, and what each layer alone costs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter, NullLocator, PercentFormatter

from quantkit.analyze import Analysis, Place
from quantkit.figures import STYLE

LABELS = {
    "changed_actions": "states with another action",
    "action_error": "RMS action error, of the range",
    "output_error": "RMS output error, of the RMS output",
}
_INK, _CLIP, _GRID = "#2166ac", "#b2182b", "#c9c9c9"
_MOST, _BARS = 12, 40


def analysis_figure(analysis: Analysis, title: str = "") -> Figure:
    """Left a bar for each place: the error when it alone is quantized. Right histograms of what reaches a quantizer,
    with the grid of the format, and red beyond what it can represent; of more than 12 those with the largest share.
    """
    bars = _largest(analysis.places, _BARS)
    shown = _largest([p for p in analysis.places if p.histogram is not None], _MOST)
    columns = max(1, min(3, len(shown)))
    rows = max(1, math.ceil(len(shown) / columns))
    height = max(2.4 + 0.3 * len(bars), 1.0 + 1.75 * rows)
    with plt.rc_context(STYLE):
        figure = plt.figure(figsize=(4.2 + 2.75 * columns, min(height, 14.0)), layout="constrained")
        parts: Any = figure.subfigures(1, 2, width_ratios=(4.2, 2.75 * columns), wspace=0.02)
        left, right = parts
        _draw_bars(left.subplots(), bars, analysis)
        grid = np.atleast_1d(right.subplots(rows, columns, squeeze=False)).flatten()
        for axes, place in zip(grid, shown, strict=False):
            _draw_histogram(axes, place)
        for axes in grid[len(shown) :]:
            axes.set_visible(False)
        more = len([p for p in analysis.places if p.histogram is not None]) - len(shown)
        what = "inputs, counts on a log scale; grey: values of the format, red: clipped"
        right.suptitle(what + (f" ({more} more places not drawn)" if more else ""), fontsize=9, color="#555555")
        if title:
            figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
    return figure


def _largest(places: Sequence[Place], limit: int) -> list[Place]:
    """At most `limit` places, those with the largest share, in their own order."""
    chosen = sorted(places, key=lambda p: -p.share)[:limit]
    return [p for p in places if p in chosen]


def _draw_bars(axes: Axes, places: Sequence[Place], analysis: Analysis) -> None:
    errors = [p.only.error for p in places]
    axes.barh(range(len(places)), errors, color=_INK, height=0.62)
    axes.set_yticks(range(len(places)), [f"{_short(p.name)}\n{p.weight} × {p.act}" for p in places], fontsize=8)
    if len(places) > 14:
        axes.set_yticks(range(len(places)), [_short(p.name) for p in places], fontsize=7)
    axes.invert_yaxis()
    axes.set_ylim(len(places) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    axes.xaxis.set_major_locator(MaxNLocator(4))
    top, whole = max([*errors, 1e-9]), analysis.whole.error
    if whole <= 1.5 * top:  # a line, where it does not squeeze the bars
        top = max(top, whole)
        axes.axvline(whole, color="#333333", linewidth=1.1, linestyle=(0, (4, 3)))
    axes.set_xlim(0, 1.18 * top)
    axes.text(1.0, 1.005, f"all quantized: {whole:.2%}", transform=axes.transAxes, ha="right", fontsize=8.5)
    for index, place in enumerate(places):
        text = f"{place.only.error:.2%}"
        axes.text(place.only.error + 0.012 * top, index, text, va="center", fontsize=7.5, color="#333333",
                  bbox={"fc": "white", "ec": "none", "pad": 0.6, "alpha": 0.8})  # fmt: skip
    axes.set_xlabel(f"{LABELS[analysis.metric]},\nonly this layer quantized", fontsize=9, loc="left")


def _draw_histogram(axes: Axes, place: Place) -> None:
    h = place.histogram
    assert h is not None
    edges, counts = np.array(h.edges), np.array(h.counts, float)
    centers, width = (edges[1:] + edges[:-1]) / 2, edges[1] - edges[0]
    for value in h.grid:
        axes.axvline(value, color=_GRID, linewidth=0.6, zorder=1)
    known = math.isfinite(h.low)
    outside = (centers < h.low) | (centers > h.high) if known else np.zeros(len(centers), bool)
    axes.bar(centers, counts, width, color=np.where(outside, _CLIP, _INK), zorder=2, linewidth=0)
    axes.set_yscale("log")
    axes.set_ylim(0.7, 2.2 * counts.max())
    axes.yaxis.set_major_formatter(NullFormatter())
    axes.yaxis.set_minor_locator(NullLocator())
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=7.5)
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.grid(visible=False)
    low, high = edges[0], edges[-1]
    if known:
        for bound in (h.low, h.high):
            axes.axvline(bound, color=_CLIP, linewidth=1.1, zorder=3)
        low, high = min(low, h.low), max(high, h.high)
    pad = 0.03 * (high - low)
    axes.set_xlim(low - pad, high + pad)
    axes.set_title(_short(place.name), fontsize=8.5, loc="left", fontweight="bold", pad=12)
    facts: list[Any] = [place.act]
    if place.act_sqnr_db is not None and math.isfinite(place.act_sqnr_db):
        facts.append(f"{place.act_sqnr_db:.1f} dB")
    if place.saturation:
        facts.append(f"{place.saturation:.2%} clipped")
    axes.text(0.0, 1.02, ", ".join(facts), transform=axes.transAxes, fontsize=7.5, color="#555555")


def _short(name: str, limit: int = 30) -> str:
    return name if len(name) <= limit else "…" + name[1 - limit :]

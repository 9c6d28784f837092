"""What the rows of `minifloat_vs_integer.py` say: fronts, crossings, tables and figures, all computed.

A design counts by its best technique. Quality is what is kept of the float network's: (outcome - chance) /
(float - chance), with the outcome an image's correctness, a flight's survival or an episode's return. Differences
between two designs are paired: they saw the same images, starts and episodes.
"""

from __future__ import annotations

import csv
import json
import textwrap
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hwmodel.formats import Float, bits, parse
from quantkit.pareto import nondominated
from quantkit.results import Row, read_rows

FOLDER = Path(__file__).parent.parent / "reports" / "minifloat_vs_integer"
COMMAND = "python benchmarks/minifloat_vs_integer.py --data ../shared/data --work FOLDER --publish"
AXES = {
    "mean_bits": "mean of weight and activation bits",
    "luts_mac": "LUTs of one MAC unit",
    "weight_kib": "weight memory (KiB)",
}
INTEGER, E1, MINIFLOAT = "integer", "E1My", "minifloat"
STYLE = {INTEGER: ("#0072B2", "o", "integer"), MINIFLOAT: ("#D55E00", "D", "minifloat"),
         E1: ("#7F7F7F", "x", "E1My × E1My (narrow integers)")}  # fmt: skip
KINDS = {"vision": "vision networks", "flight": "flight controllers", "policy": "agents"}
WIDTHS = range(3, 9)
KEPT = (0.99, 0.95, 0.9)
SURE = 2.0
"""Paired standard errors from which on a difference counts."""


@dataclass(frozen=True)
class Point:
    """A design by its best technique. kept, values: quality, and that of every image, flight or episode.

    kind: INTEGER, MINIFLOAT, or E1 where both sides are E1My. luts32: LUTs per MAC of a unit with 32 lanes.
    """

    network: str
    group: str
    weights: str
    acts: str
    kind: str
    technique: str
    kept: float
    values: np.ndarray
    cost: Mapping[str, float]

    @property
    def widths(self) -> tuple[int, int]:
        """Bits of weights and of activations."""
        return width(self.weights), width(self.acts)

    @property
    def name(self) -> str:
        """Weights/activations."""
        return f"{self.weights}/{self.acts}"


def width(name: str) -> int:
    """Bits of a format by name."""
    return bits(parse(name))


def kind_of(weights: str, acts: str) -> str:
    """INTEGER, MINIFLOAT, or E1 where both sides are E1My, whose values are those of narrow integers.

    >>> kind_of("int4", "int4"), kind_of("e2m1", "e1m2"), kind_of("e1m2", "e1m3")
    ('integer', 'minifloat', 'E1My')
    """
    pair = [parse(weights), parse(acts)]
    if not isinstance(pair[0], Float):
        return INTEGER
    return E1 if all(isinstance(f, Float) and f.exp == 1 for f in pair) else MINIFLOAT


def kept(row: Mapping[str, Any], facts: Mapping[str, Any]) -> np.ndarray:
    """(outcome - chance) / (float - chance) of every outcome of a row, (n,)."""
    packed = row["outcomes"]
    if isinstance(packed, str):
        outcomes = np.unpackbits(np.frombuffer(bytes.fromhex(packed), np.uint8))[: row["n"]].astype(np.float64)
    else:
        outcomes = np.array(packed, np.float64)
    return (outcomes - facts["chance"]) / (facts["quality"] - facts["chance"])


def points_of(rows: Iterable[Row], facts: Mapping[str, Any]) -> list[Point]:
    """Every design of a network once, with the technique of most quality; of equals the first."""
    best: dict[tuple[str, str], tuple[float, Row, np.ndarray]] = {}
    for row in rows:
        if row["network"] != facts["network"] or "error" in row:
            continue
        values = kept(row, facts)
        key, mean = (row["weights"], row["acts"]), float(values.mean())
        if key not in best or mean > best[key][0]:
            best[key] = mean, row, values
    points = []
    for mean, row, values in best.values():
        w, a = width(row["weights"]), width(row["acts"])
        cost = {"mean_bits": (w + a) / 2, **{c: row[c] for c in ("luts_mac", "luts_mac32", "weight_kib", "acc_bits")}}
        kind = kind_of(row["weights"], row["acts"])
        points.append(
            Point(
                facts["network"], row["group"], row["weights"], row["acts"], kind, row["technique"], mean, values, cost
            )
        )
    return points


def front(points: Sequence[Point], axis: str) -> list[Point]:
    """The points that none beats in quality and cost, by ascending cost; of identical ones the first."""
    chosen = nondominated([(p.cost[axis], p.kept) for p in points], maximize=(False, True))
    return sorted((points[i] for i in chosen), key=lambda p: p.cost[axis])


def of_kind(points: Iterable[Point], *kinds: str) -> list[Point]:
    """The points of these kinds."""
    return [p for p in points if p.kind in kinds]


def best_within(points: Sequence[Point], axis: str, limit: float) -> Point | None:
    """The point of most quality that costs at most `limit`; of equals the cheapest."""
    affordable = [p for p in points if p.cost[axis] <= limit + 1e-9]
    return max(affordable, key=lambda p: (p.kept, -p.cost[axis]), default=None)


def cheapest(points: Sequence[Point], axis: str, share: float) -> Point | None:
    """The cheapest point that keeps this share of the float quality; of equals the best."""
    return min((p for p in points if p.kept >= share), key=lambda p: (p.cost[axis], -p.kept), default=None)


def paired(a: Point, b: Point) -> tuple[float, float]:
    """Mean difference a - b in quality, and its standard error."""
    difference = a.values - b.values
    return float(difference.mean()), float(difference.std(ddof=1) / np.sqrt(len(difference)))


@dataclass(frozen=True)
class Stretch:
    """From cost `start` on (to the next stretch): who keeps more for the money, and by how much where it is most.

    leader: INTEGER, MINIFLOAT, or "" where the paired difference is below SURE standard errors.
    """

    start: float
    leader: str
    lead: float


def stretches(points: Sequence[Point], axis: str) -> list[Stretch]:
    """Who leads at which cost: at every cost the best integer design so far against the best minifloat so far."""
    ints, floats = of_kind(points, INTEGER), of_kind(points, MINIFLOAT)
    found: list[Stretch] = []
    for limit in sorted({p.cost[axis] for p in (*ints, *floats)}):
        one, other = best_within(ints, axis, limit), best_within(floats, axis, limit)
        if one is None or other is None:
            leader, lead = (MINIFLOAT if one is None else INTEGER), float("nan")
            found += [] if found and found[-1].leader == leader else [Stretch(limit, leader, lead)]
            continue
        lead, error = paired(other, one)
        leader = "" if abs(lead) <= max(SURE * error, 1e-9) else MINIFLOAT if lead > 0 else INTEGER
        if found and found[-1].leader == leader:
            most = np.nanmax([found[-1].lead, abs(lead)])
            found[-1] = Stretch(found[-1].start, leader, float(most))
        else:
            found.append(Stretch(limit, leader, abs(lead)))
    return found


def told(found: Sequence[Stretch], precision: str = "g") -> str:
    """Stretches as words: `3 minifloat (up to +31), 5.5 level`; alone: the other has no design for so little."""
    parts = []
    for s in found:
        if not s.leader:
            parts.append(f"{s.start:{precision}} level")
        else:
            parts.append(
                f"{s.start:{precision}} {s.leader}"
                + (" alone" if np.isnan(s.lead) else f" (up to +{100 * s.lead:.0f})")
            )
    return ", ".join(parts)


@dataclass(frozen=True)
class Slot:
    """A pair of widths of a network where integers and minifloats were tried by the same techniques."""

    network: str
    kind: str
    widths: tuple[int, int]
    integer: Point
    minifloat: Point

    @property
    def difference(self) -> tuple[float, float]:
        """Minifloat - integer and its standard error."""
        return paired(self.minifloat, self.integer)


Pair = tuple[str, str]


def duel(rows: Iterable[Row], facts: Mapping[str, Any], one: Pair, other: Pair) -> tuple[Point, Point] | None:
    """Two designs (weights, acts) by the best of the techniques that both have; None where there is none."""
    both = [r for r in rows if (r["weights"], r["acts"]) in (one, other) and r["network"] == facts["network"]]
    tried = [
        {r["technique"] for r in both if (r["weights"], r["acts"]) == pair and "error" not in r}
        for pair in (one, other)
    ]
    common = tried[0] & tried[1]
    points = {(p.weights, p.acts): p for p in points_of((r for r in both if r["technique"] in common), facts)}
    return (points[one], points[other]) if common else None


def slots(rows: Sequence[Row], facts: Mapping[str, Any]) -> list[Slot]:
    """Every pair of widths: the integers and the ExMy chosen by noise (E >= 2 on a side).

    One design against one: no family has more tries than the other.
    """
    found = []
    for (w, a), names in chosen(facts["sqnr_db"]).items():
        points = duel(rows, facts, (f"int{w}", f"int{a}"), names)
        if points is not None:
            found.append(Slot(facts["network"], facts["kind"], (w, a), *points))
    return found


def chosen(noise: Mapping[str, Mapping[str, float]]) -> dict[tuple[int, int], Pair]:
    """The minifloat pair of every pair of widths: of least noise, and of least noise with E >= 2 if that is E1, E1."""
    result = {}
    for w, a in product(_widths(noise), repeat=2):
        pair = _least(noise, "weights", w), _least(noise, "acts", a)
        result[w, a] = (
            pair if kind_of(*pair) == MINIFLOAT else (_least(noise, "weights", w, 2), _least(noise, "acts", a, 2))
        )
    return result


def _widths(noise: Mapping[str, Mapping[str, float]]) -> list[int]:
    return sorted({width(name) for name in noise["weights"]})


def _exp(name: str) -> int:
    fmt = parse(name)
    return fmt.exp if isinstance(fmt, Float) else 0


def _least(noise: Mapping[str, Mapping[str, float]], side: str, b: int, least_exponent: int = 1) -> str:
    """The ExMy of b bits with the most SQNR on a side."""
    names = [n for n in noise[side] if width(n) == b and _exp(n) >= least_exponent]
    return max(names, key=noise[side].__getitem__)


# ---------------------------------------------------------------------------------------------------- figures


def panels(networks: Mapping[str, Sequence[Point]], axis: str) -> Figure:
    """Quality against cost, a panel per network: designs as marks, the front of each family as a staircase."""
    columns = 4
    lines = -(-(len(networks) + 1) // columns)
    figure, grid = plt.subplots(
        lines, columns, figsize=(3.3 * columns, 2.5 * lines), layout="constrained", squeeze=False
    )
    for axes, (name, points) in zip(grid.flat, networks.items(), strict=False):
        _panel(axes, points, axis)
        axes.set_title(name, fontsize=10, fontweight="bold", loc="left")
    for axes in grid.flat[len(networks) :]:
        axes.axis("off")
    for kind, (color, marker, label) in STYLE.items():
        grid.flat[-1].plot([], [], marker=marker, color=color, linestyle="-" if kind != E1 else "none", label=label)
    grid.flat[-1].legend(loc="center", frameon=False, fontsize=10, title="lines: best for at most this cost")
    figure.supxlabel(AXES[axis], fontsize=11)
    figure.supylabel("kept of the float network's quality (%)", fontsize=11)
    return figure


def _panel(axes: Axes, points: Sequence[Point], axis: str) -> None:
    right = max((p.cost[axis] for p in points), default=1.0)
    if axis == "luts_mac":  # not to the widest exponents, which cost 5 times as much
        right = min(right, 1.55 * max((p.cost[axis] for p in of_kind(points, INTEGER)), default=right))
    for kind in (E1, MINIFLOAT, INTEGER):
        color, marker, _ = STYLE[kind]
        some = of_kind(points, kind)
        xs, ys = [p.cost[axis] for p in some], [100 * max(p.kept, -0.02) for p in some]
        axes.scatter(xs, ys, s=13, c=color, marker=marker, alpha=0.45, linewidths=0.8 if kind == E1 else 0, zorder=2)
        line = front(some, axis) if kind != E1 else []
        if line:
            xs = [*(p.cost[axis] for p in line), right * 1.02]
            ys = [100 * max(p.kept, -0.02) for p in line]
            axes.step(xs, [*ys, ys[-1]], where="post", color=color, linewidth=1.8, zorder=3)
    axes.axhline(100, color="#555555", linewidth=0.8, linestyle=(0, (4, 3)), zorder=1)
    left = min((p.cost[axis] for p in points), default=0.0)
    axes.set_xlim(left - 0.04 * (right - left), right * 1.02)
    lowest = min((p.kept for kind in (INTEGER, MINIFLOAT) for p in front(of_kind(points, kind), axis)), default=0.0)
    axes.set_ylim(min(max(-6.0, 100 * lowest - 8), 84.0), 108)
    axes.grid(color="#e6e6e6", linewidth=0.7)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)


def heatmaps(found: Sequence[Slot]) -> Figure:
    """Minifloat - integer in points of float quality at every pair of widths, the mean over each kind's networks."""
    kinds = [kind for kind in KINDS if any(s.kind == kind for s in found)]
    figure, grid = plt.subplots(
        1, len(kinds), figsize=(4.1 * len(kinds), 4.1), layout="constrained", squeeze=False, sharey=True
    )
    for axes, kind in zip(grid.flat, kinds, strict=True):
        table = np.full((len(WIDTHS), len(WIDTHS)), np.nan)
        for i, w in enumerate(WIDTHS):
            for j, a in enumerate(WIDTHS):
                some = [s.difference[0] for s in found if s.kind == kind and s.widths == (w, a)]
                if some:
                    table[i, j] = 100 * float(np.mean(some))
                    axes.text(j, i, _points(table[i, j] / 100, 0), ha="center", va="center", fontsize=9)
        axes.set_facecolor("#f0f0f0")
        image = axes.imshow(np.clip(table, -40, 40), cmap="PuOr_r", vmin=-60, vmax=60, origin="lower")
        axes.set_xticks(range(len(WIDTHS)), [str(b) for b in WIDTHS])
        axes.set_yticks(range(len(WIDTHS)), [str(b) for b in WIDTHS])
        count = len({s.network for s in found if s.kind == kind})
        axes.set_title(f"{KINDS[kind]} ({count})", fontsize=11, fontweight="bold", loc="left")
        axes.set_xlabel("activation bits")
    grid.flat[0].set_ylabel("weight bits")
    bar = figure.colorbar(image, ax=grid.ravel().tolist(), shrink=0.8)
    bar.set_label("minifloat - integer,\npoints of float quality kept")
    return figure


def equal_widths(networks: Mapping[str, Sequence[Point]], found: Sequence[Slot]) -> Figure:
    """Quality at equal widths of weights and activations, mean over each kind's networks that have the width.

    Integers, the minifloats of least noise, and of every network the best of all its ExMy (picked by test quality).
    """
    names = [kind for kind in KINDS if any(s.kind == kind for s in found)]
    figure, grid = plt.subplots(
        1, len(names), figsize=(4.1 * len(names), 3.6), layout="constrained", squeeze=False, sharey=True
    )
    for axes, kind in zip(grid.flat, names, strict=True):
        some = [s for s in found if s.kind == kind and s.widths[0] == s.widths[1]]
        members = sorted({s.network for s in some})
        of_width = {b: [s for s in some if s.widths == (b, b)] for b in WIDTHS}
        best = {
            b: [max(p.kept for p in of_kind(networks[s.network], MINIFLOAT) if p.widths == (b, b)) for s in those]
            for b, those in of_width.items()
        }
        lines = (
            (INTEGER, "-", "integer", {b: [s.integer.kept for s in those] for b, those in of_width.items()}),
            (
                MINIFLOAT,
                "-",
                "minifloat of least noise",
                {b: [s.minifloat.kept for s in t] for b, t in of_width.items()},
            ),
            (MINIFLOAT, ":", "best minifloat of each network", best),
        )
        for family, stroke, label, kepts in lines:
            color, marker, _ = STYLE[family]
            xs = [b for b, some_kept in kepts.items() if some_kept]
            ys = [100 * float(np.mean(kepts[b])) for b in xs]
            axes.plot(xs, ys, color=color, linestyle=stroke, label=label, linewidth=1.8,
                      marker=marker if stroke == "-" else "", zorder=3)  # fmt: skip
        axes.axhline(100, color="#555555", linewidth=0.8, linestyle=(0, (4, 3)))
        axes.set_title(f"{KINDS[kind]} ({len(members)})", fontsize=11, fontweight="bold", loc="left")
        axes.set_xlabel("bits of weights and of activations")
        axes.set_ylim(-4, 108)
        axes.grid(color="#e6e6e6", linewidth=0.7)
        axes.spines[["top", "right"]].set_visible(False)
    grid.flat[0].set_ylabel("kept of the float\nnetwork's quality (%)")
    grid.flat[-1].legend(frameon=False, fontsize=9, loc="lower right")
    return figure


def same_format_means(networks: Mapping[str, Sequence[Point]]) -> dict[str, float]:
    """Mean quality of every format on both sides, over the networks; of those that every network has."""
    found: dict[str, list[float]] = {}
    for points in networks.values():
        for p in points:
            if p.weights == p.acts:
                found.setdefault(p.weights, []).append(p.kept)
    return {name: float(np.mean(some)) for name, some in found.items() if len(some) == len(networks)}


# ---------------------------------------------------------------------------------------------------- words


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join(["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *lines)])


def publish_study(work: Path, planned: Mapping[str, tuple[int, int]]) -> None:
    """Write reports/minifloat_vs_integer from the rows in `work`.

    planned: the networks, and how many designs and rows the whole study has of each.
    """
    names = list(planned)
    every = {row["id"]: row for row in read_rows(work / "rows.jsonl")}
    rows = [row for row in every.values() if row["network"] in planned]
    facts = {n: json.loads((work / f"{n}.json").read_text()) for n in names if (work / f"{n}.json").is_file()}
    facts = {n: f for n, f in facts.items() if any(r["network"] == n for r in rows)}
    networks = {n: points_of(rows, f) for n, f in facts.items()}
    found = [slot for f in facts.values() for slot in slots(rows, f)]
    FOLDER.mkdir(parents=True, exist_ok=True)
    _write_rows(rows, facts, networks)
    for axis in AXES:
        _save(panels(networks, axis), f"quality_by_{axis}")
    _save(heatmaps(found), "same_widths")
    _save(equal_widths(networks, found), "equal_widths")
    (FOLDER / "README.md").write_text(reading(rows, facts, networks, found, {n: planned[n] for n in facts}))
    print(f"wrote {FOLDER.relative_to(FOLDER.parent.parent)}: {len(rows)} rows, {len(networks)} networks")


def _save(figure: Figure, stem: str) -> None:
    figure.savefig(FOLDER / f"{stem}.png", dpi=130)
    plt.close(figure)


def _write_rows(rows: Sequence[Row], facts: Mapping[str, Any], networks: Mapping[str, Sequence[Point]]) -> None:
    """rows.csv: every design and technique; fronts.csv: the designs on the front of each cost."""
    columns = ("network", "kind", "group", "family", "weights", "acts", "technique", "quality", "stderr", "n", "kept",
               "acc_bits", "luts_mac", "luts_mac32", "weight_kib", "folded_luts", "folded_dsps", "folded_cycles",
               "quantize_seconds", "seconds", "error")  # fmt: skip
    with (FOLDER / "rows.csv").open("w", newline="") as handle:
        handle.write(f"# {COMMAND}\n")
        writer = csv.writer(handle, lineterminator="\n")
        writer.writerow(columns)
        for row in rows:
            if row["network"] not in facts:
                continue
            extra: Row = {"family": kind_of(row["weights"], row["acts"])}
            if "error" not in row:
                extra["kept"] = float(kept(row, facts[row["network"]]).mean())
            writer.writerow([_cell((row | extra).get(column)) for column in columns])
    with (FOLDER / "fronts.csv").open("w", newline="") as handle:
        handle.write(f"# {COMMAND}\n")
        writer = csv.writer(handle, lineterminator="\n")
        writer.writerow(("network", "axis", "cost", "kept", "family", "weights", "acts", "technique"))
        for name, points in networks.items():
            for axis in AXES:
                for p in front(points, axis):
                    writer.writerow(
                        (name, axis, _cell(p.cost[axis]), _cell(p.kept), p.kind, p.weights, p.acts, p.technique)
                    )


def _cell(value: Any) -> Any:
    return f"{value:.5g}" if isinstance(value, float) else value


def reading(
    rows: Sequence[Row],
    facts: Mapping[str, Any],
    networks: Mapping[str, Sequence[Point]],
    found: Sequence[Slot],
    planned: Mapping[str, tuple[int, int]],
) -> str:
    """README.md: tables and sentences whose every number comes from the rows."""
    signed = against_signed(rows, facts)
    parts = [
        f"`{COMMAND}`",
        "# Integers and minifloats after training",
        _method(facts),
        "## In short",
        _in_short(networks, found, signed),
        "## The same widths, integer against minifloat",
        _same_widths(networks, found),
        "## Fronts, and where they cross",
        _fronts(networks),
        "## All networks together",
        _overall(found),
        "## Which ExMy",
        _exponents(facts, networks),
        "## What was expected",
        _expectations(networks, found),
        "## Signed integers",
        _signed(signed),
        "## Techniques",
        _techniques(rows, facts),
        "## What is covered, and what this does not show",
        _coverage(rows, facts, networks, planned),
    ]
    blocks = "\n\n".join(part for part in parts if part).split("\n\n")
    return "\n\n".join(map(_wrapped, blocks)) + "\n"


def _wrapped(block: str) -> str:
    """A block of Markdown, prose filled to 120 columns and the items of a list one after the other."""
    if block.startswith(("|", "#", "!", "`")):
        return block
    if not block.startswith("- "):
        return _filled(block)
    items = block.removeprefix("- ").split("\n- ")
    return "\n".join(_filled(f"- {item}", "  ") for item in items)


def _filled(text: str, indent: str = "") -> str:
    return textwrap.fill(" ".join(text.split()), 120, subsequent_indent=indent, break_on_hyphens=False)


def _method(facts: Mapping[str, Any]) -> str:
    counts = Counter(KINDS[f["kind"]] for f in facts.values())
    return f"""\
Every number below is computed from `rows.csv` by the command in the first line. {_listed(counts)} are quantized after
training to 3..8 bits of weights and of activations, as integers and as minifloats ExMy without reserved codes; first
and last layers have the same formats as all others. A design counts by its best technique. *Kept* is
(outcome - chance) / (float - chance): accuracy, survival of flights, or return, where chance is guessing, a crash, or
random actions; 100 % is the float network. A difference is paired (same images, starts, episodes) and counts from
{SURE:g} standard errors on. Costs are estimates of `hwmodel`, not synthesis runs: the LUTs of one MAC unit of one lane
with the network's widest exact accumulator (`luts_mac`; `luts_mac32` in the rows: per lane of a unit of 32), and the
exact bits of the weights with their float32 scales. Integers are unsigned where no input is negative, minifloats are
always signed. E1My on both sides is the narrow signed integer of as many bits, so it stands on its own in every count
and "minifloat" means E >= 2 on at least one side."""


def _listed(counts: Mapping[str, int]) -> str:
    words = [f"{n} {name}" for name, n in counts.items()]
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _points(value: float, digits: int = 1) -> str:
    """A difference in points, never "-0"."""
    return f"{round(100 * value, digits) + 0.0:+.{digits}f}"


def _verdicts(some: Sequence[Slot]) -> tuple[int, int, int]:
    """How many slots minifloats lead, integers lead, and are level."""
    ahead = behind = 0
    for slot in some:
        mean, error = slot.difference
        if abs(mean) > max(SURE * error, 1e-9):
            ahead, behind = ahead + (mean > 0), behind + (mean < 0)
    return ahead, behind, len(some) - ahead - behind


def _in_short(networks: Mapping[str, Sequence[Point]], found: Sequence[Slot], signed: Against) -> str:
    lines = []
    for kind, label in KINDS.items():
        for text, low, high in (("3-4", 3, 4), ("5", 5, 5), ("6-8", 6, 8)):
            some = [s for s in found if s.kind == kind and low <= min(s.widths) <= high]
            if some:
                ahead, behind, level = _verdicts(some)
                mean = float(np.mean([s.difference[0] for s in some]))
                lines.append([label, text, str(len(some)), str(ahead), str(level), str(behind), _points(mean)])
    head = [
        "networks",
        "bits of the narrower side",
        "cases",
        "minifloat ahead",
        "level",
        "integer ahead",
        "mean difference",
    ]
    duels = table(head, lines)
    fronts = {axis: Counter(p.kind for points in networks.values() for p in front(points, axis)) for axis in AXES}

    def share(axis: str, *kinds: str) -> str:
        return f"{sum(fronts[axis][k] for k in kinds)} of {sum(fronts[axis].values())}"

    premium = {lanes: _premium(found, cost) for lanes, cost in (("one lane", "luts_mac"), ("32 lanes", "luts_mac32"))}
    dearer = " and ".join(f"{mean:+.0f} % ({low:+.0f} to {high:+.0f})" for low, mean, high in premium.values())
    cheap = {axis: _cheapest(networks, axis) for axis in ("luts_mac", "weight_kib")}
    cross = {axis: _crossing(networks, axis, digits) for axis, digits in (("luts_mac", ".0f"), ("mean_bits", ".1f"))}
    return f"""\
The same widths against each other, the minifloat pair chosen by quantization noise alone (a case is a network and a
pair of widths; level: the paired difference is below {SURE:g} standard errors; differences in points of float quality):

{duels}

- **LUTs.** Integers or E1My are {share("luts_mac", INTEGER, E1)} designs on the {len(networks)} fronts, minifloats
  {share("luts_mac", MINIFLOAT)}. A minifloat MAC of the same widths takes {dearer} more LUTs
  with one lane and with 32 (mean, 10th to 90th percentile of the cases).
  {cheap["luts_mac"]}
  {cross["luts_mac"]}
- **Weight memory.** Same widths cost the same here, so quality alone decides: minifloats are
  {share("weight_kib", MINIFLOAT)} designs on the fronts, integers {share("weight_kib", INTEGER)}, E1My
  {share("weight_kib", E1)}.
  {cheap["weight_kib"]}
- **Mean bits.** Minifloats are {share("mean_bits", MINIFLOAT)} designs on the fronts, integers
  {share("mean_bits", INTEGER)}, E1My {share("mean_bits", E1)}.
  {cross["mean_bits"]}
- **Choice of ExMy.** {_missed(networks, found)}{_sign_bit(signed)}"""


def _crossing(networks: Mapping[str, Sequence[Point]], axis: str, digits: str) -> str:
    """In how many networks each family leads somewhere, and below which cost for the last time."""
    said = []
    for family in (INTEGER, MINIFLOAT):
        ends = []
        for points in networks.values():
            found = stretches(points, axis)
            led = [i for i, s in enumerate(found) if s.leader == family and not np.isnan(s.lead)]
            if led:
                ends.append(found[led[-1] + 1].start if led[-1] + 1 < len(found) else float("inf"))
        if ends:
            open_end = sum(np.isinf(end) for end in ends)
            closed = sorted(end for end in ends if np.isfinite(end))
            last = f" (for the last time below {np.median(closed):{digits}} in the median)" if closed else ""
            said.append(
                f"{family}s lead somewhere in {len(ends)} networks{last}"
                + (f", to the end in {open_end}" if open_end else "")
            )
    return "Where both have a design, " + ", ".join(said) + "." if said else ""


def _cheapest(networks: Mapping[str, Sequence[Point]], axis: str) -> str:
    """Who is the cheapest to keep 95 %, in how many networks, and what the other family costs."""
    ratios, first = [], Counter[str]()
    for points in networks.values():
        one, other = (cheapest(of_kind(points, k), axis, 0.95) for k in (INTEGER, MINIFLOAT))
        costs = {k: p.cost[axis] for k, p in ((INTEGER, one), (MINIFLOAT, other)) if p is not None}
        if costs:
            lead = {k for k, cost in costs.items() if cost == min(costs.values())}
            first["both" if len(lead) == 2 else lead.pop()] += 1
        if len(costs) == 2:
            ratios.append(costs[MINIFLOAT] / costs[INTEGER])
    if not ratios:
        return ""
    return (
        f"The cheapest to keep 95 % is an integer in {first[INTEGER]} of the networks, a minifloat in"
        f" {first[MINIFLOAT]}, both at the same cost in {first['both']}; the minifloat costs {np.median(ratios):.2f}"
        f" times the integer in the median network ({min(ratios):.2f} to {max(ratios):.2f})."
    )


def _premium(found: Sequence[Slot], cost: str) -> tuple[float, float, float]:
    """10th percentile, mean and 90th percentile of the minifloat's extra cost in percent, over slots."""
    extra = [100 * (s.minifloat.cost[cost] / s.integer.cost[cost] - 1) for s in found] or [float("nan")]
    return float(np.percentile(extra, 10)), float(np.mean(extra)), float(np.percentile(extra, 90))


def _same_widths(networks: Mapping[str, Sequence[Point]], found: Sequence[Slot]) -> str:
    lines = []
    cells_of_maps = {(s.kind, s.widths) for s in found}
    whole = len(cells_of_maps) == len({s.kind for s in found}) * len(WIDTHS) ** 2
    grey = "" if whole else " Grey pairs of widths in the first picture are not measured yet."
    for name in networks:
        cells = [name]
        for b in WIDTHS:
            slot = next((s for s in found if s.network == name and s.widths == (b, b)), None)
            if slot is None:
                cells.append("")
                continue
            mean, error = slot.difference
            mark = "**" if abs(mean) > max(SURE * error, 1e-9) else ""
            cells.append(
                f"{100 * slot.integer.kept:.0f} → {100 * slot.minifloat.kept:.0f} ({mark}{_points(mean)}{mark})"
            )
        lines.append(cells)
    return (
        "Percent kept by intB → by the minifloat pair of B bits with the least quantization noise (E >= 2 on a side),"
        " both by the same techniques; bold where the paired difference counts. Nothing is picked by test quality but"
        " the technique.\n\n"
        + table(["network", *(f"{b} bits" for b in WIDTHS)], lines)
        + "\n\n![minifloat - integer at every pair of widths](same_widths.png)\n\n"
        "![quality at equal widths](equal_widths.png)\n\n"
        "In the second picture the dotted line takes the best ExMy of each network by test quality, E >= 2 on a side."
        + grey
    )


def _fronts(networks: Mapping[str, Sequence[Point]]) -> str:
    parts = [
        "*int / mf / E1* counts designs on the front of all. *Cheapest to keep* is integer / minifloat (- where none"
        " does). *Who leads* follows the best integer and the best minifloat up to a cost: from the number on, the"
        " family that keeps more, with its largest lead in points. More minifloats than integers were tried, and each"
        " line takes the best of its family, so a narrow lead of minifloats is partly choice."
    ]
    for axis, label in AXES.items():
        digits = ".1f" if axis == "mean_bits" else ".0f" if axis == "luts_mac" else ".3g"
        lines = []
        for name, points in networks.items():
            members = Counter(p.kind for p in front(points, axis))
            cells = [name, " / ".join(str(members[k]) for k in (INTEGER, MINIFLOAT, E1))]
            for share in KEPT:
                least = [cheapest(of_kind(points, k), axis, share) for k in (INTEGER, MINIFLOAT)]
                cells.append(" / ".join("-" if p is None else f"{p.cost[axis]:{digits}}" for p in least))
            cells.append(told(stretches(points, axis), digits))
            lines.append(cells)
        head = ["network", "int / mf / E1", *(f"{100 * s:.0f} %" for s in KEPT), "who leads"]
        parts += [f"### Against {label}", table(head, lines), f"![quality by {axis}](quality_by_{axis}.png)"]
    return "\n\n".join(parts)


def _overall(found: Sequence[Slot]) -> str:
    names = {s.network for s in found}
    common = [pair for pair in {s.widths for s in found} if {s.network for s in found if s.widths == pair} == names]
    base = {s.network: s.integer for s in found if s.widths == (8, 8)}
    if not common or set(base) != names:
        return ""
    means: list[Point] = []
    for pair in sorted(common):
        some = [s for s in found if s.widths == pair]
        for kind in (INTEGER, MINIFLOAT):
            those = [s.integer if kind == INTEGER else s.minifloat for s in some]
            cost = {"mean_bits": sum(pair) / 2}
            for c in ("luts_mac", "luts_mac32", "weight_kib"):
                cost[c] = float(np.mean([p.cost[c] / base[p.network].cost[c] for p in those]))
            values = np.array([p.kept for p in those])
            w, a = (f"{'int' if kind == INTEGER else 'float'}{b}" for b in pair)
            means.append(Point("all", "", w, a, kind, "", float(values.mean()), values, cost))
    lines = []
    for axis in ("mean_bits", "luts_mac", "luts_mac32", "weight_kib"):
        label = AXES.get(axis, "LUTs per MAC, 32 lanes") + (" (int8/int8 = 1)" if axis != "mean_bits" else "")
        members = front(means, axis)
        listed = ", ".join(f"{p.name} ({p.cost[axis]:.2f}, {100 * p.kept:.0f} %)" for p in members)
        count = Counter(p.kind for p in members)
        lines.append([label, f"{count[INTEGER]} / {count[MINIFLOAT]}", listed, told(stretches(means, axis), ".2f")])
    return (
        f"Mean over the {len(names)} networks of what a pair of widths keeps, integers and minifloats of least noise"
        f" (floatB), at the {len(common)} pairs that every network has; costs are relative to each network's int8/int8."
        " Standard errors are those over networks.\n\n"
        + table(["cost", "int / mf on the front", "front: cost, kept", "who leads from which cost on"], lines)
    )


def _exponents(facts: Mapping[str, Any], networks: Mapping[str, Sequence[Point]]) -> str:
    lines = []
    for b in WIDTHS:
        for kind in KINDS:
            members = {n: p for n, p in networks.items() if facts[n]["kind"] == kind}
            means = {k: v for k, v in same_format_means(members).items() if width(k) == b}
            if len(means) > 1:
                order = sorted(means, key=lambda k: -means[k])
                lines.append([str(b), KINDS[kind], ", ".join(f"{k} {100 * means[k]:.0f}" for k in order)])
    votes = {
        side: Counter(_exp(_least(f["sqnr_db"], side, b)) for f in facts.values() for b in _widths(f["sqnr_db"]))
        for side in ("weights", "acts")
    }
    said = "; ".join(
        f"{side}: " + ", ".join(f"E{e} {n}" for e, n in sorted(votes[side].items())) for side in ("weights", "acts")
    )
    return (
        f"The exponent bits of least noise, counted over networks and widths: {said}.\n\n"
        "Percent kept with the same format on both sides, mean over the networks of a kind where all have it, best"
        " first:\n\n" + table(["bits", "networks", "kept"], lines)
    )


def _missed(networks: Mapping[str, Sequence[Point]], found: Sequence[Slot]) -> str:
    """What the least noise misses: the best ExMy with itself against the pair of least noise, at equal widths."""
    said, widest = [], None
    for kind, label in KINDS.items():
        gains = []
        for s in found:
            others = [
                p for p in of_kind(networks[s.network], MINIFLOAT) if p.widths == s.widths and p.weights == p.acts
            ]
            if s.kind != kind or s.widths[0] != s.widths[1] or s.widths[0] > 5 or not others:
                continue
            best = max(others, key=lambda p: p.kept)
            gains.append(max(0.0, best.kept - s.minifloat.kept))
            if widest is None or gains[-1] > widest[0]:
                widest = gains[-1], s, best
        if gains:
            said.append(f"{100 * float(np.mean(gains)):.1f} points for {label} ({len(gains)} cases)")
    if widest is None:
        return ""
    _, slot, best = widest
    return (
        "Least noise is not always most quality. At 3 to 5 bits the best ExMy with itself, picked by test quality,"
        f" keeps more than the pair of least noise by a mean of {', '.join(said)}. The widest gap is {slot.network} at"
        f" {slot.widths[0]} bits: {best.name} keeps {100 * best.kept:.0f} %, {slot.minifloat.name} of least noise"
        f" {100 * slot.minifloat.kept:.0f} %, {slot.integer.name} {100 * slot.integer.kept:.0f} %."
    )


def _expectations(networks: Mapping[str, Sequence[Point]], found: Sequence[Slot]) -> str:
    """The expectations written down before the study (design notes after the paper), each with what was found."""
    lines = []
    luts = Counter(p.kind for points in networks.values() for p in front(points, "luts_mac"))
    share = (luts[INTEGER] + luts[E1]) / max(1, sum(luts.values()))
    lines.append(["the LUT front is mostly integer", f"{100 * share:.0f} % of it is, E1My counted as integers",
                  _holds(share > 0.5)])  # fmt: skip
    four = [s for s in found if s.widths == (4, 4)]
    if four:
        mean = float(np.mean([s.difference[0] for s in four]))
        ahead, behind, _ = _verdicts(four)
        lines.append(["at 4 bits minifloats compete with int4",
                      f"{_points(mean)} points on average; ahead in {ahead}, behind in {behind} of {len(four)}",
                      "holds" if ahead >= behind else "in part: more often behind than ahead"])  # fmt: skip
    memory = [p for points in networks.values() for p in front(points, "weight_kib") if p.widths[0] >= 4]
    if memory:
        share = sum(p.kind == MINIFLOAT for p in memory) / len(memory)
        lines.append(["the memory front is minifloat from 4 weight bits on",
                      f"{100 * share:.0f} % of its {len(memory)} designs of 4 or more weight bits are",
                      _holds(share > 0.5)])  # fmt: skip
    gaps = {s.network: s.difference[0] for s in four if s.kind == "vision"}
    if "vit_mnist" in gaps:
        listed = ", ".join(f"{n} {_points(g)}" for n, g in sorted(gaps.items(), key=lambda item: -item[1]))
        sure = _verdicts([s for s in four if s.network == "vit_mnist"])[0] == 1
        verdict = _holds(max(gaps, key=gaps.__getitem__) == "vit_mnist") + ("" if sure else ", its gain within noise")
        lines.append(["of the vision networks ViT gains most", f"minifloat - int4 at 4/4: {listed}", verdict])
    equal = [s for s in found if s.widths[0] == s.widths[1]]
    if equal:
        low, mean, high = _premium(equal, "luts_mac32")
        lines.append(["a minifloat MAC takes 20 to 180 % more LUTs than an integer's (published, on Versal)",
                      f"{low:+.0f} to {high:+.0f} % (mean {mean:+.0f} %) in 80 % of equal widths, 32 lanes",
                      _holds(low >= 20 and high <= 180)])  # fmt: skip
    return table(["expected", "found", ""], lines)


def _holds(yes: bool) -> str:
    return "holds" if yes else "does not hold"


Against = dict[tuple[str, int], dict[str, list[float]]]


def against_signed(rows: Sequence[Row], facts: Mapping[str, Any]) -> Against:
    """Differences to E1My on both sides, {(kind, bits): {"integer": [...], "minifloat": [...]}}, a network each.

    The integer is intB, the minifloat the pair of least noise; each by the techniques that E1My was tried with, too.
    """
    found: Against = {}
    for f in facts.values():
        pairs = chosen(f["sqnr_db"])
        for b in _widths(f["sqnr_db"]):
            signed = f"e1m{b - 2}", f"e1m{b - 2}"
            duels = [duel(rows, f, pair, signed) for pair in ((f"int{b}", f"int{b}"), pairs[b, b])]
            if duels[0] is not None and duels[1] is not None:
                cell = found.setdefault((f["kind"], b), {INTEGER: [], MINIFLOAT: []})
                cell[INTEGER].append(paired(*duels[0])[0])
                cell[MINIFLOAT].append(paired(*duels[1])[0])
    return found


def _signed(found: Against) -> str:
    if not found:
        return ""
    lines = [
        [label, str(b), *(f"{_points(float(np.mean(d)))} ({len(d)})" for d in found[kind, b].values())]
        for kind, label in KINDS.items()
        for b in WIDTHS
        if (kind, b) in found
    ]
    return (
        "E1My on both sides is the integer as the paper is said to have it, signed everywhere. Mean difference to it in"
        " points (networks), at equal widths, by the techniques that both were tried with:\n\n"
        + table(["networks", "bits", "intB, unsigned where it can be", "minifloat of least noise"], lines)
    )


def _sign_bit(found: Against) -> str:
    """The bullet on signed integers; empty without vision networks, whose ReLUs make inputs unsigned."""
    cells = [cell for (kind, b), cell in found.items() if kind == "vision" and b <= 5]
    means = {family: [d for cell in cells for d in cell[family]] for family in (INTEGER, MINIFLOAT)}
    if not means[INTEGER]:
        return ""
    integer, minifloat = (float(np.mean(means[family])) for family in (INTEGER, MINIFLOAT))
    return (
        "\n- **The sign bit.** Behind a ReLU an unsigned integer has one bit more than a minifloat of its width."
        f" Against signed integers (E1My on both sides) the vision networks at 3 to 5 bits keep {_points(minifloat)}"
        f" points with minifloats and {_points(integer)} with integers that may be unsigned, the mean of"
        f" {len(means[INTEGER])} cases."
    )


def _techniques(rows: Sequence[Row], facts: Mapping[str, Any]) -> str:
    lines = []
    for kind, label in KINDS.items():
        scores: dict[tuple[str, str, str], dict[str, float]] = {}
        for row in rows:
            if row["network"] in facts and facts[row["network"]]["kind"] == kind and "error" not in row:
                key = row["network"], row["weights"], row["acts"]
                scores.setdefault(key, {})[row["technique"]] = float(kept(row, facts[row["network"]]).mean())
        names = sorted({t for found in scores.values() for t in found})
        full = {key: found for key, found in scores.items() if len(found) == len(names)}
        for text, low, high in (("3-4", 3, 4), ("5-8", 5, 8)):
            some = [found for key, found in full.items() if low <= min(width(key[1]), width(key[2])) <= high]
            if some:
                cells = ", ".join(f"{t} {100 * np.mean([found[t] for found in some]):.0f}" for t in names)
                wins = Counter(max(found, key=found.__getitem__) for found in some)
                best = ", ".join(f"{t} {wins[t]}" for t in names)
                lines.append([label, text, str(len(some)), cells, best])
    return (
        "Where every technique of a kind was tried: percent kept on average, and how often it was the best (of equals"
        " the first).\n\n" + table(["networks", "bits of the narrower side", "designs", "kept", "best"], lines)
    )


def _coverage(
    rows: Sequence[Row],
    facts: Mapping[str, Any],
    networks: Mapping[str, Sequence[Point]],
    planned: Mapping[str, tuple[int, int]],
) -> str:
    lines = []
    for name, f in facts.items():
        some = [row for row in rows if row["network"] == name]
        designs, tries = planned[name]
        kinds = Counter(p.kind for p in networks[name])
        technique = Counter(row["technique"] for row in some if "error" not in row)
        unit = {"vision": "images", "flight": "flights", "policy": "episodes"}[f["kind"]]
        quality = f"{f['quality']:.1f}" if f["kind"] == "policy" else f"{100 * f['quality']:.1f} %"
        lines.append([
            name, f"{quality} of {f['n']} {unit}", f"{f['weights']:,}", f"{len(networks[name])} of {designs}",
            " / ".join(str(kinds[k]) for k in (INTEGER, MINIFLOAT, E1)), f"{len(some)} of {tries}",
            ", ".join(f"{t} {n}" for t, n in technique.items()), str(sum("error" in row for row in some)),
        ])  # fmt: skip
    head = ["network", "float", "weights", "designs", "int / mf / E1", "rows", "techniques", "refused"]
    minutes = [sum(row.get(key, 0.0) for row in rows) / 60 for key in ("seconds", "cpu_seconds")]
    done, total = len(rows), sum(tries for _, tries in planned.values())
    whole = "All" if done == total else f"{done} of {total}"
    more = "" if done == total else " The same command with the same `--work` goes on where it stopped."
    return (
        table(head, lines)
        + f"""

{whole} rows (a design and a technique each) are there, measured in {minutes[0]:.0f} minutes of one process on a loaded
machine ({minutes[1]:.0f} minutes of processor time).{more} The order is: equal widths, every ExMy with itself (E <= 3),
other pairs of widths, E >= 4, each with the first of the kind's techniques before the others. A refused design is one
whose products can exceed float32.

- Test sets are small: one image of 1,000 is 0.1 points, a survival of 198 flights has a standard error of up to 3.6
  points, and 10 or 20 episodes pair well only where the quantized agent acts like the float one. The technique is
  picked by test quality, in both families.
- One calibration set and one seed per network. Activations have static scales per tensor, weights scales per row.
- More minifloats than integers were tried at equal widths, so fronts favour them a little; the first table does not.
- The LUT axis prices one MAC for weights times activations. Products of two activations (attention), conversion of
  sums back to the next layer's format, and memories are not in it; the folded estimates in the rows (equal widths, rtn)
  include conversion and memories.
- The network's quality on the FPGA would be that of these rows only with the exact accumulators priced here."""
    )

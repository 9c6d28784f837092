"""Non-dominated designs, and the one to take."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from quantkit.errors import InputError

COLUMNS: dict[str, tuple[str, str, bool]] = {
    # name: (path in a row, label, higher is better)
    "mean": ("score.mean", "return", True),
    "iqm": ("score.iqm", "interquartile mean of return", True),
    "luts": ("cost.luts", "LUTs", False),
    "ffs": ("cost.ffs", "flip-flops", False),
    "dsps": ("cost.dsps", "DSPs", False),
    "bram18": ("cost.bram18", "BRAM18", False),
    "latency_us": ("cost.latency_us", "latency (µs)", False),
    "weight_kib": ("weight_kib", "weight memory (KiB)", False),
    "bits_per_weight": ("bits_per_weight", "bits per weight", False),
    "agreement": ("fidelity.agreement", "action agreement", True),
    "action_error": ("fidelity.action_error", "action error", False),
    "kl": ("fidelity.kl", "KL to the float policy", False),
    "q_error": ("fidelity.q_error", "error of Q-values", False),
    "q_regret": ("fidelity.q_regret", "Q-value lost by the action", False),
}
_OF_ACCURACY = {
    "mean": "accuracy",
    "iqm": "accuracy, Wilson's interval",
    "agreement": "agreement with float",
    "kl": "KL to the float network",
}
RETURNS = ("mean", "iqm")
"""The columns that are means over episodes."""
COSTS = ("luts", "ffs", "dsps", "bram18", "latency_us", "weight_kib", "bits_per_weight")
"""The columns that say what a design takes; the others say how well it acts."""


def metric_of(rows: Sequence[Mapping[str, Any]]) -> str:
    """What the rows' scores are means of: "return" of episodes, or "accuracy" of labelled inputs."""
    return str(rows[0]["score"].get("metric", "return")) if rows else "return"


def label(column: str, metric: str = "return") -> str:
    """A column's name for people, in a study of this metric."""
    return _OF_ACCURACY.get(column, COLUMNS[column][1]) if metric == "accuracy" else COLUMNS[column][1]


def value(row: Mapping[str, Any], column: str) -> float | None:
    """The number of a column in a row; None where the row has none. InputError lists the columns."""
    if column not in COLUMNS:
        raise InputError(f"unknown column {column!r}; columns: {', '.join(COLUMNS)}")
    found: Any = row
    for key in COLUMNS[column][0].split("."):
        found = found.get(key) if isinstance(found, Mapping) else None
    return float(found) if isinstance(found, int | float) and math.isfinite(found) else None


def nondominated(points: Sequence[tuple[float, ...]], maximize: Sequence[bool]) -> list[int]:
    """Indices of the points that no other point beats or equals everywhere and beats somewhere.

    Of identical points the first is kept. Ascending order.

    >>> nondominated([(1, 5), (2, 6), (3, 6), (1, 5)], maximize=(False, True))
    [0, 1]
    """
    signed = [tuple(-v if up else v for v, up in zip(p, maximize, strict=True)) for p in points]
    front: list[int] = []
    best: dict[tuple[float, ...], int] = {}
    for index in sorted(range(len(signed)), key=lambda i: (signed[i], i)):
        candidate = signed[index]
        if candidate in best:
            continue
        if not any(all(a <= b for a, b in zip(signed[i], candidate, strict=True)) for i in front):
            front.append(index)
            best[candidate] = index
    return sorted(front)


def front(rows: Sequence[Mapping[str, Any]], x: str = "luts", y: str = "mean") -> list[int]:
    """Indices of the rows on the front of two columns, ordered by x; rows without both numbers are left out.

    So are, of returns, rows marked `partial`: a mean over fewer episodes does not compare with one over all.
    """
    known = [i for i, row in enumerate(rows) if value(row, x) is not None and value(row, y) is not None]
    if y in RETURNS:
        known = [i for i in known if not rows[i].get("partial")]
    points = [(value(rows[i], x), value(rows[i], y)) for i in known]
    chosen = nondominated(points, (COLUMNS[x][2], COLUMNS[y][2]))  # type: ignore[arg-type]
    return sorted((known[i] for i in chosen), key=lambda i: value(rows[i], x) or 0.0)


def knee(
    rows: Sequence[Mapping[str, Any]], on_front: Sequence[int], reference: float, margin: float, x: str = "luts"
) -> int | None:
    """The design to take: the cheapest of the front whose return is proved non-inferior to float.

    Where none is proved, the cheapest whose mean return is within `margin` of `reference`, and
    else the best on the front. None if the front is empty.
    """
    ordered = sorted(on_front, key=lambda i: value(rows[i], x) or 0.0)
    for index in ordered:
        if rows[index].get("verdict", {}).get("verdict") == "non-inferior":
            return index
    means = {index: value(rows[index], "mean") for index in ordered}
    known = {index: mean for index, mean in means.items() if mean is not None}  # 0.0 is a return like any other
    for index, mean in known.items():
        if mean >= reference - margin:
            return index
    return max(known, key=lambda i: known[i], default=None)


def why_knee(row: Mapping[str, Any], reference: float, margin: float) -> str:
    """Which of `knee`'s rules chose a row, in words."""
    if row.get("verdict", {}).get("verdict") == "non-inferior":
        return "the cheapest non-inferior design on the front"
    if (value(row, "mean") or 0.0) >= reference - margin:
        return "the cheapest on the front whose mean is within the margin; none there is proved non-inferior"
    return "the best mean on the front, where no design is within the margin"

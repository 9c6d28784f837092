"""Which designs of a study satisfy a wish: a tolerated loss of return or accuracy, the knee of the front, a name."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from quantkit.errors import InputError
from quantkit.pareto import COLUMNS, front, knee, metric_of, value, why_knee
from quantkit.results import Row


def parse_loss(text: str, span: float) -> float:
    """The tolerated loss that "2%" (of `span`, the distance of float and random) or "5.5" stands for.

    >>> parse_loss("2%", 400.0), parse_loss("5.5", 400.0)
    (8.0, 5.5)
    """
    number, percent, rest = text.strip().partition("%")
    try:
        found = float(number)
    except ValueError:
        found = math.nan
    if rest or not (math.isfinite(found) and found >= 0):
        raise InputError(f"--max-loss {text!r} is neither a share such as 2% nor a return such as 5.5, from 0 on")
    return found * span / 100 if percent else found


def loss_bound(row: Mapping[str, Any]) -> float:
    """The one-sided upper bound of the paired loss of return against float, at the verdict's level (95 %, or more where
    a race stopped early); inf where none is known."""
    low = (row.get("verdict") or {}).get("low")
    return math.inf if low is None else -float(low)


def named(row: Mapping[str, Any]) -> str:
    """A design in a few words."""
    return f"{row['id']} (weights {row['weights']}, inputs {row['acts']}, {row['steps']}, per {row['granularity']})"


def span_of(document: Mapping[str, Any]) -> float:
    """Distance between the means of the float and the random policy, or of the float network and a constant answer."""
    return abs(float(document["reference"]["mean"]) - float(document["random"]["mean"]))


def wanted(
    document: Mapping[str, Any],
    rows: Sequence[Row],
    x: str,
    *,
    max_loss: str | None = None,
    at_knee: bool = False,
    design: str | None = None,
) -> tuple[list[Row], str]:
    """The designs that satisfy the wish, cheapest by `x` first and of equal ones the best, and the wish in words.

    InputError unless one wish is given, for an id that names no design or several, and where no design is within
    the loss: it says the nearest and what binds.
    """
    if (max_loss is not None) + at_knee + (design is not None) != 1:
        raise InputError("give one of --max-loss, --knee and --id")
    priced = [row for row in rows if value(row, x) is not None]
    if design is not None:
        found = [row for row in rows if row["id"].startswith(design)]
        if len(found) != 1:
            some = ", ".join(row["id"] for row in (found or rows)[:4])
            raise InputError(f"--id {design!r} names {len(found)} designs of the study; there are: {some}, ...")
        return found, f"design {found[0]['id']} was asked for"
    if not priced:
        raise InputError(f"no design of the study has a number for {x!r}; take another --x")
    if at_knee:
        reference, margin = document["reference"]["mean"], document["margin"]
        index = knee(rows, front(rows, x, "mean"), reference, margin, x)
        assert index is not None
        why = why_knee(rows[index], reference, margin)
        return [rows[index]], f"the knee of {metric_of(rows)} against {COLUMNS[x][1]}, {why}"
    assert max_loss is not None
    span = span_of(document)
    limit = parse_loss(max_loss, span)
    metric, apart = metric_of(rows), "random" if metric_of(rows) == "return" else "the most frequent class"
    share = f", {max_loss} of the {span:.4g} between float and {apart}" if max_loss.rstrip().endswith("%") else ""
    words = f"at most {limit:.4g} of {metric} lost{share}"
    good = [row for row in priced if loss_bound(row) <= limit]
    if not good:
        near = min(priced, key=lambda row: (loss_bound(row), value(row, x)))
        bound, mean = loss_bound(near), -near["verdict"]["diff_mean"]
        digits, of = (2, "episodes") if metric == "return" else (4, "labelled inputs")
        binds = (
            f"its mean loss is {mean:.4g}, and {near['score']['n']:,} {of} leave the interval that wide"
            if mean <= limit
            else f"its mean loss alone is {mean:.4g}"
        )
        percent = f" ({100 * bound / span:.3g}%)" if span and math.isfinite(bound) else ""
        raise InputError(
            f"no design of the study is proved to lose at most {limit:.4g} of {metric}; the nearest possible is "
            f"--max-loss {math.ceil(bound * 10**digits) / 10**digits if math.isfinite(bound) else bound:g}{percent}, "
            f"by {named(near)}: {binds}"
        )
    return sorted(good, key=lambda row: (value(row, x) or 0.0, -row["score"]["mean"])), words

"""What a finished sweep leaves beside its rows: `pareto.csv` and figures."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit.errors import InputError
from quantkit.files import new_file
from quantkit.pareto import COLUMNS, front, knee, metric_of, value
from quantkit.results import Row, read_rows
from quantkit.targets import find_target, seen_from, targets_of

if TYPE_CHECKING:
    from quantkit.model import Normalization

FRONTS = ("luts", "weight_kib", "dsps", "latency_us")


def read_study(folder: Path) -> tuple[dict[str, Any], list[Row]]:
    """study.json and the rows of a study directory; InputError if it is none or has no finished design.

    Rows of races that were decided before all episodes were played are marked `partial`.
    """
    path = folder / "study.json"
    if not path.is_file():
        raise InputError(f"{folder} is not a study directory (no study.json); run quantkit sweep first")
    try:
        document = json.loads(path.read_text())
        language = document["settings"].get("kind") == "language"
        for part in ("reference",) if language else ("reference", "margin"):
            document[part]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InputError(f"{path} is a damaged study; start a new study directory") from None
    if language:
        raise InputError(f"{folder} is a sweep of a language model; its table is {folder / 'perplexity.csv'}")
    every = {row["id"]: row for row in read_rows(folder / "rows.jsonl")}  # two sweeps at once may repeat a design
    whole = document["settings"].get("episodes", 0)
    rows = [
        row | ({"partial": True} if row.get("episodes", whole) < whole else {})
        for row in every.values()
        if "error" not in row
    ]
    if every and not rows:
        raise InputError(f"no design of {folder} can be built: {next(iter(every.values()))['error']}")
    if not rows:
        raise InputError(f"{folder} has no finished design yet; run the sweep again to go on")
    return document, rows


def normalize_of(document: Mapping[str, Any]) -> Normalization:
    """How the study's checkpoint was loaded; an older study tells by its normalizer only."""
    asked = (document.get("origin") or {}).get("normalize")
    folded = document["settings"].get("normalizer") == "fold"
    return asked if asked in ("stage", "fold", "none") else "fold" if folded else "stage"


def failures(folder: Path) -> list[tuple[str, str]]:
    """(design, reason) of every row that has an error."""
    names = ("weights", "acts", "granularity", "steps")
    rows = {row["id"]: row for row in read_rows(folder / "rows.jsonl")}.values()
    return [(", ".join(str(row.get(n)) for n in names), row["error"]) for row in rows if "error" in row]


def default_cost(rows: Sequence[Mapping[str, Any]]) -> str:
    """ "luts", or "weight_kib" where no design has any: no device, or float inputs."""
    return "weight_kib" if all(value(row, "luts") is None for row in rows) else "luts"


def table(rows: Sequence[Mapping[str, Any]], target: str | None = None) -> list[dict[str, Any]]:
    """One flat record per design for a spreadsheet: names, numbers, and a front_X column for each front.

    target: one more column, for studies with several.
    """
    fronts = {x: set(front(rows, x, "mean")) for x in FRONTS}
    records = []
    for index, row in enumerate(rows):
        record = {key: row[key] for key in ("id", "weights", "acts", "granularity", "steps", "family")}
        record |= {} if target is None else {"target": target}
        score = row["score"]
        record |= {"mean": score["mean"], "stderr": score["stderr"], "iqm": score["iqm"], "n": score["n"]}
        record |= {"iqm_low": score["iqm_low"], "iqm_high": score["iqm_high"], "verdict": row["verdict"]["verdict"]}
        record |= {name: value(row, name) for name in COLUMNS if name not in record}
        record |= {f"front_{x}": index in members for x, members in fronts.items()}
        records.append(record)
    return records


def write_table(document: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """`table` as CSV, cheapest design first, for one hardware target after the other; an old file is replaced."""
    import pandas as pd

    targets = targets_of(document["settings"])
    records = [
        (place, record)
        for place, target in enumerate(targets or (None,))
        for record in table(seen_from(document, rows, place)[1], str(target) if len(targets) > 1 else None)
    ]
    with new_file(path, force=True) as temporary:
        frame = pd.DataFrame([record for _, record in records]).assign(place=[place for place, _ in records])
        frame = frame.sort_values(["place", "luts", "weight_kib"], kind="stable").drop(columns="place")
        frame.to_csv(temporary, index=False)


def write_report(
    folder: Path, *, x: str = "luts", y: str = "mean", stem: str = "pareto", target: str | None = None
) -> dict[str, Any]:
    """Write pareto.csv, STEM.png and STEM.svg into the study; what `quantkit pareto` prints.

    target: in whose costs, a part of its name; the study's first by default. The result has `front` (rows ordered by
    cost), `knee` (the design to take), `targets` (all names), `target` and `files`.
    """
    from quantkit.figures import pareto_figure, save_figure

    whole, every = read_study(folder)
    names = [str(one) for one in targets_of(whole["settings"])]
    place = 0 if target is None else find_target(whole["settings"], target)
    document, rows = seen_from(whole, every, place)
    x = default_cost(rows) if x == "luts" else x
    for column in (x, y):
        if all(value(row, column) is None for row in rows):
            present = [name for name in COLUMNS if any(value(row, name) is not None for row in rows)]
            raise InputError(f"no design of {folder} has a number for {column!r}; there are: {', '.join(present)}")
    on_front = front(rows, x, y)
    reference, margin = document["reference"], document["margin"]
    chosen = knee(rows, on_front, reference["mean"], margin, x)
    write_table(whole, every, folder / "pareto.csv")
    settings = document["settings"]
    name = f"{(settings.get('env') or {}).get('id', '')} ({str(settings['algo']).upper()})"
    each = f"{settings['episodes']} episodes"
    if metric_of(rows) == "accuracy":
        name, each = str(settings.get("checkpoint")), f"{settings['episodes']:,} labelled inputs"
    short = any(row["score"]["n"] < reference["n"] for row in rows)
    title = f"{name}: {len(rows)} designs, {'at most ' if short else ''}{each} each"
    title += f", {names[place]}" if len(names) > 1 else ""
    files = save_figure(pareto_figure(rows, reference, margin, x=x, y=y, title=title), folder / stem)
    return {
        "metric": metric_of(rows),
        "reference": {k: reference[k] for k in ("mean", "stderr", "n")},
        "random": (document.get("random") or {}).get("mean"),
        "margin": margin,
        "x": x,
        "y": y,
        "target": names[place] if names else None,
        "targets": names,
        "designs": len(rows),
        "front": [rows[i] for i in on_front],
        "knee": None if chosen is None else rows[chosen],
        "files": [str(folder / "pareto.csv"), *map(str, files)],
    }

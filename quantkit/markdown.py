"""A study as a folder of Markdown and pictures: for a pull request or a paper."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from quantkit.card import code, number, signed
from quantkit.files import new_directory
from quantkit.page import RESOURCES, page_data
from quantkit.pareto import COLUMNS, front, value
from quantkit.report import FRONTS, read_study, write_table
from quantkit.results import Row
from quantkit.targets import seen_from

TABLE = "designs.csv"
_LONGEST = 12  # designs of a front in table and picture


def write_markdown(
    folder: Path, output: Path, *, checkpoint: Path | None = None, force: bool = False
) -> dict[str, Any]:
    """README.md, designs.csv and PNGs in a new directory; {"files": names}. InputError as `page_data`.

    A front is drawn for each cost in which the designs differ by a tenth. `force` replaces a directory with
    designs.csv.
    """
    whole, every = read_study(folder)
    document, rows = seen_from(whole, every, 0)
    data = page_data(folder, checkpoint=checkpoint)
    study = data["study"]
    on_front = front(rows, study["x"], "mean")
    shown = [rows[i] for i in _thinned(on_front, study["knee"])]
    chosen = rows[study["knee"]]
    with new_directory(output, force=force, marker=TABLE) as place:
        write_table(whole, every, place / TABLE)
        pictures = _pictures(place, document, rows, shown, chosen, study)
        text = _text(data, rows, shown, chosen, pictures, folder.name)
        (place / "README.md").write_text(text, encoding="utf-8")
        names = sorted(path.name for path in place.iterdir())
    return {"files": [str(output / name) for name in names]}


def _thinned(on_front: Sequence[int], knee: int) -> list[int]:
    """At most _LONGEST of a front, evenly, with its ends and the knee."""
    if len(on_front) <= _LONGEST:
        return list(on_front)
    step = (len(on_front) - 1) / (_LONGEST - 2)
    kept = {on_front[round(i * step)] for i in range(_LONGEST - 1)} | {knee}
    return [i for i in on_front if i in kept]


def _pictures(
    place: Path,
    document: Mapping[str, Any],
    rows: Sequence[Row],
    shown: Sequence[Row],
    chosen: Row,
    study: Mapping[str, Any],
) -> list[tuple[str, str, str]]:
    """Draw what there is to draw; (file, heading, sentence) of each."""
    from quantkit import figures

    reference, margin = document["reference"], document["margin"]
    found = []

    def save(figure: Any, stem: str, heading: str, sentence: str) -> None:
        for path in figures.save_figure(figure, place / stem):
            if path.suffix == ".svg":
                path.unlink()
        found.append((f"{stem}.png", heading, sentence))

    for x in FRONTS:
        numbers = [v for row in rows if (v := value(row, x)) is not None]
        if numbers and max(numbers) > 1.1 * min(numbers):
            figure = figures.pareto_figure(rows, reference, margin, x=x)
            save(
                figure,
                f"front_{x}",
                f"{study['metric'].capitalize()} against {COLUMNS[x][1]}",
                "Bars: 95 % of the paired difference to float.",
            )
    if study["metric"] == "return" and reference.get("returns") and all(row["score"].get("returns") for row in shown):
        figure = figures.returns_figure(shown, reference)
        save(figure, "returns", "Returns of the front", "Each point is an episode; all play the same seeds.")
    if study["device"] and (chosen.get("cost") or {}).get("layers"):
        figure = figures.hardware_figure(chosen, {name: study["device"][name] for name in RESOURCES})
        save(figure, "hardware", "Hardware of the design to take", f"Design {code(chosen['id'])}, layer by layer.")
    for title, cells in study["sensitivity"].items():
        stem = re.sub(r"\W+", "_", f"sensitivity {title}").strip("_")
        figure = figures.sensitivity_figure(cells, title)
        save(figure, stem, f"Sensitivity: {title}", "One layer alone is quantized, the rest is float.")
    return found


def _text(
    data: Mapping[str, Any],
    rows: Sequence[Row],
    shown: Sequence[Row],
    chosen: Row,
    pictures: Sequence[tuple[str, str, str]],
    study: str,
) -> str:
    from jinja2 import Environment, StrictUndefined

    template = resources.files("quantkit").joinpath("templates/report.md.j2").read_text(encoding="utf-8")
    environment = Environment(
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    environment.filters |= {"num": number, "code": code, "signed": signed}
    columns = [
        name
        for name in dict.fromkeys((data["study"]["x"], "luts", "dsps", "weight_kib", "latency_us"))
        if any(value(row, name) is not None for row in rows)
    ]
    robust = {d["id"]: d["robustness"] for d in data["study"]["designs"] if d["robustness"]}
    return environment.from_string(template).render(
        **data["head"],
        study=data["study"],
        folder=study,
        rows=[(row, [value(row, name) for name in columns], row["id"] == chosen["id"]) for row in shown],
        labels=[COLUMNS[name][1] for name in columns],
        x=COLUMNS[data["study"]["x"]][1],
        pictures=pictures,
        robust=[(row, robust[row["id"]]) for row in rows if row["id"] in robust],
        total=len(rows),
        episodes=data["study"]["episodes"],
        table=TABLE,
    )

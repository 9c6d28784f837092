"""Laws of what a sweep leaves behind: tables that pandas reads and pictures that always get drawn."""

from __future__ import annotations

import json
import math
import random
import warnings
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import pytest
from matplotlib.collections import PathCollection
from typer.testing import CliRunner

from quantkit.cli import app
from quantkit.errors import InputError
from quantkit.figures import pareto_figure, save_figure
from quantkit.pareto import COLUMNS, front, knee
from quantkit.report import FRONTS, read_study, table, write_report
from quantkit.results import append_row

FAMILIES = ("integer", "minifloat", "mixed")


def row(mean: float, luts: float | None, *, index: int = 0, stderr: float | None = 3.0, n: int = 20) -> dict[str, Any]:
    """A row as `evaluate_design` makes it, as far as reports read it."""
    return {
        "id": f"{index:012x}", "weights": "int4 first=int8", "acts": "e3m2 first=int8", "granularity": "row",
        "steps": "equalize+gptq", "family": FAMILIES[index % 3], "bits_per_weight": 4.5, "weight_kib": 2.0 + index,
        "cost": {"error": "float"} if luts is None else
            {"luts": luts, "ffs": luts / 2, "dsps": 0, "bram18": 0.5, "latency_us": 8.0},
        "score": {"mean": mean, "stderr": stderr, "iqm": mean, "iqm_low": mean - 1, "iqm_high": mean + 1, "n": n},
        "verdict": {"verdict": "non-inferior" if mean > -20 else "inferior"},
        "fidelity": {"agreement": 0.9, "kl": 0.01},
    }  # fmt: skip


def cloud(count: int = 25) -> list[dict[str, Any]]:
    """Designs whose return rises with their size, roughly."""
    rng = random.Random(4)
    return [row(-200 / (1 + i) + rng.uniform(-9, 9), 300 * 1.2**i, index=i) for i in range(count)]


CASES: dict[str, list[dict[str, Any]]] = {
    "many": cloud(),
    "one": [row(5.0, 900)],
    "no cost": [row(5.0, None), row(6.0, None, index=1)],
    "one with cost": [row(5.0, None), row(6.0, 700, index=1)],
    "all equal": [row(5.0, 900, index=i) for i in range(4)],
    "no variance": [row(float(i), 900 + i, index=i, stderr=0.0) for i in range(4)],
    "one episode": [row(float(i), 900 + i, index=i, stderr=None, n=1) for i in range(4)],
    "very negative": [row(-1e5 * i - 1, 900 + i, index=i) for i in range(4)],
    "huge": [row(1e12 * i, 10.0**i, index=i) for i in range(8)],
    "zero cost": [row(float(i), 0.0, index=i) for i in range(3)],
    "zero return": [row(0.0, 5.0 + i, index=i, stderr=0.0) for i in range(3)],
}
REFERENCE = {"mean": 10.0, "iqm": 10.0, "stderr": 2.0, "n": 20}


def study(folder: Path, rows: list[dict[str, Any]], **reference: Any) -> Path:
    """A study directory with these rows."""
    folder.mkdir(exist_ok=True)
    settings = {"env": {"id": "CartPole-v1"}, "algo": "ppo", "episodes": 20}
    document = {"settings": settings, "margin": 3.0, "reference": REFERENCE | reference, "random": REFERENCE}
    (folder / "study.json").write_text(json.dumps(document))
    for one in rows:
        append_row(folder / "rows.jsonl", one)
    return folder


@pytest.mark.parametrize(("x", "y"), [("luts", "mean"), ("bram18", "agreement")])
@pytest.mark.parametrize("case", CASES)
def test_a_figure_is_always_drawn(case: str, x: str, y: str) -> None:
    """One design, no front, no variance, negative and huge returns: a figure, without a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = pareto_figure(CASES[case], REFERENCE, 3.0, x=x, y=y, title="µ <title> & $x")
        figure.canvas.draw()
    (axes,) = figure.axes
    assert axes.get_xlabel() == COLUMNS[x][1] and axes.get_ylabel() == COLUMNS[y][1]
    assert all(map(math.isfinite, (*axes.get_xlim(), *axes.get_ylim())))
    plt.close(figure)


def test_every_design_and_the_front_are_in_the_picture() -> None:
    """As many points as designs, the front's steps at its numbers, the design to take labeled with its formats."""
    rows = CASES["many"]
    figure = pareto_figure(rows, REFERENCE, 3.0)
    (axes,) = figure.axes
    points = sum(len(c.get_offsets()) for c in axes.collections if isinstance(c, PathCollection))
    assert points == len(rows) + 1  # and the ring around the design to take
    steps = [line for line in axes.lines if line.get_label() == "Pareto front"]
    chosen = front(rows)
    assert list(steps[0].get_xdata()) == [rows[i]["cost"]["luts"] for i in chosen]
    assert list(steps[0].get_ydata()) == [rows[i]["score"]["mean"] for i in chosen]
    best = knee(rows, chosen, 10.0, 3.0)
    assert best is not None
    text = next(t for t in axes.texts if t.get_text().startswith("W "))
    assert all(
        part in text.get_text()
        for part in ("int4 first=int8", "e3m2", "equalize+gptq", f"{rows[best]['cost']['luts']:,.0f}")
    )
    labels = [t.get_text() for t in axes.get_legend().get_texts()]
    assert len(labels) == len(set(labels)) and any("float policy" in label for label in labels)
    plt.close(figure)


def test_what_is_drawn_is_inside_the_axes() -> None:
    """The reference, its margin's float line and all points of the front lie within the limits."""
    for case, rows in CASES.items():
        if case == "no cost":
            continue
        figure = pareto_figure(rows, REFERENCE, 3.0)
        (axes,) = figure.axes
        low, high = axes.get_ylim()
        means = [rows[i]["score"]["mean"] for i in front(rows)]
        assert low < max(means) < high and low < REFERENCE["mean"] < high, case
        plt.close(figure)


@pytest.mark.parametrize("case", [c for c in CASES if c != "no cost"])
def test_a_report_leaves_csv_and_pictures(case: str, tmp_path: Path) -> None:
    """pareto.csv, pareto.png and pareto.svg exist, are whole, and are the only new files."""
    folder = study(tmp_path / "s", CASES[case])
    report = write_report(folder)
    assert sorted(p.name for p in folder.iterdir()) == [
        "pareto.csv",
        "pareto.png",
        "pareto.svg",
        "rows.jsonl",
        "study.json",
    ]
    assert report["files"] == [str(folder / f"pareto.{suffix}") for suffix in ("csv", "png", "svg")]
    assert (folder / "pareto.png").read_bytes().startswith(b"\x89PNG") and (folder / "pareto.png").stat().st_size > 5000
    assert ElementTree.parse(folder / "pareto.svg").getroot().tag.endswith("svg")
    frame = pd.read_csv(folder / "pareto.csv", dtype={"id": str})
    assert sorted(frame["id"]) == sorted(r["id"] for r in CASES[case])
    assert {"mean", "stderr", "n", "luts", "latency_us", "weight_kib", *(f"front_{x}" for x in FRONTS)} <= set(frame)
    assert set(frame.loc[frame["front_luts"], "id"]) == {r["id"] for r in report["front"]}
    assert frame["mean"].dtype.kind in "if" and frame["front_luts"].dtype == bool
    json.dumps(report, allow_nan=False)
    assert report["knee"] is None or report["knee"] in report["front"]


def test_a_report_without_hardware_cost_is_still_a_report(tmp_path: Path) -> None:
    """Without a device, or with float inputs, the table and a figure against memory are written all the same."""
    folder = study(tmp_path / "s", CASES["no cost"])
    report = write_report(folder)
    assert report["designs"] == 2 and (folder / "pareto.csv").stat().st_size > 100
    assert list((folder).glob("*.png"))


def test_a_report_can_be_made_again(tmp_path: Path) -> None:
    """The same rows give the same bytes of csv and svg; other axes go to their own files."""
    folder = study(tmp_path / "s", CASES["many"])
    write_report(folder)
    first = {p.name: p.read_bytes() for p in folder.iterdir()}
    write_report(folder)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == first
    write_report(folder, x="weight_kib", y="iqm", stem="pareto_iqm_weight_kib")
    assert {p.name for p in folder.iterdir()} - set(first) == {"pareto_iqm_weight_kib.png", "pareto_iqm_weight_kib.svg"}


def test_failed_designs_do_not_enter_the_report(tmp_path: Path) -> None:
    """Rows with an error are left out; if all failed, the message says why."""
    failed = {"id": "f" * 12, "weights": "int4", "error": "a weight of 3 x 4 cannot be split"}
    folder = study(tmp_path / "s", [*CASES["many"], failed])
    assert write_report(folder)["designs"] == len(CASES["many"])
    with pytest.raises(InputError, match="cannot be split"):
        write_report(study(tmp_path / "f", [failed]))


def test_repeated_rows_count_once(tmp_path: Path) -> None:
    """Two sweeps at once may evaluate a design twice: a report counts it once."""
    folder = study(tmp_path / "s", [*CASES["many"], *CASES["many"][:3]])
    assert write_report(folder)["designs"] == len(CASES["many"])


@pytest.mark.parametrize(("x", "y"), [("lutz", "mean"), ("luts", "nothing"), ("action_error", "mean")])
def test_columns_that_are_not_there_are_one_line(tmp_path: Path, x: str, y: str) -> None:
    """Unknown columns, and known ones without a number, are InputErrors and leave no file."""
    folder = study(tmp_path / "s", CASES["many"])
    before = sorted(folder.iterdir())
    with pytest.raises(InputError):
        write_report(folder, x=x, y=y)
    assert sorted(folder.iterdir()) == before


@pytest.mark.parametrize("content", [None, "", "[]", "null", "{}", "{"])
def test_a_directory_that_is_no_study_is_one_line(tmp_path: Path, content: str | None) -> None:
    """A missing, empty, cut or foreign study.json is an InputError that names it."""
    study(tmp_path / "s", CASES["one"])
    path = tmp_path / "s/study.json"
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(InputError, match="study"):
        write_report(tmp_path / "s")


def test_a_study_without_rows_says_so(tmp_path: Path) -> None:
    """Before the first design is finished there is nothing to show."""
    with pytest.raises(InputError, match="no finished design"):
        read_study(study(tmp_path / "s", []))


@pytest.mark.parametrize(("random", "told"), [(9.0, False), (10.0, True), (12.0, True)])
def test_a_float_policy_that_is_no_better_than_chance_is_said(tmp_path: Path, random: float, told: bool) -> None:
    """A margin that is a share of the distance to a random policy means nothing where there is none to lose."""
    folder = study(tmp_path / "s", CASES["many"])
    document = json.loads((folder / "study.json").read_text())
    (folder / "study.json").write_text(json.dumps(document | {"random": REFERENCE | {"mean": random}}))
    result = CliRunner().invoke(app, ["pareto", str(folder)])
    assert result.exit_code == 0 and ("no better than random actions" in result.stderr) == told, result.output


def test_the_table_is_flat() -> None:
    """One record per design with numbers, texts and booleans only, the same keys in each."""
    records = table(CASES["many"])
    assert len(records) == len(CASES["many"]) and len({tuple(r) for r in records}) == 1
    assert all(v is None or isinstance(v, str | int | float | bool) for r in records for v in r.values())


def test_a_figure_that_cannot_be_written_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An exception while saving leaves neither half a picture nor a temporary, and closes the figure."""
    figure = pareto_figure(CASES["one"], REFERENCE, 3.0)
    monkeypatch.setattr(figure, "savefig", lambda path, **_: (Path(path).write_bytes(b"half"), 1 / 0))
    before = len(plt.get_fignums())
    with pytest.raises(ZeroDivisionError):
        save_figure(figure, tmp_path / "pareto")
    assert list(tmp_path.iterdir()) == []
    plt.close(figure)
    assert len(plt.get_fignums()) == before - 1


def test_names_with_dots_keep_them(tmp_path: Path) -> None:
    """A stem with a dot is not cut at it."""
    figure = pareto_figure(CASES["one"], REFERENCE, 3.0)
    assert [p.name for p in save_figure(figure, tmp_path / "v1.2")] == ["v1.2.png", "v1.2.svg"]


def test_sabotage_a_front_with_a_dominated_design_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the table marked every design as a member, the law of csv and front would fail."""
    monkeypatch.setattr("quantkit.report.table", lambda rows, _: [r | {"front_luts": True} for r in table(rows)])
    with pytest.raises(AssertionError):
        test_a_report_leaves_csv_and_pictures("many", tmp_path)
